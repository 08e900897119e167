'use strict';

const LOOK = [5000, 10000];  // ms between two looks at what is new, while the page is seen
const SHARE = .01;  // of its time that the page draws, as far as that leaves the next look in these bounds
const SHOWN_EVENTS = 6;
const RECENT = 20;  // batches over which the pace is taken
const SILENT = 120;  // s without a word, after which a run whose lock nobody is seen to hold is not called running
const LOSSES = /died|failed|lost|drained|hung/;

const at = id => document.getElementById(id);
const pick = () => null;  // the header has it
const view = {page: 'overview', run: null, names: null, compared: new Set(), tags: new Map(), answered: null, built: false};
const texts = new Map();
let next = null;  // timer of the next look; null: nobody sees the page
let drawn = 0;  // ms that drawing took since the last look

// ---- what is asked

/** The answer, or null where it is still the same. `tagged`: it may be. */
async function ask(what, query = {}, tagged = false) {
  const id = `${what} ${query.run}`, headers = tagged && view.tags.has(id) ? {'If-None-Match': view.tags.get(id)} : {};
  const response = await fetch(`/api/${what}?${new URLSearchParams(query)}`, {headers, cache: 'no-store', signal: AbortSignal.timeout(20000)});
  if (response.status === 304) return null;
  if (!response.ok) throw Object.assign(new Error(await response.text()), {status: response.status});
  view.tags.set(id, response.headers.get('ETag'));
  return response.json();
}

function sample(run, i) {
  const id = `${run.name} ${run.mark.split('.')[0]} ${run.samples[i].at}`;  // after a roll-back another one lies there
  if (!texts.has(id)) texts.set(id, ask('sample', {run: run.name, index: i}).catch(error => { texts.delete(id); trouble(error); throw error; }));
  return texts.get(id);
}

async function look() {
  next = drawn = 0;
  try {
    await choose(await ask('runs'));
    for (const name of wanted()) await follow(name);
    if (picked() && standing(picked()) !== view.standing) present();
    await lookAtPage();
    view.answered = Date.now();
    at('offline').hidden = true;
  } catch (error) {
    trouble(error);
  } finally {
    next = document.hidden ? null : setTimeout(look, Math.min(Math.max(LOOK[0], drawn / SHARE), LOOK[1]));
  }
}

async function lookAtPage() {
  if (!picked()) return;
  if (view.page === 'timeline') await timeline.refresh();
  if (view.page === 'throughput') await activity();
  if (view.page === 'trajectories' && !at('viewer').children.length) viewer(at('viewer'));
}

function trouble(error) {
  const kept = view.answered ? ` What is shown is of ${new Date(view.answered).toLocaleTimeString()}.` : '';
  const what = [401, 403].includes(error.status) ? error.message
    : error.status ? `The dashboard’s server reports: ${error.message || error.status}.${kept} Trying again.`
    : error instanceof TypeError || error.name === 'TimeoutError' ? `The dashboard’s server does not answer.${kept} This page goes on when it is back.`
    : `This page has a fault: ${error.message}.`;
  if (at('offline').hidden || at('offline').textContent !== what) at('offline').textContent = what;
  at('offline').hidden = false;
  if (what.startsWith('This page')) throw error;
}

// ---- which runs

const wanted = () => view.run === null ? [] : [view.run, ...[...view.compared].filter(name => name !== view.run)];

async function choose({runs: names, newest: last, demo, metrics: known}) {
  metrics = known;
  at('demo').hidden = !demo;
  if (JSON.stringify(names) === JSON.stringify(view.names)) return;
  view.names = names;
  at('run').replaceChildren(...names.map(name => el('option', {}, name)));
  at('run').closest('label').hidden = names.length < 2;
  view.compared = new Set([...view.compared].filter(name => names.includes(name)));
  if (!names.includes(view.run)) await turnTo(names.includes(begun.get('run')) ? begun.get('run') : last);
  at('run').value = view.run ?? '';
  at('nothing').hidden = names.length > 0;
  at('nothing').textContent = 'No run lies there yet; this page shows it as soon as one begins.';
  chooser();
}

async function turnTo(name) {
  view.run = name;
  state.group = 0;
  remember();
  if (name === null) return;
  await follow(name);
  onlyWanted();
  build();
  present();
  timeline.reset();
  await lookAtPage();
}

/** Take what is new of a run. */
async function follow(name) {
  const now = () => runs.find(r => r.name === name), known = now(), since = known?.mark ?? '';
  const answer = await ask('run', {run: name, since}, Boolean(known));
  if (!answer || (now()?.mark ?? '') !== since) return;  // nothing new, or another answer came first
  const {first, last, curves: more, ...rest} = answer, curves = first ? known.curves : {};
  for (const metric of new Set([...Object.keys(curves), ...Object.keys(more ?? {})])) {
    curves[metric] ??= Array(first).fill(null);
    curves[metric].push(...(more[metric] ?? Array(last - first).fill(null)));
  }
  const run = known ?? {};
  if (!known) runs.push(run);
  Object.assign(run, rest, {curves, skew: rest.status.now - Date.now() / 1000});
  run.calibration ??= {bins: [], delta: null};
  run.exit_cost ??= {windows: [], total: null};
  for (const list of ['evaluations', 'warnings', 'false_exits', 'samples']) run[list] ??= [];
  for (const record of ['config', 'summary', 'heldout']) run[record] ??= {};
  if (known) present();
}

function onlyWanted() {
  runs = runs.filter(r => wanted().includes(r.name));
  state.run = runs.findIndex(r => r.name === view.run);
}

// ---- what is shown

const orNull = error => { trouble(error); return null; };
const timeline = lanes(at('lanes'), query => ask('timeline', {run: view.run, ...query}, timeline.shown.answer !== null).catch(orNull),
  place => ask('span', {run: view.run, at: place}).catch(orNull));

/** Once: what the parts draw follows the data by itself. */
function build() {
  if (view.built) return;
  view.built = true;
  curves(at('curves'), true);
  throughput(at('tokens'));
  time(at('time'));
  exits(at('probes'));
  distributions(at('steps'));
  curves(at('overlaid'));
  turnPage(view.page);
}

function present() {
  const run = picked(), begin = performance.now();
  state.group = Math.max(0, Math.min(state.group, run.samples.length - 1));
  overview(run);
  logs(run);
  comparison();
  perRun.forEach(update => update());
  redraw();
  document.querySelector('h1').textContent = run.name;
  document.title = `${run.name} · stepgrpo`;
  at('freshness').textContent = run.status.written ? `${run.path} was last written ${moment(run.status.written)}, ${new Date(run.status.written * 1000).toLocaleDateString()}.` : '';
  drawn += performance.now() - begin;
}

const newest = (run, name) => run.curves[name]?.findLast(v => v !== null) ?? null;
const earliest = (run, name) => run.curves[name]?.find(v => v !== null) ?? null;
const percent = (x, digits = 1) => x === null ? '–' : `${number(100 * x, digits)} %`;
const figureOr = (x, digits) => x === null ? '–' : number(x, digits);

const SAID = {
  silent: run => `Nothing was written for ${clock(silence(run))}, and nobody is seen to hold its lock: it was killed, or the clocks of its machine and this one disagree. The command that began it goes on with --resume.`,
  interrupted: () => 'It was interrupted. The command that began it goes on with --resume.',
  failed: run => run.status.reason || 'There is no error.txt.',
};

const silence = run => Date.now() / 1000 + run.skew - run.status.written;
const standing = run => run.status.word !== 'unknown' ? run.status.word : silence(run) < SILENT ? 'running' : 'silent';

function overview(run) {
  const {status, config, summary} = run, word = view.standing = standing(run);
  const live = word === 'running', perBatch = Math.ceil((config.train?.prompts_per_batch ?? 1) / (config.train?.prompts_per_update ?? 1));
  const batches = config.train?.num_batches ?? null, done = (newest(run, 'batch') ?? -1) + 1;
  const pace = (run.curves['time/batch'] ?? []).filter(v => v !== null).slice(-RECENT);
  const left = live && pace.length && batches ? (batches - done) * pace.reduce((a, b) => a + b) / pace.length : null;
  const took = summary.seconds ? Object.values(summary.seconds).reduce((a, b) => a + b, 0) : null;
  at('status').replaceChildren(...[
    el('div', {class: 'status'}, el('span', {class: `badge ${word}`}, live ? '● live' : word), el('span', {}, [
      batches ? `batch ${number(done, 0)} of ${number(batches, 0)}` : '', status.started ? `begun ${new Date(status.started * 1000).toLocaleString()}` : '',
      status.restarts ? `restarted ${many(status.restarts, 'time')}` : ''].filter(Boolean).join(' · '))),
    SAID[word] ? el('p', {class: `reason ${word}`}, SAID[word](run)) : null,
    ...run.warnings.map(text => warning(text)),
    run.faults.length ? warning(`What could not be read: ${many(run.faults.length, 'thing')}. See Logs and errors.`) : null,
    batches ? el('progress', {max: batches, value: done, 'aria-label': 'Batches done'}) : null].filter(Boolean));
  const measured = run.evaluations.at(-1), before = run.evaluations[0];
  const than = (key, digits, factor, unit) => measured && measured !== before ? `held out: ${number(factor * before[key].mean, digits)} → ${number(factor * measured[key].mean, digits)}${unit}` : measured ? `held out: ${number(factor * measured[key].mean, digits)}${unit}` : '';
  const first = (name, show) => earliest(run, name) === null ? '' : `first: ${show(earliest(run, name))}`;
  const tiles = [
    ['Updates', figureOr(newest(run, 'update') ?? 0, 0), batches ? `of ${number(batches * perBatch, 0)}` : ''],
    live || took === null ? ['Time left', left === null ? '–' : clock(left), pace.length ? `${number(pace.at(-1), 1)} s per batch` : 'no batch yet'] : ['Time taken', clock(took), pace.length ? `${number(pace.at(-1), 1)} s per batch` : ''],
    ['Reward', figureOr(newest(run, 'reward/mean'), 3), first('reward/mean', x => number(x, 3))],
    ['Accuracy', percent(newest(run, 'reward/accuracy')), than('accuracy', 1, 100, ' %') || first('reward/accuracy', percent)],
    ['Tokens per answer', figureOr(newest(run, 'rollout/tokens'), 1), than('tokens', 1, 1, '') || first('rollout/tokens', x => number(x, 1))],
    ['Steps per answer', figureOr(newest(run, 'rollout/steps'), 2), than('steps', 2, 1, '') || first('rollout/steps', x => number(x, 2))],
    ['Staleness', figureOr(newest(run, 'staleness/mean'), 2), `largest: ${figureOr(newest(run, 'staleness/max'), 0)}`],
    ['Ended on confidence', percent(newest(run, 'exit/confident'), 0), first('exit/confident', x => percent(x, 0))],
    ['Tokens per second', figureOr(newest(run, 'rate/tokens'), 0), first('rate/tokens', x => number(x, 0))],
    ['Workers up', figureOr(newest(run, 'workers/up'), 0), newest(run, 'workers/deaths') ? `${newest(run, 'workers/deaths')} lost so far` : 'none lost'],
  ];
  at('tiles').replaceChildren(...tiles.map(([name, value, note]) => el('dl', {class: 'tile'}, el('dt', {}, name), el('dd', {}, value, el('small', {}, note)))));
  at('outcome').replaceChildren(summary.before || summary.after ? outcomes([run]) : empty('Not evaluated yet.'));
  at('recent').replaceChildren(eventTable(run, SHOWN_EVENTS));
}

function eventTable(run, most) {
  const events = run.events.slice(-most).reverse();
  if (!events.length) return empty(missing(run, 'events.jsonl'));
  return el('table', {class: 'events'}, el('tbody', {}, ...events.map(({time: when, kind, ...rest}) =>
    el('tr', {class: LOSSES.test(kind) && 'loss'}, el('th', {scope: 'row'}, when ? new Date(when * 1000).toLocaleString() : ''), el('td', {}, el('b', {}, String(kind))),
      el('td', {}, Object.entries(rest).filter(([, v]) => v !== null && v !== '' && String(v) !== '').map(([k, v]) => `${k} ${k === 'bytes' ? size(v) : said(v)}`).join(' · '))))));
}

// A placement is of nodes, whose ids are long, and the actors on each.
const said = v => typeof v === 'object' ? Object.entries(v).map(([node, actors]) => `${node.slice(0, 8)}: ${[actors].flat().join(', ')}`).join('; ') : v;

const many = (n, word) => `${number(n, 0)} ${word}${n === 1 ? '' : 's'}`;
const size = bytes => bytes < 1e6 ? `${number(bytes / 1e3, 0)} kB` : bytes < 1e9 ? `${number(bytes / 1e6, 1)} MB` : `${number(bytes / 1e9, 1)} GB`;

const COUNTS = {
  'reward/grader_failures': n => `Could not be graded, and count as wrong: ${many(n, 'response')}.`,
  'policy/skipped': n => `Skipped, because loss or gradient was not finite: ${many(n, 'update')}.`,
  'reward/missing': n => `Batches were short of ${many(n, 'group')} in all: train.refill_limit was reached.`,
};
const LATEST = {
  'checkpoint/failed': n => `Could not be written: ${many(n, 'checkpoint')}.`,
  'store/spilled': n => `${size(n)} went from object stores to disk, which is slow: raise cluster.object_store_mb.`,
  'workers/deaths': n => `Lost: ${many(n, 'rollout worker')}. The events below say which and why.`,
};

function logs(run) {
  const counted = Object.entries(COUNTS).map(([name, text]) => [(run.curves[name] ?? []).reduce((a, b) => a + (b ?? 0), 0), text]);
  const latest = Object.entries(LATEST).map(([name, text]) => [newest(run, name) ?? 0, text]);
  const told = [...run.warnings, ...[...counted, ...latest].filter(([n]) => n > 0).map(([n, text]) => text(n)), ...run.faults];
  at('faults').replaceChildren(told.length ? warning(...told) : empty('No warnings.'),
    ...(run.error ? [el('h3', {}, 'error.txt'), el('pre', {class: 'text', tabindex: 0}, run.error)] : []));
  at('events').replaceChildren(eventTable(run, Infinity), ...(run.num_events > run.events.length ? [empty(`The last ${run.events.length} of ${run.num_events}.`)] : []));
  const id = `${run.name} ${run.stacks} ${run.ray_logs}`;
  if (at('stacks').dataset.of !== id) {  // an open file stays open
    at('stacks').dataset.of = id;
    const shown = el('pre', {class: 'text', tabindex: 0, hidden: true});
    at('stacks').replaceChildren(run.stacks.length || run.ray_logs.length ? el('ul', {class: 'list'}, ...run.stacks.map(file => {
      const button = el('button', {type: 'button'}, file);
      button.addEventListener('click', () => ask('stacks', {run: run.name, file}).then(({text}) => { shown.hidden = false; shown.textContent = text; }).catch(trouble));
      return el('li', {}, button);
    }), ...run.ray_logs.map(name => el('li', {}, `${run.path}/${name}`))) : empty('Nothing hung, so no stacks were written.'), shown);
  }
  const config = JSON.stringify(run.config, null, 2);
  if (at('settings').textContent.indexOf(config) < 0) at('settings').replaceChildren(settings(run));
}

// ---- throughput

function throughput(root) {
  card(root, {title: 'Tokens per second', note: metrics['rate/tokens']}, curve([['rate/tokens']], {zero: true, alone: true}));
  card(root, {title: 'By worker', note: 'A group’s tokens, spread evenly over the time it took.'}, () => {
    const rates = picked().activity?.rates, names = Object.keys(rates?.actors ?? {});
    if (!names.length) return 'No groups in spans.jsonl.';
    return {data: names.map((name, i) => ({x: rates.at.map(t => new Date(t * 1000)), y: rates.actors[name], name: plain(name), stackgroup: 'workers', mode: 'lines',
      line: {width: 1, color: colour(i)}, fillcolor: faint(colour(i), .6), hovertemplate: '%{y:,.0f}'})),
      layout: {hovermode: 'x unified', showlegend: names.length > 1 && names.length < 10, xaxis: {showgrid: false}, yaxis: {rangemode: 'tozero'}, margin: {l: 52, r: 14, t: names.length > 1 ? 34 : 12, b: 44}}};
  });
}

async function activity() {
  const run = picked(), answer = await ask('activity', {run: run.name}, Boolean(run.activity));
  if (!answer) return;
  run.activity = answer;
  const kinds = ({names}) => Object.entries(names).sort(([, a], [, b]) => b - a).map(([name, share]) => `${name} ${percent(share)}`).join(' · ');
  at('shares').replaceChildren(answer.shares.length ? el('table', {class: 'events'}, el('tbody', {}, ...answer.shares.map(s => el('tr', {}, el('th', {scope: 'row'}, s.actor),
    el('td', {}, s.busy === null ? '' : el('b', {}, `idle ${percent(1 - s.busy)}`, el('span', {class: 'busy'}, el('i', {style: `width:${100 * s.busy}%`})))), el('td', {}, kinds(s)))))) : empty('No spans.jsonl yet.'));
  redraw();
}

// ---- several runs

function chooser() {
  at('chosen').replaceChildren(...view.names.map(name => {
    const box = el('input', {type: 'checkbox', checked: wanted().includes(name), disabled: name === view.run});
    box.addEventListener('change', async () => {
      view.compared[box.checked ? 'add' : 'delete'](name);
      try {
        if (box.checked) await follow(name);
      } catch (error) {
        trouble(error);
      }
      onlyWanted();
      chooser();
      present();
    });
    const i = runs.findIndex(r => r.name === name);
    return el('label', {}, box, el('span', {class: 'swatch', style: i < 0 ? '' : `background: var(--c${i % 8})`}), name);
  }));
}

function comparison() {
  at('table').replaceChildren(outcomes(runs));
  at('differences').replaceChildren(differences());
  const id = JSON.stringify(runs.map(r => [r.name, r.summary.after]));
  if (at('tradeoff').dataset.of === id) return;
  at('tradeoff').dataset.of = id;
  at('tradeoff').replaceChildren();
  charts.splice(0, charts.length, ...charts.filter(c => c.box.isConnected));
  tradeoff(at('tradeoff'));
}

function differences() {
  if (runs.length < 2) return empty('Choose other runs above.');
  const flat = (record, path = '') => Object.entries(record).flatMap(([k, v]) => v && typeof v === 'object' && !Array.isArray(v) ? flat(v, `${path}${k}.`) : [[path + k, JSON.stringify(v)]]);
  const all = runs.map(run => new Map(flat(run.config)));
  const keys = [...new Set(all.flatMap(settings => [...settings.keys()]))].filter(k => new Set(all.map(settings => settings.get(k))).size > 1).sort();
  if (!keys.length) return empty('They have the same settings.');
  const made = table(['setting', ...runs.map(r => r.name)], keys.map(k => [k, ...all.map(settings => settings.get(k) ?? 'not there')]));
  made.classList.add('changed');
  return el('div', {class: 'scroll', tabindex: 0, role: 'group', 'aria-label': 'Settings that differ'}, made);
}

// ---- pages

const begun = new URLSearchParams(location.hash.slice(1));  // the address the page was opened with
const tabs = [...document.querySelectorAll('[role=tab]')];

function remember() {
  const to = new URLSearchParams({page: view.page, ...(view.run === null ? {} : {run: view.run})});
  history.replaceState(null, '', `#${to}`);
}

function turnPage(page) {
  view.page = page;
  for (const tab of tabs) {
    const on = tab.dataset.page === page;
    tab.setAttribute('aria-selected', on);
    tab.tabIndex = on ? 0 : -1;
    if (on) tab.scrollIntoView({block: 'nearest', inline: 'center'});
    at(tab.dataset.page).hidden = !on || !view.built;
  }
  remember();
  lookAtPage().catch(trouble);
}

for (const tab of tabs) {
  tab.id = `tab-${tab.dataset.page}`;
  tab.setAttribute('aria-controls', tab.dataset.page);
  at(tab.dataset.page).setAttribute('aria-labelledby', tab.id);
  tab.addEventListener('click', () => turnPage(tab.dataset.page));
}
document.querySelector('[role=tablist]').addEventListener('keydown', event => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  const next = tabs[(tabs.findIndex(t => t.dataset.page === view.page) + by + tabs.length) % tabs.length];
  turnPage(next.dataset.page);
  next.focus();
});
at('run').addEventListener('change', async () => {
  try {
    await turnTo(at('run').value);
    chooser();
  } catch (error) {
    trouble(error);
  }
});

const clock = seconds => {
  const s = Math.round(seconds), two = n => String(n).padStart(2, '0');
  return s < 100 ? `${s} s` : s < 3600 ? `${Math.floor(s / 60)}:${two(s % 60)}` : `${Math.floor(s / 3600)}:${two(Math.floor(s % 3600 / 60))}:${two(s % 60)}`;
};

turnPage(tabs.some(t => t.dataset.page === begun.get('page')) ? begun.get('page') : 'overview');
document.addEventListener('visibilitychange', () => { if (!document.hidden && next === null) look(); });
look();

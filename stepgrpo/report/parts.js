'use strict';

// What the report and the dashboard draw of runs. The page fills in what follows, and has two functions of its own:
// `pick()`, an element to pick a run with, or null; `sample(run, i)`, a sampled group or the promise of one.
let runs = [], tables = [], metrics = {};
const state = {run: 0, group: 0, hidden: new Set()};
const charts = [];
const perRun = [];  // what to bring up to date when another run is picked, or has more to show

// ---- the page's own small parts; text goes in as text, never as markup

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {}))
    if (value !== null && value !== false) node.setAttribute(name, value === true ? '' : value);
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = i => css(`--c${i % 8}`);
const faint = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, '0');
const number = (x, digits = 1) =>
  x.toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits}).replace('-', '−');
const interval = (e, digits, factor = 1) => `[${number(factor * e.low, digits)}, ${number(factor * e.high, digits)}]`;
// Plotly reads tags and entities in its texts.
const plain = text => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
const empty = why => el('p', {class: 'empty'}, why);
const warning = (...said) => el('div', {class: 'warning', role: 'note'}, ...said.map(text => el('p', {}, text)));
const missing = (run, file) => `${run.name} has no ${file}: it was written by an earlier version, or the run has not come that far.`;

// ---- charts

function card(parent, {title, note, wide, picker, height = 290}, build) {
  const box = el('div', {class: 'plot', role: 'img', 'aria-label': title});
  const caption = el('figcaption', {}, el('b', {}, title), note ? el('p', {}, note) : null, picker ?? null);
  parent.append(el('figure', {class: wide ? 'card wide' : 'card'}, caption, box));
  const chart = {box, build, height, width: 0, seen: false, stale: false};
  charts.push(chart);
  new IntersectionObserver(entries => {
    chart.seen = entries.at(-1).isIntersecting;
    if (chart.seen && chart.stale) draw(chart);
  }).observe(box);
  new ResizeObserver(() => { if (box.clientWidth !== chart.width) draw(chart); }).observe(box);
  draw(chart);
}

function draw(chart) {
  const {box, build} = chart;
  const width = chart.width = box.clientWidth;
  chart.stale = false;
  if (!width) return;
  const made = build(width);
  if (typeof made === 'string') {
    Plotly.purge(box);
    box.replaceChildren(empty(made));
    return;
  }
  if (box.firstElementChild?.className === 'empty') box.replaceChildren();
  const {xaxis, yaxis, ...rest} = made.layout;
  const ink = css('--ink'), soft = css('--soft');
  const hover = {bgcolor: css('--card'), bordercolor: css('--line'), font: {color: ink, size: 12}, namelength: -1};
  Plotly.react(box, made.data, {
    width, height: chart.height, margin: {l: 52, r: 14, t: 12, b: 44},
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: soft},
    hoverlabel: hover, showlegend: false, legend: {orientation: 'h', y: 1.02, yanchor: 'bottom', x: 0, traceorder: 'normal', font: {color: ink}},
    // A finger that drags scrolls the page.
    dragmode: matchMedia('(pointer: fine)').matches ? 'zoom' : false,
    uirevision: state.run,  // a zoom outlives new data, not another run
    ...rest, xaxis: axis(xaxis), yaxis: axis(yaxis),
  }, {displayModeBar: false, responsive: false});
}

const axis = more => ({gridcolor: css('--grid'), zerolinecolor: css('--line'), linecolor: css('--line'), ...more,
  title: {text: more?.title, font: {size: 12}, standoff: 8}});

/** What is off the screen is drawn when it comes back: a live page follows its run at a fraction of the cost. */
const redraw = (all = false) => charts.forEach(chart => { if (all || chart.seen) draw(chart); else chart.stale = true; });

/** Moving average whose weights fall off to both sides: an outlier leaves a hump, not a block. */
function smooth(values) {
  const reach = Math.floor(values.length / 25);
  return values.map((value, i) => {
    if (value === null) return null;
    let sum = 0, weights = 0;
    for (let k = Math.max(0, i - reach); k <= Math.min(values.length - 1, i + reach); k++) {
      if (values[k] === null) continue;
      const weight = 1 - Math.abs(k - i) / (reach + 1);
      sum += weight * values[k];
      weights += weight;
    }
    return sum / weights;
  });
}

const bars = (es, key) => ({type: 'data', symmetric: false, thickness: 1.4, width: 3,
  array: es.map(e => e[key].high - e[key].mean), arrayminus: es.map(e => e[key].mean - e[key].low)});

/** Runs overlaid over updates. `lines`: [metric, dash] of each; `evaluated`: what of an evaluation belongs on it;
 * `alone`: only the run that is picked. */
function curve(lines, {share, evaluated, zero, alone} = {}) {
  return () => {
    const data = [];
    const format = share ? '.1%' : '.4~g';
    runs.forEach((run, i) => {
      if (alone ? i !== state.run : state.hidden.has(i)) return;
      for (const [metric, dash, label] of lines) {
        const y = run.curves[metric];
        if (!y) continue;
        const x = run.curves.update, connectgaps = true, mode = 'lines';
        const name = plain(label ? `${run.name}, ${label}` : run.name);
        if (y.length >= 40) data.push({x, y, mode, connectgaps, hoverinfo: 'skip', line: {color: faint(colour(i), .22), width: 1}});
        data.push({x, y: smooth(y), mode, connectgaps, name, line: {color: colour(i), width: 2, dash},
          hovertemplate: `%{y:${format}}`});
      }
      const es = evaluated ? run.evaluations.filter(e => evaluated === 'ratio' || e[evaluated]) : [];
      if (es.length) data.push({
        x: es.map(e => e.update), mode: 'markers', name: plain(`${run.name}, held out`),
        y: es.map(e => evaluated === 'ratio' ? e.tokens.mean / e.steps.mean : e[evaluated].mean),
        error_y: evaluated === 'ratio' ? undefined : {...bars(es, evaluated), color: colour(i)},
        marker: {color: css('--card'), size: 8, line: {color: colour(i), width: 2}}, hovertemplate: `%{y:${format}}`,
      });
    });
    if (!data.length) return !alone && state.hidden.size === runs.length ? 'All runs are switched off above.' : 'Not recorded.';
    return {data, layout: {hovermode: 'x unified', xaxis: {title: 'update', showgrid: false},
      yaxis: {tickformat: share ? '.0%' : undefined, rangemode: zero ? 'tozero' : undefined}}};
  };
}

const picked = () => runs[state.run];

// ---- sections

function table(heads, rows) {
  return el('table', {class: 'table'}, el('thead', {}, el('tr', {}, ...heads.map(h => el('th', {scope: 'col'}, h)))),
    el('tbody', {}, ...rows.map(cells => el('tr', {}, ...cells.map((cell, i) =>
      i ? el('td', {'data-label': heads[i]}, cell) : el('th', {scope: 'row'}, cell))))));
}

const figure = (e, digits, factor = 1) => e
  ? el('span', {}, number(factor * e.mean, digits), el('small', {}, interval(e, digits, factor))) : '';

function move(summary, key, digits, factor = 1) {
  const {before, after} = summary;
  if (!before && !after) return '';
  return el('span', {class: 'move'}, before ? figure(before[key], digits, factor) : el('span'), el('span', {class: 'arrow'}, '→'),
    after ? el('span', {class: 'to'}, figure(after[key], digits, factor)) : el('span', {}, '…'));
}

function outcomes(among) {
  const heads = ['', 'accuracy, %', 'tokens per answer', 'share of tokens, %', 'steps per answer', 'updates'];
  return table(heads, among.map(run => {
    const {status = 'no summary: going on, or killed', before, after} = run.summary;
    const what = [status === 'finished' ? null : status, run.config.reward?.scheme?.replaceAll('_', ' '),
      (after ?? before) ? `${number((after ?? before).problems, 0)} problems` : 'not evaluated'].filter(Boolean).join(' · ');
    return [el('span', {}, run.name, el('small', {}, what)), move(run.summary, 'accuracy', 1, 100), move(run.summary, 'tokens', 1),
      figure(run.summary.compression, 1, 100), move(run.summary, 'steps', 2), number(run.curves.update?.at(-1) ?? 0, 0)];
  }));
}

const settings = run => el('details', {}, el('summary', {}, `Settings of ${run.name}`),
  el('pre', {tabindex: 0}, JSON.stringify(run.config, null, 2)));

function headline(root) {
  for (const run of runs) for (const text of run.warnings) root.append(warning(runs.length > 1 ? `${run.name}. ${text}` : text));
  if (runs.length) root.append(outcomes(runs));
  for (const result of tables) {
    const heads = ['', 'accuracy, %', 'tokens per answer', `share of ${result.reference}, %`, 'steps per answer', 'seeds', 'paper: accuracy / share'];
    const groups = [...new Set(result.methods.map(m => m.group))];
    for (const group of groups) {
      root.append(el('h3', {}, groups.length > 1 ? `${result.name}: ${group}` : result.name),
        table(heads, result.methods.filter(m => m.group === group).map(m => [m.label, figure(m.accuracy, 1, 100), figure(m.tokens, 1),
          figure(m.share, 1, 100), figure(m.steps, 2), String(m.seeds),
          m.published && Object.keys(m.published).length ? `${m.published.accuracy ?? '–'} / ${m.published.share ?? '–'}` : ''])));
    }
  }
  root.append(...runs.map(settings));
}

const EXITS = [['natural', 0], ['confident', 2], ['budget', 1], ['eos', 6], ['repetition', 3]];

/** `alone`: only of the run that is picked. */
function curves(root, alone = false) {
  if (!runs.length) return root.append(empty('No run directory was given; curves are those of runs.'));
  const grid = el('div', {class: 'charts'});
  root.append(grid);
  const about = name => metrics[name];
  card(grid, {title: 'Accuracy', note: 'Lines: rollouts, whose thinking probes may end. Dots: held-out problems.'},
    curve([['reward/accuracy']], {share: true, evaluated: 'accuracy', alone}));
  card(grid, {title: 'Reward', note: about('reward/mean')}, curve([['reward/mean']], {alone}));
  card(grid, {title: 'Tokens', note: about('rollout/tokens')}, curve([['rollout/tokens']], {evaluated: 'tokens', zero: true, alone}));
  card(grid, {title: 'Steps', note: about('rollout/steps')}, curve([['rollout/steps']], {evaluated: 'steps', zero: true, alone}));
  card(grid, {title: 'Tokens per step', note: about('rollout/tokens_per_step')},
    curve([['rollout/tokens_per_step']], {evaluated: 'ratio', zero: true, alone}));
  card(grid, {title: 'Exits by kind', note: 'How thinking ended, as shares of trajectories.', picker: pick()}, () => {
    const run = picked(), x = run.curves.update;
    const kinds = EXITS.filter(([kind]) => run.curves[`exit/${kind}`]?.some(v => v));
    if (!kinds.length) return `${run.name} recorded no exits.`;
    return {
      data: kinds.map(([kind, c]) => ({x, y: smooth(run.curves[`exit/${kind}`]), name: kind, stackgroup: 'exits', mode: 'lines',
        line: {width: 1, color: colour(c)}, fillcolor: faint(colour(c), .62), hovertemplate: '%{y:.1%}'})),
      layout: {hovermode: 'x unified', showlegend: true, margin: {l: 52, r: 14, t: 34, b: 44},
        xaxis: {title: 'update', showgrid: false}, yaxis: {tickformat: '.0%', range: [0, 1]}},
    };
  });
  card(grid, {title: 'Log-probability of the closing', note: about('closing/logprob')}, curve([['closing/logprob']], {alone}));
  card(grid, {title: 'Staleness', note: `Solid: mean versions between a trajectory’s oldest token and its update. Dotted: the largest.`},
    curve([['staleness/mean', 'solid', 'mean'], ['staleness/max', 'dot', 'largest']], {zero: true, alone}));
  card(grid, {title: 'KL divergence', note: about('policy/kl')}, curve([['policy/kl']], {zero: true, alone}));
  card(grid, {title: 'Entropy', note: about('policy/entropy')}, curve([['policy/entropy']], {zero: true, alone}));

  const select = el('select', {'aria-label': 'Quantity'});
  const meaning = el('span', {});
  const explain = () => { meaning.textContent = metrics[select.value]; };
  const fill = () => {
    const names = Object.keys(metrics).filter(m => !['update', 'batch'].includes(m) && runs.some(run => run.curves[m]));
    if (names.length === select.length) return;
    const chosen = select.value || ['policy/grad_norm', 'policy/loss'].find(m => names.includes(m));
    select.replaceChildren(...names.map(name => el('option', {}, name)));
    select.value = chosen ?? names[0];
    explain();
  };
  select.addEventListener('change', () => { explain(); redraw(); });
  perRun.push(fill);
  fill();
  card(grid, {title: 'Any other quantity', wide: true, picker: el('p', {class: 'controls'}, select, meaning)},
    () => curve([[select.value]], {alone})());
}

/** Where labels (of the given pixel sizes) stand beside their points so that none covers another or a point. */
function place(points, arrows, width, height) {
  const dots = arrows.flatMap(([x0, y0, x1, y1]) => Array.from({length: 60}, (_, i) => [x0 + (x1 - x0) * i / 60, y0 + (y1 - y0) * i / 60]));
  const taken = dots.map(([x, y]) => [x - 3, y - 3, x + 3, y + 3]).concat(points.flatMap(p => [[p.x - 7, p.y - 7, p.x + 7, p.y + 7], [p.x - p.left, p.y - 2, p.x + p.right, p.y + 2],
    [p.x - 2, p.y - p.up, p.x + 2, p.y + p.down]]));
  const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  return points.map(p => {
    let best;
    for (const distance of [8, 20, 36, 54, 76, 100]) for (let k = 0; k < 16; k++) {
      const turn = k * Math.PI / 8, dx = Math.cos(turn), dy = Math.sin(turn);
      const x = p.x + dx * (distance + p.w / 2), y = p.y + dy * (distance + p.h / 2);
      const box = [x - p.w / 2 - 2, y - p.h / 2, x + p.w / 2 + 2, y + p.h / 2];
      const outside = p.w * p.h - overlap([box[0] + 2, box[1], box[2] - 2, box[3]], [0, 0, width, height]);
      const cost = 20 * taken.reduce((sum, other) => sum + overlap(box, other), 0) + 50 * outside + distance + (k % 8 ? 6 : 0);
      if (!best || cost < best.cost) best = {cost, box, dx: x - p.x, dy: y - p.y, far: distance > 20};
    }
    taken.push(best.box);
    return best;
  });
}

const pen = document.createElement('canvas').getContext('2d');

/** Estimates {label, tokens, accuracy} as points with error bars both ways and their labels beside them; `starts`: where
 * an arrow to each point begins, if it has one. */
function scatter(points, starts, width, height) {
  const margin = {l: 56, r: 14, t: 14, b: 46};
  const inner = [width - margin.l - margin.r, height - margin.t - margin.b];
  const range = (lows, highs, pad) => {
    const low = Math.min(...lows), high = Math.max(...highs), more = pad * (high - low || Math.abs(high) || 1);
    return [low - more, high + more];
  };
  const seen = [...points, ...starts];
  const xs = range(seen.map(p => p.tokens.low), seen.map(p => p.tokens.high), .09);
  const ys = range(seen.map(p => p.accuracy.low), seen.map(p => p.accuracy.high), .12);
  const px = v => (v - xs[0]) / (xs[1] - xs[0]) * inner[0], py = v => (ys[1] - v) / (ys[1] - ys[0]) * inner[1];
  pen.font = `12.5px ${getComputedStyle(document.body).fontFamily}`;
  const lines = points.map(p => wrap(p.label, width < 560 ? 14 : 24));
  const places = place(points.map((p, i) => ({
    x: px(p.tokens.mean), y: py(p.accuracy.mean), w: Math.max(...lines[i].map(l => pen.measureText(l).width)) + 4, h: 16 * lines[i].length,
    left: px(p.tokens.mean) - px(p.tokens.low), right: px(p.tokens.high) - px(p.tokens.mean),
    up: py(p.accuracy.mean) - py(p.accuracy.high), down: py(p.accuracy.low) - py(p.accuracy.mean),
  })), starts.map((s, i) => [px(s.tokens.mean), py(s.accuracy.mean), px(points[i].tokens.mean), py(points[i].accuracy.mean)]), ...inner);
  return {
    data: points.map((p, i) => ({
      x: [p.tokens.mean], y: [p.accuracy.mean], mode: 'markers', name: plain(p.label), marker: {size: 10, color: colour(p.colour ?? i),
        symbol: ['circle', 'square', 'diamond', 'cross'][Math.floor((p.colour ?? i) / 8) % 4]},
      error_x: {...bars([p], 'tokens'), color: faint(colour(p.colour ?? i), .6)},
      error_y: {...bars([p], 'accuracy'), color: faint(colour(p.colour ?? i), .6)},
      hovertemplate: `${plain(p.label)}<br>accuracy %{y:.1%} ${interval(p.accuracy, 1, 100)}<br>tokens %{x:.1f} ${interval(p.tokens, 1)}<extra></extra>`,
    })),
    layout: {
      margin, hovermode: 'closest', xaxis: {title: 'tokens per answer', range: xs}, yaxis: {title: 'accuracy', range: ys, tickformat: '.0%'},
      annotations: points.map((p, i) => ({
        x: p.tokens.mean, y: p.accuracy.mean, ax: places[i].dx, ay: places[i].dy, xanchor: 'center', yanchor: 'middle',
        text: lines[i].map(plain).join('<br>'), font: {size: 12.5, color: css('--ink')}, showarrow: true, arrowhead: 0, standoff: 6,
        arrowcolor: places[i].far ? colour(p.colour ?? i) : 'rgba(0,0,0,0)', arrowwidth: 1, borderpad: 1,
      })),
    },
  };
}

function wrap(text, most) {
  const lines = [''];
  for (const word of text.split(/\s+/)) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= most) lines.push('');
    lines.push((lines.pop() + ' ' + word).trim());
  }
  return lines;
}

function tradeoff(root) {
  const grid = el('div', {class: 'charts'});
  root.append(grid);
  for (const result of tables)
    card(grid, {title: `Methods of ${result.name}`, wide: true, height: 460,
      note: 'Means over seeds with 95 % intervals both ways; small dots are single seeds.'}, width => {
      const made = scatter(result.methods, [], width, 460);
      const many = result.methods.map((m, i) => [m, i]).filter(([m]) => m.points.length > 1);
      made.data.unshift(...many.map(([m, i]) => ({x: m.points.map(p => p.tokens), y: m.points.map(p => p.accuracy), mode: 'markers',
        marker: {size: 5, color: faint(colour(i), .45)}, text: m.points.map(p => `seed ${p.seed}`), name: plain(m.label),
        hovertemplate: `${plain(m.label)}, %{text}<br>accuracy %{y:.1%}<br>tokens %{x:.1f}<extra></extra>`})));
      return made;
    });
  const moved = runs.map((run, i) => ({run, colour: i})).filter(({run}) => run.summary.before && run.summary.after);
  if (moved.length) card(grid, {title: 'Runs', wide: true, height: 400,
    note: 'From before to after training, on the held-out problems; 95 % intervals both ways.'}, width => {
    const ends = moved.map(m => ({...m.run.summary.after, label: m.run.name, colour: m.colour}));
    const starts = moved.map(m => m.run.summary.before);
    const made = scatter(ends, starts, width, 400);
    made.data.push({x: starts.map(s => s.tokens.mean), y: starts.map(s => s.accuracy.mean), mode: 'markers', text: moved.map(m => plain(m.run.name)),
      marker: {size: 9, color: css('--card'), line: {width: 2, color: moved.map(m => colour(m.colour))}},
      hovertemplate: '%{text}, before<br>accuracy %{y:.1%}<br>tokens %{x:.1f}<extra></extra>'});
    made.layout.annotations.push(...moved.map(({run: {summary: {before, after}}, colour: c}) => ({text: '', showarrow: true, arrowhead: 2, arrowwidth: 1.5,
      arrowcolor: faint(colour(c), .7), x: after.tokens.mean, y: after.accuracy.mean, ax: before.tokens.mean, ay: before.accuracy.mean,
      xref: 'x', yref: 'y', axref: 'x', ayref: 'y', standoff: 8, startstandoff: 7})));
    return made;
  });
  if (!grid.children.length) root.append(empty('Nothing here was evaluated both before and after.'));
}

function distributions(root) {
  if (!runs.length) return root.append(empty('No run directory was given.'));
  const controls = pick(), grid = el('div', {class: 'charts'});
  root.append(...[controls, grid].filter(Boolean));
  for (const [quantity, title] of [['steps', 'Steps per answer'], ['tokens', 'Tokens per answer']])
    card(grid, {title, note: 'Shares of answers; dashed lines are means.'}, () => {
      const histogram = picked().heldout[quantity];
      if (!histogram) return missing(picked(), 'heldout.json');
      const tones = {before: css('--c7'), after: colour(0)};
      const whens = ['before', 'after'].filter(when => histogram.shares[when]);
      const {left, width} = histogram;
      const label = left.map(v => width > 1 ? `${v}–${v + width - 1}` : String(v));
      return {
        data: whens.map(when => ({type: 'bar', x: left.map(v => v + (width - 1) / 2), y: histogram.shares[when], name: when, width,
          customdata: label, marker: {color: faint(tones[when], .55), line: {width: 0}}, hovertemplate: `%{customdata} ${quantity}: %{y:.1%}`})),
        layout: {barmode: 'overlay', bargap: 0, showlegend: true, margin: {l: 52, r: 14, t: 34, b: 44}, hovermode: 'closest',
          xaxis: {title: quantity, showgrid: false}, yaxis: {tickformat: '.0%'},
          shapes: whens.map(when => ({type: 'line', x0: histogram.means[when], x1: histogram.means[when], yref: 'paper', y0: 0, y1: 1,
            line: {color: tones[when], width: 1.5, dash: 'dash'}}))},
      };
    });
}

const PHASES = {prepare: 'model and data', ray: 'Ray', start: 'engines start', before: 'evaluation before', train: 'training', after: 'evaluation after', save: 'saving'};

function time(root) {
  if (!runs.length) return root.append(empty('No run directory was given.'));
  const controls = pick(), grid = el('div', {class: 'charts'});
  root.append(...[controls, grid].filter(Boolean));
  card(grid, {title: 'Each batch', wide: true, note: 'Seconds from one batch’s end to the next. “Other” is bookkeeping, evaluation and changes of turns in between.'}, () => {
    const c = picked().curves;
    if (!c['time/batch']) return `${picked().name} recorded no times.`;
    const at = c['time/batch'].flatMap((v, i) => v === null ? [] : [i]);
    const x = at.map(i => c.batch[i]);
    const of = name => at.map(i => c[name]?.[i] ?? 0);
    const parts = {wait: of('time/wait'), train: of('time/train'), publish: of('time/publish')};
    parts.other = of('time/batch').map((v, i) => Math.max(0, v - parts.wait[i] - parts.train[i] - parts.publish[i]));
    const tones = {wait: 1, train: 0, publish: 2, other: 7};
    return {
      data: [...Object.entries(parts).map(([name, y]) => ({type: 'bar', x, y, name, marker: {color: faint(colour(tones[name]), .8), line: {width: 0}},
        hovertemplate: '%{y:.2f} s'})),
        {x, y: of('time/generate'), name: 'rollouts in flight', mode: 'lines', line: {color: css('--ink'), width: 1.5, dash: 'dot'}, hovertemplate: '%{y:.2f} s'}],
      layout: {barmode: 'stack', bargap: .12, showlegend: true, hovermode: 'x unified', margin: {l: 52, r: 14, t: 34, b: 44},
        xaxis: {title: 'batch', showgrid: false}, yaxis: {title: 'seconds'}},
    };
  });
  const timed = runs.filter(run => run.summary.seconds).reverse();
  card(grid, {title: 'Phases of the run', wide: true, height: 110 + 38 * Math.max(1, timed.length), note: 'Seconds, as the run’s summary has them.'}, width => {
    if (!timed.length) return 'No run has a summary.json with its phases yet.';
    const names = [...new Set(timed.flatMap(run => Object.keys(run.summary.seconds)))];
    const tones = {prepare: 4, ray: 5, start: 3, before: 1, train: 0, after: 2, save: 7}, title = name => plain(PHASES[name] ?? name);
    return {
      data: names.map((name, i) => ({type: 'bar', orientation: 'h', y: timed.map(run => plain(run.name)), x: timed.map(run => run.summary.seconds[name] ?? 0),
        name: title(name), marker: {color: faint(colour(tones[name] ?? i), .8)}, hovertemplate: `${title(name)}: %{x:.1f} s<extra></extra>`})),
      layout: {barmode: 'stack', showlegend: true, margin: {l: width < 560 ? 14 : 110, r: 14, t: width < 560 ? 74 : 36, b: 44}, hovermode: 'closest', bargap: .35,
        xaxis: {title: 'seconds'}, yaxis: {showticklabels: width >= 560, automargin: width >= 560, type: 'category'}},
    };
  });
}

const span = (w, word) => w.first === w.last ? `${word} ${w.first}` : `${word}s ${w.first}–${w.last}`;

function exits(root) {
  if (!runs.length) return root.append(empty('No run directory was given.'));
  const controls = pick(), grid = el('div', {class: 'charts'});
  root.append(...[controls, grid].filter(Boolean));
  const none = () => `${picked().name} has no probes that were read to their end: it did not probe, or was written by an earlier version.`;
  card(grid, {title: 'Is confidence worth trusting?', height: 340,
    note: 'Dots: share of right tentative answers per bin of confidence, with 95 % Wilson intervals as if probes were independent; n is their number. Diamonds: the bin’s mean confidence, where a calibrated probe would stand.'}, width => {
    const {bins, delta, below_delta: below} = picked().calibration;
    if (!bins.length) return none();
    const x = bins.map((_, i) => i), small = width < 440;
    return {
      data: [
        {x, y: bins.map(b => b.confidence), mode: 'markers', name: 'mean confidence', marker: {symbol: 'diamond-open', size: 10, color: css('--soft')}, hovertemplate: 'confidence %{y:.3f}<extra></extra>'},
        {x, y: bins.map(b => b.mean), mode: 'markers', name: 'share right', marker: {size: 9, color: colour(0)}, customdata: bins.map(b => [b.n, b.label]),
          error_y: {...bars(bins.map(b => ({it: b})), 'it'), color: colour(0)}, hovertemplate: '%{customdata[1]}: %{y:.1%} right of %{customdata[0]}<extra></extra>'}],
      layout: {showlegend: true, margin: {l: 52, r: 14, t: 34, b: small ? 84 : 62}, hovermode: 'closest',
        xaxis: {title: 'confidence', tickvals: x, ticktext: bins.map(b => `${b.label}<br>n=${number(b.n, 0)}`), tickfont: {size: small ? 10 : 11}, range: [-.6, bins.length - .4], showgrid: false, zeroline: false},
        yaxis: {tickformat: '.0%', range: [-.03, 1.05]},
        ...(delta === null ? {} : {shapes: [{type: 'line', x0: below - .5, x1: below - .5, yref: 'paper', y0: 0, y1: 1, line: {color: colour(1), width: 1.5, dash: 'dash'}}],
          annotations: [{x: below - .5, yref: 'paper', y: .02, yanchor: 'bottom', xanchor: below > bins.length / 2 ? 'right' : 'left', xshift: below > bins.length / 2 ? -4 : 4,
            text: `exits above ${delta}`, showarrow: false, font: {color: colour(1)}}]})},
    };
  });
  card(grid, {title: 'False exits', height: 340, note: 'Confident probes whose tentative answer was wrong, as a share of the confident ones, pooled over windows of batches.'}, () => {
    const windows = picked().false_exits;
    if (!windows.length) return none();
    return {
      data: [{x: windows.map(w => (w.first + w.last) / 2), y: windows.map(w => w.mean), mode: 'lines+markers', line: {color: colour(6), width: 2}, marker: {size: 7},
        error_y: {...bars(windows.map(w => ({it: w})), 'it'), color: faint(colour(6), .6)}, text: windows.map(w => `${span(w, 'batch').replace('batchs', 'batches')}: of ${number(w.n, 0)}`),
        hovertemplate: '%{text}, %{y:.1%} wrong<extra></extra>'}],
      layout: {hovermode: 'closest', xaxis: {title: 'batch', showgrid: false}, yaxis: {tickformat: '.0%', rangemode: 'tozero'}},
    };
  });
  const price = el('span', {});
  const tell = () => {
    const total = picked().exit_cost.total;
    price.textContent = total ? `Control samples were right more often than samples that may be cut by ${number(100 * total.mean)} points ${interval(total, 1, 100)}`
      + (total.low > 0 ? ': exits cost accuracy.' : total.high < 0 ? ': exits gained accuracy.' : ': no difference that this many samples can show.') : '';
  };
  perRun.push(tell);
  tell();
  card(grid, {title: 'What an exit costs', wide: true, picker: el('p', {}, price),
    note: 'Control samples are never cut and are a random share of the same groups. Means over windows of updates, with 95 % intervals.'}, () => {
    const {windows} = picked().exit_cost;
    if (!windows.length) return `${picked().name} has no control samples to compare with (rollout.control_fraction).`;
    const reach = (windows.at(-1).last - windows[0].first) / windows.length;
    return {
      data: [['control', 'control, never cut', 7, -.06], ['treated', 'may be cut', 2, .06]].map(([key, name, c, shift]) => ({
        x: windows.map(w => (w.first + w.last) / 2 + shift * reach), y: windows.map(w => w[key].mean), name, mode: 'lines+markers',
        line: {color: colour(c), width: 1.5}, marker: {size: 7}, error_y: {...bars(windows, key), color: faint(colour(c), .7)},
        text: windows.map(w => span(w, 'update')), hovertemplate: `${name}, %{text}: %{y:.1%}<extra></extra>`})),
      layout: {hovermode: 'closest', showlegend: true, margin: {l: 52, r: 14, t: 34, b: 44}, xaxis: {title: 'update', showgrid: false}, yaxis: {tickformat: '.0%'}},
    };
  });
}

// ---- trajectories

const MARKS = {true: ['right', '✓'], false: ['wrong', '✗']};

function mark(correct) {
  const [name, sign] = MARKS[correct] ?? [];
  return name ? el('span', {class: name, 'aria-label': name}, ` ${sign}`) : null;
}

function probe(p) {
  const sure = p.confidence === null ? 'not read to its end' : p.confidence.toFixed(3);
  const title = `Probe: ${p.verdict}, ${p.confidence === null ? sure : `confidence ${p.confidence}`}`;
  return el('span', {class: `probe ${p.verdict}`, title}, `${p.answer || 'no answer'} · ${sure}`, mark(p.correct));
}

function trajectory(t, most, close) {
  const card = el('article', {class: 'card trajectory'}), side = t.advantage === null ? 0 : t.advantage / (most || 1);
  const share = `${Math.abs(side) * 50}%`;
  card.append(el('header', {},
    el('div', {class: 'badges'}, el('span', {class: `badge ${t.correct ? 'right' : 'wrong'}`}, t.correct ? '✓ right' : '✗ wrong'),
      el('span', {class: `badge ${t.exit}`}, `${t.exit} exit`), t.control ? el('span', {class: 'badge control', title: 'never cut'}, 'control') : null,
      t.complete ? null : el('span', {class: 'badge wrong'}, 'out of tokens')),
    el('div', {class: 'facts'}, el('span', {}, el('b', {}, String(t.num_steps)), ` step${t.num_steps === 1 ? '' : 's'}, `, el('b', {}, number(t.num_tokens, 0)), ' tokens'),
      t.reward === null ? null : el('span', {}, 'reward ', el('b', {}, number(t.reward, 2))),
      t.advantage === null ? null : el('span', {}, 'advantage ', el('b', {}, `${t.advantage > 0 ? '+' : ''}${number(t.advantage, 2)}`))),
    el('div', {class: 'bar', 'aria-hidden': true}, el('i', {style: `width:${share};${side < 0 ? 'right' : 'left'}:50%;background:var(--${side < 0 ? 'bad' : 'good'})`}))));
  const text = el('div', {class: 'text', tabindex: 0, 'aria-label': 'Response'});
  card.append(text);

  // Offsets count characters, and a JavaScript string counts UTF-16 units.
  const letters = Array.from(t.text);
  const found = t.text.indexOf(close);
  const end = t.cut ?? (found < 0 ? letters.length : Array.from(t.text.slice(0, found)).length);
  const opens = [...new Set([0, ...t.steps.filter(at => at < end)])];
  const slice = (from, to) => letters.slice(from, to).join('');
  opens.forEach((from, i) => {
    const last = i === opens.length - 1, to = last ? end : opens[i + 1];
    const said = el('div', {class: 'said'});
    let at = from;
    for (const p of t.probes.filter(p => (p.at > from || i === 0) && (p.at <= to || last))) {
      said.append(at === from ? slice(at, p.at).trimStart() : slice(at, p.at), probe(p));
      at = p.at;
    }
    said.append(at === from ? slice(at, to).trim() : slice(at, to).trimEnd());
    text.append(el('div', {class: 'step'}, el('span', {class: 'number', 'aria-label': `Step ${i + 1}`}, String(i + 1)), said));
  });
  const forced = t.cut === null ? null : slice(t.cut, t.closed).trim();
  if (t.cut !== null) text.append(el('div', {class: 'cut'}, t.exit === 'confident' ? '✂ cut here' : `✂ closed here: ${t.exit}`));
  const answer = slice(t.cut === null ? end : t.closed, letters.length).trim();
  if (forced || answer) text.append(el('div', {class: 'answer'}, el('span'), el('div', {class: 'said'}, forced ? el('span', {class: 'forced', title: 'forced, not sampled'}, forced) : null,
    forced ? ' ' : null, answer)));
  return card;
}

function viewer(root) {
  if (!runs.length) return root.append(empty('No run directory was given.'));
  const controls = pick(), body = el('div', {});
  root.append(...[controls, body].filter(Boolean));
  let step = () => {}, shows = null;
  const build = () => {
    const run = picked(), {samples} = run;
    step = () => {};
    if (!samples.length) {
      shows = null;
      return body.replaceChildren(empty(missing(run, 'samples.jsonl')));
    }
    const right = s => s.trajectories.filter(t => t.correct).length;
    const options = samples.map((s, i) => el('option', {value: i}, `batch ${s.batch}, draw ${s.draw}: ${right(s)} of ${s.trajectories.length} right`));
    if (shows?.run !== run) {
      const select = el('select', {'aria-label': 'Group', id: 'group'}), slider = el('input', {type: 'range', min: 0, 'aria-label': 'Group'});
      const previous = el('button', {type: 'button', id: 'previous'}, '← Previous'), next = el('button', {type: 'button', id: 'next'}, 'Next →');
      select.addEventListener('change', () => step(select.value - state.group));
      slider.addEventListener('input', () => step(slider.value - state.group));
      previous.addEventListener('click', () => step(-1));
      next.addEventListener('click', () => step(1));
      const group = el('div', {});
      const sign = (verdict, text) => el('span', {class: `probe ${verdict}`}, text);
      body.replaceChildren(el('div', {class: 'controls'}, previous, next, select, slider), group,
        el('p', {class: 'legend'}, sign('confident', 'confident: ends thinking'), sign('declined', 'declined'), sign('stale', 'stale: answered by other weights'),
          el('span', {}, '✓ ✗ whether the tentative answer is right'), el('span', {class: 'forced'}, 'forced closing'), el('span', {}, 'bar: advantage within the group')));
      shows = {run, select, slider, previous, next, group};
    }
    const {select, slider, previous, next, group} = shows;
    select.replaceChildren(...options);
    slider.max = samples.length - 1;
    const reflect = () => {
      select.value = slider.value = state.group;
      previous.disabled = state.group === 0;
      next.disabled = state.group === samples.length - 1;
    };
    const go = async to => {
      state.group = Math.min(samples.length - 1, Math.max(0, to));
      reflect();
      const wanted = state.group, s = await sample(run, wanted);
      if (shows?.group !== group || state.group !== wanted) return;  // another one was asked for meanwhile
      const most = Math.max(...s.trajectories.map(t => Math.abs(t.advantage ?? 0)));
      group.replaceChildren(
        el('dl', {class: 'prompt'}, el('dt', {}, 'Prompt'), el('dd', {tabindex: 0}, s.prompt), el('dt', {}, 'Truth'), el('dd', {}, String(s.truth)), el('dt', {}, 'Problem'), el('dd', {}, s.key)),
        el('div', {class: 'group', tabindex: 0, role: 'group', 'aria-label': 'Trajectories of the group'}, ...s.trajectories.map(t => trajectory(t, most, run.config.model?.think_close ?? '</think>'))));
    };
    step = by => go(state.group + by);
    if (group.children.length && state.group < samples.length) reflect();
    else go(state.group);
  };
  perRun.push(build);
  build();
  addEventListener('keydown', event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || !root.offsetParent || event.altKey || event.ctrlKey || event.metaKey || event.target.closest('input, select')) return;
    event.preventDefault();
    step(by);
  });
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => redraw(true));
addEventListener('beforeprint', () => { document.documentElement.classList.add('printing'); redraw(true); });
addEventListener('afterprint', () => { document.documentElement.classList.remove('printing'); redraw(); });

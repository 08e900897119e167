'use strict';

/** Lanes of blocks on a canvas, a window of them at a time. `fetchWindow(query)`: the promise of an answer of /api/timeline, or
 * of null: nothing new. `fetchSpan(at)`: of all that is known of a span, or null. */
function lanes(root, fetchWindow, fetchSpan) {
  const LABEL = 168, NARROW_LABEL = 92, ROW = 9, GAP = 5, HEAD = 22, AXIS = 26;
  const shown = {from: null, to: null, follow: true, colour: 'version', off: new Set(['probe', 'reference', 'old', 'optimize', 'snapshot']), answer: null, chosen: -1};
  let asked = 0, waiting = false;

  const button = (text, title, act) => {
    const b = el('button', {type: 'button', title, 'aria-label': title}, text);
    b.addEventListener('click', act);
    return b;
  };
  const follow = el('input', {type: 'checkbox', checked: true});
  follow.addEventListener('change', () => { shown.follow = follow.checked; refresh(); });
  const colouring = el('select', {'aria-label': 'Colours'}, el('option', {value: 'version'}, 'weights’ version'), el('option', {value: 'stale'}, 'staleness'), el('option', {value: 'name'}, 'kind of work'));
  colouring.addEventListener('change', () => { shown.colour = colouring.value; paint(); });
  const canvas = el('canvas', {tabindex: 0, role: 'application', 'aria-label': 'Timeline. Arrow keys move, plus and minus zoom, Home shows everything, End shows the newest minute. The page Throughput says in figures how busy each actor was.'});
  const chips = el('fieldset', {class: 'chips small', 'aria-label': 'Kinds of work shown'});
  const said = el('p', {class: 'detail', 'aria-live': 'polite'}, 'Point at a block, or tap it, for what it was.');
  const key = el('div', {class: 'key'}), span = el('span', {});
  root.replaceChildren(
    el('div', {class: 'controls'}, button('−', 'Zoom out', () => zoom(2)), button('+', 'Zoom in', () => zoom(.5)), button('◂', 'Earlier', () => move(-.5)), button('▸', 'Later', () => move(.5)),
      button('Everything', 'Show the whole run', everything), button('Last minute', 'Show the newest minute', () => last(60)), el('label', {}, follow, ' follow'), el('label', {}, 'Colours ', colouring), span),
    chips, el('div', {class: 'lanes'}, canvas), key, said);

  const width = () => Math.max(0, root.clientWidth - 2), label = () => width() < 620 ? NARROW_LABEL : LABEL;
  const seconds = () => shown.to - shown.from;

  async function refresh() {
    if (!width()) return;
    if (waiting) { asked++; return; }
    waiting = true;
    const turn = ++asked;
    try {
      const kinds = shown.answer ? shown.answer.names.filter(n => !shown.off.has(n)) : null;
      const whole = shown.from === null;
      const query = {pixels: Math.max(100, width() - label()), ...(whole ? {} : {from: shown.from, to: shown.to}), ...(kinds ? {names: kinds.join(',')} : {})};
      const answer = await fetchWindow(query);
      if (answer) take(answer, whole);
    } finally {
      waiting = false;
      if (asked !== turn) refresh();
    }
  }

  function take(answer, whole) {
    const first = !shown.answer, [start, end] = answer.extent;
    const ended = shown.answer?.extent[1];
    shown.answer = answer;
    if (!answer.names.length) {
      canvas.hidden = true;
      said.textContent = answer.more ? `Reading spans.jsonl: ${number(100 * answer.read, 0)} %.` : 'No spans.jsonl yet: the run was written by an earlier version, or has just begun.';
      if (answer.more) asked++;
      return;
    }
    canvas.hidden = false;
    if (first) {
      said.textContent = 'Point at a block, or tap it, for what it was.';
      asked++;  // without the kinds that are switched off
    }
    fillChips(answer.names);
    // Live, the window goes along with the end.
    if (!whole && shown.follow && end !== ended && ended !== undefined && shown.to >= ended - 1) {
      const length = seconds();
      [shown.from, shown.to] = [end - length, end];
      asked++;
    }
    if (answer.more) asked++;
    span.textContent = [`${number(answer.spans, 0)} spans in ${duration(answer.to - answer.from)}`, answer.more ? `reading, ${number(100 * answer.read, 0)} %` : ''].filter(Boolean).join(' · ');
    paint();
  }

  function fillChips(names) {
    if (chips.children.length === names.length) return;
    chips.replaceChildren(...names.map(name => {
      const box = el('input', {type: 'checkbox', checked: !shown.off.has(name)});
      box.addEventListener('change', () => { shown.off[box.checked ? 'delete' : 'add'](name); refresh(); });
      return el('label', {}, box, name);
    }));
  }

  // ---- where it looks

  const bounds = () => shown.from === null ? [shown.answer.from, shown.answer.to] : [shown.from, shown.to];

  function look(from, to) {
    const [start, end] = shown.answer.extent, length = Math.min(Math.max(to - from, .005), (end - start) * 1.1 + 1);
    from = Math.min(Math.max(from, start - length / 2), end - length / 2);
    [shown.from, shown.to] = [from, from + length];
    paint();
    refresh();
  }
  function zoom(factor, at = .5) {
    if (!shown.answer) return;
    const [from, to] = bounds(), centre = from + at * (to - from);
    look(centre - (centre - from) * factor, centre + (to - centre) * factor);
  }
  function move(share) {
    if (!shown.answer) return;
    const [from, to] = bounds();
    look(from + share * (to - from), to + share * (to - from));
  }
  function everything() { [shown.from, shown.to] = [null, null]; refresh(); }
  function last(length) {
    if (!shown.answer) return;
    const end = shown.answer.extent[1];
    look(end - length, end);
  }

  // ---- drawing

  function layout() {
    const tracks = [];
    let y = HEAD, actor = null, lane = 0;
    for (const track of shown.answer.tracks) {
      if (track.actor !== actor) { y += actor === null ? 0 : 10; tracks.push({...track, y, heading: true}); y += HEAD - 4; actor = track.actor; }
      tracks.push({...track, y, lane});
      y += track.lanes * ROW + GAP;
      lane += track.lanes;
    }
    return {tracks, height: y + AXIS};
  }

  const tone = (block, name) => {
    if (shown.colour === 'name') return colour(shown.answer.names.indexOf(name));
    const value = shown.colour === 'version' ? block.version : block.stale;
    return value < 0 ? css('--c7') : shown.colour === 'version' ? colour(value % 7) : css(['--c2', '--c0', '--c4', '--c1', '--c6'][Math.min(value, 4)]);
  };

  let boxes = [];  // of what is on screen, for pointing: [x0, y0, x1, y1, index, track]
  function paint() {
    const {answer} = shown;
    if (!answer || !width()) return;
    const {tracks, height} = layout(), ratio = devicePixelRatio || 1, left = label(), right = width();
    canvas.style.height = `${height}px`;
    canvas.width = right * ratio;
    canvas.height = height * ratio;
    const g = canvas.getContext('2d'), [from, to] = bounds(), scale = (right - left) / (to - from);
    const x = seconds => left + (seconds - from) * scale;
    const font = getComputedStyle(document.body).fontFamily;
    g.scale(ratio, ratio);
    boxes = [];
    const ink = css('--ink'), soft = css('--soft'), grid = css('--grid');
    g.textBaseline = 'middle';
    ticks(from, to, Math.max(2, Math.floor((right - left) / 90))).forEach(({at, text}) => {
      g.fillStyle = grid; g.fillRect(x(at), 0, 1, height - AXIS);
      g.fillStyle = soft; g.font = `12px ${font}`; g.fillText(text, Math.min(x(at) + 4, right - 60), height - AXIS / 2);
    });
    const rows = [];  // of each lane: its y and track
    for (const track of tracks) {
      if (track.heading) {
        g.fillStyle = ink; g.font = `600 12.5px ${font}`; g.fillText(track.actor, 8, track.y + 8, right - 16);
        continue;
      }
      g.fillStyle = soft; g.font = `12px ${font}`; g.fillText(track.name, 18, track.y + ROW / 2, left - 24);
      for (let i = 0; i < track.lanes; i++) rows[track.lane + i] = {y: track.y + i * ROW, track};
    }
    g.save();
    g.beginPath(); g.rect(left, 0, right - left, height - AXIS); g.clip();
    const b = answer.blocks, tones = new Map(), palette = Array.from({length: 7}, (_, i) => colour(i));
    for (let i = 0; i < b.lane.length; i++) {
      const row = rows[b.lane[i]], x0 = x(answer.from + b.start[i]), x1 = Math.max(x0 + 1, x(answer.from + b.start[i] + b.seconds[i]) - .5);
      if (!row || x1 < left || x0 > right) continue;
      const of = {version: b.version[i], stale: b.stale[i]}, id = `${row.track.name} ${of.version} ${of.stale}`;
      if (!tones.has(id)) tones.set(id, tone(of, row.track.name));
      g.fillStyle = tones.get(id);
      g.globalAlpha = Math.max(.25, b.busy[i]);
      g.fillRect(x0, row.y, x1 - x0, ROW - 1.5);
      // Begun under older weights: a line of their colour below.
      if (shown.colour === 'version' && b.oldest[i] !== b.version[i] && b.oldest[i] >= 0) { g.fillStyle = palette[b.oldest[i] % 7]; g.fillRect(x0, row.y + 5, x1 - x0, 2.5); }
      if (b.at[i] === shown.chosen) { g.globalAlpha = 1; g.strokeStyle = ink; g.lineWidth = 1.5; g.strokeRect(x0 - 1, row.y - 1, x1 - x0 + 2, ROW); }
      boxes.push([x0, row.y, x1, row.y + ROW, i, row.track]);
    }
    g.restore();
    key.replaceChildren(...legend());
  }

  function legend() {
    const item = (c, text) => el('span', {}, el('i', {style: `background:${c}`}), text);
    if (shown.colour === 'name') return [];
    if (shown.colour === 'stale') return [...[0, 1, 2, 3].map(n => item(tone({stale: n}), `${many(n, 'version')} old at its update`)), item(tone({stale: 4}), '4 or more'), item(css('--c7'), 'no group, or not trained on yet')];
    const versions = [...new Set(shown.answer.blocks.version)].filter(v => v >= 0).sort((a, b) => a - b);
    return [...versions.slice(-7).map(v => item(tone({version: v}), `weights ${v}`)), item(css('--c7'), 'no weights of its own'), el('span', {}, versions.length > 7 ? 'Colours come again every 7 versions.' : '', ' A second colour below: begun under older weights.')];
  }

  function ticks(from, to, most) {
    const steps = [.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400];
    const step = steps.find(s => (to - from) / s <= most) ?? 86400 * Math.ceil((to - from) / 86400 / most);
    const zone = -new Date(from * 1000).getTimezoneOffset() * 60, out = [];
    for (let at = Math.ceil((from + zone) / step) * step - zone; at < to; at += step) out.push({at, text: moment(at, step)});
    return out;
  }

  // ---- pointing and keys

  const nearest = event => {
    const r = canvas.getBoundingClientRect(), x = event.clientX - r.left, y = event.clientY - r.top;
    return boxes.find(b => x >= b[0] - 1 && x <= b[2] + 1 && y >= b[1] && y <= b[3]) ?? boxes.find(b => x >= b[0] - 5 && x <= b[2] + 5 && y >= b[1] - 2 && y <= b[3] + 2);
  };
  async function tell(box) {
    const b = shown.answer.blocks, [, , , , i, track] = box;
    const when = moment(shown.answer.from + b.start[i], .001);
    shown.chosen = b.at[i];
    paint();
    if (b.count[i] > 1) {
      said.replaceChildren(el('b', {}, `${track.actor}: ${number(b.count[i], 0)} × ${track.name}`), ` from ${when}, within ${duration(b.seconds[i])}, under way in ${number(100 * b.busy[i], 0)} % of it. Zoom in to tell them apart.`);
      return;
    }
    const all = await fetchSpan(b.at[i]) ?? {};
    if (shown.chosen !== b.at[i]) return;
    const rest = Object.entries(all).filter(([k]) => !['actor', 'name', 'start', 'seconds'].includes(k)).map(([k, v]) => `${k} ${typeof v === 'number' ? v.toLocaleString('en') : v}`);
    if (b.stale[i] >= 0) rest.push(`${many(b.stale[i], 'version')} old at its update`);
    said.replaceChildren(el('b', {}, `${track.actor}: ${track.name}`), [` at ${when}, ${duration(b.seconds[i])}`, ...rest].join(' · '));
  }

  const held = new Map();
  let drag = null;
  canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, event.clientX);
    if (shown.answer) drag = {x: event.clientX, bounds: bounds(), moved: false, spread: spread()};
  });
  canvas.addEventListener('pointermove', event => {
    if (!shown.answer) return;
    if (!held.has(event.pointerId)) {
      const box = nearest(event);
      if (box && shown.answer.blocks.at[box[4]] !== shown.chosen) tell(box);
      return;
    }
    held.set(event.pointerId, event.clientX);
    const [from, to] = drag.bounds, inner = width() - label();
    if (held.size > 1) {
      const now = spread(), centre = (from + to) / 2, half = (to - from) / 2 * drag.spread / Math.max(now, 10);
      drag.moved = true;
      look(centre - half, centre + half);
    } else if (drag.moved || Math.abs(event.clientX - drag.x) > 4) {
      drag.moved = true;
      const by = (drag.x - event.clientX) / inner * (to - from);
      look(from + by, to + by);
    }
  });
  const spread = () => held.size > 1 ? Math.abs([...held.values()][0] - [...held.values()][1]) : 0;
  for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, event => {
    held.delete(event.pointerId);
    const box = end === 'pointerup' && drag && !drag.moved && nearest(event);
    if (box) tell(box);
    if (shown.answer) drag = {x: [...held.values()][0], bounds: bounds(), moved: true, spread: spread()};
  });
  canvas.addEventListener('wheel', event => {
    if (!shown.answer || !(event.ctrlKey || event.metaKey || event.shiftKey)) return;
    event.preventDefault();
    const r = canvas.getBoundingClientRect(), by = event.deltaY || event.deltaX;
    if (event.shiftKey) move(Math.sign(by) * .1);
    else zoom(Math.exp(by / 300), Math.min(1, Math.max(0, (event.clientX - r.left - label()) / (width() - label()))));
  }, {passive: false});
  canvas.addEventListener('dblclick', event => zoom(.4, (event.clientX - canvas.getBoundingClientRect().left - label()) / (width() - label())));
  canvas.addEventListener('keydown', event => {
    const act = {ArrowLeft: () => move(-.2), ArrowRight: () => move(.2), '+': () => zoom(.5), '=': () => zoom(.5), '-': () => zoom(2), Home: everything, End: () => last(60)}[event.key];
    if (!act || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
  let before = 0;
  new ResizeObserver(() => { if (width() && width() !== before) { before = width(); paint(); refresh(); } }).observe(root);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);

  return {
    refresh,
    shown,
    places: () => boxes,
    reset() { Object.assign(shown, {from: null, to: null, answer: null, chosen: -1}); chips.replaceChildren(); boxes = []; refresh(); },
  };
}

const duration = s => s < 1 ? `${number(1000 * s, s < .01 ? 1 : 0)} ms` : s < 100 ? `${number(s, 2)} s` : clock(s);

/** A time of day, as exact as `step` seconds need. */
function moment(at, step = 1) {
  const d = new Date(at * 1000), time = d.toLocaleTimeString([], {hour12: false});
  if (step >= 86400) return d.toLocaleDateString();
  return step >= 1 ? time : `${time}.${String(Math.floor(at * 1000) % 1000).padStart(3, '0')}`;
}

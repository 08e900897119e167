'use strict';

({runs, tables, metrics} = JSON.parse(document.getElementById('data').textContent));
const section = id => document.getElementById(id);
const sample = (run, i) => run.samples[i];

function pick() {
  if (runs.length < 2) return null;
  const select = el('select', {class: 'run', 'aria-label': 'Run'}, ...runs.map((r, i) => el('option', {value: i}, r.name)));
  select.addEventListener('change', () => {
    state.run = Number(select.value);
    state.group = 0;
    document.querySelectorAll('select.run').forEach(other => { other.value = state.run; });
    redraw();
    perRun.forEach(build => build());
  });
  return el('p', {class: 'controls'}, el('label', {}, 'Run ', select));
}

function switches() {
  return runs.length < 2 ? '' : el('fieldset', {class: 'chips', 'aria-label': 'Runs shown'}, ...runs.map((run, i) => {
    const box = el('input', {type: 'checkbox', checked: true});
    box.addEventListener('change', () => { state.hidden[box.checked ? 'delete' : 'add'](i); redraw(); });
    return el('label', {}, box, el('span', {class: 'swatch', style: `background: var(--c${i % 8})`}), run.name);
  }));
}

document.querySelector('nav').append(...Array.from(document.querySelectorAll('main section'), s =>
  el('a', {href: `#${s.id}`}, s.querySelector('h2').textContent)));
section('curves').append(switches());
Object.entries({headline, curves, tradeoff, steps: distributions, time, exits, viewer}).forEach(([id, build]) => build(section(id)));

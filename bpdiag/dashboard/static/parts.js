// A run unpacked, and the pieces that several views share.

import { special } from "./color.js";
import { ending, factor, finite, fixed, html, number, odd, plainNumber, sentence, visible } from "./format.js";

export const $ = (query, root = document) => root.querySelector(query);
export const $$ = (query, root = document) => [...root.querySelectorAll(query)];
export const draw = (element, markup) => { element.innerHTML = markup.toString(); };

const GLYPHS = { lives: "●", weakened: "◐", dies: "▼", "dies later": "▽", "blows up": "▲", "not finite": "✕", running: "…" };
export const glyph = (word) => GLYPHS[word] ?? "–";
export const verdictClass = (word) => `v-${String(word).replace(/[^a-z]+/g, "-")}`;
export const verdict = (word) => html`<span class="verdict ${verdictClass(word)}">${glyph(word)} ${word}</span>`;
export const name = (text) => html`<bdi>${text}</bdi>`;

/** What a run is called in a list: the last part of its path, broken where a reader would. */
export const title = (id) => html`<bdi>${id.slice(id.lastIndexOf("/") + 1).split(/(?<=[,_])/).map((part) => html`${part}<wbr>`)}</bdi>`;
export const folder = (id) => id.slice(0, Math.max(0, id.lastIndexOf("/")));

const NO_NUMBERS = { "-32768": null, "-32767": NaN, "-32766": -Infinity, 32767: Infinity };

function unpacked({ data, scale }) {
  const bytes = atob(data), out = new Array(bytes.length / 2);
  for (let i = 0; i < out.length; i++) {
    const whole = ((bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)) << 16) >> 16;
    out[i] = whole > -32766 && whole < 32767 ? whole * scale : NO_NUMBERS[whole];
  }
  return out;
}

/** Blocks that are unpacked when they are first looked at: of a long run one sees a few of them. */
function lazily(packed) {
  const blocks = {};
  for (const [key, block] of Object.entries(packed)) {
    let numbers;
    Object.defineProperty(blocks, key, { get: () => (numbers ??= unpacked(block)) });
  }
  return blocks;
}

/** What ``views.detail`` tells of a run, its blocks as numbers: C columns of L layers, layer 0 at the input. */
export class Run {
  constructor(told) {
    Object.assign(this, told);
    this.series = lazily(told.series);
    this.peaks = lazily(told.peaks);
    this.limit = -Math.log10(this.planned || 1000);
    this.top = this.layers.length - 1;
  }

  /** A number of the step shown in column ``i``. */
  at(key, i, l) { return this.series[key][i * this.layers.length + l]; }

  /** What a map draws there: of the column's whole span the number farthest from 1. */
  peak(key, i, l) { return (this.peaks[key] ?? this.series[key])[i * this.layers.length + l]; }

  /** [ends, log10 of what it carries] of each way around a layer, or of all. */
  ways(i, l) {
    const all = this.around.map((ends, k) => [ends, this.series.around[i * this.around.length + k]]);
    return l === undefined ? all : all.filter(([[low, high]]) => low < l && l <= high);
  }

  /** Why a number is missing, where that was told. */
  reason(column, i, l) {
    const step = this.steps[i];
    const gap = this.gaps.find((g) => g[0] === l && g[1] === column && g[2] <= step && step <= g[3]);
    return gap ? gap[4] : "not measured";
  }

  /** The column that shows a finding best: where it begins; of numbers that stop being finite the last that were. */
  telling(finding) { return Math.max(0, this.column(finding.onset_step) - (finding.kind === "non_finite")); }

  column(step) {
    const at = this.spans.length ? this.spans.findIndex(([, last]) => last >= step) : this.steps.findIndex((s) => s >= step);
    return at < 0 ? Math.max(0, this.steps.length - 1) : at;
  }
}

/** The settings of a run in half a line. */
export function settings(config) {
  const c = (key) => config[key];
  if (!c("model.name")) return "";
  const steps = c("data.name") === undefined ? "" : `${String(c("data.name")).toUpperCase()}, `;
  return `${steps}${c("model.width")} units wide, weight variance ${c("model.weight_variance")}, ${String(c("optimizer.name")).toUpperCase()} rate ${c("optimizer.lr")}, batch ${c("data.batch_size")}`;
}

export function header(run, small) {
  const told = [settings(run.config) || run.model, `${run.layers.length} layers`, `${run.planned} steps planned`];
  if (run.spans.length) told.push(`${run.sampled} measured, drawn in ${run.steps.length} columns, none skipped`);
  return html`<div class="kicker"><b>${title(run.id)}</b>${verdict(run.verdict)}<span>${told.filter(Boolean).join(", ")}</span></div>
    <h1 class="${small ? "small" : ""}">${sentence(run.sentence)}</h1>`;
}

export const segments = (key, options, value, label) =>
  html`<div class="seg" role="group" aria-label="${label}">${options.map(([k, text]) =>
    html`<button type="button" data-set="${key}" data-to="${k}" aria-pressed="${String(k) === String(value)}">${text}</button>`)}</div>`;

export const choice = (key, options, value, label) =>
  html`<label>${label} <select data-set="${key}">${options.map(([k, text]) =>
    html`<option value="${k}" ${String(k) === String(value) ? html`selected` : ""}>${text}</option>`)}</select></label>`;

/** Room for layer names left of a chart, at most ``most`` letters, and the names that fit it. */
export function labels(run, most, least = 0) {
  const room = Math.min(most, Math.max(...run.layers.map((layer) => visible(layer.name).length)));
  return { width: Math.max(least, Math.round(room * 6.3) + 14), text: (l) => ending(run.layers[l].name, room) };
}

export const WAYS = 14; // px left of a chart for the ways around layers

export const layersOf = (count) => `${count} ${count === 1 ? "layer" : "layers"}`;

/** Each way around layers, as a residual block's skip, an arc at x; ``edge(l)`` is the upper edge of a layer's row. */
export const arcs = (run, i, x, edge) => run.ways(i).map(([[low, high], carries]) => html`<path d="M${x} ${edge(low)}C${x - WAYS} ${edge(low)} ${x - WAYS} ${edge(high)} ${x} ${edge(high)}" fill="none" stroke="var(--soft)" stroke-width="1.3"><title>a way around ${layersOf(high - low)}${finite(carries) ? html`, carries × ${factor(carries, (d) => `10^${fixed(d)}`)}` : ""}</title></path>`);

/** Every how many rows a label fits. */
export const everyLabel = (rowHeight) => Math.max(1, Math.ceil(13 / rowHeight));

/** Whether a row's numbers stand: those of every k-th, and the chosen one's in the place of its neighbours'. */
export const told = (named, row, chosen, rowHeight) => row === chosen || (named && Math.abs(row - chosen) * rowHeight >= 12);

export const ROOMY = 96; // px left of a chart that hold "guessing 2.30"

/** The loss curve, which is the step slider too; from x0 to x1 it lines up with the columns of the map below. */
export function timeBar(host, run, state, x0, x1, moved, shown = null) {
  const count = run.steps.length, width = (x1 - x0) / count, top = 17, bottom = 48;
  const { steps, low, high } = run.curve;
  const first = low.map(number), last = high.length ? high.map(number) : first;
  const position = (step) => {
    let i = run.steps.findIndex((s) => s > step) - 1;
    if (i < 0) i = step < run.steps[0] ? 0 : count - 1;
    const next = run.steps[i + 1] ?? run.steps[i] + (run.steps[1] - run.steps[0] || 1);
    return Math.min(x1, x0 + (i + 0.5 + (step - run.steps[i]) / (next - run.steps[i])) * width);
  };
  const there = [...first, ...last].filter(finite);
  const guessing = run.guessing, most = Math.max(...there, 0);
  const ceiling = Math.min(most * 1.05, Math.max(2 * (guessing ?? first.find(finite) ?? 1), 1e-9)) || 1;
  const y = (v) => bottom - (bottom - top) * Math.max(0, Math.min(v, ceiling)) / ceiling;
  let path = "", down = false;
  steps.forEach((step, k) => {
    for (const v of first === last ? [first[k]] : [first[k], last[k]]) {
      if (finite(v)) path += `${down ? "L" : "M"}${position(step).toFixed(1)} ${y(v).toFixed(1)}`;
      down = finite(v);
    }
  });
  const bad = steps.findIndex((_, k) => !finite(last[k]) || !finite(first[k]));
  const left = x0 - 8, wide = x0 >= ROOMY;
  draw(host, html`<svg width="${x1 + 2}" height="62" aria-hidden="true">
    ${shown ? html`<rect x="${x0 + shown[0] * width}" y="${top - 5}" width="${(shown[1] - shown[0] + 1) * width}" height="${bottom - top + 5}" fill="var(--accent)" opacity=".13"/>` : ""}
    <line x1="${x0}" x2="${x1}" y1="${bottom}" y2="${bottom}" stroke="var(--rule)"/>
    ${guessing && guessing <= ceiling ? html`<line x1="${x0}" x2="${x1}" y1="${y(guessing)}" y2="${y(guessing)}" stroke="var(--rule)" stroke-dasharray="1 3"/>
    <text class="f" x="${left}" y="${y(guessing) + 4}" text-anchor="end">${wide ? "guessing " : ""}${fixed(guessing, 2)}</text>` : ""}
    <text class="f" x="${left}" y="${bottom + 4}" text-anchor="end">${there.length ? (wide ? "loss 0" : "0") : (wide ? "no loss told" : "no loss")}</text>
    <path d="${path}" fill="none" stroke="var(--soft)" stroke-width="1.1"/>
    ${bad >= 0 ? html`<text x="${Math.min(position(steps[bad]) + 6, x1 - 170)}" y="${top - 6}" style="fill:var(--nonfinite)">loss not finite from step ${steps[bad]}</text>`
    : most > ceiling ? html`<text class="f" x="${x1}" y="${top - 8}" text-anchor="end">loss up to ${plainNumber(most)}, cut off</text>` : ""}
    <g class="cursor"></g></svg><input type="range" min="0" max="${count - 1}" value="${state.step}" aria-label="Training step">`);
  const input = $("input", host), cursor = $(".cursor", host);
  const lossAt = (step) => { const k = steps.findLastIndex((s) => s <= step); return k < 0 ? null : first[k]; };
  const update = () => {
    const step = run.steps[state.step], loss = lossAt(step), x = x0 + (state.step + 0.5) * width, end = x > x1 - 120;
    input.value = state.step;
    input.setAttribute("aria-valuetext", `step ${step}, loss ${finite(loss) ? plainNumber(loss) : odd(loss)}`);
    draw(cursor, html`<line x1="${x}" x2="${x}" y1="${top - 4}" y2="${bottom}" stroke="var(--ink)"/>
      <path d="M${x - 5} ${bottom}h10l-5 7z" fill="var(--ink)"/>${finite(loss) ? html`<circle cx="${x}" cy="${y(loss)}" r="3" fill="var(--ink)"/>` : ""}
      <text x="${end ? x - 10 : x + 9}" y="${bottom + 13}" text-anchor="${end ? "end" : "start"}" font-weight="600">step ${step} <tspan font-weight="400">of ${run.planned}${finite(loss) ? `, loss ${plainNumber(loss)}` : ""}</tspan></text>`);
  };
  const move = (to) => { const at = Math.max(0, Math.min(count - 1, to)); if (at !== state.step) { state.step = at; update(); moved(); } };
  const follow = (e) => move(Math.floor((e.clientX - host.getBoundingClientRect().left - x0) / width));
  host.onpointerdown = (e) => { host.setPointerCapture(e.pointerId); follow(e); input.focus({ preventScroll: true }); host.onpointermove = follow; };
  host.onpointerup = host.onpointercancel = () => { host.onpointermove = null; };
  input.oninput = () => move(Number(input.value));
  update();
  return update;
}

/** Where an arrow leads: [columns, layers]; null for any other key. */
export const arrow = (key, count) =>
  ({ ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], PageUp: [0, 5], PageDown: [0, -5], Home: [-count, 0], End: [count, 0] })[key] ?? null;

/** What keys do over a grid of columns and layers, first and last of each: arrows choose, Enter opens the chain. */
export const steered = (app, columns, layers, moved) => (e) => {
  const way = arrow(e.key, app.run.steps.length), { state } = app, within = ([a, b], x) => Math.max(a, Math.min(b, x));
  if (e.key === "Enter") app.go({ view: "chain" });
  if (!way) return;
  e.preventDefault();
  state.step = within(columns, state.step + way[0]);
  state.layer = within(layers, state.layer + way[1]);
  moved();
};

/** Patterns for what is no number, in a picture. */
export function patterns() {
  const forms = { dot: (c) => html`<circle cx="4" cy="4" r=".9" fill="${c}"/>`, ring: (c) => html`<circle cx="4" cy="4" r="1.6" fill="none" stroke="${c}"/>`, cross: (c) => html`<path d="M2.2 2.2l3.6 3.6M5.8 2.2l-3.6 3.6" stroke="${c}" stroke-width="1.1"/>` };
  return html`<defs>${[["missing", null], ["zero", -Infinity], ["nan", NaN]].map(([id, x]) => {
    const { ground, mark, form } = special(x);
    return html`<pattern id="${id}" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" height="8" fill="${ground}"/>${forms[form](mark)}</pattern>`;
  })}</defs>`;
}
export const patternOf = (x) => `url(#${x === null || x === undefined ? "missing" : x === -Infinity ? "zero" : "nan"})`;

/** Give the reader a file. */
export function download(file, kind, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: kind }));
  link.download = file.replace(/[^\w.+=,-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Rows as CSV; a text that a spreadsheet would take for a formula is quoted as text. */
export function asCsv(rows) {
  const cell = (x) => {
    if (x === null || x === undefined) return "";
    if (typeof x === "number") return String(x);
    const text = /^[=+\-@\t]/.test(x) ? `'${x}` : String(x);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

/** A picture of the page as a file of its own: colors resolved, a canvas behind it embedded. */
export function asSvg(svg, canvas) {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.documentElement);
  const [width, height] = [svg.getAttribute("width"), svg.getAttribute("height")];
  const value = (variable) => style.getPropertyValue(variable).trim();
  const rules = `text{fill:${value("--ink")};font:12px ${value("--sans").replace(/"/g, "'")}}.f{fill:${value("--faint")}}.s{fill:${value("--soft")}}.tiny{font-size:11px}`;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("viewBox", `-6 -6 ${Number(width) + 12} ${Number(height) + 12}`);
  const image = canvas ? `<image x="${canvas.offsetLeft}" y="${canvas.offsetTop}" width="${canvas.offsetWidth}" height="${canvas.offsetHeight}" href="${canvas.toDataURL()}"/>` : "";
  const ground = `<rect x="-6" y="-6" width="100%" height="100%" fill="${value("--page")}"/>`;
  copy.innerHTML = `<style>${rules}</style>${ground}${image}${copy.innerHTML}`;
  for (const element of copy.querySelectorAll("[class^=v-]")) element.setAttribute("color", value(`--${COLOR_OF[element.getAttribute("class").split(" ")[0]] ?? "lives"}`));
  return new XMLSerializer().serializeToString(copy).replace(/var\((--[\w-]+)\)/g, (_, variable) => value(variable).replace(/"/g, "'"));
}
const COLOR_OF = { "v-dies": "dies", "v-dies-later": "dies", "v-weakened": "weak", "v-blows-up": "blows", "v-not-finite": "nonfinite" };

// The map: layers in execution order, output on top; steps across; color = one statistic.

import { diverging, ramp, special } from "./color.js";
import { factor, finite, html, odd, percent, power, powerSvg } from "./format.js";
import { $, arcs, arrow, draw, everyLabel, header, labels, layersOf, name, patterns, ROOMY, segments, steered, timeBar, told, WAYS } from "./parts.js";

const fraction = (log) => factor(log, powerSvg);
const times = (log) => (finite(log) ? html`× ${factor(log, powerSvg)}` : odd(log));
const scales = { gain: (run) => diverging(2.6, 8), forward: () => diverging(2.6, 3), share: () => ramp("share", 0, 1) };
const FACTOR_BANDS = [
  [-8, -5, "takes 90 %", "× 0.1"], [-5, -2.6, "takes half", "× 0.24 to 0.47"], [-2.5, -0.6, "takes a little", "× 0.5 to 0.8"],
  [-0.6, 0.6, "passes on", "× 0.85 to 1.2"], [0.6, 2.5, "adds a little", "× 1.2 to 2"], [2.7, 6, "multiplies", "over × 2"],
];
const SHARE_BANDS = [[0, 0.25, "", "0 to 25 %"], [0.25, 0.5, "", "25 to 50 %"], [0.5, 0.75, "", "50 to 75 %"], [0.75, 1, "", "75 to 100 %"]];
const factorOf = (label, why) => ({ label, why, scale: scales.gain, zoom: 8, bands: () => FACTOR_BANDS, said: times });
const shareOf = (label, why) => ({ label, why, scale: scales.share, zoom: 1, bands: () => SHARE_BANDS, said: percent });

/** statistic: what it is called, what it means, its scale, its legend, how one number is written. */
export const SHOWN = {
  decades: {
    label: "gradient that arrives", scale: (run) => diverging(-run.limit), zoom: 1, said: (d) => powerSvg(d), bands: decadeBands,
    why: (run) => html`Share of the output's gradient (l2 norm of ∂C/∂z) that reaches the layer. The thin outline is the limit: below 1/${run.planned}, plain gradient descent cannot move the layer in the ${run.planned} steps planned.`,
  },
  gain: factorOf("gain of one layer", "Backward gain: what arrives at the layer over what arrives at the one above it (l2 norms)."),
  slope_factor: factorOf("slope factor", "What the layer's activation lets through of the gradient that comes down to it."),
  weight_factor: factorOf("weight factor", "What the weights of the layer above pass down of the gradient that arrives there."),
  saturated: shareOf("saturated", "Share of elements whose slope is under 5 % of the largest. A healthy relu shows one half."),
  dead: shareOf("dead", "Share of units with slope exactly 0 for every sample of the last eight measured batches."),
  update_ratio: {
    label: "update size", why: "Update ratio, rms(ΔW) / rms(W), of one step.", scale: () => ramp("update", -8, 0), zoom: 1, said: (d) => powerSvg(d),
    bands: () => [[-8, -6, "no change", "10^−8: rounds away"], [-6, -4, "hardly", "10^−6 to 10^−4"], [-4, -2, "learns", "10^−4 to 10^−2"], [-2, 0, "overwrites", "over 10^−2"]],
  },
  z_rms: {
    label: "signal forward", why: "rms of the preactivations z, per element.", scale: scales.forward, zoom: 3, said: fraction,
    bands: () => [[-9, -4.5, "fades", "under 0.03"], [-4.5, -2.62, "small", "0.03 to 0.13"], [-2.5, 0, "", "0.13 to 1"], [0, 2.5, "", "1 to 7"], [2.7, 6, "large", "over 7"]],
  },
};

function decadeBands(run) {
  const t = -run.limit, T = run.planned;
  return [
    [-t - 13.4, -t - 7.4, "gone", html`under ${power(-t - 7.4, 0)}`], [-t - 7.4, -t - 3.4, "all but gone", html`to ${power(-t - 3.4, 0)}`],
    [-t - 3.4, -t - 0.02, "starved", `to 1/${T}`], [-t + 0.01, -0.75, "weakened", `1/${T} to 1/6`, true], [-0.75, 0.75, "intact", "1/6 to 6 times"],
    [0.75, t - 0.01, "grows", `6 to ${T} times`], [t + 0.02, t + 3.4, "overwhelms", `over ${T} times`],
  ];
}

function legend(run, shown) {
  const scale = shown.scale(run), unit = shown.zoom;
  const swatch = (id, text) => html`<span><svg width="21" height="14" aria-hidden="true"><rect x=".5" y=".5" width="20" height="13" fill="url(#${id})" stroke="var(--rule)"/></svg>${text}</span>`;
  return html`<div class="legend"><div class="scale">${shown.bands(run).map(([a, b, word, span, harm]) =>
    html`<div class="${harm ? "harm" : ""}" style="--g:linear-gradient(90deg,${scale(a / unit)},${scale(b / unit)})"><b>${word || html`&nbsp;`}</b><span>${span}</span></div>`)}</div>
    <div class="special">${swatch("zero", "exactly 0")}${swatch("nan", "not a number, infinite")}${swatch("missing", "not measured")}</div></div>
    <p class="note" style="margin-top:6px">${typeof shown.why === "function" ? shown.why(run) : shown.why}</p>`;
}

/** The cells shown, device pixels for pixels; what is no number with its mark. */
function paint(canvas, run, key, width, rowHeight, { first, last, low, high }) {
  const n = high - low + 1, count = last - first + 1, ratio = window.devicePixelRatio || 1, height = n * rowHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const g = canvas.getContext("2d"), scale = SHOWN[key].scale(run);
  const x = (i) => Math.round((canvas.width * (i - first)) / count), y = (l) => Math.round((canvas.height * (high - l)) / n); // left and upper edge
  const cells = (each) => { for (let i = first; i <= last; i++) for (let l = low; l <= high; l++) each(i, l, run.peak(key, i, l)); };
  cells((i, l, v) => {
    g.fillStyle = finite(v) ? scale(v) : special(v).ground;
    g.fillRect(x(i), y(l), x(i + 1) - x(i), y(l - 1) - y(l));
  });
  cells((i, l, v) => {
    if (finite(v)) return;
    const { mark, form } = special(v), grain = 8 * ratio;
    g.fillStyle = g.strokeStyle = mark;
    g.lineWidth = ratio;
    for (let cx = Math.ceil(x(i) / grain) * grain + grain / 2; cx < x(i + 1); cx += grain) {
      for (let cy = Math.ceil(y(l) / grain) * grain + grain / 2; cy < y(l - 1); cy += grain) markAt(g, form, cx, cy, ratio);
    }
  });
  if (key !== "decades") return;
  g.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink"); // the outline of the limit
  const under = (v) => finite(v) && v < run.limit, thin = Math.max(1, Math.round(1.2 * ratio));
  cells((i, l, v) => {
    if (i > first && under(v) !== under(run.peak(key, i - 1, l))) g.fillRect(x(i), y(l), thin, y(l - 1) - y(l));
    if (l < high && under(v) !== under(run.peak(key, i, l + 1))) g.fillRect(x(i), y(l), x(i + 1) - x(i) + thin, thin);
  });
}

function markAt(g, form, x, y, ratio) {
  g.beginPath();
  if (form === "dot") g.arc(x, y, 0.9 * ratio, 0, 7);
  else if (form === "ring") g.arc(x, y, 1.6 * ratio, 0, 7);
  else for (const s of [-1, 1]) { g.moveTo(x - 1.8 * ratio, y - 1.8 * s * ratio); g.lineTo(x + 1.8 * ratio, y + 1.8 * s * ratio); }
  form === "dot" ? g.fill() : g.stroke();
}

/** What is known of one layer at one step, in words and numbers. */
export function reading(run, i, l, chainLink = true) {
  const layer = run.layers[l], d = run.at("decades", i, l), T = run.planned, [, , spread] = run.spans[i] ?? [0, 0, 1];
  const word = !finite(d) ? (d === null || d === undefined ? run.reason("g_z_norm", i, l) : odd(d)) : d < run.limit ? `under the limit of 1/${T}` : d < -0.75 ? "weakened" : d <= 0.75 ? "intact" : "grown";
  const item = (title, value, more = "") => html`<dl><dt>${title}</dt><dd>${value} <small>${more}</small></dd></dl>`;
  const log = (key) => run.at(key, i, l), [w, s] = [log("weight_factor"), log("slope_factor")];
  const last = layer.next === null, none = "–";
  const span = spread > 1 ? html` <span class="soft">(of ${spread} steps measured here, ${run.spans[i][0]} to ${run.spans[i][1]})</span>` : "";
  return html`<div class="head">Step <b>${run.steps[i]}</b>${span}, <b>${name(layer.name)}</b> <span class="soft">${layer.kind}${layer.units ? `, ${layer.fan_in} → ${layer.units}` : ""}${layer.activation ? `, ${layer.activation}` : ""}</span>:
    ${finite(d) ? html`<b>${power(d)}</b> of the output's gradient arrives, ${word}` : html`<b>${word}</b>`}.
    ${chainLink ? html`<button type="button" class="link" data-view="chain">See the chain of ${name(layer.name)}</button>` : ""}</div>
    ${item("this layer passes on", last && !finite(log("gain")) ? none : finite(log("gain")) ? html`× ${factor(log("gain"))}` : odd(log("gain")))}
    ${item("weights × slopes", finite(w) && finite(s) ? html`${factor(w)} × ${factor(s)}` : none)}
    ${item("slopes saturated", finite(log("saturated")) ? percent(log("saturated")) : none)}
    ${item("units dead", finite(log("dead")) ? percent(log("dead")) : none, finite(log("dead")) ? "of 8 batches" : "")}
    ${item("update / weights", finite(log("update_ratio")) ? power(log("update_ratio")) : odd(log("update_ratio")), finite(log("update_ratio")) ? "per step" : "")}
    ${run.ways(i, l).slice(0, 1).map(([[low, high], v]) => item("a way around it", finite(v) ? html`× ${factor(v)}` : none, `past ${layersOf(high - low)}`))}
    ${item("rms z", finite(log("z_rms")) ? factor(log("z_rms")) : odd(log("z_rms")))}`;
}

/** First and last column, lowest and highest layer that are shown: all, or what was brushed. */
function extent(run, zoom) {
  const all = { first: 0, last: run.steps.length - 1, low: 0, high: run.top };
  return zoom ? { first: run.column(zoom.steps[0]), last: run.column(zoom.steps[1]), low: zoom.layers[0], high: Math.min(run.top, zoom.layers[1]) } : all;
}

export function map(root, app) {
  const { run, state } = app, shown = SHOWN[state.show], part = extent(run, state.zoom), { first, last, low, high } = part;
  const n = high - low + 1, count = last - first + 1, clip = ([i, l]) => [Math.max(first, Math.min(last, i)), Math.max(low, Math.min(high, l))];
  const said = (a, b) => html`steps ${run.steps[a[0]]} to ${run.steps[b[0]]}, ${name(run.layers[a[1]].name)} to ${name(run.layers[b[1]].name)}`;
  draw(root, html`${header(run, true)}<div class="bar">${segments("show", Object.entries(SHOWN).map(([key, { label }]) => [key, label]), state.show, "What the color shows")}
    ${state.zoom ? html`<span class="zoomed">${said([first, low], [last, high])} <button type="button" class="tool" data-whole>Show all</button></span>` : ""}</div>
    <div class="time"></div><div class="grid" tabindex="0" role="application" aria-label="Map of ${n} layers by ${count} steps; arrow keys choose, Enter opens the chain; with Shift they brush a part, Enter enlarges it, Escape shows all"><canvas></canvas><svg class="over"></svg></div>${legend(run, shown)}
    <p class="note">Drag over a part to enlarge it (keys: Shift and arrows, Enter; Escape shows all).${run.around.length ? " Arcs at the left: ways around layers, as a residual block's skip." : ""}</p><div class="read"></div>`);
  const host = $(".grid", root), W = host.clientWidth, narrow = W < 560, side = narrow ? labels(run, 12) : labels(run, 20, ROOMY), right = narrow ? 2 : 90;
  const x0 = side.width + (run.around.length ? WAYS : 0), x1 = W - right, rowHeight = Math.max(4, Math.min(narrow ? 17 : 20, Math.round(640 / n))), height = n * rowHeight, bw = (x1 - x0) / count;
  const canvas = $("canvas", host), over = $("svg.over", host);
  host.style.height = `${height + 26}px`;
  canvas.style.left = `${x0}px`;
  paint(canvas, run, state.show, x1 - x0, rowHeight, part);
  const skip = everyLabel(rowHeight), rowY = (l) => (high - l) * rowHeight, ticks = timeTicks(run, narrow ? 4 : 8, first, last);
  const rows = Array.from({ length: n }, (_, k) => low + k), named = (l) => (high - l) % skip === 0 || l === low;
  const inside = run.around.length ? html`<clipPath id="rows"><rect x="0" y="-1" width="${W}" height="${height + 2}"/></clipPath><g clip-path="url(#rows)" class="ways"></g>` : "";
  over.setAttribute("width", W);
  over.setAttribute("height", height + 26);
  draw(over, html`${patterns()}${rows.map((l) => named(l) && (l === low || l === high || skip === 1 || rowY(low) - rowY(l) > 12)
      ? html`<text class="f tiny" x="${side.width - 8}" y="${rowY(l) + rowHeight / 2 + 4}" text-anchor="end">${side.text(l)}</text>` : "")}${inside}
    ${ticks.map(([i, step]) => html`<path d="M${x0 + (i - first + 0.5) * bw} ${height}v5" stroke="var(--faint)"/><text class="f" x="${x0 + (i - first + 0.5) * bw}" y="${height + 18}" text-anchor="middle">${step}</text>`)}
    <text class="f" x="${x1}" y="${height + 18}" text-anchor="end">${narrow ? "" : "training step"}</text><g class="values"></g><g class="cursor"></g>`);
  const values = $(".values", over), cursor = $(".cursor", over), read = $(".read", root), ways = $(".ways", over);
  const move = timeBar($(".time", root), run, state, x0, x1, () => update(), state.zoom && [first, last]);
  let brushed = null; // two corners of what is being chosen

  const box = ([i, l], [j, m]) => [x0 + (Math.min(i, j) - first) * bw, rowY(Math.max(l, m)), (Math.abs(j - i) + 1) * bw, (Math.abs(m - l) + 1) * rowHeight];
  function update(say = false, [i, l] = [state.step, state.layer]) {
    const at = [state.step, state.layer], [x, y] = box(at, at);
    if (!narrow) draw(values, html`<text class="f" x="${x1 + 14}" y="-8">at step ${run.steps[i]}</text>${rows.map((k) => told(named(k), k, l, rowHeight)
      ? html`<text class="${k === l ? "tiny" : "tiny s"}" font-weight="${k === l ? 600 : 400}" x="${x1 + 14}" y="${rowY(k) + rowHeight / 2 + 4}">${shown.said(run.peak(state.show, i, k))}</text>` : "")}`);
    if (ways) draw(ways, html`${arcs(run, i, x0 - 2, rowY)}`);
    const seen = String(clip(at)) === String(at), [bx, by, wide, tall] = brushed ? box(...brushed) : [];
    draw(cursor, html`${seen ? html`<rect x="${x - 0.5}" y="-1" width="${Math.max(2, bw) + 1}" height="${height + 2}" fill="none" stroke="var(--ink)"/>
      <rect x="${x - 1}" y="${y - 1}" width="${Math.max(4, bw) + 2}" height="${rowHeight + 2}" fill="none" stroke="var(--page)" stroke-width="4"/><rect x="${x - 1}" y="${y - 1}" width="${Math.max(4, bw) + 2}" height="${rowHeight + 2}" fill="none" stroke="var(--ink)" stroke-width="2"/>` : ""}
      ${brushed ? html`<rect class="brush" x="${bx}" y="${by}" width="${wide}" height="${tall}" fill="var(--accent)" fill-opacity=".25" stroke="var(--page)" stroke-width="3"/><rect x="${bx}" y="${by}" width="${wide}" height="${tall}" fill="none" stroke="var(--accent)" stroke-width="1.5"/>` : ""}`);
    draw(read, reading(run, i, l));
    if (say) app.say(brushed ? `brushed ${corners().map(([a, b]) => `step ${run.steps[a]} ${run.layers[b].name}`).join(" to ")}; Enter enlarges it` : `step ${run.steps[i]}, ${run.layers[l].name}, ${read.querySelector(".head").textContent}`);
    app.keep();
  }
  /** What is brushed, from the earliest step and the lowest layer on. */
  const corners = () => { const [[i, l], [j, m]] = brushed; return [[Math.min(i, j), Math.min(l, m)], [Math.max(i, j), Math.max(l, m)]]; };
  function enlarge() {
    const [[i, l], [j, m]] = corners(), zoom = { steps: [run.steps[i], run.steps[j]], layers: [l, m] };
    app.go({ zoom, step: Math.max(i, Math.min(j, state.step)), layer: Math.max(l, Math.min(m, state.layer)) }, ".grid").then(() => app.say(`enlarged: ${zoom.steps.join(" to ")}, ${run.layers[l].name} to ${run.layers[m].name}`));
  }
  const whole = () => app.go({ zoom: null }, ".grid").then(() => app.say("all steps and layers"));
  const where = (e) => { const b = host.getBoundingClientRect(); return [first + Math.floor((e.clientX - b.left - x0) / bw), high - Math.floor((e.clientY - b.top) / rowHeight)]; };
  const cell = (e) => { const at = where(e); return String(clip(at)) === String(at) ? at : null; };
  let pressed = null;
  host.onpointermove = (e) => { // hovering reads, a click pins, dragging brushes
    const at = cell(e);
    if (pressed && Math.hypot(e.clientX - pressed.x, e.clientY - pressed.y) > 5) { brushed = [pressed.at, clip(where(e))]; update(false, brushed[1]); } else if (at) update(false, at);
  };
  host.onpointerleave = () => { if (!pressed) update(); };
  host.onpointerdown = (e) => {
    const at = cell(e);
    brushed = null;
    if (!at || e.button) return;
    pressed = { at, x: e.clientX, y: e.clientY };
    host.setPointerCapture(e.pointerId);
    [state.step, state.layer] = at;
    move();
    update();
  };
  host.onpointerup = () => { pressed = null; if (brushed && String(brushed[0]) !== String(brushed[1])) enlarge(); };
  host.onpointercancel = () => { pressed = brushed = null; update(); };
  host.ondblclick = (e) => { if (cell(e)) app.go({ view: "chain" }); };
  const steer = steered(app, [first, last], [low, high], () => { move(); update(true); });
  host.onkeydown = (e) => {
    const way = arrow(e.key, run.steps.length);
    if (e.key === "Escape" && (brushed || state.zoom)) { if (brushed) { brushed = null; update(true); } else whole(); }
    else if (e.key === "Enter" && brushed) enlarge();
    else if (e.shiftKey && way) {
      e.preventDefault();
      const [from, to] = brushed ?? [[state.step, state.layer], [state.step, state.layer]];
      brushed = [clip(from), clip([to[0] + way[0], to[1] + way[1]])];
      update(true, brushed[1]);
    } else { if (way) brushed = null; steer(e); }
  };
  if (state.zoom) $("[data-whole]", root).onclick = whole;
  update();
  const table = [["step", "layer", state.show]];
  for (let i = first; i <= last; i++) for (const l of rows) table.push([run.steps[i], run.layers[l].name, run.peak(state.show, i, l)]);
  return { svg: over, canvas, rows: table, file: `${run.id}-map-${state.show}` };
}

/** [column, the step written under it]: round numbers where there are some. */
function timeTicks(run, most, first, last) {
  const wide = run.steps[last] - run.steps[first], unit = 10 ** Math.floor(Math.log10(Math.max(1, wide / most)));
  const sampled = new Set(run.steps), multiples = (s) => Array.from({ length: Math.floor(wide / s) + 1 }, (_, k) => (Math.ceil(run.steps[first] / s) + k) * s).filter((step) => step <= run.steps[last]);
  const sizes = [1, 2, 4, 5, 8, 10, 20, 40, 50].map((k) => k * unit).filter((s) => wide / s <= most);
  const wanted = multiples(sizes.find((s) => run.spans.length || multiples(s).every((step) => sampled.has(step))) ?? sizes[0] ?? Math.max(1, wide));
  const under = new Map(wanted.map((step) => [run.column(step), step]));
  return [...under].map(([i, step]) => [i, run.spans.length ? step : run.steps[i]]).filter(([i]) => first <= i && i <= last && (i - first < (last - first + 1) * 0.9 || last - first < 2));
}

// The profile: one step; what arrives at each layer against what theory expected, and who took the rest.

import { factor, finite, fixed, html, percent, power, powerSvg } from "./format.js";
import { reading } from "./map.js";
import { $, arcs, draw, everyLabel, header, labels, patternOf, patterns, ROOMY, steered, timeBar, told, WAYS } from "./parts.js";

/** Owners of the ledger: color variable; what they are called. */
export const OWNERS = { weights: ["--weights", "size of the weights"], slopes: ["--slopes", "slopes of the activation"], alignment: ["--alignment", "alignment"], other: ["--other", "norms, pools, the rest"] };

/** Decades of the step above a layer by owner; null where they are not all known. */
export function ledger(run, i, l) {
  const parts = Object.keys(OWNERS).map((owner) => run.at(`takes_${owner}`, i, l));
  return parts.every(finite) ? parts : null;
}

/** What the factors along the way up from a layer take together. */
function together(run, i, l) {
  const total = [0, 0, 0, 0];
  let counted = 0;
  for (let at = l; at !== null && run.layers[at].next !== null; at = run.layers[at].next) {
    const parts = ledger(run, i, at);
    if (!parts) return null;
    parts.forEach((v, k) => { total[k] += v; });
    counted++;
  }
  return counted ? { total, counted } : null;
}

function steps(low, high, most) {
  const size = [0.1, 0.2, 0.25, 0.5, 1, 2, 4, 5, 10, 20, 50].find((s) => (high - low) / s <= most) ?? 100;
  return Array.from({ length: Math.floor(high / size) - Math.ceil(low / size) + 1 }, (_, k) => (Math.ceil(low / size) + k) * size);
}

/** Bars laid end to end, what takes to the left of zero and what gives to the right. */
function stack(parts, x, y, height, low, high) {
  let [left, right] = [0, 0];
  return parts.map((v, k) => {
    const from = v < 0 ? left : right, to = from + v;
    if (v < 0) left = to; else right = to;
    const [a, b] = [Math.max(low, Math.min(from, to)), Math.min(high, Math.max(from, to))];
    return b > a ? html`<rect x="${x(a)}" y="${y}" width="${Math.max(0.5, x(b) - x(a))}" height="${height}" fill="var(${Object.values(OWNERS)[k][0]})"/>` : "";
  });
}

export function profile(root, app) {
  const { run, state } = app, n = run.layers.length, count = run.steps.length, theory = run.theory;
  draw(root, html`${header(run, true)}<div class="time"></div><div class="grid profile" tabindex="0" role="application" aria-label="Profile over ${n} layers; up and down choose a layer, left and right a step, Enter opens the chain"><svg class="picture"></svg></div><div class="keys"></div><div class="read"></div>`);
  const host = $(".profile", root), svg = $("svg", host), W = host.clientWidth, narrow = W < 560, side = narrow ? labels(run, 12) : labels(run, 20, ROOMY);
  const rowHeight = Math.max(5, Math.min(narrow ? 20 : 21, Math.round(700 / n))), top = 78, height = top + n * rowHeight, gutter = run.around.length ? WAYS : 0, x0 = side.width + gutter;
  const charts = W - x0 - (narrow ? 6 : 240), xa = x0 + charts * (narrow ? 0.5 : 0.56), xb = xa + (narrow ? 22 : 46), xc = x0 + charts;
  const columns = [xc + 62, xc + 128, xc + 170, W - 4];
  const y = (l) => top + (n - 1 - l) * rowHeight + rowHeight / 2, skip = everyLabel(rowHeight);
  // one scale for all steps: what moves between them is the net
  const all = [...run.series.decades.filter(finite), ...(theory ? theory.decades : [])];
  const low = Math.floor(Math.min(run.limit - 0.6, ...bounds(all))), high = Math.max(0.9, ...bounds(all));
  const x = (d) => x0 + 6 + ((xa - x0 - 6) * (Math.max(low, Math.min(high, d)) - low)) / (high - low);
  const ledgers = run.steps.flatMap((_, i) => run.layers.map((_, l) => ledger(run, i, l)).filter(Boolean));
  const sums = (sign) => ledgers.map((parts) => parts.reduce((sum, v) => sum + Math.max(0, sign * v), 0)).sort((a, b) => a - b);
  const usual = (sign) => Math.max(0.15, sums(sign)[Math.floor(0.98 * ledgers.length)] ?? 0); // one odd layer does not flatten the rest
  const takes = usual(-1), gives = usual(1), g = (v) => xb + ((xc - xb) * (v + takes)) / (takes + gives);
  const band = (sign) => theory.decades.map((d, l) => `${x(d + sign * theory.band[l]).toFixed(1)} ${y(l).toFixed(1)}`);
  svg.setAttribute("width", W);
  svg.setAttribute("height", height + 50);
  draw(svg, html`${patterns()}<rect x="${x0 + 6}" y="${top}" width="${Math.max(0, x(run.limit) - x0 - 6)}" height="${n * rowHeight}" fill="var(--dies)" opacity=".06"/>
    ${steps(low, high, narrow ? 4 : 7).map((d) => html`<line x1="${x(d)}" x2="${x(d)}" y1="${top}" y2="${height}" stroke="var(--hair)"/><text class="f" x="${x(d)}" y="${height + 16}" text-anchor="middle">${powerSvg(d, 0)}</text>`)}
    ${theory ? html`<path d="M${[...band(1), ...band(-1).reverse()].join("L")}Z" fill="var(--band)"/><path d="M${theory.decades.map((d, l) => `${x(d).toFixed(1)} ${y(l).toFixed(1)}`).join("L")}" fill="none" stroke="var(--theory)" stroke-width="1.2" stroke-dasharray="4 3"/>` : ""}
    <line x1="${x(run.limit)}" x2="${x(run.limit)}" y1="${top - 8}" y2="${height}" stroke="var(--ink)"/>
    ${x(run.limit) - x0 > 180 ? html`<text class="s" x="${x(run.limit) - 5}" y="${top - 12}" text-anchor="end">cannot learn in ${run.planned} steps ◂</text>` : html`<text class="s" x="${x(run.limit) - 5}" y="${top - 12}">◂ limit 1/${run.planned}</text>`}
    <text x="${narrow ? 0 : x0 + 6}" y="14" font-weight="600">${narrow ? "Gradient that arrives" : "Gradient that reaches the layer"}</text><text class="f" x="${narrow ? 0 : x0 + 6}" y="30">${narrow ? "share of output's" : "share of the output's, l2 norm of ∂C/∂z"}</text>
    <g transform="translate(${narrow ? 0 : x0 + 6} 45)"><path d="M0 0h18" stroke="var(--ink)" stroke-width="1.4"/><circle cx="9" r="3.4" fill="var(--ink)"/><text class="s" x="24" y="4">measured</text>
    ${theory ? html`<rect x="88" y="-6" width="20" height="12" fill="var(--band)"/><path d="M88 0h20" stroke="var(--theory)" stroke-dasharray="4 3"/><text class="s" x="114" y="4">${narrow ? "theory" : "theory at step 0, with its band"}</text>` : ""}</g>
    <text x="${xb}" y="14" font-weight="600">${narrow ? "Who takes it" : "Who takes it on the way to this layer"}</text><text class="f" x="${xb}" y="30">${narrow ? "decades per layer" : "decades per layer: left takes, right gives"}</text>
    ${steps(-takes, gives, narrow ? 2 : 4).map((v) => html`<line x1="${g(v)}" x2="${g(v)}" y1="${top}" y2="${height}" stroke="var(--hair)"/><text class="f" x="${g(v)}" y="${height + 16}" text-anchor="middle">${fixed(v, takes + gives < 1 ? 2 : 1)}</text>`)}
    ${narrow ? "" : ["passes on", "saturated", "dead", "update"].map((t, k) => html`<text class="f" x="${columns[k]}" y="${top - 10}" text-anchor="end">${t}</text>`)}
    ${run.layers.map((_, l) => ((n - 1 - l) % skip === 0 ? html`<text class="f tiny" x="${side.width - 8}" y="${y(l) + 4}" text-anchor="end">${side.text(l)}</text>` : ""))}
    <g class="now"></g>`);
  const now = $(".now", svg), read = $(".read", root), keys = $(".keys", root);
  const move = timeBar($(".time", root), run, state, x0 + 6, narrow ? W - 4 : W - 20, () => update());

  function update(say = false, l = state.layer) {
    const i = state.step, d = run.layers.map((_, k) => run.at("decades", i, k)), whole = together(run, i, 0);
    const line = d.map((v, k) => (finite(v) ? `${x(v).toFixed(1)} ${y(k).toFixed(1)}` : null));
    const path = line.map((point, k) => (point ? `${k && line[k - 1] ? "L" : "M"}${point}` : "")).join("");
    const cells = (k) => [run.at("gain", i, k), run.at("saturated", i, k), run.at("dead", i, k), run.at("update_ratio", i, k)];
    const said = [(v) => factor(v, powerSvg), percent, percent, powerSvg];
    const bold = (k) => (k === l ? 600 : 400);
    draw(now, html`${arcs(run, i, x0 + 4, (k) => y(k) - rowHeight / 2)}<rect x="0" y="${y(l) - rowHeight / 2}" width="${W}" height="${rowHeight}" fill="var(--accent)" opacity=".1"/>
      <path d="${path}" fill="none" stroke="var(--ink)" stroke-width="1.4"/>
      ${d.map((v, k) => (finite(v) ? html`<circle cx="${x(v)}" cy="${y(k)}" r="${Math.min(rowHeight / 3, k === l ? 5 : 3.4)}" stroke="var(--page)" stroke-width=".8" fill="${v < run.limit ? "var(--dies)" : v > -run.limit ? "var(--blows)" : "var(--ink)"}"/>`
        : html`<rect x="${x0 + 6}" y="${y(k) - rowHeight / 2 + 1}" width="${xa - x0 - 6}" height="${rowHeight - 2}" fill="${patternOf(v)}" opacity=".8"/>`))}
      ${run.layers.map((_, k) => { const parts = ledger(run, i, k); return parts ? stack(parts, g, y(k) - rowHeight / 2 + 1.5, rowHeight - 3, -takes, gives) : ""; })}
      <line x1="${g(0)}" x2="${g(0)}" y1="${top - 4}" y2="${height}" stroke="var(--soft)"/>
      ${narrow ? "" : run.layers.map((_, k) => (told((n - 1 - k) % skip === 0, k, l, rowHeight) ? cells(k).map((v, c) => (finite(v) || v === -Infinity ? html`<text class="tiny ${k === l ? "" : "s"}" font-weight="${bold(k)}" x="${columns[c]}" y="${y(k) + 4}" text-anchor="end">${finite(v) ? said[c](v) : "0"}</text>` : "")) : ""))}
      ${whole ? html`<text class="f tiny" x="${side.width - 8}" y="${height + 40}" text-anchor="end">${narrow ? "Σ" : "all together"}</text>${stack(whole.total, x, height + 30, 13, low, high)}<line x1="${x(0)}" x2="${x(0)}" y1="${height + 26}" y2="${height + 46}" stroke="var(--soft)"/>` : ""}`);
    draw(keys, whole ? html`<b>All ${whole.counted} layers together, in decades:</b>${Object.values(OWNERS).map(([color, text], k) => html`<span><i class="swatch" style="background:var(${color})"></i>${text} <b>${fixed(whole.total[k])}</b></span>`)}<span>sum <b>${fixed(whole.total.reduce((a, b) => a + b, 0))}</b>: ${power(d[0])} arrives</span>`
      : html`${Object.values(OWNERS).map(([color, text]) => html`<span><i class="swatch" style="background:var(${color})"></i>${text}</span>`)}<span class="note">Not every step of the way up is known, so the shares are not added up.</span>`);
    draw(read, reading(run, i, l));
    if (say) app.say($(".head", read).textContent);
    app.keep();
  }
  const row = (e) => { const l = n - 1 - Math.floor((e.clientY - host.getBoundingClientRect().top - top) / rowHeight); return l >= 0 && l < n ? l : null; };
  host.onpointermove = (e) => { const l = row(e); if (l !== null) update(false, l); };
  host.onpointerleave = () => update();
  host.onpointerdown = (e) => { const l = row(e); if (l !== null) { state.layer = l; update(); } };
  host.ondblclick = (e) => { if (row(e) !== null) app.go({ view: "chain" }); };
  host.onkeydown = steered(app, [0, count - 1], [0, n - 1], () => { move(); update(true); });
  update();
  const names = ["decades", "gain", "weight_factor", "slope_factor", ...Object.keys(OWNERS).map((o) => `takes_${o}`), "saturated", "dead", "update_ratio"];
  const rows = () => [["step", "layer", ...names], ...run.layers.map((layer, l) => [run.steps[state.step], layer.name, ...names.map((key) => run.at(key, state.step, l))])];
  return { svg, get rows() { return rows(); }, file: `${run.id}-profile` };
}

const bounds = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [0, 0]);

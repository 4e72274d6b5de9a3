// The findings: words first, then the numbers they rest on, then what was tried against them.

import { finite, fixed, html, number, odd, percent, plainNumber, power, powerSvg, sentence } from "./format.js";
import { $, $$, draw, everyLabel, glyph, header, labels, name, patternOf, patterns, verdictClass } from "./parts.js";

const HARM = { non_finite: "not finite", exploding: "blows up" };
const wordOf = (finding) => (finding.severity !== "harm" ? "weakened" : HARM[finding.kind] ?? (finding.onset_step > 0 ? "dies later" : "dies"));
const short = (key) => key.replace(/#0$/, "");
const spelled = (key) => key.replaceAll("_", " ");
const SWITCHES = ["sgd_like", "planned_steps_given", "planned_steps", "step"]; // how it was judged, no measurement
const COMPARED = {
  gain_per_layer: () => "1 keeps the gradient", forward_gain: () => "1 keeps the signal", travel: () => "under 0.1 hardly learns",
  loss: (run) => (run.guessing ? `guessing is ${fixed(run.guessing, 2)}` : ""), reach: () => "over 1 overwrites the layer",
};

function evidenceValue(key, value) {
  const x = number(value);
  if (!finite(x)) return odd(x);
  if (key.startsWith("share_")) return percent(x);
  if (key.startsWith("decades_")) return html`${fixed(x, 2)} <span class="soft">decades</span>`;
  return key === "decades" || key === "limit" ? html`${power(x)} <span class="soft">of the output's</span>` : plainNumber(x);
}

function evidence(finding, run) {
  const told = finding.evidence, owners = ["weights", "slopes", "alignment", "other"].filter((o) => `decades_${o}` in told), taken = owners.filter((o) => Math.abs(number(told[`share_${o}`]) ?? 0) >= 0.005);
  const rows = Object.keys(told).filter((key) => !SWITCHES.includes(key) && !owners.some((o) => key.endsWith(`_${o}`)));
  const limit = number(told.limit);
  const beside = (key) => (key === "decades" && finite(limit) ? html`limit ${power(limit)}` : (COMPARED[key]?.(run) ?? ""));
  return html`<table><thead><tr><th>measured</th><th>value</th><th class="wide">compare</th></tr></thead><tbody>
    ${rows.filter((key) => key !== "limit" || !("decades" in told)).map((key) => html`<tr><td>${spelled(key)}</td><td>${evidenceValue(key, told[key])}</td><td class="soft wide">${beside(key)}</td></tr>`)}
    ${taken.map((o) => html`<tr><td>taken by ${o}</td><td>${fixed(number(told[`decades_${o}`]) ?? 0, 2)} <span class="soft">decades</span></td><td class="soft wide">${percent(number(told[`share_${o}`]))} of it</td></tr>`)}
    </tbody></table>`;
}

function one(finding, k, run) {
  const names = finding.layers.map((key) => run.layers.find((layer) => layer.key === key)?.name ?? short(key)), span = names.length > 3 ? `${names[0]} to ${names.at(-1)} (${names.length} layers)` : names.join(", ");
  return html`<article class="finding ${finding.severity} ${verdictClass(wordOf(finding))}">${finding.sentence === run.sentence ? "" : html`<h2>${glyph(wordOf(finding))} ${sentence(finding.sentence)}</h2>`}
    <p><b>${spelled(finding.kind)} by ${finding.cause}</b> <span class="soft">(${finding.severity === "harm" ? "harm" : "a warning"}), from step ${finding.onset_step}${span ? html`, <bdi>${span}</bdi>` : ""}</span>
    <button type="button" class="link" data-finding="${k}">Show it in the map</button></p>
    <p class="lead">${sentence(finding.why)}</p>
    ${finding.remedy ? html`<p class="lead"><b>Remedy:</b> ${sentence(finding.remedy)}. ${finding.expected ? html`<span class="soft">Expected: ${sentence(finding.expected)}.</span>` : ""}</p>` : ""}
    ${evidence(finding, run)}</article>`;
}

export function findings(root, app) {
  const { run, state } = app, found = run.findings, facts = run.provenance, versions = Object.entries(facts.versions).map(([k, v]) => `${k} ${v}`);
  draw(root, html`<div class="two"><div>${header(run, false)}
    ${found.length ? found.map((f, k) => one(f, k, run)) : html`<p class="lead">${run.verdict === "not judged" ? "Without its trace nothing of this run is judged." : "Nothing to cure in this run."}</p>`}
    ${run.notes.length ? html`<h2>Notes</h2>${run.notes.map((text) => html`<p class="soft">${sentence(text)}.</p>`)}` : ""}</div>
    <figure class="strip"></figure></div><div class="tried"></div>
    <h2>Where the numbers come from</h2><p class="note">${facts.command ? html`<code>${facts.command}</code><br>` : ""}${name(facts.folder)}. ${versions.join(", ")}${facts.machine ? `; ${facts.machine}` : ""}${run.config.seed === undefined ? "" : `; seed ${run.config.seed}`}; optimizer ${facts.optimizer.name ?? "not told"}${facts.every ? `; every ${facts.every} steps measured` : ""}.</p>`);
  const step = found.length ? run.telling(found[0]) : run.column(run.first?.step ?? 0);
  const svg = strip($(".strip", root), run, step);
  if (run.remedies.length) remedies($(".tried", root), run);
  for (const button of $$("[data-finding]", root)) {
    const finding = found[Number(button.dataset.finding)], at = run.layers.findIndex((layer) => finding.layers.includes(layer.key));
    button.onclick = () => app.go({ view: "map", step: run.column(finding.onset_step), layer: Math.max(0, at) });
  }
  state.layer = Math.min(state.layer, run.top);
  app.keep();
  const rows = [["kind", "severity", "cause", "onset_step", "layers", "measured", "value"], ...found.flatMap((f) => Object.entries(f.evidence).map(([key, value]) => [f.kind, f.severity, f.cause, f.onset_step, f.layers.join(" "), key, value]))];
  return { svg, rows, file: `${run.id}-findings` };
}

/** The gradient that reaches each layer at one step, output on top: one bar a layer. */
function strip(host, run, i) {
  const n = run.layers.length, W = Math.min(host.clientWidth || 292, 420), side = labels(run, 12), x0 = side.width, x1 = W - 50;
  const rowHeight = Math.max(3, Math.min(15.5, Math.round(520 / n))), d = run.layers.map((_, l) => run.at("decades", i, l)), there = d.filter(finite);
  const low = Math.floor(Math.min(run.limit - 0.4, ...there)), high = Math.max(0.5, ...there), x = (v) => x0 + ((x1 - x0) * (v - low)) / (high - low);
  const y = (l) => 24 + (n - 1 - l) * rowHeight, bottom = y(0) + rowHeight, skip = everyLabel(rowHeight), left = x(run.limit) - x0 > 150;
  const spoken = d.map((v, l) => `${run.layers[l].name} ${finite(v) ? fixed(v) : odd(v)}`).join(", ");
  draw(host, html`<svg width="${W}" height="${bottom + 36}" role="img" aria-label="Gradient per layer at step ${run.steps[i]}, in decades: ${spoken}">${patterns()}
    <text class="f" x="${x1 + 44}" y="12" text-anchor="end">gradient that reaches each layer, step ${run.steps[i]}</text>
    ${d.map((v, l) => html`${(n - 1 - l) % skip === 0 ? html`<text class="f tiny" x="${x0 - 9}" y="${y(l) + rowHeight / 2 + 4}" text-anchor="end">${side.text(l)}</text>` : ""}
      ${finite(v) ? html`<rect x="${Math.min(x(v), x(0))}" y="${y(l) + 1}" width="${Math.max(1, Math.abs(x(v) - x(0)))}" height="${rowHeight - 2}" fill="${v < run.limit ? "var(--dies)" : v > -run.limit ? "var(--blows)" : "var(--other)"}" opacity="${Math.abs(v) > -run.limit ? 1 : 0.75}"/>` : html`<rect x="${x0}" y="${y(l) + 1}" width="${x(0) - x0}" height="${rowHeight - 2}" fill="${patternOf(v)}"/>`}
      ${finite(v) && (l === 0 || l === n - 1 || l === n >> 1) ? html`<text x="${x1 + 8}" y="${y(l) + rowHeight / 2 + 4}" font-weight="${l ? 400 : 600}">${powerSvg(v)}</text>` : ""}`)}
    <line x1="${x(0)}" x2="${x(0)}" y1="22" y2="${bottom}" stroke="var(--soft)"/><line x1="${x(run.limit)}" x2="${x(run.limit)}" y1="20" y2="${bottom + 4}" stroke="var(--ink)" stroke-dasharray="3 2"/>
    <text class="s" x="${x(run.limit)}" y="${bottom + 16}" text-anchor="${left ? "end" : "start"}">${left ? `cannot learn in ${run.planned} steps ◂` : `◂ limit 1/${run.planned}`}</text>
    <text class="f tiny" x="${x1 + 44}" y="${bottom + 31}" text-anchor="end">input side at the bottom; powers of ten</text></svg>`);
  return $("svg", host);
}

/** Before and after of each remedy tried: ring and dot; the failed stay in the table. */
function remedies(host, run) {
  const each = (x) => (Array.isArray(x) ? x : [x]).map(number), middle = (x) => { const s = each(x).filter(finite).sort((a, b) => a - b); return s.length ? s[s.length >> 1] : null; };
  const rows = run.remedies; // as the search ranked them
  const all = rows.flatMap((r) => [...each(r.before?.decades), ...each(r.after?.decades)]).filter(finite), low = Math.floor(Math.min(run.limit - 0.6, ...all)), high = Math.max(0.6, ...all);
  const W = host.clientWidth < 560 ? 72 : 190, x = (v) => 6 + ((W - 12) * (v - low)) / (high - low);
  const dots = (r) => html`<svg width="${W}" height="20" aria-hidden="true"><line x1="${x(run.limit)}" x2="${x(run.limit)}" y1="0" y2="20" stroke="var(--rule)"/>
    ${finite(middle(r.before?.decades)) && finite(middle(r.after?.decades)) ? html`<line x1="${x(middle(r.before.decades))}" x2="${x(middle(r.after.decades))}" y1="10" y2="10" stroke="var(--soft)"/>` : ""}
    ${each(r.before?.decades).filter(finite).map((v) => html`<circle cx="${x(v)}" cy="10" r="3.2" fill="var(--page)" stroke="var(--soft)"/>`)}${each(r.after?.decades).filter(finite).map((v) => html`<circle cx="${x(v)}" cy="10" r="3.4" fill="${v < run.limit ? "var(--dies)" : "var(--ink)"}"/>`)}</svg>`;
  const told = (x) => (finite(middle(x)) ? plainNumber(middle(x)) : odd(middle(x))), count = (x) => (Array.isArray(x) ? x.length : x ?? "–"), best = rows.find((r) => r.recommended);
  draw(host, html`<h2>What helps <small>tried on copies of this network, before and after at equal steps, best first</small></h2>
    ${best ? html`<p class="lead"><b>Recommended: ${best.name}.</b> ${best.overrides?.length ? html`Add <code>${best.overrides.join(" ")}</code>.` : ""}</p>` : ""}
    <table><thead><tr><th>remedy</th><th class="wide">what changes</th><th class="n wide">steps</th><th class="n wide">seeds</th><th>lowest layer</th><th class="n wide">after</th><th class="n">loss</th><th class="n wide">accuracy</th><th>it</th></tr></thead><tbody>
    ${rows.map((r) => html`<tr><td>${r.recommended ? html`<b>${r.name}</b>` : r.name}</td><td class="soft wide lines">${r.change}</td><td class="n wide">${count(r.steps)}</td><td class="n wide">${count(r.seeds)}</td><td>${dots(r)}</td><td class="n wide">${finite(middle(r.after?.decades)) ? power(middle(r.after.decades)) : odd(middle(r.after?.decades))}</td><td class="n">${told(r.before?.loss)} → ${told(r.after?.loss)}</td><td class="n wide">${finite(middle(r.after?.accuracy)) ? percent(middle(r.after.accuracy)) : "–"}</td><td>${spelled(r.verdict ?? "")}</td></tr>`)}</tbody></table>
    <p class="note">Open ring: before. Filled: after. The upright line is the limit 1/${run.planned}. What failed stays in the table.</p>`);
}

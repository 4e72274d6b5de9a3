// Many runs: a grid of two swept keys with a miniature profile a run, an overlay, a table that sorts.

import { finite, fixed, html, number, odd, percent, plainNumber, power, powerSvg } from "./format.js";
import { $, $$, choice, draw, glyph, name, title, verdict, verdictClass } from "./parts.js";

const LETTERS = "ABCDE"; // as many runs as an overlay holds
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "12 4"];
const SEVERITY = ["not finite", "blows up", "dies", "dies later", "weakened", "running", "unfinished", "not measured", "lives"];
const TIDY = { "model.weight_variance": "weights", "model.bias_variance": "bias", "optimizer.name": "optimizer", "model.name": "model", "data.name": "data" };

const USUAL = ["model.activation", "model.depth", "model.weight_variance"]; // the order one looks in

const ASIDE = /^(watch|remedy|checkpoint)\./; // how a run was looked at, not what it was

const short = (key) => TIDY[key] ?? key.split(".").at(-1);
const lowest = (run, when = "last") => { const d = run[when]?.decades; return d?.length ? number(d[0]) : null; };
const inOrder = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));

/** Keys of the settings that differ between runs, with their values. */
export function swept(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].filter((key) => !ASIDE.test(key));
  const values = keys.map((key) => [key, [...new Set(runs.map((run) => run.config[key]))].filter((v) => v !== undefined).sort(inOrder)]);
  const usual = ([key]) => (USUAL.includes(key) ? USUAL.indexOf(key) : USUAL.length);
  return new Map(values.filter(([, told]) => told.length > 1).sort((a, b) => usual(a) - usual(b) || b[1].length - a[1].length || a[0].localeCompare(b[0])));
}

/** A miniature: output on top, the line moves left as the gradient shrinks. */
export function miniature(runs, width, height, low, limit) {
  const x = (d) => 3 + ((width - 6) * (Math.max(low, Math.min(1, d)) - low)) / (1 - low);
  const line = (decades) => decades.map(number).map((d, k, all) => (finite(d) ? `${x(d).toFixed(1)} ${(3 + ((height - 6) * (all.length - 1 - k)) / Math.max(1, all.length - 1)).toFixed(1)}` : null))
    .map((point, k, all) => (point ? `${all[k - 1] ? "L" : "M"}${point}` : "")).join("");
  return html`<svg width="${width}" height="${height}" aria-hidden="true"><line x1="${x(limit)}" x2="${x(limit)}" y1="0" y2="${height}" stroke="var(--rule)"/>
    ${runs.slice(0, 1).map((run) => (run.expected?.length ? html`<path d="${line(run.expected)}" fill="none" stroke="var(--theory)" stroke-dasharray="2 2"/>` : ""))}
    ${runs.slice(0, 12).map((run) => html`<path class="${verdictClass(run.verdict)}" d="${line((run.last ?? { decades: [] }).decades)}" fill="none" stroke="currentColor" stroke-width="${runs.length > 1 ? 1.3 : 2}"/>`)}</svg>`;
}

export const reach = (runs) => Math.floor(Math.max(-40, Math.min(-4, ...runs.flatMap((run) => (run.last?.decades ?? []).map(number).filter(finite)))));

function sentenceOf(runs) {
  const count = (...words) => runs.filter((run) => words.includes(run.verdict)).length;
  const told = [[count("dies", "dies later"), "the gradient dies"], [count("blows up"), "it blows up"], [count("not finite"), "numbers stop being finite"]].filter(([k]) => k);
  const sick = told.map(([k, what]) => `in ${k} ${what}`).join(", ");
  return sick ? `Of ${runs.length} networks ${sick}; ${count("lives")} live without a fault.` : `No gradient dies in ${runs.length} ${runs.length > 1 ? "networks" : "network"}.`;
}

export function compare(root, app) {
  const { runs, state } = app, keys = swept(runs), names = [...keys.keys()];
  const [row, column] = [state.rows, state.columns].map((key, k) => (keys.has(key) ? key : (names[k] ?? null)));
  const rest = names.filter((key) => key !== row && key !== column && keys.get(key).length <= 12);
  const shown = runs.filter((run) => rest.every((key) => !(key in state.filter) || state.filter[key] === "" || String(run.config[key]) === state.filter[key]));
  const low = reach(shown), limit = -Math.log10(Math.max(1, ...runs.map((run) => run.planned ?? 1)));
  const examples = SEVERITY.map((word) => runs.findLast((run) => run.verdict === word && run.last?.decades.length)?.id).filter(Boolean);
  state.picked = (state.picked ?? examples.slice(0, 3)).filter((id) => runs.some((run) => run.id === id));
  draw(root, html`<div class="kicker"><b>${row ? `${short(row)}${column ? ` × ${short(column)}` : ""}` : "All runs"}</b><span>${runs.length} runs${rest.length ? `; also swept: ${rest.map(short).join(", ")}` : ""}</span></div><h1 class="small">${sentenceOf(runs)}</h1>
    <div class="bar">${row && names.length > 1 ? html`${choice("rows", names.map((key) => [key, short(key)]), row, "down")}${choice("columns", names.map((key) => [key, short(key)]), column, "across")}` : ""}
    ${rest.map((key) => choice(`filter:${key}`, [["", "all"], ...keys.get(key).map((v) => [v, String(v)])], state.filter[key] ?? "", short(key)))}</div>
    <div class="compare"><div><div class="cells"></div><p class="note" style="margin-top:10px">Each picture: output layer on top, input side at the bottom; the line moves left as the gradient shrinks, all on one scale down to ${power(low, 0)}. Line: the last step measured; dashes: what theory expects of the first; upright hairline: the limit 1/T. Numbers: share that reaches the lowest layer, and test accuracy.</p></div><div class="over"></div></div>
    <h2>All ${runs.length} runs <small>a heading sorts, a row goes into the overlay</small></h2><div class="tall" tabindex="0" role="region" aria-label="Table of runs"></div>`);
  cells($(".cells", root), app, { shown, keys, row, column, low, limit });
  overlay($(".over", root), app, limit);
  const rows = table($(".tall", root), app, names);
  app.keep();
  return { svg: $(".over svg", root), rows, file: "runs" };
}

function cells(host, app, { shown, keys, row, column, low, limit }) {
  const told = (key) => [...keys.get(key), ...(shown.some((run) => run.config[key] === undefined) ? [undefined] : [])]; // a run watched by itself has no settings
  const rows = row ? told(row) : [null], across = column ? told(column) : row ? [null] : [], labelled = (key, v) => `${short(key)} ${v ?? "not told"}`;
  const flat = !across.length, columns = flat ? Math.min(6, Math.max(1, shown.length)) : across.length;
  const groups = flat ? shown.map((run) => ({ told: [run], label: run.id })) : rows.flatMap((r) => across.map((c) => ({
    told: shown.filter((run) => run.config[row] === r && (column === null || run.config[column] === c)),
    label: [row && labelled(row, r), column && labelled(column, c)].filter(Boolean).join(", ") })));
  host.style.setProperty("--columns", columns);
  host.style.gridTemplateColumns = `${flat ? "" : "88px "}repeat(${columns}, minmax(0, 1fr))`;
  const width = Math.max(30, (host.clientWidth - (flat || host.clientWidth < 560 ? 0 : 98)) / columns - 26);
  const cell = ({ told, label }) => {
    if (!told.length) return html`<span class="cell faint">no run</span>`;
    const word = SEVERITY.find((w) => told.some((run) => run.verdict === w)) ?? told[0].verdict, same = told.filter((run) => run.verdict === word).length;
    const all = told.map((run) => lowest(run)).filter(finite).sort((a, b) => a - b), middle = all.length ? all[all.length >> 1] : null, right = told.map((run) => number(run.accuracy)).filter(finite);
    const picked = told.map((run) => app.state.picked.indexOf(run.id)).filter((k) => k >= 0).sort(), accuracy = right.length ? right.reduce((a, b) => a + b) / right.length : null;
    const of = told.length > 1 ? ` ${same} of ${told.length}` : "";
    return html`<button type="button" class="cell" data-pick="${JSON.stringify(told.slice(0, LETTERS.length).map((run) => run.id))}" aria-pressed="${picked.length > 0}"><span class="hidden">${flat ? "" : `${label}: `}</span>
      <span class="verdict ${verdictClass(word)}" style="font-size:12px">${glyph(word)}<span class="unless-narrow"> ${word}${of}</span></span>${picked.length ? html`<span class="key">${picked.map((k) => LETTERS[k])}</span>` : ""}
      ${miniature(told, width, 46, low, limit)}<span class="ends"><span>${finite(middle) ? power(middle) : odd(middle)}</span><span class="faint wide">${finite(accuracy) ? percent(accuracy) : ""}</span></span>${flat ? html`<span class="faint">${title(label)}</span>` : ""}</button>`;
  };
  draw(host, html`${flat ? "" : html`<span class="h corner"></span>${across.map((c) => html`<span class="h">${column ? labelled(column, c) : ""}</span>`)}`}
    ${flat ? groups.slice(0, 60).map(cell) : rows.map((r, k) => html`<span class="h row">${labelled(row, r)}</span>${groups.slice(k * across.length, (k + 1) * across.length).map(cell)}`)}`);
  for (const button of $$("[data-pick]", host)) button.onclick = () => pick(app, JSON.parse(button.dataset.pick), button);
}

/** Put runs into the overlay, or take them out where they all are in it. */
function pick(app, ids, from) {
  const { state } = app, there = ids.every((id) => state.picked.includes(id));
  state.picked = there ? state.picked.filter((id) => !ids.includes(id)) : [...state.picked.filter((id) => !ids.includes(id)), ...ids].slice(-LETTERS.length);
  const key = from && ("pick" in from.dataset ? "pick" : "row");
  app.go({}, key && `[data-${key}="${CSS.escape(from.dataset[key])}"]`);
}

function overlay(host, app, limit) {
  const chosen = app.state.picked.map((id) => app.runs.find((run) => run.id === id)), W = Math.min(host.clientWidth || 330, 420), H = 300, x0 = 30, x1 = W - 18;
  const decades = chosen.map((run) => (run.last?.decades ?? []).map(number)), low = Math.floor(Math.min(-3, ...decades.flat().filter(finite)) - 0.3), high = Math.max(0.8, ...decades.flat().filter(finite));
  const deepest = Math.max(5, ...decades.map((d) => d.length)), x = (d) => x0 + ((x1 - x0) * (d - low)) / (high - low), y = (below) => 30 + (H * below) / (deepest - 1);
  const size = high - low > 12 ? 5 : high - low > 6 ? 2 : 1, ticks = Array.from({ length: Math.floor((high - low) / size) + 1 }, (_, k) => (Math.ceil(low / size) + k) * size).filter((v) => v <= high);
  const levels = Array.from({ length: Math.ceil(deepest / 5) }, (_, k) => 5 * k).filter((v) => v < deepest && deepest / 5 < 12 || v % 25 === 0);
  draw(host, html`<b>Overlay</b> <span class="note">choose up to ${LETTERS.length} runs</span><svg width="${W}" height="${H + 66}" role="img" aria-label="Overlay of ${chosen.length} profiles">
    <text class="f" x="0" y="18">layers below the output ↓, share that arrives →</text>
    ${ticks.map((v) => html`<line x1="${x(v)}" x2="${x(v)}" y1="30" y2="${30 + H}" stroke="var(--hair)"/><text class="f" x="${x(v)}" y="${H + 56}" text-anchor="middle">${powerSvg(v, 0)}</text>`)}
    ${levels.map((v) => html`<text class="f" x="${x0 - 8}" y="${y(v) + 4}" text-anchor="end">${v}</text>`)}
    <line x1="${x(limit)}" x2="${x(limit)}" y1="26" y2="${30 + H}" stroke="var(--ink)"/><text class="s tiny" x="${x(limit) - 4}" y="${H + 22}" text-anchor="${x(limit) > 90 ? "end" : "start"}">limit 1/T</text>
    ${chosen.map((run, k) => {
      const points = decades[k].map((d, at, all) => (finite(d) ? [x(d), y(all.length - 1 - at)] : null)).filter(Boolean);
      return points.length ? html`<path class="${verdictClass(run.verdict)}" d="M${points.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L")}" fill="none" stroke="currentColor" stroke-width="1.8" stroke-dasharray="${DASHES[k]}"/><circle class="${verdictClass(run.verdict)}" cx="${points[0][0]}" cy="${points[0][1]}" r="8" fill="var(--page)" stroke="currentColor"/><text class="tiny" x="${points[0][0]}" y="${points[0][1] + 4}" text-anchor="middle" font-weight="600">${LETTERS[k]}</text>` : "";
    })}</svg>
    ${chosen.map((run, k) => html`<div class="chosen"><b>${LETTERS[k]}</b><span>${title(run.id)}</span><span class="verdict ${verdictClass(run.verdict)}">${glyph(run.verdict)}</span><span>${power(lowest(run))}</span><button type="button" class="tool" data-drop="${k}" aria-label="remove ${LETTERS[k]}">×</button></div>`)}
    ${chosen.length ? "" : html`<p class="note">Nothing chosen yet.</p>`}`);
  for (const button of $$("[data-drop]", host)) button.onclick = () => pick(app, [app.state.picked[Number(button.dataset.drop)]]);
}

function table(host, app, names) {
  const { state } = app, text = (v) => v ?? "";
  const columns = [
    ...names.map((key) => [key, short(key), (run) => run.config[key], text]), ["verdict", "verdict", (run) => run.verdict, verdict],
    ["first", "lowest layer, first", (run) => lowest(run, "first"), power], ["expected", "theory", (run) => number(run.expected?.[0]), (v) => (v === null ? "–" : power(v))], ["last", "last", (run) => lowest(run), power],
    ["loss", "loss", (run) => number(run.loss), (v) => (v === null ? "–" : plainNumber(v))], ["accuracy", "accuracy", (run) => number(run.accuracy), (v) => (v === null ? "–" : percent(v))], ["id", "run", (run) => run.id, title],
  ];
  const [key, direction] = columns.some(([k]) => k === state.sort[0]) ? state.sort : [columns[0][0], 1], by = columns.find(([k]) => k === key)[2];
  const sorted = [...app.runs].sort((a, b) => direction * ((by(a) === null) - (by(b) === null) || inOrder(by(a), by(b))) || inOrder(a.id, b.id));
  const numeric = columns.map(([, , value]) => app.runs.every((run) => typeof value(run) === "number" || value(run) === null || value(run) === undefined));
  draw(host, html`<table><thead><tr>${columns.map(([k, title], c) => html`<th class="${numeric[c] ? "n" : ""}" ${k === key ? html`aria-sort="${direction > 0 ? "ascending" : "descending"}"` : ""}><button type="button" data-sort="${k}">${title}${k === key ? (direction > 0 ? " ↑" : " ↓") : ""}</button></th>`)}</tr></thead>
    <tbody>${sorted.map((run) => html`<tr class="pick" tabindex="0" data-row="${run.id}" aria-selected="${state.picked.includes(run.id)}">${columns.map(([, , value, said], c) => html`<td class="${numeric[c] ? "n" : ""}">${said(value(run))}</td>`)}</tr>`)}</tbody></table>`);
  for (const button of $$("[data-sort]", host)) button.onclick = () => { const k = button.dataset.sort; state.sort = [k, key === k ? -direction : 1]; table(host, app, names); $(`[data-sort="${CSS.escape(k)}"]`, host).focus(); };
  const choose = (tr) => pick(app, [tr.dataset.row], tr);
  for (const tr of $$("tr.pick", host)) {
    tr.onclick = () => choose(tr);
    tr.onkeydown = (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(tr); } };
  }
  return [columns.map(([k]) => k), ...sorted.map((run) => columns.map(([, , value]) => value(run) ?? null))];
}

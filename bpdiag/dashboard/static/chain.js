// The chain: dC/dW of one layer as the product of its factors, the lesson's formula with this net's numbers.

import { factor, finite, fixed, html, odd, power, powerSvg, SUBSCRIPT } from "./format.js";
import { ledger, OWNERS } from "./profile.js";
import { $, arrow, choice, draw, header, name, timeBar } from "./parts.js";

const fraction = (above, below) => html`<span class="frac"><i>∂${above}</i><i>∂${below}</i></span>`;

/** The layers from ``l`` up to the last, as far as the way does not fork. */
function wayUp(run, l) {
  const way = [l];
  while (run.layers[way.at(-1)].next !== null) way.push(run.layers[way.at(-1)].next);
  return way;
}

/** log10 of each factor from the cost down to ``l``: the cotangent of the last layer, a gain a layer, what closes it. */
function factors(run, i, l) {
  const way = wayUp(run, l), at = (key, k) => run.at(key, i, k), top = way.at(-1);
  const down = way.slice(0, -1).reverse().map((k) => ({ kind: "gain", layer: k, log: at("gain", k) }));
  const arrives = at("g_z_norm", l), entering = at("entering", l), gradient = at("g_W_norm", l);
  const closing = finite(gradient) && finite(arrives) ? gradient - arrives : null;
  return { way, top, terms: [{ kind: "cotangent", layer: top, log: at("g_z_norm", top) }, ...down], closing, entering, gradient };
}

const explained = {
  weights: (run, l) => `what the size of the weights of ${run.layers[run.layers[l].next]?.name ?? "the layer above"} does, against what the activation needs`,
  slopes: (run, l) => `what the slopes of ${run.layers[l].activation ?? "the way between"} do, against their fair share`,
  alignment: () => "whether the gradient lies along large directions; × 1: no preference",
  other: () => "norms, pools and whatever else lies between",
};

export function chain(root, app) {
  const { run, state } = app, n = run.layers.length, l = state.layer, count = run.steps.length;
  const sub = (k) => html`${SUBSCRIPT(k + 1)}`, z = (k) => html`z${sub(k)}`;
  draw(root, html`${header(run, true)}<div class="time"></div><div class="bar">${choice("layer", run.layers.map((layer, k) => [k, layer.name]).reverse(), l, "∂C/∂W of")}</div><div class="formula"></div>
    <p class="note">${run.layers[l].forks ? html`Above <b>${name(run.layers[wayUp(run, l).at(-1)].name)}</b> the way to the output forks: the product below ends there, and what arrives is measured, not multiplied.`
      : "Each number is a ratio of two l2 norms, so their product is exact. C is the cost. Choose a column for another layer."}</p>
    <div class="scroll"><div class="grid waterfall" tabindex="0" role="application" aria-label="Running product from the cost down to the layer; left and right choose a layer, page up and down a step"><svg class="picture"></svg></div></div>
    <div class="two"><div class="apart"></div><div class="lesson"></div></div>`);
  const host = $(".waterfall", root), svg = $("svg", host), full = host.parentNode.clientWidth;
  const bottom = wayUp(run, 0).includes(l) ? 0 : l; // all that lies on one way with the chosen layer, the rest pale
  const drawn = wayUp(run, bottom).reverse(), x0 = 62, least = root.closest(".printing") ? 28 : 40, W = Math.max(full, x0 + least * (drawn.length + 1.6)), cell = Math.min(72, (W - x0) / (drawn.length + 1.5)), top = 64, height = 250;
  host.style.width = `${W}px`;
  const column = (k) => x0 + k * cell, move = timeBar($(".time", root), run, state, x0, full - 20, () => update());
  let focus = null;
  const pin = () => $(".axis", svg)?.setAttribute("transform", `translate(${host.parentNode.scrollLeft} 0)`); // the axis stays
  host.parentNode.onscroll = pin;

  function update(say = false) {
    const i = state.step, told = factors(run, i, l), whole = factors(run, i, bottom);
    draw($(".formula", root), formula(run, told, l, sub, z));
    const logs = whole.terms.map((term) => term.log), running = [];
    logs.reduce((sum, v) => { const next = finite(sum) && finite(v) ? sum + v : NaN; running.push(next); return next; }, 0);
    const ends = [0, ...running, told.gradient].filter(finite), low = Math.floor(Math.min(...ends) - 0.4), high = Math.ceil(Math.max(...ends) + 0.2);
    const y = (v) => top + 20 + (height * (high - v)) / (high - low), size = Math.max(1, Math.ceil((high - low) / 6));
    const lines = Array.from({ length: Math.floor(high / size) - Math.ceil(low / size) + 1 }, (_, k) => (Math.floor(high / size) - k) * size);
    const chosen = told.terms.length - 1, worst = told.terms.slice(1).reduce((a, t) => (finite(t.log) && (a === null || t.log < a.log) ? t : a), null);
    const shown = focus ?? worst?.layer ?? null;
    svg.setAttribute("width", W);
    svg.setAttribute("height", top + height + 44);
    const part = (v, from, x, w, color, pale) => html`<rect x="${x}" y="${Math.min(y(from), y(from + v))}" width="${w}" height="${Math.max(1.5, Math.abs(y(from + v) - y(from)))}" fill="${color}" opacity="${pale ? 0.35 : 1}"/>`;
    draw(svg, html`${lines.map((v) => html`<line x1="${x0}" x2="${W}" y1="${y(v)}" y2="${y(v)}" stroke="var(--hair)"/>`)}
      ${whole.terms.map((term, k) => {
        const x = column(k), from = k ? running[k - 1] : 0, pale = k > chosen, [w, s] = [run.at("weight_factor", i, term.layer), run.at("slope_factor", i, term.layer)];
        const names = k ? [`∂z${SUBSCRIPT(run.layers[term.layer].next + 1)}`, `∂z${SUBSCRIPT(term.layer + 1)}`] : ["∂C", `∂z${SUBSCRIPT(term.layer + 1)}`];
        const split = k && finite(w) && finite(s), width = cell * 0.72;
        return html`<g class="step" data-layer="${term.layer}" opacity="${pale ? 0.5 : 1}">${k && term.layer === shown ? html`<rect x="${x}" y="0" width="${cell}" height="${top + height + 20}" fill="var(--sel)"/>` : ""}
          <g font-family="var(--serif)" font-style="italic" text-anchor="middle"><text x="${x + cell / 2}" y="13" style="font-size:13px">${names[0]}</text><line x1="${x + cell / 2 - 13}" x2="${x + cell / 2 + 13}" y1="18" y2="18" stroke="var(--ink)"/><text x="${x + cell / 2}" y="31" style="font-size:13px">${names[1]}</text></g>
          <text class="tiny" x="${x + cell / 2}" y="48" text-anchor="middle" font-weight="600">${finite(term.log) ? factor(term.log, powerSvg) : term.log === -Infinity ? "0" : "–"}</text>
          ${!finite(from) || !finite(term.log) ? "" : split ? html`${part(w, from, x + 3, width / 2, "var(--weights)", pale)}${part(term.log - w, from + w, x + 3 + width / 2, width / 2, "var(--slopes)", pale)}` : part(term.log, from, x + 3, width, "var(--other)", pale)}
          ${finite(running[k]) ? html`<line x1="${x + 3}" x2="${x + cell + 3}" y1="${y(running[k])}" y2="${y(running[k])}" stroke="var(--ink)" stroke-width="1.4"/>` : ""}
          <rect x="${x}" y="0" width="${cell}" height="${top + height + 20}" fill="transparent" style="cursor:pointer"/></g>`;
      })}
      ${finite(told.closing) && finite(running[chosen]) ? closing() : ""}
      ${W < 600 ? "" : html`<text class="f" x="${x0}" y="${top + height + 38}">running product, from the cost (left) down</text>`}
      ${[["--weights", "weights"], ["--slopes", "slopes"], ["--other", "both, or what closes it"]].map(([color, text], k) => html`<rect x="${W - 300 + k * 82}" y="${top + height + 29}" width="10" height="10" fill="var(${color})"/><text class="s" x="${W - 285 + k * 82}" y="${top + height + 38}">${text}</text>`)}
      <g class="axis"><rect x="-2" y="0" width="${x0 - 4}" height="${top + height + 20}" fill="var(--page)"/><text class="f tiny" x="0" y="48">factor</text>${lines.map((v) => html`<text class="f" x="${x0 - 10}" y="${y(v) + 4}" text-anchor="end">${powerSvg(v, 0)}</text>`)}</g>`);
    pin();
    function closing() {
      const x = column(whole.terms.length) + cell * 0.35, from = running[chosen];
      return html`<line x1="${column(chosen + 1)}" x2="${x}" y1="${y(from)}" y2="${y(from)}" stroke="var(--soft)" stroke-dasharray="2 3"/>${part(told.closing, from, x, cell * 0.72, "var(--other)", false)}
        <g font-family="var(--serif)" font-style="italic" text-anchor="middle"><text x="${x + cell * 0.36}" y="13" style="font-size:13px">∂z${SUBSCRIPT(l + 1)}</text><line x1="${x + cell * 0.36 - 13}" x2="${x + cell * 0.36 + 13}" y1="18" y2="18" stroke="var(--ink)"/><text x="${x + cell * 0.36}" y="31" style="font-size:13px">∂W${SUBSCRIPT(l + 1)}</text></g>
        <text class="tiny" x="${x + cell * 0.36}" y="48" text-anchor="middle" font-weight="600">${factor(told.closing, powerSvg)}</text>
        <circle cx="${x + cell * 0.36}" cy="${y(told.gradient)}" r="4.5" fill="var(--ink)"/><text x="${x + cell * 0.36}" y="${y(Math.max(told.gradient, from)) - 10}" text-anchor="middle" font-weight="600">${powerSvg(told.gradient)}</text>`;
    }
    for (const step of svg.querySelectorAll(".step")) {
      const layer = Number(step.dataset.layer);
      step.onclick = () => app.go({ layer });
      step.onpointerenter = () => { if (focus !== layer && layer !== told.top) { focus = layer; apart(i, layer, false); } };
    }
    apart(i, shown, focus === null);
    if (say) app.say(`step ${run.steps[i]}, ${run.layers[l].name}`);
    app.keep();
  }

  function apart(i, k, smallest) {
    if (k === null || !finite(run.at("gain", i, k))) { draw($(".apart", root), html``); return; }
    const parts = ledger(run, i, k), above = run.layers[k].next;
    draw($(".apart", root), html`<h2>${smallest ? "The smallest factor" : "One factor"} taken apart: ${fraction(z(above), z(k))} = ${factor(run.at("gain", i, k))} <small>${name(run.layers[above].name)} to ${name(run.layers[k].name)}</small></h2>
      ${parts ? html`<table><tbody>${Object.entries(OWNERS).map(([owner, [color, text]], p) => html`<tr><td><i class="swatch" style="background:var(${color})"></i>${text}</td><td class="n"><b>× ${factor(parts[p])}</b></td><td class="n soft">${fixed(parts[p], 2)} decades</td><td class="soft wide">${explained[owner](run, k)}</td></tr>`)}</tbody></table>`
        : html`<p class="note">Weights × slopes: ${factor(run.at("weight_factor", i, k))} × ${factor(run.at("slope_factor", i, k))}.</p>`}`);
  }
  draw($(".lesson", root), html`<h2>The lesson's network <small>one unit per layer</small></h2><div class="formula" style="font-size:17px;gap:6px;margin:4px 0 8px">${[["C", "w₁", 3, "="], ["C", "a₃", 2, "·"], ["a₃", "a₂", 0.5, "·"], ["a₂", "a₁", 3, "·"], ["a₁", "w₁", 1, ""]].map(([a, b, v, op]) => html`<span class="term">${fraction(a, b)}<em>${v}</em></span>${op ? html`<span class="op">${op}</span>` : ""}`)}</div><p class="note">a₀ = 1, weights 2, 3, 0.5, no squish, C = (a₃ − 2)². The same chain; above, each factor is a matrix, and its number a ratio of norms.</p>`);
  host.onpointerleave = () => { focus = null; update(); };
  host.onkeydown = (e) => {
    const step = { PageUp: 1, PageDown: -1 }[e.key], way = arrow(e.key, n);
    if (step) { e.preventDefault(); state.step = Math.max(0, Math.min(count - 1, state.step + step)); move(); update(true); }
    else if (way && way[0] && Math.abs(way[0]) === 1) { e.preventDefault(); app.go({ layer: Math.max(0, Math.min(n - 1, l - way[0])) }, ".waterfall"); }
  };
  update();
  if (W > full) host.parentNode.scrollLeft = Math.max(0, column(drawn.indexOf(l)) - full * 0.55);
  const rows = () => { const told = factors(run, state.step, l); return [["step", "factor", "log10"], ...told.terms.map((t) => [run.steps[state.step], `${t.kind} of ${run.layers[t.layer].name}`, t.log]), [run.steps[state.step], `input and agreement of ${run.layers[l].name}`, told.closing], [run.steps[state.step], "dC/dW", told.gradient]]; };
  return { svg, get rows() { return rows(); }, file: `${run.id}-chain-${run.layers[l].name}` };
}

/** dC/dW_l = dC/dz_L · dz_L/dz_{L-1} · ... · dz_l/dW_l; what lies in the middle of a long one is one number. */
function formula(run, told, l, sub, z) {
  const term = (above, below, log) => html`<span class="term">${fraction(above, below)}<em>${finite(log) ? factor(log) : odd(log)}</em></span>`;
  const op = html`<span class="op">·</span>`, gains = told.terms.slice(1), [first] = told.terms, W = html`W${sub(l)}`;
  const one = (g) => html`${op}${term(z(run.layers[g.layer].next), z(g.layer), g.log)}`;
  const hidden = gains.length > 4 ? gains.slice(1, -1) : [], sum = hidden.reduce((a, g) => a + g.log, 0);
  const middle = hidden.length ? html`${one(gains[0])}${op}<span class="term"><span class="dots">···</span><em>${finite(sum) ? power(sum) : odd(sum)} <small>${hidden.length} factors</small></em></span>${one(gains.at(-1))}` : gains.map(one);
  const agreement = finite(told.entering) && finite(told.closing) ? html` <small>= ‖a‖ ${factor(told.entering)} · agreement ${factor(told.closing - told.entering)}</small>` : "";
  return html`${term("C", W, told.gradient)}<span class="op">=</span>${term("C", z(first.layer), first.log)}${middle}${op}<span class="term">${fraction(z(l), W)}<em>${finite(told.closing) ? factor(told.closing) : odd(told.closing)}${agreement}</em></span>`;
}

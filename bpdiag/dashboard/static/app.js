// The frame: runs on the left, five views, keys, address, downloads; a host says where runs come from.

import { finite, html, number, plainNumber } from "./format.js";
import { chain } from "./chain.js";
import { compare, miniature, reach } from "./compare.js";
import { findings } from "./findings.js";
import { map, SHOWN } from "./map.js";
import { profile } from "./profile.js";
import { theme } from "./color.js";
import { $, $$, asCsv, asSvg, download, draw, folder, glyph, name, Run, title, verdict } from "./parts.js";

const VIEWS = { findings, map, profile, chain, compare };
const TITLES = { findings: "Findings", map: "Map", profile: "Profile", chain: "Chain", compare: "Compare" };
const RAIL = 300; // runs listed; more are found by name, or in the table of Compare
const REFRESH = 5000; // ms between looks at a host that is alive

const FRAME = html`<header class="top"><div class="brand">bpdiag <span>Gradient flow</span></div><div class="tabs" role="tablist" aria-label="Views"></div>
  <div class="tools"><button type="button" class="tool" data-save="svg">SVG</button><button type="button" class="tool" data-save="csv">CSV</button><button type="button" class="tool" data-theme-switch></button></div></header>
  <div class="frame"><nav class="rail" aria-label="Runs"></nav><main id="view" tabindex="-1"></main></div><div class="hidden" aria-live="polite"></div>`;

/** host: {runs() -> overviews, run(id) -> detail, live, theme (or null), about}. */
export async function start(host, root) {
  draw(root, FRAME);
  const state = { view: null, run: null, step: null, layer: 0, show: "decades", zoom: null, picked: null, sort: ["", 1], rows: "", columns: "", filter: {}, query: "", asked: {} };
  const live = $("[aria-live]", root), view = $("#view", root);
  const app = { runs: [], run: null, state, host, say: (text) => { live.textContent = text; }, keep, go };
  let shown = null, width = 0, turn = 0;

  function keep() {
    const told = { view: state.view, run: state.run, step: app.run?.steps[state.step], layer: state.layer, show: state.show };
    history.replaceState(null, "", `#${new URLSearchParams(Object.entries(told).filter(([, v]) => v !== null && v !== undefined))}`);
  }

  /** Change what is shown; ``focus`` has the keyboard afterwards; ``again``: the run has grown and is read anew. */
  async function go(change, focus, again = false) {
    const mine = ++turn, held = focus ?? holder(document.activeElement, change);
    if (change.run !== undefined && change.run !== state.run) change = { step: null, layer: 0, zoom: null, ...change };
    Object.assign(state, change);
    if (state.view !== "compare" && (again || state.run !== app.run?.id)) {
      if (!again) draw(view, html`<p class="note">Reading ${name(state.run)} …</p>`);
      try {
        const told = new Run(await host.run(state.run));
        if (mine !== turn) return;
        app.run = told;
      } catch (error) {
        draw(view, html`<h1 class="small">This run cannot be read.</h1><p>${String(error.message ?? error)}</p>`);
        return;
      }
    }
    const stays = !change.view && !change.run, [page, table] = [window.scrollY, $(".tall", view)?.scrollTop ?? 0];
    render();
    window.scrollTo(0, stays ? page : 0);
    if (stays && $(".tall", view)) $(".tall", view).scrollTop = table;
    if (held) $(held, root)?.focus({ preventScroll: true });
    if (change.view) app.say(`${TITLES[state.view]}. ${$("h1", view)?.textContent ?? ""}`);
  }

  /** Where the keyboard is, so that it is there again after a redraw. */
  function holder(active, change) {
    const { view: tab, set, to } = active?.dataset ?? {};
    if (tab) return `[role=tab][data-view="${change.view ?? state.view}"]`;
    if (set) return `[data-set="${CSS.escape(set)}"]${to ? `[data-to="${CSS.escape(to)}"]` : ""}`;
    return [".time input", ".grid", ".tall"].find((query) => active?.matches?.(query));
  }

  /** The step and layer that one wants to see first: where the first finding begins, the input side. */
  function settle() {
    const { run } = app, count = run.steps.length;
    if (state.step === null || state.step === undefined) state.step = state.asked.step === undefined ? run.findings.length ? run.telling(run.findings[0]) : run.column(run.last?.step ?? 0) : run.column(Number(state.asked.step));
    state.step = Math.max(0, Math.min(count - 1, state.step));
    state.layer = Math.max(0, Math.min(run.top, Number(state.asked.layer ?? state.layer) || 0));
    state.asked = {};
  }

  function render() {
    if (view.clientWidth < 200) return; // a hidden frame has no width: drawn when there is room
    if (state.view !== "compare" && app.run?.id !== state.run) return; // still being read
    width = view.clientWidth;
    draw($(".tabs", root), html`${Object.entries(TITLES).map(([key, title], k) => html`<button type="button" role="tab" data-view="${key}" aria-selected="${key === state.view}" tabindex="${key === state.view ? 0 : -1}" title="key ${k + 1}">${title}</button>`)}`);
    $("[data-theme-switch]", root).textContent = theme() === "dark" ? "Light" : "Dark";
    $("[data-theme-switch]", root).hidden = host.theme !== null && host.theme !== undefined;
    rail();
    const picker = html`<div class="picker"><label for="pick">Run</label><select id="pick">${app.runs.map((run) => html`<option value="${run.id}" ${run.id === state.run ? html`selected` : ""}>${glyph(run.verdict)} ${run.id} (${run.verdict})</option>`)}</select></div>`;
    const body = document.createElement("section");
    body.setAttribute("aria-label", TITLES[state.view]);
    draw(view, state.view === "compare" ? html`` : picker);
    view.append(body);
    if (state.view !== "compare" && (!app.run.layers.length || !app.run.steps.length)) {
      draw(body, html`<h1 class="small">Nothing to draw yet.</h1><p class="note">No weight layer of this run has been measured.</p>`);
      return;
    }
    if (app.run && state.view !== "compare") settle();
    shown = VIEWS[state.view](body, app);
    $("[data-save=svg]", root).disabled = !shown.svg;
  }

  function rail() {
    const wanted = app.runs.filter((run) => run.id.toLowerCase().includes(state.query.toLowerCase())), low = reach(app.runs), box = $(".rail", root);
    const scroll = box.scrollTop, folders = new Set(app.runs.map((run) => folder(run.id))).size;
    draw(box, html`<h2>${app.runs.length} ${app.runs.length === 1 ? "run" : "runs"}</h2>${app.runs.length > 12 ? html`<input type="search" placeholder="name contains" aria-label="Show runs whose name contains" value="${state.query}">` : ""}
      ${wanted.slice(0, RAIL).map((run) => html`<button type="button" class="run" data-run="${run.id}" aria-pressed="${run.id === state.run && state.view !== "compare"}">${miniature([run], 46, 34, low, -Math.log10(run.planned || 1000))}<span>${folders > 1 ? html`<span class="faint">${folder(run.id)}</span>` : ""}<b>${title(run.id)}</b>${verdict(run.verdict)} <span class="faint">${finite(number(run.loss)) ? `loss ${plainNumber(number(run.loss))}` : ""}</span></span></button>`)}
      ${wanted.length > RAIL ? html`<p>and ${wanted.length - RAIL} more: type a part of the name</p>` : ""}
      <p>Small pictures: the share of the output's gradient that arrives, output on top; the hairline is the limit 1/T.</p><p>${host.about ?? ""}</p><p>Keys: 1 to 5 views, ↑ ↓ layer, ← → step.</p>`);
    box.scrollTop = scroll;
    const search = $("input", box);
    if (search) search.oninput = () => { state.query = search.value; rail(); const again = $("input", box); again.focus(); again.setSelectionRange(again.value.length, again.value.length); };
  }

  function save(kind) {
    if (!shown) return;
    if (kind === "csv") download(`${shown.file}.csv`, "text/csv", asCsv(shown.rows));
    else if (shown.svg) download(`${shown.file}.svg`, "image/svg+xml", asSvg(shown.svg, shown.canvas));
  }

  root.addEventListener("click", (e) => {
    const target = e.target.closest("[data-view], [data-run], [data-set][data-to], [data-save], [data-theme-switch]");
    if (!target) return;
    const { view: to, run, set, save: kind } = target.dataset;
    if (to) go({ view: to });
    else if (run !== undefined) go({ run, view: state.view === "compare" ? "findings" : state.view });
    else if (set) go({ [set]: target.dataset.to });
    else if (kind) save(kind);
    else { document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark"; go({}); }
  });
  root.addEventListener("change", (e) => {
    const { set } = e.target.dataset ?? {};
    if (e.target.id === "pick") go({ run: e.target.value });
    else if (set?.startsWith("filter:")) go({ filter: { ...state.filter, [set.slice(7)]: e.target.value } });
    else if (set) go({ [set]: e.target.value });
  });
  document.addEventListener("keydown", (e) => {
    if (e.target.matches("input, select, textarea") || e.ctrlKey || e.metaKey || e.altKey) return;
    const views = Object.keys(VIEWS);
    if (e.key >= "1" && e.key <= "5") go({ view: views[e.key - 1] });
    if (e.target.matches("[role=tab]") && ["ArrowLeft", "ArrowRight"].includes(e.key)) {
      e.preventDefault();
      go({ view: views[(views.indexOf(state.view) + (e.key === "ArrowRight" ? 1 : 4)) % 5] });
    }
  });
  new ResizeObserver(() => { if (!root.classList.contains("printing") && view.clientWidth >= 200 && view.clientWidth !== width && state.view) render(); }).observe(view);
  window.addEventListener("theme", () => go({}));
  window.addEventListener("beforeprint", printed);
  window.addEventListener("afterprint", () => {
    root.classList.remove("printing");
    document.documentElement.dataset.theme = root.dataset.theme;
    render();
  });

  /** On paper all views stand below each other, as wide as a page, dark on light. */
  function printed() {
    root.classList.add("printing");
    root.dataset.theme = theme();
    document.documentElement.dataset.theme = "light";
    view.replaceChildren();
    for (const [key, drawn] of Object.entries(VIEWS)) {
      if (key !== "compare" && !app.run || key === "compare" && app.runs.length < 2) continue;
      const section = document.createElement("section");
      view.append(section);
      drawn(section, app);
    }
  }

  async function refresh() {
    const before = new Map(app.runs.map((run) => [run.id, run.stamp]));
    app.runs = await host.runs();
    const open = app.runs.find((run) => run.id === state.run), changed = app.runs.length !== before.size || app.runs.some((run) => before.get(run.id) !== run.stamp);
    if (!changed) return;
    if (!app.runs.length) { draw(view, html`<h1 class="small">No run here yet.</h1><p class="note">A run folder holds trace/meta.json: bpdiag model.activation=sigmoid, or bpdiag.watch(model, log="runs/mine").</p>`); return; }
    if (!state.view) {
      const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
      state.asked = { step: asked.step, layer: asked.layer };
      if (asked.show in SHOWN) state.show = asked.show;
      const worst = app.runs.find((run) => ["dies", "not finite", "blows up"].includes(run.verdict)) ?? app.runs[0];
      await go({ view: asked.view in VIEWS ? asked.view : app.runs.length > 1 ? "compare" : "findings", run: app.runs.some((run) => run.id === asked.run) ? asked.run : worst.id, step: null });
    } else if (!open) await go({ run: app.runs[0].id });
    else {
      if (before.get(open.id) !== open.stamp) {
        const end = state.step === app.run?.steps.length - 1, step = app.run?.steps[state.step]; // at the newest step one stays there
        await go({ step: end ? Number.MAX_SAFE_INTEGER : null, asked: end || step === undefined ? {} : { step, layer: state.layer } }, undefined, true);
      } else await go({});
    }
  }
  await refresh();
  if (host.live) setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, REFRESH);
}

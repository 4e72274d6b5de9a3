// Numbers to words, strings to markup: the only place where either becomes text.  Missing is null; NaN and infinities
// are JavaScript's own.

export const finite = (x) => typeof x === "number" && Number.isFinite(x);
const minus = (s) => String(s).replace(/-/g, "−");

/** A number with a real minus sign, and none before a zero. */
export function fixed(x, digits = 1) {
  const s = x.toFixed(digits);
  return minus(Number(s) === 0 ? (0).toFixed(digits) : s);
}

/** What stands where there is no number. */
export function odd(x) {
  if (x === null || x === undefined) return "not measured";
  return x === -Infinity ? "exactly 0" : x === Infinity ? "infinite" : "not a number";
}

class Markup {
  constructor(text) { this.text = text; }
  toString() { return this.text; }
}
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
// control characters and those that turn the direction of writing are shown, not obeyed
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;
export const visible = (s) => String(s).replace(INVISIBLE, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

function inserted(value) {
  if (value instanceof Markup) return value.text;
  if (Array.isArray(value)) return value.map(inserted).join("");
  if (value === null || value === undefined) return "";
  return visible(value).replace(/[&<>"']/g, (c) => ESCAPES[c]);
}

/** Markup from a template: whatever is put in is text, unless it is markup made here. */
export function html(parts, ...values) {
  return new Markup(parts.reduce((out, part, i) => out + inserted(values[i - 1]) + part));
}

/** 10 to a power, as markup for a page and for a picture. */
export const power = (d, digits = 1) => (finite(d) ? html`10<sup>${fixed(d, digits)}</sup>` : odd(d));
export const powerSvg = (d, digits = 1) =>
  finite(d) ? html`10<tspan dy="-4" font-size="9.5">${fixed(d, digits)}</tspan><tspan dy="4">&#8203;</tspan>` : odd(d);

/** A sentence of the diagnosis, its powers raised: 10^−16.3. */
export function sentence(text) {
  return String(text ?? "").split(/(10\^[−-]?\d+(?:\.\d+)?)/).map((part) =>
    part.startsWith("10^") ? html`10<sup>${part.slice(3)}</sup>` : html`${part}`);
}

/** A factor given its log10, two to three significant digits; a power of ten beyond a thousand. */
export function factor(log, raised = power) {
  if (!finite(log)) return odd(log);
  const x = 10 ** log;
  return x >= 1000 || x < 0.001 ? raised(log) : plainNumber(x);
}

export function plainNumber(x) {
  if (!finite(x)) return odd(x);
  const size = Math.abs(x);
  if (size !== 0 && (size >= 1e5 || size < 1e-4)) return minus(x.toExponential(1).replace("e+", "e"));
  const digits = size >= 100 || Number.isInteger(x) ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : size >= 0.01 ? 3 : 4;
  return fixed(x, digits);
}

export function percent(share) {
  return finite(share) ? (share > 0 && share < 0.005 ? "<1 %" : `${(100 * share).toFixed(0)} %`) : odd(share);
}

export const SUBSCRIPT = (n) => String(n).replace(/\d/g, (d) => "₀₁₂₃₄₅₆₇₈₉"[d]);

/** The end of a long name, which tells more than its beginning. */
export const ending = (name, room) => (visible(name).length <= room ? visible(name) : `…${visible(name).slice(1 - room)}`);

/** A number as JSON holds it: the three that are none come as words. */
export const number = (x) => ({ NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity })[x] ?? (finite(x) ? x : null);

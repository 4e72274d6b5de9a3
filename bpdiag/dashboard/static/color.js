// One diverging scale, blue = shrinks, orange = grows, paper = intact, with a jump at the limit 1/T; interpolated in
// OKLab.  Shares and updates have one hue each.

const DIVERGING = {
  light: ["#06182f", "#113d70", "#2468a6", "#6ba3d1", "#a9c9e4", "#e4ebf0", "#f1efea", "#f6e6d2", "#eeb06c", "#d98634", "#a84a08", "#5c2405"],
  dark: ["#eef8ff", "#a9d8fb", "#5ea9e6", "#2f77b4", "#27507a", "#28333f", "#2b2c2e", "#3d3226", "#7d4d17", "#bb6d1b", "#eb9c4c", "#ffd9a8"],
};
const RAMPS = {
  share: { light: ["#f1efea", "#4b2380"], dark: ["#25272b", "#e0cffb"] },
  update: { light: ["#f6f4ef", "#4a3a00"], dark: ["#1c1e21", "#f0e6c8"] },
};
const INTACT = 0.75; // decades: the band of luck

export const theme = () => document.documentElement.dataset.theme || "light";

function toLab(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const v = parseInt(hex.slice(i, i + 2), 16) / 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function toHex([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const rgb = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const encoded = rgb.map((v) => (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055));
  return `#${encoded.map((v) => Math.round(255 * Math.min(1, Math.max(0, v))).toString(16).padStart(2, "0")).join("")}`;
}

function between(stops, x) {
  if (x <= stops[0][0]) return toHex(stops[0][1]);
  if (x >= stops.at(-1)[0]) return toHex(stops.at(-1)[1]);
  const i = stops.findIndex(([at]) => at > x);
  const [[x0, a], [x1, b]] = [stops[i - 1], stops[i]];
  return toHex(a.map((v, k) => v + ((x - x0) / (x1 - x0)) * (b[k] - v)));
}

/** Each color once: a map has thousands of cells and few different colors. */
function remembered(compute, grain) {
  const kept = new Map();
  return (x) => {
    const key = Math.round(x * grain);
    if (!kept.has(key)) kept.set(key, compute(key / grain));
    return kept.get(key);
  };
}

/** Decades -> color; ``limit`` is log10 T, ``zoom`` how many decades of the scale one of the statistic's counts for. */
export function diverging(limit, zoom = 1) {
  const end = Math.max(limit, 1);
  const at = [-end - 13.4, -end - 7.4, -end - 3.4, -end - 0.001, -end, -INTACT, 0, INTACT, end, end + 0.001, end + 3.4, end + 7.4];
  const stops = DIVERGING[theme()].map((hex, i) => [at[i], toLab(hex)]);
  return remembered((d) => between(stops, d * zoom), 50 * zoom);
}

export function ramp(name, low, high) {
  const stops = RAMPS[name][theme()].map((hex, i) => [i, toLab(hex)]);
  return remembered((x) => between(stops, (x - low) / (high - low)), 400 / (high - low));
}

/** Of what is no number. */
export function special(x) {
  const dark = theme() === "dark";
  if (x === null || x === undefined) return { ground: dark ? "#15171a" : "#fbfaf7", mark: dark ? "#7b8087" : "#8c9197", form: "dot" };
  if (x === -Infinity) return { ground: dark ? "#ffffff" : "#000000", mark: dark ? "#000000" : "#ffffff", form: "ring" };
  return { ground: dark ? "#f07fbd" : "#8a1458", mark: dark ? "#15171a" : "#fbfaf7", form: "cross" };
}

// The page that opens offline: the same views, all data in it, compressed.

import { start } from "./app.js";

async function unpackedPage() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const { about, runs, details } = await unpackedPage();
await start({ live: false, theme: null, about, runs: async () => runs, run: async (id) => details[id] ?? Promise.reject(new Error("Its steps did not fit this page: bpdiag report RUN writes one for it alone.")) }, document.getElementById("app"));

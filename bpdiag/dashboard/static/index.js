// The tab in TensorBoard, which loads this module into a frame of its own and calls render().

import { start } from "./app.js";

const place = new URL(".", import.meta.url);

async function fetched(path) {
  const answer = await fetch(new URL(path, place));
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

export async function render() {
  const sheet = document.createElement("link");
  Object.assign(sheet, { rel: "stylesheet", href: new URL("style.css", place) });
  await new Promise((done) => { sheet.onload = sheet.onerror = done; document.head.append(sheet); });
  document.documentElement.lang = "en";
  const outside = window.parent.document.body; // TensorBoard's own page says whether it is dark
  const follow = () => { document.documentElement.dataset.theme = outside.classList.contains("dark-mode") ? "dark" : "light"; };
  follow();
  const root = document.createElement("div");
  document.body.append(root);
  await start({ live: true, theme: "outside", runs: () => fetched("runs"), run: (id) => fetched(`run?${new URLSearchParams({ id })}`) }, root);
  new MutationObserver(() => { follow(); window.dispatchEvent(new Event("theme")); }).observe(outside, { attributes: true, attributeFilter: ["class"] });
}

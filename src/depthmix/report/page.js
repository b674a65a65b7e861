"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const charts = read("charts"), data = read("tokens");
const dark = matchMedia("(prefers-color-scheme: dark)");

// Charts are drawn where they are about to be seen, in the colours of the page.
function draw(place) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const config = {
    background: null, font: "system-ui, sans-serif",
    view: { stroke: line },
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line },
    legend: { labelColor: ink, titleColor: ink },
  };
  const inner = document.createElement("div");
  inner.style.width = "100%";
  place.replaceChildren(inner);
  // The place has a description of its own, and the table below the figures.
  vegaEmbed(inner, charts[place.dataset.chart], { actions: false, renderer: "svg", config })
    .then(() => inner.setAttribute("aria-hidden", "true"));
}
const places = [...document.querySelectorAll("[data-chart]")];
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "600px" });
places.forEach((place) => watcher.observe(place));
dark.addEventListener("change", () => places.filter((place) => place.firstChild).forEach(draw));

// Rows: colours, filters, and what is known of a token.
const byId = (id) => document.getElementById(id);
const tokens = [...document.querySelectorAll(".t[data-i]")], rows = [...document.querySelectorAll(".row")];
const colourOf = (layer) => `var(--c${layer % 7})`;
const spread = data.layers.map((_, j) => Math.max(1e-6, ...data.gates.map((g) => Math.abs(g[j] - data.means[j]))));
const STRONGEST = 45;  // per cent of colour, so that the text on it stays readable

const modes = {};
if (data.layers.length) {
  modes["layer most above its mean"] = (i) => {
    const above = data.gates[i].map((weight, j) => weight - data.means[j]);
    const most = above.indexOf(Math.max(...above));
    return [colourOf(most), above[most] / Math.max(...spread)];
  };
  data.layers.forEach((layer, j) => {
    modes[`weight of layer ${layer}`] = (i) => [colourOf(j), (data.gates[i][j] - data.means[j]) / spread[j] / 2 + 0.5];
  });
}
modes.surprise = (i) => ["var(--c5)", data.surprise[i] / 5];
modes["late layer right, last wrong"] = (i) => ["var(--c1)", data.saves[i]];

function legend(mode) {
  const place = byId("legend");
  place.textContent = "";
  const entry = (colour, text) => {
    const item = document.createElement("span"), box = document.createElement("i");
    box.style.background = `color-mix(in srgb, ${colour} ${STRONGEST}%, transparent)`;
    item.append(box, text);
    place.append(item);
  };
  const match = /^weight of layer (\d+)$/.exec(mode);
  if (mode === "surprise") entry("var(--c5)", "5 nats or more");
  else if (mode === "late layer right, last wrong") entry("var(--c1)", "a late layer has this token, the last layer has not");
  else if (match) {
    const j = data.layers.indexOf(Number(match[1]));
    entry(colourOf(j), `weight ${(data.means[j] + spread[j]).toFixed(3)}; none: ${Math.max(0, data.means[j] - spread[j]).toFixed(3)}`);
  } else data.layers.forEach((layer, j) => entry(colourOf(j), `layer ${layer} (mean ${data.means[j].toFixed(3)})`));
  if (mode === "layer most above its mean") place.append(`full colour: ${Math.max(...spread).toFixed(3)} above the mean`);
}

function colour() {
  const mode = byId("colour").value;
  for (const token of tokens) {
    const [hue, strength] = modes[mode](Number(token.dataset.i));
    token.style.setProperty("--c", hue);
    token.style.setProperty("--s", `${Math.round(STRONGEST * Math.min(1, Math.max(0, strength)))}%`);
  }
  legend(mode);
}

function filter() {
  const source = byId("source").value, writer = byId("writer").value;
  const text = byId("search").value.toLowerCase(), saved = byId("saved").checked;
  let count = 0;
  for (const row of rows) {
    const fits = (!source || row.dataset.source === source) && (!writer || row.dataset.writer === writer)
      && (!saved || Number(row.dataset.saved) > 0) && (!text || row.textContent.toLowerCase().includes(text));
    row.hidden = !fits;
    count += fits;
  }
  byId("count").textContent = `${count} of ${rows.length} rows`;
}

const element = (name, ...children) => {
  const made = document.createElement(name);
  made.append(...children);
  return made;
};

function predictions(i) {
  const table = element("table"), width = data.predictors.length, many = data.top[i].length / width;
  const head = element("tr", ...["predictor", "weight", "nats", "likeliest tokens"].map((name) => element("th", name)));
  table.append(element("thead", head));
  const body = element("tbody");
  data.predictors.forEach((name, p) => {
    if (data.losses[i][p] < 0) return;  // not looked at
    const gate = data.layers.length && p < data.layers.length ? data.gates[i][p] : null;
    const weight = element("td", gate === null ? "" : gate.toFixed(3));
    if (gate !== null) {
      const bar = element("span");
      bar.className = "bar";
      bar.style.cssText = `width:${3 * gate}rem;background:${colourOf(p)}`;
      weight.prepend(bar);
    }
    const best = Array.from({ length: many }, (_, m) => p * many + m)
      .map((at) => element("span", `${JSON.stringify(data.texts[data.top[i][at]])} ${data.probability[i][at]}%`));
    body.append(element("tr", element("th", name), weight, element("td", data.losses[i][p].toFixed(2)), element("td", ...best)));
  });
  table.append(body);
  return table;
}

let now = null;
function show(token) {
  const detail = byId("detail");
  now?.classList.remove("now");
  now?.setAttribute("aria-selected", "false");
  now = token;
  token.classList.add("now");
  token.setAttribute("aria-selected", "true");
  const title = element("h3", element("code", JSON.stringify(token.textContent)));
  if (token.dataset.i === undefined) detail.replaceChildren(title, "the first token: nothing predicts it");
  else {
    const i = Number(token.dataset.i);
    title.append(` ${data.surprise[i].toFixed(2)} nats, ${token.classList.contains("p") ? "prompt" : "learned"}`);
    detail.replaceChildren(title, predictions(i));
  }
  detail.hidden = false;
}

function move(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  const token = event.target.closest(".t");
  if (event.key === "Escape") byId("detail").hidden = true;
  if (!token || !(event.key in steps)) return;
  event.preventDefault();
  const line = [...token.parentElement.children];
  const to = line[Math.min(line.length - 1, Math.max(0, line.indexOf(token) + steps[event.key]))];
  token.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

if (rows.length) {
  byId("colour").append(...Object.keys(modes).map((mode) => element("option", mode)));
  byId("colour").addEventListener("change", colour);
  for (const id of ["source", "writer", "saved"]) byId(id).addEventListener("change", filter);
  byId("search").addEventListener("input", filter);
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  const list = document.querySelector("ol.rows");
  for (const kind of ["mouseover", "focusin"])
    list.addEventListener(kind, (event) => event.target.closest(".t") && show(event.target.closest(".t")));
  list.addEventListener("keydown", move);
  colour();
  filter();
}

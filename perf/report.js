"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const text = (tag, value, parent) => { const e = document.createElement(tag); e.textContent = value; parent.append(e); return e; };
const num = (x) => x >= 100 ? Math.round(x).toLocaleString("en") : x >= 1 ? x.toFixed(2) : x.toPrecision(2);

function show(mark, x, y) {
  const r = rows[+mark.dataset.i], peer = mark.dataset.peer;
  const us = peer ? r.peers[peer] : r.us;
  tip.replaceChildren();
  text("b", r.case, tip);
  const t = document.createElement("table");
  const line = (k, v) => { const tr = document.createElement("tr"); text("td", k, tr); text("td", v, tr); t.append(tr); };
  line(peer ? "peer" : "kernel", peer || r.impl);
  line("time", num(us) + " µs" + (peer ? "" : " ± " + r.spread.toFixed(1)));
  if (r.flops) line("rate", num(r.flops / us * 1e-6) + " TFLOP/s");
  line("traffic", num(r.bytes / us * 1e-6) + " TB/s");
  if (!peer) {
    line("of the roof (" + r.bound + ")", r.roof_pct.toFixed(0) + " %");
    line("error", r.err.toExponential(1));
    if (r.config) line("config", r.origin);
    for (const [name, theirs] of Object.entries(r.peers)) line(name, num(theirs) + " µs, " + (theirs / r.us).toFixed(2) + "x ours");
  } else line("attnkit (" + r.impl + ")", num(r.us) + " µs, " + (us / r.us).toFixed(2) + "x faster");
  tip.append(t);
  const svg = mark.ownerSVGElement;
  svg.classList.add("hot");
  svg.querySelectorAll(".mark").forEach((m) => m.classList.toggle("on", m.dataset.case === mark.dataset.case));
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 16, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, y + 16 + box.height > innerHeight ? y - box.height - 14 : y + 16) + "px";
}
function hide(mark) { tip.style.visibility = "hidden"; mark.ownerSVGElement.classList.remove("hot"); }
document.querySelectorAll(".mark").forEach((mark) => {
  mark.addEventListener("mousemove", (e) => show(mark, e.clientX, e.clientY));
  mark.addEventListener("mouseleave", () => hide(mark));
  mark.addEventListener("focus", () => { const b = mark.getBoundingClientRect(); show(mark, b.right, b.bottom); });
  mark.addEventListener("blur", () => hide(mark));
});

document.querySelectorAll("table.rows").forEach((table) => {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((th, column) => {
    th.tabIndex = 0;
    const sort = () => {
      const down = th.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (tr) => { const c = tr.cells[column]; return c.dataset.v === undefined ? c.textContent : c.dataset.v === "" ? -Infinity : +c.dataset.v; };
      const order = [...body.rows].sort((a, b) => { const x = key(a), y = key(b); return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1); });
      body.append(...order);
    };
    th.addEventListener("click", sort);
    th.addEventListener("keydown", (e) => { if (e.key === "Enter") sort(); });
  });
});
const find = document.getElementById("find"), family = document.getElementById("family");
function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll("#all tbody tr").forEach((tr) => {
    const hay = tr.textContent.toLowerCase();
    tr.hidden = (family.value && tr.dataset.family !== family.value) || !words.every((w) => hay.includes(w));
  });
}
find.addEventListener("input", filter); family.addEventListener("change", filter);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

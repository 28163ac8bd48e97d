// Keeps the page as the server sees it. One stream (/live) brings rows as they change; while it is gone the page says so,
// and when it is back the first frame brings everything.
"use strict";

const SILENCE = 40000; // the server speaks every 15 s at least; after this the stream is dead, whatever the socket says
const page = document.body.dataset;
const byId = (id) => document.getElementById(id);
const rows = byId("rows");

let skew = 0; // the server's clock minus this machine's, in milliseconds
let source = null;
let heardAt = Date.now();
let lost = false;
let first = true;
let again = 0; // the timer of a reconnection or of a refresh

// ---- time ----

const pad = (n) => String(n).padStart(2, "0");

function clock(date) {
  return `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())} ` +
    `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}`;
}

// The same words as view.span on the server.
function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const whole = Math.max(0, Math.floor(seconds));
  for (let i = 0; i < 3; i++) {
    const [size, name] = units[i];
    if (whole < size) continue;
    const big = Math.floor(whole / size);
    const left = Math.floor((whole % size) / units[i + 1][0]);
    return left && big < 10 && units[i + 1][0] > 1 ? `${big} ${name} ${left} ${units[i + 1][1]}` : `${big} ${name}`;
  }
  return `${whole} s`;
}

function show(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function tick() {
  const now = Date.now() + skew;
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const passed = (now - Date.parse(time.dateTime)) / 1000;
    show(time, passed < 2 ? "now" : `${span(passed)} ago`);
  }
  for (const time of document.querySelectorAll("time[data-lasting]")) {
    show(time, span((now - Date.parse(time.dateTime)) / 1000));
  }
}

// Absolute times in the reader's own zone.
function localize(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const local = clock(new Date(time.dateTime));
    if ("at" in time.dataset) show(time, local);
    else time.title = "lasting" in time.dataset ? `since ${local}` : local;
  }
}

// ---- rows ----

function element(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content.firstElementChild;
}

function put(row) {
  const old = byId(`t-${row.name}`);
  const made = element(row.html);
  localize(made);
  if (old && old.dataset.print === made.dataset.print) {
    // Only the time of the last report is new: leave the row alone, somebody may be selecting text in it.
    old.querySelector(".c-seen").replaceWith(made.querySelector(".c-seen"));
    return false;
  }
  const focused = old && old.contains(document.activeElement);
  if (old && old.dataset.key === row.key) {
    old.replaceWith(made);
  } else {
    if (old) old.remove();
    rows.insertBefore(made, [...rows.children].find((other) => other.dataset.key > row.key) || null);
    made.classList.add("changed");
  }
  if (focused) made.querySelector("a").focus();
  return !old || old.className.split(" ")[0] !== row.state;
}

// For those who listen to the page: what changed its state, a leak at once and the rest when there is a pause.
function tell(changed) {
  const words = (list) => list.slice(0, 5).map((row) => `${row.name}: ${row.state}`).join(", ") +
    (list.length > 5 ? ` and ${list.length - 5} more` : "");
  const leaks = changed.filter((row) => row.state === "leaking");
  const others = changed.filter((row) => row.state !== "leaking");
  if (leaks.length) byId("alarm").textContent = words(leaks);
  if (others.length) byId("said").textContent = words(others);
}

function apply(frame, whole) {
  if (frame.build !== page.build) return location.reload(); // the server was upgraded
  skew = frame.at * 1000 - Date.now();
  if (whole) {
    const names = new Set(frame.rows.map((row) => `t-${row.name}`));
    for (const row of [...rows.children]) if (!names.has(row.id)) row.remove();
  }
  for (const name of frame.gone) byId(`t-${name}`)?.remove();
  tell(frame.rows.filter(put));
  byId("head").innerHTML = frame.head;
  document.title = frame.title;
  byId("fleet").hidden = frame.total === 0;
  byId("empty").hidden = frame.total !== 0;
  tick();
}

// ---- the page of one tunnel: fetched again when its tunnel changed ----

function refreshSoon() {
  if (!again) again = setTimeout(refresh, 1000);
}

async function refresh() {
  again = 0;
  const focusable = () => [...byId("detail").querySelectorAll("a, [tabindex]")];
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    const detail = fresh.getElementById("detail");
    if (!detail) return;
    const focused = focusable().indexOf(document.activeElement);
    byId("detail").replaceWith(document.adoptNode(detail));
    if (focused >= 0) focusable()[focused]?.focus();
    localize(byId("detail"));
    tick();
  } catch {
    // The stream notices that the server is gone, and says so.
  }
}

// ---- the stream ----

function alive() {
  heardAt = Date.now();
  lost = false;
  byId("lost").hidden = true;
  document.body.classList.remove("stale");
  byId("live").classList.add("on");
  show(byId("live-word"), "Live");
}

function gone() {
  if (lost) return;
  lost = true;
  show(byId("lost-at"), clock(new Date(heardAt)).slice(11));
  byId("lost").hidden = false;
  document.body.classList.add("stale");
  byId("live").classList.remove("on");
  show(byId("live-word"), "Not live");
}

function receive(event) {
  alive();
  const frame = JSON.parse(event.data);
  if (rows) return apply(frame, event.type === "all");
  if (frame.build !== page.build) return location.reload();
  skew = frame.at * 1000 - Date.now();
  const mine = frame.rows.find((row) => row.name === page.tunnel);
  const back = event.type === "all" && !first;
  first = false;
  if (back || (mine && event.type === "some") || frame.gone.includes(page.tunnel)) refreshSoon();
}

function connect() {
  source?.close();
  heardAt = lost ? heardAt : Date.now();
  source = new EventSource("/live");
  source.addEventListener("all", receive);
  source.addEventListener("some", receive);
  source.addEventListener("beat", alive);
  source.onerror = () => {
    gone();
    // A browser gives up by itself when the answer was no stream, such as 503.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000 + Math.random() * 2000);
  };
}

let triedAt = Date.now();
setInterval(() => {
  tick();
  const now = Date.now();
  if (now - heardAt > SILENCE && now - triedAt > SILENCE) {
    triedAt = now;
    gone();
    connect();
  }
}, 1000);

addEventListener("pagehide", () => source?.close());
addEventListener("pageshow", (event) => { if (event.persisted) connect(); });

byId("live").hidden = false;
skew = Number(page.now) * 1000 - Date.now();
localize(document);
tick();
connect();

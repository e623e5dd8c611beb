// Watch: the list of runs, or one run, which is asked for what is new every two seconds.
import { acting, badge, byId, commandLine, el, get, post, put, repeatedly } from "./page.js";
import { chart, smoothed, thinned } from "./charts.js";
import { showPreviews } from "./previews.js";

const run = new URLSearchParams(location.search).get("run");
const curves = { at: "", step: [], loss: [], lr: [], grad_norm: [] };
const paces = [];

// All runs

async function showRuns() {
  const runs = await get("/api/runs");
  const table = el("div", { class: "scroll" }, el("table", { class: "runs" },
    el("thead", {}, el("tr", {}, ["Run", "State", "Step", "Best held-out loss", "Last active"].map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, runs.map(row))));
  put(byId("runs"), runs.length ? table : byId("no-runs").content.cloneNode(true));
}

function row(one) {
  return el("tr", {},
    el("th", { scope: "row" }, el("a", { href: `/watch?run=${encodeURIComponent(one.run)}` }, one.name),
      el("span", { class: "soft small place" }, one.shown)),
    el("td", {}, badge(one.state), one.reason ? el("span", { class: "soft small place" }, one.reason) : null),
    el("td", {}, `${one.step}${one.steps ? ` of ${one.steps}` : ""}`),
    el("td", {}, one.best_loss === null ? "–" : `${one.best_loss.toPrecision(4)} at ${one.best_step}`),
    el("td", {}, one.active ? new Date(1000 * one.active).toLocaleString() : "–"));
}

// One run

async function showRun() {
  const now = await get("/api/run", { run });
  document.title = `${now.name} · sd3tune`;
  byId("run-name").textContent = now.name;
  put(byId("run-state"), badge(now.state));
  showProgress(now);
  put(byId("actions"), actions(now));
  await Promise.all([showCurves(), showHeldOut(), showPictures(), showEvaluation(), showLog()]);
}

function showProgress(now) {
  const bar = byId("progress");
  const share = now.steps ? now.step / now.steps : 0;
  bar.setAttribute("aria-valuemax", now.steps ?? 0);
  bar.setAttribute("aria-valuenow", now.step);
  bar.firstElementChild.style.width = `${100 * Math.min(1, share)}%`;
  bar.classList.toggle("busy", now.state === "running" && !now.begun);
  const memory = now.memory ? [gigabytes(now.memory.system), now.memory.gpu ? `GPU ${gigabytes(now.memory.gpu)}` : ""] : [];
  const facts = [
    ["Step", `${now.step}${now.steps ? ` of ${now.steps}` : ""}`],
    ["Time left", timeLeft(now)],
    ["Memory", memory.filter(Boolean).join(", ")],
    ["Saved at", now.saved === null ? "" : `step ${now.saved}`],
    ["Best held-out loss", now.best_loss === null ? "" : `${now.best_loss.toPrecision(4)} at step ${now.best_step}`],
    ["Base", now.base ?? ""],
    ["Images", now.facts.images ?? ""],
    ["Device", [now.facts.gpu ?? now.facts.device, now.facts.dtype].filter(Boolean).join(", ")],
  ];
  put(byId("figures"), facts.filter(([, value]) => value !== "").map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, `${value}`))));
}

const gigabytes = (bytes) => `${(bytes / 1e9).toPrecision(3)} GB`;

/** The time left by the pace of the last minutes, as this page has seen it. */
function timeLeft(now) {
  if (now.state !== "running") return "";
  if (!now.begun) return "encoding the photos";
  paces.push([Date.now() / 1000, now.step]);
  while (paces.length > 90) paces.shift();
  const [[then, before], [last, step]] = [paces[0], paces.at(-1)];
  if (!now.steps || step <= before) return "...";
  return duration(((now.steps - step) * (last - then)) / (step - before));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function actions(now) {
  const active = ["queued", "running"].includes(now.state);
  const ours = now.job && ["queued", "running"].includes(now.job.state);
  const failed = now.reason && now.state === "failed" ? el("p", { class: "problem" }, now.reason) : null;
  if (ours) return [commandLine(now.job.command), el("div", { class: "row" }, button("Stop", "stop", "", now.job.id))];
  if (active) return el("p", { class: "soft" }, "It was started in a terminal: press Ctrl-C there to stop and save.");
  if (now.state === "finished") return [failed, el("div", { class: "row" }, ["try", "share"].map((place) =>
    el("a", { class: "button", href: `/${place}?run=${encodeURIComponent(run)}` }, place === "try" ? "Try it" : "Share it")))];
  return [failed, commandLine(now.resume), el("div", { class: "row" }, button("Resume", "resume", "primary", ""))];
}

const button = (text, action, kind, id) => el("button", { type: "button", class: kind, "data-action": action, "data-id": id }, text);

byId("actions").addEventListener("click", (event) => {
  const pressed = event.target.closest("button[data-action]");
  if (!pressed) return;
  acting(pressed, async () => {
    if (pressed.dataset.action === "stop") await post("/api/jobs/stop", { id: pressed.dataset.id });
    else await post("/api/run/resume", { run });
    paces.length = 0;
    look();
  });
});

async function showCurves() {
  let changed = false;
  for (let more = true; more;) {
    const found = await get("/api/run/metrics", { run, at: curves.at });
    if (found.reset) for (const name of ["step", "loss", "lr", "grad_norm"]) curves[name].length = 0;
    changed ||= found.reset || found.step.length > 0;
    for (const name of ["step", "loss", "lr", "grad_norm"]) curves[name].push(...found[name]);
    curves.at = found.at;
    more = found.more;
  }
  if (!changed || !curves.step.length) return;
  const kept = thinned(curves.step.length);
  const pick = (values) => kept.map((number) => values[number]);
  const smooth = smoothed(curves.loss, Math.exp(-1 / Math.max(2, curves.loss.length / 40)));
  chart(byId("loss"), pick(curves.step), { smoothed: pick(smooth), "each step": pick(curves.loss) });
  byId("loss-now").textContent = `learning rate ${(curves.lr.at(-1) ?? 0).toExponential(1)}`;
}

async function showHeldOut() {
  const lines = await get("/api/run/held-out", { run });
  byId("by-sigma").hidden = !lines.length;
  byId("held-now").textContent = lines.length ? `on ${lines.at(-1).images} held-out image${lines.at(-1).images === 1 ? "" : "s"}` : "";
  if (!lines.length) {
    put(byId("held"), el("p", { class: "soft small" }, "Nothing is held out. validation.holdout: 3 measures photos that are not trained on."));
    return;
  }
  chart(byId("held"), lines.map((one) => one.step), { adapter: lines.map((one) => one.loss), base: lines.map((one) => one.base_loss) },
    { points: lines.length < 40, height: 170 });
  const last = lines.at(-1);
  const sigmas = Object.keys(last.loss_by_sigma ?? {});
  const middle = sigmas.map((name) => name.split("-").map(Number)).map(([low, high]) => (low + high) / 2);
  const values = (from) => sigmas.map((name) => from[name]);
  chart(byId("sigma"), middle, { adapter: values(last.loss_by_sigma), base: values(last.base_loss_by_sigma) },
    { xLabel: "sigma", points: true, height: 150 });
}

async function showPictures() {
  showPreviews(run, await get("/api/run/previews", { run }));
}

async function showEvaluation() {
  const { evaluation } = await get("/api/run/evaluation", { run });
  byId("evaluation").hidden = !evaluation;
  if (!evaluation) return;
  put(byId("evaluated"), el("p", {}, evaluation.sentence),
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, evaluation.columns.map((one) => el("th", { scope: "col" }, one)))),
      el("tbody", {}, evaluation.rows.map((cells) => el("tr", {}, cells.map((cell, number) => el(number ? "td" : "th", {}, cell))))))),
    evaluation.pictures.map((name) => el("img", { class: "wide", loading: "lazy", alt: name,
      src: `/api/run/picture?${new URLSearchParams({ run, name })}` })));
}

async function showLog() {
  const { log } = await get("/api/run/log", { run });
  const place = byId("log");
  const atEnd = place.scrollTop + place.clientHeight >= place.scrollHeight - 8;
  const text = log ?? "It was started in a terminal, which shows its log.";
  if (place.textContent === text) return;
  place.textContent = text;
  if (atEnd) place.scrollTop = place.scrollHeight;
}

byId("own-config").addEventListener("toggle", async () => {
  if (!byId("config").textContent) byId("config").textContent = (await get("/api/run/config", { run })).text;
});

byId(run ? "one" : "all").hidden = false;
const look = run ? repeatedly(showRun, 2) : repeatedly(showRuns, 4);

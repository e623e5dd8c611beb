// Try: a form whose values are those of `sd3tune infer`, its command, and the pictures of the folder it draws into.
import * as adapters from "./adapters.js";
import { followed, jobLine } from "./follow.js";
import { acting, address, byId, commandLine, el, get, notice, post, put, repeatedly } from "./page.js";
import * as viewer from "./viewer.js";

const form = byId("form");
const fields = () => [...form.querySelectorAll("[data-field]")];
const query = new URLSearchParams(location.search);
let repeated = null; // the recipe that the form repeats
let pictures = [];
let known = { folder: "", digest: "" };

function valueOf(field) {
  if (field.type === "checkbox") return field.checked;
  if ("switch" in field.dataset) return field.value === "" ? null : field.value === "true";
  return field.value.trim();
}

function setValue(field, value) {
  if (field.type === "checkbox") field.checked = value ?? "checked" in field.dataset;
  else field.value = value === undefined || value === null ? "" : String(value);
}

function axes() {
  return [...form.querySelectorAll(".axis")]
    .map((row) => [row.querySelector("[data-axis-name]").value, row.querySelector("[data-axis-values]").value.trim()])
    .filter(([name]) => name);
}

function values() {
  const said = Object.fromEntries(fields().map((field) => [field.dataset.field, valueOf(field)]));
  const drawnWith = adapters.values();
  const grid = axes();
  if (grid.length) delete said.before;
  const onAxis = grid.find(([name]) => name === "lora");
  if (onAxis && adapters.isOnAxis(onAxis[1])) drawnWith.loras.shift();
  const untouched = repeated && JSON.stringify(adapters.values()) === repeated.rows;
  const used = untouched ? {} : drawnWith;
  const base = byId("f-base").value.trim() || used.base || "";
  if (repeated) delete said.before;
  return { ...said, ...used, base, grid: grid.map(([name, list]) => `${name}=${list}`), from_picture: repeated?.path ?? "" };
}

let asked = 0;
let touched = false; // until then, what is missing is a hint and no fault
let waiting;
function changed() {
  followCheckpoints();
  describe();
  clearTimeout(waiting);
  waiting = setTimeout(check, 150);
}

async function check() {
  const mine = ++asked;
  try {
    const { command, problems } = await post("/api/try/command", { values: values() });
    if (mine !== asked) return;
    put(byId("command"), command ? commandLine(command) : null);
    put(byId("problems"), problems.map((line) => el("li", { class: touched ? "problem" : "soft" }, line)));
    byId("draw").disabled = !command;
  } catch (error) {
    if (error.status) put(byId("problems"), el("li", { class: "problem" }, error.message));
  }
}

/** Show the training's own settings as hints, and only what matters. */
function describe() {
  const of = adapters.settings();
  const hint = (name, value, otherwise) => (byId(`f-${name}`).placeholder = value ? String(value) : otherwise);
  hint("size", of.resolution, "auto");
  hint("steps", of.sampling_steps, "auto");
  hint("guidance", of.guidance, "auto");
  hint("prompt", of.instance_prompt, "a photo of sks dog on a beach");
  hint("base", of.base, "the one that the adapter names");
  const one = adapters.values();
  byId("before-row").hidden = axes().length > 0 || Boolean(repeated) || !(one.loras.length || one.embeddings.length);
  byId("where").textContent = `in ${folder()}`;
}

/** An axis of checkpoints that the page has filled in follows the first adapter, until it is edited. */
let filled = "";
function followCheckpoints() {
  const now = adapters.checkpoints();
  for (const row of form.querySelectorAll(".axis")) {
    const list = row.querySelector("[data-axis-values]");
    if (row.querySelector("[data-axis-name]").value === "lora" && list.value === filled) list.value = now;
  }
  filled = now;
}

const folder = () => byId("f-out").value.trim() || "images";

for (const row of form.querySelectorAll(".axis")) {
  const name = row.querySelector("[data-axis-name]");
  const list = row.querySelector("[data-axis-values]");
  name.addEventListener("change", () => {
    list.hidden = !name.value;
    list.value = name.value === "lora" ? adapters.checkpoints() : name.selectedOptions[0].dataset.example ?? "";
    if (name.value === "prompt") list.value = byId("f-prompt").value;
    list.placeholder = name.selectedOptions[0].dataset.example ?? "";
    changed();
  });
}

/** Fill the form from a recipe; fields that then stay as they are do not appear in the command. */
function again(recipe) {
  for (const field of fields().filter((one) => one.dataset.field !== "out")) {
    setValue(field, recipe.values[field.dataset.field]);
  }
  for (const axis of form.querySelectorAll("[data-axis-name]")) {
    axis.value = "";
    axis.dispatchEvent(new Event("change"));
  }
  byId("f-base").value = recipe.base ?? "";
  const models = recipe.values.base ? [{ place: recipe.values.base }] : [];
  const learned = (recipe.values.embeddings ?? []).map((place) => ({ place }));
  adapters.show([...(recipe.loras ?? []), ...learned, ...models]);
  repeated = recipe.command ? { path: recipe.path, rows: JSON.stringify(adapters.values()) } : null;
  const text = repeated ? "Again, but with what you change here: " : "With the settings of ";
  byId("repeating").replaceChildren(
    el("img", { src: address("/api/small", { path: recipe.path, side: 96 }), alt: "" }),
    el("span", {}, text, el("strong", {}, viewer.nameOf(recipe.path)),
      recipe.note ? el("span", { class: "soft small" }, ` ${recipe.note}`) : null));
  byId("repeating").hidden = false;
  byId("reset").hidden = false;
  changed();
  form.scrollIntoView({ block: "start" });
  byId("f-prompt").focus({ preventScroll: true });
}

function startFrom(path) {
  byId("f-image").value = path;
  byId("f-image").closest("details").open = true;
  changed();
  byId("f-strength").focus();
}

function tile({ path, changed: time }) {
  const wide = /-(grid|before-after)(-\d+)?\.png$/.test(path);
  return el("li", { class: wide ? "sheet" : "" },
    el("button", { type: "button", class: "tile", "data-path": path, title: viewer.nameOf(path), onclick: () => viewer.open(path, pictures) },
      el("img", { src: address("/api/small", { path, side: wide ? 768 : 384, t: time }), alt: viewer.nameOf(path), loading: "lazy", decoding: "async" })));
}

async function showPictures() {
  const where = folder();
  if (where !== known.folder) known = { folder: where, digest: "" };
  const found = await get("/api/try/pictures", { folder: where, known: known.digest });
  if (where !== folder() || !found.pictures) return;
  known.digest = found.digest;
  pictures = found.pictures;
  byId("none").hidden = pictures.length > 0;
  byId("count").textContent = pictures.length ? `${pictures.length}` : "";
  const kept = new Map([...byId("pictures").children].map((item) => [item.dataset.key, item]));
  byId("pictures").replaceChildren(...pictures.map((one) => {
    const key = `${one.path} ${one.changed}`;
    const item = kept.get(key) ?? tile(one);
    item.dataset.key = key;
    return item;
  }));
  byId("pictures").removeAttribute("aria-busy");
}

const look = repeatedly(async () => {
  const jobs = await followed((job) => / infer( |$)/.test(job.command));
  put(byId("work"), jobs.filter((job, index) => job.state !== "done" || index === 0).map((job) => jobLine(job, look)));
  await showPictures();
}, 2);

for (const kind of ["input", "change"]) {
  form.addEventListener(kind, () => {
    touched = true;
    changed();
  });
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  acting(byId("draw"), async () => {
    const job = await post("/api/try/draw", { values: values() });
    notice(`In the queue: ${job.title}`);
    await look();
  });
});
byId("dice").addEventListener("click", () => {
  byId("f-seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  changed();
});
byId("reset").addEventListener("click", () => (location.href = "/try"));
byId("f-out").addEventListener("change", () => look());
viewer.start({ again, startFrom });

async function begin() {
  const sources = await get("/api/try/sources");
  adapters.start(sources, changed);
  for (const field of fields()) if (query.has(field.dataset.field)) setValue(field, query.get(field.dataset.field));
  const run = query.get("run");
  const first = sources.find((one) => one.place === run) ?? sources.find((one) => one.weights[0].label !== "file");
  adapters.show(query.has("lora") ? query.getAll("lora").map((place) => ({ place })) : first ? [{ place: adapters.newest(first).path }] : []);
  form.hidden = false;
  changed();
  if (query.has("picture")) again(await get("/api/try/recipe", { path: query.get("picture") }));
}
begin().catch((error) => notice(error.message, true)).finally(() => (form.hidden = false));

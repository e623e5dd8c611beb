// New run: the steps from photos to a started training. The address holds the folder and the file; nothing else is kept.
import { acting, badge, byId, commandLine, el, get, notice, post, put, repeatedly } from "./page.js";
import { findSettings, makeForm } from "./form.js";
import { sendPhotos, showFaults, showPhotos } from "./photos.js";

const query = new URLSearchParams(location.search);
const draft = { file: query.get("file") ?? "", text: "", digest: "", checked: { problems: [], values: null } };
let schema;

function keepAddress() {
  const kept = new URLSearchParams();
  if (byId("folder").value) kept.set("photos", byId("folder").value);
  if (draft.file) kept.set("file", draft.file);
  history.replaceState(null, "", `/new?${kept}`);
}

// Photos

let showing = "";

/** The side of the pictures that the chosen base is trained on. */
const sideOfBase = () => (choices.bases.find((one) => one.name === byId("base").value)?.small ? 64 : 1024);

async function showFolder({ unlessShown = false } = {}) {
  const folder = byId("folder").value.trim();
  if (!folder) {
    if (!unlessShown) notice("Name a folder with photos first, or drop photos below.", true);
    return;
  }
  const values = draft.checked.values;
  const source = values?.data.sources[0];
  const resolution = values ? [values.data.resolution].flat()[0] : sideOfBase();
  const asked = [folder, resolution?.side ?? resolution, source?.caption ?? byId("caption").value];
  if (unlessShown && JSON.stringify(asked) === showing) return;
  await showPhotos(...asked, () => showFolder());
  showing = JSON.stringify(asked);
  keepAddress();
  showUse();
}

/** A configuration that is open trains on its own folder: say so when the page shows another one. */
function showUse() {
  const used = draft.checked.photos;
  const shown = byId("folder").value.trim();
  const differs = used && shown && plain(shown) !== plain(used);
  put(byId("use-photos"), differs ? [el("span", { class: "warning" }, `${draft.file} trains on the photos in ${used}. `),
    el("button", { type: "button" }, `Train on ${shown}`)] : null);
}

const plain = (folder) => folder.replace(/^\.\//, "").replace(/\/+$/, "");

async function take(files) {
  if (!files.length) return;
  const asked = { folder: byId("folder").value.trim(), name: byId("name").value.trim() };
  byId("folder").value = (await post("/api/photos/folder", asked)).folder;
  await sendPhotos([...files], byId("folder").value, (text) => (byId("photos-summary").textContent = text));
  await showFolder();
}

function listenForPhotos() {
  const drop = byId("drop");
  const over = (event, inside) => { event.preventDefault(); drop.classList.toggle("over", inside); };
  drop.addEventListener("dragover", (event) => over(event, true));
  drop.addEventListener("dragleave", (event) => over(event, false));
  drop.addEventListener("drop", (event) => { over(event, false); acting(drop, () => take(event.dataTransfer.files)); });
  const pick = byId("pick");
  pick.addEventListener("change", () => acting(pick, async () => { await take(pick.files); pick.value = ""; }));
  const show = byId("show-photos");
  show.addEventListener("click", () => acting(show, () => showFolder()));
  byId("folder").addEventListener("keydown", (event) => event.key === "Enter" && show.click());
  byId("use-photos").addEventListener("click", (event) => event.target.closest("button") && acting(event.target, async () => {
    const folder = plain(byId("folder").value.trim());
    await change(["data", "sources", 0, "path"], { value: folder.startsWith("/") ? folder : `./${folder}` });
    await showFolder();
  }));
}

// Base and preset

let choices = { bases: [], presets: [], files: [] };

async function showChoices() {
  const [found, folders] = await Promise.all([get("/api/new/choices"), get("/api/photos/folders")]);
  choices = found;
  byId("folders").replaceChildren(...folders.map((one) => el("option", { value: one.path }, `${one.count} pictures`)));
  byId("base").replaceChildren(...choices.bases.map((one) => el("option", { value: one.name }, one.title)));
  byId("preset").replaceChildren(...choices.presets.map((one) => el("option", { value: one.name }, one.name)));
  byId("files").append(...choices.files.map((name) => el("option", { value: name }, name)));
  byId("files").value = draft.file;
  byId("preset").value = "dreambooth_sd35_medium";
  const help = () => {
    const chosen = choices.presets.find((one) => one.name === byId("preset").value);
    byId("preset-help").textContent = chosen?.description ?? "";
    byId("base-help").textContent = choices.bases.find((one) => one.name === byId("base").value)?.description ?? "";
  };
  for (const id of ["preset", "base"]) byId(id).addEventListener("change", help);
  byId("base").addEventListener("change", () => showFolder({ unlessShown: true }).catch((error) => notice(error.message, true)));
  help();
  byId("files").addEventListener("change", () => (location.href = byId("files").value
    ? `/new?file=${encodeURIComponent(byId("files").value)}` : "/new"));
}

async function create(event) {
  event.preventDefault();
  await acting(event.submitter, async () => {
    const chosen = { name: byId("name").value.trim(), preset: byId("preset").value, base: byId("base").value,
      photos: byId("folder").value.trim(), caption: byId("caption").value.trim() };
    if (!chosen.photos) throw new Error("Name the folder of the photos first, or drop some.");
    draft.file = (await post("/api/new/create", chosen)).file;
    await open();
    byId("launch").scrollIntoView({ behavior: "smooth" });
  });
}

// Settings

async function open() {
  schema ??= await get("/api/new/schema");
  const read = await get("/api/new/file", { file: draft.file });
  draft.text = read.text;
  draft.digest = read.digest;
  byId("yaml").value = read.text;
  byId("file-name").textContent = draft.file;
  for (const id of ["settings", "launch"]) byId(id).hidden = false;
  byId("create").hidden = true;
  showChecked(read);
  if (read.photos && !byId("folder").value) byId("folder").value = read.photos;
  if (![...byId("files").options].some((one) => one.value === draft.file)) byId("files").append(el("option", { value: draft.file }, draft.file));
  byId("files").value = draft.file;
  keepAddress();
  await showFolder();
  look();
}

function showChecked(checked) {
  draft.checked = checked;
  if (checked.values) showForm(checked.values);
  const lines = draft.text.split("\n");
  const wrong = new Set(checked.problems.map((one) => one.line));
  byId("lines").replaceChildren(...lines.map((_, number) => el("span", { class: wrong.has(number + 1) ? "wrong" : "" },
    `${number + 1}\n`)));
  byId("problems").replaceChildren(...checked.problems.map((one) => el("li", {},
    el("button", { type: "button", class: "quiet problem", onclick: () => goTo(one.line) },
      `${one.line ? `line ${one.line}: ` : ""}${one.key ? `${one.key}: ` : ""}${one.text}`))),
    ...(checked.notes ?? []).map((line) => el("li", { class: "soft small" }, line)));
  for (const control of document.querySelectorAll("#form [aria-invalid]")) control.removeAttribute("aria-invalid");
  const wrongKeys = new Set(checked.problems.map((one) => one.key));
  for (const [control, path] of draft.form?.paths ?? []) {
    if (wrongKeys.has(path.join("."))) control.setAttribute("aria-invalid", "true");
  }
  const ready = checked.problems.length === 0;
  for (const id of ["plan", "examine"]) byId(id).disabled = !ready;
  byId("saved").textContent = ready ? "" : "not saved: see the problems below the YAML";
  byId("ready").textContent = ready ? "The settings below can stay as they are." : "";
  if (look) look();
}

function goTo(line) {
  const box = byId("yaml");
  const before = draft.text.split("\n").slice(0, Math.max(0, (line ?? 1) - 1)).join("\n").length;
  box.focus();
  box.setSelectionRange(before + (line > 1 ? 1 : 0), before + (line > 1 ? 1 : 0));
}

function showForm(values) {
  if (draft.form?.update(values)) return;
  const opened = [...document.querySelectorAll("#form details[open]")].map((one) => one.dataset.key);
  const focused = [...(draft.form?.controls ?? [])].find(([, control]) => control === document.activeElement)?.[0];
  const made = makeForm(schema, values, change);
  draft.form = made;
  byId("form").replaceChildren(made.element);
  for (let more = true; more;) {
    const closed = [...made.element.querySelectorAll("details:not([open])")].filter((one) => opened.includes(one.dataset.key));
    closed.forEach((one) => (one.fillNow ? one.fillNow() : (one.open = true)));
    more = closed.length > 0;
  }
  if (byId("find").value) findSettings(made.element, byId("find").value);
  if (focused) made.controls.get(focused)?.focus();
}

let working = Promise.resolve();

/** Changes are made one after the other, each on the text that the one before has left. */
function inTurn(action) {
  working = working.then(action).catch((error) => notice(error.message, true));
  return working;
}

function change(path, written) {
  return inTurn(async () => {
    const edited = await post("/api/new/edit", { file: draft.file, text: draft.text, path, ...written });
    draft.text = byId("yaml").value = edited.text;
    showChecked(edited);
    await save();
  });
}

async function save() {
  if (draft.checked.problems.length) return;
  draft.digest = (await post("/api/new/save", { file: draft.file, text: draft.text, former: draft.digest })).digest;
  byId("saved").textContent = "saved";
  await showFolder({ unlessShown: true });
}

function listenForSettings() {
  const box = byId("yaml");
  let timer;
  box.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => inTurn(async () => {
      draft.text = box.value;
      showChecked(await post("/api/new/check", { file: draft.file, text: draft.text }));
      await save();
    }), 400);
  });
  box.addEventListener("scroll", () => (byId("lines").scrollTop = box.scrollTop));
  byId("find").addEventListener("input", () => findSettings(byId("form"), byId("find").value));
}

// Check and start

function ask(id, path, title) {
  const button = byId(id);
  button.addEventListener("click", () => acting(button, async () => {
    const place = el("div", { class: "answer", id: `answer-${id}`, "aria-busy": "true" }, el("h3", {}, title),
      el("p", { class: "soft" }, "Loading PyTorch takes some seconds ..."));
    byId(`answer-${id}`)?.remove();
    byId("answers").append(place);
    const found = await post(path, { file: draft.file });
    place.removeAttribute("aria-busy");
    place.replaceChildren(el("h3", {}, title), commandLine(found.command), el("pre", { class: "log", tabindex: "0" },
      found.lines.map((line) => el("span", { class: kind(line) }, `${line}\n`))));
    if (id === "examine") place.append(el("p", { class: "soft" }, found.lines.some(kind) ? "Each line is also below its photo."
      : "All photos can be trained on."));
    showFaults(found.lines);
  }));
}

const kind = (line) => (line.startsWith("error: ") || line.startsWith("not trainable") ? "problem"
  : line.startsWith("warning: ") ? "warning" : "");

async function showState() {
  if (!draft.file) return;
  const now = await get("/api/new/state", { file: draft.file });
  const job = now.job;
  const active = job && ["queued", "running"].includes(job.state);
  const wrong = draft.checked.problems.length > 0;
  const start = button(now.begun ? "Resume" : "Start training", "primary", "/api/new/start", { file: draft.file, resume: now.begun });
  start.disabled = wrong;
  const link = (place, text) => el("a", { class: "button", href: `/${place}?run=${encodeURIComponent(now.run)}` }, text);
  put(byId("state"), commandLine(now.command),
    el("div", { class: "row" }, job || now.finished ? badge(now.finished ? "done" : job.state) : null,
      active ? button(job.state === "queued" ? "Take out of the queue" : "Stop", "", "/api/jobs/stop", { id: job.id })
        : now.finished ? null : start,
      job || now.begun ? link("watch", "Watch") : null,
      now.finished && !active ? [link("try", "Try it"), link("share", "Share it")] : null,
      job ? el("a", { href: `/jobs?open=${job.id}` }, "Log") : null),
    wrong && !active ? el("p", { class: "problem" }, "Correct the settings first: the problems are below the YAML.") : null,
    now.finished && !active ? el("p", { class: "soft small" }, "All steps are done. More train.steps train on from here.") : null);
}

function button(text, kind, path, value) {
  return el("button", { type: "button", class: kind, "data-path": path, "data-value": JSON.stringify(value) }, text);
}

byId("state").addEventListener("click", (event) => {
  const pressed = event.target.closest("button[data-path]");
  if (pressed) acting(pressed, async () => { await post(pressed.dataset.path, JSON.parse(pressed.dataset.value)); look(); });
});

let look;
listenForPhotos();
listenForSettings();
ask("plan", "/api/new/plan", "Plan");
ask("examine", "/api/new/examine", "Photos");
byId("create-form").addEventListener("submit", create);
look = repeatedly(showState, 2);
byId("folder").value = query.get("photos") ?? "";
await showChoices();
if (draft.file) open().catch((error) => notice(error.message, true));
else showFolder({ unlessShown: true }).catch((error) => notice(error.message, true));

// Share: a run's card, its push to the Hub, other tools' formats, and downloads.
import { followed, jobLine } from "./follow.js";
import { acting, address, byId, commandLine, el, get, notice, post, put, repeatedly } from "./page.js";

const MANY = 8;
let run = new URLSearchParams(location.search).get("run") ?? "";
let about = null;
let ended = "";

function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let value = count;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${value.toLocaleString("en", { maximumFractionDigits: value < 10 && unit ? 1 : 0 })} ${units[unit]}`;
}

const fileRow = (one, name) => el("tr", {}, el("td", {}, name ?? one.name), el("td", { class: "size" }, bytes(one.size)));

function words(text) {
  return text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}

async function show() {
  about = await get("/api/share", { run });
  byId("shared").hidden = false;
  byId("unfinished").hidden = about.finished;
  byId("card-file").textContent = `${about.run}/README.md`;
  byId("header").textContent = about.header;
  byId("header-row").hidden = !about.header;
  byId("no-card").hidden = about.card !== "";
  showCard(about.card);
  await showPush();
  showForms();
  showResults();
}

/** The server has rendered the card without raw HTML; it is parsed apart, and scripts never run. */
function showCard(html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  byId("card").replaceChildren(...parsed.body.childNodes);
}

async function showPush() {
  const { token, uploads } = about;
  put(byId("token"), words(token.text), token.link ? el("a", { href: token.link, target: "_blank", rel: "noopener noreferrer" }, " Make a token") : null);
  byId("token").className = token.ready ? "small soft" : "small warning";
  byId("repo").placeholder = about.repo_id || "user/name";
  byId("repo").required = !about.repo_id;
  byId("privacy").textContent = about.private ? "A new repository is private; hub.private: false makes it public." : "A new repository is public, as the configuration says.";
  const total = uploads.reduce((sum, one) => sum + one.size, 0);
  byId("up-sum").textContent = `${uploads.length} files, ${bytes(total)}`;
  byId("fault").textContent = about.fault ?? "";
  byId("fault").hidden = !about.fault;
  put(byId("uploads"), uploads.map((one) => fileRow(one)));
  byId("left-out").textContent = about.left_out.length ? `Not drawn by this run, so not uploaded: ${about.left_out.join(", ")}` : "";
  const pictures = uploads.filter((one) => one.name.endsWith(".png") && !one.name.endsWith("over_time.png"));
  const options = pictures.reverse().map((one) => el("option", { value: `${about.run}/${one.name}` }, one.name.split("/").at(-1)));
  byId("thumbnail").replaceChildren(el("option", { value: "" }, "none"), ...options);
  byId("thumbnail").closest(".field").hidden = about.weights[0]?.kind !== "adapter" || !pictures.length;
  return named();
}

const asked = () => ({ run, repo_id: byId("repo").value.trim(), thumbnail: byId("thumbnail").value });

/** The button says where the files go, and the command does the same. */
async function named() {
  const sent = asked();
  const target = sent.repo_id || about.repo_id;
  byId("push").textContent = target ? `Push to ${target}` : "Push";
  const { command, problems } = await post("/api/share/command", sent);
  if (JSON.stringify(sent) !== JSON.stringify(asked())) return;
  put(byId("push-command"), command ? commandLine(command) : problems.map((line) => el("p", { class: sent.repo_id ? "problem small" : "soft small" }, line)));
  byId("push").disabled = !command || !about.token.ready || !about.finished || Boolean(about.fault);
}

function showForms() {
  const adapters = about.weights.filter((one) => one.kind === "adapter");
  byId("convert").hidden = !adapters.length;
  byId("no-convert").hidden = adapters.length > 0;
  byId("why-not").textContent = {
    embedding: "An embedding is one file for all tools: in ComfyUI copy it to models/embeddings, and write embedding:NAME in the prompt.",
    model: "A whole model is a folder in diffusers' layout, which most tools load as it is.",
  }[about.weights[0]?.kind] ?? "There are no weights yet.";
  const chosen = byId("which").value;
  byId("which").replaceChildren(...adapters.map((one) => el("option", { value: one.path, selected: one.path === chosen }, one.label)));
  byId("which-row").hidden = adapters.length < 2;
}

function showResults() {
  const link = (one) => el("a", { href: address("/api/share/download", { run, name: one.name }), download: "" }, one.name);
  const pictures = about.results.filter((one) => one.name.endsWith(".png"));
  const others = about.results.filter((one) => !one.name.endsWith(".png"));
  const few = pictures.length > MANY ? pictures.filter((one) => one.name.endsWith("over_time.png")) : pictures;
  const [first] = others.filter((one) => one.name.endsWith(".safetensors"));
  put(byId("result"), first ? el("a", { class: "button primary", download: "",
    href: address("/api/share/download", { run, name: first.name }) }, `Download the ${about.weights[0]?.kind ?? "file"} (${bytes(first.size)})`) : null);
  put(byId("results"), [...others, ...few].map((one) => fileRow(one, link(one))));
}

byId("push-form").addEventListener("submit", (event) => {
  event.preventDefault();
  acting(byId("push"), async () => {
    await post("/api/share/push", asked());
    await look();
  });
});
for (const id of ["repo", "thumbnail"]) byId(id).addEventListener("input", () => named().catch((error) => notice(error.message, true)));
for (const button of document.querySelectorAll("[data-form]")) {
  button.addEventListener("click", () => acting(button, async () => {
    await post("/api/share/convert", { run, weights: byId("which").value, form: button.dataset.form });
    await look();
  }));
}
byId("runs").addEventListener("change", () => {
  run = byId("runs").value;
  history.replaceState(null, "", address("/share", { run }));
  byId("repo").value = "";
  show().catch((error) => notice(error.message, true));
});

let look = () => undefined;

async function begin() {
  const runs = (await get("/api/try/sources")).filter((one) => one.weights[0].label !== "file");
  run ||= runs[0]?.place ?? "";
  byId("nothing").hidden = Boolean(run);
  byId("runs").closest("label").hidden = !runs.length;
  if (!run) return;
  byId("runs").replaceChildren(...runs.map((one) => el("option", { value: one.place, selected: one.place === run }, one.name)));
  await show();
  look = repeatedly(async () => {
    const mine = (job) => / (hub push|lora convert) /.test(job.command) && job.command.includes(about.run);
    const jobs = await followed(mine);
    put(byId("work"), jobs.map((job) => jobLine(job, look, true)));
    const now = jobs.filter((job) => job.state === "done").map((job) => job.id).join();
    if (now !== ended) await show();
    ended = now;
  }, 2);
}
begin().catch((error) => notice(error.message, true));

// The rows of "Draw with": a run or a file, a slider over its checkpoints, and a slider for its weight.
import { byId, el } from "./page.js";

const OTHER = "\0other";
const FLAG = { adapter: "loras", embedding: "embeddings", model: "base" };

/** The newest weights of a source: the final ones, else its last checkpoint. */
export const newest = (source) => (source?.weights[0]?.step === null ? source.weights[0] : source?.weights.at(-1));

let sources = [];
let changed = () => {};
const rows = [];

/** Show the sources; `onchange` is called after each change of a row. */
export function start(found, onchange) {
  sources = found;
  changed = onchange;
  byId("nothing").hidden = sources.length > 0;
  byId("add").addEventListener("click", () => {
    add(newest(sources[0])?.path ?? "");
    changed();
  });
}

/** Replace the rows: [{place, weight, name}]; a place that is unknown becomes a text field. */
export function show(wanted) {
  rows.splice(0);
  byId("adapters").replaceChildren();
  for (const one of wanted) add(one.place ?? "", one.weight ?? 1, one.name);
}

/** What the rows say, as values of the form: lists of adapters and embeddings, and the base of a whole model. */
export function values() {
  const said = { loras: [], embeddings: [], base: "" };
  for (const row of rows) {
    const { kind, path, weight } = row.read();
    if (kind === "model") said.base = path;
    else said[FLAG[kind]].push(kind === "adapter" && weight !== 1 ? `${path}@${weight}` : path);
  }
  return said;
}

/** The settings in the first row's weights; empty if there are none. */
export const settings = () => rows[0]?.read().settings ?? {};

/** The checkpoints of the first row's run, as `infer` names them for an axis. */
export function checkpoints() {
  const { source, weight, kind } = rows[0]?.read() ?? {};
  const steps = source?.weights.filter((one) => one.step !== null && one.kind === "adapter") ?? [];
  if (kind !== "adapter" || steps.length < 2) return "";
  if (weight === 1) return steps[0].path.replace(/\/[^/]*$/, "");
  return steps.map((one) => `${one.path}@${weight}`).join(",");
}

/** Whether the first adapter belongs to this axis of checkpoints, so that it is not drawn with twice. */
export const isOnAxis = (axis) => checkpoints() !== "" && axis === checkpoints();

function add(path, weight = 1, name = "") {
  const row = makeRow(path, weight, name);
  rows.push(row);
  byId("adapters").append(row.element);
}

function choices(selected) {
  const option = (source, index) => el("option", { value: String(index), selected: source === selected }, source.name);
  const numbered = sources.map((source, index) => [source, index]);
  const runs = numbered.filter(([source]) => source.weights[0].label !== "file").map((one) => option(...one));
  const files = numbered.filter(([source]) => source.weights[0].label === "file").map((one) => option(...one));
  return [
    runs.length ? el("optgroup", { label: "Runs" }, runs) : null,
    files.length ? el("optgroup", { label: "Files" }, files) : null,
    el("option", { value: OTHER, selected: !selected }, "a path, or user/name on the Hub …"),
  ];
}

function makeRow(path, weight, name) {
  const found = sources.find((source) => source.weights.some((one) => one.path === path));
  const choice = el("select", { "aria-label": "Adapter" }, choices(found));
  const other = el("input", { value: found ? "" : path, placeholder: name || "runs/rex or user/name", spellcheck: "false",
    "aria-label": "Path or repository" });
  const which = el("input", { type: "range", min: "0", step: "1", "aria-label": "Checkpoint" });
  const label = el("output", { class: "soft small" });
  const slide = el("input", { type: "range", min: "-0.5", max: "1.5", step: "0.05", "aria-label": "Weight, slider" });
  const exact = el("input", { class: "short", inputmode: "decimal", "aria-label": "Weight" });
  const remove = el("button", { type: "button", class: "quiet", "aria-label": "Remove", title: "Remove" }, "×");
  const whichRow = el("label", { class: "slider" }, el("span", {}, "Checkpoint"), which, label);
  const weightRow = el("label", { class: "slider" }, el("span", {}, "Weight"), slide, exact);
  const element = el("div", { class: "adapter" }, el("div", { class: "joined" }, choice, remove), other, whichRow, weightRow);

  const source = () => sources[choice.value];
  // The slider goes through time: checkpoints from the oldest on, then the best and the final weights.
  const ordered = () => {
    const all = source()?.weights ?? [];
    return [...all.filter((one) => one.step !== null), ...all.filter((one) => one.step === null).reverse()];
  };
  const chosen = () => ordered()[which.value];
  function arrange(wanted) {
    const list = ordered();
    const index = list.findIndex((one) => one.path === wanted);
    which.max = String(Math.max(0, list.length - 1));
    which.value = String(index >= 0 ? index : list.length - 1);
    tell();
  }
  function tell() {
    const one = chosen();
    other.hidden = Boolean(source());
    whichRow.hidden = ordered().length < 2;
    label.textContent = one?.label ?? "";
    which.setAttribute("aria-valuetext", one?.label ?? "");
    weightRow.hidden = Boolean(one) && one.kind !== "adapter";
  }
  function read() {
    const one = chosen();
    const number = exact.value.trim() === "" ? 1 : Number(exact.value);
    return {
      source: source(), kind: one?.kind ?? "adapter", path: one?.path ?? other.value.trim(),
      weight: Number.isFinite(number) ? number : exact.value.trim(), settings: one?.settings ?? {},
    };
  }
  slide.value = exact.value = String(weight);
  choice.addEventListener("change", () => arrange(newest(source())?.path));
  which.addEventListener("input", tell);
  slide.addEventListener("input", () => (exact.value = slide.value));
  exact.addEventListener("input", () => (slide.value = exact.value || "1"));
  remove.addEventListener("click", () => {
    rows.splice(rows.indexOf(row), 1);
    element.remove();
    changed();
  });
  element.addEventListener("input", () => changed());
  element.addEventListener("change", () => changed());
  const row = { element, read };
  arrange(path);
  return row;
}

// A form made from the JSON Schema: one control for each key, with the sentences of the reference as help.
import { el } from "./page.js";

const FIRST = [
  ["train", "steps"], ["train", "batch_size"], ["data", "resolution"], ["optimizer", "lr"], ["method", "rank"],
  ["preview", "every"], ["preview", "prompts"], ["validation", "holdout"], ["checkpoint", "every"],
];
let definitions = {};

function resolved(node) {
  if (node?.$ref) return { ...definitions[node.$ref.split("/").pop()], ...without(node, "$ref") };
  return node ?? {};
}

function without(object, name) {
  const { [name]: _, ...rest } = object;
  return rest;
}

/** The alternatives of a node that are sections, and whether null is one of its values. */
function sections(node) {
  const all = (node.properties ? [node] : node.anyOf ?? node.oneOf ?? [node]).map(resolved);
  return { found: all.filter((one) => one.properties), nullable: all.some((one) => one.type === "null") };
}

const kindOf = (section) => section.properties.kind?.const ?? section.properties.kind?.enum?.[0]
  ?? section.properties.kind?.default;

const at = (values, path) => path.reduce((value, step) => value?.[step], values);
const areTexts = (value) => Array.isArray(value) && value.every((one) => typeof one === "string" && isPlain(one.trim()));
const shown = (value) => (value === null || value === undefined ? "" : areTexts(value) && value.length ? value.join("\n")
  : typeof value === "object" ? JSON.stringify(value) : String(value));
const title = (key) => String(key).replaceAll("_", " ");

/** Return the form. `change(path, {value} or {raw})` is called for each change. */
export function makeForm(schema, values, change) {
  definitions = schema.$defs;
  const form = { values, change, controls: new Map(), paths: new Map(), shapes: [], update: (now) => update(form, now) };
  const essentials = FIRST.map((path) => [path, nodeAt(schema, values, path)]).filter(([, node]) => node);
  const top = el("div", { class: "fields essentials" }, essentials.map(([path, node]) => field(form, path, node, path.join("."))));
  const skipped = new Set(["extends", "config_version"]);
  const keys = Object.keys(schema.properties).filter((key) => !skipped.has(key));
  const isSection = (key) => sections(resolved(schema.properties[key])).found.length > 0;
  const plain = el("div", { class: "fields" }, keys.filter((key) => !isSection(key))
    .map((key) => field(form, [key], resolved(schema.properties[key]))));
  const rest = keys.filter(isSection).map((key) => section(form, [key], resolved(schema.properties[key])));
  return Object.assign(form, { element: el("div", {}, top, general(plain), rest) });
}

/** Show other values in the same controls, except in the one that is being typed in. False if the sections differ. */
function update(form, values) {
  const shape = (of) => JSON.stringify(form.shapes.map((path) => {
    const value = at(of, path);
    return Array.isArray(value) ? value.length : value && (value.kind ?? true);
  }));
  if (shape(values) !== shape(form.values)) return false;
  form.values = values;
  for (const [control, path] of form.paths) {
    const value = at(values, path);
    if (control === document.activeElement) continue;
    if (control.type === "checkbox") control.checked = Boolean(value);
    else control.value = control.tagName === "SELECT" ? String(value) : shown(value);
  }
  return true;
}

const general = (plain) => el("details", { class: "section", "data-key": "general" }, el("summary", {}, "general"), plain);

/** The node of a key path, in the sections that the values chose; undefined if there is none. */
function nodeAt(schema, values, path) {
  let node = schema;
  let value = values;
  for (const step of path) {
    const { found } = sections(resolved(node));
    const chosen = found.find((one) => kindOf(one) === value?.kind) ?? found[0];
    node = chosen?.properties?.[step];
    value = value?.[step];
  }
  return node && resolved(node);
}

function section(form, path, node) {
  form.shapes.push(path);
  const { found, nullable } = sections(node);
  const value = at(form.values, path);
  const chosen = found.find((one) => kindOf(one) !== undefined && kindOf(one) === value?.kind) ?? found[0];
  const details = el("details", { class: "section", "data-key": path.join(".") },
    el("summary", {}, title(path.at(-1)), el("span", { class: "soft small" }, value?.kind ?? (value === null ? "off" : ""))),
    el("p", { class: "help" }, node.description ?? chosen.description ?? ""));
  let filled = false;
  const fill = () => {
    if (filled || !details.open) return;
    filled = true;
    details.append(inside(form, path, found, nullable, at(form.values, path), chosen));
  };
  details.addEventListener("toggle", fill);
  details.fillNow = () => { details.open = true; fill(); };
  return details;
}

function inside(form, path, found, nullable, value, chosen) {
  const rows = [];
  if (nullable) {
    rows.push(labelled(form, path, "use it", "", el("input", { type: "checkbox", checked: value !== null && value !== undefined,
      onchange: (event) => form.change(path, { value: event.target.checked ? {} : null }) })));
  }
  if (found.length > 1 && value) {
    rows.push(labelled(form, [...path, "kind"], "kind", chosen.description ?? "", select(found.map(kindOf), value.kind,
      (kind) => form.change(path, { value: shared(value, kind, found) }))));
  }
  for (const [key, node] of value ? Object.entries(chosen.properties) : []) {
    if (key === "kind") continue;
    const inner = resolved(node);
    rows.push(sections(inner).found.length ? section(form, [...path, key], inner)
      : inner.type === "array" && sections(resolved(inner.items ?? {})).found.length && key === "sources"
        ? entries(form, [...path, key], inner) : field(form, [...path, key], inner));
  }
  return el("div", { class: "fields" }, rows);
}

/** Keys that another kind has as well keep their values. */
function shared(value, kind, found) {
  const properties = found.find((one) => kindOf(one) === kind).properties;
  const kept = Object.entries(value).filter(([key, inner]) => key in properties && key !== "kind" && inner !== null);
  const same = kept.filter(([key, inner]) => JSON.stringify(properties[key].default) !== JSON.stringify(inner));
  return { kind, ...Object.fromEntries(same) };
}

function entries(form, path, node) {
  form.shapes.push(path);
  return el("div", {}, (at(form.values, path) ?? []).map((_, number) => section(form, [...path, number], resolved(node.items))));
}

function labelled(form, path, name, help, control) {
  form.controls.set(path.join("."), control);
  form.paths.set(control, path);
  const id = `f-${path.join("-")}-${form.controls.size}`;
  control.id = id;
  const text = el("span", { class: "help", id: `${id}-help` }, plainText(help));
  control.setAttribute("aria-describedby", `${id}-help`);
  const box = control.type === "checkbox";
  return el("div", { class: box ? "field check" : "field", "data-words": `${path.join(".")} ${help}`.toLowerCase() },
    box ? [control, el("label", { for: id }, name)] : [el("label", { for: id }, name), control], text);
}

/** Descriptions are Markdown with code in backticks. */
function plainText(help) {
  return help.split("`").map((part, number) => (number % 2 ? el("code", {}, part) : part));
}

function select(options, value, change) {
  const made = el("select", { onchange: () => change(made.value) }, options.map((one) => el("option", { value: one }, one)));
  made.value = value;
  return made;
}

function field(form, path, node, name = title(path.at(-1))) {
  const value = at(form.values, path);
  const types = (node.anyOf ?? [node]).map(resolved);
  const choices = types.flatMap((one) => one.enum ?? (one.const !== undefined ? [one.const] : []));
  const nullable = types.some((one) => one.type === "null");
  const help = node.description ?? "";
  if (types.some((one) => one.type === "boolean") && types.length === 1) {
    return labelled(form, path, name, help, el("input", { type: "checkbox", checked: Boolean(value),
      onchange: (event) => form.change(path, { value: event.target.checked }) }));
  }
  if (choices.length && types.every((one) => one.enum || one.const !== undefined || one.type === "null")) {
    const options = [...(nullable ? ["null"] : []), ...choices.map(String)];
    return labelled(form, path, name, help, select(options, value === null ? "null" : String(value),
      (chosen) => form.change(path, { raw: chosen })));
  }
  const isText = types.some((one) => one.type === "string") && !types.some((one) => ["array", "object"].includes(one.type));
  const isNumber = types.some((one) => ["integer", "number"].includes(one.type));
  const isTexts = types.some((one) => one.type === "array" && (resolved(one.items ?? {}).anyOf ?? [resolved(one.items ?? {})])
    .some((item) => resolved(item).type === "string"));
  const control = el(!isText && !isNumber ? "textarea" : "input", {
    autocomplete: "off", spellcheck: "false", placeholder: shown(node.default) || (nullable ? "null" : ""),
    inputmode: isNumber && !isText ? "decimal" : false, rows: !isText && !isNumber ? "2" : false,
    onchange: () => form.change(path, isTexts && isPlain(control.value.trim()) ? { value: linesOf(control.value, types) }
      : written(control.value.trim(), isText && !isNumber, nullable)),
  });
  control.value = shown(value);
  return labelled(form, path, name, help, control);
}

/** A list of texts is written as one text a line; where a single text will do, one line is that text. */
function linesOf(text, types) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return lines.length === 1 && types.some((one) => one.type === "string") ? lines[0] : lines;
}

/** Text that is no list, section or null of YAML. */
const isPlain = (text) => text !== "" && text !== "null" && !"[{".includes(text[0]);

/** A text is a value; numbers and lists are sent as they are typed, so that 1e-4 stays 1e-4. */
function written(text, isText, nullable) {
  if (text === "" && nullable) return { value: null };
  return isText ? { value: text } : { raw: text || "null" };
}

/** Show only the fields that have a word; all of them without one. */
export function findSettings(element, word) {
  const wanted = word.trim().toLowerCase();
  if (wanted) for (let open = true; open;) open = openAll(element);
  for (const field of element.querySelectorAll(".field")) field.hidden = wanted !== "" && !field.dataset.words.includes(wanted);
  for (const section of element.querySelectorAll(".section")) {
    section.hidden = wanted !== "" && !section.querySelector(".field:not([hidden])");
    if (!wanted) section.open = false;
  }
}

function openAll(element) {
  const closed = [...element.querySelectorAll("details.section")].filter((one) => one.fillNow && !one.open);
  closed.forEach((one) => one.fillNow());
  return closed.length > 0;
}

// One picture in full, with its recipe, and the ways to draw it again.
import { acting, address, byId, commandLine, el, get } from "./page.js";

const dialog = byId("viewer");
let shown = [];
let current = -1;
let about = null;

/** Wire the buttons; `again(recipe)` fills the form, `startFrom(path)` sets the start picture. */
export function start({ again, startFrom }) {
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  byId("again").addEventListener("click", () => {
    dialog.close();
    again(about);
  });
  byId("start-from").addEventListener("click", () => {
    dialog.close();
    startFrom(shown[current].path);
  });
}

/** Open the picture of a path; the arrows go through `pictures`. */
export function open(path, pictures) {
  shown = pictures.some((one) => one.path === path) ? pictures : [{ path, changed: "0" }];
  current = shown.findIndex((one) => one.path === path);
  dialog.showModal();
  return fill();
}

function step(by) {
  current = Math.min(Math.max(current + by, 0), shown.length - 1);
  fill();
}

function fill() {
  const { path, changed } = shown[current];
  const source = address("/api/picture", { path, t: changed });
  byId("viewer-name").textContent = nameOf(path);
  byId("viewer-picture").src = source;
  byId("viewer-picture").alt = nameOf(path);
  byId("download").href = source;
  byId("download").setAttribute("download", path.split("/").at(-1));
  byId("previous").disabled = current === 0;
  byId("next").disabled = current === shown.length - 1;
  return acting(byId("again"), () => tell(path)).then(() => (byId("again").disabled = !about?.values));
}

async function tell(path) {
  about = null;
  const found = await get("/api/try/recipe", { path });
  if (path !== shown[current].path) return;
  about = found;
  byId("viewer-note").textContent = found.note;
  byId("viewer-command").replaceChildren(...(found.command ? [commandLine(found.command)] : []));
  byId("viewer-recipe").replaceChildren(
    ...found.says.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

export const nameOf = (path) => path.split("/").at(-1).replace(/\.png$/, "");

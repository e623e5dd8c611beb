// What all pages share: requests, elements, notices, and looking again while the page is visible.

/** Make an element: el("button", {class: "primary", onclick: go}, "Go"). Text is never read as HTML. */
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** An address with a query. */
export function address(path, query) {
  return query ? `${path}?${new URLSearchParams(query)}` : path;
}

/** Return the JSON of an address. Throws an Error with `problems`, lines to show. */
export async function get(path, query) {
  return answered(await fetch(address(path, query), { headers: { accept: "application/json" } }));
}

/** Post a value as JSON, or a file as it is. Throws as `get` does. */
export async function post(path, value, query) {
  const isFile = value instanceof Blob;
  const body = isFile ? value : JSON.stringify(value ?? {});
  const headers = { "content-type": isFile ? "application/octet-stream" : "application/json" };
  return answered(await fetch(address(path, query), { method: "POST", headers, body }));
}

async function answered(response) {
  if (response.ok) return response.json();
  const text = await response.text();
  let problems = [text.trim() || `${response.status} ${response.statusText}`];
  try {
    const value = JSON.parse(text);
    problems = value.problems ?? [value.detail ?? text];
  } catch {
    // no JSON: the text is the problem
  }
  throw Object.assign(new Error(problems.join("\n")), { problems, status: response.status });
}

/** Show a line at the bottom for some seconds; problems stay until they are clicked away. */
export function notice(text, isProblem = false) {
  const line = el("p", { class: isProblem ? "notice problem" : "notice" }, text);
  const close = el("button", { class: "quiet", "aria-label": "Dismiss", onclick: () => line.remove() }, "×");
  line.append(close);
  byId("notices").append(line);
  if (!isProblem) setTimeout(() => line.remove(), 5000);
}

/** Run an action of a button; it is disabled meanwhile, and problems become notices. */
export async function acting(button, action) {
  button.disabled = true;
  try {
    return await action();
  } catch (error) {
    notice(error.message, true);
    return undefined;
  } finally {
    button.disabled = false;
  }
}

/** Call `look` now and every `seconds`, never twice at once, and not while the page is hidden. */
export function repeatedly(look, seconds) {
  let timer;
  let lost = false;
  async function again() {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        await look();
        if (lost) notice("The page's server is back.");
        lost = false;
      } catch (error) {
        const gone = error instanceof TypeError; // of fetch: nobody answers
        if (gone && !lost) notice("The page's server does not answer. Commands go on; start `sd3tune ui` again.", true);
        if (!gone && !lost) notice(error.message, true);
        lost = true;
      }
    }
    timer = setTimeout(again, 1000 * seconds);
  }
  document.addEventListener("visibilitychange", () => document.hidden || again());
  again();
  return again;
}

/** A command line with a button that copies it. */
export function commandLine(text) {
  const copy = el("button", { class: "quiet", type: "button", onclick: () => copied(text, copy) }, "Copy");
  return el("div", { class: "command" }, el("code", {}, text), copy);
}

async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

export const STATES = {
  queued: "waiting", running: "running", done: "done", finished: "done", stopped: "stopped", failed: "failed",
};

/** A word for a state, with its colour. */
export const badge = (state) => el("span", { class: `badge ${state}` }, STATES[state] ?? state);

/** Replace the children of an element only if they differ, so that focus and selection stay. */
export function put(target, ...children) {
  const made = el("div", {}, ...children);
  if (made.innerHTML !== target.dataset.shown) {
    target.dataset.shown = made.innerHTML;
    target.replaceChildren(...made.childNodes);
  }
  target.removeAttribute("aria-busy");
}

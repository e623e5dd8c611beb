// The queue: its jobs, the log of the opened ones, and the buttons to stop, resume and remove.
import { acting, badge, byId, commandLine, el, get, post, put, repeatedly } from "./page.js";

const opened = new Set(new URLSearchParams(location.search).getAll("open"));
const logs = new Map();

function button(text, path, job, kind = "") {
  const made = el("button", { type: "button", class: kind, onclick: () => acting(made, act) }, text);
  async function act() {
    await post(`/api/jobs/${path}`, { id: job.id });
    look();
  }
  return made;
}

function buttons(job) {
  if (job.state === "running") return [button("Stop", "stop", job)];
  if (job.state === "queued") return [button("Take out of the queue", "stop", job)];
  const again = job.command.includes(" train ") && job.state !== "done" ? "Resume" : "Run again";
  return [button(again, "again", job, job.state === "done" ? "" : "primary"), button("Remove", "remove", job, "quiet")];
}

function row(job) {
  const details = el("details", { open: opened.has(job.id), "data-id": job.id },
    el("summary", {}, badge(job.state), el("strong", {}, job.title)),
    commandLine(job.command),
    job.run ? el("p", {}, el("a", { href: `/watch?run=${encodeURIComponent(job.run)}` }, "Watch this run")) : null,
    el("pre", { class: "log", tabindex: "0", "aria-label": `Log of ${job.title}` }, logs.get(job.id) ?? ""),
    el("div", { class: "row" }, buttons(job)));
  details.addEventListener("toggle", () => {
    const change = details.open !== opened.has(job.id);
    if (details.open) opened.add(job.id);
    else opened.delete(job.id);
    if (change) look();
  });
  return el("li", {}, details);
}

async function jobsWithLogs() {
  const jobs = await get("/api/jobs");
  for (const job of jobs.filter((one) => opened.has(one.id) || one.state === "running")) {
    if (!opened.has(job.id)) continue;
    logs.set(job.id, (await get("/api/jobs/log", { id: job.id })).log);
  }
  return jobs;
}

async function showJobs() {
  const jobs = await jobsWithLogs();
  const empty = byId("no-jobs").content.cloneNode(true);
  put(byId("jobs"), jobs.length ? el("ul", { class: "jobs" }, jobs.map(row)) : empty);
}

const look = repeatedly(showJobs, 2);

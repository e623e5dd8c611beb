// The jobs that a page has started: their state, progress, faults and results, each with a way to stop it.
import { acting, badge, commandLine, el, get, post } from "./page.js";

const LIVING = ["queued", "running"];
const RECENT = 3;

/** The living jobs that `isMine` accepts, newest first, and the few newest ended ones, each with its log. */
export async function followed(isMine) {
  const jobs = await get("/api/jobs");
  const mine = jobs.filter(isMine);
  const ended = mine.filter((job) => !LIVING.includes(job.state)).slice(0, RECENT);
  const shown = mine.filter((job) => LIVING.includes(job.state) || ended.includes(job));
  const ahead = jobs.find((job) => job.queued && job.state === "running");
  return Promise.all(shown.map(async (job) => {
    const { log } = job.state === "queued" ? { log: "" } : await get("/api/jobs/log", { id: job.id });
    return { ...job, log, waitsFor: job.state === "queued" && job.queued ? ahead?.title : null };
  }));
}

/** A line about a job: what it does now, its results, or why it failed; `withCommand` prints its command, too. */
export function jobLine(job, look, withCommand = false) {
  const stop = el("button", { type: "button", class: "quiet", onclick: () => acting(stop, end) }, "Stop");
  const dismiss = el("button", { type: "button", class: "quiet", onclick: () => acting(dismiss, remove) }, "Dismiss");
  async function remove() {
    await post("/api/jobs/remove", { id: job.id });
    look();
  }
  async function end() {
    await post("/api/jobs/stop", { id: job.id });
    look();
  }
  const lines = job.log.split("\n").map((line) => line.trim()).filter(Boolean);
  return el("div", { class: `job ${job.state}`, "data-job": job.id },
    el("div", { class: "row" },
      badge(job.state),
      el("span", { class: "job-title" }, job.title),
      LIVING.includes(job.state) ? stop : job.state === "failed" ? dismiss : null,
      el("a", { class: "small", href: `/jobs?open=${encodeURIComponent(job.id)}` }, "Log")),
    withCommand ? commandLine(job.command) : null,
    said(job, lines));
}

function said(job, lines) {
  if (job.waitsFor) return el("p", { class: "soft small" }, `Waits for: ${job.waitsFor}`);
  if (job.state === "failed") {
    const faults = lines.filter((line) => line.startsWith("error: "));
    const shown = faults.length ? faults : lines.slice(-3);
    return shown.map((line) => el("p", { class: "problem small" }, line.replace(/^error: /, "")));
  }
  if (job.state !== "running") return lines.filter((line) => /^(warning|note|uploaded)\b/.test(line))
    .map((line) => el("p", { class: line.startsWith("warning") ? "warning small" : "soft small" }, line));
  const share = lines.at(-1)?.match(/(\d+)%/)?.[1];
  return [
    el("progress", share ? { max: "100", value: share, "aria-label": "Progress" } : { "aria-label": "Progress" }),
    el("p", { class: "soft small mono" }, lines.at(-1) ?? "loading …"),
  ];
}

// Previews over time: a slider with the base beside the adapter, and a gallery that decodes only what is in sight.
import { address, byId, el } from "./page.js";

let shown = "";

const picture = (run, one, side) => address("/api/run/small", { run, name: `samples/${one.name}`, side, v: one.changed });
const whole = (run, one) => address("/api/run/picture", { run, name: `samples/${one.name}`, v: one.changed });

/** Show the previews of a run; the slider stays where it is, or at its end if it was there. */
export function showPreviews(run, { pictures, prompts }) {
  const now = JSON.stringify(pictures);
  if (now === shown) return;
  shown = now;
  const steps = [...new Set(pictures.filter((one) => one.step !== null).map((one) => one.step))];
  byId("previews").hidden = pictures.length === 0;
  const slider = byId("step");
  const atEnd = slider.value === slider.max;
  slider.max = Math.max(0, steps.length - 1);
  if (atEnd) slider.value = slider.max;
  slider.disabled = steps.length < 2;
  const look = () => showStep(run, pictures, prompts, steps[slider.value]);
  slider.oninput = look;
  look();
  const every = byId("every");
  const fill = () => every.open && fillGallery(run, pictures, prompts);
  every.ontoggle = fill;
  every.hidden = steps.length < 2;
  fill();
}

function showStep(run, pictures, prompts, step) {
  byId("at-step").textContent = step === undefined ? "" : `step ${step}`;
  byId("step").setAttribute("aria-valuetext", `step ${step ?? 0}`);
  const numbers = [...new Set(pictures.map((one) => one.number))].sort((a, b) => a - b);
  const pairs = numbers.map((number) => {
    const find = (wanted) => pictures.find((one) => one.number === number && one.step === wanted);
    return { prompt: prompts[number] ?? "", base: find(null), now: find(step) };
  });
  const place = byId("pairs");
  while (place.children.length > pairs.length) place.lastChild.remove();
  pairs.forEach((pair, number) => {
    place.children[number] ?? place.append(el("figure", { class: "pair" }, side("base"), side("adapter"), el("figcaption", {})));
    const made = place.children[number];
    set(made.children[0], run, pair.base, `${pair.prompt}, by the base`);
    set(made.children[1], run, pair.now, `${pair.prompt}, at step ${step}`);
    made.children[2].textContent = pair.prompt;
  });
}

const side = (name) => el("a", { target: "_blank" }, el("img", { alt: "", decoding: "async" }), el("span", {}, name));

function set(link, run, one, text) {
  link.hidden = !one;
  if (!one) return;
  link.href = whole(run, one);
  const image = link.firstChild;
  const source = picture(run, one, 384);
  if (image.getAttribute("src") !== source) image.src = source;
  image.alt = text;
}

const LEAST = 24; // pictures beyond the edges of the window

/** One light box per picture; the images themselves exist only near the window, so thousands of boxes scroll smoothly. */
function fillGallery(run, pictures, prompts) {
  const list = byId("gallery");
  const known = new Map([...list.children].map((item) => [item.dataset.name, item]));
  const items = pictures.map((one) => {
    const item = known.get(one.name) ?? el("li", { "data-name": one.name },
      el("span", {}, one.step === null ? "base" : `${one.step}`));
    item.picture = { source: picture(run, one, 192), href: whole(run, one), text: `${prompts[one.number] ?? ""}, step ${one.step ?? "base"}` };
    return item;
  });
  list.replaceChildren(...items);
  watcher.disconnect();
  items.forEach((item) => watcher.observe(item));
}

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const link = target.querySelector("a");
    if (isIntersecting && !link) {
      const { source, href, text } = target.picture;
      target.prepend(el("a", { href, target: "_blank" }, el("img", { src: source, alt: text, decoding: "async" })));
    } else if (!isIntersecting && link) {
      link.remove();
    }
  }
}, { rootMargin: `${LEAST * 25}px 0px` });

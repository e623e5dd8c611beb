// The grid of photos: crop boxes, masks, faults, and captions that are saved beside the photos.
import { acting, address, byId, el, get, notice, post } from "./page.js";

const thumbnail = (path, changed, side = 384) => address("/api/small", { path, side, v: changed });

/** Show the photos of a folder; `changed` is called when one was removed. Returns their number. */
export async function showPhotos(folder, resolution, caption, changed) {
  const found = await get("/api/photos", { folder, resolution, caption });
  byId("photos").replaceChildren(...found.photos.map((photo) => item(photo, caption, changed)));
  const lines = [...found.problems.map((line) => ["problem", line]), ...found.warnings.map((line) => ["warning", line])];
  byId("photos-lines").replaceChildren(...lines.map(([kind, line]) => el("p", { class: `${kind} small` }, line)));
  const faulty = found.photos.filter((photo) => photo.faults.length).length;
  const masks = found.photos.filter((photo) => photo.mask).length;
  byId("photos-summary").textContent = [
    `${found.photos.length} photo${found.photos.length === 1 ? "" : "s"}`,
    masks ? `${masks} with a mask` : "",
    faulty ? `${faulty} to look at` : "",
  ].filter(Boolean).join(", ");
  return found.photos.length;
}

/** Show what a command says about single photos below each that it names. */
export function showFaults(lines) {
  for (const old of document.querySelectorAll(".photo .said")) old.remove();
  const faults = lines.filter((line) => /^(warning|error): /.test(line));
  for (const place of byId("photos").children) {
    const named = faults.filter((line) => line.split(/[ ,:()]+/).some((word) => word.split("/").pop() === place.dataset.name));
    place.lastChild.append(...named.map((line) => el("p", { class: "said warning small" }, line.replace(/^\w+: /, ""))));
  }
}

function item(photo, caption, changed) {
  return el("li", { class: "photo", "data-name": photo.name },
    el("div", { class: "frame" }, fitted(photo),
      photo.mask ? el("img", { class: "mask", src: thumbnail(photo.mask, photo.changed), alt: `Mask of ${photo.name}`,
        loading: "lazy" }) : null),
    el("div", { class: "about" },
      el("div", { class: "spread" }, el("strong", { class: "name", title: photo.name }, photo.name),
        photo.size ? el("span", { class: "soft small" }, `${photo.size} → ${photo.bucket}`) : null,
        removeButton(photo, changed)),
      captionBox(photo, caption),
      photo.faults.map((fault) => el("p", { class: "warning small" }, fault))));
}

function removeButton(photo, changed) {
  const button = el("button", { type: "button", class: "quiet", "aria-label": `Remove ${photo.name}`, title: "Remove from the folder" }, "×");
  button.addEventListener("click", () => acting(button, async () => {
    const { folder } = await post("/api/photos/remove", { path: photo.path });
    notice(`${photo.name} is now in ${folder}`);
    await changed();
  }));
  return button;
}

/** The photo in a box of its shape, with the crop that training sees. */
function fitted(photo) {
  if (!photo.crop) return null;
  const [width, height] = photo.size.split("x").map(Number);
  const [wide, high] = photo.crop;
  const crop = wide * high < 0.999 ? el("span", { class: "crop", title: `Trained at ${photo.bucket}` }) : null;
  if (crop) Object.assign(crop.style, { width: `${100 * wide}%`, height: `${100 * high}%` });
  const box = el("div", { class: "fit" },
    el("img", { src: thumbnail(photo.path, photo.changed), alt: photo.name, loading: "lazy", decoding: "async" }), crop);
  Object.assign(box.style, { width: `${100 * Math.min(1, width / height)}%`, height: `${100 * Math.min(1, height / width)}%` });
  return box;
}

function captionBox(photo, caption) {
  let former = photo.caption;
  const box = el("textarea", {
    rows: "2", "aria-label": `Caption of ${photo.name}`, placeholder: caption || "no caption", readOnly: !photo.editable,
    title: photo.editable ? "" : "From the folder's metadata file",
  });
  box.value = former;
  box.addEventListener("change", () => acting(box, async () => {
    const saved = await post("/api/photos/caption", { path: photo.path, text: box.value, former });
    former = box.value = saved.text;
    box.classList.add("saved");
    setTimeout(() => box.classList.remove("saved"), 1200);
    notice(`The caption of ${photo.name} is saved.`);
  }));
  return box;
}

/** Copy dropped or chosen files into a folder, one after the other; returns how many arrived. */
export async function sendPhotos(files, folder, progress) {
  let sent = 0;
  const faults = new Set();
  for (const file of files) {
    progress(`Copying ${sent + 1} of ${files.length}: ${file.name}`);
    try {
      await post("/api/photos/upload", file, { folder, name: file.name });
      sent += 1;
    } catch (error) {
      faults.add(error.message);
    }
  }
  for (const fault of faults) notice(fault, true);
  return sent;
}

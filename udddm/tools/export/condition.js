"use strict";
// The conditioning image of a model with `data.condition`: an example of the page, or a file of the user. It is
// { values: Float32Array [C, h, w] in [-1, 1], mask: Float32Array [height, width], 1 in hidden pixels, or null }.
const HIDDEN = [96, 128, 224]; // the color of hidden pixels, which few images have
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

function exampleImage(index) {
  const { image, mask } = told.condition.examples[index];
  const values = Float32Array.from(bytes(image), (value) => value / 127.5 - 1);
  return { values, mask: told.condition.hides ? Float32Array.from(bytes(mask)) : null };
}

function rectangle(x0, y0, x1, y1) {
  const mask = new Float32Array(height * width);
  for (let y = y0; y < y1; y++) mask.fill(1, y * width + x0, y * width + x1);
  return mask;
}

// The central part of the file in the proportions of the model, resized, with transparent parts on white.
async function fileImage(file) {
  const [c, h, w] = told.condition.shape;
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const scale = Math.min(bitmap.width / w, bitmap.height / h);
  const canvas = element("canvas", { width: w, height: h });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, w, h);
  context.imageSmoothingQuality = "high";
  const [left, top] = [(bitmap.width - scale * w) / 2, (bitmap.height - scale * h) / 2];
  context.drawImage(bitmap, left, top, scale * w, scale * h, 0, 0, w, h);
  const { data } = context.getImageData(0, 0, w, h);
  const values = new Float32Array(c * h * w);
  for (let at = 0; at < h * w; at++) {
    const rgb = [data[4 * at], data[4 * at + 1], data[4 * at + 2]];
    if (c === 3) rgb.forEach((value, i) => { values[i * h * w + at] = value / 127.5 - 1; });
    else values[at] = ((19595 * rgb[0] + 38470 * rgb[1] + 7471 * rgb[2] + 0x8000) >> 16) / 127.5 - 1; // as Pillow's L
  }
  const [x, y] = [Math.floor(width / 4), Math.floor(height / 4)];
  return { values, mask: told.condition.hides ? rectangle(x, y, width - x, height - y) : null };
}

function repeated(ort, values, shape, count) {
  const all = new Float32Array(count * values.length);
  for (let i = 0; i < count; i++) all.set(values, i * values.length);
  return new ort.Tensor("float32", all, [count, ...shape]);
}

function preview(canvas, given) {
  const [c, h, w] = told.condition.shape;
  Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  const tile = context.createImageData(w, h);
  for (let at = 0; at < h * w; at++) {
    const hidden = given.mask && given.mask[at] > 0.5;
    for (let i = 0; i < 3; i++) {
      tile.data[4 * at + i] = hidden ? HIDDEN[i] : Math.round((given.values[(c === 3 ? i : 0) * h * w + at] + 1) * 127.5);
    }
    tile.data[4 * at + 3] = 255;
  }
  context.putImageData(tile, 0, 0);
}

// A picker of the image: the examples of the page, and a file. `changed` is called with each choice.
function picker(changed) {
  const { examples, hides } = told.condition;
  const options = examples.map((_, i) => element("option", { value: i, textContent: `example ${i + 1}` }));
  const select = element("select", { name: "example" }, ...options, element("option", { value: "file", textContent: "your image" }));
  const file = element("input", { type: "file", accept: "image/*", name: "file" });
  const canvas = element("canvas", { className: "given" });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "conditioning image");
  const picked = { given: null };
  const set = (given) => {
    picked.given = given;
    canvas.hidden = !given;
    if (given) preview(canvas, given);
    changed(given);
  };
  const choose = async () => {
    if (select.value !== "file") return set(exampleImage(Number(select.value)));
    if (!file.files.length) return set(null);
    try {
      set(await fileImage(file.files[0]));
    } catch {
      set(null);
      changed(null, `${file.files[0].name} is not an image that this browser reads`);
    }
  };
  select.addEventListener("change", choose);
  file.addEventListener("change", () => { select.value = "file"; choose(); });
  let start = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const inside = (part, most) => Math.max(0, Math.min(most - 1, Math.floor(part * most)));
    return [inside((event.clientX - box.left) / box.width, width), inside((event.clientY - box.top) / box.height, height)];
  };
  const drag = (event) => {
    if (!start || !picked.given) return;
    const [x, y] = place(event);
    const mask = rectangle(Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]) + 1, Math.max(y, start[1]) + 1);
    set({ ...picked.given, mask });
  };
  if (hides) {
    canvas.addEventListener("pointerdown", (event) => { start = place(event); drag(event); });
    canvas.addEventListener("pointermove", drag);
    addEventListener("pointerup", () => { start = null; });
  }
  return { select, file, canvas, picked, choose };
}

"use strict";
// Draws images with the ONNX file, from the same noise as `udddm sample`: each image is a function of its seed and label.
const told = JSON.parse(document.getElementById("data").textContent);
const [channels, height, width] = told.shape;
const pixels = channels * height * width;
const BATCH = 16;

// udddm/rng.py: splitmix64 keys, and normal numbers by the Box-Muller transform
const GOLDEN = 0x9e3779b97f4a7c15n, PART = 0xd1b54a32d192ed03n, MIX1 = 0xbf58476d1ce4e5b9n, MIX2 = 0x94d049bb133111ebn;
const NOISE = 11n, CONDITION = 12n;
const low = (z) => BigInt.asUintN(64, z);

function splitmix64(z) {
  z = low((z ^ (z >> 30n)) * MIX1);
  z = low((z ^ (z >> 27n)) * MIX2);
  return z ^ (z >> 31n);
}

function key(stream, seed) {
  const z = splitmix64(low(GOLDEN * stream));
  return splitmix64(low((z ^ splitmix64(low(BigInt(seed) + PART))) + GOLDEN));
}

function normal(key, into) {
  const pairs = Math.ceil(into.length / 2);
  for (let i = 0; i < pairs; i++) {
    const z = splitmix64(low(key + BigInt(i) * GOLDEN));
    const radius = Math.sqrt(-2 * Math.log((Number(z >> 32n) + 0.5) * 2 ** -32));
    const angle = Number(z & 0xffffffffn) * 2 * Math.PI * 2 ** -32;
    into[i] = radius * Math.cos(angle);
    if (pairs + i < into.length) into[pairs + i] = radius * Math.sin(angle);
  }
}

function noise(ort, stream, seeds) {
  const values = new Float32Array(seeds.length * pixels);
  seeds.forEach((seed, i) => normal(key(stream, seed), values.subarray(i * pixels, (i + 1) * pixels)));
  return new ort.Tensor("float32", values, [seeds.length, ...told.shape]);
}

async function fetched(asset) {
  const answer = await fetch(asset.url, { integrity: asset.integrity, credentials: "omit" });
  if (!answer.ok) throw new Error(`${asset.url}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function load() {
  const [script, binary] = await Promise.all([fetched(told.script), fetched(told.binary)]);
  const source = new Blob([await script.arrayBuffer()], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(source));
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  ort.env.wasm.numThreads = 1; // several need headers that a simple server does not send
  const session = await ort.InferenceSession.create(told.model, { executionProviders: ["wasm"] });
  return { ort, session };
}

async function images({ ort, session }, seeds, labels, chosen) {
  const values = new Float32Array(seeds.length * pixels);
  for (let start = 0; start < seeds.length; start += BATCH) {
    const some = seeds.slice(start, start + BATCH);
    const given = { noise: noise(ort, NOISE, some) };
    if (chosen) given.condition = repeated(ort, chosen.values, told.condition.shape, some.length);
    else if (told.conditioned) given.condition = noise(ort, CONDITION, some);
    if (chosen && chosen.mask) given.mask = repeated(ort, chosen.mask, [1, height, width], some.length);
    if (told.classes) {
      const classes = labels.slice(start, start + BATCH).map(BigInt);
      given.label = new ort.Tensor("int64", BigInt64Array.from(classes), [some.length]);
    }
    values.set((await session.run(given)).image.data, start * pixels);
  }
  return values;
}

function paint(canvas, values, count, columns) {
  const lines = Math.ceil(count / columns), gap = 1;
  canvas.width = columns * (width + gap) + gap;
  canvas.height = lines * (height + gap) + gap;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < count; i++) {
    const tile = context.createImageData(width, height);
    for (let at = 0; at < height * width; at++) {
      for (let c = 0; c < 3; c++) {
        const value = values[i * pixels + (channels === 3 ? c : 0) * height * width + at];
        tile.data[4 * at + c] = Math.round((value + 1) * 127.5);
      }
      tile.data[4 * at + 3] = 255;
    }
    context.putImageData(tile, gap + (i % columns) * (width + gap), gap + Math.floor(i / columns) * (height + gap));
  }
}

function element(name, properties, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
}

const WHAT = {
  downscale: "It enlarges a small image.",
  mask: "It draws the blue part of an image; drag on the image to choose another part.",
  gray: "It gives color to a gray image.",
  pairs: "It draws an image from another one.",
};

function build() {
  const seed = element("input", { type: "number", min: 0, max: 2 ** 52, step: 1, value: 0, required: true });
  const choices = [...Array(told.classes).keys()].map((i) => element("option", { value: i, textContent: `class ${i}` }));
  const label = element("select", {}, element("option", { value: "all", textContent: "all classes" }), ...choices);
  const button = element("button", { type: "submit", disabled: true, textContent: "Draw" });
  const status = element("p", { className: "soft", textContent: "Loading the model ...", role: "status" });
  const canvas = element("canvas", {});
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "generated images");
  const form = element("form", {});
  const pick = told.condition && picker((given, problem) => {
    button.disabled = !given || !button.loaded;
    if (button.loaded) status.textContent = problem || (given ? "Ready." : "Choose an image.");
  });
  if (pick) form.append(element("label", {}, "image", pick.select), element("label", {}, "file", pick.file));
  form.append(element("label", {}, "first seed", seed));
  if (told.classes) form.append(element("label", {}, "class", label));
  form.append(button);
  const size = `${channels} x ${height} x ${width}`;
  const what = told.condition ? `${WHAT[told.condition.kind]} ` : "";
  const intro = `A generator of images (${size}) that needs one network evaluation per image. ${what}It runs in this browser.`;
  const head = element("header", {}, element("h1", { textContent: told.name }), element("p", { className: "soft" }, intro));
  document.getElementById("page").replaceChildren(head, element("section", {}, form, ...(pick ? [pick.canvas] : [])), element("section", {}, status, canvas));
  return { seed, label, button, status, canvas, form, pick };
}

async function start() {
  const { seed, label, button, status, canvas, form, pick } = build();
  const failed = (error) => { status.textContent = `This did not work: ${error.message || error}`; };
  let loaded;
  try {
    loaded = await load();
  } catch (error) {
    return failed(location.protocol === "file:" ? "open this folder through a web server; see docs/export.md of udddm" : error);
  }
  status.textContent = "Ready.";
  button.loaded = true;
  button.disabled = false;
  if (pick) await pick.choose();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      const first = Number(seed.value);
      const seeds = [...Array(told.count).keys()].map((i) => first + i);
      const labels = seeds.map((each) => (label.value === "all" ? each % told.classes : Number(label.value)));
      const began = performance.now();
      const values = await images(loaded, seeds, labels, pick && pick.picked.given);
      paint(canvas, values, told.count, told.columns);
      const seconds = (performance.now() - began) / 1000;
      status.textContent = `${told.count} images in ${seconds.toFixed(2)} s, seeds ${first} to ${first + told.count - 1}`;
      seed.value = first + told.count;
      document.dispatchEvent(new CustomEvent("drawn", { detail: { values, seeds, labels, seconds } }));
    } catch (error) {
      failed(error);
    }
    button.disabled = false;
  });
  document.dispatchEvent(new Event("ready"));
}

start();

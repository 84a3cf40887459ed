// The page: images in, classes out. page.json says what the model takes and what it should answer.

import { prepare, seenBox, withoutAlpha } from "./preprocess.js";
import { Downloads, loadRuntime, Model } from "./runtime.js";

const TOP = 5;
const TOLERANCE = 1e-3; // largest error over the largest centred logit in the self-test
const $ = (id) => document.getElementById(id);

const state = { page: null, runtime: null, models: {}, chosen: null, camera: null, facing: "environment", shown: null };

// What people see

function fail(error) {
  $("error").textContent = error instanceof Error ? error.message : String(error);
  $("error").hidden = false;
}

function clearError() {
  $("error").hidden = true;
}

function showProgress(done, total) {
  $("progress").value = total ? done / total : 0;
  $("progress-text").textContent = `Loading ${megabytes(done)} of ${megabytes(total)}`;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function title(id) {
  const { threads } = state.runtime;
  const processor = `processor, ${threads} thread${threads > 1 ? "s" : ""}`;
  return { wasm: `${processor} (WebAssembly)`, "wasm int8": `${processor}, int8 (WebAssembly)`, webgpu: "graphics card (WebGPU)" }[id];
}

function showFacts() {
  const { page, runtime } = state;
  const facts = {
    Model: `${page.architecture}, ${megabytes(page.models[0].bytes)}`,
    Image: page.preprocessing.input_size.slice(1).reverse().join(" x ") + " pixels",
    Runtime: `ONNX Runtime Web ${page.runtime.version}, ${page.runtime.base.startsWith("http") ? `from ${new URL(page.runtime.base).host}` : "in this folder"}`,
    Threads: self.crossOriginIsolated ? `${runtime.threads}` : "1: this server doesn't isolate the page (Cross-Origin-Opener-Policy)",
    WebGPU: runtime.backends.includes("webgpu") ? "yes" : "not in this browser",
    Licence: page.license ?? "not stated",
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
}

function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.textContent = text;
  return made;
}

function showResults(logits, milliseconds, preparation) {
  const best = softmax(logits).map((share, index) => ({ share, index })).sort((a, b) => b.share - a.share).slice(0, TOP);
  const rows = best.map(({ share, index }) => {
    const row = document.createElement("li");
    const name = element("span", state.page.labels[index] ?? `class ${index}`, { dir: "auto" });
    row.append(name, element("span", `${(100 * share).toFixed(1)} %`));
    row.style.setProperty("--share", `${100 * share}%`);
    return row;
  });
  $("results").replaceChildren(...rows);
  $("times").textContent = `${preparation.toFixed(0)} ms to prepare, ${milliseconds.toFixed(1)} ms for the model, on ${title(state.chosen)}`;
  $("canvas").setAttribute("aria-label", `Image: ${rows[0].firstChild.textContent}`);
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}

// From images to pixels

/** An image or video frame as {data (height, width, 3), width, height}: upright, transparency on white, drawn on a canvas. */
function pixelsOf(source, width, height, canvas = new OffscreenCanvas(width, height)) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return withoutAlpha(context.getImageData(0, 0, width, height));
}

/** A file decoded without colour management, as Pillow does it. Throws an Error in words. */
async function decode(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    const kind = blob.type.startsWith("image/") || !blob.type ? "an image that this browser can read" : `an image but ${blob.type}`;
    throw new Error(`${blob.name ?? "This"} is not ${kind}, or it is damaged. JPEG, PNG, WebP, GIF, BMP and AVIF are read.`);
  }
}

/** Pixels as the model takes them, and its answer. */
async function classify(image, model) {
  const steps = state.page.preprocessing;
  const started = performance.now();
  const pixels = prepare(image, steps);
  const preparation = performance.now() - started;
  const [channels, height, width] = steps.input_size;
  const { outputs, milliseconds } = await model.run(pixels, [height, width, channels]);
  return { pixels, logits: outputs[state.page.output].data, outputs, milliseconds, preparation };
}

async function show(image) {
  state.shown = image;
  $("drop").classList.add("filled");
  if (!state.chosen) return; // it is answered when the model is there
  const { logits, outputs, milliseconds, preparation } = await classify(image, state.models[state.chosen]);
  showResults(logits, milliseconds, preparation);
  if (state.page.tokens && $("layer").value) veil(image, outputs[state.page.tokens.output].data, Number($("layer").value));
}

/** Lays a veil over the patches that did not enter a layer. */
function veil(image, kept, layer) {
  const [rows, columns] = state.page.tokens.grid;
  const [left, top, width, height] = seenBox(image, state.page.preprocessing);
  const context = $("canvas").getContext("2d");
  context.fillStyle = "rgb(214 224 243 / 80%)";
  for (let patch = 0; patch < rows * columns; patch++) {
    if (kept[layer * rows * columns + patch]) continue;
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    context.fillRect(left + (column * width) / columns, top + (row * height) / rows, width / columns, height / rows);
  }
}

/** Draws an image again that was prepared before. */
function redraw({ data, width, height }) {
  const pixels = new ImageData(width, height);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) pixels.data.set([data[from], data[from + 1], data[from + 2], 255], to);
  $("canvas").getContext("2d").putImageData(pixels, 0, 0);
}

async function openImage(blob) {
  clearError();
  stopCamera();
  try {
    const bitmap = await decode(blob);
    await show(pixelsOf(bitmap, bitmap.width, bitmap.height, $("canvas")));
    bitmap.close();
  } catch (error) {
    fail(error);
  }
}

// Camera

async function startCamera() {
  clearError();
  try {
    if (!navigator.mediaDevices) throw new Error("The camera needs https or localhost.");
    state.camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: state.facing } });
  } catch (error) {
    const words = { NotAllowedError: "The camera was not allowed.", NotFoundError: "There is no camera.", NotReadableError: "The camera is used by another program." };
    fail(words[error.name] ?? error);
    return;
  }
  $("camera").textContent = "Stop camera";
  $("camera").setAttribute("aria-pressed", "true");
  $("turn").hidden = false;
  const video = Object.assign(document.createElement("video"), { srcObject: state.camera, muted: true, playsInline: true });
  await video.play();
  watch(video, state.camera);
}

/** Classifies frames, one after the other, as fast as the model allows. */
async function watch(video, camera) {
  try {
    while (state.camera === camera) {
      await show(pixelsOf(video, video.videoWidth, video.videoHeight, $("canvas")));
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    stopCamera();
    fail(error);
  }
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  $("camera").textContent = "Camera";
  $("camera").setAttribute("aria-pressed", "false");
  $("turn").hidden = true;
}

// Models and how they run

async function start() {
  const response = await fetch("page.json");
  if (!response.ok) throw new Error(`page.json can't be downloaded: the server answers ${response.status}`);
  state.page = await response.json();
  document.title = $("title").textContent = state.page.title;
  addSamples();
  addLayers();
  const downloads = new Downloads(showProgress);
  const contents = state.page.models.map((model) => downloads.join(model.parts));
  const [runtime, ...models] = await Promise.all([loadRuntime(state.page.runtime, downloads), ...contents]);
  state.runtime = runtime;
  $("progress-text").textContent = "Starting the model";
  await chooseFastest(ways(models));
  showFacts();
  $("progress-row").hidden = true;
  $("selftest").disabled = false;
  if (state.shown) await show(state.shown);
  if (new URLSearchParams(location.search).has("selftest")) await selfTest();
}

/** id -> {content, backend}: int8 runs on the processor only, because WebGPU computes it wrongly or not at all. */
function ways(contents) {
  const found = {};
  state.page.models.forEach(({ precision }, index) => {
    for (const backend of state.runtime.backends) {
      if (precision !== "int8" || backend === "wasm") {
        found[precision === "int8" ? `${backend} int8` : backend] = { content: contents[index], backend };
      }
    }
  });
  return found;
}

/** Opens the model in all ways and times them on a sample; one that fails is left out, unless it is the last. */
async function chooseFastest(found) {
  const sample = await samplePixels(state.page.samples[0]);
  const [channels, height, width] = state.page.preprocessing.input_size;
  const pixels = prepare(sample, state.page.preprocessing);
  const times = {};
  for (const [id, { content, backend }] of Object.entries(found)) {
    try {
      const model = await Model.open(state.runtime.ort, content, backend);
      times[id] = await model.time(pixels, [height, width, channels]);
      state.models[id] = model;
    } catch (error) {
      if (id === "wasm") throw new Error(`The model can't be opened: ${error.message}`);
      console.info(`${id}: ${error.message}`);
    }
  }
  const ids = Object.keys(times).sort((a, b) => times[a] - times[b]);
  state.chosen = ids[0];
  $("backend").replaceChildren(
    ...ids.map((id) => element("option", `${title(id)}: ${times[id].toFixed(1)} ms`, { value: id })),
  );
  $("backend").disabled = ids.length < 2;
}

// Samples and the self-test

async function samplePixels(sample) {
  const response = await fetch(sample.file);
  const bitmap = await decode(await response.blob());
  return pixelsOf(bitmap, bitmap.width, bitmap.height);
}

function addSamples() {
  const buttons = state.page.samples.map((sample, index) => {
    const button = element("button", "", { type: "button" });
    const image = Object.assign(new Image(), { src: sample.file, alt: `Sample image ${index + 1}` });
    button.append(image);
    button.addEventListener("click", async () => openImage(await (await fetch(sample.file)).blob()));
    return button;
  });
  $("samples").replaceChildren(...buttons);
}

function addLayers() {
  const { tokens } = state.page;
  if (!tokens) return;
  $("layer").replaceChildren(element("option", "not shown", { value: "" }), ...tokens.layers.map((name, index) => element("option", name, { value: index })));
  $("layer-row").hidden = false;
}

/** Compares the sample images' logits with those of PyTorch, in all ways to run the model. */
async function selfTest() {
  const rows = [];
  for (const [id, model] of Object.entries(state.models)) {
    for (const sample of state.page.samples) {
      const { logits } = await classify(await samplePixels(sample), model);
      rows.push({ id, file: sample.file, ...compare(logits, sample.logits, id) });
    }
  }
  const cells = rows.map(({ id, file, error, same, passed }) => {
    const row = document.createElement("tr");
    row.append(...[title(id), file, error.toExponential(1), same ? "yes" : "no", passed ? "passed" : "failed"].map((text) => element("td", text)));
    return row;
  });
  document.querySelector("#selftest-table tbody").replaceChildren(...cells);
  $("selftest-table").hidden = false;
  $("selftest").closest("details").open = true;
  document.body.dataset.selftest = rows.every(({ passed }) => passed) ? "passed" : "failed";
  return rows;
}

function compare(logits, expected, id) {
  const mean = expected.reduce((a, b) => a + b, 0) / expected.length;
  const scale = Math.max(...expected.map((value) => Math.abs(value - mean)));
  const error = Math.max(...expected.map((value, index) => Math.abs(value - logits[index]))) / scale;
  const top = (values) => values.indexOf(Math.max(...values));
  const same = top(Array.from(logits)) === top(expected);
  return { error, same, passed: same && (id.endsWith("int8") || error <= TOLERANCE) };
}

// Events

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) openImage(target.files[0]);
  target.value = "";
});
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) openImage(clipboardData.files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) openImage(event.dataTransfer.files[0]);
  else fail("No file was dropped: drag an image file here.");
});
$("camera").addEventListener("click", () => (state.camera ? stopCamera() : startCamera()));
$("turn").addEventListener("click", () => {
  stopCamera();
  state.facing = state.facing === "user" ? "environment" : "user";
  startCamera();
});
$("backend").addEventListener("change", ({ target }) => {
  state.chosen = target.value;
  if (state.shown) show(state.shown).catch(fail);
});
$("layer").addEventListener("change", () => {
  if (!state.shown) return;
  redraw(state.shown);
  show(state.shown).catch(fail);
});
$("selftest").addEventListener("click", () => selfTest().catch(fail));

/** For tests: pixels of an image file as the model takes them, and its answer. */
export async function answer(blob, id = state.chosen) {
  const bitmap = await decode(blob);
  const image = pixelsOf(bitmap, bitmap.width, bitmap.height);
  return { image, ...(await classify(image, state.models[id])) };
}

export const ready = start().then(() => true, (error) => {
  $("progress-row").hidden = true;
  fail(error);
  return false;
});
export { state };

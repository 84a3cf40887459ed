// ONNX Runtime Web: downloading it and the model, the ways to run the model here, and which of them is fastest.

const WASM = { module: "ort.wasm.min.mjs", glue: "ort-wasm-simd-threaded.mjs", binary: "ort-wasm-simd-threaded.wasm" };
// The build with WebGPU needs WebAssembly's promise integration (JSPI); it runs on the processor as well.
const WEBGPU = { module: "ort.jspi.min.mjs", glue: "ort-wasm-simd-threaded.jspi.mjs", binary: "ort-wasm-simd-threaded.jspi.wasm" };
const TIMED_MS = 1000; // longest time in which a way to run the model is timed
const TIMED_RUNS = 10;

/** Downloads files and counts their bytes, for one progress bar over all of them. */
export class Downloads {
  /** @param show (bytes so far, bytes in all) -> nothing */
  constructor(show) {
    this.show = show;
    this.done = 0;
    this.total = 0;
  }

  /**
   * A file as Uint8Array.
   * @param url where it is
   * @param bytes its size, for the progress bar
   * @param integrity its hash, where it comes from elsewhere
   */
  async fetch(url, bytes = 0, integrity = undefined) {
    this.total += bytes;
    const response = await fetch(url, integrity ? { integrity } : {});
    if (!response.ok) throw new Error(`${url} can't be downloaded: the server answers ${response.status}`);
    const chunks = [];
    let size = 0;
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      size += value.length;
      this.done += value.length;
      this.show(this.done, this.total);
    }
    if (bytes && size !== bytes) throw new Error(`${url} has ${size} bytes, expected ${bytes}: it is not the file that this page was made with`);
    return join(chunks, size);
  }

  /** A file that lies in parts, as one Uint8Array. */
  async join(parts) {
    const contents = await Promise.all(parts.map(({ file, bytes }) => this.fetch(file, bytes)));
    return contents.length === 1 ? contents[0] : join(contents, contents.reduce((sum, part) => sum + part.length, 0));
  }
}

function join(chunks, size) {
  const whole = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    whole.set(chunk, at);
    at += chunk.length;
  }
  return whole;
}

/** Whether this browser has a graphics card that ONNX Runtime Web can use. */
async function hasWebgpu() {
  if (!navigator.gpu || !("Suspending" in WebAssembly)) return false;
  try {
    return (await navigator.gpu.requestAdapter()) !== null;
  } catch {
    return false; // a driver that is blocked throws instead of answering null
  }
}

/** As many threads as `?threads=` says, else one for two processors, which often share a core, and at most four. */
function wantedThreads() {
  const wanted = Number(new URLSearchParams(location.search).get("threads"));
  return wanted >= 1 ? Math.floor(wanted) : Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2));
}

/**
 * The runtime, ready to open models.
 * @param settings "runtime" of page.json: base (URL), files (name -> {bytes, integrity})
 * @param downloads a Downloads
 * @returns {ort, backends: ids of what it can run on, threads}
 */
export async function loadRuntime(settings, downloads) {
  const webgpu = await hasWebgpu();
  const names = webgpu ? WEBGPU : WASM;
  const get = (name) => {
    const { bytes, integrity } = settings.files[name];
    return downloads.fetch(settings.base + name, bytes, integrity);
  };
  const [module, glue, binary] = await Promise.all([names.module, names.glue, names.binary].map(get));
  const script = (content) => URL.createObjectURL(new Blob([content], { type: "text/javascript" }));
  const ort = await import(script(module));
  const threads = self.crossOriginIsolated ? wantedThreads() : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: script(glue) };
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.logLevel = "error";
  return { ort, threads, backends: webgpu ? ["wasm", "webgpu"] : ["wasm"] };
}

/** A model on one backend. */
export class Model {
  /**
   * @param ort the runtime
   * @param content the .onnx file as Uint8Array
   * @param backend "wasm" or "webgpu"
   */
  static async open(ort, content, backend) {
    const session = await ort.InferenceSession.create(content, { executionProviders: [backend], logSeverityLevel: 3 });
    return new Model(ort, session);
  }

  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
    this.running = Promise.resolve();
  }

  /**
   * Outputs by name for pixels (H, W, C), and the milliseconds that they took. A session runs one image at a time.
   * @param shape [H, W, C]
   */
  run(pixels, shape) {
    const result = this.running.then(async () => {
      const input = new this.ort.Tensor("uint8", pixels, [1, ...shape]);
      const started = performance.now();
      const outputs = await this.session.run({ [this.session.inputNames[0]]: input });
      return { outputs, milliseconds: performance.now() - started };
    });
    this.running = result.catch(() => undefined);
    return result;
  }

  /** Median milliseconds of an image, after a first one that isn't counted. */
  async time(pixels, shape) {
    await this.run(pixels, shape);
    const times = [];
    for (let sum = 0; times.length < TIMED_RUNS && (sum < TIMED_MS || !times.length); ) {
      times.push((await this.run(pixels, shape)).milliseconds);
      sum += times.at(-1);
    }
    return times.sort((a, b) => a - b)[times.length >> 1];
  }
}

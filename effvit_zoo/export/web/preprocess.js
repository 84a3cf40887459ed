// Images as the model takes them: resized and cropped like Pillow, whose arithmetic of 8-bit images this follows to the bit.
// No browser is needed here: everything works on arrays of pixels.

const BITS = 22; // binary digits after the point of a resampling weight, as in Pillow's Resample.c

const bicubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0);
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// name in the record -> [support in pixels, weight at a distance]
const FILTERS = {
  box: [0.5, (x, signed) => (signed > -0.5 && signed <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => (x < 1 ? 1 - x : 0)],
  hamming: [1, (x) => (x === 0 ? 1 : x >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, bicubic],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Python's round(): halves go to the even neighbour. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest < 0.5 || (rest === 0.5 && below % 2 === 0) ? below : below + 1;
}

/** For the output pixels from `first` to `last`: which input pixels each is made of, and their weights as integers. */
function weights(size, outputSize, first, last, filter) {
  const [support, weight] = FILTERS[filter];
  const scale = size / outputSize;
  const stretch = Math.max(scale, 1);
  const radius = support * stretch;
  const rows = [];
  for (let index = first; index < last; index++) {
    const centre = (index + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - radius + 0.5));
    const end = Math.min(size, Math.trunc(centre + radius + 0.5));
    const exact = new Float64Array(end - start);
    let sum = 0;
    for (let tap = 0; tap < exact.length; tap++) {
      const distance = (tap + start - centre + 0.5) / stretch;
      exact[tap] = weight(Math.abs(distance), distance);
      sum += exact[tap];
    }
    const taps = new Int32Array(exact.length);
    for (let tap = 0; tap < taps.length; tap++) {
      const share = (sum === 0 ? exact[tap] : exact[tap] / sum) * (1 << BITS);
      taps[tap] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    }
    rows.push({ start, taps });
  }
  return rows;
}

const clip = (sum) => {
  const value = sum >> BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
};

/** Pixels (height, width, 3) resized along their rows. Only rows `top` to `bottom` are made. */
function resizeRows(pixels, width, top, bottom, rows) {
  const result = new Uint8Array((bottom - top) * rows.length * 3);
  let place = 0;
  for (let y = top; y < bottom; y++) {
    for (const { start, taps } of rows) {
      let red = 1 << (BITS - 1);
      let green = red;
      let blue = red;
      let at = (y * width + start) * 3;
      for (let tap = 0; tap < taps.length; tap++, at += 3) {
        red = (red + Math.imul(pixels[at], taps[tap])) | 0;
        green = (green + Math.imul(pixels[at + 1], taps[tap])) | 0;
        blue = (blue + Math.imul(pixels[at + 2], taps[tap])) | 0;
      }
      result[place++] = clip(red);
      result[place++] = clip(green);
      result[place++] = clip(blue);
    }
  }
  return result;
}

/** Pixels resized along their columns; the first row that there is has the number `top`. */
function resizeColumns(pixels, width, top, columns) {
  const stride = width * 3;
  const result = new Uint8Array(columns.length * stride);
  columns.forEach(({ start, taps }, y) => {
    for (let x = 0; x < stride; x++) {
      let sum = 1 << (BITS - 1);
      let at = (start - top) * stride + x;
      for (let tap = 0; tap < taps.length; tap++, at += stride) sum = (sum + Math.imul(pixels[at], taps[tap])) | 0;
      result[y * stride + x] = clip(sum);
    }
  });
  return result;
}

/** For each output pixel, the nearest of the input; the position is summed up in steps, as Pillow does, which decides ties. */
function nearestPixels(size, outputSize) {
  const step = size / outputSize;
  const places = new Int32Array(outputSize);
  for (let index = 0, at = step / 2; index < outputSize; index++, at += step) places[index] = Math.min(size - 1, Math.trunc(at));
  return places;
}

function nearest(image, size, [left, top, right, bottom]) {
  const [columns, rows] = [nearestPixels(image.width, size[0]), nearestPixels(image.height, size[1])];
  const result = new Uint8Array((right - left) * (bottom - top) * 3);
  let place = 0;
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++, place += 3) {
      const at = (rows[y] * image.width + columns[x]) * 3;
      result.set(image.data.subarray(at, at + 3), place);
    }
  }
  return result;
}

/**
 * A part of a resized image.
 * @param image {data: Uint8Array (height, width, 3), width, height}
 * @param size [width, height] of the whole resized image
 * @param box [left, top, right, bottom] of the part in it
 * @param filter name of the interpolation
 * @param tallFirst whether Pillow resizes the columns first where that is less work (from version 13 on), which decides roundings
 */
export function resize(image, size, box, filter, tallFirst = true) {
  const [left, top, right, bottom] = box;
  const part = { width: right - left, height: bottom - top };
  if (filter === "nearest") return { data: nearest(image, size, box), ...part };
  const [narrower, lower] = [image.width - size[0], image.height - size[1]];
  const rows = narrower === 0 ? null : weights(image.width, size[0], left, right, filter);
  const columns = lower === 0 ? null : weights(image.height, size[1], top, bottom, filter);
  const [first, last] = columns ? reach(columns) : [top, bottom];
  if (rows && columns && tallFirst && lower > 0 && 2 * narrower < lower) {
    const data = resizeColumns(image.data, image.width, 0, columns);
    return { data: resizeRows(data, image.width, 0, part.height, rows), ...part };
  }
  const data = rows
    ? resizeRows(image.data, image.width, first, last, rows)
    : cut(image, [left, first, right, last]);
  return { data: columns ? resizeColumns(data, part.width, first, columns) : data, ...part };
}

/** The input pixels that weights refer to, from the first to the one after the last. */
function reach(weighted) {
  const ends = weighted.map(({ start, taps }) => start + taps.length);
  return [weighted.reduce((first, { start }) => Math.min(first, start), Infinity), Math.max(...ends)];
}

function cut(image, [left, top, right, bottom]) {
  const stride = (right - left) * 3;
  const result = new Uint8Array(stride * (bottom - top));
  for (let y = top; y < bottom; y++) {
    const at = (y * image.width + left) * 3;
    result.set(image.data.subarray(at, at + stride), (y - top) * stride);
  }
  return result;
}

/** [width, height] to which an image is resized before it is cropped to the model's size. */
export function resizedSize(image, height, width, steps) {
  const tall = Math.floor(height / steps.crop_pct);
  const wide = Math.floor(width / steps.crop_pct);
  if (steps.crop_mode === "squash") return [wide, tall];
  if (steps.crop_mode !== "border" && tall === wide) {
    const short = Math.min(image.width, image.height);
    const other = Math.floor((wide * Math.max(image.width, image.height)) / short);
    return image.width <= image.height ? [wide, other] : [other, wide];
  }
  const choose = steps.crop_mode === "border" ? Math.max : Math.min;
  const ratio = choose(image.height / tall, image.width / wide);
  return [roundHalfEven(image.width / ratio), roundHalfEven(image.height / ratio)];
}

/** Where the model's input lies: {size: of the resized image, box: the part of it, place: of the part in the input}, each in pixels. */
function placement(image, steps) {
  const [, height, width] = steps.input_size;
  const size = resizedSize(image, height, width, steps);
  const [x, y] = [width, height].map((side, axis) => {
    const missing = Math.max(0, side - size[axis]);
    const start = roundHalfEven((size[axis] + missing - side) / 2) - Math.floor(missing / 2);
    return { start: Math.max(0, start), end: Math.min(size[axis], start + side), offset: Math.max(0, -start) };
  });
  return { size, box: [x.start, y.start, x.end, y.end], place: [x.offset, y.offset] };
}

/** The part of an image that the model sees: [left, top, width, height] in the image's pixels; it may reach beyond the image. */
export function seenBox(image, steps) {
  const [, height, width] = steps.input_size;
  const { size, box, place } = placement(image, steps);
  const [across, down] = [image.width / size[0], image.height / size[1]];
  return [(box[0] - place[0]) * across, (box[1] - place[1]) * down, width * across, height * down];
}

/**
 * An image as the model takes it.
 * @param image {data: Uint8Array (height, width, 3), width, height}
 * @param steps "preprocessing" of the record: input_size (C, H, W), interpolation, crop_pct, crop_mode, mean
 * @returns Uint8Array (H, W, C)
 */
export function prepare(image, steps) {
  const [channels, height, width] = steps.input_size;
  const source = channels === 1 ? grey(image) : image;
  const { size, box, place } = placement(source, steps);
  const part = resize(source, size, box, steps.interpolation, steps.tall_first);
  const result = new Uint8Array(height * width * 3);
  if (part.data.length < result.length && steps.crop_mode === "border") {
    const fill = steps.mean.map((value) => roundHalfEven(255 * value));
    for (let at = 0; at < result.length; at++) result[at] = fill[fill.length === 1 ? 0 : at % 3];
  }
  for (let y = 0; y < part.height; y++) {
    const row = part.data.subarray(y * part.width * 3, (y + 1) * part.width * 3);
    result.set(row, ((y + place[1]) * width + place[0]) * 3);
  }
  return channels === 1 ? result.filter((_, at) => at % 3 === 0) : result;
}

/** Luma as Pillow's convert("L"), in all three channels. */
function grey({ data, width, height }) {
  const result = new Uint8Array(data.length);
  for (let at = 0; at < data.length; at += 3) {
    result.fill((data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 0x8000) >> 16, at, at + 3);
  }
  return { data: result, width, height };
}

/** Canvas pixels (height, width, RGBA), opaque, without their fourth channel. */
export function withoutAlpha({ data, width, height }) {
  const result = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    result[to] = data[from];
    result[to + 1] = data[from + 1];
    result[to + 2] = data[from + 2];
  }
  return { data: result, width, height };
}

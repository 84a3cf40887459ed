#!/usr/bin/env python
"""Damaged image files through `effzoo predict`, `effzoo validate` and the training reader: each may only be read or refused in one line.

Files of ten formats are damaged at random (cut off, bytes changed, runs overwritten, moved or removed, two formats joined, named wrongly).
What the commands print is checked line by line; a traceback, a warning of a library or a line of a C decoder on stderr counts as a fault,
and so does a file that takes more than ten seconds.

    python tools/fuzz_images.py --files 2000
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.data import BadImage, open_image, open_source

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {
    "JPEG": (".jpg", ("RGB", "L", "CMYK")),
    "PNG": (".png", ("RGB", "RGBA", "L", "LA", "P", "I;16", "1")),
    "GIF": (".gif", ("P", "L")),
    "BMP": (".bmp", ("RGB", "L", "P", "1")),
    "TIFF": (".tif", ("RGB", "RGBA", "L", "CMYK", "I;16", "F")),
    "WEBP": (".webp", ("RGB", "RGBA")),
    "PPM": (".ppm", ("RGB", "L", "1")),
    "JPEG2000": (".jp2", ("RGB", "RGBA", "L")),
    "AVIF": (".avif", ("RGB", "RGBA")),
    "MPO": (".jpg", ("RGB",)),
}
SAVING = {
    "TIFF": lambda rng: {"compression": rng.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])},
    "WEBP": lambda rng: {"lossless": rng.random() < 0.5},
    "JPEG": lambda rng: {"progressive": rng.random() < 0.5},
}
ANSWER = re.compile(r"(skipped: |error: |note: |warning: |\d+ (images|files) )")
LIBTIFF = re.compile(r"(?!\w*(Error|Warning|Exception):)(\w+: |tempfile\.tif: )*([A-Z][^:]*\.$|(?=skipped: ))")
"""What libtiff prints from C, which Pillow doesn't pass on, alone on its line or in front of ours: counted apart."""
SLOW = 10.0  # seconds that reading one file may take


def sound_file(kind: str, rng: random.Random) -> bytes:
    """A picture of noise as a file of this format, in one of the modes that it knows."""
    side = rng.randint(1, 40), rng.randint(1, 40)
    mode = rng.choice(FORMATS[kind][1])
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (side[1], side[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    if mode in ("I;16", "F"):
        grey = noise[..., 0].astype(np.uint16 if mode == "I;16" else np.float32) * (200 if mode == "I;16" else 1 / 255)
        picture = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        picture = picture.convert("RGB").convert(mode) if mode in ("CMYK", "P", "1") else picture.convert(mode)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    options = SAVING.get(kind, lambda rng: {})(rng) | (
        {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    )
    if mode in ("F", "1") and kind == "TIFF":
        options["compression"] = None
    picture.save(file, kind, **options)
    return file.getvalue()


def damaged(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The file with one to three damages; `other` is a file to take parts from."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        length = rng.randint(1, max(1, len(data) // 4))
        match rng.randrange(7):
            case 0:
                del data[start:]
            case 1:
                for place in rng.sample(range(len(data)), min(len(data), rng.randint(1, 8))):
                    data[place] = rng.getrandbits(8)
            case 2:
                data[start : start + length] = bytes([rng.choice((0, 255))]) * length
            case 3:
                data[start : start + length] = rng.randbytes(length)
            case 4:
                del data[start : start + length]
            case 5:
                data[:start] = other[:start]
            case 6:  # the header alone: sizes, offsets, counts
                place = rng.randrange(min(64, len(data)) or 1)
                data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
    return bytes(data)


def write_files(root: Path, count: int, rng: random.Random) -> None:
    """`count` files in two class folders; a tenth under another format's name, and four sound ones so that there is something to read."""
    kinds = list(FORMATS)
    for number in range(count):
        kind, other = kinds[number % len(kinds)], rng.choice(kinds)
        suffix = FORMATS[other if rng.random() < 0.1 else kind][0]
        path = root / ("left", "right")[number // len(kinds) % 2] / f"{number:05d}-{kind.lower()}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged(sound_file(kind, rng), sound_file(other, rng), rng))
    for name in ("left/sound-0.png", "left/sound-1.png", "right/sound-2.png", "right/sound-3.png"):
        (root / name).write_bytes(sound_file("PNG", rng))


def run(command: list[str], faults: Counter[str]) -> None:
    """A command in a process of its own; counts what it says on stderr that is not an answer."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "effvit_zoo", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    others = [line for line in lines if not ANSWER.match(line) and "%|" not in line and "it/s" not in line]
    wrong = [line for line in others if not LIBTIFF.match(line)]
    for line in wrong:
        faults[f"{command[0]}: {line[:160]}"] += 1
    if done.returncode not in (0, 2):
        faults[f"{command[0]}: exit code {done.returncode}"] += 1
    seconds = time.perf_counter() - started
    print(
        f"{command[0]}: exit {done.returncode}, {seconds:.0f} s, {len(wrong)} of {len(lines)} lines wrong, "
        f"{len(others) - len(wrong)} are libtiff's own",
        flush=True,
    )


def read_all(root: Path, faults: Counter[str]) -> None:
    """Every file through the training reader and through `open_image`."""
    source = open_source(str(root), "train")
    read, refused = 0, Counter()
    for index in range(len(source)):
        started = time.perf_counter()
        try:
            image = source.load(index)[0]
            if image.mode != "RGB" or open_image(source.name(index)).tobytes() != image.tobytes():
                faults["reader: a picture differs between the training reader and open_image"] += 1
            read += 1
        except BadImage as error:
            refused[error.reason[:40]] += 1
            if "\n" in str(error):
                faults["reader: more than one line"] += 1
        if time.perf_counter() - started > SLOW:
            faults[f"reader: {Path(source.name(index)).name} took {time.perf_counter() - started:.0f} s"] += 1
    print(
        f"reader: {read} read, {sum(refused.values())} refused: {json.dumps(dict(refused.most_common(8)))}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder) / "files", Path(folder) / "model"
        write_files(root, args.files, random.Random(args.seed))
        hub.save(effvit_zoo.create_model("effzoo_vit_pico", num_classes=2), model, label_names=["left", "right"])
        read_all(root, faults)
        run(["predict", str(root), "--model", str(model), "--json"], faults)
        run(["validate", "--model", str(model), "--data", str(root), "--workers", "0"], faults)
    for fault, count in faults.most_common(40):
        print(f"{count:5d}  {fault}")
    print(f"{args.files} files, seed {args.seed}: {sum(faults.values())} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()

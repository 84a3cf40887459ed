"""Draws effvit_zoo/assets/fashion_mnist_mini.png, the embedded data set, from Fashion-MNIST's four idx files.

    python tools/draw_fashion_mnist_mini.py [--source FOLDER] [--output FILE]

Of each class, 1,000 of the train files' images and 200 of the t10k files': those whose row numbers have the smallest SHA-256 of
"SEED/SPLIT/ROW", in the files' order. A hash draws the same rows under every version of Python and numpy.
assets/README.md describes the file that comes out.
"""

from __future__ import annotations

import argparse
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from effvit_zoo.data.roots.fashion_mnist import (
    DEBIAN_FOLDER,
    MINI_IMAGES_PER_CLASS,
    TILE,
    TILES_PER_ROW,
    read_fashion_mnist,
)
from effvit_zoo.errors import UserError, run_command

SEED = 0
ASSET = Path(__file__).parent.parent / "effvit_zoo" / "assets" / "fashion_mnist_mini.png"


def draw_rows(labels: np.ndarray, split: str) -> np.ndarray:
    """Row numbers of the drawn images, class by class, within a class ascending."""

    def rank(row: int) -> bytes:
        return sha256(f"{SEED}/{split}/{row}".encode()).digest()

    drawn = [sorted(np.flatnonzero(labels == c).tolist(), key=rank)[: MINI_IMAGES_PER_CLASS[split]] for c in range(10)]
    return np.sort(np.array(drawn), axis=1).ravel()


def draw_mosaic(folder: str) -> np.ndarray:
    """The grey mosaic (3360, 2800), uint8. Raises `UserError` where the files are not in `folder`."""
    tiles = []
    for split in MINI_IMAGES_PER_CLASS:
        found = read_fashion_mnist(folder, split)
        if found is None:
            raise UserError(f"Fashion-MNIST's {split} idx files are not in {folder}")
        images, labels = found
        tiles.append(images[draw_rows(labels, split)])
    stacked = np.concatenate(tiles).reshape(-1, TILES_PER_ROW, TILE, TILE)  # (120, 100, 28, 28)
    return stacked.swapaxes(1, 2).reshape(-1, TILES_PER_ROW * TILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=DEBIAN_FOLDER, help="folder with the idx files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ASSET, help="PNG to write (default: %(default)s)")
    args = parser.parse_args()
    Image.fromarray(draw_mosaic(args.source)).save(args.output, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size} bytes, SHA-256 {sha256(args.output.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))

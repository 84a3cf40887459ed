"""`effzoo predict`: what a model says of image files, as rows of its task, and drawn on the images."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, positive, printable
from ..report.rows import add_format_arguments, print_rows, print_table, shown
from ._arguments import MODEL_HELP, add_device, check_device

HELP = "run a model on images"
DRAWN_ROWS = 3
TITLES = {"label": "class"}
HIDDEN = ("rank", "index")
"""Keys of rows that the printed table leaves out: its order tells the rank, its names the index."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders to search for them")
    parser.add_argument("--model", required=True, help=f"{MODEL_HELP}, or an exported file")
    parser.add_argument(
        "--topk", type=positive, default=5, metavar="K", help="number of top classes to print (default: %(default)s)"
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write each image with its prediction drawn")
    parser.add_argument(
        "--show-tokens",
        action="store_true",
        help="for a ToSA-ViT: write IMAGE.tokens.png, the tokens that each ToSA layer kept, to --draw (default: here)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="(default: %(default)s)")
    add_device(parser)
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from .. import hub
    from ..data import BadImage, open_image
    from ..evaluation.prediction import predict
    from ..export import target_of
    from ..export.deployed import open_exported
    from ..tasks import task_of

    device = "cpu" if target_of(args.model) else check_device(args.device)
    if device != "cpu":
        print(f"computing on {device}", file=sys.stderr)

    def note(error: BadImage) -> None:
        print(f"skipped: {printable(str(error))}", file=sys.stderr)

    paths = _found(args.images, note)
    if not paths:
        raise UserError("there is no image to predict")
    drawing = _Drawing(args.draw, args.images, paths) if args.draw else None
    model = open_exported(args.model) if target_of(args.model) else hub.load(args.model, pretrained=True)
    task = task_of(model)
    for line in task.picture_notes() if drawing else ():
        print(f"note: {line}", file=sys.stderr)
    options = {"batch_size": args.batch_size, "device": device, "on_bad": note, "progress": sys.stderr.isatty()}
    found = predict(model, paths, task=task, topk=max(args.topk, DRAWN_ROWS if drawing else 0), **options)
    if not found:
        raise UserError(f"none of the {len(paths)} images could be read")
    read = [(one.image, one.rows) for one in found if one.image is not None]
    if drawing is not None:
        for image, best in read:
            task.draw_prediction(open_image(image), best[:DRAWN_ROWS]).save(drawing.target(image))
    if args.show_tokens:
        tokens = _Drawing(args.draw or Path(), args.images, paths, ".tokens.png")
        _show_tokens(model, [image for image, _ in read], tokens)
    rows = [{"image": str(image)} | row for image, best in read for row in best[: args.topk]]
    if args.json or args.csv:
        print_rows(_per_image(rows) if args.json else rows, args.json, args.output)
    else:
        _print(rows, args.output)


def _found(given: Sequence[str], note: Callable[[Any], None]) -> list[Path]:
    """Image files that the arguments name, each once; what can't be found is noted."""
    from ..data import BadImage, find_images

    found: dict[str, Path] = {}
    for path in given:
        try:
            for image in find_images([path], lambda line: print(line, file=sys.stderr)):
                found.setdefault(os.path.abspath(image), image)
        except BadImage as error:
            note(error)
    return [*found.values()]


def _print(rows: Sequence[Mapping[str, Any]], output: Path | None) -> None:
    """A table with numbers before names, and an image's path in the first of its rows only."""
    keys = [key for key in rows[0] if key not in ("image", *HIDDEN)]
    numbers = [key for key in keys if isinstance(rows[0][key], int | float)]
    keys = [*numbers, *(key for key in keys if key not in numbers)]
    table, last = [], None
    for row in rows:
        image = "" if row["image"] == last else printable(row["image"])
        last = row["image"]
        table.append([image, *(f"{100 * row[key]:.1f} %" if key == "probability" else shown(row[key]) for key in keys)])
    head = ["image", *(TITLES.get(key, key.replace("_", " ")) for key in keys)]
    print_table(head, table, right=range(1, 1 + len(numbers)), output=output)


def _per_image(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per image: with the list of its classes, if the rows are ranked classes, else with the list of its rows."""
    kind = "classes" if "label" in rows[0] else "rows"
    images: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        entry = {key: value for key, value in row.items() if key not in ("image", "rank")}
        images.setdefault(row["image"], []).append(entry)
    return [{"image": image, kind: entries} for image, entries in images.items()]


def _show_tokens(model: Any, images: Sequence[Path], drawing: _Drawing) -> None:
    from ..evaluation.prediction import token_maps
    from ..viz.selection import selected_tokens

    model = model.to("cpu")
    for image in images:
        seen, layers = token_maps(model, image)
        target = drawing.target(image)
        title = f"Input of the ToSA layers: {printable(image.name)}"
        ratio = f"attention ratio {model.attention_ratio:g}, chosen by its selectors"
        selected_tokens(seen, layers, title, ratio, target)
        print(f"tokens: {printable(str(target))}", file=sys.stderr)


class _Drawing:
    """A folder for drawn images; images from a searched folder keep their place below it. No image that was given is overwritten."""

    def __init__(self, folder: Path, given: Sequence[str], images: Sequence[Path], suffix: str = ".png") -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--draw {folder} is a file, expected a folder or nothing")
        self.folder, self.suffix = folder, suffix
        self.roots = [Path(path) for path in given if Path(path).is_dir()]
        self.taken = {os.path.realpath(image) for image in images}

    def target(self, image: Path) -> Path:
        """A PNG file of the image's name that no other image of this call has. Its folder is made."""
        root = next((root for root in self.roots if image.is_relative_to(root)), image.parent)
        target = self.folder / image.relative_to(root)
        number, candidate = 1, target.with_name(f"{target.stem}{self.suffix}")
        while os.path.realpath(candidate) in self.taken:
            number += 1
            candidate = target.with_name(f"{target.stem}-{number}{self.suffix}")
        self.taken.add(os.path.realpath(candidate))
        candidate.parent.mkdir(parents=True, exist_ok=True)
        return candidate

"""`effzoo predict`: what a model says of image files, as rows of its task, and drawn on the images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, positive
from ..report.rows import add_format_arguments, print_rows, print_table, shown
from ._arguments import MODEL_HELP, add_device, check_device

HELP = "run a model on images"
DRAWN_ROWS = 3
TITLES = {"label": "class"}
HIDDEN = ("rank", "index")
"""Keys of rows that the printed table leaves out: its order tells the rank, its names the index."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders to search for them")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
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
    from ..tasks import task_of

    device = check_device(args.device)

    def note(error: BadImage) -> None:
        print(f"skipped: {error}", file=sys.stderr)

    paths = [*_found(args.images, note)]
    if not paths:
        raise UserError("there is no image to predict")
    drawing = _Drawing(args.draw, args.images) if args.draw else None
    model = hub.load(args.model, pretrained=True)
    task = task_of(model)
    rows: list[dict[str, Any]] = []
    topk = max(args.topk, DRAWN_ROWS if drawing else 0)
    options = {"batch_size": args.batch_size, "device": device, "on_bad": note}
    for prediction in predict(model, paths, task=task, topk=topk, **options):
        if drawing:
            drawn = task.draw_prediction(open_image(prediction.image), prediction.rows[:DRAWN_ROWS])
            drawn.save(drawing.target(prediction.image))
        rows.extend({"image": str(prediction.image)} | row for row in prediction.rows[: args.topk])
    if not rows:
        raise UserError(f"none of the {len(paths)} images could be read")
    if args.show_tokens:
        _show_tokens(model, [*dict.fromkeys(row["image"] for row in rows)], args.draw or Path())
    if args.json or args.csv:
        print_rows(_per_image(rows) if args.json else rows, args.json, args.output)
    else:
        _print(rows, args.output)


def _found(given: Sequence[str], note: Any) -> Iterator[Path]:
    """Image files that the arguments name; what can't be found is noted."""
    from ..data import BadImage, find_images

    for path in given:
        try:
            yield from find_images([path], lambda line: print(line, file=sys.stderr))
        except BadImage as error:
            note(error)


def _print(rows: Sequence[Mapping[str, Any]], output: Path | None) -> None:
    """A table with numbers before names, and an image's path in the first of its rows only."""
    keys = [key for key in rows[0] if key not in ("image", *HIDDEN)]
    numbers = [key for key in keys if isinstance(rows[0][key], int | float)]
    keys = [*numbers, *(key for key in keys if key not in numbers)]
    table, last = [], None
    for row in rows:
        image = "" if row["image"] == last else row["image"]
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


def _show_tokens(model: Any, images: Sequence[str], folder: Path) -> None:
    from ..evaluation.prediction import token_maps
    from ..viz.selection import selected_tokens

    model = model.to("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        seen, layers = token_maps(model, Path(image))
        target = folder / f"{Path(image).stem}.tokens.png"
        title = f"Input of the ToSA layers: {Path(image).name}"
        ratio = f"attention ratio {model.attention_ratio:g}, chosen by its selectors"
        selected_tokens(seen, layers, title, ratio, target)
        print(f"tokens: {target}", file=sys.stderr)


class _Drawing:
    """A folder for drawn images; images from a searched folder keep their place below it."""

    def __init__(self, folder: Path, given: Sequence[str]) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--draw {folder} is a file, expected a folder or nothing")
        self.folder = folder
        self.roots = [Path(path) for path in given if Path(path).is_dir()]
        self.taken: set[Path] = set()

    def target(self, image: Path) -> Path:
        """A PNG file of the image's name that no other image of this call has. Its folder is made."""
        root = next((root for root in self.roots if image.is_relative_to(root)), image.parent)
        target = self.folder / image.relative_to(root)
        number, candidate = 1, target.with_suffix(".png")
        while candidate in self.taken:
            number += 1
            candidate = target.with_name(f"{target.stem}-{number}.png")
        self.taken.add(candidate)
        candidate.parent.mkdir(parents=True, exist_ok=True)
        return candidate

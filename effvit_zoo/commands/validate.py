"""`effzoo validate`, and `validate.py`: measures models, exported files too, on a data set."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, positive
from ..report.rows import check_output, figures, print_table, shown, write_rows
from ..run_folder import EXTRA_KEY, VALIDATION, read_json, run_of, write_json
from ._arguments import MODEL_HELP, add_device, check_device

if TYPE_CHECKING:
    from ..evaluation.compare import Candidate
    from ..tasks import Metric

HELP = "measure a model's accuracy and speed on a data set"
RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        help=f"{MODEL_HELP}, or an exported file; several are measured in turn on the same images",
    )
    parser.add_argument(
        "--like", metavar="MODEL", help="model that supplies preprocessing and labels of an exported file"
    )
    parser.add_argument("--pretrained", action="store_true", help="with a model name: its published weights")
    parser.add_argument(
        "--data", default="builtin:fashion-mnist-mini", help="as data.root in a config (default: %(default)s)"
    )
    parser.add_argument(
        "--split",
        default="auto",
        help="split of the data (default: auto, what the models were validated on if one was trained on this data, else val, test or all)",
    )
    parser.add_argument(
        "--classes",
        choices=("name", "position"),
        default="name",
        help="how classes of the data and of the model correspond (default: %(default)s)",
    )
    parser.add_argument(
        "--img-size", type=positive, nargs="+", metavar="N", help="one or more sizes in pixels (default: the model's)"
    )
    parser.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="share of the resized image to crop (default: the model's)"
    )
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes (default: one per core, at most 8)")
    add_device(parser)
    parser.add_argument("--results-file", type=Path, metavar="FILE", help="write results to FILE.json or FILE.csv")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.compare import Options, validate

    _check(args)
    device = check_device(args.device)
    failed: list[str] = []

    def skip(name: str, error: UserError) -> None:
        if len(args.model) == 1:
            raise error
        failed.append(name)
        print(f"skipped {name}: {error}", file=sys.stderr)

    candidates = []
    for name in args.model:
        try:
            candidates.append(_candidate(name, args.like, args.pretrained))
        except UserError as error:
            skip(name, error)
    for candidate in candidates:
        if candidate.weights == RANDOM:
            print(f"{candidate.name} has random weights: {_published(candidate.name)}", file=sys.stderr)
    options = Options(args.split, args.crop_pct, args.batch_size, args.workers, device, args.classes == "position")
    rows = validate(candidates, args.data, options, args.img_size or (None,), on_failure=skip)
    if not rows:
        raise UserError(f"none of the {len(args.model)} models could be measured")
    if len(rows) == 1:
        _print_tables(rows[0])
    _print_summary(rows)
    for row in rows:
        _record(row)
    if args.results_file and args.results_file.suffix == ".json":
        write_json(args.results_file, rows[0] if len(rows) == 1 else rows)
    elif args.results_file:
        write_rows(_plain(rows), args.results_file)
    if failed:
        raise UserError(f"{len(failed)} of {len(args.model)} models could not be measured: {', '.join(failed)}")


def _record(row: Mapping[str, Any]) -> None:
    """Adds a result to the validation.json of the run that a model belongs to, where the model card finds it."""
    from .. import hub
    from ..export import target_of

    resolved = "" if target_of(row["model"]) else hub.resolve_name(row["model"])
    run = run_of(Path(resolved.removeprefix(hub.LOCAL))) if resolved.startswith(hub.LOCAL) else None
    if run is None or not os.access(run, os.W_OK):
        return
    path = run / VALIDATION
    key = ("model", "data", "split", "fingerprint", "input_size", "crop_pct")
    entry = {name: value for name, value in row.items() if name != "tables"} | {"model": Path(resolved).name}
    known = read_json(path) if path.is_file() else []
    kept = [old for old in known if any(old.get(name) != entry[name] for name in key)]
    write_json(path, [*kept, entry])


def _candidate(name: str, like: str | None, pretrained: bool) -> Candidate:
    """A model by name, model folder, run folder or exported file. Raises `UserError`."""
    import torch

    from .. import hub
    from ..evaluation.compare import Candidate
    from ..export import target_of
    from ..export.deployed import open_exported, training_of

    if target_of(name) is not None:
        build = partial(open_exported, name, torch.get_num_threads(), like)
        return Candidate(name, build, training_of(Path(name), like))
    trained = hub.brings_weights(name)
    record = hub.read_config(name).get(EXTRA_KEY) if trained else None
    weights = "trained" if pretrained or trained else RANDOM
    return Candidate(name, partial(hub.load, name, pretrained=pretrained or trained), record or {}, weights)


def _published(name: str) -> str:
    """What to do about random weights."""
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    known = get_arch_pretrained_cfgs(split_model_name_tag(name)[0]).values()
    has_weights = any(cfg.has_weights for cfg in known)
    return "--pretrained takes the published ones" if has_weights else "none are published, its results say nothing"


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for an argument out of range."""
    check_output(args.results_file, "--results-file")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop-pct must lie in (0, 1], got {args.crop_pct}")


def _print_tables(row: Mapping[str, Any]) -> None:
    """The sections of a model's results."""
    for table in row["tables"]:
        if table["title"]:
            print(table["title"])
        columns = enumerate(zip(*table["rows"], strict=True))
        numbers = [index for index, cells in columns if any(isinstance(cell, int | float) for cell in cells)]
        print_table(table["head"], [[*map(shown, cells)] for cells in table["rows"]], right=numbers)
        print()


def _print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """What was measured, and a line for each model and size."""
    row = rows[0]
    names = f", names {row['fingerprint'][:8]}" if row["fingerprint"] else ""
    skipped = f", {row['bad_files']} unreadable files skipped" if row["bad_files"] else ""
    devices = ", ".join(dict.fromkeys(one["device"] for one in rows))
    print(f"{row['data']} ({row['split']}): {row['images']:,} images{names}{skipped}, on {devices}")
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("model", lambda row: row["model"])]
    for name, metric in _metrics(rows).items():
        columns.append((_head(metric), partial(_cell, name, f".{metric.digits}f")))
        if any(f"{name}_interval" in row for row in rows):
            columns.append(("95 % interval", partial(_interval, name)))
    columns += [
        ("params, M", lambda row: "-" if row["params"] is None else figures(row["params"] / 1e6)),
        ("images", lambda row: shown(row["images"])),
        ("input", lambda row: shown(row["input_size"][1:])),
        ("images/s", lambda row: f"{row['images_per_second']:.0f}"),
        ("split", lambda row: row["split"]),
        ("names", lambda row: row["fingerprint"][:8] or "-"),
    ]
    if any(row["weights"] == RANDOM for row in rows):
        columns.append(("weights", lambda row: row["weights"]))
    head = [title for title, _ in columns]
    left = {"model", "split", "names", "weights"}
    cells = [[cell(row) for _, cell in columns] for row in rows]
    print_table(head, cells, right=[index for index, title in enumerate(head) if title not in left])


def _cell(name: str, form: str, row: Mapping[str, Any]) -> str:
    return format(row[name], form) if name in row else "-"


def _interval(name: str, row: Mapping[str, Any]) -> str:
    ends = row.get(f"{name}_interval")
    return "-" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics that rows have, of any task."""
    from ..tasks import TASKS, Metric

    known = {name: metric for task in TASKS.values() for name, metric in task.metrics.items()}
    known["loss"] = Metric("loss", higher_is_better=False, digits=4)
    return {name: metric for name, metric in known.items() if any(name in row for row in rows)}


def _head(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a spreadsheet: sizes as 3x224x224."""
    return [{**row, "input_size": "x".join(map(str, row["input_size"]))} for row in rows]

"""The `effzoo` command: one table of commands, each with its arguments and its body.

A command's module is imported when the command is chosen, so that none pays for another's dependencies. Bad input of any
kind, usage included, is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import OneLineParser, UserError, run_command, unknown_choice
from ..run_folder import EXTRA_KEY
from ..version import __version__

MODEL_HELP = "effzoo_* or timm name, model or run folder, local-dir:FOLDER, hf-hub:USER/NAME"
DRAWN_CLASSES = 3


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Raises `UserError` for what the user can mend."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 after one line on stderr for what the user can mend."""
    try:
        return run_command(lambda: _dispatch(sys.argv[1:] if argv is None else list(argv)))
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0


def _dispatch(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="effzoo",
        description="Efficient vision transformers: list, inspect, run and measure them.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {command.help}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"effvit_zoo {__version__}")
    parser.add_argument("command", nargs="?", help="one of the commands below; `effzoo COMMAND --help` explains it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.command is None:
        parser.print_help()
        return
    if chosen.command not in COMMANDS:
        raise unknown_choice("command", chosen.command, list(COMMANDS))
    command = COMMANDS[chosen.command]
    arguments = OneLineParser(prog=f"effzoo {chosen.command}", description=_sentence(command.help))
    command.add_arguments(arguments)
    try:
        command.run(arguments.parse_args(chosen.arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # `effzoo list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "filter", nargs="*", metavar="FILTER", help="part of a name, or a pattern with * and ?; all must match"
    )
    parser.add_argument("--family", help="one family only, e.g. swiftformer")
    parser.add_argument("--pretrained", action="store_true", help="only models that have weights")
    parser.add_argument("--max-params", type=float, metavar="M", help="at most so many million parameters")
    parser.add_argument("--max-macs", type=float, metavar="G", help="at most so many billion multiply-accumulates")
    _add_format_arguments(parser)


def _list(args: argparse.Namespace) -> None:
    from .. import list_models

    known = list_models()
    families = {name: _family(name) for name in known}
    if args.family and args.family not in families.values():
        raise unknown_choice("family", args.family, sorted(set(families.values())))
    names = [
        name
        for name in known
        if (not args.family or families[name] == args.family)
        and all(fnmatch(name, text if set(text) & set("*?[") else f"*{text}*") for text in args.filter)
    ]
    rows = [row for name in names if (not args.pretrained or _weights(name)) and (row := _cost_row(name, args))]
    if not rows:
        if len(args.filter) == 1 and not names and not args.family:
            raise unknown_choice("model", args.filter[0], known)
        raise UserError(f"none of the {len(known)} models matches")
    if args.json or args.csv:
        _print_rows(rows, args)
        return
    _print_table(
        ["model", "params, M", "MACs, G", "input", "weights"],
        [
            [
                row["model"],
                _figures(row["params"] / 1e6),
                _figures(row["macs"] / 1e9),
                " x ".join(map(str, row["input_size"][1:])),
                ", ".join(row["weights"]) or "-",
            ]
            for row in rows
        ],
        right=(1, 2),
        output=args.output,
    )


def _cost_row(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """A model's row, or None where it is over the limits. MACs are counted only where the parameters are within theirs."""
    from timm.models import get_model_input_config

    from ..measure import cost

    model = cost.skeleton(name)
    params = cost.count_params(model)
    if args.max_params is not None and params > args.max_params * 1e6:
        return None
    macs = cost.count_macs(model)
    if args.max_macs is not None and macs > args.max_macs * 1e9:
        return None
    return {
        "model": name,
        "family": _family(name),
        "params": params,
        "macs": macs,
        "input_size": list(get_model_input_config(model)["input_size"]),
        "weights": _weights(name),
    }


def _family(name: str) -> str:
    """The module that a model is defined in, e.g. "swiftformer"."""
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def _weights(name: str) -> list[str]:
    """Tags of a model's weights."""
    from timm.models import get_arch_pretrained_cfgs

    return [cfg.tag or "default" for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights]


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _info(args: argparse.Namespace) -> None:
    facts = model_facts(args.model)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print_table([], [[key.replace("_", " "), _as_text(key, value)] for key, value in facts.items()])


def model_facts(name: str) -> dict[str, Any]:
    """What is known of a model without its weights: from its registration, its config and its structure.

    Facts that are not recorded anywhere are left out. Raises `UserError` as `hub.load` does.
    """
    from timm.data import resolve_model_data_config
    from timm.models import get_arch_pretrained_cfgs, get_model_input_config, model_entrypoint

    from .. import hub
    from ..measure import cost

    resolved = hub.resolve_name(name)
    model: Any = hub.load(name, pretrained=False, device="meta")
    cfg, data = model.pretrained_cfg, resolve_model_data_config(model)
    architecture = cfg["architecture"]
    config = hub.read_config(resolved) if hub.brings_weights(resolved) else {}
    facts = {
        "model": resolved,
        "architecture": architecture,
        "family": _family(architecture),
        "description": _first_paragraph(model_entrypoint(architecture).__doc__),
        "params": cost.count_params(model),
        "macs": cost.count_macs(model),
        "input_size": list(data["input_size"]),
        "any_input_size": not get_model_input_config(model)["fixed_input_size"],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        "num_classes": model.num_classes,
        "labels": list(hub.label_names(model) or ()),
        "num_features": model.num_features,
        "features": [
            {"module": info["module"], "channels": info["num_chs"], "stride": info["reduction"]}
            for info in getattr(model, "feature_info", [])
        ],
        "paper": _papers(cfg.get("paper_ids")),
        "paper_title": cfg.get("paper_name"),
        "code": cfg.get("origin_url"),
        "license": cfg.get("license"),
        "measured": config.get(EXTRA_KEY),
        "weights": [
            {"tag": known.tag, "from": known.hf_hub_id or known.url or known.file, "license": known.license}
            for known in get_arch_pretrained_cfgs(architecture).values()
            if known.has_weights
        ],
    }
    return {key: value for key, value in facts.items() if value not in (None, [], {}, "")}


def _papers(ids: object) -> list[str]:
    """`arXiv:2303.15446` and the like as addresses."""
    listed = [ids] if isinstance(ids, str) else list(ids or ())  # type: ignore[call-overload]
    return [f"https://arxiv.org/abs/{text.partition(':')[2]}" if text.startswith("arXiv:") else text for text in listed]


def _as_text(key: str, value: Any) -> str:
    """A fact as people read it."""
    if key == "params":
        return f"{value / 1e6:.2f} M"
    if key == "macs":
        return f"{value / 1e9:.3f} G"
    if key == "input_size":
        return " x ".join(map(str, value))
    if key == "labels":
        return ", ".join(value[:10]) + (f", ... ({len(value)} in all)" if len(value) > 10 else "")
    if key == "features":
        return "\n".join(f"{f['module']}: {f['channels']} channels, stride {f['stride']}" for f in value)
    if key == "weights":
        return "\n".join(
            f"{w['tag'] or 'default'}: {w['from']}" + (f" ({w['license']})" if w["license"] else "") for w in value
        )
    if isinstance(value, dict):
        return "\n".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders to search for them")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--topk", type=_positive, default=5, metavar="K", help="classes per picture (default: %(default)s)"
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write each picture with its best classes below it")
    parser.add_argument(
        "--show-tokens",
        action="store_true",
        help="of a ToSA-ViT: write PICTURE.tokens.png, which tokens each ToSA layer kept, into --draw (default: here)",
    )
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    _add_format_arguments(parser)


def _predict(args: argparse.Namespace) -> None:
    from .. import hub
    from ..data.images import BadImage, find_images
    from ..evaluation.prediction import predict

    device = _device(args.device)

    def note(error: BadImage) -> None:
        print(f"skipped: {error}", file=sys.stderr)

    paths: list[Path] = []
    for given in args.images:
        try:
            paths.extend(find_images([given]))
        except BadImage as error:
            note(error)
    if not paths:
        raise UserError("there is no picture to classify")
    model = hub.load(args.model, pretrained=True)
    drawing = _Drawing(args.draw, args.images) if args.draw else None
    rows: list[dict[str, Any]] = []
    options = {"topk": max(args.topk, DRAWN_CLASSES if drawing else 0), "batch_size": args.batch_size, "device": device}
    for prediction in predict(model, paths, on_bad=note, **options):
        if drawing:
            drawing.draw(prediction)
        rows.extend(
            {"image": str(prediction.image), "rank": rank + 1, "label": label, "index": index, "probability": share}
            for rank, (label, index, share) in enumerate(
                zip(prediction.labels, prediction.indices, prediction.probabilities, strict=True)
            )
            if rank < args.topk
        )
    if not rows:
        raise UserError(f"none of the {len(paths)} pictures could be read")
    if args.show_tokens:
        _show_tokens(model, list(dict.fromkeys(row["image"] for row in rows)), args.draw or Path())
    if args.json or args.csv:
        _print_rows(_per_image(rows) if args.json else rows, args)
        return
    table = [
        [row["image"] if row["rank"] == 1 else "", f"{100 * row['probability']:.1f} %", row["label"]] for row in rows
    ]
    _print_table(["image", "probability", "class"], table, right=(1,), output=args.output)


def _show_tokens(model: Any, images: Sequence[str], folder: Path) -> None:
    from ..evaluation.prediction import token_maps
    from ..viz.selection import selected_tokens

    model = model.to("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        seen, layers = token_maps(model, Path(image))
        target = folder / f"{Path(image).stem}.tokens.png"
        title = f"What enters the ToSA layers: {Path(image).name}"
        selected_tokens(
            seen, layers, title, f"attention ratio {model.attention_ratio:g}, chosen by its selectors", target
        )
        print(f"tokens: {target}", file=sys.stderr)


def _per_image(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per picture, its classes in a list."""
    images: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        entry = {key: row[key] for key in ("label", "index", "probability")}
        images.setdefault(row["image"], []).append(entry)
    return [{"image": image, "classes": classes} for image, classes in images.items()]


class _Drawing:
    """Writes annotated pictures into a folder; pictures from a searched folder keep their place below it."""

    def __init__(self, folder: Path, given: Sequence[str]) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--draw {folder} is a file, expected a folder or nothing")
        self.folder = folder
        self.roots = [Path(path) for path in given if Path(path).is_dir()]
        self.taken: set[Path] = set()

    def draw(self, prediction: Any) -> None:
        from ..data.images import open_image
        from ..viz.predictions import annotate

        labels, shares = prediction.labels[:DRAWN_CLASSES], prediction.probabilities[:DRAWN_CLASSES]
        target = self._target(prediction.image)
        target.parent.mkdir(parents=True, exist_ok=True)
        annotate(open_image(prediction.image), labels, shares).save(target)

    def _target(self, image: Path) -> Path:
        """A PNG file of the picture's name that no other picture of this run has."""
        root = next((root for root in self.roots if image.is_relative_to(root)), image.parent)
        target = self.folder / image.relative_to(root)
        number, candidate = 1, target.with_suffix(".png")
        while candidate in self.taken:
            number += 1
            candidate = target.with_name(f"{target.stem}-{number}.png")
        self.taken.add(candidate)
        return candidate


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
    return name


def _add_format_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print as JSON")
    form.add_argument("--csv", action="store_true", help="print as CSV")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to a file instead of printing")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _print_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Rows as JSON or CSV, with `args` as `_add_format_arguments` makes them."""
    _emit(json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if args.json else _csv(rows), args.output)


def _csv(rows: list[dict[str, Any]]) -> str:
    """A line per row; lists within a row are joined by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()})
    return text.getvalue()


def _emit(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def _print_table(
    header: list[str], rows: list[list[str]], right: Sequence[int] = (), output: Path | None = None
) -> None:
    """An aligned table; without a header, of names and their values. Never wrapped or cut where it doesn't go to a screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=bool(header), header_style="bold", padding=(0, 3, 0, 0))
    for index in range(len(rows[0])):
        title = header[index] if header else ""
        style = "cyan" if index == 0 else None
        table.add_column(title, justify="right" if index in right else "left", style=style, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    text = io.StringIO()
    to_screen = output is None and sys.stdout.isatty()
    console = Console() if to_screen else Console(file=text, width=10_000)
    console.print(table)
    if not to_screen:
        _emit("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()), output)


def _figures(value: float) -> str:
    """Two decimals, or three significant figures below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _first_paragraph(doc: str | None) -> str | None:
    return " ".join(doc.strip().split("\n\n")[0].split()) if doc else None


def _from_module(help_text: str, module: str) -> Command:
    """A command whose module (below effvit_zoo) has `add_arguments` and `run`; it is imported when the command is chosen."""

    def load() -> Any:
        return importlib.import_module(f"effvit_zoo.{module}")

    return Command(help_text, lambda parser: load().add_arguments(parser), lambda args: load().run(args))


COMMANDS = {
    "list": Command("the models of the zoo with their cost and weights", _list_arguments, _list),
    "info": Command("all that is known of one model", _info_arguments, _info),
    "predict": Command("classify pictures with any model", _predict_arguments, _predict),
    "validate": _from_module("measure a model's accuracy and speed on a data set", "evaluation.compare"),
    "benchmark": _from_module("measure speed and memory against timm's own models", "benchmark.command"),
    "push": _from_module("publish a model folder on the Hub, with its card", "commands.push"),
    "pull": _from_module("download a model from the Hub into a folder and verify it", "commands.pull"),
    "weights": _from_module("list the published weights, or check them on the Hub", "commands.weights"),
    "convert": _from_module("turn a checkpoint file of an official repository into a model folder", "commands.convert"),
}

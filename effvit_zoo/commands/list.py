"""`effzoo list`: the models of the zoo, filtered by name, family and cost."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from typing import Any

from timm.models import get_model_input_config

from ..errors import UserError, unknown_choice
from ..measure import cost
from ..report.rows import add_format_arguments, figures, print_rows, print_table, shown
from ._registry import family, model_names, weight_tags

HELP = "the models of the zoo with their cost and weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "filter", nargs="*", metavar="FILTER", help="part of a name, or a pattern with * and ?; all must match"
    )
    parser.add_argument("--family", help="one family only, e.g. swiftformer")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    parser.add_argument("--max-params", type=float, metavar="M", help="at most M million parameters")
    parser.add_argument("--max-macs", type=float, metavar="G", help="at most G billion multiply-accumulates")
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> None:
    known = model_names()
    families = {name: family(name) for name in known}
    if args.family and args.family not in families.values():
        raise unknown_choice("family", args.family, sorted(set(families.values())))
    patterns = [text if set(text) & set("*?[") else f"*{text}*" for text in args.filter]
    names = [
        name
        for name in known
        if (not args.family or families[name] == args.family) and all(fnmatch(name, pattern) for pattern in patterns)
    ]
    if len(args.filter) == 1 and not names and not args.family:
        raise unknown_choice("model", args.filter[0], known)
    if args.pretrained:
        names = [name for name in names if weight_tags(name)]
    rows = [row for name in names if (row := _row(name, args.max_params, args.max_macs))]
    if not rows:
        raise UserError(f"none of the {len(known)} models matches")
    if args.json or args.csv:
        print_rows(rows, args.json, args.output)
        return
    cells = [
        [
            row["model"],
            figures(row["params"] / 1e6),
            figures(row["macs"] / 1e9),
            shown(row["input_size"][1:]),
            ", ".join(row["weights"]) or "-",
        ]
        for row in rows
    ]
    print_table(["model", "params, M", "MACs, G", "input", "weights"], cells, right=(1, 2), output=args.output)


def _row(name: str, max_params: float | None, max_macs: float | None) -> dict[str, Any] | None:
    """A model's row, or None if it exceeds a limit (million parameters, billion MACs). MACs are counted last, as they take time."""
    model = cost.skeleton(name)
    params = cost.count_params(model)
    if max_params is not None and params > max_params * 1e6:
        return None
    macs = cost.count_macs(model)
    if max_macs is not None and macs > max_macs * 1e9:
        return None
    return {
        "model": name,
        "family": family(name),
        "params": params,
        "macs": macs,
        "input_size": [*get_model_input_config(model)["input_size"]],
        "weights": weight_tags(name),
    }

"""`effzoo push`: publishes a model folder, or a page for browsers, on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..run_folder import ARCHITECTURE_KEY

HELP = "publish a model folder on the Hub, with its card, or a page as a Space"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo push`."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="a model folder, a run folder (stands for its best/), or a page"
    )
    parser.add_argument("name", metavar="USER/NAME", help="target repository, created if missing")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="make it private")
    visibility.add_argument("--public", action="store_false", dest="private", help="make it public")
    parser.add_argument("--revision", metavar="BRANCH", help="target branch, created if missing")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights, e.g. apache-2.0 (default: what is recorded)"
    )
    parser.add_argument(
        "--space", action="store_true", help="FOLDER is a page of effzoo export --to web: publish it as a static Space"
    )
    parser.add_argument("--message", metavar="TEXT", help="commit message")


def run(args: argparse.Namespace) -> None:
    """Pushes and prints the commit's address. Raises `UserError`."""
    from .. import hub
    from ..tasks import card_facts

    if args.space:
        for name in ("revision", "license"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is not for a Space, expected none")
        print(hub.push_page(args.folder, args.name, private=args.private, message=args.message))
        return

    pushed: dict[str, Any] = {}

    def describe(config: Mapping[str, Any]) -> hub.CardFacts:
        pushed.update(config)
        return card_facts(config)

    options = {"private": args.private, "revision": args.revision, "license": args.license, "message": args.message}
    address = hub.push(args.folder, args.name, describe, **options)
    place = f"{args.name}@{args.revision}" if args.revision else args.name
    how = "by timm too" if ARCHITECTURE_KEY in pushed else "after import effvit_zoo"
    print(f"{address}: to be used as {hub.HUB}{place}, {how}")

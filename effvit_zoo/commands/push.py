"""`effzoo push`: publishes a model folder on the Hub."""

from __future__ import annotations

import argparse

HELP = "publish a model folder on the Hub, with its card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `effzoo push`."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or a run folder (stands for its best/)")
    parser.add_argument("name", metavar="USER/NAME", help="target repository, created if missing")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="make it private")
    visibility.add_argument("--public", action="store_false", dest="private", help="make it public")
    parser.add_argument("--revision", metavar="BRANCH", help="target branch, created if missing")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the weights, e.g. apache-2.0 (default: what is recorded)"
    )
    parser.add_argument("--message", metavar="TEXT", help="commit message")


def run(args: argparse.Namespace) -> None:
    """Pushes and prints the commit's address. Raises `UserError`."""
    from .. import hub
    from ..tasks import card_facts

    options = {"private": args.private, "revision": args.revision, "license": args.license, "message": args.message}
    address = hub.push(args.folder, args.name, card_facts, **options)
    place = f"{args.name}@{args.revision}" if args.revision else args.name
    print(f"{address}: to be used as {hub.HUB}{place}, see its card")

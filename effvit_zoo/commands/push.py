"""`effzoo push`."""

from __future__ import annotations

import argparse

HELP = "publish a model folder on the Hub, with its card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or a run folder, of which best/ is meant")
    parser.add_argument("name", metavar="USER/NAME", help="where to; created if it isn't there")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_true", default=None, help="only for those who are granted access"
    )
    visibility.add_argument("--public", action="store_false", dest="private", help="for everyone")
    parser.add_argument("--revision", metavar="BRANCH", help="push to a branch, created if it isn't there")
    parser.add_argument("--license", metavar="ID", help="of the weights, e.g. apache-2.0 (default: what is recorded)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def run(args: argparse.Namespace) -> None:
    from .. import hub

    address = hub.push(
        args.folder,
        args.name,
        private=args.private,
        revision=args.revision,
        license=args.license,
        message=args.message,
    )
    place = f"{args.name}@{args.revision}" if args.revision else args.name
    print(f"{address}: to be used as {hub.HUB}{place}, after import effvit_zoo")

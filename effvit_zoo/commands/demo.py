"""`effzoo demo`: a model as a page in the browser of this machine."""

from __future__ import annotations

import argparse
import tempfile
import webbrowser
from pathlib import Path

from ..errors import UserError, whole
from ._arguments import MODEL_HELP

HELP = "show a model as a page in this machine's browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--pretrained", action="store_true", help="with a model name: its published weights")
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="photos to take samples from, as data.root in a config (default: embedded images)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="FOLDER",
        help="the npm package onnxruntime-web, unpacked (default: a public CDN)",
    )
    parser.add_argument("--port", type=whole(0), default=0, metavar="N", help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")


def run(args: argparse.Namespace) -> None:
    """Exports into a temporary folder and serves it until Ctrl-C. Raises `UserError`."""
    from ..export.page import export_page
    from ..export.serve import make_server

    with tempfile.TemporaryDirectory(prefix="effzoo-demo-") as place:
        folder = Path(place) / "page"
        export_page(args.model, folder, runtime=args.runtime, data=args.data, pretrained=args.pretrained or None)
        try:
            server = make_server(folder, args.port)
        except OSError as error:
            raise UserError(f"--port {args.port}: {error.strerror}, expected a free port or 0") from None
        with server:
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            print(f"{address}: {args.model}, until Ctrl-C", flush=True)
            if not args.no_browser:
                webbrowser.open(address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()

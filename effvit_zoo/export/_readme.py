"""The README of a folder of exported files: a section for each, from its target's row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import TARGETS

HEAD = """\
# {architecture}

Exported by effvit_zoo {version} from weights {weights}. Images are {height} x {width} pixels; `preprocessing.py` reads a file as the model
takes it (numpy and Pillow are all it needs), `labels.txt` has the names of the outputs, and `export.json` everything else that is known.
Run the snippets in this folder.
"""


def readme(record: Mapping[str, Any]) -> str:
    """The text, for the content of export.json."""
    _, height, width = record["preprocessing"]["input_size"]
    facts = {"architecture": record["architecture"], "version": record["effvit_zoo"], "height": height, "width": width}
    head = HEAD.format(**facts, weights=record["weights_sha256"][:8])
    return "\n".join([head, *(_section(name, entry) for name, entry in record["files"].items())])


def _section(name: str, entry: Mapping[str, Any]) -> str:
    entry_input = entry["input"]
    is_pixels = entry_input["dtype"] == "uint8"
    fewest, most = entry["batch"]
    calls = "one image" if most == 1 else f"{fewest} to {most} images"
    facts = [
        f"Input `{entry_input['name']}`: {entry_input['dtype']} {entry_input['layout']}, {calls} of a call; "
        f"precision {entry['precision']}. {_proof(entry)}"
    ]
    code = TARGETS[entry["target"]].readme.format(
        file=name,
        input=entry_input["name"],
        output=entry["outputs"][0]["name"],
        reader="read_pixels" if is_pixels else "read_image",
        element="u8" if is_pixels else "f32",
        shape=", ".join(str(side or 1) for side in entry_input["shape"]),
    )
    return "\n".join([f"## {name}", "", *facts, "", code])


def _proof(entry: Mapping[str, Any]) -> str:
    """How the file compares with the model in torch, in a sentence."""
    found = entry.get("agreement")
    if not found:
        return "It was not run where it was made."
    same = f", the same class for {found['same_class']:.1f} % of them" if found.get("same_class") is not None else ""
    return f"On {found['images']} images it differs from the model by at most {found['largest_error']:.1e}{same}."

#!/usr/bin/env python
"""Writes the files from which `effzoo` answers without torch: models, settings, and the JSON schema of a run.

python tools/index.py [settings] [schema] [models]     # all, or some of them
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effvit_zoo
from effvit_zoo.commands import _index, config, info
from effvit_zoo.run_folder import write_text
from effvit_zoo.training.config import CONFIGS


def lines_of(content: Any, depth: int) -> str:
    """JSON in which each entry of the mappings and lists of the first levels is a line of its own."""
    if depth == 0 or not content:
        return json.dumps(content, ensure_ascii=False)
    inner = (lines_of(item, depth - 1) for item in (content.values() if isinstance(content, dict) else content))
    if isinstance(content, dict):
        return (
            "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in zip(content, inner, strict=True)) + "\n}"
        )
    return "[\n" + ",\n".join(inner) + "\n]"


def models() -> str:
    return lines_of({name: info.model_facts(name) for name in effvit_zoo.list_models()}, 1) + "\n"


FILES: dict[str, tuple[Path, Callable[[], str]]] = {
    "settings": (_index.SETTINGS, lambda: lines_of(config.run_settings(), 2) + "\n"),
    "schema": (CONFIGS / "run.schema.json", config.schema_text),
    "models": (_index.MODELS, models),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or FILES:
        path, text = FILES[name]
        write_text(path, text())

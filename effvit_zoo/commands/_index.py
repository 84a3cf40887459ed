"""What this package's models and settings are, without torch: two generated files, written by `tools/index.py`.

Tests compare them with timm's registry and with the schema of a run.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import unknown_choice

ASSETS = Path(__file__).parent.parent / "assets"
MODELS, SETTINGS = ASSETS / "models.json", ASSETS / "settings.json"


@cache
def models() -> dict[str, dict[str, Any]]:
    """Name -> facts of every model of this package, see `info.model_facts`."""
    return json.loads(MODELS.read_text(encoding="utf-8"))


@cache
def settings() -> dict[str, Any]:
    """Sections and settings of a run, see `config.run_settings`."""
    return json.loads(SETTINGS.read_text(encoding="utf-8"))


@cache
def timm_names() -> list[str]:
    """Names of timm's own models, read from the text of its files."""
    spec = importlib.util.find_spec("timm")
    folder = Path(spec.origin or "").parent / "models" if spec else Path()
    texts = (path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    return sorted(name for text in texts for name in re.findall(r"^@register_model\ndef (\w+)", text, re.MULTILINE))


def require_known(name: str) -> None:
    """Raises `UserError` for a plain name that no model has, before torch is imported to find that out."""
    plain = re.fullmatch(r"\w+(\.\w+)?", name) and not Path(name).exists()
    known = [*models(), *timm_names()]
    if plain and "timm" not in sys.modules and name.partition(".")[0] not in known:
        raise unknown_choice("model", name, known)

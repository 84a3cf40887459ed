"""Imports go downward only, siblings leave each other alone, and heavy or optional packages stay in the room that owns them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "effvit_zoo"
FILES = sorted(ROOT.rglob("*.py"))

GROUND = {"errors", "version", "images", "config", "hub_client"}
"""Modules without any idea of a network: everyone may use them."""

ALLOWED = {
    "attention": set(),
    "models": {"attention"},
    "cost": set(),
    "card": set(),
    "publish": {"card"},
    "hub": {"models", "publish"},
    "published": {"hub", "cost"},
    "convert": {"models", "hub"},
    "inference": {"attention", "models", "export"},
    "viz": {"models"},
    "prediction": {"models", "hub", "viz"},
    "benchmark": {"attention", "models", "hub", "cost", "inference", "viz", "training", "export"},
    "export": {"models", "hub", "cost"},
    "training": {"models", "hub", "cost", "viz", "export"},
    "pipelines": {"training", "models", "hub", "cost", "viz", "benchmark"},
    "cli": {
        "models",
        "hub",
        "published",
        "cost",
        "convert",
        "viz",
        "prediction",
        "benchmark",
        "export",
        "training",
        "pipelines",
    },
    "__init__": {"attention", "models", "inference"},
    "__main__": {"cli"},
}
"""Room -> rooms that it may import from, besides itself and the ground."""

OWNERS = {
    "accelerate": {"training", "pipelines"},
    "matplotlib": {"viz"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "openvino": {"export"},
    "executorch": {"export"},
    "coremltools": {"export"},
}
"""Third-party package -> rooms that may import it."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full dotted names of what a file imports; names taken from a package count as its modules too."""
    package = ("effvit_zoo", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = room(path)
    assert here in ALLOWED | dict.fromkeys(GROUND), f"{here} has no row in ALLOWED"
    allowed = GROUND | ALLOWED.get(here, set()) | {here}
    for name in imports(path):
        parts = name.split(".")
        if (
            parts[0] == "effvit_zoo"
            and len(parts) > 1
            and (ROOT / parts[1]).with_suffix("").exists() | (ROOT / f"{parts[1]}.py").exists()
        ):
            assert parts[1] in allowed, f"{path.name} imports {name}"
        if parts[0] in OWNERS:
            assert here in OWNERS[parts[0]], f"{path.name} imports {name}"


def test_siblings_of_a_table_do_not_import_each_other():
    """Mechanisms and families share through underscored files only."""
    for folder in ("attention", "models"):
        files = {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_")}
        for name in files:
            for imported in imports(ROOT / folder / f"{name}.py"):
                parts = imported.split(".")
                if parts[:2] == ["effvit_zoo", folder] and len(parts) > 2:
                    assert parts[2] == name or parts[2] not in files, f"{folder}/{name}.py imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

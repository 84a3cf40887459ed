"""Rooms import only from rooms before them, siblings leave each other alone, and heavy packages stay with their owners."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "effvit_zoo"
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

ROOMS = [
    *("errors", "version", "measure", "run_folder", "viz", "config"),
    *("attention", "data", "models", "hub", "tasks", "evaluation", "export", "report"),
    *("training", "pipelines", "benchmark", "commands", "cli", "__init__", "__main__"),
]
"""In order: a room may import from those before it."""

OWNERS = {
    "accelerate": ["training/*", "evaluation/*"],
    "jinja2": ["report/*"],
    "matplotlib": ["viz/*"],
    "onnxruntime": ["export/onnx.py"],
    "openvino": ["export/openvino.py"],
    "executorch": ["export/executorch.py"],
    "coremltools": ["export/coreml.py"],
    "ai_edge_litert": ["export/litert.py"],
    "litert_torch": ["export/litert.py"],
    "pydantic": ["config/*", "*/config.py", "tasks/*", "pipelines/*"],
    "shtab": ["commands/completion.py"],
}
"""Third-party package -> patterns of the files that may import it."""

TABLES = ["attention", "models", "data/roots", "tasks", "export", "pipelines", "commands"]
"""Folders whose files are rows of a table. They share through underscored files and contract.py; the table imports all."""

EXCEPTIONS = {
    ("commands/train.py", "commands/config.py"): "the help of train lists the settings of config",
    ("export/folder.py", "export/parity.py"): "a folder holds what was proven",
    ("export/page.py", "export/folder.py"): "a page holds an exported file",
    ("export/page.py", "export/parity.py"): "its samples are of the images that the file was proven on",
    ("export/optimize.py", "export/deployed.py"): "the fastest form is a deployed model",
    ("export/optimize.py", "export/onednn.py"): "packed weights are one of the forms",
}
"""(importing, imported) siblings, and why."""

TASK_WORDS = re.compile("top1|confusion|class_names|num_classes")
TASK_FREE = ["training/*", "report/*", "hub/folder.py"]
"""Where only the task contract may speak of classes."""
CONTRACT_NAMES = {"hub/folder.py": {"num_classes"}}
"""File -> names in it that are timm's or the contract's."""

MAX_FUNCTION, MAX_FILE = 50, 450
"""Lines. Constructors, and the files of model families, may be longer."""


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """Full dotted names of what a file imports, packages that it imports by a literal name included."""
    package = ("effvit_zoo", *Path(name).parts[:-1])
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "need"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return frozenset(found)


def room(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def room_of_import(imported: str) -> str | None:
    """The room that a dotted name lies in, None for another package's. What the package itself defines is in `__init__`."""
    package, *parts = imported.split(".")
    if package != "effvit_zoo":
        return None
    return parts[0] if parts and parts[0] in ROOMS else "__init__"


def file_of_import(imported: str) -> str | None:
    """The file that a dotted name of this package stands for or lies in, relative to the package."""
    parts = imported.split(".")[1:] if imported.startswith("effvit_zoo.") else []
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        if f"{path}.py" in NAMES:
            return f"{path}.py"
        if f"{path}/__init__.py" in NAMES:
            return f"{path}/__init__.py"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_to_rooms_before(name):
    here = room(name)
    assert here in ROOMS, f"{here} has no place in ROOMS"
    for imported in imports(name):
        there = room_of_import(imported)
        if there is not None and there != here:
            assert ROOMS.index(there) < ROOMS.index(here), f"{name} imports {imported}"


def test_every_room_is_there():
    assert {room(name) for name in NAMES} == set(ROOMS)


@pytest.mark.parametrize("package", OWNERS)
def test_packages_stay_with_their_owners(package):
    users = {name for name in NAMES if any(imported.split(".")[0] == package for imported in imports(name))}
    strangers = {name for name in users if not any(fnmatch(name, pattern) for pattern in OWNERS[package])}
    assert not strangers, f"{package} is imported by {sorted(strangers)}"
    unused = [pattern for pattern in OWNERS[package] if not any(fnmatch(name, pattern) for name in users)]
    assert not unused, f"no file of {unused} imports {package}"


def sibling_imports(folder: str) -> Iterator[tuple[str, str]]:
    """(importing, imported) files of a table, without those that are there to be shared, and without the table itself."""
    rows = {name for name in NAMES if str(Path(name).parent) == folder}
    rows = {name for name in rows if not Path(name).name.startswith("_") and Path(name).name != "contract.py"}
    for name in rows:
        for imported in map(file_of_import, imports(name)):
            if imported in rows - {name}:
                yield name, imported


def test_siblings_of_a_table_do_not_import_each_other():
    found = {pair for folder in TABLES for pair in sibling_imports(folder)}
    assert found == set(EXCEPTIONS)


def test_sizes_of_files():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in NAMES}
    long = {name: length for name, length in lengths.items() if length > MAX_FILE and room(name) != "models"}
    assert not long


def test_sizes_of_functions():
    long = {
        f"{name}:{node.name}": length
        for name in NAMES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__"
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    }
    assert not long


def test_only_tasks_speak_of_classes():
    found: dict[str, set[str]] = {}
    for name in NAMES:
        if any(fnmatch(name, pattern) for pattern in TASK_FREE):
            words = set(TASK_WORDS.findall((ROOT / name).read_text(encoding="utf-8")))
            found |= {name: words} if words else {}
    assert found == CONTRACT_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_file_opens_with_what_it_is(name):
    assert ast.get_docstring(tree(name))

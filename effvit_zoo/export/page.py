"""A model as a folder of static files: a page that classifies images in the browser, on the device of whoever opens it.

index.html  app.js  preprocess.js  runtime.js  style.css
model.onnx (or model.onnx.0, .1, ...: no file is larger than `LARGEST`)    takes pixels; the record is inside
page.json      what the page needs to know: preprocessing, labels, files and their sizes, sample images with the model's answers
export.json    the record, as beside all exported files
sample-0.png  sample-1.png
runtime/       ONNX Runtime Web, where a folder of it was given; otherwise the page takes it from a public CDN, by its hash
"""

from __future__ import annotations

import base64
import copy
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import hub
from ..data import MODES, StreamSource, find_images, open_image, open_source, validation_transform
from ..errors import UserError
from ..models.tosa_vit import ToSAViT
from ..run_folder import read_json, require_writable, write_json
from .contract import RECORD
from .folder import export_model
from .parity import EMBEDDED, timm_steps

ASSETS = Path(__file__).with_name("web")
PAGE, RUNTIME = "page.json", "runtime"
LARGEST = 24 * 2**20
"""Bytes of a file: some hosts of static pages refuse files of more than 25 MB."""


def export_page(
    model: nn.Module | str | Path,
    output: str | Path,
    *,
    runtime: str | Path | None = None,
    data: str | None = None,
    title: str | None = None,
    pretrained: bool | None = None,
    images: int = 200,
) -> dict[str, Any]:
    """Writes a page that runs a classification model in the browser.

    Args:
        model: What `effvit_zoo.create_model` takes, or a model of timm's on the CPU.
        output: Folder of the page: a new one, an empty one, or that of an earlier page, which is replaced.
        runtime: The npm package onnxruntime-web of the version that the page is made for, unpacked, or its folder `dist`; the page then
            asks nobody but its own server. None: it is taken from a public CDN.
        data: Photos to prove the model file on and to take sample images from, as for `export_model`.
        title: Heading; None for the architecture's name.
        pretrained: For the name of a model: whether to load its published weights.
        images: Photos to prove the file on.

    Returns:
        The content of page.json.

    Raises:
        UserError: Another version of the runtime, a model that isn't for classification, a folder with other content, or what
            `export_model` raises. The folder is then as it was before.
    """
    folder = Path(output)
    _require_place(folder)
    packaged = read_json(ASSETS / "runtime.json")
    runtime_files = _runtime_files(Path(runtime), packaged) if runtime is not None else {}
    net: Any = (model if isinstance(model, nn.Module) else hub.load(model, pretrained=pretrained)).eval()
    shown = _with_tokens(net)
    with tempfile.TemporaryDirectory(prefix="effzoo-page-") as place:
        writing = Path(place) / "page"
        record = export_model(shown or net, ["onnx"], writing, data=data, input="pixels", images=images)
        _require_fit(record)
        content = _fill(writing, net, record, data, title)
        content["runtime"] = {**packaged, "base": f"{RUNTIME}/"} if runtime_files else packaged
        if shown is not None:
            content["tokens"] = shown.tokens()
        for name, source in runtime_files.items():
            (writing / RUNTIME).mkdir(exist_ok=True)
            shutil.copy(source, writing / RUNTIME / name)
        write_json(writing / PAGE, content)
        _put(writing, folder)
    return content


def _require_fit(record: Mapping[str, Any]) -> None:
    """Raises `UserError` for a model whose outputs a page can't show."""
    if record["task"] != "classification":
        raise UserError(f"a page shows classes, the model is for {record['task']}")
    fewest, most = record["files"]["model.onnx"]["batch"]
    if fewest != 1:
        raise UserError(f"a page runs one image at a time, the model takes {fewest} to {most}")


def _put(writing: Path, folder: Path) -> None:
    """Puts a finished page in the place of an earlier one, which stays if the disk is full."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(writing, beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class _WithTokens(ToSAViT):
    """A ToSA model that says which patches enter its ToSA layers."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Images (B, C, H, W) -> logits (B, classes), and kept (B, layers, patches), 1 for a patch that entered and else 0."""
        tokens, _, entered = self.forward_layers(self.embed(x), [], len(self.blocks) - 1)
        none = torch.zeros(tokens.shape[:2], dtype=tokens.dtype, device=tokens.device)
        kept = [none.scatter(1, index, 1.0)[:, self.num_prefix_tokens :] for index in entered]
        return {"logits": self.forward_head(self.norm(tokens)), "kept": torch.stack(kept, 1)}

    def tokens(self) -> dict[str, Any]:
        """What page.json says of `kept`: names of the layers, and rows and columns of the patches."""
        layers = [f"block {index + 1}" for index in range(1, len(self.blocks), 2)]
        return {"output": "kept", "layers": layers, "grid": [*self.patch_embed.grid_size]}


def _with_tokens(model: nn.Module) -> _WithTokens | None:
    """A copy that says which patches it keeps; None for a model that keeps all."""
    if not isinstance(model, ToSAViT) or model.attention_ratio >= 1:
        return None
    shown = copy.deepcopy(model)
    shown.__class__ = _WithTokens
    return shown  # type: ignore[return-value]


def _require_place(folder: Path) -> None:
    """Raises `UserError` where a page can't be written without losing something else."""
    require_writable(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / PAGE).is_file():
        raise UserError(f"{folder} has other content than a page: name another --output")


def _runtime_files(folder: Path, packaged: Mapping[str, Any]) -> dict[str, Path]:
    """Name -> file of the runtime's files in an unpacked npm package. Raises `UserError` unless they are the ones that the page expects."""
    wanted = f"onnxruntime-web {packaged['version']}: npm install onnxruntime-web@{packaged['version']}"
    description = next(
        (place / "package.json" for place in (folder, folder.parent) if (place / "package.json").is_file()), None
    )
    if description is not None:
        found = read_json(description)
        if (found.get("name"), found.get("version")) != ("onnxruntime-web", packaged["version"]):
            raise UserError(f"--runtime {folder} is {found.get('name')} {found.get('version')}, expected {wanted}")
    dist = folder / "dist" if (folder / "dist").is_dir() else folder
    for name, entry in packaged["files"].items():
        path = dist / name
        if not path.is_file():
            raise UserError(f"--runtime {folder}: there is no {name} in {dist}, expected {wanted}")
        digest = base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()
        if entry["integrity"] != f"sha384-{digest}":
            raise UserError(f"--runtime {folder}: {path} is not that of {wanted}")
    return {name: dist / name for name in packaged["files"]}


def _fill(folder: Path, model: Any, record: Mapping[str, Any], data: str | None, title: str | None) -> dict[str, Any]:
    """Makes a folder with an exported file a page; what page.json says of it."""
    entry = record["files"]["model.onnx"]
    for path in ASSETS.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            shutil.copy(path, folder)
    labels = (
        record["label_descriptions"] or record["labels"] or [f"class {index}" for index in range(record["num_classes"])]
    )
    parts = _split(folder / entry["name"])
    for name in ("README.md", "preprocessing.py", "labels.txt"):  # they are about the file for programs
        (folder / name).unlink()
    return {
        "title": title or str(record["architecture"]),
        "architecture": record["architecture"],
        "license": record["license"],
        "labels": labels,
        "preprocessing": {**record["preprocessing"], "tall_first": _tall_first()},
        "output": entry["outputs"][0]["name"],
        "models": [{"precision": entry["precision"], "bytes": sum(part["bytes"] for part in parts), "parts": parts}],
        "samples": _samples(folder, model, record, data),
        "record": RECORD,
    }


def _split(path: Path) -> list[dict[str, Any]]:
    """Cuts a file that is too large into parts beside it; names and sizes."""
    size = path.stat().st_size
    if size <= LARGEST:
        return [{"file": path.name, "bytes": size}]
    content = path.read_bytes()
    parts = []
    for index, start in enumerate(range(0, size, LARGEST)):
        part = path.with_name(f"{path.name}.{index}")
        part.write_bytes(content[start : start + LARGEST])
        parts.append({"file": part.name, "bytes": part.stat().st_size})
    path.unlink()
    return parts


@torch.inference_mode()
def _samples(folder: Path, model: Any, record: Mapping[str, Any], data: str | None) -> list[dict[str, Any]]:
    """Writes sample images; their names and the model's logits for them."""
    steps = timm_steps(record)
    transform = validation_transform(steps)
    found = []
    for number, image in enumerate(_sample_images(data, MODES[steps["input_size"][0]])):
        name = f"sample-{number}.png"
        image.save(folder / name)
        found.append({"file": name, "logits": model(transform(image)[None])[0].tolist()})
    return found


def _sample_images(data: str | None, mode: str) -> list[Image.Image]:
    """The first and the last image of the data; of the embedded images where there is none, or where it is a stream."""
    try:
        source = open_source(data or EMBEDDED, img_mode=mode)
    except UserError:  # a folder of images without classes
        paths = [*find_images([data or EMBEDDED])]
        return [open_image(path, mode=mode) for path in (paths[0], paths[-1])]
    if isinstance(source, StreamSource):
        return _sample_images(None, mode)
    return [source.load(index)[0] for index in (0, len(source) - 1)]


def _tall_first() -> bool:
    """Whether this Pillow resizes the columns first where they shrink more than the rows, as version 13 began to: it decides roundings."""
    image = Image.frombytes("L", (8, 32), bytes((37 * index * index) % 251 for index in range(256)))
    bicubic = Image.Resampling.BICUBIC
    return image.resize((16, 8), bicubic) == image.resize((8, 8), bicubic).resize((16, 8), bicubic)

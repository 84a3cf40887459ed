"""`effvit_zoo.export`: a model as files for several runtimes, each proven to compute what the model does, in one folder that ships."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import hub
from ..errors import UserError, one_line, unknown_choice
from ..measure.progress import progress
from ..run_folder import EXPORT, require_writable, write_json, write_text
from ..tasks import Task, task_of
from . import TARGETS
from ._graph import DTYPES, INPUTS, MOST_IMAGES, Graph, make_graph, output_list
from ._readme import readme
from ._record import common_record, folder_record, read_folder
from .contract import MARK, RECORD, Converted, Record, Target
from .parity import Photos, open_photos, prove, reference

LABELS, README, PREPROCESSING = "labels.txt", "README.md", "preprocessing.py"
IMAGES = 200
"""Photos that files are proven on."""
SLACK = 3
"""Times the weights' size that must be free on the disk."""


@dataclass(frozen=True)
class Options:
    """What files are to be like.

    Attributes:
        input: "tensor", float32 (B, C, H, W), normalised by who calls; or "pixels", uint8 (B, H, W, C), normalised in the graph.
        precision: "fp32", "fp16" or "bf16".
        img_size: Side length of the images in pixels, or (height, width); None for the model's.
        opset: ONNX's; None for the exporter's own.
        images: Photos to prove the files on.
    """

    input: str = "tensor"
    precision: str = "fp32"
    img_size: int | tuple[int, int] | None = None
    opset: int | None = None
    images: int = IMAGES


def export_model(
    model: nn.Module | str | Path,
    targets: Iterable[str],
    output: str | Path | None = None,
    *,
    data: str | None = None,
    pretrained: bool | None = None,
    on_failure: Callable[[str, UserError], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes a model as files for several runtimes, with record, labels, preprocessing code and a README.

    Before a file gets its name, a fresh process opens it and is compared with the model on photos. Other files of the model stay.

    Args:
        model: What `effvit_zoo.create_model` takes, or a model of timm's on the CPU.
        targets: Names in `TARGETS`.
        output: The folder. None: `export` in the folder that `model` names, else `./NAME-export`.
        data: Photos to prove the files on, as `data.root` in a config, or any folder of images. None: the embedded images.
        pretrained: For the name of a model: whether to load its published weights.
        on_failure: Called with the name and error of a target that fails, which is then left out; None raises it.
        options: Of `Options`.

    Returns:
        The content of the folder's export.json, with the folder, and a note on the photos' classes ("" for none).

    Raises:
        UserError: An unknown target or option, one that isn't installed or can't take the model, a file that doesn't agree, a folder
            that is read-only or of other weights, or no such model or data. No file is left half written.
        OSError: The disk is full.
    """
    rows = _targets(targets)
    asked = _options(options)
    folder = Path(output) if output is not None else default_folder(model)
    require_writable(folder)
    source = _Source.load(model, pretrained, asked)
    record = _known_record(folder, source)
    photos = open_photos(source.task, source.common, data, asked.images)
    exporter = _Exporter(source, asked, photos, reference(source.model, photos, source.common, source.outputs), folder)
    for name in progress([*rows], "exporting to"):
        try:
            file, entry = exporter.write(rows[name])
        except UserError as error:
            if on_failure is None:
                raise
            on_failure(name, error)
        else:
            record["files"][file] = entry
            _describe(folder, record)
    return record | {"folder": str(folder), "note": photos.note}


def default_folder(model: nn.Module | str | Path) -> Path:
    """Where files go if nothing else is said: `export` in the folder that the model's name is, else `NAME-export` in the current one."""
    if isinstance(model, nn.Module):
        raise UserError("output: expected a folder for the files of a model that has no name")
    path = Path(str(model).removeprefix(hub.LOCAL)).expanduser()
    if path.is_dir():
        return path / EXPORT
    return Path(f"{str(model).rpartition('/')[2].rpartition(':')[2]}-export")


def _targets(names: Iterable[str]) -> dict[str, Target]:
    """Rows of `TARGETS`, each once. Raises `UserError`."""
    names = [names] if isinstance(names, str) else [*dict.fromkeys(names)]
    for name in names:
        if name not in TARGETS:
            raise unknown_choice("target", name, [*TARGETS])
    if not names:
        raise UserError(f"no target to export to, known: {', '.join(TARGETS)}")
    return {name: TARGETS[name] for name in names}


def _options(given: Mapping[str, Any]) -> Options:
    for name in given:
        if name not in Options.__dataclass_fields__:
            raise unknown_choice("option", name, [*Options.__dataclass_fields__])
    options = Options(**given)
    for name, known in (("input", INPUTS), ("precision", DTYPES)):
        if getattr(options, name) not in known:
            raise unknown_choice(name, str(getattr(options, name)), [*known])
    if options.images < 2:
        raise UserError(f"images: expected at least 2 to compare, got {options.images}")
    return options


@dataclass(frozen=True)
class _Source:
    """The model that is exported, on the CPU in eval mode, and what is known of it."""

    model: Any
    task: Task
    common: Record

    @classmethod
    def load(cls, model: Any, pretrained: bool | None, options: Options) -> _Source:
        """Raises `UserError`."""
        net = copy.deepcopy(model) if isinstance(model, nn.Module) else hub.load(model, pretrained=pretrained)
        if not isinstance(getattr(net, "pretrained_cfg", None), dict) or next(net.parameters(), None) is None:
            raise UserError(f"expected a model made by timm or effvit_zoo, got {type(net).__name__}")
        if (place := next(net.parameters())).device.type != "cpu" or place.dtype != torch.float32:
            raise UserError(f"expected a float32 model on the CPU, got {place.dtype} on {place.device.type}")
        net = net.eval()
        if options.img_size is not None:
            _resize(net, options.img_size)
        return cls(net, task_of(net), common_record(net))

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs: the task's where it has one, or as many as there are."""
        size = self.common["preprocessing"]["input_size"]
        with torch.inference_mode():
            output = self.model(torch.zeros(1, *size))
        if isinstance(output, Mapping):
            return tuple(output)
        count = len(output_list(output, ()))
        return (self.task.output_name, *(f"{self.task.output_name}_{index}" for index in range(1, count)))


def _resize(model: Any, img_size: int | tuple[int, int]) -> None:
    """Makes a model one for images of another size. Raises `UserError`."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    channels = model.pretrained_cfg["input_size"][0]
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(height, width))
        with torch.inference_mode():
            model(torch.zeros(1, channels, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"the model can't take images of {height} x {width} pixels: {one_line(error)}") from None
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, height, width)}


def _known_record(folder: Path, source: _Source) -> dict[str, Any]:
    """The record of a folder with the files that it has of the same model. Raises `UserError` where they are of another one, or the
    disk is too full for a further file."""
    known = read_folder(folder) or folder_record(source.common, {})
    other = [key for key, value in source.common.items() if key != MARK and known.get(key) != value]
    if other:
        raise UserError(
            f"{folder} has files of another model or preprocessing ({other[0]} differs): delete it, or name another --output"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.model.state_dict().values())
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < SLACK * size:
        raise UserError(f"output {folder}: {free / 2**20:.0f} MB are free, {SLACK * size / 2**20:.0f} MB are needed")
    return folder_record(source.common, known["files"])


@dataclass(frozen=True)
class _Exporter:
    """Writes files of one model, one at a time."""

    source: _Source
    options: Options
    photos: Photos
    expected: list[Any]
    folder: Path

    def write(self, target: Target) -> tuple[str, dict[str, Any]]:
        """Writes and proves a file. Returns its name and what the record says of it. Raises `UserError`, and leaves nothing then."""
        try:
            return self._placed(target)
        except UserError as error:
            raise UserError(f"{target.name}: {error}") from error

    def _placed(self, target: Target) -> tuple[str, dict[str, Any]]:
        target.require()
        if self.options.precision not in target.precisions:
            raise UserError(f"it has no {self.options.precision}, expected {' or '.join(target.precisions)}")
        middle = "" if self.options.precision == "fp32" else f".{self.options.precision}"
        name = f"model{middle}{target.suffix}"
        writing = self.folder.with_name(f".{self.folder.name}.writing")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            entry = self._write(target, writing / name)
            entry["bytes"] = sum(file.stat().st_size for file in writing.rglob("*") if file.is_file())
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(writing.iterdir(), reverse=True):  # the weights of an .xml before it
                _move(path, self.folder / path.name)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        return name, entry

    def _write(self, target: Target, path: Path) -> dict[str, Any]:
        graph, converted = self._convert(target)
        entry = self._entry(target, path.name, graph) | dict(converted.facts)
        record = {**self.source.common, "file": entry}
        _save(converted, path, record)
        if not target.elsewhere:
            entry["agreement"] = prove(path, target, self.photos, self.expected, record, self.source.task)
            _save(converted, path, record)  # again, now with the proof in it
        if target.read(path) != record:
            raise UserError("the record read back from the file is another one than was written into it")
        return entry

    def _convert(self, target: Target) -> tuple[Graph, Converted]:
        """For any number of images if the target can and the model lets it, else for one. Raises `UserError`."""
        failure: Exception | None = None
        for batch in (None, 1) if target.any_batch else (1,):
            graph = self._graph(target, batch)
            try:
                return graph, target.convert(graph)
            except UserError:
                raise
            # Whatever a converter raises, it can't take this model: they are compilers with errors of all kinds.
            except Exception as error:
                failure = failure or error
        raise UserError(f"it can't take the model: {one_line(failure)}") from failure

    def _graph(self, target: Target, batch: int | None) -> Graph:
        steps = self.source.common["preprocessing"]
        scaling = (steps["mean"], steps["std"]) if self.options.input == "pixels" else None
        shown = self.source.common["label_descriptions"] if self.source.common["labels"] else ()
        is_classifier = (
            len(self.source.outputs) == 1 and self.source.task.logits_axis == len(self.expected[0].shape) - 1
        )
        return make_graph(
            self.source.model,
            steps["input_size"],
            target.forms,
            scaling=scaling,
            output_names=self.source.outputs,
            batch=batch,
            precision=self.options.precision,
            opset=self.options.opset,
            labels=shown if is_classifier else (),
        )

    def _entry(self, target: Target, name: str, graph: Graph) -> dict[str, Any]:
        batch = [1, MOST_IMAGES] if graph.batch is None else [graph.batch, graph.batch]
        packages = {package.partition(".")[0] for package in target.packages}
        return {
            "name": name,
            "target": target.name,
            "precision": self.options.precision,
            "forms": [*target.forms],
            "batch": batch,
            "input": {
                "name": graph.input_name,
                "dtype": str(graph.sample.dtype).removeprefix("torch."),
                "layout": "NCHW" if self.options.input == "tensor" else "NHWC",
                "shape": [graph.batch, *graph.sample.shape[1:]],
            },
            "outputs": [
                {"name": output, "shape": [*values.shape[1:]]}
                for output, values in zip(graph.output_names, self.expected, strict=True)
            ],
            "versions": _versions(("effvit_zoo", "torch", "timm", *sorted(packages - {"torch"}))),
        }


def _save(converted: Converted, path: Path, record: Record) -> None:
    """Raises `UserError` for whatever a format's writer raises, and OSError for the disk."""
    try:
        converted.save(path, record)
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"it can't be written: {one_line(error)}") from error


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = importlib.metadata.packages_distributions()
    return {package: importlib.metadata.version(found.get(package, [package])[0]) for package in packages}


def _move(path: Path, place: Path) -> None:
    """Puts a file or folder in the place of an older one."""
    if place.is_dir():
        shutil.rmtree(place)
    path.replace(place)


def _describe(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes all that is beside the files."""
    write_text(folder / LABELS, "".join(f"{' '.join(name.split())}\n" for name in record["label_descriptions"]))
    write_text(folder / PREPROCESSING, Path(__file__).with_name(PREPROCESSING).read_text(encoding="utf-8"))
    write_json(folder / RECORD, record)
    write_text(folder / README, readme(record))

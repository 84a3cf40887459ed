"""Programs of torch.export (.pt2), run by torch: the model without its Python code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .contract import RECORD, Converted, Opened, Record, Target

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

README = """\
```python
import torch
from preprocessing import {reader}, show

model = torch.export.load("{file}").module()
show(model(torch.from_numpy({reader}("photo.jpg")))[0].numpy())
```

`torch.compile(model)` compiles it. The record is in the file: `torch.export.load(path, extra_files=files)` fills in
`files = {{"export.json": ""}}`.
"""


def convert(graph: Graph) -> Converted:
    import torch

    program = graph.cast().program()

    def save(path: Path, record: Record) -> None:
        import json

        torch.export.save(program, path, extra_files={RECORD: json.dumps(record, ensure_ascii=False)})

    operations = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Converted(save, {"operations": dict(operations.most_common())})


def open_torch(path: Path, threads: int) -> Opened:
    """The number of threads is this process's: `torch.set_num_threads`."""
    import torch

    program = torch.export.load(path)
    (name,) = program.graph_signature.user_inputs
    value = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    shape = [side if isinstance(side, int) else None for side in value.shape]
    module = program.module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return Opened(run, shape, str(value.dtype).removeprefix("torch."))


def read(path: Path) -> Record | None:
    import json

    import torch

    files = {RECORD: ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[RECORD]) if files[RECORD] else None


def errors() -> tuple[type[Exception], ...]:
    return (RuntimeError, AssertionError, ValueError, KeyError, TypeError, OSError)


TARGET = Target(
    *("torch", ".pt2", "torch", ("torch",), convert, open_torch, read, errors),
    precisions=("fp32", "fp16", "bf16"),
    any_batch=True,
    readme=README,
)

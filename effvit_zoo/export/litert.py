"""LiteRT files (.tflite), for Android and other devices. The record and the labels are in a ZIP archive at the file's end, where
TensorFlow Lite's metadata has associated files: `unzip -p model.tflite export.json`."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import RECORD, Converted, Opened, Record, Target, need

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

README = """\
```python
from ai_edge_litert.interpreter import Interpreter
from preprocessing import {reader}, show

interpreter = Interpreter("{file}")
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], {reader}("photo.jpg"))
interpreter.invoke()
show(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
```

The record is in the file too: `unzip -p {file} export.json`. In Kotlin, with `image` as a FloatArray (or ByteArray) of the shape {shape}:

```kotlin
val model = CompiledModel.create("{file}", CompiledModel.Options(Accelerator.CPU))
val inputs = model.createInputBuffers()
val outputs = model.createOutputBuffers()
inputs[0].writeFloat(image)
model.run(inputs, outputs)
val values = outputs[0].readFloat()
```
"""


def convert(graph: Graph) -> Converted:
    from ._graph import quiet

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.tflite"
        with quiet("litert_torch", "absl"):
            litert = need("litert_torch", "litert")
            litert.convert(graph.module, (graph.sample,)).export(str(path))
        content = path.read_bytes()
        facts = _inspected(path)

    def save(path: Path, record: Record) -> None:
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(RECORD, json.dumps(record, indent=2, ensure_ascii=False))
            archive.writestr("labels.txt", "\n".join(record["label_descriptions"]))

    return Converted(save, facts)


def _inspected(path: Path) -> dict[str, Any]:
    """Operations and highest rank of a file."""
    interpreter = need("ai_edge_litert.interpreter", "litert").Interpreter(
        str(path), experimental_op_resolver_type=_plain_kernels()
    )
    operations = Counter(operation["op_name"] for operation in interpreter._get_ops_details())
    rank = max(len(tensor["shape"]) for tensor in interpreter.get_tensor_details())
    return {"rank": rank, "operations": dict(operations.most_common())}


def _plain_kernels() -> Any:
    """Without delegates, which hide what they take."""
    return need("ai_edge_litert.interpreter", "litert").OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def open_litert(path: Path, threads: int) -> Opened:
    import numpy as np

    interpreter = need("ai_edge_litert.interpreter", "litert").Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (entry,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()

    def run(images: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(entry["index"], images)
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]) for output in outputs]

    return Opened(run, [int(side) for side in entry["shape"]], np.dtype(entry["dtype"]).name)


def read(path: Path) -> Record | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(RECORD)) if RECORD in archive.namelist() else None


def errors() -> tuple[type[Exception], ...]:
    return (RuntimeError, ValueError)


TARGET = Target(
    *("litert", ".tflite", "litert", ("ai_edge_litert", "litert_torch"), convert, open_litert, read, errors),
    readme=README,
)

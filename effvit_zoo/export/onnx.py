"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import Converted, Opened, Record, Target, as_texts, from_texts, need

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

README = """\
```python
import numpy as np
import onnxruntime
from preprocessing import {reader}, show

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
show(session.run(None, {{"{input}": {reader}("photo.jpg")}})[0])
```

In C++, with `image` of the input's shape:

```cpp
Ort::Env env;
Ort::Session session(env, "{file}", Ort::SessionOptions{{}});
auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
auto input = Ort::Value::CreateTensor(memory, image.data(), image.size(), shape.data(), shape.size());
const char *inputs[] = {{"{input}"}}, *outputs[] = {{"{output}"}};
auto results = session.Run(Ort::RunOptions{{}}, inputs, &input, 1, outputs, 1);
const float* values = results[0].GetTensorData<float>();
```
"""


def convert(graph: Graph) -> Converted:
    """The record goes into metadata_props, from where `session.get_modelmeta().custom_metadata_map` has it."""
    from ._onnx_file import onnx_program

    onnx = need("onnx", "onnx")
    proto = onnx_program(graph.cast()).model_proto

    def save(path: Path, record: Record) -> None:
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, as_texts(record))
        onnx.save(proto, str(path))

    operations = Counter(node.op_type for node in proto.graph.node)
    return Converted(save, {"opset": _opset(proto), "operations": dict(operations.most_common())})


def _opset(proto: Any) -> int:
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def open_onnx(path: Path, threads: int) -> Opened:
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    dtype = {"tensor(uint8)": "uint8", "tensor(float16)": "float16"}.get(entry.type, "float32")
    shape = [side if isinstance(side, int) else None for side in entry.shape]

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {entry.name: images})

    return Opened(run, shape, dtype)


def read(path: Path) -> Record | None:
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return from_texts(session.get_modelmeta().custom_metadata_map)


def errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions share no base class; those of its Python code are RuntimeError and ValueError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError)


TARGET = Target(
    *("onnx", ".onnx", "onnx", ("onnxruntime", "onnx", "onnxscript"), convert, open_onnx, read, errors),
    precisions=("fp32", "fp16"),
    any_batch=True,
    readme=README,
)

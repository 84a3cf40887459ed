"""ExecuTorch programs (.pte) for phones and boards, with XNNPACK's kernels."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import MARK, RECORD_KEYS, Converted, Opened, Record, Target, as_texts, from_texts, need

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

README = """\
```python
import torch
from executorch.runtime import Runtime
from preprocessing import {reader}, show

program = Runtime.get().load_program("{file}")
method = program.load_method("forward")
show(method.execute([torch.from_numpy({reader}("photo.jpg"))])[0].numpy())
```

The record is in constant methods, e.g. `program.load_method("architecture").execute([])`. In Kotlin, with `image` as a FloatArray (or
ByteArray):

```kotlin
val module = Module.load("{file}")
val input = Tensor.fromBlob(image, longArrayOf({shape}))
val values = module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
```
"""


def convert(graph: Graph) -> Converted:
    """Lowers the graph to XNNPACK as far as it goes; the rest runs on ExecuTorch's portable kernels."""
    from ._graph import quiet

    program = graph.cast().program()
    with quiet("executorch", "torch.utils._pytree"):
        exir = need("executorch.exir", "executorch")
        partition = need("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
        configs = need("executorch.backends.xnnpack.utils.configs", "executorch")
        edge = exir.to_edge_transform_and_lower(
            program, transform_passes=configs.get_transform_passes(), partitioner=[partition.XnnpackPartitioner()]
        )

    def save(path: Path, record: Record) -> None:
        whole = copy.deepcopy(edge)  # which the last step changes
        whole._config_methods = as_texts(record)  # the public way is to lower the graph again
        with path.open("wb") as file, quiet("executorch"):
            whole.to_executorch().write_to_file(file)

    nodes = [node for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    names = Counter(_operation(node) for node in nodes)
    delegates = names.pop("executorch_call_delegate", 0)
    names.pop("getitem", None)
    inside = _delegated(edge.exported_program().graph_module)
    share = round(inside / max(1, inside + sum(names.values())), 4)
    return Converted(save, {"delegates": delegates, "delegated_share": share, "operations": dict(names.most_common())})


def _operation(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)).removeprefix("aten.")


def _delegated(module: Any) -> int:
    """Number of operations in the delegates of a lowered graph."""
    lowered = need("executorch.exir.lowered_backend_module", "executorch")
    found = 0
    for _, submodule, _ in lowered.get_lowered_submodules(module):
        graph = submodule.original_module.graph
        found += sum(node.op == "call_function" and _operation(node) != "getitem" for node in graph.nodes)
    return found


def open_executorch(path: Path, threads: int) -> Opened:
    """The number of threads is this process's."""
    import torch

    runtime = need("executorch.runtime", "executorch").Runtime.get()
    bindings = need("executorch.extension.pybindings.portable_lib", "executorch")
    bindings._unsafe_reset_threadpool(threads)
    method = runtime.load_program(str(path)).load_method("forward")
    entry = method.metadata.input_tensor_meta(0)

    def run(images: np.ndarray) -> list[np.ndarray]:
        # the next call reuses the outputs' memory
        return [output.clone().numpy() for output in method.execute([torch.from_numpy(images)])]

    return Opened(run, [*entry.sizes()], {0: "uint8", 6: "float32"}[int(entry.dtype())])


def read(path: Path) -> Record | None:
    program = need("executorch.runtime", "executorch").Runtime.get().load_program(str(path))
    if MARK not in program.method_names:
        return None
    names = [name for name in RECORD_KEYS if name in program.method_names]
    return from_texts({name: program.load_method(name).execute([])[0] for name in names})


TARGET = Target(
    *("executorch", ".pte", "executorch", ("executorch",), convert, open_executorch, read),
    forms=("explicit_attention",),
    precisions=("fp32", "fp16"),
    readme=README,
)

"""Core ML packages (.mlpackage). They are converted on any system and run on macOS and iOS only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .contract import Converted, Opened, Record, Target, as_texts, from_texts, need

if TYPE_CHECKING:
    from ._graph import Graph

HIGHEST_RANK = 5
"""Of Core ML's tensors."""

README = """\
```python
import coremltools  # macOS
from preprocessing import {reader}, show

model = coremltools.models.MLModel("{file}")
show(model.predict({{"{input}": {reader}("photo.jpg").astype("float32")}})["{output}"])
```

This file was converted and inspected, not run: that needs macOS. In Swift, with `image` as an MLMultiArray of the input's shape:

```swift
let model = try MLModel(contentsOf: MLModel.compileModel(at: URL(fileURLWithPath: "{file}")))
let input = try MLDictionaryFeatureProvider(dictionary: ["{input}": MLFeatureValue(multiArray: image)])
let values = try model.prediction(from: input).featureValue(for: "{output}")!.multiArrayValue!
```
"""


def convert(graph: Graph) -> Converted:
    """An ML program for iOS 16 or macOS 13 and later. Raises `UserError` for a graph with tensors of too high a rank."""
    from ._graph import quiet

    tools = need("coremltools", "coreml")
    precision = {"fp32": tools.precision.FLOAT32, "fp16": tools.precision.FLOAT16}[graph.precision]
    with quiet("coremltools"):
        program = graph.program().run_decompositions({})
        model = tools.convert(
            program,
            inputs=[tools.TensorType(name=graph.input_name, shape=tuple(graph.sample.shape))],
            outputs=[tools.TensorType(name=name) for name in graph.output_names],
            minimum_deployment_target=tools.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
    operations, rank = _inspected(model._mil_program)
    if rank > HIGHEST_RANK:
        raise UserError(f"the graph has tensors of rank {rank}, Core ML takes up to {HIGHEST_RANK}")

    def save(path: Path, record: Record) -> None:
        for key, text in as_texts(record).items():
            model.user_defined_metadata[key] = text
        model.short_description = f"{record['architecture']}, {record['num_classes']} outputs"
        model.license = record["license"] or ""
        model.save(str(path))

    return Converted(save, {"rank": rank, "operations": operations})


def _inspected(program: Any) -> tuple[dict[str, int], int]:
    """Operations and the highest rank of an ML program."""
    operations: Counter[str] = Counter()
    rank = 0
    for function in program.functions.values():
        for operation in function.operations:
            if operation.op_type != "const":
                operations[operation.op_type] += 1
                rank = max([rank, *(output.rank for output in operation.outputs if output.rank is not None)])
    return dict(operations.most_common()), rank


def open_coreml(path: Path, threads: int) -> Opened:
    raise UserError(f"{path}: {TARGET.elsewhere}")


def read(path: Path) -> Record | None:
    tools = need("coremltools", "coreml")
    return from_texts(dict(tools.models.MLModel(str(path), skip_model_load=True).user_defined_metadata))


TARGET = Target(
    *("coreml", ".mlpackage", "coreml", ("coremltools",), convert, open_coreml, read),
    precisions=("fp32", "fp16"),
    elsewhere="Core ML runs on macOS and iOS only, the file was not run here",
    readme=README,
)

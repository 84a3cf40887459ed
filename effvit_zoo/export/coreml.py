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

LABEL, PROBABILITIES = "classLabel", "classLabel_probs"
"""Outputs of a classifier, as coremltools names them."""

README = """\
```python
import coremltools  # macOS
from preprocessing import {reader}
from PIL import Image

photo = {reader}("photo.jpg")
model = coremltools.models.MLModel("{file}")
print(model.predict({{"{input}": photo if photo.dtype == "float32" else Image.fromarray(photo[0])}})["{output}"])
```

This file was converted and inspected, not run: that needs macOS. In Swift, with `image` as an MLFeatureValue, an MLMultiArray of the
input's shape or an image:

```swift
let model = try MLModel(contentsOf: MLModel.compileModel(at: URL(fileURLWithPath: "{file}")))
let input = try MLDictionaryFeatureProvider(dictionary: ["{input}": image])
print(try model.prediction(from: input).featureValue(for: "{output}")!)
```
"""


def convert(graph: Graph) -> Converted:
    """An ML program for iOS 16 or macOS 13 and later: a classifier with labels and probabilities where the classes have names, and with
    an image for its input where pixels are asked for. Raises `UserError` for a graph with tensors of too high a rank."""
    from ._graph import quiet, with_ends

    with quiet("coremltools"):  # importing it warns of what isn't there on this system
        tools = need("coremltools", "coreml")
    is_classifier = len(set(graph.labels)) == len(graph.labels) > 0
    is_image = graph.takes_pixels
    graph = with_ends(graph, is_classifier)
    shape = tuple(graph.sample.shape)
    entry = tools.TensorType(name=graph.input_name, shape=shape)
    if is_image:
        colours = tools.colorlayout.RGB if shape[1] == 3 else tools.colorlayout.GRAYSCALE
        entry = tools.ImageType(name=graph.input_name, shape=shape, color_layout=colours)
    options = {"compute_precision": {"fp32": tools.precision.FLOAT32, "fp16": tools.precision.FLOAT16}[graph.precision]}
    if is_classifier:
        names = {"predicted_feature_name": LABEL, "predicted_probabilities_output": graph.output_names[0]}
        options["classifier_config"] = tools.ClassifierConfig([*graph.labels], **names)
    with quiet("coremltools"):
        model = tools.convert(
            graph.program().run_decompositions({}),
            inputs=[entry],
            outputs=[tools.TensorType(name=name) for name in graph.output_names],
            minimum_deployment_target=tools.target.iOS16,
            skip_model_load=True,
            **options,
        )
    operations, rank = _inspected(model._mil_program)
    if rank > HIGHEST_RANK:
        raise UserError(f"the graph has tensors of rank {rank}, Core ML takes up to {HIGHEST_RANK}")

    def save(path: Path, record: Record) -> None:
        for key, text in as_texts(record).items():
            model.user_defined_metadata[key] = text
        if is_classifier:
            model.user_defined_metadata["com.apple.coreml.model.preview.type"] = "imageClassifier"
        model.short_description = f"{record['architecture']}, {record['num_classes']} outputs"
        model.license = record["license"] or ""
        model.save(str(path))

    facts: dict[str, Any] = {"rank": rank, "operations": operations}
    if is_classifier:
        facts["outputs"] = [{"name": LABEL, "shape": []}, {"name": PROBABILITIES, "shape": [len(graph.labels)]}]
    if is_image:
        facts["input"] = {"name": graph.input_name, "dtype": "uint8", "layout": "image", "shape": [*shape]}
    return Converted(save, facts)


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

"""OpenVINO's format: an .xml file of the graph and a .bin file of the weights."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import MARK, RECORD_KEYS, Converted, Opened, Record, Target, as_texts, from_texts, need

if TYPE_CHECKING:
    import numpy as np

    from ._graph import Graph

README = """\
```python
import openvino
from preprocessing import {reader}, show

model = openvino.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
show(model(openvino.Tensor({reader}("photo.jpg")))[0])
```

Without the hint, processors that have such units compute in bfloat16. The keys of `model_info` are those that OpenVINO's Model API and
DL Streamer read. In C++, with `image` of the input's shape:

```cpp
ov::Core core;
auto request = core.compile_model("{file}", "CPU", ov::hint::inference_precision(ov::element::f32)).create_infer_request();
request.set_input_tensor(ov::Tensor(ov::element::{element}, shape, image.data()));
request.infer();
const float* values = request.get_output_tensor().data<float>();
```
"""


def convert(graph: Graph) -> Converted:
    """Converts the model's ONNX form. In fp16 the weights are halves; what it is computed in is the choice of who loads the file."""
    from ._onnx_file import write_onnx

    openvino = need("openvino", "openvino")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(graph, path)
        model = openvino.Core().read_model(str(path))
        model = openvino.convert_model(str(path))
    half = graph.precision == "fp16"

    def save(path: Path, record: Record) -> None:
        for key, text in as_texts(record).items():
            model.set_rt_info(text, [MARK, key])
        for key, text in model_info(record).items():
            model.set_rt_info(text, ["model_info", key])
        openvino.save_model(model, str(path), compress_to_fp16=half)

    operations = Counter(operation.get_type_name() for operation in model.get_ops())
    return Converted(save, {"operations": dict(operations.most_common())})


def model_info(record: Record) -> dict[str, str]:
    """The record under the keys of OpenVINO's Model API and DL Streamer, which know no crop_pct and no interpolation."""
    if record.get("task") != "classification":
        return {}
    steps = record["preprocessing"]
    info = {
        "model_type": "Classification",
        "labels": " ".join("_".join(name.split()) for name in record["labels"]),
        "reverse_input_channels": "YES",  # they read images as BGR
        "resize_type": "standard" if steps["crop_mode"] == "squash" else "crop",
        "output_raw_scores": "True",
        "layout": f"{record['file']['input']['name']}:{record['file']['input']['layout']}",
    }
    if record["file"]["input"]["dtype"] == "float32":
        for key in ("mean", "std"):
            info["mean_values" if key == "mean" else "scale_values"] = " ".join(
                f"{255 * value:g}" for value in steps[key]
            )
    return info


def open_openvino(path: Path, threads: int) -> Opened:
    """An OpenVINO or ONNX file, computed in float32."""
    import numpy as np

    openvino = need("openvino", "openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    entry = compiled.input(0)
    shape = [None if side.is_dynamic else side.get_length() for side in entry.get_partial_shape()]

    def run(images: np.ndarray) -> list[np.ndarray]:
        results: Any = compiled(
            openvino.Tensor(np.ascontiguousarray(images))
        )  # an array of another type it would convert
        return [np.array(results[index]) for index in range(len(compiled.outputs))]

    return Opened(run, shape, np.dtype(entry.get_element_type().to_dtype()).name)


def read(path: Path) -> Record | None:
    openvino = need("openvino", "openvino")
    model = openvino.Core().read_model(str(path))
    places = {key: [MARK, key] for key in RECORD_KEYS}
    return from_texts({key: str(model.get_rt_info(at).value) for key, at in places.items() if model.has_rt_info(at)})


TARGET = Target(
    *("openvino", ".xml", "openvino", ("openvino", "onnx", "onnxscript"), convert, open_openvino, read),
    precisions=("fp32", "fp16"),
    any_batch=True,
    companions=(".bin",),
    readme=README,
)

"""What a model card says of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..hub import CardFacts
from ..hub.card import escaped
from ..run_folder import ARCHITECTURE_KEY
from ._scores import TOP5_FROM

SHOWN_CLASSES = 50


def classification_card(config: Mapping[str, Any]) -> CardFacts:
    """Card facts of a classifier; `config` is the content of its config.json."""
    names = config.get("label_names") or []
    labels = [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]
    more = f" and {len(labels) - SHOWN_CLASSES} more, in config.json" if len(labels) > SHOWN_CLASSES else ""
    metrics = {"top1": ("Top-1 accuracy, %", "accuracy"), "macro_f1": ("Macro-F1, %", "f1")}
    if int(config.get("num_classes") or TOP5_FROM) >= TOP5_FROM:
        metrics["top5"] = ("Top-5 accuracy, %", "accuracy")
    classes = ", ".join(map(escaped, labels[:SHOWN_CLASSES])) + more + "."
    return CardFacts(
        pipeline_tag="image-classification",
        task_title="Image classification",
        metrics=metrics,
        introduction=f"with {config.get('num_classes')} classes",
        sections=(("Classes", classes),) if labels else (),
        usage=lambda place: _usage(config, place, bool(labels)),
        figures={"curves.png": "Loss and accuracy over the epochs", "confusion_matrix.png": "Confusion matrix"},
        tags=("transformers",),
        recipe="finetune",
    )


def _usage(config: Mapping[str, Any], place: str, labelled: bool) -> str:
    """A script that classifies `photo.jpg`; `place` is USER/NAME[@REVISION]."""
    channels = ((config.get("pretrained_cfg") or {}).get("input_size") or (3,))[0]
    mode = "L" if channels == 1 else "RGB"
    names = 'model.pretrained_cfg["label_names"]' if labelled else f"range({config.get('num_classes', 0)})"
    shown = min(5, int(config.get("num_classes") or 5))
    register = "import effvit_zoo  # registers effzoo_*; timm has no plugin discovery, so this line comes first\n"
    return f'''{"" if ARCHITECTURE_KEY in config else register}import numpy as np
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("hf-hub:{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = {names}

image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright
if image.mode[0] in "IF":  # greys of 16 or 32 bits: Pillow would clip them
    grey = np.asarray(image, dtype=float)
    whites = {{"F": (1, 255, 65535), "I": (255, 65535)}}.get(image.mode, (65535,))
    white = next((w for w in whites if w >= grey.max()), grey.max())
    image = Image.fromarray((grey * 255 / white).round().astype(np.uint8))
image = image.convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("{mode}")  # transparency is white
with torch.inference_mode():
    probabilities = model(transform(image)[None]).softmax(dim=1)[0]
for probability, index in zip(*map(torch.Tensor.tolist, probabilities.topk({shown}))):
    print(f"{{100 * probability:.1f}} %  {{names[index]}}")
'''

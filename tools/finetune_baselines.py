#!/usr/bin/env python
"""What tools/finetune_evidence.py compares with: a linear probe as scikit-learn has it, and fastai's `fine_tune` with its defaults.

It runs in an environment of its own, without this package, and reads the images and the model folder of tools/finetune_data.py:

    python -m venv fastai && fastai/bin/pip install 'fastai==2.8.*' 'timm>=1.0.31'

    fastai/bin/python tools/finetune_baselines.py fastai --epochs 8 --model data/lite0 --data data/emoji/40-0 \
        --test data/emoji/test --img-size 128 --output answers.json

The output holds the class that was answered for each test image, and the processor's and the wall's seconds from the process's start
to the end of training, which don't include the test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()  # the libraries are imported later, so that their import is counted
BATCH = 64  # images a forward pass of the probe
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation of the probe's logistic regression on standardised features, chosen by five-fold cross-validation."""

Classifier = Callable[[Sequence[Path]], list[str]]
"""Image files to class names."""


def files(folder: Path) -> list[Path]:
    """Images in class folders, in order."""
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def probe(args: argparse.Namespace) -> Classifier:
    """Logistic regression on the frozen network's pooled features of the images as they are evaluated."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = timm.create_model(f"local-dir:{args.model}", pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_data_config({"input_size": (3, args.img_size, args.img_size)}, model=model)
    transform = timm.data.create_transform(**config)

    def features(paths: Sequence[Path]) -> Any:
        rows = []
        with torch.inference_mode():
            for start in range(0, len(paths), BATCH):
                images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]]
                rows.append(model(torch.stack(images)).numpy())
        return np.concatenate(rows)

    train = files(args.data / "train")
    regression = LogisticRegressionCV(Cs=STRENGTHS, cv=5, max_iter=1000, scoring="accuracy")
    fitted = make_pipeline(StandardScaler(), regression).fit(features(train), [path.parent.name for path in train])
    return lambda paths: [str(name) for name in fitted.predict(features(paths))]


def fastai(args: argparse.Namespace) -> Classifier:
    """fastai's `vision_learner(...).fine_tune(epochs)`: `aug_transforms`, its head, one frozen epoch, the last weights.

    Its default is batches of 64, of which an incomplete one is dropped: 70 images are one step an epoch.
    """
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, set_seed, vision_learner

    set_seed(args.seed, reproducible=True)
    # num_workers=0: all is done, and counted, in this process
    options = {
        "item_tfms": Resize(args.img_size),
        "batch_tfms": aug_transforms(),
        "num_workers": 0,
        "bs": args.batch_size,
    }
    data = ImageDataLoaders.from_folder(args.data, train="train", valid="val", **options)
    learner = vision_learner(data, f"local-dir:{args.model}")
    with learner.no_bar():
        learner.fine_tune(args.epochs)

    def classify(paths: Sequence[Path]) -> list[str]:
        with learner.no_bar():
            probabilities, _ = learner.get_preds(dl=data.test_dl(list(paths), num_workers=0))
        return [str(data.vocab[index]) for index in probabilities.argmax(1).tolist()]

    return classify


WAYS = {"probe": probe, "fastai": fastai}
PACKAGES = {"probe": ("scikit-learn", "timm", "torch"), "fastai": ("fastai", "timm", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", type=Path, required=True, help="model folder to start from")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--test", type=Path, required=True, help="folder with CLASS/*")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of fastai after the frozen one (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of fastai (default: %(default)s, as fastai's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    for folder in (args.model, args.data / "train", args.test):
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder, expected those of tools/finetune_data.py")
    classify = WAYS[args.way](args)
    cpu_seconds, seconds = time.process_time(), time.perf_counter() - STARTED
    tested = files(args.test)
    answers = classify(tested)
    content = {
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "versions": {name: version(name) for name in PACKAGES[args.way]},
        "answers": {f"{path.parent.name}/{path.name}": name for path, name in zip(tested, answers, strict=True)},
    }
    args.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

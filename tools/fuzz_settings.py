"""Random settings for `--set`: each is refused in one line or works.

Draws keys and values over the config's schema (valid values, bounds, wrong kinds, odd texts), builds everything that a run builds, and
trains one step on six small images. Nothing is downloaded.

    python tools/fuzz_settings.py --draws 500 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from effvit_zoo import config as strict
from effvit_zoo.config import Setting, settings
from effvit_zoo.data import readable
from effvit_zoo.errors import UserError
from effvit_zoo.training.config import RunConfig, load_config
from effvit_zoo.training.optim import make_optimizer, make_scheduler
from effvit_zoo.training.prepare import prepare

TEXTS = (
    "no", "on", "null", "~", "0123", "1e3", "2024-01-01", "12:30:00", "a b", "#x", "x #y", "ö", "''", '"q"', "=", "*", "&a", "!t", "%",
    "- a", "a: b", "[1, 2]", "[]", "{}", "{a: 1}", "[[1]]", "[0.9, 0.1]", "[0.1, 0.9]", "[a]", "rand-m9-mstd0.5", "rand-x", "augmix-m3",
    "effzoo_swiftformer_xs", "effzoo_edgenext_xx_small", "effzoo_swin_tiny_patch4_window7_224", "sgd", "lion", "adan",
    "nowhere", "a/b", "\t", "", "NaN", "|", ">",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "7", "32", "48", "64", "-1", "0.0", "0.5", "1.0", "1.5", "-0.1", "1e-3", "1e-30", "1e30", ".inf", "-.inf", ".nan",
    "true", "false", "0x10", "1_0", "99999999999999999999", "16777216",
)  # fmt: skip
VALID = {
    "true": ("true", "false", "on", "no"),
    "int": ("1", "2", "3", "4", "32", "48", "null"),
    "float": ("0", "0.1", "0.5", "0.9", "1", "1e-3", "2", "null"),
    "[float": ("[0.5, 1.0]", "[0.08, 1]", "[0.9, 0.99]", "null"),
    "list of float": ("[0.9, 0.99]", "[1, 2]", "[0.5]", "null"),
    "list of int": ("[32]", "[32, 48]", "[]"),
}
"""Beginning of a type -> values that it may have."""
KWARGS = (
    "img_size",
    "in_chans",
    "num_classes",
    "pretrained",
    "drop_path_rate",
    "depth",
    "mixers",
    "global_pool",
    "device",
    "name",
    "foo",
)
NOT_HERE = ("hub.", "train.trackers", "train.compile", "data.root", "data.num_workers")
"""Keys that need a network, another package, minutes, or other data."""
MUST = ("data.num_workers=0", "train.trackers=[]", "train.batch_size=3")


def draw(rng: random.Random, table: list[Setting]) -> list[str]:
    """One to four overrides."""
    overrides = []
    for _ in range(rng.randint(1, 4)):
        setting = rng.choice(table)
        key = setting.key
        if key.endswith("kwargs") and rng.random() < 0.8:
            key = f"{key}.{rng.choice(KWARGS)}"
        if rng.random() < 0.02:
            key = rng.choice((key + "s", key.upper(), key.partition(".")[0], key + ".x"))
        overrides.append(f"{key}={_value(rng, setting)}")
    return overrides


def _value(rng: random.Random, setting: Setting) -> str:
    """More often than not a value of the setting's own kind."""
    if rng.random() < 0.35:
        return rng.choice(rng.choice((NUMBERS, TEXTS)))
    if setting.choices:
        return str(rng.choice(setting.choices))
    for kind, values in VALID.items():
        if setting.type.startswith(kind):
            return rng.choice(values)
    return rng.choice((setting.default_text, rng.choice(TEXTS)))


def attempt(path: Path, overrides: list[str]) -> str | None:
    """Does what a run does up to its first step. The message where the settings are refused."""
    try:
        asked = load_config(path, overrides)
        config = asked.resolve_for_processes(1)
        run = prepare(config, 1)
        optimizer = make_optimizer(run.model, config.optim)
        scheduler = make_scheduler(optimizer, config.optim, config.train.epochs, run.feed.steps_per_epoch)
        _first_step(config, run, optimizer)
        _check_rates(config, run, optimizer, scheduler)
    except UserError as error:
        return str(error)
    text = strict.dump(asked)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.yaml").write_text(text, encoding="utf-8")
        if load_config(Path(folder) / "a.yaml") != asked:
            raise AssertionError("the dumped config is another one")
    return None


def _first_step(config: RunConfig, run: Any, optimizer: Any) -> None:
    batches = itertools.islice(run.feed.train_batches(0, 0, 1), 1)
    batch = next(readable(batches, lambda bad: None))
    loss, _ = run.task.loss(run.model.train(), batch)
    loss.backward()
    optimizer.step()


def _check_rates(config: RunConfig, run: Any, optimizer: Any, scheduler: Any) -> None:
    steps = config.train.epochs * run.feed.steps_per_epoch
    for step in {0, 1, steps // 2, steps - 1, steps}:
        scheduler.step_update(step)
        rates = [group["lr"] for group in optimizer.param_groups]
        if not all(math.isfinite(rate) and 0 <= rate <= config.optim.lr * 1.000001 for rate in rates):
            raise AssertionError(f"learning rates {rates} at step {step} of {steps}, optim.lr is {config.optim.lr}")


def make_images(root: Path) -> Path:
    """Six images of two classes, and two to validate on."""
    for split, count in (("train", 3), ("val", 1)):
        for label, colour in (("blue", (20, 20, 200)), ("red", (200, 20, 20))):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 36), colour).save(root / split / label / f"{number}.png")
    return root


def run_draws(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Tries draws; (number of outcomes by kind, descriptions of failures)."""
    rng = random.Random(seed)
    table = [setting for setting in settings(RunConfig) if not setting.key.startswith(NOT_HERE)]
    path = folder / "base.yaml"
    path.write_text(
        f"model: {{name: effzoo_vit_pico}}\ndata: {{root: '{make_images(folder / 'photos')}'}}\n", encoding="utf-8"
    )
    outcomes: Counter[str] = Counter()
    failures = []
    for number in range(count):
        overrides = draw(rng, table)
        torch.manual_seed(number)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                message = attempt(path, [*MUST, *overrides])
        except Exception as error:  # what falls out is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{overrides}: {type(error).__name__} {error} ({place.filename}:{place.lineno})")
            outcomes["failed"] += 1
            continue
        if message is not None and ("\n" in message or len(message) > 600):
            failures.append(f"{overrides}: more than a line: {message!r}")
        outcomes["works" if message is None else "refused"] += 1
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failures = run_draws(args.draws, args.seed, Path(folder))
    print(f"{args.draws} draws, seed {args.seed}, {time.perf_counter() - start:.0f} s:", dict(outcomes))
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tools of the evidence for fine-tuning: no image is learned from and judged on, and differences are of the same images."""

import importlib.util
from pathlib import Path

import pytest

from effvit_zoo.errors import UserError

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    return load("finetune_data")


@pytest.fixture(scope="module")
def evidence():
    return load("finetune_evidence")


CLASSES = {"many": [f"{i}.png" for i in range(400)], "few": [f"{i}.png" for i in range(33)]}


def test_no_image_is_in_two_parts_and_the_test_part_is_one(data):
    tests = []
    for size in (10, 40, 200):
        for seed in range(3):
            parts = data.split(CLASSES, size, seed)
            tests.append(parts["test"])
            for name, images in CLASSES.items():
                drawn = [image for part in parts.values() for image in part[name]]
                assert len(drawn) == len(set(drawn))
                assert set(drawn) <= set(images)
                assert all(parts[part][name] for part in ("train", "val", "test"))
            assert len(parts["train"]["many"]) == size
    assert all(test == tests[0] for test in tests)
    assert {name: len(images) for name, images in tests[0].items()} == {"many": 100, "few": 11}


def test_the_seed_alone_decides_what_is_drawn(data):
    backwards = {name: images[::-1] for name, images in CLASSES.items()}
    assert data.split(CLASSES, 10, 1) == data.split(backwards, 10, 1)
    assert data.split(CLASSES, 10, 1)["train"] != data.split(CLASSES, 10, 2)["train"]


def test_differences_are_of_the_same_images_and_seeds(evidence):
    ours = [{"seed": 0, "hits": "1111", "cpu_seconds": 10.0}, {"seed": 1, "hits": "1110", "cpu_seconds": 30.0}]
    theirs = [
        {"seed": 1, "hits": "1010", "cpu_seconds": 10.0},
        {"seed": 0, "hits": "0111", "cpu_seconds": 10.0},
        {"seed": 2, "hits": "0000", "cpu_seconds": 900.0},
    ]
    mean, error, ratio = evidence.difference(ours, theirs)  # images: 1/2, 1/2, 0, 0
    assert (mean, error, ratio) == pytest.approx((25.0, 100 * (1 / 12) ** 0.5 / 2, 2.0))
    assert evidence.difference(ours[:1], theirs[:1]) is None


def test_sizes_of_a_data_set_are_no_independent_evidence(evidence):
    one = evidence.Difference(2.0, 1.0, 0.5)
    assert evidence.pooled({("a", 10): one, ("a", 40): one}) == pytest.approx((2.0, 1.0, 0.5))
    assert evidence.pooled({("a", 10): one, ("b", 10): one, ("c", 10): None}) == pytest.approx((2.0, 0.5**0.5, 0.5))


def test_a_checkout_without_the_config_is_refused(evidence, tmp_path):
    with pytest.raises(UserError, match="expected NAME=FOLDER"):
        evidence.tree_of(f"new={tmp_path}")

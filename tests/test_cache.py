"""Decoded images in memory: each file is decoded once, the pixels are the same, memory is bounded, and a run says what it does."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_photos
from timm.data import resolve_data_config

from effvit_zoo.data import cache, make_feed, open_splits, sources, with_cache
from effvit_zoo.data.cache import ImageCache
from effvit_zoo.tasks import Classification
from effvit_zoo.tasks.classification import ClassificationAugment
from effvit_zoo.training.config import load_config

IMAGES, BYTES = 20, 20 * 24 * 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = make_photos(tmp_path_factory.mktemp("photos"), {"": {"blue": 9, "red": 9}})
    for number, label in enumerate(("blue", "red")):  # upright by their EXIF only, and compressed with losses
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.effect_noise((24, 20), 90 + number).convert("RGB").save(root / label / "turned.jpg", exif=exif)
    return root


def open_photos(photos, wanted):
    return with_cache(open_splits(photos), wanted)


def batches(splits, workers):
    data_config = resolve_data_config({"input_size": (3, 16, 16)})
    transforms = Classification(2, augment=ClassificationAugment(scale=(0.3, 1.0))).transforms(data_config)
    feed = make_feed(splits, transforms, data_config, batch_size=5, num_processes=1, num_workers=workers)
    return [*feed.train_batches(0, 0, 3 * feed.steps_per_epoch), *feed.val_batches(0), *feed.val_batches(0)]


def test_the_same_pixels_with_and_without_it(photos):
    for plain, kept in zip(batches(open_photos(photos, False), 0), batches(open_photos(photos, True), 0), strict=True):
        assert torch.equal(plain.image, kept.image)
        assert torch.equal(plain.target, kept.target)


@pytest.mark.slow
def test_loader_processes_fill_and_share_it(photos):
    splits = open_photos(photos, None)
    for plain, kept in zip(batches(open_photos(photos, False), 0), batches(splits, 2), strict=True):
        assert torch.equal(plain.image, kept.image)
    assert sum(splits.train.cache.get(index) is not None for index in range(IMAGES)) == len(splits.train)


def test_each_file_is_decoded_once(photos, monkeypatch):
    decoded, original = [], sources.decode
    monkeypatch.setattr(sources, "decode", lambda item, mode: decoded.append(item.name) or original(item, mode))
    batches(open_photos(photos, None), 0)
    assert len(decoded) == len(set(decoded)) == IMAGES


def test_memory_is_bounded(photos, monkeypatch):
    kept = ImageCache(10, 2 * BYTES + 1, "RGB")
    images = [Image.fromarray(np.full((20, 24, 3), number, np.uint8)) for number in range(4)]
    for row, image in enumerate(images):
        kept.put(row, image)
        kept.put(row, image)
    found = [kept.get(row) for row in range(4)]
    assert [image and image.getpixel((23, 19)) for image in found] == [(0, 0, 0), (1, 1, 1), None, None]
    assert pickle.loads(pickle.dumps(kept)) is None

    monkeypatch.setattr(cache, "free_memory", lambda: 4 * IMAGES * BYTES)
    splits = open_photos(photos, None)  # nearly the limit: some may be larger than those that were sampled
    assert splits.train.cache is None
    assert splits.notes[-1].startswith("decoded anew in every epoch")
    part = open_photos(photos, True)
    assert part.train.cache is not None
    assert "at most" in part.notes[-1]


def test_what_is_decoded_already_or_unwanted_is_left_alone(photos):
    assert with_cache(open_splits("builtin:fashion-mnist-mini"), True).train.cache is None
    plain = open_photos(photos, False)
    assert plain.train.cache is None
    assert not any("memory" in note for note in plain.notes)


@pytest.mark.parametrize(("text", "value"), [("null", None), ("true", True), ("false", False), ("500", 500), ("1", 1)])
def test_the_setting(tmp_path, text, value):
    (tmp_path / "run.yaml").write_text("model: {name: effzoo_vit_pico}\n")
    found = load_config(tmp_path / "run.yaml", [f"data.cache={text}"]).data.cache
    assert found == value
    assert type(found) is type(value)

"""Data sources: the embedded set against its origin, folders against timm's reader, every kind of root, and every error a user can make."""

import gzip
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
import tracemalloc
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import FashionMNIST

from effvit_zoo.data import (
    BadImage,
    DataSplits,
    ImageSource,
    Source,
    open_measured,
    open_source,
    open_splits,
    record_of,
)
from effvit_zoo.data.roots import Kind, fashion_mnist, timm_sets
from effvit_zoo.data.sources import FilePaths
from effvit_zoo.data.splits import hold_out
from effvit_zoo.errors import UserError

ASSETS = files("effvit_zoo").joinpath("assets")


def picture(value, size=(6, 5)):
    return Image.new("RGB", size, (value % 256, value // 256 % 256, 77))


def fill(root, counts, suffix=".png", start=0):
    """`counts` images a folder, each with a colour of its own."""
    for folder, count in counts.items():
        path = root / folder
        path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(start := start + 1).save(path / f"{i}{suffix}")
    return root


def names(source):
    return [source.name(i) for i in range(len(source))]


def inside(source, root):
    return {os.path.relpath(name, root) for name in names(source)}


# The embedded set and its origin


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_mini_is_balanced(split, per_class):
    source = open_source("builtin:fashion-mnist-mini", split)
    assert np.bincount(source.targets).tolist() == [per_class] * 10
    assert source.class_names == tuple(FashionMNIST.classes)
    image, target = source.load(per_class * 3 + 5)
    assert (image.mode, image.size, target) == ("RGB", (28, 28), 3)
    assert source.name(7) == f"fashion-mnist-mini {split}[7]"


def test_mini_is_the_documented_file():
    digest = sha256(ASSETS.joinpath("fashion_mnist_mini.png").read_bytes()).hexdigest()
    assert f"{digest}  fashion_mnist_mini.png" in ASSETS.joinpath("README.md").read_text()
    assert "Copyright (c) 2017 Zalando SE" in ASSETS.joinpath("LICENSE.fashion-mnist").read_text()


def draw_module():
    path = Path(__file__).parent.parent / "tools" / "draw_fashion_mnist_mini.py"
    spec = importlib.util.spec_from_file_location("draw_fashion_mnist_mini", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(folder, per_class=3):
    """Four small idx files in Fashion-MNIST's format."""
    folder.mkdir(parents=True)
    for stem, count in (("train", per_class * 10), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for part, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{stem}-{part}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
            (folder / f"{stem}-{part}-ubyte").write_bytes(header + array.tobytes())  # as torchvision wants them


def test_drawing_is_by_hash_and_balanced(tmp_path):
    draw = draw_module()
    labels = np.random.default_rng(0).integers(0, 10, 15_000)
    rows = draw.draw_rows(labels, "train")
    assert np.array_equal(labels[rows], np.repeat(np.arange(10), 1000))
    ranks = {row: sha256(f"0/train/{row}".encode()).digest() for row in np.flatnonzero(labels == 4).tolist()}
    drawn = set(rows[4000:5000].tolist())
    assert max(ranks[row] for row in drawn) < min(rank for row, rank in ranks.items() if row not in drawn)
    with pytest.raises(UserError, match="train idx files are not in"):
        draw.draw_mosaic(str(tmp_path))


@pytest.mark.skipif(
    not Path(fashion_mnist.DEBIAN_FOLDER).is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_drawing_again_gives_the_embedded_images():
    with Image.open(ASSETS.joinpath("fashion_mnist_mini.png").open("rb")) as image:
        assert np.array_equal(draw_module().draw_mosaic(fashion_mnist.DEBIAN_FOLDER), np.asarray(image))
    full = open_splits("builtin:fashion-mnist")
    assert (len(full.train), len(full.val)) == (60_000, 10_000)


@pytest.mark.parametrize("place", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_full_set_comes_from_the_folder_given_or_from_the_environment(tmp_path, monkeypatch, place):
    write_idx(tmp_path / "data" / place if place else tmp_path / "data")
    given = open_splits(f"builtin:fashion-mnist@{tmp_path / 'data'}")
    monkeypatch.setenv("EFFVIT_ZOO_DATA", str(tmp_path / "data"))
    for splits in (given, open_splits("builtin:fashion-mnist")):
        assert (len(splits.train), len(splits.val)) == (30, 20)
        assert splits.val.target(13) == 3
        grey = np.random.default_rng(20).integers(0, 256, (20, 28, 28), dtype=np.uint8)[13]
        assert np.array_equal(np.asarray(splits.val.load(13)[0])[..., 1], grey)


def test_full_set_that_is_nowhere_names_the_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EFFVIT_ZOO_DATA", raising=False)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"EFFVIT_ZOO_DATA.*builtin:fashion-mnist@.*dataset-fashion-mnist.*torchvision"):
        open_source("builtin:fashion-mnist")
    with pytest.raises(UserError, match="does not hold Fashion-MNIST's files"):
        open_source(f"builtin:fashion-mnist@{tmp_path}")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*t10k-images-idx3-ubyte as an idx file"):
        open_source(f"builtin:fashion-mnist@{tmp_path}")
    with pytest.raises(UserError, match=r"unknown embedded data set 'fashion-mnst': did you mean 'fashion-mnist'\?"):
        open_source("builtin:fashion-mnst")


# Folders


def test_folder_equals_timms_reader(tmp_path):
    fill(tmp_path, {"class10": 2, "class9": 1, "Apple": 2, "animals/dog": 2, "animals/cat/young": 1})
    source, reader = open_source(tmp_path), ReaderImageFolder(str(tmp_path))
    assert {name: i for i, name in enumerate(source.class_names)} == reader.class_to_idx
    assert source.class_names == ("Apple", "class9", "class10", "dog", "young")
    assert dict(zip(names(source), source.targets.tolist(), strict=True)) == dict(reader.samples)
    for i, name in enumerate(names(source)):
        image, target = source.load(i)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(name)))
        assert target == source.target(i)


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("Train", "VALID"), ("training", "validation"), ("train", "test")]
)
def test_split_folders_go_by_many_names(tmp_path, train, val):
    fill(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 2, f"{val}/cat": 1, f"{val}/dog": 1})
    (tmp_path / "notes").mkdir()
    splits = open_splits(tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 2)
    assert splits.class_names == splits.val.class_names == ("cat", "dog")
    assert inside(splits.val, tmp_path / val) == {"cat/0.png", "dog/0.png"}
    assert len(open_source(tmp_path)) == len(open_source(tmp_path, val)) == 2
    assert len(open_source(tmp_path, "train")) == 5


def test_val_goes_before_test_and_can_be_chosen(tmp_path):
    fill(tmp_path, {f"{split}/{c}": n for split, n in (("train", 4), ("val", 2), ("test", 3)) for c in "ab"})
    assert len(open_splits(tmp_path).val) == 4
    assert len(open_splits(tmp_path, val_split="test").val) == 6
    held_out = open_splits(tmp_path, val_split=None)
    assert (len(held_out.train), len(held_out.val)) == (6, 2)
    with pytest.raises(UserError, match=r"no split 'dev' in .*: found test, train, val"):
        open_splits(tmp_path, val_split="dev")


def test_a_class_called_train_is_a_class(tmp_path):
    fill(tmp_path, {"bus": 3, "train": 3})
    assert open_splits(tmp_path).class_names == ("bus", "train")


def test_one_folder_is_split_by_seed_in_each_class(tmp_path):
    fill(tmp_path, {"a": 40, "b": 2, "c": 1, "d": 11})
    splits = open_splits(tmp_path, val_fraction=0.25, split_seed=3)
    assert np.bincount(splits.val.targets, minlength=4).tolist() == [10, 1, 0, 3]
    assert np.bincount(splits.train.targets).tolist() == [30, 1, 1, 8]
    assert inside(splits.train, tmp_path) | inside(splits.val, tmp_path) == inside(open_source(tmp_path), tmp_path)
    assert not inside(splits.train, tmp_path) & inside(splits.val, tmp_path)
    for part in ("train", "val"):
        again = open_source(tmp_path, part, val_fraction=0.25, split_seed=3)
        assert names(again) == names(getattr(splits, part))
    assert names(open_splits(tmp_path, val_fraction=0.25, split_seed=4).val) != names(splits.val)
    everything = open_splits(tmp_path, val_fraction=0.999)
    assert np.bincount(everything.train.targets).tolist() == [1, 1, 1, 1]


def test_the_split_does_not_depend_on_place_or_order_of_the_file_system(tmp_path, monkeypatch):
    here = fill(tmp_path / "here", {"a": 20, "b": 20})
    there = tmp_path / "there"
    shutil.copytree(here, there)
    first = inside(open_splits(here).val, here)
    walk = os.walk

    def shuffled(*args, **kwargs):
        for where, folders, found in walk(*args, **kwargs):
            random.shuffle(found)
            folders.reverse()
            yield where, folders, found

    monkeypatch.setattr(os, "walk", shuffled)
    assert inside(open_splits(there).val, there) == first
    fill(there, {"a": 22})
    assert len(inside(open_splits(there).val, there) & first) >= 3


def test_junk_is_left_out_and_links_are_followed(tmp_path):
    root = fill(tmp_path / "photos", {"cat": 2, "dog": 1, "__MACOSX/cat": 1, ".cache/x": 1, "cat/.thumbs": 1})
    for junk in ("Thumbs.db", ".DS_Store", "cat/Thumbs.db", "cat/._0.png", "dog/desktop.ini", "notes.txt"):
        (root / junk).write_bytes(b"x")
    (root / "bird").symlink_to(fill(tmp_path / "elsewhere", {"x": 2}) / "x")
    (root / "dog" / "round").symlink_to(root)
    source = open_source(root)
    assert inside(source, root) == {"cat/0.png", "cat/1.png", "dog/0.png", "bird/0.png", "bird/1.png"}
    assert source.class_names == ("bird", "cat", "dog")


def test_names_that_are_hard_to_write(tmp_path):
    odd = ["Größe", "猫", "a b", "x²", "²"]
    root = fill(tmp_path, dict.fromkeys(odd, 2))
    raw = os.fsencode(root) + b"/x\xff"
    os.mkdir(raw)
    shutil.copy(root / "a b" / "0.png", os.fsdecode(raw + b"/0.PNG"))
    source = open_source(root)
    assert set(source.class_names) == {*odd, os.fsdecode(b"x\xff")}
    assert all(source.load(i)[0].size == (6, 5) for i in range(len(source)))


def test_folder_reads_images_as_open_image_does(tmp_path):
    root = fill(tmp_path, {"a": 1, "b": 1})
    Image.new("RGBA", (3, 4), (255, 0, 0, 0)).save(root / "a" / "0.png")
    Image.fromarray(np.full((2, 2), 257 * 90, dtype=np.uint16)).save(root / "b" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (8, 2)).save(root / "b" / "turned.jpg", exif=exif)
    source = open_source(root)
    assert source.load(0)[0].getpixel((0, 0)) == (255, 255, 255)
    assert source.load(1)[0].getpixel((0, 0)) == (90, 90, 90)
    assert (source.load(2)[0].size, source.load(2)[0].mode) == ((2, 8), "RGB")
    grey = open_source(root, img_mode="L")
    assert [grey.load(i)[0].mode for i in range(3)] == ["L"] * 3
    assert grey.load(1)[0].getpixel((0, 0)) == 90
    with pytest.raises(UserError, match="expected img_mode RGB or L, got 'HSV'"):
        open_source(root, img_mode="HSV")


def test_undecodable_files_are_named_when_loaded(tmp_path, monkeypatch):
    root = fill(tmp_path, {"good": 1, "broken": 0})
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (root / "broken" / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (root / "broken" / "empty.png").write_bytes(b"")
    (root / "broken" / "text.png").write_text("no picture")
    (root / "broken" / "gone.png").symlink_to(root / "nowhere.png")
    Image.new("L", (200, 200)).save(root / "broken" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    source = open_source(root)
    assert source.notes == (f"left out of {root}: 1 file: 1 broken link (e.g. broken/gone.png)",)
    reasons = {
        "cut": "truncated",
        "empty": "the file is empty",
        "text": "not an image",
        "large": "bomb",
    }
    for i in range(len(source)):
        stem = Path(source.name(i)).stem
        if stem in reasons:
            with pytest.raises(BadImage, match=reasons[stem]) as caught:
                source.load(i)
            assert caught.value.name == source.name(i)
            assert "\n" not in str(caught.value)
        else:
            source.load(i)
    with pytest.raises(IndexError):
        source.load(len(source))


@pytest.mark.slow
def test_sources_survive_pickling_and_spawned_workers(tmp_path):
    splits = open_splits(fill(tmp_path, {"a": 6, "b": 6}), val_fraction=0.5)
    copy = pickle.loads(pickle.dumps(splits))
    assert names(copy.val) == names(splits.val)
    assert np.array_equal(np.asarray(copy.val.load(4)[0]), np.asarray(splits.val.load(4)[0]))
    loader = torch.utils.data.DataLoader(
        Loaded(splits.train), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert [target for _, target in loader] == splits.train.targets.tolist()


class Loaded(torch.utils.data.Dataset):
    """Map-style view of a source, as a loader needs it."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, target = self.source.load(index)
        return np.array(image), target


def test_class_map_orders_renames_and_leaves_out(tmp_path):
    root = fill(tmp_path / "photos", {"cat": 2, "dog": 3, "eel": 4})
    (root / "classes.txt").write_text("dog\ncat\n")
    for class_map in ("classes.txt", str(root / "classes.txt"), {"dog": 0, "cat": 1}):
        source = open_source(root, class_map=class_map)
        assert source.class_names == ("dog", "cat")
        assert source.targets.tolist() == [1, 1, 0, 0, 0]
    merged = open_source(root, class_map={"cat": 0, "dog": 0, "eel": 1})
    assert (merged.class_names, merged.targets.tolist()) == (("cat", "eel"), [0] * 5 + [1] * 4)
    digits = fill(tmp_path / "digits", {"0": 1, "1": 1})
    assert open_source(digits, class_map={"1": 0, "0": 1}).targets.tolist() == [1, 0]
    named = open_source(digits, class_map={"zero": 0, "one": 1})
    assert (named.class_names, named.targets.tolist()) == (("zero", "one"), [0, 1])
    for class_map, message in (
        ({"ant": 0, "bee": 1}, r"no class of .*photos \(cat, dog, eel\) is in the class map \(ant, bee\)"),
        ({"cat": 1, "dog": 3}, "class indices must be 0 to n-1 without gaps, got 1, 3"),
        ("nowhere.txt", "cannot open .*nowhere.txt"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(root, class_map=class_map)


def test_mistakes_with_folders_are_one_line_each(tmp_path):
    flat = fill(tmp_path / "flat", {"": 3})
    mixed = fill(tmp_path / "mixed", {"": 1, "a": 1, "b": 1})
    flat_splits = fill(tmp_path / "flat_splits", {"train": 2, "val": 1})
    flat_val = fill(tmp_path / "flat_val", {"train/a": 2, "train/b": 2, "val": 1})
    one = fill(tmp_path / "one", {"a": 3})
    empty = tmp_path / "empty"
    empty.mkdir()
    hollow = fill(tmp_path / "hollow", {"a": 1, "b": 1, "c": 0, "d": 0})
    differ = fill(tmp_path / "differ", {"train/a": 1, "train/b": 1, **{f"val/{c}": 1 for c in "adefghi"}})
    single = fill(tmp_path / "single", {"a": 1, "b": 1})
    (tmp_path / "file.zip").write_bytes(b"PK")
    for root, message in (
        (tmp_path / "nowhere", "no such folder: .*nowhere"),
        (tmp_path / "file.zip", r"expected a folder or a \.tar, got .*file\.zip"),
        (flat, "found 3 images directly in .*flat; put each class in a folder of its own"),
        (mixed, "found 1 images directly in .*mixed; put each class"),
        (flat_splits, "found 3 images directly in .*flat_splits/train, .*flat_splits/val; put each class"),
        (flat_val, "found 1 images directly in .*flat_val/val; put each class"),
        (one, "only one class in .*one: a; expected at least two"),
        (empty, "no images in .*empty: expected a folder for each class, with .jpg .jpeg"),
        (hollow, "class folders without images in .*hollow: c, d$"),
        (differ, "have different classes; only in train: b; only in val: d, e, f, g, h and 1 more"),
        (single, "every class of .*single has a single image"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_splits(root)
        assert "\n" not in str(caught.value)
    for fraction in (0, 1, -0.5, 1.5):
        with pytest.raises(UserError, match="expected val_fraction between 0 and 1"):
            open_splits(single, val_fraction=fraction)


def test_unlabelled_test_folder_beside_train_is_passed_over(tmp_path):
    root = fill(tmp_path, {"train/a": 10, "train/b": 10, "test": 5})
    splits = open_splits(root)
    assert (len(splits.train), len(splits.val)) == (18, 2)


# Tars and what timm reads


def pack(folder, tar, arcname="."):
    with tarfile.open(tar, "w") as file:
        file.add(folder, arcname)
    return tar


def test_tars_equal_the_folders_in_them(tmp_path):
    root = fill(tmp_path / "photos", {"train/a": 4, "train/b": 3, "val/a": 1, "val/b": 2})
    (root / "train" / "a" / "._0.png").write_bytes(b"x")
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        pack(root / split, tars / f"{split}.tar")
    want, got = open_splits(root), open_splits(tars)
    assert got.class_names == ("a", "b")
    for side in ("train", "val"):
        folder, tar = getattr(want, side), pickle.loads(pickle.dumps(getattr(got, side)))
        assert tar.targets.tolist() == folder.targets.tolist()
        for i in range(len(folder)):
            assert np.array_equal(np.asarray(tar.load(i)[0]), np.asarray(folder.load(i)[0]))
    assert os.path.relpath(got.train.name(0), tars) == "train.tar/a/0.png"
    assert len(open_source(tars / "train.tar")) == 7
    by_class = tmp_path / "by_class"
    by_class.mkdir()
    for name in "ab":
        pack(root / "train" / name, by_class / f"{name}.tar", "")
    source = open_source(by_class)
    assert inside(source, by_class) == {f"a.tar/{i}.png" for i in range(4)} | {f"b.tar/{i}.png" for i in range(3)}
    assert source.targets.tolist() == [0] * 4 + [1] * 3
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no images in .*none\.tar"):
        open_source(pack(tmp_path / "none", tmp_path / "none.tar"))


def test_torchvision_sets(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    splits = open_splits(f"torch/fashion_mnist@{tmp_path}")
    assert (len(splits.train), len(splits.val)) == (30, 20)
    assert splits.class_names == tuple(FashionMNIST.classes)
    full = open_source(f"builtin:fashion-mnist@{tmp_path}")
    assert np.array_equal(np.asarray(splits.val.load(3)[0]), np.asarray(full.load(3)[0]))
    assert splits.val.name(3) == f"torch/fashion_mnist@{tmp_path} val[3]"
    assert len(open_splits(f"torch/fashion_mnist@{tmp_path}", val_split=None).val) == 10
    fill(tmp_path / "photos", {"train/a": 2, "train/b": 1})
    for name in ("train/a/c.mov", "train/b/9.gif"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    source = open_source(f"torch/folder@{tmp_path / 'photos'}", "train")
    assert source.targets.tolist() == [0, 0, 1]
    folder = tmp_path / "photos" / "train"
    assert source.notes == (
        f"left out of {folder}: 1 file: 1 video (e.g. a/c.mov)",
        f"3 of the 4 images in {folder} are read; data.root={folder} reads all",
    )
    with pytest.raises(UserError, match=r"cannot open torch/cifar10@.*download=True"):
        open_splits(f"torch/cifar10@{tmp_path}")
    with pytest.raises(UserError, match="cannot open torch/cifar11: Unknown torchvision dataset cifar11"):
        open_splits("torch/cifar11")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` writes inside the test's folder, and the hub out of reach."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_hfds_equals_the_folder(tmp_path, hub_cache):
    root = fill(tmp_path / "photos", {"train/cat": 6, "train/dog": 4, "test/cat": 1, "test/dog": 2})
    splits, folder = open_splits(f"hfds/{root}@{hub_cache}"), open_splits(root)
    assert splits.class_names == ("cat", "dog")
    for side in ("train", "val"):
        ours, theirs = getattr(folder, side), pickle.loads(pickle.dumps(getattr(splits, side)))
        assert sorted(ours.targets) == sorted(theirs.targets)
        place = {ours.name(i): i for i in range(len(ours))}
        for i in range(len(theirs)):
            image, target = theirs.load(i)
            twin = place[theirs.name(i)]
            assert target == theirs.target(i) == ours.target(twin)
            assert np.array_equal(np.asarray(image), np.asarray(ours.load(twin)[0]))
    held_out = open_splits(f"hfds/{root}@{hub_cache}", val_split=None, val_fraction=0.3)
    assert np.bincount(held_out.val.targets).tolist() == [2, 1]
    assert len(open_source(f"hfds/{root}@{hub_cache}", "train[:50%]")) == 5


def test_hfds_finds_columns_by_type_and_takes_text_for_classes(tmp_path, hub_cache):
    import datasets

    blob = io.BytesIO()
    picture(3).save(blob, "PNG")
    rows = {"img": [{"bytes": blob.getvalue(), "path": None}] * 4, "kind": [0, 1, 1, 0]}
    types = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])})
    folder = tmp_path / "parquet"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=types).to_parquet(str(folder / "train-0.parquet"))
    types_yaml = (
        "  - name: img\n    dtype: image\n  - name: kind\n    dtype:\n      class_label:\n        names:\n"
        "          '0': 'no'\n          '1': 'yes'\n"
    )
    (folder / "README.md").write_text(f"---\ndataset_info:\n  features:\n{types_yaml}---\n")
    source = open_source(f"hfds/{folder}@{hub_cache}", "train")
    assert (source.class_names, source.targets.tolist()) == (("no", "yes"), [0, 1, 1, 0])
    assert source.load(2)[0].getpixel((0, 0)) == (3, 0, 77)
    assert source.name(2) == f"hfds/{folder}@{hub_cache} train[2]"

    text = tmp_path / "text"
    text.mkdir()
    types = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": rows["img"], "label": ["b10", "b9", "a", "a"]}
    datasets.Dataset.from_dict(rows, features=types).to_parquet(str(text / "train-0.parquet"))
    source = open_source(f"hfds/{text}@{hub_cache}", "train")
    assert (source.class_names, source.targets.tolist()) == (("a", "b9", "b10"), [2, 1, 0, 0])

    for kind, label in (("int64", [0, None, 1, 1]), ("int64", [0, -1, 1, 1]), ("string", ["a", None, "b", "b"])):
        types = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        wrong = tmp_path / f"wrong_{kind}_{label[1]}"
        wrong.mkdir()
        columns = {"image": rows["image"], "label": label}
        datasets.Dataset.from_dict(columns, features=types).to_parquet(str(wrong / "train-0.parquet"))
        with pytest.raises(UserError, match=r"expected one class for each image in .* train, column label"):
            open_source(f"hfds/{wrong}@{hub_cache}", "train")


def test_hfids_streams_the_same_images(tmp_path, hub_cache):
    photos = fill(tmp_path / "photos", {"train/cat": 6, "train/dog": 4})
    folder = open_source(photos / "train")
    want = sorted((np.asarray(image).tobytes(), target) for image, target in map(folder.load, range(len(folder))))
    root = f"hfids/{photos}@{hub_cache}"
    remote = open_source(root, "train|10", class_map={"cat": 0, "dog": 1})
    prepared = open_source(root, "train", download=True)
    for stream in (remote, prepared):
        assert (stream.num_samples, stream.class_names) == (10, ("cat", "dog"))
        assert sorted((np.asarray(image).tobytes(), target) for image, target in stream) == want
    with pytest.raises(UserError, match="nothing can be held out of a stream"):
        open_splits(root, download=True)
    with pytest.raises(UserError, match="Dataset length is unknown"):
        open_source(f"hfids/{photos}@{tmp_path / 'another'}", "train")


def test_hub_that_cannot_be_reached_is_one_line(hub_cache):
    with pytest.raises(UserError, match="cannot open hfds/nobody/nothing: ") as caught:
        open_splits("hfds/nobody/nothing")
    assert "\n" not in str(caught.value)


def shards(folder, info=True):
    """Two training shards of four images and one of validation, in webdataset's layout."""
    folder.mkdir()
    number, splits = 0, {}
    for split, count in (("train", 2), ("validation", 1)):
        files_of_split = [f"{split}-{i}.tar" for i in range(count)]
        for name in files_of_split:
            with tarfile.open(folder / name, "w") as tar:
                for _ in range(4):
                    blob = io.BytesIO()
                    picture(number).save(blob, "PNG")
                    for suffix, content in (("png", blob.getvalue()), ("cls", str(number % 2).encode())):
                        member = tarfile.TarInfo(f"{number:04}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    number += 1
        splits[split] = {
            "name": split,
            "num_samples": 4 * count,
            "filenames": files_of_split,
            "shard_lengths": [4] * count,
        }
    if info:
        (folder / "_info.json").write_text(json.dumps({"class_names": ["even", "odd"], "splits": splits}))
    return folder


def colours(stream):
    return [(image.getpixel((0, 0))[0], target) for image, target in stream]


def test_wds_streams_shards(tmp_path):
    root = shards(tmp_path / "shards")
    splits = open_splits(f"wds/{root}")
    assert (splits.train.num_samples, splits.val.num_samples, splits.class_names) == (8, 4, ("even", "odd"))
    assert colours(splits.val) == [(n, n % 2) for n in range(8, 12)]
    splits.train.set_epoch(1)
    assert sorted(colours(splits.train)) == [(n, n % 2) for n in range(8)]
    swapped = open_source(f"wds/{root}", class_map={"odd": 0, "even": 1})
    assert colours(swapped) == [(n, 1 - n % 2) for n in range(8, 12)]
    only_odd = open_source(f"wds/{root}", class_map={"odd": 0, "other": 1})
    assert colours(only_odd) == [(9, 0), (11, 0)]


def test_wds_reads_any_range_of_places(tmp_path):
    train = open_splits(f"wds/{shards(tmp_path / 'shards')}").train
    whole = colours(train.read(0, 8))
    assert sorted(whole) == [(n, n % 2) for n in range(8)]
    assert sorted(colours(train.read(0, 3)) + colours(train.read(3, 8))) == sorted(whole)
    assert colours(train.read(0, 8, skip=5)) == whole[5:]


def test_timm_fills_batches_where_it_shares_shards(tmp_path):
    root = shards(tmp_path / "shards", info=False)
    names_given = {"class_map": {"even": 0, "odd": 1}}
    splits = open_splits(
        f"wds/pipe:cat {root}", train_split="train-{0..1}.tar|8", val_split="validation-0.tar", **names_given
    )
    assert splits.train.samples_per_process(num_workers=2, batch_size=3) == 12  # 4 a worker, filled up to 6
    assert (splits.train.sequence, splits.val.num_samples) == (None, None)


def test_wds_without_info_needs_shards_and_class_names(tmp_path):
    root = shards(tmp_path / "shards", info=False)
    with pytest.raises(UserError, match="does not name its classes: give a class_map"):
        open_source(f"wds/{root}", "validation-0.tar")
    names_given = {"class_map": {"even": 0, "odd": 1}}
    splits = open_splits(f"wds/{root}", train_split="train-{0..1}.tar|8", val_split="validation-0.tar", **names_given)
    assert splits.class_names == ("even", "odd")
    assert len(colours(splits.train)) == 8
    with pytest.raises(UserError, match="name a split of wds/"):
        open_source(f"wds/{root}", **names_given)
    with pytest.raises(UserError, match="split train not found in info"):
        open_splits(f"wds/{root}", **names_given)
    with pytest.raises(UserError, match=f"no such folder: {root}/deeper"):
        open_splits(f"wds/{root}/deeper", **names_given)


@pytest.mark.parametrize(
    ("root", "module", "package"),
    [
        ("hfds/x", "datasets", "datasets"),
        ("HFIDS/x", "datasets", "datasets"),
        ("wds/x", "webdataset", "webdataset"),
        ("tfds/x", "tensorflow", "tensorflow tensorflow-datasets"),
    ],
)
def test_missing_package_names_the_pip_install(monkeypatch, root, module, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(UserError, match=f"{root} needs another package: pip install {package}$"):
        open_splits(root)


def test_tfds_goes_through_timms_reader(monkeypatch):
    """tensorflow is too large for this: a stand-in for the builder and for timm's reader, which yields arrays."""

    class Info:
        splits = ("train", "test")

    class Builder:
        info = Info()

    class Tfds:
        __spec__ = None

        @staticmethod
        def builder(name, data_dir):
            assert (name, data_dir) == ("toy", "/data")
            return Builder()

    class Reader:
        num_samples, class_to_idx = 2, {"no": 0, "yes": 1}

    class Stream:
        reader = Reader()

        def __iter__(self):
            yield np.full((4, 4, 3), 9, dtype=np.uint8), np.int64(1)
            yield np.zeros((4, 4, 7), dtype=np.uint8), np.int64(0)

    def create_dataset(name, **options):
        assert (name, options["root"], options["input_img_mode"]) == ("tfds/toy", "/data", "")
        return Stream()

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", Tfds)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(timm_sets, "create_dataset", create_dataset)
    splits = open_splits("tfds/toy@/data")
    assert splits.val.title == "tfds/toy@/data test"
    (image, target), (bad, bad_target) = splits.train
    assert (image.getpixel((0, 0)), target) == ((9, 9, 9), 1)
    assert (type(bad), bad.name, bad_target) == (BadImage, "tfds/toy@/data train[1]", 0)


# Measuring a model: its training images are never among what is measured


@pytest.fixture
def trained(tmp_path):
    """An undivided folder of images with names of their own, its splits, and the record after a trip through JSON."""
    root = fill(tmp_path / "photos", {"cat": 0, "dog": 0, "eel": 0})
    for number in range(90):
        picture(number).save(root / ("cat", "dog", "eel")[number % 3] / f"img_{number:03}.png")
    splits = open_splits(root, val_fraction=0.2, split_seed=5)
    return root, splits, stored(splits)


def stored(splits, published=False):
    """A model folder's record of its data; the Hub's copy of it doesn't know absolute paths."""
    record = json.loads(json.dumps(splits.record))
    if published:
        record = {key: Path(v).name if str(v).startswith("/") else v for key, v in record.items() if key != "path"}
    return record_of({"data": record})


def measured(root, record, split="auto"):
    """Relative names of what is measured, and what it is called."""
    found = open_measured(root, split, record=record)
    assert found.images == len(found.source)
    return {found.source.relative_name(i) for i in range(len(found.source))}, found.split


def relative(source):
    return {source.relative_name(i) for i in range(len(source))}


def test_every_spelling_of_the_folder_gives_the_held_out_part(trained, tmp_path, monkeypatch):
    root, splits, record = trained
    link, moved = tmp_path / "link", tmp_path / "elsewhere" / "renamed"
    link.symlink_to(root)
    shutil.copytree(root, moved)
    want = relative(splits.val), "held-out part"
    assert len(want[0]) == 18
    monkeypatch.chdir(tmp_path)
    for spelling in (root, f"{root}/", "photos", "photos/", "./photos", "elsewhere/../photos", link, moved):
        assert measured(spelling, record) == want
        assert measured(spelling, stored(splits, published=True)) == want
        assert measured(spelling, record, "val")[0] == want[0]
    monkeypatch.chdir(root)
    assert measured(".", record) == want
    assert measured(root, record, "all") == (relative(open_source(root)), "all")
    assert open_measured(moved, record=record).fingerprint == record["val"]["names"]
    tar = pack(root, tmp_path / "photos.tar", "")
    assert measured(tar, record) == want


def test_added_and_removed_images_move_no_training_image_into_the_held_out_part(trained):
    root, splits, record = trained
    trained_on, held_out = relative(splits.train), relative(splits.val)
    for number in range(300):
        picture(number).save(root / "cat" / f"new_{number}.png")
    fill(root, {"fox": 4})
    for name in sorted(held_out)[:5]:
        (root / os.fsdecode(name)).unlink()
    names, shown = measured(root, record)
    assert shown == "held-out part"
    assert names - held_out
    assert not names & trained_on
    assert names >= set(sorted(held_out)[5:])
    assert not measured(root, record, "val")[0] & trained_on


def test_folders_around_or_inside_the_training_folder_are_refused(trained, tmp_path):
    root, _, record = trained
    shutil.move(root, tmp_path / "outer" / "train")
    for published in (False, True):
        record = record | {"path": None} if published else record
        with pytest.raises(UserError, match=r"about \d+ of the 90 images in .*outer have names of images .*--split"):
            measured(tmp_path / "outer", record)
    for number in range(8):
        fill(tmp_path / "deep" / "a", {f"{number}/x{number}": 2, f"{number}/y{number}": 2})
    record = stored(open_splits(tmp_path / "deep"))
    with pytest.raises(UserError, match=r"of the 32 images in .*deep/a have names of images"):
        measured(tmp_path / "deep" / "a", record)


def test_other_data_is_measured_whole_or_by_its_own_split(trained, tmp_path):
    _, _, record = trained
    whole = fill(tmp_path / "other", {"cat": 3, "dog": 2})
    assert measured(whole, record) == (relative(open_source(whole)), "all")
    assert measured(whole, None) == (relative(open_source(whole)), "all")
    divided = fill(tmp_path / "divided", {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1})
    assert measured(divided, record)[1] == measured(divided, None)[1] == "val"
    assert open_measured("builtin:fashion-mnist-mini", record=record).split == "test"
    with pytest.raises(UserError, match="no split 'all' in"):
        open_measured(divided, "all")
    emptied = fill(tmp_path / "moved", {"cat": 1, "dog": 1})
    with pytest.raises(
        UserError, match=r"none of the images that training held out: choose by --split, e\.g\. --split all"
    ):
        measured(emptied, record | {"path": str(emptied), "held_out": {}})


@pytest.fixture
def divided(tmp_path):
    """Train, val and test folders in which names are numbers that begin with 0 in each folder, and a record that names `test`."""
    counts = {"train": 8, "val": 4, "test": 5}
    root = fill(tmp_path / "set", {f"{split}/{label}": n for split, n in counts.items() for label in "ab"})
    return root, stored(open_splits(root, val_split="test"))


def test_the_recorded_split_of_a_divided_folder(divided, tmp_path):
    root, record = divided
    assert record["train_split"] == "train"
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    want = relative(open_source(root, "test")), "test"
    for place in (root, f"{root}/", moved):
        assert measured(place, record) == want
        assert measured(place, record | {"path": None}) == want
        assert measured(place, record, "val")[1] == "val"
    assert measured(root / "test", record) == (want[0], "all")
    assert measured(moved / "test", record) == (want[0], "all")
    shutil.rmtree(moved / "test")
    assert measured(moved, record)[1] == "val"


def test_the_training_split_itself_is_refused(divided, tmp_path):
    root, record = divided
    flattened = tmp_path / "flattened"
    shutil.copytree(root / "train", flattened)
    for label in "ab":
        for path in (root / "test" / label).iterdir():
            shutil.copy(path, flattened / label / f"test_{path.name}")
    for place, images in ((root / "train", 16), (flattened, 26)):
        with pytest.raises(UserError, match=rf"about 16 of the {images} images in .* --split all") as caught:
            measured(place, record | {"path": None})
        assert "\n" not in str(caught.value)
        assert measured(place, record, "all")[1] == "all"


def test_splits_with_equal_names_are_told_apart_by_path_only(tmp_path):
    root = fill(tmp_path / "set", {f"{split}/{label}": 3 for split in ("train", "val") for label in "ab"})
    record = stored(open_splits(root))
    assert record["train"]["sketch"] == ""
    assert measured(root / "val", record)[1] == "all"
    for place, known in ((root / "train", record), (root / "val", record | {"path": None})):
        with pytest.raises(UserError, match="about 6 of the 6 images in"):
            measured(place, known)


def test_data_that_is_no_folder_is_recognised_by_its_root(tmp_path, hub_cache):
    splits = open_splits("builtin:fashion-mnist-mini")
    assert measured("builtin:fashion-mnist-mini", stored(splits)) == (relative(splits.val), "test")
    photos = fill(tmp_path / "photos", {"train/cat": 6, "train/dog": 4})
    root = f"hfds/{photos}@{hub_cache}"
    splits = open_splits(root, val_fraction=0.3)
    assert measured(root, stored(splits)) == (relative(splits.val), "held-out part")
    tar = pack(fill(tmp_path / "b", {"cat": 9, "dog": 9}), tmp_path / "b.tar")
    splits = open_splits(tar)
    moved = shutil.move(tar, tmp_path / "c.tar")
    assert measured(moved, stored(splits)) == (relative(splits.val), "held-out part")
    fill(tmp_path / "b", {"cat": 10})
    with pytest.raises(UserError, match=r"c\.tar has changed since the model was trained .* --split all"):
        measured(pack(tmp_path / "b", tmp_path / "c.tar"), stored(splits))


def test_streams_are_recognised_by_their_root(tmp_path):
    root = f"wds/{shards(tmp_path / 'shards')}"
    splits = open_splits(root, val_split="train")
    record = record_of({"data": json.loads(json.dumps(splits.record))})
    found = open_measured(root, record=record)
    assert (found.split, found.images, found.fingerprint) == ("train", 8, "")
    assert open_measured(root).split == "validation"


def test_records_of_earlier_versions(trained, divided, tmp_path, monkeypatch):
    root, _, _ = trained
    monkeypatch.chdir(tmp_path)
    want = relative(open_splits(root, val_fraction=0.2, split_seed=5).val), "held-out part"
    for written, given in (("photos", "photos"), ("photos", "./photos/"), (str(root), "photos"), ("photos", root)):
        record = record_of({"data": written, "seed": 5, "val_fraction": 0.2, "top1": 90.0})
        assert measured(given, record) == want
    shutil.copytree(root, tmp_path / "copy" / "photos")
    for given in ("copy/photos", tmp_path / "copy" / "photos"):
        with pytest.raises(
            UserError, match=r"is the folder photos that the model was trained on is not known: .*--split all"
        ):
            measured(given, record)
        assert measured(given, record, "all")[1] == "all"
    other = fill(tmp_path / "other", {"cat": 3, "dog": 2})
    assert measured(other, record)[1] == "all"
    assert measured(divided[0], record_of({"data": "elsewhere/set", "seed": 0, "val_fraction": 0.1}))[1] == "val"
    assert record_of({"top1": 90.0}) is None


def test_hold_out_by_groups_of_any_source_and_a_table_of_kinds_of_its_own(tmp_path):
    """What a task whose targets are no classes needs of this room."""

    class Depths(Source):
        title = "depths"

        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def load(self, index):
            return picture(int(self.rows[index])), float(self.rows[index])

        def name(self, index):
            return f"depths/{self.rows[index]}"

        def relative_name(self, index):
            return f"{self.rows[index]}.png".encode()

        def select(self, rows):
            return Depths(self.rows[rows])

    kinds = {"folder": Kind(lambda request: (), lambda request, split: Depths(np.arange(50)), free_form=False)}
    splits = open_splits(tmp_path, kinds=kinds)
    assert (len(splits.train), len(splits.val)) == (45, 5)
    assert list(splits.record["held_out"]) == ["0"]
    found = open_measured(f"{tmp_path}/", record=stored(splits), kinds=kinds)
    assert (relative(found.source), found.split) == (relative(splits.val), "held-out part")
    assert splits.val.image(0)[0] == splits.val.name(0)


def test_a_defect_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    root = fill(tmp_path, {"a": 1, "b": 1})
    source = open_source(root)
    monkeypatch.setattr("effvit_zoo.data.roots.folder.natural_order", lambda names: len(None))
    with pytest.raises(TypeError):
        open_source(root)
    monkeypatch.setattr(type(source), "_row", lambda self, index: index.row)
    with pytest.raises(AttributeError):
        source.load(0)


@pytest.mark.slow
def test_names_of_a_million_files_stay_small():
    paths = FilePaths("/data", [f"class_{i % 1000:03}/{i:07}.jpg" for i in range(200_000)])
    source = ImageSource("/data", paths, tuple(map(str, range(1000))), np.arange(200_000, dtype=np.int32) % 1000)
    assert len(pickle.dumps(source)) < 40 * len(source)
    splits = DataSplits(*hold_out(source, 0.1, 0)[:2])
    tracemalloc.start()
    record = splits.record
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(source)
    assert len(json.dumps(record)) < 5000

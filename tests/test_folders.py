"""Folders as people have them: every file is used, or counted with a reason; trees that can be read in two ways are refused."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from runs import make_photos, train_small
from test_data import fill, inside, measured, pack, picture, relative, stored

from effvit_zoo.data import duplicates, open_measured, open_source, open_splits
from effvit_zoo.data.images import BadImage, find_images, open_image
from effvit_zoo.data.roots import parse
from effvit_zoo.errors import UserError


def said(splits):
    return "\n".join(splits.notes)


# What is left out


@pytest.fixture
def messy(tmp_path):
    """Four images, and thirteen other files below cat/ and dog/."""
    root = fill(tmp_path / "messy", {"cat": 2, "dog": 2})
    (root / "cat" / "0.png").rename(root / "cat" / "LOUD.PNG")
    for name in (
        "cat/a.nef",
        "cat/b.NEF",
        "cat/clip.MP4",
        "dog/list.csv",
        "dog/noextension",
        "dog/x.xyz",
        "cat/._1.png",
    ):
        (root / name).write_bytes(b"x")
    for name in ("__MACOSX/cat/._0.png", ".git/config", ".git/objects/1", "dog/Thumbs.db"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "again").symlink_to(root / "cat")
    os.mkfifo(root / "dog" / "pipe.png")
    return root


def test_every_file_is_an_image_or_counted(messy):
    source = open_source(messy)
    assert inside(source, messy) == {"cat/LOUD.PNG", "cat/1.png", "dog/0.png", "dog/1.png"}
    (note,) = source.notes
    for part in (
        f"left out of {messy}: 14 files: ",
        "5 hidden (e.g. ",
        "2 camera raw (e.g. cat/a.nef)",
        "1 video (e.g. cat/clip.MP4)",
        "1 text or table (e.g. dog/list.csv)",
        "1 no extension (e.g. dog/noextension)",
        "1 unknown type .xyz",
        "1 broken link (e.g. cat/gone.png)",
        "1 not a regular file (e.g. dog/pipe.png)",
        "1 link to a folder that is read already (e.g. dog/again)",
    ):
        assert part in note
    assert said(open_splits(messy)) == note
    assert open_measured(messy).source.notes == source.notes


def test_tars_count_what_they_leave_out_and_read_what_folders_read(messy, tmp_path):
    Image.new("RGB", (4, 4)).save(messy / "dog" / "more.webp")
    source = open_source(pack(messy, tmp_path / "messy.tar"))
    assert {name.split("/", 1)[1] for name in map(os.fsdecode, relative(source))} == {
        "LOUD.PNG", "1.png", "0.png", "more.webp",
    }  # fmt: skip
    assert "2 camera raw" in source.notes[0]
    assert "5 hidden" in source.notes[0]
    (tmp_path / "only").mkdir()
    for name in "ab":
        (tmp_path / "only" / f"{name}.txt").write_text(name)
    tar = pack(tmp_path / "only", tmp_path / "only.tar")
    with pytest.raises(UserError, match=r"no images in .*only\.tar; left out of .*: 2 files: 2 text or table"):
        open_source(tar)


def test_heic_names_its_package_where_it_is_missing_and_is_read_where_it_is_there(tmp_path, monkeypatch):
    root = fill(tmp_path, {"cat": 1, "dog": 1})
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture(9, (64, 48)).save(root / "cat" / "photo.HEIC", format="HEIF")
    shutil.copy(root / "cat" / "photo.HEIC", root / "dog" / "renamed.jpg")
    source = open_source(root)
    assert len(source) == 4
    assert {source.load(i)[0].size for i in range(4)} == {(6, 5), (64, 48)}
    assert not source.notes
    monkeypatch.setattr("effvit_zoo.data.file_types.IMAGE_SUFFIXES", (".png", ".jpg"))
    for registry in (Image.OPEN, Image.MIME):
        monkeypatch.delitem(registry, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    assert open_source(root).notes == (
        f"left out of {root}: 1 file: 1 HEIC, read after pip install pillow-heif (e.g. cat/photo.HEIC)",
    )
    for path in ("cat/photo.HEIC", "dog/renamed.jpg"):
        with pytest.raises(BadImage, match="HEIC, read after pip install pillow-heif"):
            open_image(root / path)
    (root / "dog" / "0.png").unlink()
    (root / "dog" / "renamed.jpg").unlink()
    shutil.copy(root / "cat" / "photo.HEIC", root / "dog")
    with pytest.raises(UserError, match=r"class folders without images in .*: dog; left out of .*2 HEIC"):
        open_source(root)


def test_predict_says_what_it_leaves_out(messy):
    lines = []
    assert len(list(find_images([messy], lines.append))) == 4
    assert "2 camera raw" in lines[0]
    with pytest.raises(BadImage, match=r"contains no image .*1 hidden"):
        list(find_images([fill(messy / "none" / ".x", {"": 1}).parent]))


# Splits and nesting


def test_val_beside_the_classes_is_not_trained_on(tmp_path):
    root = fill(tmp_path, {"blue": 12, "red": 12, "val/blue": 4, "val/red": 3, "test/blue": 1, "test/red": 1})
    splits = open_splits(root)
    assert (len(splits.train), len(splits.val)) == (24, 7)
    assert splits.class_names == ("blue", "red")
    assert "has no train/: its class folders are the training images, test, val is not" in said(splits)
    assert relative(open_source(root, "train")) == relative(splits.train)
    assert measured(root, stored(splits)) == (relative(splits.val), "val")
    for folder in ("blue", "red"):
        shutil.rmtree(root / folder)
    with pytest.raises(UserError, match=r"no training images in .*found test, val, expected train/ or class folders"):
        open_splits(root)
    assert len(open_source(root)) == 7


@pytest.mark.parametrize("name", ["test", "Validation"])
def test_loose_images_in_a_folder_named_like_a_split(tmp_path, name):
    root = fill(tmp_path, {"blue": 3, "red": 3, name: 5})
    with pytest.raises(UserError, match=f"has {name} with images but without class folders"):
        open_splits(root)


def test_class_folders_beside_train_are_refused_others_counted(tmp_path):
    root = fill(tmp_path / "a", {"train/blue": 4, "train/red": 4, "spare": 2, "more/x": 3, "": 1})
    (root / "notes").mkdir()
    assert "left out" in said(open_splits(root))
    for part in ("spare/ with 2 images", "more/ with 3 images", "1 images directly in it"):
        assert part in said(open_splits(root))
    fill(root, {"red": 2})
    with pytest.raises(UserError, match=r"has the classes red in train and beside it: .*data.root=.*/train"):
        open_splits(root)
    plain = fill(tmp_path / "b", {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 3})
    assert "test/ with 3 images" in said(open_splits(plain))
    shutil.rmtree(plain / "test")
    assert open_splits(plain).notes == ()


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_trees_with_two_readings(tmp_path, packed):
    trees = {
        "twice": (
            ["cat/indoor", "cat/outdoor", "dog/indoor", "dog/outdoor"],
            "whether the classes are indoor or cat, dog",
        ),
        "mixed": (["cat", "cat/more", "dog"], "has images in cat and in cat/more"),
        "wrapped": (["photos/train/a", "photos/train/b", "photos/val/a"], "splits train, val deeper inside"),
    }
    for name, (folders, message) in trees.items():
        root = fill(tmp_path / name, dict.fromkeys(folders, 2))
        with pytest.raises(UserError, match=message) as caught:
            open_splits(pack(root, tmp_path / f"{name}.tar") if packed else root)
        assert "\n" not in str(caught.value)
    root = fill(tmp_path / "deep", {"photos/cat": 3, "photos/dog": 3})
    source = open_source(pack(root, tmp_path / "deep.tar") if packed else root)
    assert source.class_names == ("cat", "dog")
    assert "the innermost are the classes: cat, dog (e.g. photos/cat)" in source.notes[0]


# Names of classes


def test_names_are_equal_in_every_unicode_form(tmp_path):
    one, two = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    counts = {f"train/{one}": 9, "train/Caff": 9, f"val/{two}": 3, "val/Caff": 3}
    splits = open_splits(fill(tmp_path / "apart", counts))
    assert splits.class_names == splits.val.class_names == ("Caff", one)
    assert np.bincount(splits.val.targets).tolist() == [3, 3]
    typed, copied = (fill(tmp_path / form, {name: 20, "Bar": 20}) for form, name in (("NFC", one), ("NFD", two)))
    record = stored(open_splits(typed))
    found = open_measured(copied, record=record)
    assert (found.split, found.fingerprint, found.source.class_names) == (
        "held-out part",
        record["val"]["names"],
        ("Bar", one),
    )
    both = open_source(fill(tmp_path / "both", {one: 3, two: 4, "Bar": 1}))
    assert (both.class_names, np.bincount(both.targets).tolist()) == (("Bar", one), [1, 7])
    assert "several Unicode forms" in both.notes[0]
    assert open_source(tmp_path / "both", class_map={two: 0, "Bar": 1}).class_names == (one, "Bar")


def test_a_split_of_the_first_release_is_found_in_decomposed_names(tmp_path):
    """Images were ranked by their names as stored; the record has no more than root, seed and fraction."""
    name = unicodedata.normalize("NFD", "Café")
    root = fill(tmp_path / "photos", {name: 40, "Bar": 2})
    from hashlib import blake2b

    paths = [f"{name}/{i}.png".encode() for i in range(40)]
    ranked = sorted(paths, key=lambda path: blake2b(path, digest_size=8, key=b"3").digest())
    found, shown = measured(root, {"root": str(root), "split_seed": 3, "val_fraction": 0.1})
    assert shown == "held-out part"
    assert {path for path in found if not path.startswith(b"Bar")} == set(ranked[:4])


def test_classes_that_differ_in_case_only_are_told(tmp_path):
    source = open_source(fill(tmp_path, {"Cat": 1, "cat": 1, "dog": 1}))
    assert source.class_names == ("Cat", "cat", "dog")
    assert "differ in case or spaces only: Cat, cat" in source.notes[0]


# Kinds of roots


@pytest.mark.parametrize("kind", ["torch", "wds", "tfds", "hfds", "hfids", "builtin", "folder"])
def test_a_folder_named_like_a_kind_is_a_folder(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert parse(f"{kind}/mine").kind == ("folder" if kind in ("builtin", "folder") else kind)
    fill(tmp_path / kind / "mine", {"blue": 12, "red": 12})
    splits = open_splits(f"{kind}/mine")
    assert len(splits.train) + len(splits.val) == 24
    assert (f"{kind}/mine is the folder ./{kind}/mine" in said(splits)) == (kind not in ("builtin", "folder"))
    record = stored(splits)
    monkeypatch.chdir(tmp_path / kind)
    assert measured("mine", record) == (relative(splits.val), "held-out part")


# One picture twice


def test_one_picture_under_two_labels_is_named(tmp_path):
    root = fill(tmp_path / "photos", {"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 2})
    shutil.copy(root / "train/cat/1.png", root / "train/dog/other.png")
    shutil.copy(root / "val/dog/0.png", root / "val/dog/copy.png")
    for place in (root, tmp_path / "tars"):
        if place != root:
            place.mkdir()
            for split in ("train", "val"):
                pack(root / split, place / f"{split}.tar", "")
        splits = open_splits(place)
        found = duplicates(splits.train, splits.val)
        assert found.shared == []
        assert [[os.path.basename(name) for name in group] for group in found.contradictions] == [
            ["1.png", "other.png"]
        ]


# In a run


def test_a_run_says_classes_and_what_is_left_out(tmp_path, capsys):
    root = make_photos(tmp_path / "photos", {"": {"blue": 22, "red": 11}})
    shutil.copy(root / "blue/1.png", root / "red/same.png")
    (root / "red" / "clip.mov").write_bytes(b"x")
    (tmp_path / "small.yaml").write_text("model: {name: effzoo_vit_pico}\n")
    assert train_small(tmp_path / "run", f"data.root={root}", more=["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "classes (training+validation images): blue 20+2, red 11+1",
        "1 file: 1 video (e.g. red/clip.mov)",
        "warning: 1 image stands under several labels, e.g. ",
        "photos/blue/1.png and ",
    ):
        assert part in printed
    shutil.copytree(root / "red", root / "blue" / "red")
    assert train_small(tmp_path / "run", f"data.root={root}", more=["--dry-run"]) == 2
    assert "has images in blue and in blue/red" in capsys.readouterr().err


def test_many_classes_are_shortened(tmp_path):
    from effvit_zoo.tasks.classification import Classification

    root = fill(tmp_path, {f"c{i:02}": 2 + i % 7 for i in range(30)})
    splits = open_splits(root)
    note = Classification(30, labels=splits.class_names).data_notes(splits)[0]
    assert note.startswith("classes (training+validation images): c00 1+1, c01 2+1, ")
    assert note.endswith("... (30 classes); largest c06 7+1, smallest c00 1+1")

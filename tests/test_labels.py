"""Labels in a table: every spelling of it that people have, every row accounted for, and the held-out part found again."""

import json
import os
import shutil

import pytest
from runs import make_photos, summary, train_small
from test_data import fill, measured, names, relative, stored

from effvit_zoo.data import open_measured, open_source, open_splits
from effvit_zoo.errors import UserError


@pytest.fixture
def flat(tmp_path):
    """Twenty images in one folder, and what they show."""
    root = fill(tmp_path / "photos", {"": 20})
    return root, {f"{i}.png": ("cat", "dog")[i % 2] for i in range(20)}


def write(path, rows, head=("path", "label"), separator=",", encoding="utf-8"):
    lines = [separator.join(map(str, row)) for row in (head, *rows)]
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode(encoding))
    return path


def labels_of(source):
    return {
        os.path.basename(name): source.class_names[t] for name, t in zip(names(source), source.targets, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "head", "separator", "encoding", "prefix"),
    [
        ("labels.csv", ("path", "label"), ",", "utf-8", ""),
        ("labels.csv", ("File Name", "Class"), ";", "utf-8-sig", "./"),
        ("labels.tsv", ("image", "category"), "\t", "utf-16", ""),
        ("LABELS.CSV", ("filename", "class-name"), ",", "utf-8", "..\\photos\\"),
        ("../labels.csv", ("path", "label"), "|", "utf-8", "photos/"),
    ],
    ids=["plain", "excel", "utf16", "windows", "beside"],
)
def test_spellings_of_a_table(flat, name, head, separator, encoding, prefix):
    root, want = flat
    table = write(root / name, [(prefix + path, label) for path, label in want.items()], head, separator, encoding)
    for source in (
        open_source(root, labels=table),
        open_source(root, labels=name),
        open_source(root, "all", labels=table),
    ):
        assert labels_of(source) == want
        assert source.notes == ()
    if root in table.parents:
        assert labels_of(open_source(table)) == want


def test_names_without_extension_and_quoted_cells(flat):
    root, want = flat
    fill(root / "sub, folder", {"": 1})
    rows = [(path.removesuffix(".png"), label, "x") for path, label in want.items()]
    table = write(root / "labels.csv", [*rows, ('"sub, folder/0"', '"a ""cat"""', "x")], ("id", "label", "age"))
    source = open_source(table)
    assert labels_of(source)["1.png"] == "dog"
    assert source.class_names == ('a "cat"', "cat", "dog")
    assert source.notes == (f"columns of {table} that are not used: age (id is the path, label is the label)",)


def test_every_row_and_image_is_accounted_for(flat):
    root, want = flat
    rows = [*want.items()][:16]
    more = [rows[0], ("gone.png", "cat"), ("18.png", ""), ("clip.mov", "dog"), ("", "cat")]
    (root / "clip.mov").write_bytes(b"x")
    splits = open_splits(root, labels=write(root / "labels.csv", [*rows, *more]))
    assert len(splits.train) + len(splits.val) == 16
    assert splits.notes == (
        f"left out of {root / 'labels.csv'}: 5 rows: 2 rows whose file does not exist (e.g. gone.png); "
        "1 repeated rows (e.g. 0.png); 1 rows without a label (e.g. 18.png); 1 video (e.g. clip.mov)",
        f"left out of {root}: 5 files: 4 images that are not in the table (e.g. 16.png); 1 video (e.g. clip.mov)",
    )


def test_a_split_column(flat):
    root, want = flat
    parts = ["Train"] * 10 + ["valid"] * 6 + ["TEST"] * 3 + [""]
    table = write(
        root / "labels.csv",
        [(*row, part) for row, part in zip(want.items(), parts, strict=True)],
        ("path", "label", "Subset"),
    )
    splits = open_splits(root, labels="labels.csv")
    assert (len(splits.train), len(splits.val)) == (10, 6)
    assert any("test with 3 rows" in note for note in splits.notes)
    assert any("1 rows without a split (e.g. 19.png)" in note for note in splits.notes)
    record = stored(splits)
    assert measured(root, record) == measured(table, record) == (relative(splits.val), "valid")
    assert len(open_source(table, "test")) == 3
    write(table, [(*row, "test") for row in want.items()], ("path", "label", "split"))
    with pytest.raises(UserError, match=r"no rows of the split train in .*: found test"):
        open_splits(table)


def test_the_held_out_part_of_a_table_is_found_again(flat, tmp_path):
    root, want = flat
    for place in (root / "labels.csv", tmp_path / "labels.csv"):
        write(place, want.items())
        splits = open_splits(root, labels=place, val_fraction=0.3)
        record = stored(splits, published=True)
        assert not str(record["labels"]).startswith("/")
        want_part = relative(splits.val), "held-out part"
        assert len(splits.val) == 6
        assert measured(root, record) == want_part
        moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{place.parent.name}") / "photos"
        assert measured(moved, record) == want_part
        assert open_measured(root, record=record, labels=place).fingerprint == record["val"]["names"]
        place.unlink()
        with pytest.raises(
            UserError, match=r"trained with labels in .*labels\.csv, which is not there: name the table"
        ):
            open_measured(root, record=record)


def test_mistakes_with_tables_are_one_line_each(flat, tmp_path):
    root, want = flat
    rows = [*want.items()]
    table = root / "labels.csv"
    for content, message in (
        ([*rows, ("0.png", "dog")], r"has two labels for 0\.png: cat in line 2, dog in line 22"),
        ([("x", "cat"), ("y", "dog")], r"no row of .* has an image below .*: 2 rows: 2 rows whose file does not exist"),
        ([("a", "cat", "dog")], r"line 2: 3 cells, expected 2"),
        ([], "no row of"),
        ([('"0.png', "cat")], r"labels\.csv, line \d: unexpected end of data"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_splits(root, labels=write(table, content))
        assert "\n" not in str(caught.value)
    for head, message in (
        (("picture", "label"), r"no column of the path in .* has picture, label, expected one of path, file"),
        (("0.png", "cat"), "no column of the path"),
        (("path", "breed"), "no column of the label in .* has path, breed, expected one of label, class"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(root, labels=write(table, rows, head))
    table.write_bytes(b"path,label\n0.png,Gr\xfcn\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(line 2\): save it as UTF-8"):
        open_splits(table)
    for labels, message in (
        ("nowhere.csv", r"expected a table of labels, \.csv or \.tsv, got nowhere\.csv: no such file"),
        (root / "0.png", r"expected a table of labels, .* got .*0\.png$"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(root, labels=labels)
    with pytest.raises(UserError, match=r"data\.labels is .*: expected a folder of images as data\.root, got builtin:"):
        open_splits("builtin:fashion-mnist-mini", labels=table)


def test_a_run_with_a_table_is_validated_on_what_it_held_out(tmp_path, capsys):
    from effvit_zoo.commands import main

    made = make_photos(tmp_path / "made", {"": {"blue": 12, "red": 12}})
    root = tmp_path / "photos"
    root.mkdir()
    for path in made.rglob("*.png"):
        shutil.copy(path, root / f"{path.parent.name}{path.name}")
    write(root / "labels.csv", [(path.name, path.name[:3]) for path in root.glob("*.png")])
    assert train_small(tmp_path / "run", f"data.root={root}", "data.labels=labels.csv", "data.val_fraction=0.25") == 0
    assert "blu 9+3, red 9+3" in capsys.readouterr().out
    assert summary(tmp_path / "run")["val_images"] == 6
    results = tmp_path / "results.json"
    more = ["--data", str(root), "--workers", "0", "--results-file", str(results)]
    assert main(["validate", "--model", str(tmp_path / "run"), *more]) == 0
    row = json.loads(results.read_text())
    assert (row["split"], row["images"]) == ("held-out part", 6)
    assert "is read by the table" in capsys.readouterr().out

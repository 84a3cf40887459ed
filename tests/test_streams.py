"""Shards and streams over processes and loader workers: each sample once per epoch, in another order every epoch."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from effvit_zoo.training.data import open_splits
from effvit_zoo.training.loader import StreamedImages, collate

SHARDS, PER_SHARD, BATCH = 8, 6, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """48 training images in 8 shards and 6 of validation, each of a colour of its own, in webdataset's layout."""
    folder = tmp_path_factory.mktemp("shards")
    number, splits = 0, {}
    for split, count in (("train", SHARDS), ("validation", 1)):
        names = [f"{split}-{index}.tar" for index in range(count)]
        for name in names:
            with tarfile.open(folder / name, "w") as tar:
                for _ in range(PER_SHARD):
                    blob = io.BytesIO()
                    Image.new("RGB", (4, 4), (number, 0, 77)).save(blob, "PNG")
                    for suffix, content in (("png", blob.getvalue()), ("cls", str(number % 2).encode())):
                        member = tarfile.TarInfo(f"{number:04}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    number += 1
        lengths = [PER_SHARD] * count
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"class_names": ["even", "odd"], "splits": splits}))
    return f"wds/{folder}"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The same images as a Hugging Face data set of 8 parquet files."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("parquet")
    types = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for split, count in (("train", SHARDS), ("validation", 1)):
        for index in range(count):
            first = (index if split == "train" else SHARDS) * PER_SHARD
            numbers = range(first, first + PER_SHARD)
            rows = {"image": [Image.new("RGB", (4, 4), (n, 0, 77)) for n in numbers], "label": [n % 2 for n in numbers]}
            datasets.Dataset.from_dict(rows, features=types).to_parquet(str(folder / f"{split}-{index}.parquet"))
    return f"hfids/{folder}@{tmp_path_factory.mktemp('cache')}"


def red(image):
    return torch.tensor(float(image.getpixel((0, 0))[0]))


def seen_by(root, process, processes, workers, epoch, split):
    """What one process of several gets in an epoch, by colour."""
    source = open_splits(root, train_split=split[0], val_split=split[1], class_map={"even": 0, "odd": 1}).train
    reader = source.dataset.reader
    reader.dist_rank, reader.dist_num_replicas = process, processes
    samples = source.samples_per_process(workers, BATCH)
    source.set_epoch(epoch)
    loader = torch.utils.data.DataLoader(
        StreamedImages(source, red, (0, epoch, process)), BATCH, num_workers=workers, collate_fn=collate, drop_last=True
    )
    colours = [int(value) for batch in loader for value in batch["image"]]
    assert len(colours) == samples
    return colours


@pytest.mark.parametrize(
    ("kind", "processes", "workers"), [("shards", 1, 0), ("shards", 2, 2), ("shards", 4, 1), ("parquet", 2, 1)]
)
def test_each_sample_once_per_epoch(request, kind, processes, workers):
    root = request.getfixturevalue(kind)
    split = ("train", "validation") if kind == "shards" else (f"train|{SHARDS * PER_SHARD}", f"validation|{PER_SHARD}")
    shares = [seen_by(root, process, processes, workers, 0, split) for process in range(processes)]
    assert sorted(colour for share in shares for colour in share) == list(range(SHARDS * PER_SHARD))
    assert len({len(share) for share in shares}) == 1  # or the processes would wait for each other


def test_epochs_differ_in_order(shards):
    first, second = (seen_by(shards, 0, 1, 0, epoch, ("train", "validation")) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second

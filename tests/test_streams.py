"""Shards and streams over processes and loader workers: each sample once per epoch, in another order every epoch."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from runs import summary, train_small

from effvit_zoo.cli import main as effzoo
from effvit_zoo.data import Transforms, open_splits
from effvit_zoo.data.feed import StreamFeed
from effvit_zoo.data.plan import BatchPlan
from effvit_zoo.data.streams.shards import PREPARED_SHARD, shuffled
from effvit_zoo.errors import UserError

LENGTHS = {"train": (7, 1, 12, 3, 5), "validation": (5, 2, 6)}
TRAIN, VAL, BATCH = list(range(28)), list(range(28, 41)), 4
CLASSES = {"even": 0, "odd": 1}
SHARING = [(1, 0), (1, 2), (2, 1), (2, 2), (3, 2), (1, 7), (3, 3)]  # processes, loader workers of each


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(number, size=4):
    blob = io.BytesIO()
    Image.new("RGB", (size, size), (number, 0, 77)).save(blob, "PNG")
    return blob.getvalue()


def write_shards(folder, info=True, lengths=LENGTHS, broken=(), size=4):
    """Tars in webdataset's layout of images that are each of a colour of its own; of `broken` ones half the bytes are there."""
    folder.mkdir()
    first, splits = 0, {}
    for split, counts in lengths.items():
        names = [f"{split}-{index}.tar" for index in range(len(counts))]
        for name, count in zip(names, counts, strict=True):
            with tarfile.open(folder / name, "w") as tar:
                add(tar, "__header__/about.txt", b"no sample")
                for number in range(first, first + count):
                    picture = png(number, size)
                    add(tar, f"{number:04}.png", picture[: len(picture) // 2] if number in broken else picture)
                    add(tar, f"{number:04}.cls", str(number % 2).encode())
            first += count
        splits[split] = {
            "name": split,
            "num_samples": sum(counts),
            "filenames": names,
            "shard_lengths": counts,
        }
    if info:
        (folder / "_info.json").write_text(json.dumps({"class_names": ["even", "odd"], "splits": splits}))
    return folder


def write_tables(folder, kind="parquet", broken=()):
    """The same images as a Hugging Face data set of Parquet or Arrow files."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    types = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    number = 0
    for split, counts in LENGTHS.items():
        for index, count in enumerate(counts):
            numbers = range(number, number := number + count)
            pictures = [{"bytes": png(n)[: 40 if n in broken else None], "path": None} for n in numbers]
            rows = {"image": pictures, "label": [n % 2 for n in numbers]}
            table = datasets.Dataset.from_dict(rows, features=types)
            path = str(folder / f"{split}-{index}.{kind}")
            if kind == "parquet":
                table.to_parquet(path)
            else:
                with pyarrow.ipc.new_stream(path, table.data.table.schema) as file:
                    file.write_table(table.data.table)
    return folder


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Kind of stream -> its root, its splits."""
    folder = tmp_path_factory.mktemp("streams")
    write_shards(folder / "info")
    write_shards(folder / "counted", info=False)
    photos = folder / "photos"
    for number in TRAIN + VAL:
        path = photos / ("train" if number in TRAIN else "validation") / ("odd" if number % 2 else "even")
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number}.png").write_bytes(png(number))
    parquet, arrow = write_tables(folder / "parquet"), write_tables(folder / "arrow", "arrow")
    return {
        "info": (f"wds/{folder / 'info'}", "train", "validation"),
        "counted": (f"wds/{folder / 'counted'}", "train-{0..4}.tar|28", "validation-{0..2}.tar"),
        "parquet": (f"hfids/{parquet}@{folder / 'cache'}", "train|28", "validation|13"),
        "prepared": (f"hfids/{parquet}@{folder / 'cache'}", "train", "validation"),
        "lengths unknown": (f"hfids/{arrow}@{folder / 'cache'}", "train|28", "validation|13"),
        "files of their own": (f"hfids/{photos}@{folder / 'cache'}", "train|28", "validation|13"),
    }


def red(image, target):
    return torch.tensor(float(image.getpixel((0, 0))[0])), target


def make_feed(root, train, val, processes=1, workers=0, grad_accum=1, batch=BATCH, download=False):
    splits = open_splits(root, train_split=train, val_split=val, class_map=CLASSES, download=download)
    return StreamFeed(splits, Transforms(red, red), batch, processes, grad_accum, 0, {}, workers)


def colours(batches):
    """The numbers of the images in each batch."""
    return [batch.image.int().tolist() for batch in batches]


def flat(batches):
    return [number for batch in batches for number in batch]


def epochs(feed, start, stop):
    """Per process, the batches of whole epochs from one up to another."""
    steps = feed.steps_per_epoch
    return [colours(feed.train_batches(process, start * steps, stop * steps)) for process in range(feed.num_processes)]


@pytest.mark.parametrize(("processes", "workers"), SHARING)
def test_each_sample_once_per_epoch_in_steps_as_announced(roots, processes, workers):
    feed = make_feed(*roots["info"], processes, workers)
    plan = BatchPlan(len(TRAIN), BATCH, processes)
    assert feed.steps_per_epoch == plan.steps_per_epoch == math.ceil(28 / (BATCH * processes))
    shares = epochs(feed, 0, 2)
    steps = [flat(step) for step in zip(*shares, strict=True)]
    assert [len(step) for step in steps] == [plan.step_size(step) for step in range(len(steps))]
    first, second = flat(steps[: plan.steps_per_epoch]), flat(steps[plan.steps_per_epoch :])
    assert sorted(first) == sorted(second) == TRAIN
    assert first != second
    assert first not in (TRAIN, TRAIN[::-1])


@pytest.mark.parametrize(("processes", "workers"), SHARING)
def test_each_validation_sample_once(roots, processes, workers):
    feed = make_feed(*roots["info"], processes, workers)
    shares = [colours(feed.val_batches(process)) for process in range(processes)]
    assert sorted(flat(flat(shares))) == VAL
    assert len({len(share) for share in shares}) == 1


def test_training_samples_without_augmentation(roots):
    """All of them or some, and always the same ones."""

    def plain(processes, workers, most):
        feed = make_feed(*roots["info"], processes, workers)
        return flat(flat(colours(feed.plain_batches(process, most)) for process in range(processes)))

    for processes, workers in ((1, 0), (2, 2)):
        assert sorted(plain(processes, workers, 100)) == TRAIN
        some = plain(processes, workers, 10)
        assert len({*some} & {*TRAIN}) == len(some) == 10
        assert some == plain(processes, workers, 10)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2), (3, 2)])
@pytest.mark.parametrize("kind", ["counted", "parquet", "prepared", "lengths unknown", "files of their own"])
def test_each_sample_once_in_every_kind_of_stream(roots, kind, processes, workers):
    feed = make_feed(*roots[kind], processes, workers, download=kind == "prepared")
    assert feed.describe() == {"train_images": 28, "val_images": 13}
    first, second = flat(flat(epochs(feed, 0, 1))), flat(flat(epochs(feed, 1, 2)))
    assert sorted(first) == sorted(second) == TRAIN
    assert first != second
    assert sorted(flat(flat(colours(feed.val_batches(process)) for process in range(processes)))) == VAL


def test_a_prepared_data_set_is_cut_into_shards(roots, monkeypatch):
    monkeypatch.setattr("effvit_zoo.data.streams.shards.PREPARED_SHARD", 5)
    assert PREPARED_SHARD > 5
    feed = make_feed(*roots["prepared"], 2, 2, download=True)
    assert feed.train.sequence.lengths == (6, 6, 6, 5, 5)
    assert sorted(flat(flat(epochs(feed, 0, 1)))) == TRAIN


def test_lengths_are_known_where_they_can_be(roots):
    sequences = {kind: make_feed(*roots[kind]).train.sequence for kind in roots if kind != "prepared"}
    lengths = {kind: (len(sequence.shards), sequence.lengths) for kind, sequence in sequences.items()}
    assert lengths == {
        "info": (5, LENGTHS["train"]),
        "counted": (5, LENGTHS["train"]),
        "parquet": (5, LENGTHS["train"]),
        "lengths unknown": (5, (28,)),
        "files of their own": (1, (28,)),
    }


def test_micro_batches_of_a_step(roots):
    feed = make_feed(*roots["info"], processes=2, workers=2, grad_accum=3, batch=2)
    shares = epochs(feed, 0, 1)
    assert [len(share) for share in shares] == [3 * feed.steps_per_epoch] * 2
    assert sorted(flat(flat(shares))) == TRAIN
    sizes = [sum(len(batch) for share in shares for batch in share[3 * step : 3 * step + 3]) for step in range(3)]
    assert sizes == [feed.step_size(step) for step in range(3)] == [9, 9, 10]


@pytest.mark.parametrize("kind", ["info", "parquet"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_cut_epoch_goes_on_where_it_was(roots, kind, workers):
    feed = make_feed(*roots[kind], processes=2, workers=workers, batch=2)
    steps = 2 * feed.steps_per_epoch
    whole = colours(feed.train_batches(1, 0, steps))
    assert len(whole) == steps == 14
    for start in (1, 2, 5, 7, 9):
        again = make_feed(*roots[kind], processes=2, workers=workers, batch=2)
        assert colours(again.train_batches(1, start, steps)) == whole[start:]


def test_augmentation_depends_on_the_place_only(roots):
    def noise(image, target):
        return red(image, target)[0] + torch.rand(()) / 2, target

    def numbers(feed, start):
        object.__setattr__(feed, "transforms", Transforms(noise, noise))
        return [batch.image.tolist() for batch in feed.train_batches(0, start, feed.steps_per_epoch)]

    first, again = (numbers(make_feed(*roots["info"], workers=2), start) for start in (0, 3))
    assert first[3:] == again
    assert len({value % 1 for value in flat(first)}) == 28


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_a_broken_image_is_named_and_shifts_no_other(tmp_path, kind, workers):
    broken = 9
    if kind == "wds":
        root = f"wds/{write_shards(tmp_path / 'shards', broken=[broken])}", "train", "validation"
        name = str(tmp_path / "shards/train-2.tar/0009")
    else:
        root = (
            f"hfids/{write_tables(tmp_path / 'photos', broken=[broken])}@{tmp_path / 'cache'}",
            "train|28",
            "validation|13",
        )
        name = f"{tmp_path / 'photos/train-2.parquet'}[1]"
    for processes, batch in ((2, BATCH), (1, 1)):
        feed = make_feed(*root, processes, workers, batch=batch)
        batches = [list(feed.train_batches(process, 0, feed.steps_per_epoch)) for process in range(processes)]
        images = [flat(colours(share)) for share in batches]
        assert [len(share) for share in images] == [sum(feed.plan.batch_sizes(process)) for process in range(processes)]
        assert len(flat(images)) == 28
        assert set(flat(images)) == set(TRAIN) - {broken}  # its place has gone to another image
        bad = {entry[0] for entry in flat(batch.bad for batch in flat(batches))}
        assert bad == {name}


def test_a_cut_shard_costs_its_own_images_only(tmp_path):
    folder = write_shards(tmp_path / "shards")
    for shard in ("train-2.tar", "validation-1.tar"):  # 12 and 2 samples of 2 KiB, behind one of 1 KiB that is none
        content = (folder / shard).read_bytes()
        (folder / shard).write_bytes(content[: 3 * 1024 + 700])
    feed = make_feed(f"wds/{folder}", "train", "validation", processes=2, workers=2)
    batches = [list(feed.train_batches(process, 0, feed.steps_per_epoch)) for process in range(2)]
    assert [list(map(len, colours(share))) for share in batches] == [
        feed.plan.batch_sizes(process) for process in range(2)
    ]
    assert set(flat(flat(map(colours, batches)))) == set(TRAIN) - set(range(9, 20))
    bad = {entry for share in batches for batch in share for entry in batch.bad}
    shard = str(folder / "train-2.tar")
    assert bad == {(f"{shard}/0009", "has no cls"), (shard, "has fewer than 12 samples that can be read")}
    validated = [list(feed.val_batches(process)) for process in range(2)]
    assert [len(share) for share in validated] == [2, 2]
    assert sorted(flat(flat(map(colours, validated)))) == [number for number in VAL if number != 34]
    bad = [entry for share in validated for batch in share for entry in batch.bad]
    assert bad == [(str(folder / "validation-1.tar/0034"), "has no cls")]


def test_a_share_without_a_readable_image(tmp_path):
    folder = write_shards(tmp_path / "shards", lengths={"train": (3,), "validation": (1,)}, broken=range(3))
    feed = make_feed(f"wds/{folder}", "train", "validation", batch=2)
    batches = list(feed.train_batches(0, 0, feed.steps_per_epoch))
    assert colours(batches) == [[], []]
    assert len({name for batch in batches for name, _ in batch.bad}) == 3


def test_wrong_numbers_are_told(roots, tmp_path):
    root, train, val = roots["counted"]
    with pytest.raises(UserError, match=r"train-\{0..4\}.tar\|30 is said to have 30 images, its shards hold 28"):
        make_feed(root, train.replace("28", "30"), val)
    root, _, val = roots["parquet"]
    with pytest.raises(UserError, match=r"train\|27 is said to have 27 images, its shards hold 28"):
        make_feed(root, "train|27", val)
    folder = write_shards(tmp_path / "shards", info=False)
    (folder / "train-1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"cannot read shard .*train-1\.tar"):
        make_feed(f"wds/{folder}", "train-{0..4}.tar|28", "validation-{0..2}.tar")
    with pytest.raises(UserError, match="28 training images can't be shared by 29 processes"):
        make_feed(*roots["info"], processes=29)
    with pytest.raises(UserError, match=r"cannot read shard .*train-5\.tar: No such file"):
        make_feed(f"wds/{folder}", "train-{5..6}.tar|28", "validation-{0..2}.tar")


def test_a_training_stream_can_leave_no_class_out(roots):
    root, train, val = roots["info"]
    splits = open_splits(root, train_split=train, val_split=val, class_map={"odd": 0, "other": 1})
    with pytest.raises(UserError, match="has classes that the class map leaves out"):
        StreamFeed(splits, Transforms(red, red), BATCH, 1, 1, 0, {}, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_timm_shares_what_has_no_lengths(tmp_path, workers):
    """Pipes without an _info.json: exact where shards are equal and as many as a multiple of the workers."""
    lengths = {"train": (4, 4, 4, 4), "validation": (3, 2)}
    folder = write_shards(tmp_path / "shards", info=False, lengths=lengths)
    feed = make_feed(f"wds/pipe:cat {folder}", "train-{0..3}.tar|16", "validation-{0..1}.tar", workers=workers)
    assert (feed.train.sequence, feed.steps_per_epoch, feed.step_size(0)) == (None, 4, 4)
    whole = colours(feed.train_batches(0, 0, 8))
    assert [len(batch) for batch in whole] == [4] * 8
    assert sorted(flat(whole[:4])) == sorted(flat(whole[4:])) == list(range(16))
    assert sorted(flat(colours(feed.val_batches(0)))) == list(range(16, 21))
    assert sorted(flat(colours(feed.plain_batches(0, 100)))) == list(range(16))
    assert len(flat(colours(feed.plain_batches(0, 8)))) == 8
    again = make_feed(f"wds/pipe:cat {folder}", "train-{0..3}.tar|16", "validation-{0..1}.tar", workers=workers)
    assert colours(again.train_batches(0, 3, 4)) == whole[3:4]


def test_pipes_with_an_info_file_are_shared_by_places(roots):
    root, train, val = roots["info"]
    feed = make_feed(root.replace("wds/", "wds/pipe:cat "), train, val, 2, 2)
    assert sorted(flat(flat(epochs(feed, 0, 1)))) == TRAIN


def test_the_shuffle_buffer_gives_everything_once():
    for count, initial, size in ((0, 2, 4), (3, 5, 9), (100, 5, 20), (100, 100, 100)):
        order = list(shuffled(range(count), np.random.default_rng(1), initial, size))
        assert sorted(order) == list(range(count))
    order = list(shuffled(range(10_000), np.random.default_rng(1), 10, 100))
    assert order[0] < 11  # it doesn't wait until it is full
    assert max(np.arange(10_000) - order) > 90  # then some wait long
    assert max(order - np.arange(10_000)) <= 100  # none comes before it was read


def share_of(process, root, store, results):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=process, world_size=2)
    feed = make_feed(*root, 2, 2)
    share = colours(feed.train_batches(process, 0, feed.steps_per_epoch)), colours(feed.val_batches(process))
    shares = [None, None]
    torch.distributed.all_gather_object(shares, share)
    torch.save(shares, f"{results}.{process}")
    torch.distributed.destroy_process_group()


def test_two_processes_of_their_own(roots, tmp_path):
    arguments = roots["info"], tmp_path / "store", tmp_path / "shares"
    torch.multiprocessing.start_processes(share_of, arguments, nprocs=2, start_method="fork")
    first, second = torch.load(tmp_path / "shares.0"), torch.load(tmp_path / "shares.1")
    assert first == second
    trained, validated = zip(*first, strict=True)
    assert sorted(flat(flat(trained))) == TRAIN
    assert sorted(flat(flat(validated))) == VAL
    assert len(trained[0]) == len(trained[1]) == 4


def test_training_on_uneven_shards(tmp_path):
    folder = write_shards(tmp_path / "shards", broken=[3, 30], size=32)
    settings = [f"data.root=wds/{folder}", "data.img_size=32", "data.num_workers=2", "train.batch_size=5"]
    assert train_small(tmp_path / "run", *settings, "train.epochs=2") == 0
    result = summary(tmp_path / "run")
    assert (result["train_images"], result["val_images"]) == (28, 13)
    history = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in history] == ["step", "6", "12"]
    assert result["bad_files"] == 2
    arguments = [
        "--model",
        str(tmp_path / "run/best"),
        "--data",
        f"wds/{folder}",
        "--workers",
        "2",
        "--batch-size",
        "3",
    ]
    assert effzoo(["validate", *arguments, "--results-file", str(tmp_path / "result.json")]) == 0
    validated = json.loads((tmp_path / "result.json").read_text())
    assert (validated["images"], validated["bad_files"]) == (12, 1)

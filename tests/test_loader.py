"""Batch plans: every image once per epoch, and the same steps however many processes and micro-batches share them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from effvit_zoo.data import BadImage, Batch, readable
from effvit_zoo.data.loader import SampleDataset, collate, make_loader
from effvit_zoo.data.plan import BatchPlan, Key, mix_seed
from effvit_zoo.errors import UserError


def steps(plan, start=0, stop=None):
    """Per optimizer step, the keys of all processes and micro-batches, as a list of sets."""
    stop = plan.steps_per_epoch if stop is None else stop
    shares = [list(plan.batches(process, start, stop)) for process in range(plan.num_processes)]
    per_step = [
        [
            key
            for share in shares
            for batch in share[step * plan.grad_accum : (step + 1) * plan.grad_accum]
            for key in batch
        ]
        for step in range(stop - start)
    ]
    assert all(len(set(keys)) == len(keys) for keys in per_step)
    return [set(keys) for keys in per_step]


@pytest.mark.parametrize("num_images", [7, 64, 101])
@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 2, 1), (2, 1, 3), (1, 3, 2)])
def test_each_image_once_per_epoch(num_images, shape):
    plan = BatchPlan(num_images, *shape, seed=1)
    epoch = steps(plan)
    assert sorted(key.image for keys in epoch for key in keys) == list(range(num_images))
    assert [len(keys) for keys in epoch] == [plan.step_size(step) for step in range(plan.steps_per_epoch)]
    sizes = [len(batch) for process in range(shape[1]) for batch in plan.batches(process, 0, plan.steps_per_epoch)]
    assert max(sizes) <= max(shape[0], 2)
    assert min(sizes) >= 1


def test_a_step_does_not_depend_on_who_shares_it():
    one = BatchPlan(101, 12, seed=3)
    assert steps(one, stop=20) == steps(BatchPlan(101, 3, num_processes=2, grad_accum=2, seed=3), stop=20)


def test_a_cut_plan_goes_on_where_it_was():
    plan = BatchPlan(50, 8, seed=5)
    whole = list(plan.batches(0, 0, 3 * plan.steps_per_epoch))
    assert list(plan.batches(0, 11, 3 * plan.steps_per_epoch)) == whole[11:]


def test_epochs_and_seeds_differ_in_order():
    plan = BatchPlan(50, 50, seed=5)
    first, second = list(plan.batches(0, 0, 2))
    assert [key.image for key in first] != [key.image for key in second]
    assert first != next(BatchPlan(50, 50, seed=6).batches(0, 0, 1))
    assert [key.image for key in next(BatchPlan(50, 50).batches(0, 0, 1))] == list(range(50))


def test_too_few_images_to_share():
    with pytest.raises(
        UserError, match=r"3 training images can't be shared by 2 processes x 2 accumulation steps .*: at least 4"
    ):
        BatchPlan(3, 8, num_processes=2, grad_accum=2).require_shares()


def test_mixed_seeds_are_distinct():
    seeds = {mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


class Grey:
    """Twelve flat images; every fourth can't be read."""

    class_names = ("a", "b")

    def __len__(self):
        return 12

    def load(self, index):
        if index % 4 == 3:
            raise BadImage(f"{index}.png", "broken")
        return Image.new("RGB", (4, 4), (index, 0, 0)), index % 2

    def name(self, index):
        return f"{index}.png"


def noisy(image, target):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels + random.random() + np.random.rand() + torch.rand(()), target


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_does_not_depend_on_workers_or_order(num_workers):
    dataset = SampleDataset(Grey(), noisy, seed=7, replace_bad=True)
    keys = [[(2, index)] for index in (5, 0, 9, 4)]
    got = {int(batch.index): batch.image for batch in make_loader(dataset, keys, num_workers)}
    for index in (0, 4, 5, 9):
        torch.testing.assert_close(got[index], dataset[2, index].image[None], rtol=0, atol=0)
    assert not torch.equal(dataset[2, 0].image, dataset[3, 0].image)


def test_every_step_draws_its_size():
    sizes = (160, 192, 224)
    plans = [BatchPlan(64, 4, num_processes, 2, seed=3, sizes=sizes) for num_processes in (1, 2)]
    drawn = []
    for plan in plans:
        steps = range(2 * plan.steps_per_epoch)
        keys = [
            [key for p in range(plan.num_processes) for b in plan.batches(p, step, step + 1) for key in b]
            for step in steps
        ]
        assert all(len({key.size for key in step}) == 1 for step in keys)  # every process and micro-batch the same
        drawn.append([step[0].size for step in keys])
    assert drawn[0][:8] == drawn[1][:8]
    assert set(drawn[0]) == set(sizes)
    images = SampleDataset(
        Grey(), noisy, seed=7, replace_bad=True, sized={160: lambda image, target: (torch.zeros(3, 160, 160), target)}
    )
    assert images[Key(0, 1, size=160)].image.shape[1] == 160
    torch.testing.assert_close(images[Key(0, 1)].image, images[0, 1].image, rtol=0, atol=0)


def test_unreadable_images_are_replaced_or_left_out():
    replaced = collate([SampleDataset(Grey(), noisy, seed=1, replace_bad=True)[0, index] for index in range(12)])
    assert replaced.target.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert replaced.target.dtype == torch.int64
    left_out = collate([SampleDataset(Grey(), noisy, seed=None, replace_bad=False)[0, index] for index in range(12)])
    assert len(left_out) == len(left_out.target) == 9
    assert replaced.bad == left_out.bad == tuple((f"{index}.png", "broken") for index in (3, 7, 11))


def test_only_batches_with_images_leave_the_loader():
    dataset = SampleDataset(Grey(), noisy, seed=None, replace_bad=False)
    nothing = collate([dataset[0, 3]])
    assert (len(nothing), len(nothing.image), len(nothing.target)) == (0, 0, 0)
    bad = []
    batches = list(readable(make_loader(dataset, [[(0, 3)], [(0, 4), (0, 7)], [(0, 5)]], 0), bad.extend))
    assert [batch.index.tolist() for batch in batches] == [[4], [5]]
    assert bad == [("3.png", "broken"), ("7.png", "broken")]


def test_targets_of_any_nesting_move_with_their_images():
    samples = [({"mask": torch.full((2, 2), n), "sizes": (n, float(n))}, n) for n in range(3)]

    class Nested(Grey):
        def load(self, index):
            return Image.new("RGB", (4, 4)), samples[index][0]

    dataset = SampleDataset(Nested(), noisy, seed=None, replace_bad=False)
    batch = collate([dataset[0, index] for index in range(3)])
    moved = batch.to("meta", channels_last=True)
    assert isinstance(moved, Batch)
    assert moved.image.is_contiguous(memory_format=torch.channels_last)
    assert (moved.target["mask"].shape, moved.target["mask"].device.type) == ((3, 2, 2), "meta")
    assert [part.device.type for part in moved.target["sizes"]] == ["meta", "meta"]
    assert (moved.index.tolist(), batch.target["sizes"][0].tolist()) == ([0, 1, 2], [0, 1, 2])

"""Classes of unequal size: what the loss and "best" make of them, what the run says, and how settings change it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effvit_zoo.data import DataSplits, ImageSource
from effvit_zoo.errors import UserError
from effvit_zoo.tasks import Classification, Evaluation
from effvit_zoo.tasks.classification import ClassificationConfig
from effvit_zoo.training.checkpoint import RunState


def source(counts):
    targets = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return ImageSource("photos", np.zeros((len(targets), 4, 4), np.uint8), tuple("abc"[: len(counts)]), targets)


def task_of(counts, **settings):
    splits = DataSplits(source(counts), source([2] * len(counts)))
    task = Classification.for_training(ClassificationConfig(**settings), None, splits)
    return task, task.data_notes(splits)[-1]


@pytest.mark.parametrize(
    ("counts", "settings", "is_weighted", "best", "said"),
    [
        ([11, 2], {}, True, "macro_f1", "'a' 11 training images, 'b' 2; images are weighted"),
        ([10, 2], {}, False, "top1", "task.class_weights=true weighs them equally"),
        ([11, 2], {"class_weights": False}, False, "macro_f1", '"best" is by macro-F1 (task.best=top1 changes that)'),
        ([11, 2], {"best": "top1"}, True, "top1", '"best" is by top-1 (task.best=macro_f1 changes that)'),
        (
            [10, 9],
            {"best": "macro_f1", "class_weights": True},
            True,
            "macro_f1",
            "classes (training+validation images)",
        ),
        ([12, 0, 3], {}, False, "top1", "'a' 12 training images, 'c' 3"),  # a class without images has no size
    ],
)
def test_over_five_times_the_images_decide(counts, settings, is_weighted, best, said):
    task, note = task_of(counts, **settings)
    assert next(iter(task.metrics)) == best
    assert set(task.metrics) == {"top1", "macro_f1"}
    assert (task.class_weights is not None) == is_weighted
    assert said in note


def test_weights_have_a_mean_of_one_over_the_images():
    task, _ = task_of([20, 3, 1])
    targets = torch.from_numpy(source([20, 3, 1]).targets).long()
    assert task.class_weights[targets].mean().item() == pytest.approx(1)
    assert torch.unique((task.class_weights * torch.tensor([20.0, 3, 1])).round(decimals=4)).numel() == 1


def test_the_best_epoch_is_by_the_metric_that_counts():
    """The second epoch names the small class too, at the price of an image of the large one."""
    task, _ = task_of([11, 2])
    state = RunState()
    for epoch, top1, macro_f1 in ((1, 85.0, 46.0), (2, 84.0, 70.0), (3, 86.0, 60.0)):
        result = Evaluation(13, {"top1": top1, "macro_f1": macro_f1, "loss": 1.0})
        state.consider(epoch, result, *next(iter(task.metrics.items())))
    assert state.best_epoch == 2


def test_classes_of_a_stream_are_not_counted():
    splits = SimpleNamespace(class_names=("a", "b"), train=SimpleNamespace(title="shards"))
    assert Classification.for_training(ClassificationConfig(), None, splits).class_weights is None
    with pytest.raises(UserError, match=r"task\.class_weights: shards is a stream"):
        Classification.for_training(ClassificationConfig(class_weights=True), None, splits)

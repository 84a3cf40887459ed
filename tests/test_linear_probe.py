"""The linear probe against slower truths, on classifiers of every kind, and what it refuses; paired intervals."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import effvit_zoo
from effvit_zoo.data import Batch
from effvit_zoo.data.feed import spread_rows
from effvit_zoo.errors import UserError
from effvit_zoo.tasks import _linear_probe as probe
from effvit_zoo.tasks._scores import pack_hits, paired_interval


def clouds(images, views, width, classes, seed=0):
    """(N, V, D) features around a centre per class, and (N,) classes."""
    random = torch.Generator().manual_seed(seed)
    target = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=random)
    noise = torch.randn(images, views, width, generator=random)
    return centres[target][:, None] + 1.5 * noise, target


def newton(design, target, classes, strength):
    """The minimum of mean cross entropy + strength / 2 |W|^2 over W (D, C) and b, and its gradient's norm."""

    def loss(flat):
        solution = flat.view(-1, classes)
        penalty = strength / 2 * solution[:-1].square().sum()
        return F.cross_entropy(design @ solution[:-1] + solution[-1], target) + penalty

    flat = torch.zeros((design.shape[1] + 1) * classes, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(loss)(flat)
        flat = flat - torch.linalg.pinv(torch.func.hessian(loss)(flat), hermitian=True) @ gradient
    return flat.view(-1, classes), torch.func.grad(loss)(flat).norm()


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_it_reaches_the_minimum_that_newtons_method_finds(strength):
    features, target = clouds(40, 1, 4, 3)
    design = features[:, 0].double()
    problem = probe._Problem(design, target, torch.ones(40, dtype=torch.float64), 3)
    solution, iterations = problem.fit(strength, 500)
    expected, gradient = newton(design, target, 3, strength)
    assert gradient < 1e-10
    assert 0 < iterations < 500
    torch.testing.assert_close(solution, expected, rtol=1e-5, atol=1e-6)


def test_fewer_rows_than_features_change_nothing():
    features, target = clouds(12, 2, 60, 3)
    rows = features.reshape(24, 60).double()
    rows = (rows - rows.mean(0)) / rows.std(0)
    design, basis = probe._rotated(rows)
    assert design.shape == (24, 23)  # they are centred
    torch.testing.assert_close(design @ basis.T, rows)
    weight, target = torch.ones(24, dtype=torch.float64), target.repeat_interleave(2)
    rotated, _ = probe._Problem(design, target, weight, 3).fit(1e-2, 500)
    whole, _ = probe._Problem(rows, target, weight, 3).fit(1e-2, 500)
    torch.testing.assert_close(basis @ rotated[:-1], whole[:-1], rtol=1e-4, atol=1e-6)


def test_images_are_held_out_whole_and_single_ones_never():
    target = torch.tensor([0] * 11 + [1] * 5 + [2] + [3] * 3)
    fold = probe.folds(target, 5)
    assert fold[target == 2].tolist() == [-1]
    for label in (0, 1, 3):
        counts = torch.bincount(fold[target == label], minlength=5)
        assert counts.max() - counts.min() <= 1
        blocks = (fold[target == label].diff() != 0).sum() + 1
        assert blocks == (counts > 0).sum()  # each fold takes neighbours
    assert fold[target == 3].unique().numel() == 3


def test_views_of_an_image_are_never_on_both_sides():
    """A class that only an image's own mirror image tells is not learnt in the cross-validation."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(30, 1, 400, generator=random).expand(-1, 2, -1).contiguous()
    solution = probe.solve(features, torch.arange(30) % 3, 3)
    assert solution.held_out_loss == pytest.approx(np.log(3), abs=0.1)  # chance


def test_classes_without_images_and_features_without_meaning():
    features, target = clouds(40, 1, 6, 2)
    features[:, :, 3] = 5.0
    solution = probe.solve(features, 2 * target, 4)
    assert solution.weight[[1, 3]].eq(0).all()
    assert solution.weight[:, 3].eq(0).all()
    logits = features[:, 0].double() @ solution.weight.T + solution.bias
    assert set(logits.argmax(1).tolist()) == {0, 2}
    assert logits.argmax(1).eq(2 * target).float().mean() > 0.8
    alone = probe.solve(features[:2], torch.tensor([0, 1]), 2)  # an image of each: nothing to hold out
    assert (alone.strength, alone.held_out_loss) == (probe.DEFAULT_STRENGTH, None)
    with pytest.raises(UserError, match="the same for all images"):
        probe.solve(torch.ones(4, 1, 3), torch.tensor([0, 1, 0, 1]), 2)


def test_a_class_weight_of_two_is_having_the_images_twice():
    features, target = clouds(30, 1, 4, 2)
    weights = torch.tensor([1.0, 2.0])
    twice = torch.cat([features, features[target == 1]]), torch.cat([target, target[target == 1]])
    design = [part[:, 0].double() for part in (features, twice[0])]
    weighted, _ = probe._Problem(design[0], target, weights.double()[target], 2).fit(1e-2, 500)
    repeated, _ = probe._Problem(design[1], twice[1], torch.ones(45, dtype=torch.float64), 2).fit(1e-2, 500)
    torch.testing.assert_close(weighted, repeated, rtol=1e-4, atol=1e-6)


def test_large_problems_are_thinned_evenly():
    features, target = clouds(900, 2, 3, 3)
    problem = probe._Problem(
        features.reshape(-1, 3).double(), target.repeat_interleave(2), torch.ones(1800).double(), 3
    )
    fold = probe.folds(target, 5).repeat_interleave(2)
    thin, part = problem.thinned(fold, 2, 100)
    assert len(thin.target) == len(part) == 200
    assert torch.bincount(thin.target).min() >= 66
    assert part[::2].equal(part[1::2])


class Pointwise(nn.Module):
    """A classifier that is a 1 x 1 convolution."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 8, 8), nn.Conv2d(12, 3, 1, bias=bias)

    def get_classifier(self):
        return self.head

    def forward(self, image):
        return self.head(self.stem(image).relu().mean((2, 3), keepdim=True)).flatten(1)


class Pooled(Pointwise):
    """The same with a nonlinearity after the classifier."""

    def forward(self, image):
        return super().forward(image).tanh()


def distilled():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **sizes)


MODELS = {
    "vit": lambda: effvit_zoo.create_model("effzoo_vit_pico", num_classes=3),
    "tosa": lambda: effvit_zoo.create_model("effzoo_tosa_vit_pico", num_classes=3),
    "two heads": lambda: effvit_zoo.create_model("effzoo_swiftformer_pico", num_classes=3),
    "distilled": distilled,
    "convolution": Pointwise,
    "grey": lambda: effvit_zoo.create_model("effzoo_vit_pico", num_classes=3, in_chans=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_own_classifier_gives_the_solved_logits(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    image = torch.randn(24, 1 if name == "grey" else 3, 32, 32)
    batch = Batch(image, torch.arange(24) % 3, torch.arange(24))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    solver = probe.LinearProbe(model, 3, mirrored=True)
    with torch.inference_mode():
        rows = solver.features(batch)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert rows["features"].shape[:2] == (24, 2)
    assert solver.solve(rows).startswith("penalty ")
    solution = probe.solve(rows["features"], rows["target"], 3)
    for view, seen in enumerate((image, image.flip(-1))):
        expected = rows["features"][:, view].double() @ solution.weight.T + solution.bias
        torch.testing.assert_close(model(seen).double(), expected, rtol=1e-3, atol=1e-3)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("head") for key in changed)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: effvit_zoo.create_model("effzoo_vit_pico", num_classes=0), "IsotropicViT has no classifier"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "Sequential has no classifier"),
        (lambda: Pointwise(bias=False), "is a Conv2d, expected a linear layer or 1 x 1 convolution with bias"),
    ],
)
def test_other_classifiers_are_refused(model, reason):
    with pytest.raises(UserError, match=reason):
        probe.LinearProbe(model(), 3, mirrored=False)


def test_outputs_that_are_no_classifiers_are_refused():
    batch = Batch(torch.randn(4, 3, 32, 32), torch.arange(4) % 3, torch.arange(4))
    with pytest.raises(UserError, match="not that of its classifier"):
        probe.LinearProbe(Pooled(), 3, mirrored=False).features(batch)
    broken = Pointwise().requires_grad_(False)
    solver = probe.LinearProbe(broken, 3, mirrored=False)
    solver.features(batch)
    broken.stem.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="infinite or not a number"):
        solver.features(batch)


def test_paired_intervals():
    """By hand for 100 images, 8 gained and 3 lost: (8.5 - 3.5) / 102 -+ 1.96 sqrt(12 - 25 / 102) / 102."""
    before, after = np.zeros(100, bool), np.zeros(100, bool)
    before[:50], after[:47], after[50:58] = True, True, True
    order = np.random.default_rng(0).permutation(100)  # processes measure in any order
    packed = [pack_hits(order, bits[order]) for bits in (after, before)]
    share, low, high, images = paired_interval(*packed)
    assert (share, images) == (pytest.approx(0.05), 100)
    assert (low, high) == (pytest.approx(-0.016867, abs=1e-5), pytest.approx(0.114906, abs=1e-5))
    assert paired_interval(packed[0], packed[0])[1] < 0 < paired_interval(packed[0], packed[0])[2]
    fewer = pack_hits(np.arange(60), before[:60])  # an image that only one could read counts in neither
    assert paired_interval(fewer, packed[1])[3] == 60
    assert pack_hits(np.array([0, 1, 1]), np.array([True, True, False])) is None  # a stream that repeats images


def test_a_sample_has_every_class():
    groups = np.array([0] * 900 + [1] * 90 + [2] * 2)
    taken = spread_rows(groups, len(groups), 100)
    assert (np.diff(taken) > 0).all()
    counts = np.bincount(groups[taken], minlength=3)
    assert counts.sum() <= 100
    assert counts[2] >= 1
    assert 85 <= counts[0] <= 92
    assert np.diff(taken[groups[taken] == 0]).max() <= 12
    assert len(spread_rows(None, 50, 10)) == 10

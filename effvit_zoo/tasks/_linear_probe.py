"""A linear probe: the classifier of a trained network, solved on frozen features by multinomial logistic regression.

Fine-tuning that starts from it keeps the features that a random classifier's gradients would tear apart ("Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", arXiv:2202.10054). Features are what goes into the model's own classifier, so
that pooling, norms, tokens and layers before it are part of them, whatever the architecture.

N images, V views of each (the image and, where training flips, its mirror image), D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch
from ..errors import UserError

STRENGTHS = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of the penalty that are tried, strongest first."""
DEFAULT_STRENGTH = 1e-2
"""Where no class has two images to try them on."""
FOLDS, WORSE = 5, 2
"""Folds of the cross-validation, which ends after so many strengths in a row that are worse than the best."""
TRIAL_ITERATIONS, ITERATIONS = 50, 500
TRIAL_CHANGE, CHANGE = 1e-7, 1e-13
"""Changes of the loss below which a fit of the cross-validation and the last one end."""
MOST_IMAGES, MOST_TRIED, MOST_BYTES = 20_000, 4_000, 2**29
"""Images to solve on, images to cross-validate on, and size of the features."""
WORK = 2e12
"""Multiplications and additions, a minute or some of a few cores, that iterations and folds of large problems are reduced to."""


class LinearProbe:
    """Solves the classifier of a model.

    Args:
        model: A model with `get_classifier`: linear layers or 1 x 1 convolutions; the outputs of several are averaged in eval mode,
            as in a distilled DeiT.
        num_classes: C.
        mirrored: Solve on mirror images too.
        class_weights: (C,) weights of each image by its class; None for 1.

    Attributes:
        most_images: Images that it can take.

    Raises:
        UserError: The model has no such classifier.
    """

    def __init__(self, model: nn.Module, num_classes: int, mirrored: bool, class_weights: Tensor | None = None) -> None:
        self.model, self.layers = model, _classifier_layers(model)
        self.num_classes, self.mirrored, self.class_weights = num_classes, mirrored, class_weights
        width = sum(layer.weight.shape[1] for layer in self.layers)
        self.most_images = min(MOST_IMAGES, MOST_BYTES // (8 * (1 + mirrored) * width))
        self.is_checked = False

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Rows of a batch, on the CPU: `target` (B,) and `features` (B, V, D) float32. The model has to be in eval mode.

        Raises:
            UserError: The model's output isn't the mean of its classifiers', or the features are not numbers.
        """
        if not self.is_checked:
            self._require_linear(batch.image[:2])
        views = [batch.image, batch.image.flip(-1)] if self.mirrored else [batch.image]
        inputs, _ = self._run(torch.cat(views))
        features = torch.cat(inputs, dim=1).unflatten(0, (len(views), -1)).transpose(0, 1)  # (B, V, D)
        if not features.isfinite().all():
            raise UserError("its features hold values that are infinite or not a number")
        return {"target": batch.target.cpu(), "features": features.float().cpu()}

    def solve(self, rows: Mapping[str, Tensor]) -> str:
        """Sets the classifier from the rows of all images, in their order; says how it was found. Raises `UserError`."""
        solution = solve(rows["features"], rows["target"], self.num_classes, self.class_weights)
        parts = solution.weight.split([layer.weight.shape[1] for layer in self.layers], dim=1)
        with torch.no_grad():
            for layer, part in zip(self.layers, parts, strict=True):
                layer.weight.copy_((len(self.layers) * part).view_as(layer.weight))
                layer.bias.copy_(solution.bias)
        return solution.in_words

    def parameters(self) -> list[Tensor]:
        """What `solve` sets."""
        return [parameter for layer in self.layers for parameter in (layer.weight.data, layer.bias.data)]

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, D) input of each classifier, and the model's output."""
        caught: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        with ExitStack() as hooks:
            for layer in self.layers:
                handle = layer.register_forward_pre_hook(lambda module, args: caught[module].append(args[0].detach()))
                hooks.callback(handle.remove)
            output = self.model(images)
        inputs = [each.flatten(1) for layer in self.layers for each in caught[layer]]
        if [tuple(each.shape) for each in inputs] != [(len(images), layer.weight.shape[1]) for layer in self.layers]:
            raise UserError("its classifier is not called once on one vector of features for each image")
        return inputs, output

    def _require_linear(self, images: Tensor) -> None:
        """Compares the model's output with the mean of its classifiers' outputs, at weights that are not zero."""
        before = [parameter.clone() for parameter in self.parameters()]
        random = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        try:
            inputs, output = self._run(images)
            outputs = [
                F.linear(each.float(), layer.weight.flatten(1).float(), layer.bias.float())
                for each, layer in zip(inputs, self.layers, strict=True)
            ]
        finally:
            for parameter, value in zip(self.parameters(), before, strict=True):
                parameter.copy_(value)
        expected = torch.stack(outputs).mean(0)
        exact = 1e-3 if output.dtype == torch.float32 and inputs[0].dtype == torch.float32 else 5e-2
        if output.shape != expected.shape or (output - expected).abs().max() > exact * expected.abs().max():
            raise UserError("its output is not that of its classifier on a vector of features")
        self.is_checked = True


def _classifier_layers(model: Any) -> list[Any]:
    """The layers that the outputs come from. Raises `UserError` where they are no linear functions of a vector."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    layers = list(classifier) if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    for layer in layers:
        if layer is None or isinstance(layer, nn.Identity):
            raise UserError(f"{type(model).__name__} has no classifier")
        is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        if not (isinstance(layer, nn.Linear) or is_pointwise) or layer.bias is None:
            raise UserError(
                f"the classifier of {type(model).__name__} is a {type(layer).__name__}, "
                "expected a linear layer or 1 x 1 convolution with bias"
            )
    return layers


@dataclass(frozen=True)
class Solution:
    """A solved classifier.

    Attributes:
        weight: (C, D) float64.
        bias: (C,) float64.
        strength: Weight of the penalty.
        held_out_loss: Cross entropy on held-out folds; None without cross-validation.
        iterations: Of the last fit.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    held_out_loss: float | None
    iterations: int

    @property
    def in_words(self) -> str:
        found = "by default" if self.held_out_loss is None else f"cross-validated loss {self.held_out_loss:.3f}"
        return f"penalty {self.strength:g} ({found}), {self.iterations} iterations"


def solve(features: Tensor, target: Tensor, num_classes: int, class_weights: Tensor | None = None) -> Solution:
    """Multinomial logistic regression with a squared penalty on the weights of standardised features, by L-BFGS.

    Minimises the mean cross entropy over images and views + strength / 2 * |W|^2; the bias is free. The strength is the best of
    `STRENGTHS` in a stratified cross-validation by images. A class without an image gets weights 0 and a bias below all others.

    Args:
        features: (N, V, D).
        target: (N,) class indices.
        num_classes: C.
        class_weights: (C,) weights of each image by its class; None for 1.

    Raises:
        UserError: There are no images, or the features are the same for all.
    """
    if not len(target):
        raise UserError("there is no image to solve its classifier on")
    views, width = features.shape[1:]
    present, index = target.unique(return_inverse=True)  # the others' biases would run away
    raw = features.reshape(-1, width).double()  # (N V, D), an image's views together
    mean, scale = raw.mean(0), raw.std(0, correction=0)
    is_constant = scale <= 1e-7 * mean.abs().clamp_min(1e-30)
    if is_constant.all():
        raise UserError("its features are the same for all images")
    scale = torch.where(is_constant, torch.inf, scale)  # such a feature says nothing
    design, basis = _rotated((raw - mean) / scale)
    index = index.repeat_interleave(views)
    weight = torch.ones(len(index), dtype=torch.float64)
    if class_weights is not None:
        weight = class_weights.double()[target].repeat_interleave(views)
    problem = _Problem(design, index, weight, len(present))
    strength, held_out_loss = _choose_strength(problem, folds(index[::views], FOLDS).repeat_interleave(views), views)
    steps = int(min(ITERATIONS, max(20, WORK / problem.work)))
    solved, iterations = problem.fit(strength, steps)
    inner = solved[:-1] if basis is None else basis @ solved[:-1]  # (D, C present)
    inner = inner / scale[:, None]
    bias = solved[-1] - mean @ inner
    full = torch.zeros(num_classes, width, dtype=torch.float64)
    full[present] = inner.T
    low = bias.min() - torch.log(torch.tensor(2.0 * len(index), dtype=torch.float64))
    biases = low.repeat(num_classes).index_copy(0, present, bias)
    return Solution(full, biases, strength, held_out_loss, iterations)


def _rotated(standardised: Tensor) -> tuple[Tensor, Tensor | None]:
    """Fewer coordinates for fewer rows than features: (M, R) and a basis (D, R), else the rows themselves and None.

    The weights of least norm lie in the span of the rows, so that the regression in an orthonormal basis of it is the same.
    """
    rows, width = standardised.shape
    if rows >= width:
        return standardised, None
    squares, vectors = torch.linalg.eigh(standardised @ standardised.T)
    kept = squares > 1e-12 * squares[-1]
    lengths = squares[kept].sqrt()
    return vectors[:, kept] * lengths, standardised.T @ (vectors[:, kept] / lengths)


def folds(target: Tensor, number: int) -> Tensor:
    """(N,) fold of each image, -1 for the only image of its class, which stays among the training images.

    A class's images are cut into blocks of their stored order, so that a burst of pictures of one thing is rarely on both sides. The
    blocks of a class begin at another fold than those of the class before, so that small classes spread over all.
    """
    fold = torch.full_like(target, -1)
    for label in target.unique():
        places = (target == label).nonzero()[:, 0]
        if len(places) > 1:
            block = torch.arange(len(places)) * number // len(places)
            fold[places] = (block + label) % number
    return fold


def _choose_strength(problem: _Problem, fold: Tensor, views: int) -> tuple[float, float | None]:
    """The strength of least loss on held-out folds, and that loss."""
    problem, fold = problem.thinned(fold, views, MOST_TRIED)
    affordable = WORK / (len(STRENGTHS) * TRIAL_ITERATIONS * problem.work)
    number = int(min(FOLDS, max(1, affordable)))
    splits = [(fold != held, fold == held) for held in range(number) if (fold == held).any()]
    if not splits:
        return DEFAULT_STRENGTH, None
    parts = [(problem.select(train), problem.select(held)) for train, held in splits]
    best, least, worse = DEFAULT_STRENGTH, float("inf"), 0
    starts: list[Tensor | None] = [None] * len(parts)
    for strength in STRENGTHS:
        lost = 0.0
        for place, (train, held) in enumerate(parts):
            start = starts[place]  # the next stronger one's solution
            starts[place], _ = train.fit(strength, TRIAL_ITERATIONS, start, TRIAL_CHANGE)
            lost += float(held.loss(starts[place]) * held.weight.sum())
        lost /= sum(float(held.weight.sum()) for _, held in parts)
        best, least, worse = (strength, lost, 0) if lost < least else (best, least, worse + 1)
        if worse == WORSE:
            break
    return best, least


@dataclass(frozen=True)
class _Problem:
    """Rows to fit: (M, R) coordinates, (M,) classes and (M,) weights, float64."""

    design: Tensor
    target: Tensor
    weight: Tensor
    num_classes: int

    @property
    def work(self) -> int:
        """Multiplications and additions of an iteration."""
        return 4 * self.design.numel() * self.num_classes

    def select(self, rows: Tensor) -> _Problem:
        return _Problem(self.design[rows], self.target[rows], self.weight[rows], self.num_classes)

    def thinned(self, fold: Tensor, views: int, most: int) -> tuple[_Problem, Tensor]:
        """The rows and folds of at most `most` images, evenly taken from each class."""
        images = len(fold) // views
        if images <= most:
            return self, fold
        order = self.target[::views].argsort(stable=True)
        taken = order[torch.arange(most) * images // most]
        rows = (taken[:, None] * views + torch.arange(views)).flatten()
        return self.select(rows), fold[rows]

    def loss(self, solution: Tensor) -> Tensor:
        """Weighted mean cross entropy of a solution (R + 1, C), its last row the bias."""
        logits = self.design @ solution[:-1] + solution[-1]
        return F.cross_entropy(logits, self.target, reduction="none") @ self.weight / self.weight.sum()

    def fit(
        self, strength: float, iterations: int, start: Tensor | None = None, change: float = CHANGE
    ) -> tuple[Tensor, int]:
        """(R + 1, C) minimum of loss + strength / 2 * |W|^2 from a start, and the number of iterations."""
        shape = (self.design.shape[1] + 1, self.num_classes)
        solution = torch.zeros(shape, dtype=torch.float64) if start is None else start.clone()
        solution.grad = torch.zeros_like(solution)
        share, rows = self.weight / self.weight.sum(), torch.arange(len(self.target))
        transposed = self.design.T.contiguous()

        def closure() -> Tensor:
            weights = solution[:-1]
            logs = torch.addmm(solution[-1], self.design, weights).log_softmax(1)
            value = strength / 2 * weights.square().sum() - share @ logs[rows, self.target]
            residual = logs.exp()  # the gradient by the logits: probabilities minus truth
            residual[rows, self.target] -= 1
            residual *= share[:, None]
            torch.mm(transposed, residual, out=solution.grad[:-1]).add_(weights, alpha=strength)
            torch.sum(residual, 0, out=solution.grad[-1])
            return value

        optimizer = torch.optim.LBFGS(
            [solution],
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=change,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        with torch.no_grad():
            optimizer.step(closure)
        return solution, int(optimizer.state[solution]["n_iter"])

"""optimize_for_inference: the fastest exact form of a model on this host, chosen by timing the candidates once.

Which form wins depends on the processor, the number of threads, the batch and the image size, so none is assumed: each candidate is
built from the fused model (`timm.models.reparameterize_model`), compared with the original's output, and timed in turns with the
fastest one so far.

Candidates: plain eager; eager in channels_last; eager with every Linear and Conv2d packed for oneDNN once instead of in every call, with
and without the activations behind them computed in the same kernel; `torch.compile` with frozen weights, with MKL or oneDNN for matrix
products; and ONNX Runtime and OpenVINO where they are installed. (OpenVINO converts the exported graph: its backend of `torch.compile`
fails on torch 2.14.) In float32 they are exact; half precision is used only if `dtype` says so. oneDNN is selected by torch's switch for
reduced precision ("tf32"): on a processor without such units the products stay exact, and on one with them the comparison with the
original rejects the form.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from timm.models import reparameterize_model
from torch import nn

from ..errors import UserError, one_line, unknown_choice
from ..measure.host import onednn_matmul
from ..measure.timing import time_in_turns
from .deployed import RUNTIMES, Deployed, TensorRunner, run_in
from .onednn import pack

Builder = Callable[[nn.Module, torch.Tensor], TensorRunner]


class OptimizedModel(Deployed):
    """The fastest form. It is fastest at the shape that it was chosen for, and computes the same as the original at every other.

    Attributes:
        form: Name of the chosen form.
        milliseconds: Median time of each form at the sample's shape.
        errors: Largest difference of each form from the original, relative to the largest output.
        rejected: Forms that could not be used here, with the reason.
    """

    def __init__(self, form: str, run: TensorRunner, contest: Contest, model: nn.Module) -> None:
        cfg = getattr(model, "pretrained_cfg", None) or {"input_size": tuple(contest.sample.shape[1:])}
        num_classes = getattr(model, "num_classes", None)
        if num_classes is None:
            num_classes = contest.expected.shape[1]
        shape = [None, contest.sample.shape[1], None, None]
        super().__init__(run, shape, dict(cfg) | {"num_classes": num_classes})
        self.form = form
        self.milliseconds, self.errors, self.rejected = contest.milliseconds, contest.errors, contest.rejected

    @property
    def report(self) -> str:
        """What was tried: a line for each form, the fastest first, then the rejected ones with their reason."""
        lines = [
            f"{form:26} {self.milliseconds[form]:9.2f} ms, differs by {self.errors[form]:.1e}"
            + (", chosen" if form == self.form else "")
            for form in sorted(self.milliseconds, key=self.milliseconds.__getitem__)
        ]
        return "\n".join([*lines, *(f"{form:26} not used: {reason}" for form, reason in self.rejected.items())])


class Contest:
    """Holds the fastest form so far, and lets others compete with it one by one: never more than two forms are in memory.

    The first form is timed alone. Each challenger is timed in turns with the fastest form so far, which thus is timed again in every
    round, at whatever clock rate the host has by then. So that times of different rounds can be compared, a challenger's is multiplied
    by (the incumbent's reported time) / (the incumbent's time in this round): all reported times are at the clock rate of the first
    round.

    Args:
        sample: Images (B, C, H, W) to be fast at.
        expected: The original's output for them.
        half: Half precision to compute in, or None.
        tolerance: Largest difference from `expected`, relative to its largest value.
        repeats: Timed calls per form and round.
    """

    def __init__(
        self, sample: torch.Tensor, expected: torch.Tensor, half: torch.dtype | None, tolerance: float, repeats: int
    ) -> None:
        self.sample, self.expected, self.half = sample, expected, half
        self.tolerance, self.repeats = tolerance, repeats
        self.fastest: tuple[str, TensorRunner] | None = None
        self.milliseconds: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.rejected: dict[str, str] = {}

    def enter(self, form: str, fused: nn.Module) -> None:
        """Builds a form from a copy of the fused model and keeps it if it is exact and faster than the fastest so far."""
        try:
            run = self._build(form, fused)
            difference = (run(self.sample) - self.expected).abs().max() / self.expected.abs().max()
        # Whatever a form's compiler or runtime raises, a missing C++ compiler or an operator that this build of torch lacks,
        # the other forms can still be used.
        except Exception as error:
            self.rejected[form] = one_line(error)
            return
        self.errors[form] = float(difference)
        if not self.errors[form] <= self.tolerance:
            self.rejected[form] = f"differs by {self.errors[form]:.1e}, allowed are {self.tolerance:.1e}"
        elif self._is_faster(form, run):
            self.fastest = form, run

    def _build(self, form: str, fused: nn.Module) -> TensorRunner:
        half = self.half
        if half is None:
            return FORMS[form](copy.deepcopy(fused), self.sample)
        run = FORMS[form](copy.deepcopy(fused).to(half), self.sample.to(half))
        return lambda images: run(images.to(half)).float()

    def _is_faster(self, form: str, run: TensorRunner) -> bool:
        """Whether a form beats the fastest so far; notes its milliseconds."""
        rivals = dict([self.fastest] if self.fastest else []) | {form: run}
        times = time_in_turns(
            {name: functools.partial(call, self.sample) for name, call in rivals.items()}, self.repeats
        )
        if self.fastest is None:
            self.milliseconds[form] = times[form]
            return True
        incumbent = self.fastest[0]
        self.milliseconds[form] = self.milliseconds[incumbent] * (times[form] / times[incumbent])
        return self.milliseconds[form] < self.milliseconds[incumbent]


def optimize_for_inference(
    model: nn.Module,
    sample: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    compile: bool | Literal["auto"] = "auto",
    forms: Sequence[str] | None = None,
    tolerance: float | None = None,
    repeats: int = 20,
) -> OptimizedModel:
    """Builds the candidates one after the other, rejects those that are not exact, and returns the fastest.

    The result has the model's `num_classes`, preprocessing and labels, and its `.report` says how fast and how exact each form was.
    Reported times are comparable (see `Contest`). At most two forms are in memory at a time, and after the call only the fastest.

    Args:
        model: Any float32 model on the CPU that gives one tensor; it is copied, not changed.
        sample: Images (B, C, H, W) of the shape to be fast at.
        dtype: torch.bfloat16 or torch.float16 to compute in (inputs and outputs stay float32); None for float32.
        compile: "auto" tries all forms; False only torch's eager ones, which are built at once while others take seconds to a minute;
            True only `torch.compile`.
        forms: Names in `FORMS`; None for all that `compile` selects.
        tolerance: Largest difference from the model's own output, relative to its largest value; None for 1e-5, or 5e-2 in half
            precision.
        repeats: Timed calls per form.

    Raises:
        UserError: An unknown form, another `dtype` or `compile`, a model or sample that is not float32 on the CPU, or no usable form.
    """
    _check(model, sample, dtype, compile, forms)
    half = None if dtype == torch.float32 else dtype
    wanted = forms or (FORMS if compile == "auto" else COMPILED_FORMS if compile else EAGER_FORMS)
    fused = copy.deepcopy(model).eval()
    with torch.inference_mode():
        expected = fused(sample)
    fused = reparameterize_model(fused, inplace=True)
    contest = Contest(sample, expected, half, (5e-2 if half else 1e-5) if tolerance is None else tolerance, repeats)
    with torch.inference_mode():
        for form in wanted:
            contest.enter(form, fused)
            gc.collect()  # torch.compile leaves reference cycles, which would keep a loser's weights in memory
    if contest.fastest is None:
        reasons = "; ".join(f"{form}: {reason}" for form, reason in contest.rejected.items())
        raise UserError(f"no form of the model can be used: {reasons}")
    return OptimizedModel(*contest.fastest, contest, model)


def _check(
    model: nn.Module,
    sample: torch.Tensor,
    dtype: torch.dtype | None,
    compile: bool | str,
    forms: Sequence[str] | None,
) -> None:
    """Raises `UserError` for arguments that `optimize_for_inference` doesn't take."""
    if isinstance(model, Deployed):
        raise UserError(f"expected a model to optimize, got one that is deployed already ({type(model).__name__})")
    for name, tensor in (("model", next(model.parameters(), sample)), ("sample", sample)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise UserError(f"expected a float32 {name} on the CPU, got {tensor.dtype} on {tensor.device.type}")
    for form in forms or ():
        if form not in FORMS:
            raise unknown_choice("form", form, list(FORMS))
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: expected torch.bfloat16, torch.float16 or None, got {dtype}")
    if compile not in (True, False, "auto"):
        raise UserError(f"compile: expected True, False or 'auto', got {compile!r}")


def _eager(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    return model


def _channels_last(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    model.to(memory_format=torch.channels_last)
    return lambda x: model(x.contiguous(memory_format=torch.channels_last))


def _packed(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    pack(model, sample)
    return model


def _packed_with_activations(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    pack(model, sample, activations=True)
    return model


def _compiled(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    model.to(memory_format=torch.channels_last)
    run = torch.compile(model, options={"freezing": True})
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def _compiled_onednn(model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    compiled = _compiled(model, sample)

    def run(x: torch.Tensor) -> torch.Tensor:
        with onednn_matmul():
            return compiled(x)

    return run


def _in_runtime(target: str, model: nn.Module, sample: torch.Tensor) -> TensorRunner:
    """Another runtime, for images of the sample's size; the eager model for other sizes, which it was not exported for."""
    if sample.dtype != torch.float32:
        raise UserError(f"float32 only, got {sample.dtype}")
    run = run_in(target, model, sample, torch.get_num_threads())
    size = sample.shape[1:]
    return lambda x: run(x) if x.shape[1:] == size else model(x)


EAGER_FORMS: dict[str, Builder] = {
    "eager": _eager,
    "channels_last": _channels_last,
    "packed": _packed,
    "packed with activations": _packed_with_activations,
}
COMPILED_FORMS: dict[str, Builder] = {"compiled": _compiled, "compiled, oneDNN": _compiled_onednn}
RUNTIME_FORMS: dict[str, Builder] = {
    target.package: functools.partial(_in_runtime, target.name) for target in RUNTIMES.values()
}

FORMS: dict[str, Builder] = {**EAGER_FORMS, **COMPILED_FORMS, **RUNTIME_FORMS}
"""Name of a form -> what builds it from a fused model of its own and a sample."""

"""optimize_for_inference: the fastest exact form of a model on this host, chosen by timing the candidates once.

Which form wins depends on the processor, the number of threads, the batch and the image size, so none is assumed: each candidate
is built from the fused model (`timm.models.reparameterize_model`), compared with the original's output, and timed against the
others in turns.

Candidates: plain eager; eager in channels_last; eager with every Linear and Conv2d packed for oneDNN once instead of in every call,
with and without the activations behind them computed in the same kernel; `torch.compile` with frozen weights, by itself and with
oneDNN in the place of MKL for matrix products; and ONNX Runtime and OpenVINO where they are installed. (OpenVINO converts the exported
graph: its backend of `torch.compile` fails on torch 2.14.) In float32 they are exact; a half precision has to be asked for. oneDNN is
chosen by torch's switch for reduced precision ("tf32"): on a processor without such units the products stay exact, and on one with them
the comparison with the original throws the form out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from timm.models import reparameterize_model
from torch import nn

from ..errors import UserError, unknown_choice
from .runtimes import RUNTIMES, Runner, run_in

Builder = Callable[[nn.Module, torch.Tensor], Runner]
Key = TypeVar("Key", bound=Hashable)


class OptimizedModel(nn.Module):
    """The form that won. Inference only; best at the shape that it was chosen for, right at every other.

    Attributes:
        form: Name of the winning form.
        milliseconds: Median time of each form at the sample's shape.
        errors: Largest difference of each form from the original, relative to the largest output.
        rejected: Forms that could not be used here, with the reason.
    """

    def __init__(
        self,
        run: Runner,
        form: str,
        milliseconds: Mapping[str, float],
        errors: Mapping[str, float],
        rejected: Mapping[str, str],
    ):
        super().__init__()
        self._run = run
        self.form = form
        self.milliseconds, self.errors, self.rejected = dict(milliseconds), dict(errors), dict(rejected)

    @property
    def report(self) -> str:
        """What was tried: a line for each form, the fastest first, then those that could not be used and why."""
        lines = [
            f"{form:26} {self.milliseconds[form]:9.2f} ms, differs by {self.errors[form]:.1e}"
            + (", chosen" if form == self.form else "")
            for form in sorted(self.milliseconds, key=self.milliseconds.__getitem__)
        ]
        return "\n".join([*lines, *(f"{form:26} not used: {reason}" for form, reason in self.rejected.items())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._run(x)


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
    """Builds the candidates, drops what is not exact, times the rest in turns and returns the fastest.

    `.report` of the result says what was tried, how fast and how exact each form was.

    Args:
        model: Any float32 model on the CPU that gives one tensor; it is copied, not changed.
        sample: An input (B, 3, H, W) of the shape to be fast at.
        dtype: torch.bfloat16 or torch.float16 for that type inside (inputs and outputs stay float32); None for float32.
        compile: "auto" tries all forms; False only torch's eager ones, which are ready at once while others take seconds to a minute to
            build; True only `torch.compile`.
        forms: Names out of `FORMS`; None for all that `compile` leaves.
        tolerance: Largest difference from the model's own output, relative to its largest value; None for 1e-5, or 5e-2 in half
            precision.
        repeats: Timed calls per form.

    Raises:
        UserError: For an unknown form, another `dtype` or `compile`, or a model or sample that is not float32 on the CPU.
    """
    parameter = next(model.parameters())
    for name, tensor in (("model", parameter), ("sample", sample)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise UserError(f"expected a float32 {name} on the CPU, got {tensor.dtype} on {tensor.device.type}")
    for form in forms or ():
        if form not in FORMS:
            raise unknown_choice("form", form, list(FORMS))
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: expected torch.bfloat16, torch.float16 or None, got {dtype}")
    if compile not in (True, False, "auto"):
        raise UserError(f"compile: expected True, False or 'auto', got {compile!r}")
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    tolerance = (5e-2 if half else 1e-5) if tolerance is None else tolerance
    wanted = FORMS if compile == "auto" else COMPILED_FORMS if compile else EAGER_FORMS
    original = copy.deepcopy(model).eval()
    runners: dict[str, Runner] = {}
    errors: dict[str, float] = {}
    rejected: dict[str, str] = {}
    with torch.inference_mode():
        expected = original(sample)
    fused = reparameterize_model(original)
    example = sample if half is None else sample.to(half)
    fused = fused if half is None else fused.to(half)
    for form in forms or wanted:
        try:
            with torch.inference_mode():
                runner = _in_float32(FORMS[form](copy.deepcopy(fused), example), half)
                difference = (runner(sample) - expected).abs().max() / expected.abs().max()
        except Exception as error:  # a compiler that isn't installed, an operator that this build of torch lacks
            rejected[form] = " ".join(str(error).split())[:200] or type(error).__name__
            continue
        errors[form] = float(difference)
        if errors[form] <= tolerance:
            runners[form] = runner
        else:
            rejected[form] = f"differs by {errors[form]:.1e}, allowed are {tolerance:.1e}"
    if not runners:
        raise UserError(f"no form of the model can be used: {'; '.join(f'{k}: {v}' for k, v in rejected.items())}")
    with torch.inference_mode():
        milliseconds = time_in_turns({form: functools.partial(run, sample) for form, run in runners.items()}, repeats)
    winner = min(milliseconds, key=milliseconds.__getitem__)
    return OptimizedModel(runners[winner], winner, milliseconds, errors, rejected)


def time_in_turns(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, burst: int = 3, warmup: int = 2
) -> dict[Key, float]:
    """Median milliseconds of each call. They take turns in short bursts, so that a change of the clock meets all of them alike."""
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    while times and len(next(iter(times.values()))) < repeats:
        for name, call in calls.items():
            for turn in range(burst):
                start = time.perf_counter()
                call()
                if turn or burst == 1:  # the first call of a burst finds the caches full of another form
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _in_float32(run: Runner, half: torch.dtype | None) -> Runner:
    """A form that computes in half precision, with float32 inputs and outputs."""
    return run if half is None else lambda x: run(x.to(half)).float()


def _eager(model: nn.Module, sample: torch.Tensor) -> Runner:
    return model


def _channels_last(model: nn.Module, sample: torch.Tensor) -> Runner:
    model.to(memory_format=torch.channels_last)
    return lambda x: model(x.contiguous(memory_format=torch.channels_last))


def _packed(model: nn.Module, sample: torch.Tensor) -> Runner:
    pack(model, sample)
    return model


def _packed_with_activations(model: nn.Module, sample: torch.Tensor) -> Runner:
    pack(model, sample, activations=True)
    return model


def _compiled(model: nn.Module, sample: torch.Tensor) -> Runner:
    model.to(memory_format=torch.channels_last)
    run = torch.compile(model, options={"freezing": True})
    return lambda x: run(x.contiguous(memory_format=torch.channels_last))


def _compiled_onednn(model: nn.Module, sample: torch.Tensor) -> Runner:
    compiled = _compiled(model, sample)

    def run(x: torch.Tensor) -> torch.Tensor:
        with onednn_matmul():
            return compiled(x)

    return run


def _in_runtime(runtime: str, model: nn.Module, sample: torch.Tensor) -> Runner:
    """Another runtime, for images of the sample's size; the eager model for other sizes, which it was not exported for."""
    if sample.dtype != torch.float32:
        raise UserError(f"float32 only, got {sample.dtype}")
    run = run_in(runtime, model, sample, torch.get_num_threads())
    return lambda x: run(x.contiguous()) if x.shape[1:] == sample.shape[1:] else model(x)


EAGER_FORMS: dict[str, Builder] = {
    "eager": _eager,
    "channels_last": _channels_last,
    "packed": _packed,
    "packed with activations": _packed_with_activations,
}
COMPILED_FORMS: dict[str, Builder] = {"compiled": _compiled, "compiled, oneDNN": _compiled_onednn}

FORMS: dict[str, Builder] = {
    **EAGER_FORMS,
    **COMPILED_FORMS,
    **{runtime: functools.partial(_in_runtime, runtime) for runtime in RUNTIMES},
}
"""Name of a form -> what builds it from a fused model of its own and a sample."""


@contextlib.contextmanager
def onednn_matmul() -> Iterator[None]:
    """Lets compiled code use oneDNN for float32 matrix products; torch's own choice is back afterwards."""
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # created at run time
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before


class PackedLinear(nn.Module):
    """Linear on weights that were put into oneDNN's own layout beforehand; `rows` is the number of rows to be fast at."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.weight, self.bias = linear.weight, linear.bias
        self.activation, self.algorithm = "none", ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.activation, [], self.algorithm)


class PackedConv2d(nn.Module):
    """Conv2d on weights that were put into oneDNN's own layout beforehand; `shape` is the input's to be fast at."""

    def __init__(self, conv: nn.Conv2d, shape: Sequence[int]):
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry, list(shape))
        self.weight, self.bias = conv.weight, conv.bias
        self.activation, self.algorithm = "none", ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        return run(x, self.packed, self.bias, *self.geometry, self.activation, [], self.algorithm)


def pack(model: nn.Module, sample: torch.Tensor, activations: bool = False) -> None:
    """Replaces every Linear and Conv2d that `model(sample)` calls by its packed form, in place.

    Args:
        model: A model in eval mode.
        sample: An input of the shape to be fast at.
        activations: Let a packed layer also do the activation that stands behind it in the same module. Where they stand says
            nothing for certain of the order they are called in: compare the outputs.

    Raises:
        RuntimeError: Where this build of torch lacks the operators.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise RuntimeError("this build of torch has no packed oneDNN layers")
    shapes: dict[nn.Module, torch.Size] = {}

    def note_shape(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        shapes[layer] = args[0].shape

    layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(note_shape) for layer in layers]
    model(sample)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer not in shapes:
                continue
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer, shapes[layer][:-1].numel()))
            elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                setattr(parent, name, PackedConv2d(layer, shapes[layer]))
        if activations:
            _absorb_activations(parent)


def _absorb_activations(parent: nn.Module) -> None:
    """Moves each activation among a module's children into the packed layer before it, if only idle modules lie between."""
    packed: PackedLinear | PackedConv2d | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, PackedLinear | PackedConv2d):
            packed = child
        elif packed is not None and (fused := _onednn_activation(child)):
            packed.activation, packed.algorithm = fused
            setattr(parent, name, nn.Identity())
            packed = None
        elif not isinstance(child, nn.Identity | nn.Dropout):
            packed = None


def _onednn_activation(module: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name and algorithm for an activation module, None for any other module."""
    if isinstance(module, nn.GELU):
        return "gelu", module.approximate
    names = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
    return (names[type(module)], "") if type(module) in names else None

"""Official keys go in through timm's own loading, official answers come out: logits, other image sizes, every stage, size and cost."""

from dataclasses import dataclass, field

import pytest
import timm
import torch
from reference import Golden, images, relative_error
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import effvit_zoo  # noqa: F401 - registers the models

STAGES = {"stem": "stem", **{f"stage{i + 1}": f"stages.{i}" for i in range(4)}, "norm": "norm"}
"""Stage of the official code -> our module."""

SWIN_STAGES = {"stem": "patch_embed", **{f"stage{i + 1}": f"layers.{i}" for i in range(4)}}


@dataclass(frozen=True)
class Case:
    """A row: where the official stages are in our model if not at STAGES, and how close float64 comes (None: not pure float64)."""

    golden: str
    stages: dict[str, str] = field(default_factory=dict)
    double_error: float | None = 1e-9
    slow: bool = False

    @property
    def name(self) -> str:
        return f"effzoo_{self.golden}"


CASES = [
    Case("swiftformer_s"),
    Case("swiftformer_l3", slow=True),
    Case("edgenext_xx_small"),
    Case("edgenext_base", slow=True),
    Case("edgenext_small_bn_hs"),
    # the attention has another eps; test_efficientvit.py compares with the official one
    Case("efficientvit_b0", stages={"head_conv": "head.in_conv"}, double_error=1e-5),
    Case("efficientvit_b2", stages={"head_conv": "head.in_conv"}, double_error=1e-5, slow=True),
    Case("efficientvit_l2", stages={"head_conv": "head.in_conv"}, double_error=1e-5, slow=True),
    Case("conv2former_n", stages={"head": "head.norm"}),
    Case("conv2former_b", stages={"head": "head.norm"}, slow=True),
    Case("swin_tiny_patch4_window7_224", stages=SWIN_STAGES),
    Case("swin_base_patch4_window12_384", stages=SWIN_STAGES, slow=True),
]


def params(cases):
    return [pytest.param(c, id=c.golden, marks=[pytest.mark.slow] if c.slow else []) for c in cases]


def load(case: Case, golden: Golden, folder, **kwargs):
    path = folder / "official.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in golden.state_dict().items()}, path)
    return timm.create_model(case.name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs).eval()


@pytest.mark.parametrize("case", params(CASES))
@torch.no_grad()
def test_official_answers(case, tmp_path):
    golden = Golden(case.golden)
    model = load(case, golden, tmp_path)
    seen = {}
    for stage in golden.stages():
        module = model.get_submodule({**STAGES, **case.stages}[stage])
        module.register_forward_hook(lambda _m, _i, out, stage=stage: seen.__setitem__(stage, out))
    logits = model(images(*golden.meta["input_size"]))

    assert relative_error(logits, golden.arrays["logits"]) < 1e-5
    for stage in golden.stages():
        feature = seen[stage].double()
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            feature = feature.permute(0, 3, 1, 2)
        _, _, height, width = feature.shape
        assert relative_error(feature[0].mean((1, 2)), golden.arrays[f"{stage}.mean"]) < 1e-4, stage
        assert relative_error(feature[0, :, height // 2, width // 2], golden.arrays[f"{stage}.center"]) < 1e-4, stage
        assert relative_error(feature.std(unbiased=False), golden.arrays[f"{stage}.std"]) < 1e-5, stage

    if case.double_error is not None:
        logits = model.double()(images(*golden.meta["input_size"]).double())
        assert relative_error(logits, golden.arrays["logits"]) < case.double_error


@pytest.mark.parametrize("case", params(CASES))
@torch.no_grad()
def test_official_answers_at_other_sizes(case, tmp_path):
    golden = Golden(case.golden)
    sizes = list(golden.other_sizes())
    if not sizes:
        pytest.skip("the official code takes one size only")
    model = load(case, golden, tmp_path)
    for key, height, width in sizes:
        assert relative_error(model(images(height, width, batch=1)), golden.arrays[key]) < 1e-5, key


@pytest.mark.parametrize("case", params(CASES))
def test_official_size_and_cost(case):
    golden = Golden(case.golden)
    model = timm.create_model(case.name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *golden.meta["input_size"], device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(golden.meta["macs"], rel=0.01)

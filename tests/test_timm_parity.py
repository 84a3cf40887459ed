"""timm's state dict goes in, timm's answers come out, for every variant that timm has: same weights, same logits, same size and cost."""

import sys
from dataclasses import dataclass

import pytest
import timm
import torch
from reference import calibrate_batch_norm, images, randomise, relative_error
from torch.utils.flop_counter import FlopCounterMode

import effvit_zoo  # noqa: F401 - registers the models


@dataclass(frozen=True)
class Pair:
    """A row: timm's name, ours, the image's side in pixels for the comparison of logits (None: too large for it), whether it takes long."""

    timm: str
    ours: str
    size: int | None = 128
    slow: bool = False
    error: float = 1e-5


PAIRS = [
    *(Pair(f"edgenext_{v}", f"effzoo_edgenext_{v}") for v in ("xx_small", "x_small", "small", "base")),
    *(
        Pair(f"efficientvit_{v}", f"effzoo_efficientvit_{v}", slow=v == "l3")
        for v in ("b0", "b1", "b2", "b3", "l1", "l2", "l3")
    ),
    *(Pair(f"swiftformer_{v}", f"effzoo_swiftformer_{v}") for v in ("xs", "s", "l1", "l3")),
    *(
        Pair(f"swin_{v}_patch4_window7_224", f"effzoo_swin_{v}_patch4_window7_224", slow=v == "base")
        for v in ("tiny", "small", "base")
    ),
    Pair("swin_base_patch4_window12_384", "effzoo_swin_base_patch4_window12_384", size=192, slow=True),
    Pair("swin_large_patch4_window7_224", "effzoo_swin_large_patch4_window7_224", size=None),
    Pair("swin_large_patch4_window12_384", "effzoo_swin_large_patch4_window12_384", size=None),
    *(Pair(f"deit_{v}_patch16_224", f"effzoo_vit_{v}", size=224, slow=v == "base") for v in ("tiny", "small", "base")),
]


@pytest.mark.parametrize(
    "pair", [pytest.param(p, id=p.ours, marks=[pytest.mark.slow] if p.slow else []) for p in PAIRS if p.size]
)
@torch.no_grad()
def test_same_logits(pair):
    resizable = hasattr(timm.create_model(pair.ours, device="meta"), "set_input_size")
    size = {"img_size": pair.size} if resizable else {}
    theirs = randomise(timm.create_model(pair.timm, **size))
    x = images(pair.size, pair.size)
    calibrate_batch_norm(theirs, x)
    ours = timm.create_model(pair.ours, **size).eval()
    converted = sys.modules[type(ours).__module__].checkpoint_filter_fn(theirs.state_dict(), ours)
    ours.load_state_dict(converted)
    assert relative_error(ours(x), theirs(x)) < pair.error


@pytest.mark.parametrize("pair", PAIRS, ids=[p.ours for p in PAIRS])
def test_same_size_and_cost(pair):
    macs, sizes = [], []
    for name in (pair.timm, pair.ours):
        model = timm.create_model(name, device="meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
        macs.append(counter.get_total_flops())
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[0] == sizes[1]
    assert macs[0] == pytest.approx(macs[1], rel=0.01)

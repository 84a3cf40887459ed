"""Published architectures in half precision, with weights under which every part shows: finite, and within 2 % of float32."""

import pytest
import timm
import torch
from reference import Golden, relative_error
from safetensors.torch import save_file

import effvit_zoo

VARIANTS = ["swiftformer_s", "edgenext_xx_small", "efficientvit_b0", "swin_tiny_patch4_window7_224"]


def official(variant, side, folder):
    path = folder / "official.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in Golden(variant).state_dict().items()}, path)
    sized = {"img_size": side} if variant.startswith("swin") else {}
    return effvit_zoo.create_model(
        f"effzoo_{variant}", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **sized
    ).eval()


@pytest.mark.parametrize("side", [224, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_within_two_percent(variant, side, tmp_path):
    assert timm.is_model(f"effzoo_{variant}")
    model = official(variant, side, tmp_path)
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            mixed = model(image)
        assert torch.isfinite(mixed).all()
        assert relative_error(mixed.float(), expected) < 0.02
    whole = model.to(torch.bfloat16)(image.to(torch.bfloat16))
    assert whole.dtype is torch.bfloat16
    assert relative_error(whole.float(), expected) < 0.02

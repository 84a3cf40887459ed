"""The size `nano64` of every kind: matched in parameters and multiply-accumulates, and able to learn at 64 pixels."""

import pytest
import timm
import torch

import effvit_zoo
from effvit_zoo.measure import cost
from effvit_zoo.models._base import NANO64
from effvit_zoo.models.isotropic_vit import FAMILIES, model_name

MACS, PARAMS, BAND = 54e6, 0.8e6, 0.15
HIERARCHICAL = ("swin", "efficientvit", "edgenext", "conv2former", "swiftformer")
NAMES = [
    *(f"effzoo_{kind}_nano64" for kind in HIERARCHICAL),
    *(model_name(mixer, "nano64") for mixer in FAMILIES),
    "effzoo_tosa_vit_nano64",
]


def test_every_kind_has_one():
    assert sorted(NAMES) == effvit_zoo.list_models("*nano64*")
    assert len(NAMES) == 11


def test_they_are_matched():
    """At each model's own settings: ToSA's layers see half of the patches."""
    for name in NAMES:
        model = cost.skeleton(name)
        assert cost.count_params(model) == pytest.approx(PARAMS, rel=BAND), name
        assert cost.count_macs(model) == pytest.approx(MACS, rel=BAND), name
        assert {key: model.pretrained_cfg[key] for key in ("input_size", "crop_pct", "num_classes")} == {
            key: NANO64[key] for key in ("input_size", "crop_pct", "num_classes")
        }, name


@pytest.mark.parametrize("kind", HIERARCHICAL)
def test_they_have_four_maps(kind):
    model = timm.create_model(f"effzoo_{kind}_nano64", features_only=True, device="meta")
    maps = model(torch.empty(1, 3, 64, 64, device="meta"))
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    first = 32 if kind == "swin" else 16  # pixels
    assert [m.shape[1 if channels_last else 2] for m in maps] == [first // 2**i for i in range(4)]


@pytest.mark.parametrize("patch_size", [16, (4, 8)])
def test_other_patches_of_the_convolutional_stem_are_refused(patch_size):
    with pytest.raises(ValueError, match=r"4 x 4 or 8 x 8 pixels, got patch_size="):
        timm.create_model("effzoo_vit_nano64", patch_size=patch_size, device="meta")
    with pytest.raises(ValueError, match=r"patch_size=\(8, 8\), it can't become"):
        timm.create_model("effzoo_vit_nano64", device="meta").set_input_size(patch_size=patch_size)

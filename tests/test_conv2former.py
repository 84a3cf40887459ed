"""What is Conv2Former's own: the modulation, the order of its layers, its variants' sizes, its head and its fused form."""

import copy

import pytest
import timm
import torch
from reference import calibrate_batch_norm, randomise, relative_error
from timm.layers import LayerNorm2d, LayerScale2d
from timm.models import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effvit_zoo  # noqa: F401 - registers the models
from effvit_zoo.attention.conv_modulation import ConvModulation, naive_conv_modulation

OFFICIAL = {  # parameters, MACs in 10^9 at 224 x 224, kernel: official code at 94fd1c4d0a, convolutions and linear layers counted
    "n": (14_992_840, 2.330, 7),
    "t": (26_697_204, 4.361, 11),
    "s": (50_032_692, 8.708, 11),
    "b": (90_029_112, 15.890, 11),
    "b_22k": (88_784_952, 15.565, 7),
    "l": (198_893_736, 36.037, 11),
}


@torch.no_grad()
def slow_modulation(module, x):
    """LayerNorm and pointwise convolutions written out around the naive form."""
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    x = (x - mean) / torch.sqrt(var + 1e-6) * module.norm.weight.view(-1, 1, 1) + module.norm.bias.view(-1, 1, 1)

    def pointwise(conv, x):
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias.view(-1, 1, 1)

    depthwise = module.att[2]
    x, v = pointwise(module.att[0], x), pointwise(module.v, x)
    return pointwise(module.proj, naive_conv_modulation(x, v, depthwise.weight, depthwise.bias))


@pytest.mark.parametrize(("kernel", "height", "width"), [(7, 9, 5), (11, 4, 13)])
@torch.no_grad()
def test_modulation_is_its_formula(kernel, height, width):
    module = randomise(ConvModulation(6, kernel, dtype=torch.float64))
    x = torch.randn(2, 6, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert relative_error(module(x), slow_modulation(module, x)) < 1e-12


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 8"):
        timm.create_model("effzoo_conv2former_n", kernel_size=8, device="meta")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[] if v == "n" else [pytest.mark.slow]) for v in OFFICIAL])
def test_official_sizes(variant):
    params, macs, kernel = OFFICIAL[variant]
    model = timm.create_model(f"effzoo_conv2former_{variant}", device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=5e-4)
    assert {m.att[2].kernel_size for m in model.modules() if isinstance(m, ConvModulation)} == {(kernel, kernel)}


def test_layers_as_in_the_official_code():
    model = timm.create_model("effzoo_conv2former_n", device="meta")
    assert [type(layer) for layer in model.stem] == [
        *(nn.Conv2d, nn.GELU, nn.BatchNorm2d) * 2,
        nn.Conv2d,
    ]
    assert {m.eps for m in model.modules() if isinstance(m, LayerNorm2d)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    assert {m.init_values for m in model.modules() if isinstance(m, LayerScale2d)} == {1e-6}
    assert len([m for m in model.modules() if isinstance(m, LayerNorm2d)]) == 32


def test_preprocessing_is_the_readmes():
    cfg = timm.get_pretrained_cfg("effzoo_conv2former_b_22k")
    assert not cfg.has_weights
    assert cfg.mean == (0.485, 0.456, 0.406)
    assert cfg.std == (0.229, 0.224, 0.225)
    assert (cfg.crop_pct, cfg.interpolation, cfg.license) == (0.9, "bicubic", "apache-2.0")
    assert any("kernel 11" in note for note in cfg.notes)


@torch.no_grad()
def test_head_without_its_own_layers():
    model = timm.create_model("effzoo_conv2former_n", num_classes=5, global_pool="catavgmax").eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.head_hidden_size == 2 * 1280
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "avg", reset_other=True)
    assert model.head_hidden_size == 512
    assert relative_error(model(x), model.forward_features(x).mean((2, 3))) < 1e-6


@torch.no_grad()
def test_fused_form():
    model = randomise(timm.create_model("effzoo_conv2former_n"))
    x = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    calibrate_batch_norm(model, x)
    fused = reparameterize_model(model)
    assert relative_error(fused(x), model(x)) < 1e-5
    assert not [m for m in fused.modules() if isinstance(m, LayerScale2d)]
    for feature in fused.forward_intermediates(x, intermediates_only=True):
        assert feature.is_contiguous(memory_format=torch.channels_last)
    # what acts in place neither reaches the image nor a caller who differentiates
    before = x.clone()
    fused(x)
    assert torch.equal(x, before)
    with torch.enable_grad():
        gradients = []
        for net in (copy.deepcopy(model), fused):
            image = x.clone().requires_grad_()
            net(image).square().sum().backward()
            gradients.append(image.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4

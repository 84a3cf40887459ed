"""Layers are called, never only their weights read: what other libraries put around or in place of a layer takes effect."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import effvit_zoo
from effvit_zoo.attention import TOKEN_MIXERS

FAMILIES = [
    "effzoo_conv2former_n",
    "effzoo_edgenext_xx_small",
    "effzoo_efficientvit_b0",
    "effzoo_swiftformer_xs",
    "effzoo_swin_tiny_patch4_window7_224",
    "effzoo_vit_pico",
]


def mixed(name: str) -> nn.Module:
    torch.manual_seed(0)
    return effvit_zoo.create_model("effzoo_vit_pico", mixers={name: list(range(6))}, num_classes=2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [*FAMILIES, *(f"mixer:{name}" for name in TOKEN_MIXERS)])
def test_every_layer_is_called(name, training):
    kind, _, mixer = name.rpartition(":")
    model = mixed(mixer) if kind else effvit_zoo.create_model(name, num_classes=2)
    layers = {path: module for path, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    uncalled = set(layers)
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: uncalled.discard(path))
    size = 32 if name == "effzoo_vit_pico" or kind else 96
    with torch.no_grad():
        model.train(training)(torch.randn(2, 3, size, size))
    assert not uncalled


class Scaled(nn.Module):
    """An adapter around a layer, without its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("name", TOKEN_MIXERS)
def test_an_adapter_replaces_the_projection(name):
    model, twin = mixed(name).eval(), mixed(name).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model.forward_features(x)
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        block.attn.qkv = Scaled(block.attn.qkv)
        with torch.no_grad():
            other.attn.qkv.weight *= 2
            other.attn.qkv.bias *= 2
    adapted = model.forward_features(x)
    torch.testing.assert_close(adapted, twin.forward_features(x), rtol=1e-4, atol=1e-4)  # sums in another order
    assert (adapted - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", TOKEN_MIXERS)
def test_dynamic_quantisation_stays_close(name):
    model, x = mixed(name).eval(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces another library
        plain = model.forward_features(x)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}).forward_features(x)
    assert 0 < (quantised - plain).abs().max() < 0.2 * plain.abs().max()


@pytest.mark.parametrize("name", ["softmax", "additive", "conv_mod"])
def test_pruned_and_offloaded_layers_work(name):
    model, x = mixed(name), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # the second step needs the mask to be applied anew
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    calls = []
    layer = model.blocks[0].attn.qkv
    forward = layer.forward
    layer.forward = lambda x: calls.append(1) or forward(x)  # as accelerate's hooks do it
    model(x)
    assert calls


def test_convolutions_are_called_when_pruned():
    model = effvit_zoo.create_model("effzoo_edgenext_xx_small", num_classes=2)
    (layer,) = [module.token_projection for module in model.modules() if hasattr(module, "token_projection")]
    prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64)).sum().backward()

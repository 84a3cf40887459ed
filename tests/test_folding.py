"""What `fuse` is made of: normalisation and scales fold into the layer beside them without a change of the function."""

import pytest
import torch
from reference import relative_error
from torch import nn

from effvit_zoo.models._fold import (
    fold_input_affine,
    fold_norm_after,
    fold_norm_before,
    fold_output_affine,
    inplace_activation,
)


def batch_norm(channels, affine=True):
    norm = nn.BatchNorm2d(channels, affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


CONVS = {
    "dense": lambda bias: nn.Conv2d(8, 16, 3, bias=bias),
    "strided": lambda bias: nn.Conv2d(8, 16, 3, stride=2, dilation=2, bias=bias),
    "grouped": lambda bias: nn.Conv2d(8, 16, 3, groups=4, bias=bias),
    "depthwise": lambda bias: nn.Conv2d(8, 8, 3, groups=8, bias=bias),
    "pointwise": lambda bias: nn.Conv2d(8, 4, 1, bias=bias),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CONVS)
@torch.no_grad()
def test_batch_norm_on_either_side_of_a_convolution(kind, bias):
    x = torch.randn(2, 8, 9, 9)
    conv = CONVS[kind](bias)
    before, after = batch_norm(8), batch_norm(conv.out_channels, affine=False)
    assert relative_error(fold_norm_before(before, conv)(x), conv(before(x))) < 1e-5
    assert relative_error(fold_norm_after(conv, after)(x), after(conv(x))) < 1e-5
    padded = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=bias)
    assert relative_error(fold_norm_after(padded, before)(x), before(padded(x))) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_scales_around_a_linear_layer(bias):
    x, scale, shift = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    linear = nn.Linear(8, 8, bias=bias)
    assert relative_error(fold_input_affine(linear, scale, shift)(x), linear(x * scale + shift)) < 1e-5
    assert relative_error(fold_output_affine(linear, scale.reshape(8, 1, 1))(x), linear(x) * scale) < 1e-5


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="padded"):
        fold_norm_before(batch_norm(8), nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(ValueError, match="BatchNorm"):
        fold_norm_after(nn.Linear(8, 8), nn.LayerNorm(8))
    conv = nn.Conv2d(8, 8, 1)
    assert fold_norm_before(nn.Identity(), conv) is conv


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Hardswish()], ids=repr)
def test_inplace_activation(act):
    x = torch.randn(4, 5)
    expected = act(x)
    inplace = inplace_activation(act)
    with torch.no_grad():
        buffer = x.clone()
        assert torch.equal(inplace(buffer), expected)
        assert torch.equal(buffer, expected)
    y = x.clone().requires_grad_()
    inplace(y * 1).sum().backward()
    z = x.clone().requires_grad_()
    act(z).sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
    assert inplace_activation(nn.Tanh()).__class__ is nn.Tanh

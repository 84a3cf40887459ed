"""The mechanisms of the other families as token mixers: the same functions as in their own form, on a ViT's tokens and weights."""

import pytest
import torch
from torch import nn

from effvit_zoo.attention import TOKEN_MIXERS
from effvit_zoo.attention.additive import EfficientAdditiveAttention
from effvit_zoo.attention.conv_modulation import ConvModulation
from effvit_zoo.attention.cross_covariance import CrossCovarianceAttention
from effvit_zoo.attention.multiscale_linear import MultiScaleLinearAttention

B, C, HEADS, GRID = 2, 48, 3, (4, 7)
N = GRID[0] * GRID[1]
GRID_MIXERS = ["conv_mod", "multiscale_linear"]


def mixer(name, prefix=0, seed=0, **kwargs):
    torch.manual_seed(seed)
    made = TOKEN_MIXERS[name](C, num_heads=HEADS, **{"qkv_bias": True, **kwargs}).double()
    if hasattr(made, "grid_size"):
        made.grid_size, made.num_prefix_tokens = GRID, prefix
    return made


def tokens(prefix=0):
    return torch.randn(B, prefix + N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def feature_map(x):
    return x.transpose(1, 2).reshape(B, C, *GRID)


def flat(x):
    return x.flatten(2).transpose(1, 2)


def fill(module, weights):
    """Loads all parameters of a module, by name."""
    assert set(dict(module.named_parameters())) == set(weights)
    module.double().load_state_dict(
        {key: value.detach().reshape(module.state_dict()[key].shape) for key, value in weights.items()}
    )
    return module


def thirds(m):
    return m.qkv.weight.chunk(3), m.qkv.bias.chunk(3)


def test_xca_is_that_of_its_family():
    m = mixer("xca")
    m.temperature.data = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64).view(3, 1, 1)
    twin = fill(CrossCovarianceAttention(C, HEADS), dict(m.named_parameters()))
    torch.testing.assert_close(m(tokens()), twin(tokens()))


def test_xca_drops_weights_in_training_only():
    m, x = mixer("xca", attn_drop=0.5), tokens()
    torch.testing.assert_close(m.eval()(x), mixer("xca")(x))
    assert (m.train()(x) - m.eval()(x)).abs().max() > 1e-4


def test_additive_is_that_of_its_family():
    m = mixer("additive")
    (q, k, v), (q_bias, k_bias, v_bias) = thirds(m)
    names = {"to_query": (q, q_bias), "to_key": (k, k_bias), "proj": (v, v_bias), "final": (m.proj.weight, m.proj.bias)}
    weights = {
        f"{name}.{kind}": value
        for name, pair in names.items()
        for kind, value in zip(("weight", "bias"), pair, strict=True)
    }
    twin = fill(EfficientAdditiveAttention(C), {**weights, "w_g": m.w_g})
    torch.testing.assert_close(m(tokens()), flat(twin(feature_map(tokens()))))


def test_conv_modulation_is_that_of_its_family():
    m = mixer("conv_mod")
    (w, _, v), (w_bias, _, v_bias) = thirds(m)
    names = {
        "att.0": (w, w_bias),
        "att.2": (m.conv.weight, m.conv.bias),
        "v": (v, v_bias),
        "proj": (m.proj.weight, m.proj.bias),
    }
    weights = {
        f"{name}.{kind}": value
        for name, pair in names.items()
        for kind, value in zip(("weight", "bias"), pair, strict=True)
    }
    twin = ConvModulation(C, kernel_size=11)
    twin.norm = nn.Identity()  # the ViT's block has its own
    torch.testing.assert_close(m(tokens()), flat(fill(twin, weights)(feature_map(tokens()))))


def test_multiscale_linear_is_that_of_its_family():
    m = mixer("multiscale_linear", qkv_bias=False, proj_bias=False)
    D = C // HEADS
    twin = MultiScaleLinearAttention(C, head_dim=D)
    twin.proj.norm = nn.Identity()

    def by_head(weight):  # [q of all heads | k | v] -> [q | k | v] of each head
        return weight.reshape(3, HEADS, D, *weight.shape[1:]).transpose(0, 1).flatten(0, 2)

    weights = {
        "qkv.conv.weight": by_head(m.qkv.weight),
        "aggreg.0.0.weight": by_head(m.aggreg[0][0].weight),
        "aggreg.0.1.weight": by_head(m.aggreg[0][1].weight),
        "proj.conv.weight": torch.cat([m.proj.weight, m.proj_coarse.weight], dim=1),
    }
    torch.testing.assert_close(m(tokens()), flat(fill(twin, weights)(feature_map(tokens()))))


@pytest.mark.parametrize("name", ["xca", "additive", *GRID_MIXERS])
def test_gradients(name):
    m, x = mixer(name, prefix=1), tokens(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: m(x)[:1, ::9, ::11], x, fast_mode=True)
    m(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_conv_modulation_gives_prefix_tokens_the_whole_image():
    m, x = mixer("conv_mod", prefix=2), tokens(2)
    out = m(x)
    patches = mixer("conv_mod")
    torch.testing.assert_close(out[:, 2:], patches(x[:, 2:]))  # patches do not see prefix tokens
    (w, _, v), (w_bias, _, v_bias) = thirds(m)
    a = m.conv(feature_map(nn.functional.gelu(x[:, 2:] @ w.T + w_bias))).mean((2, 3))
    torch.testing.assert_close(out[:, 1], m.proj(a * (x[:, 1] @ v.T + v_bias)))


def test_multiscale_linear_lets_prefix_tokens_attend_at_every_scale():
    m, x = mixer("multiscale_linear", prefix=1), tokens(1)
    q, k, v = m.project_qkv(x)
    both = m.mix(q, k, v)  # (B, 2 H, N, D)

    def linear(q, k, v):
        scores = q.relu() @ k.relu().mT
        return scores @ v / scores.sum(-1, keepdim=True)

    torch.testing.assert_close(both[:, :HEADS], linear(q, k, v), rtol=1e-4, atol=1e-4)
    coarse = m.aggreg[0](torch.cat([q, k, v], 1)[:, :, 1:].transpose(-2, -1).reshape(B, 3 * C, *GRID))
    coarse = coarse.reshape(B, 3, HEADS, C // HEADS, N).transpose(-2, -1)
    own = torch.stack([q, k, v], 1)[:, :, :, :1]
    expected = linear(*torch.cat([own, coarse], -2).unbind(1))
    torch.testing.assert_close(both[:, HEADS:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["xca", "additive"])
def test_a_prefix_token_is_one_more_token(name):
    """Nothing but the order of the outputs depends on where it stands."""
    m, x = mixer(name), tokens(1)
    torch.testing.assert_close(m(x.roll(5, 1)), m(x).roll(5, 1))


@pytest.mark.parametrize("name", [*GRID_MIXERS, "cosformer_2d"])
def test_tokens_must_fill_the_grid(name):
    with pytest.raises(ValueError, match=r"1 prefix tokens and a grid of 4 x 7, got 28"):
        mixer(name, prefix=1)(tokens())


@pytest.mark.parametrize("name", ["xca", "additive", *GRID_MIXERS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    m, x = mixer(name, prefix=1), tokens(1)
    expected, got = m(x), m.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() < (2e-2 if dtype == torch.float16 else 6e-2) * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "kwargs"), [("conv_mod", {"qk_norm": True}), ("multiscale_linear", {"scale_norm": True})]
)
def test_what_a_mechanism_cannot_honour_is_refused(name, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        mixer(name, norm_layer=nn.LayerNorm, **kwargs)

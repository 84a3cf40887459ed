"""EfficientViT: the attention against its quadratic form, float32 inside half precision, official checkpoints, layout after fusing."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import Golden, calibrate_batch_norm, centred_error, images, randomise, relative_error
from safetensors.torch import save_file
from timm.models import reparameterize_model
from torch import nn

import effvit_zoo
from effvit_zoo.attention.multiscale_linear import (
    GroupedPointwise,
    MultiScaleLinearAttention,
    naive_relu_linear_attention,
    relu_linear_attention,
)
from effvit_zoo.models.efficientvit import EfficientViT, checkpoint_filter_fn


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("Nq", "Nk"), [(63, 63), (5, 40), (1, 1)])
def test_attention_equals_the_quadratic_form(Nq, Nk):
    q, k, v = draw(6, 16, Nq, seed=1), draw(6, 16, Nk, seed=2), draw(6, 8, Nk, seed=3)
    weight = draw(6, 8, Nq, seed=4)
    results = []
    for attend in (relu_linear_attention, naive_relu_linear_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_query_without_positive_channels_reads_nothing():
    q, k, v = draw(2, 16, 9), draw(2, 16, 9, seed=1), draw(2, 16, 9, seed=2)
    q[:, :, 3] = -1.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = relu_linear_attention(*leaves)
        assert (out[:, :, 3] == 0).all()
        assert torch.isfinite(out).all()
        for grad in torch.autograd.grad(out.float().sum(), leaves):
            assert torch.isfinite(grad).all()


def test_shapes_that_do_not_fit_are_named():
    x = torch.ones(2, 16, 9)
    with pytest.raises(ValueError, match=r"\(M, D, N\), got \[2, 16, 9\], \[2, 16, 3, 3\]"):
        relu_linear_attention(x, x.reshape(2, 16, 3, 3), x)
    with pytest.raises(ValueError, match="equal channels"):
        relu_linear_attention(x, x[:, :8], x)
    with pytest.raises(ValueError, match="equal positions"):
        relu_linear_attention(x, x, x[..., :8])


def test_grouped_pointwise_is_a_grouped_convolution():
    layer = GroupedPointwise(24, groups=6, dtype=torch.float64)
    x = draw(3, 24, 5, 7)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, groups=6))
    assert layer(x.to(memory_format=torch.channels_last)).equal(layer(x))


@torch.no_grad()
def test_module_equals_the_written_out_formula():
    dim, D, scales = 24, 8, (3, 5)
    module = calibrate_batch_norm(
        randomise(MultiScaleLinearAttention(dim, D, scales, dtype=torch.float64)), draw(4, dim, 6, 9)
    )
    x = draw(2, dim, 6, 9, seed=1)
    heads = []
    qkv = module.qkv(x)
    for depthwise, pointwise in [(None, None), *module.aggreg]:
        scale = qkv if depthwise is None else F.conv2d(depthwise(qkv), pointwise.weight, groups=3 * dim // D)
        for head in scale.split(3 * D, dim=1):  # each head is [q | k | v]
            q, k, v = (part.flatten(2) for part in head.split(D, dim=1))
            heads.append(naive_relu_linear_attention(q, k, v).reshape(2, D, 6, 9))
    torch.testing.assert_close(module(x), module.proj(torch.cat(heads, dim=1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [7, 64])
@torch.no_grad()
def test_attention_in_half_precision(dtype, side):
    """Key sums over 4,096 positions leave float16, and a query may be negative throughout: computed in half, both end in NaN."""
    module = calibrate_batch_norm(randomise(MultiScaleLinearAttention(64, 16)), 8 * draw(2, 64, side, side).float())
    x = 8 * draw(1, 64, side, side, seed=1).float()
    full = module(x)
    with torch.autocast("cpu", dtype):
        mixed = module(x)
    half = module.to(dtype)(x.to(dtype))
    for out in (mixed, half):
        assert out.dtype is dtype
        assert torch.isfinite(out).all()
        assert relative_error(out, full) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_in_half_precision(dtype, tmp_path):
    model = official("efficientvit_b0", tmp_path)
    for side in (224, 512):
        x = images(side, side, batch=1)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        assert torch.isfinite(mixed).all()
        assert relative_error(mixed, model(x)) < 0.02


def official(variant, folder, wrap=None, **kwargs):
    """A model with the official weights of tests/golden, in a nested checkpoint if `wrap` names its key."""
    state = {key: tensor.contiguous() for key, tensor in Golden(variant).state_dict().items()}
    path = folder / ("official.pt" if wrap else "official.safetensors")
    if wrap:
        torch.save({wrap: state, "epoch": 3}, path)
    else:
        save_file(state, path)
    overlay = {"file": str(path), "num_classes": 1000}
    return timm.create_model(f"effzoo_{variant}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_ema"])
@torch.no_grad()
def test_nested_checkpoint_and_another_head(wrap, tmp_path):
    golden = Golden("efficientvit_b0")
    model = official("efficientvit_b0", tmp_path, wrap, num_classes=5)
    seen = model.forward_intermediates(images(224, 224), intermediates_only=True)[-1][0].mean((1, 2))
    assert relative_error(seen, golden.arrays["stage4.mean"]) < 1e-4
    assert model(images(64, 64)).shape == (2, 5)


@pytest.mark.parametrize("variant", ["efficientvit_b0", "efficientvit_l2"])
def test_official_backbone_without_head_or_prefix(variant):
    """What detectors and segmenters keep: the backbone alone, with or without its prefix."""
    state = {key: key for key in Golden(variant).state_dict() if key.startswith("backbone.")}
    model = timm.create_model(f"effzoo_{variant}", device="meta")
    expected = {key for key in model.state_dict() if not key.startswith("head.")}
    assert set(checkpoint_filter_fn(state, model)) == expected
    assert set(checkpoint_filter_fn({key.removeprefix("backbone."): 0 for key in state}, model)) == expected


@pytest.mark.parametrize(("variant", "norm_eps"), [("b0", 1e-5), ("b3", 1e-5), ("l1", 1e-7), ("l3", 1e-7)])
def test_eps_is_the_official_one(variant, norm_eps):
    model = timm.create_model(f"effzoo_efficientvit_{variant}", device="meta")
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    assert {norm.eps for norm in norms} == {norm_eps}
    model = timm.create_model(f"effzoo_efficientvit_{variant}", device="meta", attn_eps=1e-15)
    assert {m.eps for m in model.modules() if isinstance(m, MultiScaleLinearAttention)} == {1e-15}


@pytest.mark.parametrize("variant", ["efficientvit_b0", "efficientvit_b2"])
@torch.no_grad()
def test_nothing_but_eps_differs_from_the_official_code(variant, tmp_path):
    golden = Golden(variant)
    model = official(variant, tmp_path, attn_eps=1e-15).double()
    assert relative_error(model(images(224, 224).double()), golden.arrays["logits"]) < 1e-12


@torch.no_grad()
def test_same_as_timm_before_any_training():
    """Initial weights make tiny normalisers, where another eps would show in the fourth digit."""
    theirs = timm.create_model("efficientvit_b1").eval()
    ours = timm.create_model("effzoo_efficientvit_b1").eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(128, 128)
    assert relative_error(ours(x), theirs(x)) < 1e-5


def small(series="b", **kwargs):
    return EfficientViT(series, (8, 16, 16, 32, 32), (1, 2, 2, 1, 2), 16, (64, 48), num_classes=10, **kwargs)


@pytest.mark.parametrize("series", ["b", "l"])
@torch.no_grad()
def test_fused_model_runs_channels_last(series):
    x = images(64, 96, batch=16)
    model = calibrate_batch_norm(randomise(small(series)), x)
    fused = reparameterize_model(model)
    assert centred_error(fused(x), model(x)) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for stage in fused.stages:
        stage.blocks[0].register_forward_hook(
            lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    layouts = []
    fused(x)
    assert layouts == [True] * 4


@torch.no_grad()
def test_without_pooling_every_position_is_classified():
    dense, pooled = small(global_pool="").eval(), small().eval()
    pooled.load_state_dict(dense.state_dict())
    x = images(32, 32)  # one position is left
    assert dense(x).shape == (2, 10, 1, 1)
    torch.testing.assert_close(dense(x)[..., 0, 0], pooled(x))
    assert dense(images(64, 96)).shape == (2, 10, 2, 3)


@torch.no_grad()
def test_odd_sizes_round_up():
    model = small().eval()
    for height, width in [(200, 264), (33, 47), (1, 1)]:
        *_, last = model.forward_intermediates(images(height, width), intermediates_only=True)
        assert last.shape == (2, 32, -(-height // 32), -(-width // 32))


def test_stochastic_depth_grows_linearly():
    model = small(drop_path_rate=0.7)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    # one residual in each of two convolutional stages, then two per attention block: 1 + 1 + 2 + 4 branches
    torch.testing.assert_close(rates, [0.7 * (i + 1) / 8 for i in range(8)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"series": "x"}, "unknown EfficientViT series 'x': known: b, l"),
        ({"head_dim": 24}, "dim must be a multiple of head_dim, got dim=128, head_dim=24"),
        ({"global_pool": "catavgmax"}, "unknown global_pool 'catavgmax'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientViT(**arguments)


def test_even_scales_are_refused():
    with pytest.raises(ValueError, match=r"scales must be odd, got \(5, 4\)"):
        MultiScaleLinearAttention(32, 16, scales=(5, 4))


def test_tags():
    """Every checkpoint that timm hosts is ours with timm's preprocessing; the two that it does not host come from the authors."""
    ours = {
        name: timm.get_pretrained_cfg(name) for name in effvit_zoo.list_models("effzoo_efficientvit_*", pretrained=True)
    }
    theirs = timm.list_models("efficientvit_[bl][0-3].*", pretrained=True)
    for name in theirs:
        mine, cfg = dataclasses.asdict(ours.pop(f"effzoo_{name}")), dataclasses.asdict(timm.get_pretrained_cfg(name))
        assert mine["hf_hub_id"] == f"timm/{name}"
        for key in ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "classifier"):
            assert mine[key] == cfg[key], (name, key)
    assert len(theirs) == 19
    assert {name: cfg.url.rpartition("/")[2] for name, cfg in ours.items()} == {
        "effzoo_efficientvit_l2.r320_in1k": "efficientvit_l2_r320.pt",
        "effzoo_efficientvit_l3.r288_in1k": "efficientvit_l3_r288.pt",
    }

"""What is special to EdgeNeXt: cross-covariance attention, position encoding, uneven channel groups, the bn_hs variants, MLPs in pieces."""

import argparse
import math

import pytest
import timm
import torch
from reference import Golden, calibrate_batch_norm, randomise, relative_error
from timm.models import reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effvit_zoo.attention import _recording
from effvit_zoo.attention.cross_covariance import (
    CrossCovarianceAttention,
    cross_covariance_attention,
    naive_cross_covariance_attention,
)
from effvit_zoo.models import edgenext
from effvit_zoo.models.edgenext import Mlp, PositionalEncodingFourier, SplitTransposeBlock, checkpoint_filter_fn


def create(name, **kwargs):
    return timm.create_model(f"effzoo_edgenext_{name}", **kwargs)


# cross-covariance attention


def test_attention_compares_channels_one_by_one():
    B, H, D, N = 2, 3, 4, 11
    q, k, v = torch.randn(3, B, H, D, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).reshape(H, 1, 1)
    expected = naive_cross_covariance_attention(q, k, v, temperature)
    assert relative_error(cross_covariance_attention(q, k, v, temperature), expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(dtype):
    q, k, v = (
        torch.randn(3, 1, 2, 8, 4096, generator=torch.Generator().manual_seed(0)) * 300
    )  # squares overflow float16
    q[0, 0, 0] = 0  # a dead channel
    temperature = torch.full((2, 1, 1), 2.0)
    out = cross_covariance_attention(*(x.to(dtype) for x in (q, k, v, temperature)))
    assert out.dtype is dtype
    assert relative_error(out, cross_covariance_attention(q, k, v, temperature)) < 2e-2


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="dim=10, num_heads=4"):
        CrossCovarianceAttention(10, 4)


# position encoding


def slow_features(height, width, hidden_dim=32, temperature=10000.0):
    rows = []
    for y in range(height):
        row = []
        for x in range(width):
            features = []
            for position, extent in ((y + 1, height), (x + 1, width)):
                angle = position / (extent + 1e-6) * 2 * math.pi
                for i in range(hidden_dim):
                    phase = angle / temperature ** (2 * (i // 2) / hidden_dim)
                    features.append(math.sin(phase) if i % 2 == 0 else math.cos(phase))
            row.append(features)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (28, 28)])
def test_position_features(size):
    features = PositionalEncodingFourier(8).features(torch.empty(2, 8, *size))
    assert relative_error(features, slow_features(*size)) < 1e-6
    assert features.dtype is torch.float32


@torch.no_grad()
def test_position_encoding_follows_dtype_and_device():
    encoding = PositionalEncodingFourier(8)
    x = torch.empty(1, 8, 20, 30)
    full = encoding(x)
    assert full.shape == (1, 8, 20, 30)
    half = encoding.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert (
        relative_error(half, full) < 1e-2
    )  # one rounding of weights, features and sum: positions themselves stayed float32
    assert encoding.to("meta")(x.to("meta", torch.bfloat16)).device.type == "meta"
    assert [key for key in encoding.state_dict() if "token_projection" not in key] == []


def test_cached_features_survive_inference_mode_and_fakes(monkeypatch):
    monkeypatch.setattr(_recording, "_CACHE", {})
    encoding = PositionalEncodingFourier(8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        encoding(mode.from_tensor(torch.empty(1, 8, 6, 7)))
    with torch.inference_mode():
        first = encoding(torch.empty(1, 8, 6, 7))
    out = encoding(torch.empty(1, 8, 6, 7))
    assert type(out) is torch.Tensor
    out.sum().backward()  # refused for tensors made in inference mode
    assert torch.equal(out, first)
    nn.init.zeros_(encoding.token_projection.weight)
    assert not torch.equal(encoding(torch.empty(1, 8, 6, 7)), first), "only what does not depend on weights is kept"


def test_position_encoding_is_in_the_second_stage_alone():
    for name in ("small", "xx_small_bn_hs"):
        model = create(name, device="meta")
        owners = [n for n, m in model.named_modules() if isinstance(m, PositionalEncodingFourier)]
        assert len(owners) == 1
        assert owners[0].startswith("stages.1.")


# blocks


def test_channel_groups():
    expected = {
        (88, 3): [30, 30, 28],
        (100, 3): [34, 34, 32],
        (160, 3): [54, 54, 52],
        (304, 4): [76] * 4,
        (48, 2): [24, 24],
    }
    for (dim, scales), widths in expected.items():
        assert SplitTransposeBlock(dim, scales, 4, device="meta").widths == widths
    for dim, scales in ((16, 1), (10, 7), (10, 0)):
        with pytest.raises(ValueError, match=f"got {scales} of dim={dim}"):
            SplitTransposeBlock(dim, scales, 2)


@torch.no_grad()
def test_groups_are_chained_and_the_last_passes_by():
    block = randomise(SplitTransposeBlock(10, 3, 2)).double()
    x = torch.randn(2, 10, 5, 6, dtype=torch.float64)
    first = block.convs[0](x[:, :4])
    second = block.convs[1](first + x[:, 4:8])
    assert torch.equal(block.mix_scales(x), torch.cat([first, second, x[:, 8:]], 1))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"kernel_sizes must be odd, got \(3, 5, 6, 9\)"):
        create("xx_small", kernel_sizes=(3, 5, 6, 9))
    with pytest.raises(ValueError, match="catavgmax"):
        create("xx_small", global_pool="catavgmax")


@pytest.mark.parametrize("name", ["xx_small", "x_small", "small", "base"])
def test_norms_of_the_plain_variants(name):
    norms = [m for m in create(name, device="meta").modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert {(isinstance(m, nn.LayerNorm), m.eps) for m in norms} == {(True, 1e-6)}


@pytest.mark.parametrize("name", ["xx_small_bn_hs", "x_small_bn_hs", "small_bn_hs"])
def test_what_bn_hs_changes(name):
    model = create(name, device="meta")
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert {(isinstance(m, nn.BatchNorm2d), m.eps) for m in norms} == {(True, 1e-5)}
    assert not any(isinstance(m, nn.GELU) for m in model.modules())
    biased = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    assert all(".convs." in n or "token_projection" in n for n in biased)
    assert sum(".convs." in n for n in biased) == 1 + 2 + 3
    base = create(name.removesuffix("_bn_hs"), device="meta")
    assert [len(s.blocks) for s in model.stages] == [len(s.blocks) for s in base.stages]


def test_layer_scale_can_be_left_out():
    model = create("xx_small", ls_init_value=0.0)
    assert not any("gamma" in key for key in model.state_dict())
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 32, 32))).all()


# checkpoints


@pytest.mark.parametrize("name", ["xx_small", "small_bn_hs"])
@pytest.mark.parametrize("nesting", [("model",), ("model_ema", "model"), ("state_dict",), ()])
def test_official_checkpoints(name, nesting):
    model = create(name, device="meta")
    official = Golden(f"edgenext_{name}").state_dict()
    nested = {nesting[0]: official, **{key: {} for key in nesting[1:]}, "epoch": 3} if nesting else official
    converted = checkpoint_filter_fn(nested, model)
    own = model.state_dict()
    assert converted.keys() == own.keys()
    assert all(own[key].shape == tensor.shape for key, tensor in converted.items())


def test_official_training_checkpoint_from_its_url(tmp_path):
    official = Golden("edgenext_xx_small").state_dict()
    torch.save({"model": {}, "model_ema": official, "args": argparse.Namespace(lr=6e-3)}, tmp_path / "checkpoint.pth")
    overlay = {"hf_hub_id": None, "url": (tmp_path / "checkpoint.pth").as_uri()}
    model = create("xx_small", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(model.head.fc.weight, official["head.weight"])


def test_weights_are_where_they_are_published():
    names = {f"effzoo_edgenext_{v}" for v in ("nano64", "xx_small", "x_small", "small", "base")}
    names |= {f"effzoo_edgenext_{v}_bn_hs" for v in ("xx_small", "x_small", "small")}
    assert set(timm.list_models("effzoo_edgenext*")) == names
    tags = timm.list_models("effzoo_edgenext*", pretrained=True)
    assert len(tags) == 10
    hosted = [timm.get_pretrained_cfg(tag).hf_hub_id for tag in tags]
    theirs = [f"timm/{tag}" for tag in timm.list_models("edgenext_*", pretrained=True) if "small_rw" not in tag]
    assert sorted(h for h in hosted if h) == sorted(theirs)
    for tag, hub in zip(tags, hosted, strict=True):
        cfg = timm.get_pretrained_cfg(tag)
        assert bool(hub) != bool(cfg.url)
        assert hub or (cfg.url.startswith(cfg.origin_url) and cfg.crop_pct == 0.875)


# inference


@torch.no_grad()
def test_mlp_in_pieces(monkeypatch):
    mlp = randomise(Mlp(6, 24, nn.GELU())).eval()
    x = torch.randn(2, 5, 7, 6)
    expected, kept = mlp(x), x.clone()
    for elements in (1, 24, 24 * 8, 24 * 69, 24 * 70):
        monkeypatch.setattr(edgenext, "HIDDEN_ELEMENTS", elements)
        for given in (x, x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)):
            out = mlp.fuse()(given)
            assert out.shape == x.shape
            assert relative_error(out, expected) < 1e-6
    assert torch.equal(x, kept)
    fused = mlp.fuse()
    fused.fc1 = nn.Sequential(mlp.fc1)  # whatever else is put in a layer's place for speed
    assert relative_error(fused(x), expected) < 1e-6


@pytest.mark.parametrize("name", ["xx_small", "xx_small_bn_hs"])
def test_fused_model_still_has_gradients(name):
    model = calibrate_batch_norm(randomise(create(name)), torch.randn(4, 3, 64, 64)).double()
    fused = reparameterize_model(model)
    assert not any("gamma" in key for key, _ in fused.named_parameters())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grads = []
    for m in (model, fused):
        image = x.clone().requires_grad_()
        m(image).square().sum().backward()
        grads.append(image.grad)
    assert relative_error(grads[1], grads[0]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xx_small", "xx_small_bn_hs"])
@torch.no_grad()
def test_any_size_gives_the_same_answer_in_every_form(name):
    model = calibrate_batch_norm(randomise(create(name)), torch.randn(4, 3, 64, 64))
    fused = reparameterize_model(model)
    for height, width in ((225, 225), (33, 47), (32, 97)):
        x = torch.randn(2, 3, height, width)
        out = model(x)
        assert relative_error(fused(x), out) < 1e-5
        assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), out) < 1e-5
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), out) < 1e-5


@torch.no_grad()
def test_half_precision_autocast_is_finite():
    model = randomise(create("xx_small")).eval()
    x = torch.randn(2, 3, 64, 64)
    for fused in (model, reparameterize_model(model)):
        with torch.autocast("cpu", torch.float16):
            assert torch.isfinite(fused(x * 100)).all()

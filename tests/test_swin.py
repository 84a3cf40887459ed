"""What is special to Swin: windows of any map against a slower truth, sizes against timm, conversion of tables, and the fused form."""

import pickle

import pytest
import timm
import torch
from reference import images, randomise, relative_error
from timm.models import reparameterize_model

import effvit_zoo  # noqa: F401 - registers the models
from effvit_zoo.attention import _recording
from effvit_zoo.attention.window import WindowAttention, naive_window_attention
from effvit_zoo.models import swin

NAME = "effzoo_swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 10}
SIZES = [(224, 224), (96, 160), (100, 70), (64, 64), (33, 60), (256, 40)]


def ours(**kwargs):
    return timm.create_model(NAME, **{**SMALL, **kwargs}).eval()


def theirs(**kwargs):
    return timm.create_model(NAME.removeprefix("effzoo_"), **{**SMALL, **kwargs}).eval()


def dense_attention(attn, x):
    """The module's projections around the naive form, on the padded map."""
    H, W = x.shape[1:3]
    sides = [min(side, length) for side, length in zip(attn.window_size, (H, W), strict=True)]
    x = torch.nn.functional.pad(x, (0, 0, 0, -W % sides[1], 0, -H % sides[0]))
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    table = attn.relative_position_bias_table.unflatten(0, (2 * attn.window_size[0] - 1, -1))
    out = naive_window_attention(q, k, v, table, (H, W), attn.window_size, attn.shifted)
    return attn.proj(out.permute(0, 2, 3, 1, 4).flatten(3))[:, :H, :W]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (10, 17), (3, 20), (20, 4), (2, 3), (4, 6), (1, 1)])
def test_attention_is_the_dense_one_with_a_mask(size, shifted):
    attn = randomise(WindowAttention(8, 2, (4, 6), shifted, dtype=torch.float64))
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        attn.relative_position_bias_table.normal_()
    parameters = list(attn.parameters())
    out, expected = attn(x), dense_attention(attn, x)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, *parameters], direction)
    for grad, want in zip(grads, torch.autograd.grad(expected, [x, *parameters], direction), strict=True):
        torch.testing.assert_close(grad, want)
    with torch.no_grad():
        torch.testing.assert_close(attn.fuse()(x), expected)


def test_dropout_of_attention_acts_in_training_only():
    attn = WindowAttention(8, 2, (4, 4), attn_drop=0.5)
    x = torch.randn(1, 8, 8, 8)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_a_model_built_for_a_size_is_timms(size):
    model, reference = ours(img_size=size), randomise(theirs(img_size=size))
    model.load_state_dict(reference.state_dict())
    x = images(*size)
    expected = reference(x)
    assert relative_error(model(x), expected) < 1e-5
    assert relative_error(reparameterize_model(model)(x), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_any_size_gets_the_windows_of_a_model_built_for_it(size):
    model = randomise(ours())
    built = ours(img_size=size)
    state = model.state_dict()
    for name, attn in built.named_modules():
        if isinstance(attn, WindowAttention):  # smaller windows: the same offsets of the table
            key = f"{name}.relative_position_bias_table"
            down, right = (range(7 - side, 6 + side) for side in attn.window_size)
            state[key] = state[key].reshape(13, 13, -1)[down.start : down.stop, right.start : right.stop].flatten(0, 1)
    built.load_state_dict(state)
    model(images(224, 224))  # what one size leaves behind must not reach the next
    x = images(*size)
    assert relative_error(model(x), built(x)) < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_size": (320, 448)},
        {"img_size": 384, "window_size": 12},
        {"window_size": (4, 6)},
        {"img_size": (96, 128), "window_size": [(8, 4), 7, 3, (2, 4)]},
    ],
)
@torch.no_grad()
def test_set_input_size_is_timms(arguments):
    model, reference = ours(), randomise(theirs())
    model.load_state_dict(reference.state_dict())
    model.set_input_size(**arguments)
    reference.set_input_size(**arguments)
    x = images(*reference.patch_embed.img_size, batch=1)
    expected = model(x)
    assert relative_error(expected, reference(x)) < 1e-5

    rebuilt = timm.create_model(NAME, **{**SMALL, **model._model_args}).eval()  # what an exported config.json holds
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), expected)
    model.set_input_size(224)
    reference.set_input_size(224)
    x = images(224, 224, batch=1)
    assert relative_error(model(x), reference(x)) < 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_size": 384, "window_size": 12},
        {"img_size": 112},
        {"img_size": (160, 224), "window_size": (10, 14)},
        {"patch_size": 8},
        {"num_classes": 3},
    ],
)
@torch.no_grad()
def test_checkpoints_are_resized_as_timm_does(arguments, tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    torch.save({"model": randomise(theirs()).state_dict()}, path)
    overlay = {"file": path, "num_classes": 10}
    model = ours(pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    reference = theirs(pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    x = images(*reference.patch_embed.img_size, batch=1)
    assert relative_error(model.forward_features(x), reference.forward_features(x)) < 1e-5


def official_state(model):
    """A state dict of ours under the official names: downsampling at the end of stages, plain head, buffers of positions and masks."""
    state = {}
    for key, value in model.state_dict().items():
        for i in range(1, 4):
            key = key.replace(f"layers.{i}.downsample.", f"layers.{i - 1}.downsample.")
        state[key.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return state


@pytest.mark.parametrize("nest", ["model", "state_dict_ema", None])
@pytest.mark.parametrize("headless", [False, True])
def test_official_checkpoints(nest, headless):
    model = randomise(ours())
    state = official_state(model)
    if headless:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    converted = swin.checkpoint_filter_fn({nest: state} if nest else state, model)
    expected = {key: v for key, v in model.state_dict().items() if not (headless and key.startswith("head."))}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())


def test_a_table_of_our_own_is_not_resized_again():
    model = ours(img_size=64, window_size=(1, 5))  # 9 offsets, as many as a window of 2 x 2 has
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in swin.checkpoint_filter_fn(dict(state), model).items())


@pytest.mark.parametrize("chunk_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("size", [(224, 224), (100, 70), (16, 40)])
@torch.inference_mode()
def test_fused_stages_do_not_depend_on_their_chunks(size, chunk_tokens, monkeypatch):
    monkeypatch.setattr(swin, "CHUNK_TOKENS", chunk_tokens)
    model = randomise(ours()).double()
    fused = reparameterize_model(model)
    x = images(*size, batch=3).double()
    untouched = x.clone()
    for feature, want in zip(
        fused.forward_intermediates(x, intermediates_only=True),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert relative_error(feature, want) < 1e-12
    assert torch.equal(x, untouched)


def test_fused_model_outside_plain_inference():
    model = randomise(ours())
    fused = reparameterize_model(model)
    x = images(64, 96)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(fused(x), expected) < 0.1
        assert relative_error(pickle.loads(pickle.dumps(fused))(x), expected) < 1e-5
        assert relative_error(fused.to(torch.bfloat16)(x.to(torch.bfloat16)), expected) < 0.1
    fused.float()
    assert relative_error(fused(x), expected) < 0.1  # with gradients
    fused.train()(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    with pytest.raises(ValueError, match="fused"):
        fused.set_input_size(384)


def test_another_size_trains():
    model = ours(img_size=(320, 448)).train()
    model(images(320, 448)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_export_of_another_size_with_any_batch(fused):
    model = randomise(ours(img_size=(160, 224)))
    model = reparameterize_model(model) if fused else model
    program = torch.export.export(model, (images(160, 224),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = images(160, 224, batch=5)
    assert relative_error(program.module()(x), model(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_export_of_any_size(fused):
    model = randomise(ours(depths=(2, 2), num_heads=(1, 2)))
    program = torch.export.export(
        reparameterize_model(model) if fused else model,
        (images(96, 104),),
        dynamic_shapes=({side: torch.export.Dim(f"side{side}", min=64, max=2048) for side in (2, 3)},),
        prefer_deferred_runtime_asserts_over_guards=True,  # the default wants proofs about ceil(height / 7) beyond sympy
    )
    for size in ((112, 224), (135, 66), (96, 112)):  # whole windows, padding on both sides, on one
        x = images(*size, batch=2)
        assert relative_error(program.module()(x), model(x)) < 1e-5


def test_what_is_remembered_serves_training_and_stays_small(monkeypatch):
    monkeypatch.setattr(_recording, "_CACHE", {})
    monkeypatch.setattr(_recording, "MAX_ENTRIES", 10)
    model = ours()
    with torch.inference_mode():
        for side in range(32, 64, 4):
            model(images(side, side))
    assert len(_recording._CACHE) <= 10
    monkeypatch.setattr(_recording, "MAX_ENTRIES", 100)
    with torch.inference_mode():
        model(images(64, 64))
    kept = len(_recording._CACHE)
    model.train()(images(64, 64)).sum().backward()
    assert len(_recording._CACHE) == kept
    assert model.eval().to(torch.bfloat16)(images(64, 64).to(torch.bfloat16)).dtype is torch.bfloat16


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"window_size must be positive.*4 of these, got"):
        ours(window_size=(7, 7, 7))
    with pytest.raises(ValueError, match="window_size"):
        ours(window_size=0)
    with pytest.raises(ValueError, match="at least the patch size 4"):
        ours(img_size=(3, 224))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        ours(num_heads=(5, 5, 5, 5))
    with pytest.raises(ValueError, match=r"\(224, 224\) only, got \(64, 96\)"):
        ours(dynamic_img_size=False)(images(64, 96))
    model = ours()
    with pytest.raises(ValueError, match="window_size"):
        model.set_input_size(112, window_size=(-1, 2))
    assert model.img_size == (224, 224)

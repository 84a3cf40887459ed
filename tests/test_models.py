"""One contract for every registered model, as timm's own tests and users expect it.

Every model is built on the meta device, where size costs nothing, for all that is a matter of shapes and names. The smallest model of
every kind (RUN) computes: at a small image size, with random weights under which every part shows in the output.
"""

import copy
import functools
import pickle
import sys

import pytest
import timm
import torch
from reference import calibrate_batch_norm, centred_error, randomise, relative_error
from safetensors.torch import save_file
from timm.layers import DropPath, set_scriptable
from timm.models import group_parameters, reparameterize_model
from timm.models._features_fx import create_feature_extractor
from torch import nn

import effvit_zoo

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning"
)  # scripting is tested although torch is leaving it

ALL = effvit_zoo.list_models()
RUN = [
    "effzoo_conv2former_n",
    "effzoo_edgenext_xx_small",
    "effzoo_edgenext_xx_small_bn_hs",
    "effzoo_efficientvit_b0",
    "effzoo_efficientvit_l1",
    "effzoo_swin_tiny_patch4_window7_224",
    "effzoo_vit_tiny",  # its plain patch embedding is that of every size but pico
    *(name for name in ALL if name.endswith("_pico")),
]
SIDE = 64  # pixels


def build(name, side=SIDE, **kwargs):
    """The model for images of `side` pixels, or of its own size if that is smaller."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size:
        kwargs.setdefault("img_size", min(side, cfg.input_size[-1]))
    return timm.create_model(name, **kwargs)


def images(name, batch=2, side=SIDE, channels=3):
    side = min(side, timm.get_pretrained_cfg(name).input_size[-1])
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def trained(model):
    """Parameters that a loss of the logits reaches: all but ToSA's selectors, which have a loss of their own."""
    return [(key, p) for key, p in model.named_parameters() if not key.startswith("selectors.")]


@functools.lru_cache(maxsize=1)
def _prepared(name):
    # fewer images than this leave a few dozen samples per channel in the last stage, whose statistics amplify rounding a hundredfold
    return calibrate_batch_norm(randomise(build(name)), images(name, batch=16))


def prepared(name):
    """A model of one's own with random weights, BatchNorm statistics that fit the images, in eval mode."""
    return copy.deepcopy(_prepared(name))


def spatial(model, feature):
    """(height, width) of a feature map in the model's layout."""
    return tuple(feature.shape[1:3] if getattr(model, "output_fmt", "NCHW") == "NHWC" else feature.shape[2:4])


def filter_fn(model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn


def kind(model):
    """What a model is made of behind its patches, whatever its size and stochastic depth."""
    return frozenset(
        type(m) for name, m in model.named_modules() if not name.startswith("patch_embed") and type(m) is not DropPath
    )


# every model, on the meta device


@pytest.fixture(scope="module", params=ALL)
def meta(request):
    model = timm.create_model(request.param, device="meta", dtype=torch.bfloat16).eval()
    model.requested_name = request.param
    return model


@functools.lru_cache(maxsize=1)
def _kinds_that_run():
    return {kind(timm.create_model(name, device="meta")) for name in RUN}


def test_a_model_of_this_kind_runs(meta):
    assert kind(meta) in _kinds_that_run(), "add its smallest relative to RUN"


def test_device_and_dtype_reach_every_tensor(meta):
    for name, tensor in [*meta.named_parameters(), *meta.named_buffers()]:
        assert tensor.device.type == "meta", name
    for name, parameter in meta.named_parameters():
        assert parameter.dtype is torch.bfloat16, name


def test_attributes(meta):
    cfg = meta.pretrained_cfg
    assert meta.num_classes == cfg["num_classes"]
    assert meta.in_chans == cfg["input_size"][0]
    first_conv = meta.get_submodule(cfg["first_conv"])
    assert first_conv.weight.shape[1] == meta.in_chans
    names = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    classifiers = meta.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    assert [meta.get_submodule(name) for name in names] == list(classifiers)
    assert classifiers[0].in_features == meta.head_hidden_size
    assert cfg["license"]
    assert cfg["origin_url"].startswith("https://")
    assert cfg["paper_ids"].startswith("arXiv:")
    reductions = [info["reduction"] for info in meta.feature_info]
    reductions = [max(r) if isinstance(r, tuple) else r for r in reductions]
    assert reductions == sorted(reductions)
    for info in meta.feature_info:
        meta.get_submodule(info["module"])


def test_parameter_groups(meta):
    names = {name for name, _ in meta.named_parameters()}
    optional = {"pos_embed", "cls_token", "reg_token", "dist_token"}  # of timm's ViT, some of them not in use
    assert set(meta.no_weight_decay()) <= names | optional
    for coarse in (False, True):
        groups = group_parameters(meta, meta.group_matcher(coarse=coarse))
        assert len(groups) > 1
        assert sorted(name for group in groups.values() for name in group) == sorted(names)


@torch.no_grad()
def test_shapes_of_forward(meta):
    x = torch.empty(2, *meta.pretrained_cfg["input_size"], device="meta", dtype=torch.bfloat16)
    features = meta.forward_features(x)
    channels = features.shape[1 if getattr(meta, "output_fmt", "NCHW") == "NCHW" and features.ndim == 4 else -1]
    assert channels == meta.num_features
    assert meta.forward_head(features, pre_logits=True).shape == (2, meta.head_hidden_size)
    logits = meta.forward_head(features)
    assert logits.shape == (2, meta.num_classes)
    assert logits.dtype is torch.bfloat16

    taken = meta.forward_intermediates(x, intermediates_only=True)
    assert len(taken) == len(meta.feature_info)
    for info, feature in zip(meta.feature_info, taken, strict=True):
        reduction = info["reduction"] if isinstance(info["reduction"], tuple) else (info["reduction"],) * 2
        assert feature.shape[1] == info["num_chs"]
        assert [s // f for s, f in zip(x.shape[2:], feature.shape[2:], strict=True)] == list(reduction)


def test_classifier_can_be_replaced(meta):
    model = copy.deepcopy(meta)
    model.reset_classifier(7)
    assert model.num_classes == 7
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "meta", name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_arguments_are_refused(meta):
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(meta.requested_name, device="meta", no_such_argument=1)


def test_own_checkpoint_passes_unchanged(meta):
    state = meta.state_dict()
    heads = [meta.pretrained_cfg["classifier"]] if isinstance(meta.pretrained_cfg["classifier"], str) else []
    heads = heads or list(meta.pretrained_cfg["classifier"])
    headless = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    for given in (state, headless, dict(reversed(state.items()))):
        converted = filter_fn(meta)(dict(given), meta)
        assert list(converted) == list(given)
        assert all(converted[key] is tensor for key, tensor in given.items())


def test_weights_named_in_full(meta):
    for name in timm.list_models(f"{meta.requested_name}.*", pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        assert not (cfg.hf_hub_id or "").endswith(meta.requested_name)
        assert not (cfg.hf_hub_id or "").startswith("timm/effzoo")


# the smallest model of every kind, computing


@pytest.mark.parametrize("name", RUN)
def test_backward_reaches_every_parameter(name):
    model = randomise(build(name, num_classes=10, drop_path_rate=0.1 if "swin" in name else 0.0)).train()
    out = model(images(name, batch=4))
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    for key, parameter in trained(model):
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_head_reset(name):
    model = prepared(name)
    x = images(name)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    first, *_ = model.parameters()
    first.requires_grad_(False)
    model.eval().reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert not first.requires_grad
    assert not any(m.training for m in model.modules())
    model.train().reset_classifier(6)
    assert all(m.training for m in model.modules())
    model.to(torch.bfloat16).reset_classifier(5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    model = prepared(name)
    model.reset_classifier(0)
    assert relative_error(model(x), pre_logits) < 1e-6
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    features = model.forward_features(x)
    if not list(model.head.parameters()):
        assert relative_error(model(x), features) < 1e-6
    else:  # layers of the head's own stay, on the feature map
        assert model(x).shape == (2, model.head_hidden_size, *features.shape[2:])


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_intermediates(name):
    model = prepared(name)
    x = images(name)
    final = model.forward_features(x)
    out, taken = model.forward_intermediates(x)
    assert relative_error(out, final) < 1e-6
    last = len(taken) - 1
    _, normed = model.forward_intermediates(x, indices=1, norm=True)
    assert len(normed) == 1

    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    for a, b in zip(early, taken[:2], strict=True):
        assert torch.equal(a, b)
    if "vit_" not in name or "efficientvit" in name:
        channels_last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        for a, b in zip(channels_last, taken, strict=True):
            assert torch.equal(a.permute(0, 3, 1, 2), b)
        expected = final.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else final
        assert relative_error(normed[0], expected) < 1e-6
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(x, output_fmt="NLC")

    features = build(name, features_only=True)
    assert features.feature_info.channels() == [
        model.feature_info[i]["num_chs"] for i in features.feature_info.out_indices
    ]
    assert len(features(x)) == len(features.feature_info.out_indices)

    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([1])
    assert pruned.num_features == pruned.head_hidden_size == model.feature_info[1]["num_chs"]
    assert relative_error(pruned.forward_intermediates(x, indices=[1], intermediates_only=True)[0], taken[1]) < 1e-6
    with torch.enable_grad():
        pruned.train()(x).square().sum().backward()
    assert all(p.grad is not None for _, p in trained(pruned))

    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([last], prune_norm=True)
    assert relative_error(pruned.forward_intermediates(x, indices=[last], intermediates_only=True)[0], taken[-1]) < 1e-6


@pytest.mark.parametrize("name", RUN)
def test_checkpointing_changes_memory_only(name):
    model = prepared(name)
    x = images(name)
    outputs = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        out = model(x)
        out.square().mean().backward()
        outputs.append((out.detach(), {key: p.grad.clone() for key, p in trained(model)}))
    assert torch.equal(outputs[0][0], outputs[1][0])
    for key, grad in outputs[0][1].items():
        torch.testing.assert_close(grad, outputs[1][1][key], msg=key)


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_torchscript(name):
    with set_scriptable(True):
        model = build(name, num_classes=10)
    model = randomise(model).eval()
    x = images(name)
    assert relative_error(torch.jit.script(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_fx(name):
    model = prepared(name)
    x = images(name)
    node = model.feature_info[-1]["module"]
    extractor = create_feature_extractor(model, {node: "feature", "head": "logits"})
    kept = {}
    model.get_submodule(node).register_forward_hook(lambda _m, _i, out: kept.update(feature=out))
    model(x)
    assert relative_error(extractor(x)["feature"], kept["feature"]) < 1e-5


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_export(name):
    model = prepared(name)
    x = images(name)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    more = images(name, batch=3)
    assert centred_error(program.module()(more), model(more)) < 1e-4


@pytest.mark.parametrize("name", RUN)
def test_init_after_to_empty(name):
    fresh = build(name)
    model = build(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
    model.init_weights(needs_reset=True)
    expected = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value, want = tensor.detach().float(), expected[key].detach().float()
        if want.numel() < 2 or want.std() == 0 or not expected[key].requires_grad:
            assert torch.equal(value, want), key
        else:
            assert value.std() == pytest.approx(want.std(), rel=1.0), key
    assert torch.isfinite(model.eval()(images(name))).all()


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_half_precision_after_float(name):
    model = prepared(name)
    x = images(name)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    for out in (mixed.float(), half.float()):
        assert (out - full).norm() / full.norm() < 0.3  # 8 bits through some hundred random layers


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_copies(name):
    model = prepared(name)
    x = images(name)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_weights_from_a_file(name, tmp_path):
    model = prepared(name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    x = images(name)
    assert torch.equal(build(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()(x), model(x))

    grey = build(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4).eval()
    x = images(name, channels=1)
    assert grey(x).shape == (2, 4)
    features = model.forward_features(x.expand(-1, 3, -1, -1))
    assert relative_error(grey.forward_features(x), features) < 1e-4


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_other_image_sizes(name):
    sizes = [(48, 80), (65, 95)]
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size:
        patch = build(name, device="meta").patch_embed.patch_size[0]
        for height, width in sizes:
            height, width = height // patch * patch, width // patch * patch
            model = randomise(build(name, img_size=(height, width))).eval()
            resized = build(name).eval()
            resized.set_input_size(img_size=(height, width))
            resized.load_state_dict(model.state_dict())
            x = torch.randn(2, 3, height, width)
            assert torch.isfinite(model(x)).all()
            assert relative_error(resized(x), model(x)) < 1e-6
        model = randomise(build(name, dynamic_img_size=True)).eval()
        assert torch.isfinite(model(torch.randn(2, 3, height, width))).all()
    else:
        model = prepared(name)
        for height, width in sizes:
            out = model(torch.randn(2, 3, height, width))
            assert torch.isfinite(out).all()
            features = model.forward_features(torch.randn(2, 3, height, width))
            assert all(side > 0 for side in spatial(model, features))


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_too_small_an_image_is_named(name):
    smallest = getattr(build(name, device="meta"), "min_input_size", 1)
    if smallest == 1:
        pytest.skip("takes any image, or timm's patch embedding complains")
    with pytest.raises(ValueError, match=f"{smallest} x {smallest} pixels, got {smallest - 1} x {smallest}"):
        build(name)(torch.randn(1, 3, smallest - 1, smallest))
    assert torch.isfinite(prepared(name)(torch.randn(1, 3, smallest, smallest))).all()


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_fused_model_is_the_same_function(name):
    model = prepared(name).double()
    x = images(name, batch=4).double()
    fused = reparameterize_model(model)
    features, expected = fused.forward_features(x), model.forward_features(x)
    assert relative_error(features, expected) < 1e-6
    # double precision is slow on a CPU: one pass each
    logits, exact = fused.forward_head(features), model.forward_head(expected)
    assert centred_error(logits, exact) < 1e-6
    again = reparameterize_model(fused)
    assert relative_error(again(x), logits) < 1e-12
    # all BatchNorm that stands beside a convolution is gone
    left = [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) <= 1, left

    unfused, x = prepared(name), x.float()
    single = reparameterize_model(unfused)
    rounding = relative_error(unfused(x), exact)
    assert relative_error(single(x), exact) < max(1e-5, 3 * rounding)
    assert relative_error(torch.jit.script(single)(x), single(x)) < 1e-5
    program = torch.export.export(single, (x,))
    assert relative_error(program.module()(x), single(x)) < 1e-5

"""Which mechanism mixes which block: chosen while a ViT is built, or exchanged afterwards, with the weights kept either way."""

import copy

import pytest
import timm
import torch
from reference import randomise, relative_error
from timm.layers import LayerScale
from timm.models import reparameterize_model
from timm.models.vision_transformer import VisionTransformer

import effvit_zoo
from effvit_zoo import hub, swap_attention
from effvit_zoo.attention import TOKEN_MIXERS

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
GRID = ["cosformer_2d", "multiscale_linear", "conv_mod"]
OWN_WEIGHTS = ["xca", "additive", "multiscale_linear", "conv_mod"]


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def mechanisms(model):
    names = {cls: name for name, cls in TOKEN_MIXERS.items()}
    return [names.get(type(block.attn)) for block in model.blocks]


def pico(name="effzoo_vit_pico", **kwargs):
    return timm.create_model(name, num_classes=5, **kwargs)


def timm_vit(**kwargs):
    return randomise(VisionTransformer(**SMALL, **kwargs)).eval()


# chosen while building


@pytest.mark.parametrize("k", [0, 2, 6])
def test_hydra_layers(k):
    assert mechanisms(pico("effzoo_hydra_vit_pico", hydra_layers=k)) == ["softmax"] * (6 - k) + ["hydra"] * k


def test_mixers_name_single_blocks_and_go_before_hydra_layers():
    assert mechanisms(pico(mixers={"sima": [0], "hydra": [-2, 5]})) == ["sima", *["softmax"] * 3, "hydra", "hydra"]
    both = pico("effzoo_hydra_vit_pico", hydra_layers=2, mixers={"elu": [0, -1]})
    assert mechanisms(both) == ["elu", "softmax", "softmax", "softmax", "hydra", "elu"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixers": {"simma": [0]}}, "did you mean 'sima'"),
        ({"mixers": {"sima": [6]}}, "-6 to 5, got 6"),
        ({"mixers": {"sima": [0], "elu": [-6]}}, "block 0 is given to two"),
        ({"mixers": {"sima": range(2)}}, "expected a list"),
        ({"mixers": {"sima": [True]}}, "got True"),
        ({"mixers": ["sima"]}, "expected a mapping"),
        ({"mixers": {"conv_mod": [0]}, "dynamic_img_size": True}, "dynamic_img_size"),
        ({"mixers": {"conv_mod": [0]}, "patch_drop_rate": 0.1}, "patch_drop_rate"),
    ],
)
def test_wrong_mixers_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pico(**kwargs)


@pytest.mark.parametrize("k", [-1, 7, "2", True])
def test_wrong_hydra_layers_are_refused(k):
    with pytest.raises(ValueError, match="hydra_layers: expected 0 to 6"):
        pico("effzoo_hydra_vit_pico", hydra_layers=k)


def test_only_hydra_models_take_hydra_layers():
    with pytest.raises(TypeError, match="hydra_layers"):
        pico(hydra_layers=2)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("effzoo_hydra_vit_pico", {"hydra_layers": 2}),
        ("effzoo_vit_pico", {"mixers": {"sima": [3], "conv_mod": [-1]}, "init_values": 0.5}),
    ],
)
def test_mixers_come_back_with_the_folder(name, kwargs, tmp_path):
    model = randomise(pico(name, **kwargs)).eval()
    hub.save(model, tmp_path / "model")
    twin = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert mechanisms(twin) == mechanisms(model)
    assert torch.equal(twin(images()), model(images()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_mixed_model_scripts_exports_and_fuses():
    mixers = {name: [i] for i, name in enumerate(["hydra", "conv_mod", "multiscale_linear", "xca", "additive"])}
    model = randomise(pico(mixers=mixers, init_values=0.1)).eval()
    x, expected = images(), model(images())
    fused = reparameterize_model(model)
    assert not any(isinstance(m, LayerScale) for m in fused.modules())
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for form in (torch.jit.script(model), program.module(), fused):
        assert relative_error(form(x), expected) < 1e-5
    assert relative_error(program.module()(torch.cat([x, x, x])), torch.cat([expected] * 3)) < 1e-5


def test_grid_follows_the_image_size():
    model = randomise(pico(mixers={"conv_mod": [0], "cosformer_2d": [1]})).eval()
    model.set_input_size(img_size=(24, 40))
    assert model(torch.randn(1, 3, 24, 40)).shape == (1, 5)


# weights


@pytest.fixture(scope="module")
def deit_file(tmp_path_factory):
    """A checkpoint with DeiT's keys for the pico shapes."""
    model = randomise(pico())
    path = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save({"model": model.state_dict()}, path)
    return model.eval(), path


def overlay(path):
    return {"file": str(path), "num_classes": 5}


def test_sima_has_layer_scale_of_one_and_takes_weights_without(deit_file):
    deit, path = deit_file
    sima = pico("effzoo_sima_vit_pico", pretrained=True, pretrained_cfg_overlay=overlay(path)).eval()
    assert torch.equal(sima.blocks[5].ls1.gamma.detach(), torch.ones(64))
    swapped = swap_attention(copy.deepcopy(deit), "sima")
    assert torch.equal(sima(images()), swapped(images()))
    sima.blocks[0].ls2.gamma.data.fill_(0.5)
    state = sima.state_dict()
    assert effvit_zoo.models.isotropic_vit.checkpoint_filter_fn(dict(state), sima).keys() == state.keys()


@pytest.mark.parametrize("mechanism", OWN_WEIGHTS)
def test_weights_load_into_mixers_with_parameters_of_their_own(mechanism, deit_file):
    deit, path = deit_file
    model = pico(mixers={mechanism: [2, 3]}, pretrained=True, pretrained_cfg_overlay=overlay(path)).eval()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in deit.state_dict().items())
    assert all(torch.isfinite(value).all() for value in state.values())
    assert torch.isfinite(model(images())).all()


def test_a_checkpoint_that_lacks_more_is_refused(deit_file, tmp_path):
    state = deit_file[0].state_dict()
    del state["blocks.0.attn.qkv.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight"):
        pico("effzoo_sima_vit_pico", pretrained=True, pretrained_cfg_overlay=overlay(tmp_path / "part.pth"))


# exchanged afterwards


@pytest.mark.parametrize("mechanism", TOKEN_MIXERS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "init_values": 0.1, "qkv_bias": False},
        {"qk_norm": True, "scale_attn_norm": True, "proj_bias": False, "reg_tokens": 1},
    ],
    ids=["cls", "gap-registers-ls", "norms"],
)
def test_swap_keeps_every_weight(mechanism, kwargs):
    if kwargs.get("qk_norm"):
        kwargs = {**kwargs, "qk_norm": mechanism != "conv_mod", "scale_attn_norm": mechanism != "multiscale_linear"}
    model = timm_vit(**kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = copy.deepcopy(model)
    assert swap_attention(model, mechanism, layers=[1, -1]) is model
    assert mechanisms(model) == [None, mechanism, mechanism]
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert (after.keys() == before.keys()) == (mechanism not in OWN_WEIGHTS)
    out, old = model(images()), untouched(images())
    assert (relative_error(out.detach(), old.detach()) < 1e-5) == (mechanism == "softmax")
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_swap_to_softmax_and_back_is_the_identity():
    model = timm_vit(qk_norm=True)
    expected = model(images())
    swap_attention(swap_attention(model, "elu"), "softmax")
    assert relative_error(model(images()).detach(), expected.detach()) < 1e-5


def test_swap_keeps_device_type_mode_and_what_is_frozen():
    model = VisionTransformer(**SMALL, proj_drop_rate=0.25, device="meta", dtype=torch.bfloat16).train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    swap_attention(model, "additive")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [p for p in model.parameters() if not p.requires_grad] == [model.blocks[0].attn.qkv.weight]
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in swap_attention(model.eval(), "sima").modules())
    assert model.blocks[0].attn.proj_drop.p == 0.25


def test_what_is_swapped_already_keeps_its_own_weights():
    model = swap_attention(timm_vit(), "xca", [0])
    model.blocks[0].attn.temperature.data.fill_(3.0)
    swap_attention(model, "xca")
    assert [block.attn.temperature[0].item() for block in model.blocks] == [3.0, 1.0, 1.0]


def test_a_swapped_model_comes_back_with_the_folder(tmp_path):
    model = swap_attention(randomise(pico("effzoo_hydra_vit_pico", hydra_layers=2)).eval(), "sima", range(2))
    hub.save(model, tmp_path / "model")
    twin = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert mechanisms(twin) == ["sima", "sima", "softmax", "softmax", "hydra", "hydra"]
    assert torch.equal(twin(images()), model(images()))
    swap_attention(twin, "elu", [0])  # and a second time
    hub.save(twin, tmp_path / "model")
    assert mechanisms(timm.create_model(f"local-dir:{tmp_path / 'model'}"))[:2] == ["elu", "sima"]


def test_a_swapped_model_of_timms_is_not_saved(tmp_path):
    model = swap_attention(timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32), "sima")
    with pytest.raises(ValueError, match="takes no argument 'mixers'"):
        hub.save(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("build", "mechanism", "layers", "message"),
    [
        (timm_vit, "simma", None, "did you mean 'sima'"),
        (timm_vit, "sima", [3], "-3 to 2, got 3"),
        (timm_vit, "sima", [0.0], "got 0.0"),
        (
            lambda: timm.create_model("effzoo_swiftformer_xs", device="meta"),
            "sima",
            None,
            "VisionTransformer, got Swift",
        ),
        (lambda: timm_vit(attn_layer="diff"), "sima", None, "block 0: expected timm's Attention"),
        (lambda: timm_vit(attn_drop_rate=0.1), "sima", None, "attn_drop=0.1"),
        (lambda: timm_vit(qk_norm=True), "conv_mod", None, "qk_norm"),
        (lambda: timm_vit(scale_attn_norm=True), "multiscale_linear", None, "scale_norm"),
        *((lambda: timm_vit(dynamic_img_size=True), name, None, "dynamic_img_size") for name in GRID),
        *((lambda: timm_vit(patch_drop_rate=0.5), name, None, "patch_drop_rate") for name in GRID),
    ],
)
def test_what_cannot_be_swapped_is_named_and_left_alone(build, mechanism, layers, message):
    model = build()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        swap_attention(model, mechanism, layers)
    assert [type(m) for m in model.modules()] == before

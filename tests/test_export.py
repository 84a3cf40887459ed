"""Every architecture leaves torch: torch.export and ONNX Runtime give eager's values, for batches that the export never saw."""

import onnxruntime
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.attention import TOKEN_MIXERS
from effvit_zoo.errors import UserError
from effvit_zoo.export import TARGETS, target_of
from effvit_zoo.export._graph import Graph, _Function, make_graph
from effvit_zoo.export.deployed import RUNTIMES, open_exported, run_in

FAMILIES = ["vit", "elu_vit", "cosformer_vit", "hydra_vit", "sima_vit", "tosa_vit"]


def check(model, height, width, path):
    """Exports a model for any batch and compares what it gives for one image and for three."""
    torch.manual_seed(0)
    if isinstance(model, VisionTransformer):
        torch.nn.init.normal_(model.head.weight, std=0.02)  # training starts from zeros
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, height, width),), dynamic_shapes=dynamic)
    torch.onnx.export(program, f=path, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        image = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(image)
            exported = program.module()(image)
        (onnx,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        scale = expected.abs().max()
        assert scale > 1e-3
        assert (exported - expected).abs().max() <= 1e-5 * scale
        assert (torch.from_numpy(onnx) - expected).abs().max() <= 1e-4 * scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("effzoo_swin_tiny_patch4_window7_224", (320, 448)),
        ("effzoo_efficientvit_b1", (200, 264)),
        ("effzoo_edgenext_small", (225, 225)),
        ("effzoo_swiftformer_xs", (224, 160)),
        ("effzoo_conv2former_n", (96, 128)),
    ],
)
def test_backbones_of_any_size_train_a_step_and_export_for_any_batch(name, size, tmp_path):
    sized = {"img_size": size} if "swin" in name else {}
    model = timm.create_model(name, num_classes=5, **sized)
    before = next(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = torch.nn.functional.cross_entropy(model.train()(torch.randn(2, 3, *size)), torch.tensor([1, 3]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(before, next(model.parameters()))
    check(model.eval(), *size, tmp_path / "model.onnx")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == "vit" else [pytest.mark.slow]) for f in FAMILIES])
def test_pico_models(family, tmp_path):
    check(timm.create_model(f"effzoo_{family}_pico", num_classes=5).eval(), 32, 32, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_small_models(family, tmp_path):
    check(timm.create_model(f"effzoo_{family}_small", num_classes=5).eval(), 224, 224, tmp_path / "model.onnx")


def write(target, module, shape, path):
    """A file of any module, without a record."""
    graph = Graph(_Function(module, ("output",)).eval(), torch.zeros(1, *shape), batch=None)
    TARGETS[target].convert(graph).save(path, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_files_of_other_origin_are_opened_by_the_config_beside_them(name, tmp_path):
    target = TARGETS[name]
    model = timm.create_model("effzoo_vit_pico", num_classes=5, img_size=(32, 48), depth=2).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    path = tmp_path / f"model{target.suffix}"
    target.convert(make_graph(model, (3, 32, 48), target.forms)).save(path, {})
    assert target_of(path) is target
    with pytest.raises(UserError, match=r"no preprocessing config found .*--like MODEL"):
        open_exported(path)
    hub.save(model, tmp_path / "best", label_names=list("abcde"), data_config={"mean": [0.4, 0.5, 0.6]})
    deployed = open_exported(path)
    assert deployed.shape == [None, 3, 32, 48]
    cfg = deployed.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["label_names"]) == ((3, 32, 48), 5, list("abcde"))
    assert cfg["mean"] == [0.4, 0.5, 0.6]
    for images in (torch.randn(3, 3, 32, 48), torch.randn(2, 3, 32, 48).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            expected = model(images)
        first = deployed(images)
        deployed(torch.zeros(len(images), 3, 32, 48))
        assert (first - expected).abs().max() <= 1e-4 * expected.abs().max()
    deployed.set_input_size((32, 48))
    with pytest.raises(UserError, match="it was exported for 32 x 48 pixels, got 64 x 64"):
        deployed.set_input_size(64)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_damaged_and_unfit_files_are_one_line(name, tmp_path):
    path = tmp_path / f"model{TARGETS[name].suffix}"
    hub.save(timm.create_model("effzoo_vit_pico", depth=1), tmp_path / "best")
    path.write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"cannot open .*model\.\w+: [^\n]+$"):
        open_exported(path)
    write(name, torch.nn.Flatten(0), (3, 8, 8), path)
    with pytest.raises(UserError, match=r"gives an output of shape \(192,\), expected"):
        open_exported(path)
    write(name, torch.nn.Flatten(), (3, 8), path)
    with pytest.raises(UserError, match="takes 3 dimensions, expected images"):
        open_exported(path)
    if name == "onnx":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="cannot open"):
            open_exported(path)


def test_targets_are_found_by_suffix_and_models_run_in_runtimes_only():
    assert target_of("model.pte") is TARGETS["executorch"]
    assert target_of("model.safetensors") is None
    with pytest.raises(UserError, match="unknown runtime 'executorch'"):
        run_in("executorch", torch.nn.Identity(), torch.zeros(1, 3, 8, 8))


# the others are whole families above
@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer", sorted(set(TOKEN_MIXERS) - {"softmax", *(name.removesuffix("_vit") for name in FAMILIES)})
)
def test_every_other_mixer_in_one_body(mixer, tmp_path):
    model = effvit_zoo.create_model("effzoo_vit_pico", mixers={mixer: [0, 1]}, depth=2, num_classes=5)
    check(model.eval(), 32, 32, tmp_path / "model.onnx")

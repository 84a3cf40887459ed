"""Every architecture leaves torch: torch.export and ONNX Runtime give eager's values, for batches that the export never saw."""

import onnxruntime
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import effvit_zoo
from effvit_zoo.attention import TOKEN_MIXERS

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


@pytest.mark.parametrize("family", FAMILIES)
def test_pico_models(family, tmp_path):
    check(timm.create_model(f"effzoo_{family}_pico", num_classes=5).eval(), 32, 32, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_small_models(family, tmp_path):
    check(timm.create_model(f"effzoo_{family}_small", num_classes=5).eval(), 224, 224, tmp_path / "model.onnx")


# the others are whole families above
@pytest.mark.parametrize(
    "mixer", sorted(set(TOKEN_MIXERS) - {"softmax", *(name.removesuffix("_vit") for name in FAMILIES)})
)
def test_every_other_mixer_in_one_body(mixer, tmp_path):
    model = effvit_zoo.create_model("effzoo_vit_pico", mixers={mixer: [0, 1]}, depth=2, num_classes=5)
    check(model.eval(), 32, 32, tmp_path / "model.onnx")

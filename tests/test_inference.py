"""optimize_for_inference: only exact forms compete, the fastest wins, and nothing of the host's settings is left changed."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import effvit_zoo
from effvit_zoo import hub
from effvit_zoo.errors import UserError
from effvit_zoo.evaluation.prediction import predict
from effvit_zoo.export import optimize as inference
from effvit_zoo.export.onednn import pack
from effvit_zoo.export.optimize import optimize_for_inference
from effvit_zoo.measure.host import onednn_matmul

EAGER = ["eager", "channels_last", "packed", "packed with activations"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("effzoo_swiftformer_xs", num_classes=10).eval()


@pytest.fixture(scope="module")
def sample():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def check(model, sample, forms):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = optimize_for_inference(model, sample, forms=forms, repeats=2)
    assert set(optimized.milliseconds) == set(forms), optimized.rejected
    assert optimized.form == min(optimized.milliseconds, key=optimized.milliseconds.get)
    assert max(optimized.errors.values()) <= 1e-5
    with torch.no_grad():
        for x in (sample, torch.randn(1, 3, 96, 64)):
            torch.testing.assert_close(optimized(x).clone(), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_eager_forms_are_exact(model, sample):
    check(model, sample, EAGER)


@pytest.mark.slow
def test_compiled_forms_are_exact(model, sample):
    check(model, sample, list(inference.FORMS))


@pytest.mark.slow
def test_other_runtimes_are_exact_and_leave_other_sizes_to_torch(model, sample):
    check(model, sample, ["onnxruntime", "openvino"])


@pytest.mark.slow
def test_a_runtime_that_cannot_serve_is_rejected_in_one_line(model, sample, monkeypatch):
    half = optimize_for_inference(model, sample, torch.bfloat16, forms=["eager", "openvino"], repeats=2)
    assert half.rejected == {"openvino": "float32 only, got torch.bfloat16"}
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = optimize_for_inference(model, sample, forms=["eager", "openvino"], repeats=2)
    assert missing.rejected == {"openvino": 'openvino is not installed: pip install "effvit_zoo[openvino]"'}


def test_an_inexact_form_is_thrown_out(model, sample, monkeypatch):
    def wrong(model, sample):
        return lambda x: model(x) * 1.001

    def broken(model, sample):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(inference, "FORMS", {"eager": inference.FORMS["eager"], "wrong": wrong, "broken": broken})
    optimized = optimize_for_inference(model, sample, repeats=2)
    assert optimized.form == "eager"
    assert "differs by 1.0e-03" in optimized.rejected["wrong"]
    assert optimized.rejected["broken"] == "no compiler here"
    monkeypatch.setattr(inference, "FORMS", {"wrong": wrong})
    with pytest.raises(UserError, match="no form of the model can be used"):
        optimize_for_inference(model, sample, repeats=2)


def test_packing_takes_every_layer(sample):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(2), nn.Linear(1024, 5, bias=False)
    )
    expected = net(sample)
    with torch.inference_mode():
        pack(net, sample)
        assert [type(layer).__name__ for layer in net] == ["PackedConv2d", "PackedConv2d", "Flatten", "PackedLinear"]
        torch.testing.assert_close(net(sample), expected, rtol=1e-5, atol=1e-6)


def test_activations_behind_a_layer_go_into_its_kernel(sample):
    acts = [nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish(), nn.SiLU(), nn.ReLU()]
    net = nn.Sequential(
        *[layer for act in acts for layer in (nn.Conv2d(3, 3, 1), nn.Identity(), act)], nn.Softplus(), nn.ReLU()
    )
    expected = net(sample)
    with torch.inference_mode():
        pack(net, sample, activations=True)
        assert [type(layer).__name__ for layer in net[:3]] == ["PackedConv2d", "Identity", "Identity"]
        assert type(net[-1]) is nn.ReLU
        torch.testing.assert_close(net(sample), expected, rtol=1e-5, atol=1e-6)


def test_the_switch_for_onednn_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with onednn_matmul():
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.slow
def test_compiled_forms_can_be_left_out_or_asked_for_alone(model, sample, monkeypatch):
    tried = []
    for form in inference.FORMS:
        monkeypatch.setitem(inference.FORMS, form, lambda model, x, form=form: tried.append(form) or model)
    compiled = ["compiled", "compiled, oneDNN"]
    for choice, expected in (
        (False, EAGER),
        (True, compiled),
        ("auto", [*EAGER, *compiled, "onnxruntime", "openvino"]),
    ):
        tried.clear()
        optimize_for_inference(model, sample, compile=choice, repeats=2)
        assert tried == list(expected)


@pytest.mark.slow
def test_half_precision_inside_and_a_report_of_what_was_tried(model, sample):
    optimized = optimize_for_inference(model, sample, torch.bfloat16, compile=False, repeats=2)
    assert optimized(sample).dtype is torch.float32
    assert 1e-5 < optimized.errors[optimized.form] < 5e-2
    lines = optimized.report.splitlines()
    assert len(lines) == len(optimized.milliseconds) + len(optimized.rejected)
    assert lines[0].startswith(optimized.form)
    assert "chosen" in lines[0]
    assert next(model.parameters()).dtype is torch.float32


def test_bad_arguments(model, sample):
    with pytest.raises(UserError, match=r"dtype: expected torch\.bfloat16, torch\.float16 or None, got torch\.int8"):
        optimize_for_inference(model, sample, torch.int8)
    with pytest.raises(UserError, match=r"compile: expected True, False or 'auto', got 'yes'"):
        optimize_for_inference(model, sample, compile="yes")
    with pytest.raises(UserError, match="unknown form 'packd'"):
        optimize_for_inference(model, sample, forms=["packd"])
    with pytest.raises(UserError, match=r"expected a float32 sample on the CPU, got torch\.bfloat16"):
        optimize_for_inference(model, sample.bfloat16())


@pytest.mark.parametrize(
    "form", ["eager", "channels_last", "packed", pytest.param("onnxruntime", marks=pytest.mark.slow)]
)
def test_the_result_predicts_as_the_original(form, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    data_config = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "crop_pct": 0.9}
    labels = ["cat", "dog", "eel"]
    built = timm.create_model("effzoo_vit_pico", num_classes=3)
    nn.init.normal_(built.head.weight, std=0.5)
    hub.save(built, folder, label_names=labels, data_config=data_config)
    original = hub.load(folder).eval()
    optimized = optimize_for_inference(original, torch.randn(1, 3, 32, 32), forms=[form], repeats=2)
    assert hub.label_names(optimized) == tuple(labels)
    assert optimized.num_classes == 3
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (48, 40), path.stem).save(path)
    for ours, theirs in zip(predict(optimized, paths), predict(original, paths), strict=True):
        assert ours.image == theirs.image
        for row, expected in zip(ours.rows, theirs.rows, strict=True):
            assert row["label"] == expected["label"]
            assert row["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    with pytest.raises(ValueError, match="OptimizedModel holds no weights"):
        hub.save(optimized, tmp_path / "saved")


@pytest.mark.parametrize(
    "form", ["eager", "channels_last", "packed", pytest.param("onnxruntime", marks=pytest.mark.slow)]
)
def test_the_surface_doesnt_depend_on_the_form(model, sample, form):
    optimized = optimize_for_inference(model, sample, forms=[form], repeats=2)
    assert not optimized.state_dict()
    assert not list(optimized.parameters())
    assert not optimized.training
    assert optimized.to("cpu").to(torch.float32).float().eval() is optimized
    for move in (lambda: optimized.to("meta"), optimized.cuda, optimized.half, optimized.double):
        with pytest.raises(ValueError, match="OptimizedModel computes in float32 on the CPU and can't be moved"):
            move()
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="OptimizedModel can't be pickled or copied"):
            duplicate(optimized)
    with pytest.raises(UserError, match="got one that is deployed already"):
        optimize_for_inference(optimized, sample)


def test_only_the_winner_stays_in_memory(model, sample, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def watched(build):
        def builder(model, sample):
            alive.add(model)
            most.append(len(alive))
            return build(model, sample)

        return builder

    monkeypatch.setattr(inference, "FORMS", {form: watched(inference.FORMS[form]) for form in EAGER})
    optimized = optimize_for_inference(model, sample, repeats=2)
    assert set(optimized.milliseconds) == set(EAGER)
    gc.collect()
    assert len(alive) == 1
    assert max(most) == 2
    del optimized
    gc.collect()
    assert not alive


def test_milliseconds_are_on_one_scale_although_forms_meet_in_pairs(model, sample, monkeypatch):
    rounds = iter([{"eager": 8}, {"eager": 10, "channels_last": 5}, {"channels_last": 20, "packed": 30}])
    monkeypatch.setattr(inference, "time_in_turns", lambda calls, repeats: next(rounds))
    optimized = optimize_for_inference(model, sample, forms=["eager", "channels_last", "packed"])
    assert optimized.milliseconds == {"eager": 8, "channels_last": 4, "packed": 6}
    assert optimized.form == "channels_last"


def test_models_that_are_not_timms_are_taken_too(sample):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimized = optimize_for_inference(net, sample, forms=["eager"], repeats=2)
    assert (optimized.num_classes, optimized.pretrained_cfg["input_size"]) == (4, (3, 64, 64))
    torch.testing.assert_close(optimized(sample).clone(), net(sample))


def test_it_is_at_the_front_door():
    assert effvit_zoo.optimize_for_inference is optimize_for_inference

"""SwiftFormer's own: efficient additive attention against its formula, and two classifiers that act as one."""

import copy
import pickle

import pytest
import timm
import torch
from reference import randomise, relative_error

from effvit_zoo.attention.additive import efficient_additive_attention, naive_efficient_additive_attention
from effvit_zoo.models.swiftformer import SwiftFormer


@pytest.mark.parametrize("tokens", [1, 63, 196])
def test_additive_attention_and_gradients(tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, tokens, 48), (2, tokens, 48), (48, 1)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    got, expected = efficient_additive_attention(*inputs), naive_efficient_additive_attention(*inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    mix = [torch.randn(got[0].shape, generator=generator, dtype=torch.float64) for _ in got]
    gradients = [
        torch.autograd.grad(sum((o * m).sum() for o, m in zip(out, mix, strict=True)), inputs)
        for out in (got, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_additive_attention_in_half_precision():
    q, k, w_g = torch.randn(1, 64, 128) * 100, torch.randn(1, 64, 128) * 100, torch.randn(128, 1)  # squares above 65504
    q[0, 3] = 0
    got = efficient_additive_attention(q.half(), k.half(), w_g.half())
    for a, b in zip(got, naive_efficient_additive_attention(q, k, w_g), strict=True):
        assert relative_error(a, b) < 2e-2


@pytest.fixture
def model():
    return randomise(SwiftFormer(depths=(1, 2, 1, 1), embed_dims=(8, 16, 16, 24), num_classes=5)).eval()


@torch.no_grad()
def test_answer_is_the_mean_of_both_classifiers(model):
    x = torch.randn(2, 3, 64, 64)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    logits, logits_dist = (classifier(pre_logits) for classifier in model.get_classifier())
    assert relative_error(model(x), (logits + logits_dist) / 2) < 1e-6
    fused = timm.models.reparameterize_model(model)
    assert fused.head_dist is None
    assert model.head_dist is not None
    assert relative_error(fused(x), model(x)) < 1e-5
    fused.reset_classifier(3)
    assert fused(x).shape == (2, 3)


@torch.no_grad()
def test_a_replaced_head_is_the_one_that_is_fused(model):
    x = torch.randn(2, 3, 64, 64)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.head = torch.nn.Linear(24, 5)
        assert relative_error(timm.models.reparameterize_model(twin)(x), twin(x)) < 1e-5
    assert not any("first" in key for key in model.state_dict())
    for head in (torch.nn.Linear(24, 4), torch.nn.Linear(24, 5, bias=False), torch.nn.Identity()):
        model.head = head
        with pytest.raises(ValueError, match="classifiers differ"):
            timm.models.reparameterize_model(model)


def test_distilled_training_returns_both(model):
    model.set_distilled_training(True)
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(model(x), torch.Tensor)
    logits, logits_dist = model.train()(x)
    assert logits.shape == logits_dist.shape == (2, 5)


def test_dropout_and_stochastic_depth_reach_their_places():
    model = SwiftFormer(
        depths=(2, 1, 1, 2), embed_dims=(8, 8, 8, 8), drop_path_rate=0.5, proj_drop_rate=0.2, drop_rate=0.3
    )
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert model.stages[0].blocks[-1].linear.drop.p == 0.2
    assert model.head_drop.p == 0.3


def test_official_checkpoint_may_be_wrapped(model):
    from effvit_zoo.models.swiftformer import checkpoint_filter_fn

    official = {
        "network.1.proj.weight": torch.ones(1),
        "network.2.0.layer_scale_1": torch.ones(1),
        "dist_head.bias": torch.ones(1),
    }
    expected = ["stages.1.downsample.proj.weight", "stages.1.blocks.0.layer_scale_1.gamma", "head_dist.bias"]
    assert list(checkpoint_filter_fn({"model": official, "epoch": 3}, model)) == expected


@pytest.mark.parametrize("arguments", [{"global_pool": "max"}, {"global_pool": "average"}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="global_pool"):
        SwiftFormer(**arguments)

"""ToSA: selection against slow truths, the dense model inside it, and conversion from and to timm's ViTs."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import randomise

import effvit_zoo
from effvit_zoo import hub, models
from effvit_zoo.attention.token_select import (
    TokenSelector,
    gather_tokens,
    naive_selection,
    number_selected,
    rows_of_queries,
    scatter_tokens,
    select_tokens,
    token_importance,
)


def tosa(**kwargs):
    model = timm.create_model("effzoo_tosa_vit_pico", **{"num_classes": 5, **kwargs})
    return randomise(model).eval()


def images(batch=2, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("ratio", "patches", "expected"),
    [(0.5, 196, 98), (0.1, 10, 1), (0.3, 10, 3), (0.5, 7, 4), (0.0, 9, 0), (1.0, 9, 9), (0.7, 10, 7)],
)
def test_number_selected(ratio, patches, expected):
    assert number_selected(ratio, patches) == expected


def test_rows_are_those_of_the_full_map():
    q, k = torch.randn(2, 2, 3, 11, 4).unbind(0)
    full = torch.einsum("bhid,bhjd->bhij", q, k) / 2
    torch.testing.assert_close(rows_of_queries(q, k, 0.5, 1, 2), full)
    torch.testing.assert_close(rows_of_queries(q, k, 0.5, 4, 2), full[:, :, [2, 6, 10]])


def test_importance_is_the_mean_column_sum_of_scores_and_of_their_log_probabilities():
    scores = torch.randn(2, 3, 5, 7)
    slow = torch.zeros(2, 7)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                row = [math.exp(s) for s in scores[b, h, i].tolist()]
                slow[b] += torch.tensor(row) / sum(row) / 3
    torch.testing.assert_close(token_importance(scores), slow)
    torch.testing.assert_close(token_importance(scores.log_softmax(-1)), slow)


def test_selection_keeps_prefix_tokens_and_the_most_important_patches():
    importance = torch.tensor([[0.0, 0.0, 0.1, 0.9, 0.5, 0.7], [9.0, 9.0, 0.4, 0.3, 0.2, 0.1]])
    index = select_tokens(importance, 2, num_prefix_tokens=2)
    assert index.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    assert select_tokens(importance, 0, num_prefix_tokens=1).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="expected 0 to 4 patches, got 5"):
        select_tokens(importance, 5, num_prefix_tokens=2)


def test_selection_is_the_naive_one():
    scores = torch.randn(2, 3, 5, 11, dtype=torch.double)
    assert select_tokens(token_importance(scores), 4, 2).tolist() == naive_selection(scores, 4, 2)


def test_gather_and_scatter_undo_each_other_and_leave_the_rest():
    x = torch.randn(2, 6, 3)
    index = torch.tensor([[0, 5, 2], [0, 1, 3]])
    assert torch.equal(gather_tokens(x, index)[1], x[1, [0, 1, 3]])
    assert torch.equal(scatter_tokens(x, index, gather_tokens(x, index)), x)
    out = scatter_tokens(x, index, torch.zeros(2, 3, 3))
    assert torch.equal(out[0, [1, 3, 4]], x[0, [1, 3, 4]])
    assert (out[0, [0, 5, 2]] == 0).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_selector_is_two_1d_convolutions_over_each_row(kernel):
    selector = TokenSelector(3, kernel, 4)
    maps = torch.randn(2, 3, 5, 7)
    weights = [conv.weight.squeeze(2) for conv in (selector.conv1, selector.conv2)]
    rows = maps.transpose(1, 2).reshape(10, 3, 7)  # each row a signal of its own, heads as channels
    hidden = F.conv1d(rows, weights[0], selector.conv1.bias, padding=kernel // 2).relu()
    truth = F.conv1d(hidden, weights[1], padding=kernel // 2).log_softmax(-1).reshape(2, 5, 3, 7).transpose(1, 2)
    torch.testing.assert_close(selector(maps), truth)
    torch.testing.assert_close(selector.importance(maps), token_importance(truth))


@torch.no_grad()
def test_ratio_of_one_is_the_dense_model_bit_for_bit():
    model, x = tosa(), images()
    dense = effvit_zoo.to_dense(model)
    assert not torch.equal(model(x), dense(x))
    model.set_attention_ratio(1.0)
    assert torch.equal(model(x), dense(x))
    assert not any(key.startswith("selectors") for key in dense.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_tokens_that_do_not_enter_a_layer_come_out_as_they_went_in(ratio):
    model, x = tosa(attention_ratio=ratio), images()
    kept = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: kept.update({i: args[0].shape[1]}))
    entered = model.selected_tokens(x)
    layers = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    layers = [torch.cat([prefix, patches], 1) for patches, prefix in layers]
    assert [index.shape[1] for index in entered] == [1 + math.ceil(ratio * 64)] * 3
    assert all(kept[i] == entered[0].shape[1] for i in (1, 3, 5))
    for pair, index in enumerate(entered):
        before, after = layers[2 * pair], layers[2 * pair + 1]
        for b in range(2):
            inside = torch.zeros(before.shape[1], dtype=torch.bool)
            inside[index[b]] = True
            assert inside[0]
            assert torch.equal(after[b, ~inside], before[b, ~inside])
            assert not torch.equal(after[b, inside], before[b, inside])


@torch.no_grad()
def test_order_of_patches_does_not_matter_to_selectors_of_single_keys():
    model = tosa(selector_kernel=1, selector_hidden_ratio=1, selector_stride=1).double()
    tokens = torch.randn(2, 65, 64, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(64, generator=torch.Generator().manual_seed(3))])
    plain, _, entered = model.forward_layers(tokens, [], 5)
    shuffled, _, _ = model.forward_layers(tokens[:, order], [], 5)
    assert len(entered) == 3
    torch.testing.assert_close(shuffled, plain[:, order], rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_selectors_through_their_own_loss_alone():
    model = tosa().train()
    model(images()).square().sum().backward()
    assert all((p.grad is None) == key.startswith("selectors.") for key, p in model.named_parameters())
    model.zero_grad(set_to_none=True)
    losses = models.SelectorLosses(model).train()(images())
    losses.sum().backward()
    assert losses.shape == (3,)
    assert all((p.grad is not None) == key.startswith("selectors.") for key, p in model.named_parameters())
    assert all(p.grad.abs().max() > 0 for key, p in model.named_parameters() if key.startswith("selectors."))


def test_selector_losses_keep_the_network_in_eval_mode():
    model = tosa(drop_path_rate=0.5).train()
    losses = models.SelectorLosses(model)
    assert not any(module.training for module in losses.train().model.modules())
    assert losses.training
    assert torch.equal(losses(images()), tosa(drop_path_rate=0.5).selector_losses(images()))


def test_a_ratio_per_call():
    model, x = tosa(attention_ratio=0.5), images()
    at_ratio = models.AtRatio(model)
    logits = {}
    for ratio in (0.0, 0.25, 0.5, 1):
        logits[ratio] = at_ratio(x, ratio)
        assert torch.equal(logits[ratio], tosa(attention_ratio=ratio)(x))
        assert model.attention_ratio == 0.5
    assert not torch.equal(logits[0.25], logits[0.5])
    assert at_ratio.train().model.training
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        at_ratio(x, 2)


@torch.no_grad()
def test_selector_loss_is_the_divergence_from_the_next_layers_true_map():
    model, x = tosa(selector_stride=1), images()
    pairs = model.score_pairs(x)
    predicted, true = model.token_selectors()[1](pairs[1][0]), pairs[1][1].softmax(-1)
    slow = (true * (true.log() - predicted)).sum(-1).mean()
    torch.testing.assert_close(model.selector_losses(x)[1], slow, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kwargs", "side"),
    [
        ("deit_tiny_patch16_224", {"depth": 4}, 64),
        ("vit_small_patch14_reg4_dinov2", {"depth": 4, "init_values": 0.5}, 56),
        ("vit_base_patch16_224", {"depth": 3, "global_pool": "avg", "class_token": False}, 64),
        ("effzoo_vit_pico", {}, 32),
    ],
)
def test_conversion_of_timms_vits_and_back(name, kwargs, side):
    vit = randomise(timm.create_model(name, img_size=side, num_classes=5, **kwargs)).eval()
    x = images(side=side)
    model = effvit_zoo.to_tosa(vit, attention_ratio=1.0)
    expected = vit(x)
    assert torch.equal(model(x), expected)
    model.set_attention_ratio(0.5)
    assert len(model.selected_tokens(x)) == len(vit.blocks) // 2
    assert torch.isfinite(model(x)).all()
    assert not torch.equal(model(x), expected)
    back = effvit_zoo.to_dense(model)
    assert torch.equal(back(x), expected)
    assert back.state_dict().keys() == vit.state_dict().keys()


@torch.no_grad()
def test_a_converted_model_is_saved_and_comes_back(tmp_path):
    vit = randomise(timm.create_model("effzoo_vit_pico", num_classes=5)).eval()
    model = effvit_zoo.to_tosa(vit, attention_ratio=0.25, selector_kernel=1, selector_hidden_ratio=2, selector_stride=4)
    model.set_attention_ratio(0.75)
    hub.save(model, tmp_path / "tosa")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'tosa'}", pretrained=True).eval()
    assert (loaded.attention_ratio, loaded.selector_stride) == (0.75, 4)
    assert torch.equal(loaded(images()), model(images()))
    hub.save(effvit_zoo.to_dense(loaded), tmp_path / "dense")
    dense = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    assert torch.equal(dense(images()), vit(images()))


@torch.no_grad()
def test_dense_checkpoints_load_and_leave_new_selectors(tmp_path):
    vit = randomise(timm.create_model("effzoo_vit_pico")).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth")}
    model = timm.create_model("effzoo_tosa_vit_pico", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model.forward_at_ratio(images(), 1), vit(images()))
    assert all(p.abs().max() > 0 for p in model.selectors.parameters())


def test_checkpointing_recomputes_the_same_gradients():
    model = tosa().train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        model(images()).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tosa(attention_ratio=1.5), r"attention_ratio: expected a number from 0 to 1, got 1.5"),
        (lambda: tosa().set_attention_ratio("half"), r"attention_ratio: expected a number from 0 to 1, got 'half'"),
        (lambda: tosa(selector_kernel=2), "selector_kernel: expected an odd number"),
        (lambda: tosa(selector_hidden_ratio=0), "selector_hidden_ratio: expected at least 1, got 0"),
        (lambda: tosa(selector_stride=0), "selector_stride: expected at least 1, got 0"),
        (lambda: tosa(mixers={"sima": [1]}), "token selection reads softmax attention"),
        (lambda: effvit_zoo.to_tosa(torch.nn.Linear(2, 2)), "expected a plain timm VisionTransformer, got Linear"),
        (lambda: effvit_zoo.to_tosa(timm.create_model("effzoo_sima_vit_pico")), "softmax attention in every block"),
        (lambda: effvit_zoo.to_dense(timm.create_model("effzoo_vit_pico")), "expected a ToSAViT, got IsotropicViT"),
        (lambda: tosa()(images(), attn_mask=torch.ones(1)), "attn_mask"),
        (lambda: tosa().forward_intermediates(images(), output_fmt="NHWC"), "output_fmt: expected NCHW or NLC"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_checkpoint_of_another_depth_is_refused(tmp_path):
    hub.save(tosa(depth=4), tmp_path / "four")
    with pytest.raises(effvit_zoo.errors.UserError, match=r"selectors|blocks"):
        hub.load(f"local-dir:{tmp_path / 'four'}", pretrained=True, depth=6)


def test_half_precision():
    model, x = tosa(), images()
    with torch.no_grad():
        expected = model(x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                out = model(x)
            assert torch.isfinite(out).all()
            assert (
                out.float() - expected
            ).abs().max() < 0.25 * expected.abs().max()  # a near tie may choose another token

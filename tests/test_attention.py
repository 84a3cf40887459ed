"""Every mechanism equals its official code's numbers and its formula written out, at any size, precision and way of running."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effvit_zoo import attention
from effvit_zoo.attention import TOKEN_MIXERS, _linear, _recording
from effvit_zoo.attention.additive import efficient_additive_attention, naive_efficient_additive_attention
from effvit_zoo.attention.cosformer import naive_cosformer_attention, naive_cosformer_attention_2d
from effvit_zoo.attention.cross_covariance import cross_covariance_attention, naive_cross_covariance_attention
from effvit_zoo.attention.elu_linear import naive_elu_linear_attention
from effvit_zoo.attention.hydra import naive_hydra_attention
from effvit_zoo.attention.multiscale_linear import naive_relu_linear_attention, relu_linear_attention
from effvit_zoo.attention.sima import naive_sima_attention, naive_sima_class_attention
from effvit_zoo.attention.softmax import naive_softmax_attention

GOLDEN = load_file(Path(__file__).parent / "golden/attention.safetensors")

# name -> (ours, formula); all take (B, H, N, D) but hydra, whose heads are joined below
MECHANISMS = {
    "softmax": (attention.softmax_attention, naive_softmax_attention),
    "elu": (attention.elu_linear_attention, naive_elu_linear_attention),
    "cosformer": (attention.cosformer_attention, naive_cosformer_attention),
    "hydra": (attention.hydra_attention, naive_hydra_attention),
    "sima": (attention.sima_attention, naive_sima_attention),
    "sima_class": (attention.sima_class_attention, naive_sima_class_attention),
}
LINEAR = [name for name in MECHANISMS if name != "softmax"]


def grid_pair(form, grid, prefix=0):
    kwargs = {"grid_size": grid, "form": form, "num_prefix_tokens": prefix}
    return tuple(
        functools.partial(f, **kwargs) for f in (attention.cosformer_attention_2d, naive_cosformer_attention_2d)
    )


def tokens(name, B, H, N, D, dtype=torch.float32, seed=0, Nk=None):
    """Random q, k, v as strided views of one projection's output, as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, max(N, Nk or N), 3, H, D, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = q[:, :, :N], k[:, :, : Nk or N], v[:, :, : Nk or N]
    return tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v)) if name == "hydra" else (q, k, v)


def error(got, expected):
    """Largest difference relative to the largest expected magnitude."""
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def value_and_gradients(f, inputs, out_gradient=None):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    if out_gradient is None:
        out_gradient = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, out_gradient)


def golden(prefix):
    return {key[len(prefix) + 1 :]: value for key, value in GOLDEN.items() if key.startswith(prefix + ".")}


CASES = {
    "softmax.self": attention.softmax_attention,
    "elu.self": attention.elu_linear_attention,
    "elu.cross": attention.elu_linear_attention,
    "elu.large": attention.elu_linear_attention,
    "cosformer.self": attention.cosformer_attention,
    "cosformer.cross": attention.cosformer_attention,
    "cosformer.dead": attention.cosformer_attention,
    "cosformer_2d.sum": grid_pair("sum", (4, 7))[0],
    "cosformer_2d.product": grid_pair("product", (4, 7))[0],
    "hydra.self": attention.hydra_attention,
    "sima.self": attention.sima_attention,
}


@pytest.mark.parametrize("case", CASES)
def test_official_numbers(case):
    t = golden(case)
    with torch.no_grad():
        assert error(CASES[case](t["q"], t["k"], t["v"]), t["out"]) < 1e-5
    if "gout" in t:
        _, *gradients = value_and_gradients(CASES[case], (t["q"], t["k"], t["v"]), t["gout"])
        assert max(error(g, t[key]) for g, key in zip(gradients, ("gq", "gk", "gv"), strict=True)) < 2e-5


@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("softmax", attention.SoftmaxAttention),
        ("cosformer", attention.CosformerAttention),
        ("sima", attention.SimaAttention),
        ("sima_class", attention.SimaClassAttention),
    ],
)
def test_official_modules(case, module):
    t = golden(f"{case}.module")
    x, y = t.pop("x"), t.pop("y")
    mixer = module(48, num_heads=3, qkv_bias=True)
    mixer.load_state_dict(t)
    assert error(mixer(x)[:, 0], y[:, 0]) < 1e-5
    assert error(mixer(x), y) < 1e-5


def truth_cases():
    for name in MECHANISMS:
        for N in (1, 2, 17, 63, 131):  # fewer tokens than the 16 channels, a few more, and many more
            yield pytest.param(name, *MECHANISMS[name], N, None, id=f"{name}-N{N}")
        if name != "sima_class":
            yield pytest.param(name, *MECHANISMS[name], 9, 70, id=f"{name}-N9x70")
            yield pytest.param(name, *MECHANISMS[name], 70, 9, id=f"{name}-N70x9")
    for N in (3, 18, 63):
        for P in (1, 2):
            pair = tuple(functools.partial(f, num_prefix_tokens=P) for f in MECHANISMS["cosformer"])
            yield pytest.param("cosformer", *pair, N, None, id=f"cosformer-N{N}-P{P}")
    for form in ("sum", "product"):
        for grid in ((1, 1), (4, 7), (9, 11)):
            for P in (0, 1):
                N = P + grid[0] * grid[1]
                yield pytest.param("2d", *grid_pair(form, grid, P), N, None, id=f"2d-{form}-{grid[0]}x{grid[1]}-P{P}")


@pytest.mark.parametrize(("name", "ours", "formula", "N", "Nk"), list(truth_cases()))
def test_values_and_gradients_equal_the_formula(name, ours, formula, N, Nk, monkeypatch):
    inputs = tokens(name, 2, 3, N, 16, Nk=Nk)
    expected = value_and_gradients(formula, [x.double() for x in inputs])
    got = value_and_gradients(ours, inputs)
    for x, y in zip(got, expected, strict=True):
        # a gradient may vanish, e.g. that of a mean of one token by its weight: then nothing but rounding is left
        assert error(x, y) < 2e-5 or (x.double() - y).abs().max() < 2e-5
    for elements in (_linear.CHUNK_ELEMENTS, 5 * 3 * 16, 1):  # whole, in chunks of 5 tokens, token by token
        monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", elements)
        with torch.no_grad():
            assert error(ours(*inputs), expected[0]) < 1e-5


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("N", [3, 6])
def test_gradcheck(name, N):
    inputs = [x.clone().requires_grad_() for x in tokens(name, 1, 2, N, 4, torch.float64, seed=1)]
    assert torch.autograd.gradcheck(MECHANISMS[name][0], inputs)


def test_elu_feature_is_exact_where_elu_plus_one_cancels():
    q = torch.full((1, 1, 1, 2), -20.0)
    k = torch.tensor([[-20.0, -25.0], [-30.0, -20.0], [1.0, -28.0]]).view(1, 1, 3, 2)
    v = torch.eye(3).view(1, 1, 3, 3)
    out = attention.elu_linear_attention(q, k, v, eps=0.0)
    assert error(out, naive_elu_linear_attention(q.double(), k.double(), v.double(), eps=0.0)) < 1e-6


def test_elu_feature_has_slope_one_at_zero():
    """As elu has: the slope at 0 equals that just above it."""
    _, k, v = tokens("elu", 1, 1, 5, 2)
    _, at_zero, _, _ = value_and_gradients(attention.elu_linear_attention, (torch.zeros(1, 1, 5, 2), k, v))
    _, above, _, _ = value_and_gradients(attention.elu_linear_attention, (torch.full((1, 1, 5, 2), 1e-6), k, v))
    assert above.abs().max() > 1e-3
    assert error(at_zero, above) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LINEAR, "2d"])
def test_half_precision(name, dtype):
    limit = 2e-3 if dtype == torch.float16 else 1.5e-2
    f = grid_pair("sum", (32, 32))[0] if name == "2d" else MECHANISMS[name][0]
    q, k, v = tokens(name, 1, 3, 1024, 64, dtype)
    v = v + 1
    with torch.no_grad():
        out = f(q, k, v)
        assert out.dtype == dtype
        assert error(out, f(q.float(), k.float(), v.float())) < limit
    got, expected = value_and_gradients(f, (q, k, v)), value_and_gradients(f, (q.double(), k.double(), v.double()))
    assert error(got[0], expected[0]) < limit
    for x in got:
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*LINEAR, "2d"])
def test_float16_holds_at_16384_tokens(name, training):
    f = grid_pair("sum", (128, 128))[0] if name == "2d" else MECHANISMS[name][0]
    q, k, v = tokens(name, 1, 1, 16384, 64, torch.float16)
    v = v + 1
    with torch.set_grad_enabled(training):
        out = f(q.requires_grad_(training), k, v)
    assert torch.isfinite(out).all()
    assert error(out.detach(), f(q.detach().double(), k.double(), v.double())) < 2e-3


def hazards(x):
    """Tokens that are zero, negative in every channel, or of a channel that is zero everywhere, and all of these at once."""
    for rows, channels, fill in (
        (slice(3, 4), slice(None), 0.0),
        (slice(5, 6), slice(None), -3.0),
        (slice(None), slice(2, 3), 0.0),
    ):
        hit = x.clone()
        hit[..., rows, channels] = fill
        yield hit
    yield torch.zeros_like(x)
    yield torch.full_like(x, -3.0)
    yield torch.full_like(x, -300.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", [8, 40])
@pytest.mark.parametrize("name", [*LINEAR, "2d"])
def test_degenerate_tokens_stay_finite(name, N, dtype):
    f = grid_pair("sum", (2, N // 2))[0] if name == "2d" else MECHANISMS[name][0]
    q, k, v = tokens(name, 1, 2, N, 16, dtype)
    for q_hit, k_hit in zip(hazards(q), hazards(k), strict=True):
        for inputs in ((q_hit, k, v), (q, k_hit, v), (q_hit, k_hit, v)):
            for x in value_and_gradients(f, inputs):
                assert torch.isfinite(x).all()
            with torch.no_grad():
                assert torch.isfinite(f(*inputs)).all()


@pytest.mark.parametrize("name", LINEAR)
def test_autocast_leaves_the_sums_exact(name):
    f = MECHANISMS[name][0]
    inputs = tokens(name, 2, 3, 70, 16)
    with torch.no_grad():
        expected = f(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(f(*inputs), expected)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(*inputs)

    for x, y in zip(value_and_gradients(under_autocast, inputs), value_and_gradients(f, inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["elu", "cosformer", "2d", "sima", "hydra"])
def test_inference_works_in_pieces(name):
    """No intermediate result grows with the number of tokens, and none with the batch."""

    class Recorder(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func is not torch.ops.aten.new_empty.default:  # the output itself
                known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
                for x in tree_leaves(results):
                    if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                        self.largest = max(self.largest, x.numel())
            return results

    f = grid_pair("sum", (128, 96))[0] if name == "2d" else MECHANISMS[name][0]
    width = {"cosformer": 2, "2d": 4}.get(name, 1)
    for shape in ((1, 3, 12288, 64), (160, 2, 96, 64)):
        if name == "2d" and shape[0] > 1:
            f = grid_pair("sum", (12, 8))[0]
        inputs = tokens(name, *shape)
        with torch.no_grad(), Recorder() as recorder:
            f(*inputs)
        assert 0 < recorder.largest <= width * _linear.CHUNK_ELEMENTS


def xca(q, k, v, f=cross_covariance_attention):
    return (f(q, k, v, torch.full((2, 1, 1), 3.0, dtype=q.dtype)),)


def relu(q, k, v, f=relu_linear_attention):
    return (f(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)),)


def additive(q, k, v, f=efficient_additive_attention):
    return f(q.flatten(1, 2).mT, k.flatten(1, 2).mT, v[0, :, :, 0].reshape(-1, 1))


OTHER_FUNCTIONS = {  # name -> (ours, formula) of (B, H, D, N)
    "xca": (xca, functools.partial(xca, f=naive_cross_covariance_attention)),
    "relu": (relu, functools.partial(relu, f=naive_relu_linear_attention)),
    "additive": (additive, functools.partial(additive, f=naive_efficient_additive_attention)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_chunks_of_tokens_change_nothing(name, dtype, monkeypatch):
    f, formula = OTHER_FUNCTIONS[name]
    inputs = torch.randn(3, 2, 2, 8, 77, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    with torch.no_grad():
        whole = f(*inputs)
    for x, y in zip(whole, formula(*(x.double() for x in inputs)), strict=True):
        assert error(x, y) < (1e-5 if dtype is torch.float32 else 2e-2)
    seen = []
    narrow = torch.Tensor.narrow
    monkeypatch.setattr(torch.Tensor, "narrow", lambda x, *args: seen.append(x) or narrow(x, *args))
    for elements in (8, 200):  # a token at a time, and chunks with a remainder
        monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", elements)
        with torch.no_grad():
            for x, y in zip(f(*inputs), whole, strict=True):
                assert x.dtype == y.dtype
                assert error(x, y) < (1e-5 if dtype is torch.float32 else 1e-2)
    assert seen


@pytest.mark.parametrize("name", [name for name in TOKEN_MIXERS if name != "softmax"])
def test_mixers_refuse_masks_and_stay_traceable_in_a_model(name):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**shape, attn_layer=TOKEN_MIXERS[name]).eval()
    place(model.blocks[0].attn, (4, 4))
    x = torch.randn(2, 3, 16, 16)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    for form in (model, traced):
        with pytest.raises(ValueError, match="mask"):
            form(x, attn_mask=torch.ones(17, 17))
        with pytest.raises(ValueError, match="is_causal"):
            form(x, is_causal=True)


def placed(name):
    classes = {**TOKEN_MIXERS, "sima_class": attention.SimaClassAttention}
    return place(classes[name](48, num_heads=3, qkv_bias=True), (4, 5))


def place(mixer, grid_size, prefix=1):
    """What a model tells a mixer that looks at the grid."""
    if hasattr(mixer, "grid_size"):
        mixer.grid_size, mixer.num_prefix_tokens = grid_size, prefix
    return mixer


class OneInput(torch.nn.Module):
    """A mixer inside a model: its mask is a constant for tracers."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x)


MIXERS = [*TOKEN_MIXERS, "sima_class"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_script_trace_and_export(name):
    model = OneInput(placed(name)).eval()
    x = torch.randn(2, 21, 48, generator=torch.Generator().manual_seed(0))
    traced = torch.fx.symbolic_trace(model)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    for form in (torch.jit.script(model), traced, torch.jit.script(traced), program.module()):
        for batch in (x, torch.cat([x, x + 1, x])):
            assert error(form(batch), model(batch).detach()) < 1e-5
    with torch.no_grad():
        assert error(torch.vmap(model)(x[None])[0], model(x)) < 1e-5


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_train_every_parameter(name):
    mixer = placed(name)
    mixer(torch.randn(2, 21, 48)).square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_prefix_tokens_are_told_to_the_mixer():
    mixer = placed("cosformer")
    x = torch.randn(2, 21, 48)
    literal = mixer(x)
    mixer.num_prefix_tokens = 1
    q, k, v = (y.double() for y in mixer.project_qkv(x))
    expected = mixer.project_out(naive_cosformer_attention(q, k, v, num_prefix_tokens=1).float())
    assert error(mixer(x).detach(), expected.detach()) < 1e-5
    assert error(literal.detach(), expected.detach()) > 1e-3


@pytest.mark.parametrize("name", ["elu", "sima", "hydra"])
def test_order_of_tokens_is_not_seen(name):
    f = MECHANISMS[name][0]
    inputs = tokens(name, 1, 2, 40, 16)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert error(f(*(x[..., order, :] for x in inputs)), f(*inputs)[..., order, :]) < 1e-5


def test_sima_does_not_see_the_size_of_a_channel():
    q, k, v = tokens("sima", 1, 2, 40, 16)
    out = attention.sima_attention(q, k, v)
    size = torch.rand(16) * 100 + 0.01
    assert error(attention.sima_attention(q * size, k / size, v), out) < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attention.elu_linear_attention(q[0], k, v), "got"),
        (lambda q, k, v: attention.sima_attention(q, k[:, :, 1:], v), "tokens"),
        (lambda q, k, v: attention.cosformer_attention(q[..., 1:], k, v), "head dim"),
        (lambda q, k, v: attention.cosformer_attention(q, k, v, num_prefix_tokens=12), "12"),
        (lambda q, k, v: attention.cosformer_attention_2d(q, k, v, (4, 4)), "4 x 4"),
        (lambda q, k, v: attention.cosformer_attention_2d(q, k, v, (3, 4), form="max"), "max"),
        (attention.hydra_attention, r"\(B, N, C\)"),
    ],
)
def test_misfits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*tokens("", 1, 2, 12, 8))


def test_a_grid_must_be_set():
    with pytest.raises(ValueError, match="grid"):
        attention.Cosformer2dAttention(48, num_heads=3)(torch.randn(1, 4, 48))


def build_ones(size, device):
    return torch.ones(size, device=device)


def test_constants_are_cached_for_training_and_bounded(monkeypatch):
    monkeypatch.setattr(_recording, "_CACHE", {})
    like = torch.empty(1)
    with torch.inference_mode():
        first = _recording.remember(build_ones, like, 4)
    assert not first.is_inference()
    assert _recording.remember(build_ones, like, 4) is first
    assert torch.jit.trace(lambda x: x * _recording.remember(build_ones, x, 1), like, check_trace=False)(
        like
    ).shape == (1,)
    assert len(_recording._CACHE) == 1
    monkeypatch.setattr(_recording, "MAX_BYTES", 100)
    for size in (5, 6, 7, 25, 26):
        assert _recording.remember(build_ones, like, size).numel() == size
        assert sum(kept.nbytes for kept in _recording._CACHE.values()) <= 100
    monkeypatch.setattr(_recording, "MAX_ENTRIES", 2)
    for size in (1, 2, 3):
        _recording.remember(build_ones, like, size)
    assert [key[-1] for key in _recording._CACHE] == [2, 3]

"""`effzoo benchmark attention`: measures what it says, on any number of tokens, and writes it down."""

import csv
import re

import matplotlib
import pytest
import torch
from test_attention import error
from torch.utils._pytree import tree_leaves

from effvit_zoo import attention, cli
from effvit_zoo.benchmark import attention as bench
from effvit_zoo.measure.peak import peak_bytes
from effvit_zoo.viz.scaling import Line, scaling

FLOATS = 4 * 512 * 512


def test_peak_is_that_of_the_largest_moment():
    q, k, v = torch.randn(3, 1, 1, 512, 64).unbind(0)
    with torch.no_grad():
        assert peak_bytes(lambda: (q @ k.mT).softmax(-1) @ v) == 2 * FLOATS
        assert peak_bytes(lambda: q @ k.mT) == 0  # the result does not count
        assert peak_bytes(lambda: v) == 0
        assert peak_bytes(lambda: (q @ k.mT, q @ v.mT, v)) == 0  # nor do several


def test_peak_leaves_stderr_as_it_was(capfd):
    import sys

    peak_bytes(lambda: torch.ones(3) + 1)
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_every_token_mixer_is_measured():
    assert set(bench.MECHANISMS) == {"naive", "sdpa", *attention.TOKEN_MIXERS} - {"softmax"}
    assert len({mixer.label for mixer in bench.MECHANISMS.values()}) == len(bench.MECHANISMS)


def test_convolutional_modulation_is_measured_as_it_ships():
    shape = attention.MixerShape(6, 2, 4, torch.float32)
    q, k, v = torch.randn(3, 1, 6, 8).unbind(0)
    torch.manual_seed(0)
    function = attention.ConvModulationMixer.benchmark_function(shape)
    torch.manual_seed(0)
    mixer = attention.ConvModulationMixer(8, 2)
    mixer.grid_size = shape.grid
    x = torch.nn.functional.gelu(q).unflatten(1, shape.grid).permute(0, 3, 1, 2)
    assert error(function(q, k, v), v * mixer.conv(x).detach().flatten(2).mT) < 1e-6


@pytest.mark.parametrize("name", bench.MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mechanism_keeps_size_and_type(name, dtype):
    mechanism, shape = bench.MECHANISMS[name], attention.MixerShape(6, 2, 4, dtype)
    qkv = torch.randn(1, 6, 3, 2, 4).to(dtype)
    separate, packed = (bench.make_inputs(mechanism, qkv, packed) for packed in (False, True))
    assert all(x.is_contiguous() and x.data_ptr() != qkv.data_ptr() for x in separate)
    assert packed[0].data_ptr() == qkv.data_ptr()
    function = mechanism.benchmark_function(shape)
    outs, packed_outs = tree_leaves(function(*separate)), tree_leaves(function(*packed))
    for out, packed_out in zip(outs, packed_outs, strict=True):
        assert out.numel() == qkv.numel() // 3
        assert out.dtype == dtype
        assert error(out, packed_out) < (1e-5 if dtype is torch.float32 else 2e-2)
    assert all(torch.isfinite(x).all() for x in tree_leaves(bench.bound(function, packed, backward=True)()))


def test_both_references_are_the_same_function():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
    naive, sdpa = (
        bench.MECHANISMS[name].benchmark_function(attention.MixerShape(6, 2, 4, torch.float32))(q, k, v)
        for name in ("naive", "sdpa")
    )
    assert error(naive, sdpa) < 1e-5


@pytest.mark.parametrize(("tokens", "grid"), [(196, (14, 14)), (12, (3, 4)), (7, (1, 7))])
def test_grid(tokens, grid):
    assert attention.MixerShape(tokens, 1, 1, torch.float32).grid == grid


def test_slope():
    cubic = [(n, 5 * n**3) for n in (10, 1024, 4096, 16384, 99999)]
    cubic[0], cubic[-1] = (10, 7.0), (99999, 7.0)  # outside of what is fitted
    assert bench.slope(cubic) == pytest.approx(3)
    assert bench.slope([(1024, 3.0), (4096, 0.0)]) is None


@pytest.mark.slow
def test_command_writes_rows_and_a_plot(tmp_path, capsys):
    arguments = (
        "benchmark attention --mechanisms naive sdpa hydra --tokens 64 1024 16 1089 --heads 1 --dim 8 --dtype float32"
    )
    assert (
        cli.main([*arguments.split(), "--layout", "packed", "--repeats", "2", "--output", str(tmp_path / "cost.csv")])
        == 0
    )
    with (tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], int(row["tokens"])) for row in rows[::3]] == [
        (name, n) for name in ("forward", "forward + backward") for n in (16, 64, 1024, 1089)
    ]
    assert all(float(row["milliseconds"]) > 0 and row["layout"] == "packed" for row in rows)
    tables = {int(row["tokens"]): float(row["peak_mb"]) for row in rows[:12] if row["mechanism"] == "naive"}
    assert tables[1024] == pytest.approx(2 * 4, rel=0.01)  # two tables of a million float32
    assert float(rows[6]["memory_exponent"]) == pytest.approx(2, abs=0.05)
    assert {row["times_sdpa"] for row in rows if row["mechanism"] == "sdpa"} == {"1.0"}
    assert (tmp_path / "cost-float32.png").stat().st_size > 10_000
    assert "GFLOP/s" in capsys.readouterr().out


def test_what_does_not_fit_the_memory_is_left_out(monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr(bench.psutil, "virtual_memory", Little)
    rows = bench.measure(["naive", "hydra"], [attention.MixerShape(64, 1, 8, torch.float32)], False, 2)
    assert [row["mechanism"] for row in rows] == ["hydra"]
    assert rows[0]["times_sdpa"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mechanisms hydraa", "did you mean 'hydra'"),
        ("--tokens 0", "--tokens: expected a whole number of at least 1"),
        ("--repeats 0", "--repeats: expected a whole number of at least 1"),
        ("--output x.txt", "ends in .csv or .json"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert cli.main(["benchmark", "attention", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_plot_names_every_line_with_its_exponent(tmp_path):
    lines = [
        Line("softmax", [196, 1024], [0.5, 200.0], [0.0, 3000.0], 2.0, None, reference=True),
        Line("ELU", [196, 1024], [0.5, 2000.0], [0.5, 3.0], 1.07, 0.98),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        scaling({"forward": lines}, "Cost", "on a host", tmp_path / "plot.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "plot.svg").read_text())
    for text in (
        "softmax  2.00",
        "softmax",
        "ELU  1.07",
        "ELU  0.98",
        "Time, forward, logarithmic axes",
        "on a host",
        "224 px",
        "1 s",
        "1 GB",
    ):
        assert text in texts
    with pytest.raises(ValueError, match="no measurements"):
        scaling({}, "", "", tmp_path / "plot.svg")

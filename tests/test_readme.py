"""What README.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from effvit_zoo.attention import TOKEN_MIXERS

README = Path(__file__).resolve().parent.parent / "README.md"


def code_block(marker):
    """The Python block that follows an HTML comment."""
    found = re.search(rf"<!-- {marker} -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"README.md has no python block behind <!-- {marker} -->"
    return found.group(1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mechanism_example(monkeypatch, tmp_path):
    monkeypatch.setitem(TOKEN_MIXERS, "efficient", None)  # taken out again afterwards
    code = code_block("mechanism example")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    shown = {"__name__": "example"}
    exec(compile(code, str(tmp_path / "example.py"), "exec"), shown)
    model = shown["model"].eval()
    assert [type(block.attn).__name__ for block in model.blocks] == ["SoftmaxAttention"] * 3 + [
        "EfficientAttention"
    ] * 3
    assert shown["logits"].shape == (2, 10)

    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    weights = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            own = q[:, :, i].exp() / q[:, :, i].exp().sum(-1, keepdim=True)
            weights[:, :, i, j] = (own * k[:, :, j].exp() / k.exp().sum(2)).sum(-1)
    torch.testing.assert_close(shown["efficient_attention"](q, k, v), weights @ v)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))

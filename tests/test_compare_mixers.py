"""tools/compare_mixers.py on a handful of images: trains, exchanges, fine-tunes, and goes on where it was."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from effvit_zoo.attention import HydraAttention, SoftmaxAttention

TOOL = Path(__file__).resolve().parent.parent / "tools" / "compare_mixers.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_mixers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for shade, name in ((40, "dark"), (200, "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                values = torch.randint(shade - 30, shade + 30, (28, 28), generator=generator, dtype=torch.uint8)
                Image.fromarray(values.numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_whole_way(tool, photos, tmp_path, capsys):
    settings = f"data.root={photos} data.num_workers=0 train.epochs=1 train.batch_size=4 optim.warmup_epochs=0 train.trackers=[]"
    arguments = ["--output", str(tmp_path / "runs"), "--mixers", "hydra", "--set", *settings.split()]
    tool.main(arguments)
    table = capsys.readouterr().out
    assert "softmax" in table
    assert "(last 2)" in table
    model = timm.create_model(f"local-dir:{tmp_path / 'runs' / 'softmax-hydra' / 'best'}", pretrained=True)
    assert [type(block.attn) for block in model.blocks] == [SoftmaxAttention] * 4 + [HydraAttention] * 2
    before = (tmp_path / "runs" / "hydra" / "summary.json").stat().st_mtime_ns
    tool.main(arguments)
    assert (tmp_path / "runs" / "hydra" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("top1", "tuned", "met"), [(81.0, 79.0, True), (80.0, 79.0, False), (81.0, 78.0, False)])
def test_targets(tool, top1, tuned, met):
    summary = {"data": "photos", "images_per_second": 1.0}
    assert (
        tool.report({"softmax": {**summary, "top1": 81.0}, "elu": {**summary, "top1": top1}}, {"elu": {"top1": tuned}})
        == met
    )


def test_unknown_mechanism(tool):
    with pytest.raises(ValueError, match="did you mean 'hydra'"):
        tool.main(["--mixers", "hydro"])

"""README and docs: every bash and python block runs as it is printed, or the comment above it says why it can't.

A page's blocks run in order in a folder that has what the page assumes (photos, a trained run). Commands get further settings that make
them small, e.g. one epoch at 32 pixels; weights that would come from the Hub stay random. Comments in front of a block:

    <!-- not run: REASON -->    it is not executed here

A block with a title is the file of that name, which later blocks import or start.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm.models._builder
import torch
from PIL import Image
from runs import ROOT, make_photos

from effvit_zoo.attention import TOKEN_MIXERS
from effvit_zoo.cli import main
from effvit_zoo.commands import COMMANDS, Command
from effvit_zoo.commands import _index as index
from effvit_zoo.config import sections, settings
from effvit_zoo.export import TARGETS
from effvit_zoo.hub import folder
from effvit_zoo.pipelines import PIPELINES
from effvit_zoo.tasks import TASKS
from effvit_zoo.training._data_checks import ALLOW_IMAGES
from effvit_zoo.training.config import RunConfig, load_config

DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
TABLES = (TOKEN_MIXERS, TASKS, PIPELINES, TARGETS, COMMANDS)
TRAINED = ("inference", "browser", "export", "hub", "tosa", "target", "command", "reproducibility")
"""Names of pages that assume the run `runs/photos` of a small ViT, which another page trains."""

TINY = ["train.epochs=1", "train.batch_size=8", "train.trackers=[]"]
RUN = [*TINY, "model.pretrained=false", "data.num_workers=0", "data.img_size=32", "optim.warmup_epochs=0"]
LATER_STAGES = [f"{stage}.{setting}" for stage in ("selectors", "finetune") for setting in TINY]
DENSE = [*(f"dense.{setting}" for setting in TINY), "dense.optim.warmup_epochs=0"]
PIPELINE = ["data.root=photos", "data.num_workers=0", "data.img_size=32", *LATER_STAGES]
ATTENTION = [
    "--mechanisms",
    "sdpa",
    "hydra",
    "--tokens",
    "64",
    "128",
    "--repeats",
    "1",
    "--dtype",
    "float32",
    "--no-backward",
]
BACKBONES = [
    "--models",
    "swiftformer_xs",
    "--batch-sizes",
    "1",
    "--img-size",
    "64",
    "--train-batch",
    "0",
    "--repeats",
    "1",
]
SMALLER = {
    ("validate",): ["--workers", "0"],
    ("benchmark", "models"): ["--img-size", "64", "--repeats", "1"],
    ("benchmark", "attention"): ATTENTION,
    ("benchmark", "backbones"): BACKBONES,
    ("benchmark", "tosa"): ["--model", "effzoo_vit_pico", "--img-sizes", "32", "--repeats", "1", "--runtimes"],
}
"""First words of a command -> arguments that make it small."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    code: str
    comments: tuple[str, ...]

    @property
    def is_run(self):
        return not any(comment.startswith("not run: ") for comment in self.comments)

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    text = PAGES[page].read_text(encoding="utf-8")
    pattern = r"^((?:<!-- [^\n]+ -->\n)*)```(\w*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$"
    found = [*re.finditer(pattern, text, re.DOTALL | re.MULTILINE)]
    assert len(found) == len(re.findall("^```", text, re.MULTILINE)) / 2, f"{page}: a fence that is not understood"
    for match in found:
        comments = tuple(re.findall(r"<!-- (.+) -->", match[1]))
        code = re.sub(
            r"^--8<--\n(.+)\n--8<--$", lambda snippet: (ROOT / snippet[1]).read_text(), match[4], flags=re.MULTILINE
        )
        yield Block(page, text[: match.start(2)].count("\n") + 1, match[2], match[3] or "", code, comments)


RUNNING = [
    page for page in PAGES if any(block.is_run and block.language in ("bash", "python") for block in blocks(page))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos(Path("photos"), {"": {"blue": 10, "red": 10}})
        command = ["train", "--config", "finetune", "--output", "runs/photos", "--set", "model.name=effzoo_vit_pico"]
        assert main([*command, "data.root=photos", *RUN]) == 0
    return folder


@pytest.fixture
def page_folder(tmp_path, monkeypatch, request):
    """A function that makes the folder in which a page's commands run; what the page adds to tables is taken out afterwards."""
    before, modules = [dict(table) for table in TABLES], set(sys.modules)
    original = timm.models._builder.load_pretrained

    def load_pretrained(model, pretrained_cfg, *args, **kwargs):
        if pretrained_cfg.get("file") or str(pretrained_cfg.get("hf_hub_id")).startswith("ada/"):
            original(model, pretrained_cfg, *args, **kwargs)

    monkeypatch.setattr(timm.models._builder, "load_pretrained", load_pretrained)
    monkeypatch.setattr(folder, "_fetch_published", lambda name, kwargs: None)

    def make(page):
        for name in ("train.py", "validate.py", "configs"):
            (tmp_path / name).symlink_to(ROOT / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        if Path(page).stem in TRAINED:
            trained = request.getfixturevalue("trained")
            subprocess.run(["cp", "-r", trained / "photos", trained / "runs", tmp_path], check=True)
        else:
            make_photos(tmp_path / "photos", {"": {"blue": 10, "red": 10}})
        if "hub" in page:
            request.getfixturevalue("the_hub")
        (tmp_path / "new").mkdir()
        for place in ("new/1.jpg", "new/2.jpg", "photo.jpg"):
            Image.new("RGB", (40, 30), (200, 60, 40)).save(tmp_path / place)
        return tmp_path

    yield make
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_page(page, monkeypatch):
    names = {"__name__": "page"}
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.title:
            write_file(block)
        elif block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                run_line(block, shlex.split(line, comments=True), monkeypatch)
    return names


def write_file(block):
    path = Path(block.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code, encoding="utf-8")
    if path.parent.as_posix() == "effvit_zoo/commands":  # a new file of the package, and its name in the table
        spec = importlib.util.spec_from_file_location(f"effvit_zoo.commands.{path.stem}", path.resolve())
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        COMMANDS[path.stem] = Command(path.stem)


def run_line(block, words, monkeypatch):
    while words and re.fullmatch("[A-Z_]+=.*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    if not words:
        return
    if words[0] == "effzoo":
        assert main(smaller(words[1:])) == 0, f"{block}: {shlex.join(words)}"
    elif words[0] == "python" and words[1] in ("train.py", "validate.py"):
        assert main(smaller([words[1].removesuffix(".py"), *words[2:]])) == 0, f"{block}: {shlex.join(words)}"
    elif words[0] == "python" and Path(words[1]).is_file():
        monkeypatch.setattr(sys, "argv", [words[1], *smaller(words[2:])])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(words[1], run_name="__main__")
        assert stop.value.code == 0, f"{block}: {shlex.join(words)}"
    elif words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *words[1:]]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--set", *RUN], check=True, env=environment)
    else:
        pytest.fail(f"{block}: no rule runs {shlex.join(words)!r}, and no comment `not run: REASON` stands above it")


def smaller(arguments):
    """A command's arguments and those that make it small."""
    if "--dry-run" in arguments or "--help" in arguments:
        return arguments
    if "--config" in arguments or arguments[:1] == ["train"]:
        config = arguments[arguments.index("--config") + 1] if "--config" in arguments else "quickstart"
        if config.startswith("tosa/"):
            return [*arguments, "--set", *PIPELINE, *(() if "dense=null" in arguments else DENSE)]
        if config.endswith("probe.yaml"):
            return arguments
        names_images = len(arguments) > 1 and not arguments[1].startswith("-")
        is_given = names_images or any(word.startswith("data.root=") for word in arguments)
        data = () if is_given else ("data.root=photos",)
        sizes = ["augment.sizes=[32, 64]"] if any(word.startswith("augment.sizes=") for word in arguments) else []
        return [*arguments, "--set", *RUN, *sizes, *data]
    if arguments[:1] == ["validate"] and "--data" not in arguments:
        arguments = [*arguments, "--data", "photos"]
    return [*arguments, *next((more for words, more in SMALLER.items() if (*arguments[: len(words)],) == words), ())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", RUNNING)
def test_blocks_run(page, page_folder, monkeypatch):
    page_folder(page)
    run_page(page, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_known_kind(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "text"), f"{block}: language {block.language!r}"
        reasons = [comment.removeprefix("not run: ") for comment in block.comments if not block.is_run]
        assert all(len(reason) > 10 for reason in reasons)


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page, tmp_path):
    """Settings in running text, in commands and in YAML are settings of a run."""
    known = {row.key for row in settings(RunConfig)} | {ALLOW_IMAGES}
    text = PAGES[page].read_text(encoding="utf-8")
    heads = "|".join(sections(RunConfig))
    files = "|".join(
        [
            "py",
            "json",
            "safetensors",
            *(suffix[1:] for row in TARGETS.values() for suffix in (row.suffix, *row.companions)),
        ]
    )
    for key in re.findall(rf"[`\s']((?:{heads})\.(?!(?:{files})\b)[a-z_]+(?:\.[a-z_]+)*)(?==|`)", text):
        assert any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in known), key
    for block in blocks(page):
        if block.language == "yaml" and not block.title:
            (tmp_path / "config.yaml").write_text(block.code)
            load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    """mkdocs checks those within docs/."""
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_reference_has_everything():
    parts = load_reference().PARTS
    shown = parts["commands"]()
    assert all(f"## effzoo {name}\n" in shown for name in COMMANDS)
    assert all(f"| `{row.key}` |" in parts["settings"]() for row in settings(RunConfig))
    assert "| `finetune.task` | mapping | `{}` |" in parts["tosa"]()
    used = re.findall(r"<!-- generated: (\w+) -->", "".join(path.read_text() for path in PAGES.values()))
    assert sorted(used) == sorted(parts)


def test_the_model_table_has_every_model():
    shown = load_reference().models()
    assert all(f"| `{name}` |" in shown for name in timm.list_models("effzoo_*"))


def test_the_advice_quotes_published_numbers():
    """Rows of README's "Which model?": each model exists, and its top-1 is the published one."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Which model?")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "effzoo_" in line]
    assert len(rows) >= 4
    quoted = {}
    for row in rows:
        for name in re.findall(r"`(effzoo_\w+)`", row):
            weights = index.models()[name].get("weights")
            quoted[name] = quoted.get(name, False) or (bool(weights) and f"{weights[0]['top1']:.2f} %" in row)
    assert [name for name, found in quoted.items() if not found] == ["effzoo_cosformer_vit_pico"]
    known = index.models().values()
    top1 = {facts["model"]: facts["weights"][0]["top1"] or 0 for facts in known if facts.get("weights")}
    assert max(top1, key=top1.get) == "effzoo_swin_large_patch4_window12_384"
    small = {facts["model"] for facts in known if facts["params"] < 10e6}
    assert max(small & top1.keys(), key=top1.get) == "effzoo_edgenext_small"
    good = [facts for facts in known if top1.get(facts["model"], 0) > 75]
    assert min(good, key=lambda facts: facts["macs"])["model"] == "effzoo_efficientvit_b1"


def load_reference():
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "tools/docs_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mechanism_example_is_exact(page_folder, monkeypatch):
    page = "docs/extending/mechanism.md"
    page_folder(page)
    [code] = [block.code for block in blocks(page) if block.language == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    shown = run_page(page, monkeypatch)
    model = shown["model"].eval()
    mixers = [type(block.attn).__name__ for block in model.blocks]
    assert mixers == ["SoftmaxAttention"] * 3 + ["EfficientAttention"] * 3
    assert shown["logits"].shape == (2, 10)

    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    weights = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            own = q[:, :, i].exp() / q[:, :, i].exp().sum(-1, keepdim=True)
            weights[:, :, i, j] = (own * k[:, :, j].exp() / k.exp().sum(2)).sum(-1)
    torch.testing.assert_close(shown["efficient_attention"](q, k, v), weights @ v)
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))

#!/usr/bin/env python
"""The evidence for the default of fine-tuning: the same images and the same start weights, several ways, one row of results each.

    python tools/finetune_evidence.py run --data data --baselines fastai/bin/python --tree old=../old new=.
    python tools/finetune_evidence.py table

tools/finetune_data.py makes the data. Ways are `probe`, `fastai-8` and `fastai-20` (tools/finetune_baselines.py, by the interpreter that
--baselines names; by name also `fastai-20-batch-16`) and, for each checkout of this repository that --tree names, `effzoo train --config
finetune` of that checkout. What a run chooses, its best epoch say, it chooses on its validation images; the row is of the test images.
All computing is done in one process on one thread. Compare seconds of the processor, which other work on the machine hardly changes.

A row is appended to the results file at once, and a repeated command does what is missing. With `--judge spare` and a results file of
its own, settings (--set) are compared on images that are neither trained on nor tested.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from effvit_zoo.errors import OneLineParser, UserError, run_command, unknown_choice, whole
from effvit_zoo.measure.host import environment
from effvit_zoo.report.rows import print_table
from effvit_zoo.tasks._scores import macro_f1, wilson_interval

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "which way of fine-tuning on few images answers best, in what time"
RESULTS = ROOT / "results" / "finetune.jsonl"
BASELINES = {
    "probe": ["probe"],
    "fastai-8": ["fastai", "--epochs", "8"],
    "fastai-20": ["fastai", "--epochs", "20"],
    "fastai-20-batch-16": ["fastai", "--epochs", "20", "--batch-size", "16"],  # as one who knows would for few images
}
DEFAULT_WAYS = ("probe", "fastai-8", "fastai-20")
IMG_SIZES = {"emoji": 128, "stamps": 128, "fashion": 96}
"""Pixels that the network sees: few, so that three seeds of all are feasible on a processor."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

KEY = ("data", "size", "seed", "way", "judged_on")
"""What tells rows apart."""

Row = dict[str, Any]


class Case(NamedTuple):
    """What is learned from: a folder SIZE-SEED of a data set."""

    data: str
    size: int
    seed: int

    def folder(self, args: argparse.Namespace) -> Path:
        return args.data / self.data / f"{self.size}-{self.seed}"

    def judged(self, args: argparse.Namespace) -> Path:
        """The folder of the images that the row is of."""
        return args.data / self.data / "test" if args.judge == "test" else self.folder(args) / args.judge


class Answered(NamedTuple):
    """A way's answers.

    Attributes:
        answers: CLASS/FILE of each image -> class answered.
        figures: Measured beside them: cpu_seconds, seconds and whatever else belongs into the row.
    """

    answers: Mapping[str, str]
    figures: Row


class Difference(NamedTuple):
    """What a way has more than another.

    Attributes:
        points: Of top-1, in percent.
        error: Standard error of `points`.
        share: Its seconds of the processor over the other's.
    """

    points: float
    error: float
    share: float


def baseline(way: str, case: Case, args: argparse.Namespace) -> Answered:
    """Runs tools/finetune_baselines.py."""
    output = args.runs / "answers.json"
    command = [str(args.baselines), "tools/finetune_baselines.py", *BASELINES[way], "--model", str(args.data / "lite0")]
    command += ["--data", str(case.folder(args)), "--test", str(case.judged(args))]
    command += ["--img-size", str(IMG_SIZES[case.data]), "--seed", str(case.seed), "--output", str(output)]
    code = source(ROOT, "tools/finetune_baselines.py")
    timed(command, ROOT, args.runs / "log.txt")
    content = json.loads(output.read_text(encoding="utf-8"))
    output.unlink()
    return Answered(content.pop("answers"), {**content, "command": ["python", *command[1:-2]], **code})


def trained(way: str, case: Case, args: argparse.Namespace) -> Answered:
    """Runs `effzoo train` of a checkout, and asks its best model."""
    from effvit_zoo.evaluation.prediction import predict

    tree, run = args.tree[way], args.runs / f"{way}-{case.data}-{case.size}-{case.seed}"
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"model.name=local-dir:{args.data / 'lite0'}", f"data.root={case.folder(args)}", *args.set]
    settings += [f"data.img_size={IMG_SIZES[case.data]}", "data.num_workers=0", f"train.seed={case.seed}"]
    train = ["train", "--config", "finetune", "--set", *settings, "train.trackers=[]"]
    code = source(tree, "configs/finetune.yaml")
    times = timed([sys.executable, "-m", "effvit_zoo", *train, "--output", str(run)], tree, args.runs / "log.txt")
    images = sorted(case.judged(args).glob("*/*"))
    found = zip(images, predict(run / "best", images, topk=1), strict=True)
    answers = {f"{path.parent.name}/{path.name}": prediction.rows[0]["label"] for path, prediction in found}
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return Answered(answers, {**times, "command": ["effzoo", *train], **code})


def timed(command: Sequence[str], tree: Path, log: Path) -> Row:
    """Runs a command of a checkout; seconds of the processor, its child processes included, and of the wall."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        environ = os.environ | ONE_THREAD | {"PYTHONPATH": str(tree)}
        process = subprocess.Popen(command, cwd=tree, stdout=file, stderr=subprocess.STDOUT, env=environ)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise UserError(f"{shlex.join(command)} ended with code {process.returncode} and said: {said[-1]}")
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "seconds": time.perf_counter() - started}


def source(tree: Path, file: str) -> Row:
    """Which code ran: the commit of a checkout, marked where files differ from it, and the hash of the file that decides."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=True).stdout

    changed = "+changes" if git("status", "--porcelain", "--", "effvit_zoo", "tools", "configs") else ""
    digest = hashlib.sha256((tree / file).read_bytes()).hexdigest()[:12]
    return {"commit": git("rev-parse", "HEAD").strip() + changed, "config": {"file": file, "sha256": digest}}


def as_row(way: str, case: Case, answered: Answered, args: argparse.Namespace) -> Row:
    """The row of results; `hits` has a 1 for each image that was answered rightly, else a 0, in the order of CLASS/FILE."""
    folder = case.folder(args)
    names = sorted(path.name for path in (folder / "train").iterdir())
    pairs = [(image.partition("/")[0], answer) for image, answer in sorted(answered.answers.items())]
    cells = [[names.index(true), names.index(given), count] for (true, given), count in Counter(pairs).items()]
    share = fmean(true == given for true, given in pairs)
    host, figures = environment(), dict(answered.figures)
    versions = host["versions"] | figures.pop("versions", {})
    return {
        "question": QUESTION,
        **case._asdict(),
        "way": way_name(way, args),
        "judged_on": args.judge,
        "top1": round(100 * share, 3),
        "top1_interval": [round(100 * end, 1) for end in wilson_interval(share, len(pairs))],
        "macro_f1": round(macro_f1(cells), 3),
        "cpu_seconds": round(figures.pop("cpu_seconds"), 1),
        "seconds": round(figures.pop("seconds"), 1),
        "images": {part: len(list((folder / part).glob("*/*"))) for part in ("train", "val")} | {"judged": len(pairs)},
        "classes": len(names),
        "img_size": IMG_SIZES[case.data],
        "command": shlex.join(figures.pop("command")).replace(str(args.data), "data"),
        **figures,
        "host": {"processor": host["processor"], "platform": host["platform"], **versions},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hits": "".join(str(int(true == given)) for true, given in pairs),
    }


def run(args: argparse.Namespace) -> None:
    """Makes the missing rows, one after the other."""
    args.data, args.runs, args.results = args.data.resolve(), args.runs.resolve(), args.results.resolve()
    args.runs.mkdir(parents=True, exist_ok=True)
    args.tree = dict(tree_of(text) for text in args.tree)
    ways = args.ways or [*DEFAULT_WAYS, *args.tree]
    for way in ways:
        if way not in BASELINES and way not in args.tree:
            raise unknown_choice("way", way, [*BASELINES, *args.tree])
        if way in BASELINES and args.baselines is None:
            raise UserError(
                f"{way} needs --baselines PYTHON, the interpreter of an environment with fastai and scikit-learn"
            )
    if args.baselines is not None:
        args.baselines = args.baselines.absolute()  # not resolved: an environment's interpreter is a link
    made = 0
    for case in cases(args):
        for way in ways:
            wanted = (*case, way_name(way, args), args.judge)
            if any(tuple(row[key] for key in KEY) == wanted for row in read(args.results)):
                continue
            answered = (trained if way in args.tree else baseline)(way, case, args)
            row = as_row(way, case, answered, args)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(", ".join(f"{key} {row[key]}" for key in (*KEY, "top1", "cpu_seconds")), flush=True)
            made += 1
            if made == args.limit:
                return


def tree_of(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name.isidentifier() or name in BASELINES or not Path(folder, "configs", "finetune.yaml").is_file():
        raise UserError(f"--tree {text}: expected NAME=FOLDER, the name of a way and a checkout of this repository")
    return name, Path(folder).resolve()


def cases(args: argparse.Namespace) -> list[Case]:
    """The folders SIZE-SEED that were made and asked for, the first seed of all before the second."""
    found = [Case(folder.parent.name, *map(int, folder.name.split("-"))) for folder in args.data.glob("*/*-*")]
    wanted = [
        case
        for case in found
        if case.data in IMG_SIZES
        and case.seed in args.seeds
        and (not args.cases or f"{case.data}/{case.size}" in args.cases)
    ]
    if not wanted:
        raise UserError(
            f"{args.data} holds none of the data that was asked for, expected what tools/finetune_data.py makes"
        )
    return sorted(wanted, key=lambda case: (case.seed, case.size, case.data))


def way_name(way: str, args: argparse.Namespace) -> str:
    """A checkout's way with the settings that differ from its default."""
    return " ".join([way, *args.set]) if way in args.tree else way


def read(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} holds a line that is no JSON: {error}") from None


def table(args: argparse.Namespace) -> None:
    """Prints means over seeds, then what the last way named has more than each other one, on the same images."""
    rows = [row for row in read(args.results) if row["judged_on"] == args.judge]
    if not rows:
        raise UserError(f"{args.results} holds no rows judged on {args.judge} images, expected those of `run`")
    ways = args.ways or list(dict.fromkeys(row["way"] for row in rows))
    groups: dict[tuple[str, int], dict[str, list[Row]]] = defaultdict(lambda: {way: [] for way in ways})
    for row in sorted(rows, key=lambda row: (row["data"], row["size"])):
        groups[row["data"], row["size"]].setdefault(row["way"], []).append(row)
    for group in groups.values():
        seeds = [{row["seed"] for row in group[way]} for way in ways if group[way]]
        shared = set.intersection(*seeds) if seeds else set()
        group |= {way: [row for row in group[way] if row["seed"] in shared] for way in ways}
    print("top-1 in percent, mean over the seeds that all ways have (macro-F1; seconds of the processor; seeds)")
    cells = [[data, str(size), *(mean_cell(group[way]) for way in ways)] for (data, size), group in groups.items()]
    print_table(["data", "a class", *ways], cells, right=range(1, len(ways) + 2))
    *others, last = ways
    if not others:
        return
    print(
        f"\n{last} minus each other way, in points of top-1 on the same images, +- standard error (share of its seconds)"
    )
    found = {case: [difference(group[last], group[way]) for way in others] for case, group in groups.items()}
    lines = [[data, str(size), *map(difference_cell, found[data, size])] for data, size in groups]
    means = [pooled({case: found[case][index] for case in groups}) for index in range(len(others))]
    print_table(
        ["data", "a class", *others],
        [*lines, ["mean", "", *map(difference_cell, means)]],
        right=range(1, len(ways) + 1),
    )


def mean_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    top1, f1, seconds = (fmean(row[key] for row in rows) for key in ("top1", "macro_f1", "cpu_seconds"))
    return f"{top1:.1f} ({f1:.1f}; {seconds:.0f} s; {len(rows)})"


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Difference | None:
    """Mean difference in points over the seeds that both have, its standard error over images, and the ratio of seconds.

    Each image's difference is its mean over seeds, since the seeds are judged on the same images.
    """
    mine, other = ({row["seed"]: row for row in rows} for rows in (ours, theirs))
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    per_seed = [
        [int(a) - int(b) for a, b in zip(mine[seed]["hits"], other[seed]["hits"], strict=True)] for seed in seeds
    ]
    per_image = [fmean(values) for values in zip(*per_seed, strict=True)]
    seconds = [fmean(rows[seed]["cpu_seconds"] for seed in seeds) for rows in (mine, other)]
    error = stdev(per_image) / math.sqrt(len(per_image))
    return Difference(100 * fmean(per_image), 100 * error, seconds[0] / seconds[1])


def pooled(differences: Mapping[tuple[str, int], Difference | None]) -> Difference | None:
    """The mean over data sets and sizes, each of which counts once; of the shares of seconds the geometric mean.

    All sizes of a data set are judged on the same images, so their errors are added as if they went together.
    """
    found = {case: one for case, one in differences.items() if one is not None}
    if not found:
        return None
    errors: dict[str, float] = defaultdict(float)
    for (data, _), one in found.items():
        errors[data] += one.error
    error = math.hypot(*errors.values()) / len(found)
    share = math.exp(fmean(math.log(one.share) for one in found.values()))
    return Difference(fmean(one.points for one in found.values()), error, share)


def difference_cell(found: Difference | None) -> str:
    return "-" if found is None else f"{found.points:+.1f} +- {found.error:.1f} (x {found.share:.2f})"


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|table")
    running = commands.add_parser("run", help="make the rows that are missing")
    running.add_argument("--data", type=Path, default=Path("data"), help="of tools/finetune_data.py (default: data)")
    running.add_argument("--baselines", type=Path, metavar="PYTHON", help="interpreter with fastai and scikit-learn")
    running.add_argument("--tree", nargs="+", default=[], metavar="NAME=FOLDER", help="checkouts whose default is run")
    running.add_argument("--cases", nargs="+", metavar="DATA/SIZE", help="e.g. emoji/40 (default: all there are)")
    running.add_argument("--seeds", nargs="+", type=whole(0), default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    running.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="settings of the checkouts' runs"
    )
    running.add_argument("--limit", type=whole(1), metavar="N", help="end after N new rows")
    running.add_argument("--runs", type=Path, default=Path("runs/finetune"), help="run folders (default: %(default)s)")
    for command in (running, commands.add_parser("table", help="print what the rows say")):
        command.add_argument("--ways", nargs="+", metavar="WAY", help="in this order (default: all)")
        command.add_argument("--judge", choices=("test", "spare"), default="test", help="images (default: test)")
        command.add_argument("--results", type=Path, default=RESULTS, help="(default: results/finetune.jsonl)")
    args = parser.parse_args()
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    raise SystemExit(run_command(main))

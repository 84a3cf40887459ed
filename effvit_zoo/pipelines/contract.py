"""The contract of a pipeline: stages that are runs of the one engine, each with a folder and a config of its own.

    OUTPUT/config.yaml        the pipeline's config
    OUTPUT/NAME.yaml          a stage's config, which anyone may read and run
    OUTPUT/NAME/              its run folder
    OUTPUT/report.html        the report of all stages

A stage is done when its summary.json exists, so a pipeline resumes wherever it was cut.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import config as strict
from .. import run_folder
from ..errors import UserError, unknown_choice
from ..tasks import Section
from ..training._processes import process_state
from ..training.config import RunConfig
from ..training.run import Adapt, train
from ._report import write_pipeline_report


@dataclass(frozen=True)
class Stage:
    """A row of a pipeline.

    Attributes:
        name: Name on the command line and of its section in the config.
        folder: Run folder in the output folder.
        run_config: (pipeline's config, output folder) -> the stage's config, None where it isn't wanted.
        adapt: Pipeline's config -> what the stage makes of the run's objective.
        reads: Model folder in the output folder that the stage starts from; None for the config's model.
        hand_on: (output folder, pipeline's config) -> None, after the stage, or in its place where it isn't wanted: makes what later
            stages read, unless it is there. On the main process.
        has_metric: The stage trains for the task's metric; the report shows the metric of such stages only.
    """

    name: str
    folder: str
    run_config: Callable[[Any, Path], RunConfig | None]
    adapt: Callable[[Any], Adapt]
    reads: str | None = None
    hand_on: Callable[[Path, Any], None] | None = None
    has_metric: bool = True


@dataclass(frozen=True)
class Pipeline:
    """A row of `PIPELINES`.

    Attributes:
        name: Value of the key `pipeline` in a config.
        Config: Dataclass of the config.
        stages: In order.
        conclude: (output folder, config) -> None, after the last stage, on the main process: writes the pipeline's summary.
        benchmark: Name of the benchmark that compares what the stages made; the command runs it afterwards. None for none.
    """

    name: str
    Config: type
    stages: tuple[Stage, ...]
    conclude: Callable[[Path, Any], None]
    benchmark: str | None = None

    def load(self, path: str | Path, overrides: Sequence[str] = ()) -> Any:
        """Reads the YAML, applies `section.key=value` overrides and validates it, the stages' configs included. Raises `UserError`."""
        content = strict.read_yaml(path)
        strict.apply_overrides(content, overrides)
        config: Any = strict.parse(self.Config, content)
        for stage in self.stages:
            stage.run_config(config, Path())
        return config

    def train(
        self,
        config_path: str | Path,
        overrides: Sequence[str] = (),
        output: str | Path | None = None,
        resume: str | None = None,
        stage: str | None = None,
    ) -> Path:
        """Runs the stages that are not done yet and returns the output folder.

        Args:
            config_path: YAML of the pipeline.
            overrides: `section.key=value` settings that override the file's.
            output: Output folder; None for `runs/NAME-OF-CONFIG`.
            resume: "auto" resumes in an output folder that holds a run; None expects a new one.
            stage: Run this stage alone (those before it must be done).

        Raises:
            UserError: For bad input of any kind; what is on disk stays as it was.
        """
        names = [row.name for row in self.stages]
        if stage is not None and stage not in names:
            raise unknown_choice("stage", stage, names)
        config = self.load(config_path, overrides)
        folder = Path(output) if output is not None else Path("runs") / Path(config_path).stem
        self._claim(folder, config, resume, stage)
        try:
            self._run_stages(folder, config, stage)
            if stage in (None, names[-1]):
                on_main_process(lambda: self.conclude(folder, config))
                on_main_process(lambda: self.report(folder))
        except (Exception, KeyboardInterrupt, SystemExit):
            if process_state().is_main_process:
                with contextlib.suppress(OSError, UserError):  # a full disk may be why it ends
                    self.report(folder, "Interrupted. This continues it:")
            raise
        return folder

    def _run_stages(self, folder: Path, config: Any, only: str | None) -> None:
        for row in self.stages:
            run_config = row.run_config(config, folder)
            if run_config is not None and only not in (None, row.name):
                continue
            status = f"Not finished: stage {row.name}. If it was interrupted, this continues it:"
            on_main_process(partial(self.report, folder, status))
            if run_config is not None and not is_done(folder / row.folder):
                _run(row, run_config, folder, config)
            if row.hand_on is not None:
                on_main_process(partial(row.hand_on, folder, config))

    def report(self, folder: Path, status: str = "", sections: Sequence[Section] = ()) -> None:
        """Writes report.html of the output folder: one page for all stages.

        Args:
            folder: Output folder.
            status: Why the pipeline is not finished, "" if it is.
            sections: What compares the models that it made; the first opens the page.
        """
        config = self.load(folder / run_folder.CONFIG)
        stages = [row for row in self.stages if row.run_config(config, folder) is not None]
        title = f"{self.name}: {config.model.name} on {config.data.root}"
        write_pipeline_report(folder, title, stages, status, _continues(folder) if status else "", sections)

    def _claim(self, folder: Path, config: Any, resume: str | None, stage: str | None) -> None:
        """Writes the config into the output folder, or makes sure that the one there is the same."""
        recorded = folder / run_folder.CONFIG
        if resume not in (None, "auto"):
            raise UserError(f"--resume {resume}: a pipeline resumes in its --output folder, expected auto")
        if recorded.is_file() and self._has_results(folder):
            if resume is None and stage is None:
                raise UserError(f"{folder} already holds a run: resume it with --resume auto, or name another --output")
            changed = strict.changed_keys(self.load(recorded), config)
            if changed:
                names = ", ".join(changed)
                raise UserError(f"{folder} was started with other settings of {names}: resume with the same")
            return
        if not recorded.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not a pipeline's folder: name another --output")
        process_state().wait_for_everyone()
        on_main_process(lambda: run_folder.write_text(recorded, strict.dump(config)))

    def _has_results(self, folder: Path) -> bool:
        """Whether a stage has got to its first checkpoint, or has handed on a model."""
        runs = any(run_folder.is_taken(folder / row.folder) for row in self.stages)
        return runs or any((folder / row.reads / run_folder.MODEL_CONFIG).is_file() for row in self.stages if row.reads)


def _run(stage: Stage, run_config: RunConfig, folder: Path, config: Any) -> None:
    if stage.reads is not None and not (folder / stage.reads / run_folder.MODEL_CONFIG).is_file():
        raise UserError(f"stage {stage.name} needs the model in {folder / stage.reads}: run the stages before it")
    plan = folder / f"{stage.folder}.yaml"
    on_main_process(lambda: run_folder.write_text(plan, strict.dump(run_config)))
    again = _continues(folder)
    train(plan, output=folder / stage.folder, resume="auto", adapt=stage.adapt(config), again=again)
    process_state().wait_for_everyone()


def _continues(folder: Path) -> str:
    """The command that continues a pipeline."""
    config, output = shlex.quote(str(folder / run_folder.CONFIG)), shlex.quote(str(folder))
    return f"effzoo train --config {config} --output {output} --resume auto"


def is_done(run: Path) -> bool:
    """Whether a stage's run is finished."""
    return (run / run_folder.SUMMARY).is_file()


def on_main_process(action: Callable[[], None]) -> None:
    """Runs something on the main process; the others wait."""
    state = process_state()
    if state.is_main_process:
        action()
    state.wait_for_everyone()

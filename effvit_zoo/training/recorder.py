"""What a run leaves behind after every epoch: model folders, metrics, and uploads where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .. import hub, run_folder
from ..data import Feed
from ..errors import UserError
from ..tasks import Evaluation, Task, card_facts
from .config import RunConfig


class Recorder:
    """Writes into a run folder; used by the main process only.

    Args:
        task: Labels and metrics.
        feed: Preprocessing and the record of the data.
        config: The run's config.
        folder: The run folder.
    """

    def __init__(self, task: Task, feed: Feed, config: RunConfig, folder: Path) -> None:
        self.task, self.feed, self.config, self.folder = task, feed, config, folder

    def record(
        self,
        model: nn.Module,
        history: Sequence[dict[str, Any]],
        result: Evaluation,
        is_best: bool,
    ) -> None:
        """Saves the model as `last/`, as `best/` if it is, and a linear probe, which is epoch 0, as `probe/`; writes metrics.csv; uploads
        where wanted.

        Args:
            model: The validated model.
            history: A row per epoch, the last one included.
            result: Evaluation of the last epoch.
            is_best: It improves on all before it.
        """
        is_probe = history[-1]["epoch"] == 0
        places = {run_folder.PROBE: is_probe, run_folder.BEST: is_best, run_folder.LAST: True}
        for name in (name for name, is_written in places.items() if is_written):
            hub.save(
                model,
                self.folder / name,
                label_names=self.task.label_names,
                data_config=self.feed.data_config,
                extra={
                    "task": self.config.task.kind,
                    **{key: value for key, value in result.metrics.items() if key != "loss"},
                    "epoch": history[-1]["epoch"],
                    "data": self.feed.splits.record,
                },
            )
        run_folder.write_text(self.folder / run_folder.METRICS, run_folder.as_csv(history))
        push = self.config.hub.push
        if is_best and push is not None and self.config.hub.push_every_best:
            try:
                tqdm.write(f"uploaded: {hub.push(self.folder / run_folder.BEST, push, card_facts)}")
            except UserError as error:
                tqdm.write(f"not uploaded, training continues: {error}")

"""What is learned: data, loss, evaluation and presentation of one kind of task each."""

from .config import ClassificationConfig


class _Classification:
    Config = ClassificationConfig


TASKS = {"classification": _Classification}

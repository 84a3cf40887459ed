"""What a run can be told about its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str = "builtin:fashion-mnist-mini"
    """A folder of images, `builtin:fashion-mnist-mini`, `builtin:fashion-mnist`, or a timm data set such as `hfds/NAME`."""
    train_split: str = "train"
    val_split: str = "auto"
    """`auto`: the folder's or data set's own validation split, else `val_fraction` of the training images, by `split_seed`."""
    val_fraction: float = 0.1
    split_seed: int = 0
    """Seed of the choice of held-out validation images, independent of `train.seed`."""
    img_size: int | tuple[int, int] | None = None
    """Pixels, a side or (height, width). None: what the model was made for."""
    crop_pct: float | None = None
    """Share of the resized image that validation looks at. None: what the model's weights were validated with."""
    num_workers: int | None = None
    """Loader processes. None: one per core that this process may use, at most 8."""
    on_bad_file: Literal["skip", "raise"] = "skip"
    """`skip`: an unreadable file is reported once, replaced by its neighbour in training and left out of validation."""
    check_duplicates: bool | None = None
    """Look for validation files that are training files too. None: in folders of up to 50,000 files, because each is read."""

    def __post_init__(self) -> None:
        sides = self.img_size if isinstance(self.img_size, tuple) else (1 if self.img_size is None else self.img_size,)
        if min(sides) <= 0:
            raise ValueError(f"img_size must be positive, got {self.img_size}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be >= 0, got {self.num_workers}")

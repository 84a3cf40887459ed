"""Settings of the data: which images, which split, at which size."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..config import section

Pixels = Annotated[int, Field(ge=1)]


@section
class DataConfig:
    """Images, their split into training and validation, and their size."""

    root: str = "builtin:fashion-mnist-mini"
    """Folder of images, `builtin:fashion-mnist-mini`, `builtin:fashion-mnist`, or a timm data set such as `hfds/NAME`."""
    labels: str | None = None
    """Table of labels (.csv or .tsv with columns `path`, `label` and perhaps `split`) for the images below `root`; null where folders are
    classes."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "auto"
    """Name of the validation split; `auto` for the one of the folder or data set, or else `val_fraction` of the training images."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images held out for validation where the data has no validation split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the held-out split; independent of `train.seed`."""
    img_size: Pixels | tuple[Pixels, Pixels] | None = None
    """Image size in pixels, a side or [height, width]; null for the model's own."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the resized image's side that validation crops from its center; null for the value that belongs to the model."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Number of loader processes; null for one per available core, at most 8."""
    cache: bool | Annotated[int, Field(ge=1)] | None = None
    """Decoded images are kept in memory: null where all of them fit into 2 GB and a quarter of the free memory, true for as many as do,
    false for none, or as many as fit into so many megabytes."""
    on_bad_file: Literal["skip", "raise"] = "skip"
    """Handling of unreadable files; `skip` reports each once, trains on its neighbour instead and leaves it out of validation."""
    check_duplicates: bool | None = None
    """Search for validation files that are also training files, which reads every file; null for folders of up to 50,000 files."""

"""The weights that belong to registered names: what can be had, and whether the Hub still has it as the configs say.

Accuracies are ImageNet-1k top-1 in percent from `assets/published.csv`, each with its source: timm's own evaluation of the very file
(results-imagenet.csv of timm's repository), else what the authors state.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, get_session, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from timm.models import PretrainedCfg

from ..errors import UserError, unknown_choice
from ..measure import cost
from .client import FAILURES, explain, is_intact, make_api, quiet, require_answer
from .folder import WEIGHTS_FILES

ACCURACIES = Path(__file__).parent.parent / "assets" / "published.csv"
SIZE_RANGE = (0.95, 1.1)
"""A file holds the parameters and little else: headers, and in older ones tables that are computed today."""


def published(pattern: str | None = None) -> list[dict[str, Any]]:
    """The weights of all `effzoo_*` models as rows.

    Args:
        pattern: Part of a `model.tag` name, or a pattern with * and ?.

    Returns:
        weights (`model.tag`), top1 and its source, license, bytes (of the parameters, float32), from (Hub id or address).

    Raises:
        UserError: Nothing matches.
    """
    return [
        {
            "weights": name,
            "top1": accuracies().get(name, {}).get("top1"),
            "top1_source": accuracies().get(name, {}).get("source"),
            "license": cfg.license,
            "bytes": _payload(name),
            "from": _place(cfg),
        }
        for name, cfg in _matching(pattern)
    ]


def check(pattern: str | None = None) -> Iterator[dict[str, Any]]:
    """Asks the Hub for the weights of all `effzoo_*` models, one row per place, as the answers come.

    Args:
        pattern: As in `published`.

    Yields:
        weights, from, file, bytes, sha256, license (the Hub's), cached ("intact", "damaged", "another version" or None where
        there is no copy on this machine), problems (a list; empty if all is as it should be).

    Raises:
        UserError: Nothing matches, or the Hub doesn't answer at all.
    """
    places: dict[str, tuple[str, PretrainedCfg]] = {}
    for name, cfg in _matching(pattern):
        places.setdefault(_place(cfg), (name, cfg))
    require_answer("the check of published weights")
    api = make_api()
    for place, (name, cfg) in places.items():
        try:
            with quiet():
                found, problems = _on_hub(api, cfg) if cfg.hf_hub_id else _elsewhere(place)
        except FAILURES as error:
            found, problems = {}, [explain(error)]
        size, expected = found.get("bytes"), _payload(name)
        largest = SIZE_RANGE[1] if cfg.hf_hub_id else float("inf")  # checkpoints elsewhere may hold an optimizer too
        if size is not None and not SIZE_RANGE[0] <= size / expected <= largest:
            problems.append(f"has {size / 1e6:.1f} MB, expected about {expected / 1e6:.1f}")
        if cfg.hf_hub_id and found and found["license"] != cfg.license:
            problems.append(f"licence is {found['license'] or 'not stated'}, expected {cfg.license}")
        facts = {key: found.get(key) for key in ("file", "bytes", "sha256", "license", "cached")}
        yield {"weights": name, "from": place, **facts, "problems": problems}


def _matching(pattern: str | None) -> list[tuple[str, PretrainedCfg]]:
    names = timm.list_models("effzoo_*", pretrained=True)
    if pattern is not None:
        form = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
        known, names = names, [name for name in names if fnmatch(name, form)]
        if not names:
            raise unknown_choice("weights", pattern, known)
    found = [(name, timm.models.get_pretrained_cfg(name)) for name in names]
    return [(name, cfg) for name, cfg in found if cfg is not None]


def _place(cfg: PretrainedCfg) -> str:
    return str(cfg.hf_hub_id or cfg.url)


@cache
def accuracies() -> dict[str, dict[str, Any]]:
    """`model.tag` -> ImageNet-1k top-1 in percent and its source ("timm" or "authors")."""
    with ACCURACIES.open(encoding="utf-8", newline="") as file:
        return {row["weights"]: row | {"top1": float(row["top1"])} for row in csv.DictReader(file)}


def _payload(name: str) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cost.skeleton(name).state_dict().values())


def _on_hub(api: HfApi, cfg: PretrainedCfg) -> tuple[dict[str, Any], list[str]]:
    """What the Hub says of a repository's weights file, and what is wrong with it."""
    repo, _, revision = str(cfg.hf_hub_id).partition("@")
    try:
        info = api.model_info(repo, revision=revision or None, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        return {}, [explain(error)]
    wanted = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHTS_FILES
    file = _file(info, wanted)
    license = info.card_data.get("license") if info.card_data else None
    if file is None:
        return {"license": license}, [f"has no {' or '.join(wanted)}"]
    digest = file.lfs.sha256 if file.lfs else None
    found = {"file": file.rfilename, "bytes": file.size, "sha256": digest, "license": license}
    cached = _cached(repo, file.rfilename, digest)
    return found | {"cached": cached}, ["the copy in the cache is damaged"] if cached == "damaged" else []


def _file(info: ModelInfo, names: tuple[str, ...]) -> RepoSibling | None:
    there = {file.rfilename: file for file in info.siblings or ()}
    return next((there[name] for name in names if name in there), None)


def _cached(repo: str, name: str, digest: str | None) -> str | None:
    path = try_to_load_from_cache(repo, name)
    if not isinstance(path, str):
        return None
    if not is_intact(Path(path)):
        return "damaged"
    return "intact" if digest in (None, Path(path).resolve().name) else "another version"


def _elsewhere(url: str) -> tuple[dict[str, Any], list[str]]:
    """What a plain address says of a weights file."""
    response = get_session().head(url, follow_redirects=True, timeout=30)
    if response.status_code != 200:
        return {}, [f"answers HTTP {response.status_code}"]
    length = response.headers.get("Content-Length")
    return {"file": url.rpartition("/")[2], "bytes": int(length) if length else None}, []


def require_sound(rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` if a row of `check` has problems."""
    bad = [row["weights"] for row in rows if row["problems"]]
    if bad:
        raise UserError(f"{len(bad)} of {len(rows)} published weights are not as they should be: {', '.join(bad)}")

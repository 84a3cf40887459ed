"""`effzoo info`: what is known of one model without loading its weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from timm.data import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_model_input_config, model_entrypoint

from .. import hub
from ..measure import cost
from ..report.rows import print_table, shown
from ..run_folder import EXTRA_KEY
from ._arguments import MODEL_HELP
from ._registry import family

HELP = "show details of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> None:
    facts = model_facts(args.model)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print_table([], [[key.replace("_", " "), _as_text(key, value)] for key, value in facts.items()])


def model_facts(name: str) -> dict[str, Any]:
    """What is known of a model without its weights: from its registration, its config and its structure.

    Facts that are not recorded anywhere are left out. Raises `UserError` as `hub.load` does.
    """
    resolved = hub.resolve_name(name)
    model: Any = hub.load(name, pretrained=False, device="meta")
    cfg, data = model.pretrained_cfg, resolve_model_data_config(model)
    architecture = cfg["architecture"]
    own = hub.brings_weights(resolved)  # then accuracy, licence and places of published weights are not the model's
    config = hub.read_config(resolved) if own else {}
    facts = {
        "model": resolved,
        "architecture": architecture,
        "family": family(architecture),
        "description": None if own else _first_paragraph(model_entrypoint(architecture).__doc__),
        "params": cost.count_params(model),
        "macs": cost.count_macs(model),
        "input_size": [*data["input_size"]],
        "any_input_size": not get_model_input_config(model)["fixed_input_size"],
        "mean": [*data["mean"]],
        "std": [*data["std"]],
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        "num_classes": model.num_classes,
        "labels": [*(hub.label_names(model) or ())],
        "num_features": model.num_features,
        "features": [
            {"module": info["module"], "channels": info["num_chs"], "stride": info["reduction"]}
            for info in getattr(model, "feature_info", [])
        ],
        "paper": _papers(cfg.get("paper_ids")),
        "paper_title": cfg.get("paper_name"),
        "code": cfg.get("origin_url"),
        "license": cfg.get("license"),
        "measured": config.get(EXTRA_KEY),
        "weights": [
            {"tag": known.tag, "from": known.hf_hub_id or known.url or known.file, "license": known.license}
            for known in get_arch_pretrained_cfgs(architecture).values()
            if known.has_weights and not own
        ],
    }
    return {key: value for key, value in facts.items() if value not in (None, [], {}, "")}


def _papers(ids: Any) -> list[str]:
    """Addresses of paper ids such as `arXiv:2303.15446`."""
    listed = [ids] if isinstance(ids, str) else ids or []
    return [f"https://arxiv.org/abs/{text.partition(':')[2]}" if text.startswith("arXiv:") else text for text in listed]


def _first_paragraph(doc: str | None) -> str | None:
    return " ".join(doc.strip().split("\n\n")[0].split()) if doc else None


def _as_text(key: str, value: Any) -> str:
    """A fact for people."""
    if key == "params":
        return f"{value / 1e6:.2f} M"
    if key == "macs":
        return f"{value / 1e9:.3f} G"
    if key == "input_size":
        return shown(value)
    if key == "labels":
        return ", ".join(value[:10]) + (f", ... ({len(value)} in all)" if len(value) > 10 else "")
    if key == "features":
        return "\n".join(f"{f['module']}: {f['channels']} channels, stride {f['stride']}" for f in value)
    if key == "weights":
        return "\n".join(
            f"{w['tag'] or 'default'}: {w['from']}" + (f" ({w['license']})" if w["license"] else "") for w in value
        )
    if isinstance(value, dict):
        return "\n".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

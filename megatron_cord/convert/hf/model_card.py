"""The model card of an exported directory: what was trained, how and from what; never the original model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "README.md"


def without_cards(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return auxiliary files without the original model's card, which is about other weights."""
    return {name: content for name, content in files.items() if not name.lower().startswith("readme")}


def model_card(
    name: str, checkpoint: Path, step: int, settings: Mapping[str, Any], original: bytes | None, dtype: str
) -> bytes:
    """Return the card.

    Args:
        name: of the exported directory.
        checkpoint: that was exported.
        step: after which the run saved it.
        settings: the run's configuration; empty for weights that no run has trained.
        original: the original model's card, for its licence.
        dtype: of the weights.
    """
    base = str(_setting(settings, "model", "checkpoint") or "")
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["megatron_cord"]}
    if base.startswith("hf://"):
        head["base_model"] = base.removeprefix("hf://").split("@")[0]
    if (licence := _licence(original)) is not None:
        head["license"] = licence  # weights made from others stay under their terms
    lines = ["---", yaml.safe_dump(head, sort_keys=True).strip(), "---", "", f"# {name}", ""]
    lines += _trained(checkpoint, step, settings, base) if settings else _converted(checkpoint)
    lines += [
        "",
        f"Exported in {dtype} by megatron_cord {version('megatron_cord')}. Its limits are not described yet.",
    ]
    return ("\n".join(lines) + "\n").encode()


def _trained(checkpoint: Path, step: int, settings: Mapping[str, Any], base: str) -> list[str]:
    teacher = _setting(settings, "teacher", "checkpoint")
    rows = {
        "from": f"`{base}`",
        "data": _data(_setting(settings, "data", "train")),
        "optimizer steps": f"{step} of {_setting(settings, 'train', 'steps')}",
        "questions a step": _setting(settings, "rollout", "prompts_per_step"),
        "teacher": f"`{teacher}`" if teacher else _setting(settings, "teacher", "mode"),
        **{
            f"teacher {name}": f"`{each['checkpoint']}`" if each["checkpoint"] else each["mode"]
            for name, each in (settings.get("teachers") or {}).items()
        },
        "divergence": _setting(settings, "objective", "divergence", "kind"),
        "token weights": _setting(settings, "objective", "token_weights", "factors"),
        "policy gradient": _setting(settings, "objective", "policy_gradient", "enabled"),
        "learning rate": _setting(settings, "optimizer", "learning_rate"),
        "frozen": _setting(settings, "model", "freeze") or "nothing",
        "seed": settings.get("seed"),
        "checkpoint": f"`{checkpoint}`",
    }
    return [
        f"Trained with megatron_cord: on-policy distillation from {'another' if teacher else 'the same'} model reading "
        "the question to the model that",
        "hears it (CORD, arXiv 2601.16547).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]


def _data(train: Any) -> str:
    """Return what was trained on: one path, or sets with their weights."""
    if not isinstance(train, Mapping):
        return f"`{train}`"
    return ", ".join(f"{name} `{each.get('path')}` × {each.get('weight')}" for name, each in train.items())


def _converted(checkpoint: Path) -> list[str]:
    return [
        f"Weights of `{checkpoint}` in Hugging Face's layout. No training run of megatron_cord is known to have made",
        "them: their configuration is not beside them.",
    ]


def _licence(original: bytes | None) -> str | None:
    """Return the licence that a card's head names."""
    found = re.search(rb"\A---\s.*?^license:\s*([\w.+-]+)\s*$.*?^---", original or b"", re.MULTILINE | re.DOTALL)
    return None if found is None else found[1].decode()


def _setting(settings: Mapping[str, Any], *path: str) -> Any:
    value: Any = settings
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value

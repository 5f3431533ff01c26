"""Adapters as PEFT keeps them: a directory with adapter_config.json and adapter_model.safetensors.

Parts that are trained whole are PEFT's modules_to_save. PEFT names modules as the installed transformers does; here
they are translated from and to published names. The base is known by a fingerprint of its weights in the header of the
tensors' file, which PEFT passes over; an adapter of another tool has none.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_cord.convert.hf.spelling import Spelling
from megatron_cord.convert.hf.writer import check_vacant
from megatron_cord.convert.peft.expert_adapters import SHARED, each_experts, takes_apart
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import family_of
from megatron_cord.runtime.files import write_json

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _BASE = "base_model.model.", "base_weights"
_FACTORS = (".lora_A.weight", ".lora_B.weight")
#: settings of PEFT under which an adapter is another function; all but these values are refused
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": ([], None),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a directory holds, under published names.

    Attributes:
        factors: A [r, in] and B [out, r], `MODULE.lora_A.weight` and `MODULE.lora_B.weight`.
        whole: tensors of parts that are trained whole.
        rank: of A and B.
        alpha: alpha / rank multiplies B A.
        dropout: in training.
        base: the fingerprint of the base's weights; None if it is not known.
        base_name: where the base was when the adapter was written.
    """

    factors: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    rank: int
    alpha: float
    dropout: float = 0.0
    base: str | None = None
    base_name: str = ""


def is_adapter(directory: Path) -> bool:
    """Return whether a directory is of an adapter."""
    return (directory / CONFIG).is_file()


def read_adapter(directory: Path, arch: Architecture) -> Adapter:
    """Read a PEFT directory.

    Raises:
        CordError: it is damaged, or its adapter is of another kind than LORA as it is trained here.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
        for name, plain in _PLAIN.items():
            if (given := config.get(name, plain[-1])) not in plain and not takes_apart(name, given, config):
                raise CordError(
                    f"{directory / CONFIG}: {name} is {given!r}, and only {plain[0]!r} is supported; merge the adapter "
                    "into its base with peft (merge_and_unload) and train that"
                )
        rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout") or 0.0)
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            base = (file.metadata() or {}).get(_BASE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no map)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CordError(f"{directory} is no whole PEFT adapter ({type(error).__name__}: {error})") from None
    spelling = Spelling(arch)
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    whole = {spelling.published_name(name): t for name, t in named.items() if not name.endswith(_FACTORS)}
    experts = 0 if arch.language.experts is None else arch.language.experts.count
    pairs = {name: tensor for name, tensor in named.items() if name.endswith(_FACTORS)}
    try:
        pairs = each_experts(pairs, config, experts)
    except CordError as error:
        raise CordError(f"{directory}: {error}") from None
    factors = {}
    for name, tensor in pairs.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        published = spelling.published_name(f"{module}.weight").removesuffix(".weight")
        factors[f"{published}.{factor}.weight"] = tensor
    return Adapter(factors, whole, rank, alpha, dropout, base, str(config.get("base_model_name_or_path") or ""))


def check_adapter(adapter: Adapter, config: LoraConfig, source: Path) -> None:
    """Refuse an adapter of another rank or scale than those of a run.

    Raises:
        CordError: the first that differs.
    """
    for name, given, wanted in (("rank", adapter.rank, config.rank), ("alpha", adapter.alpha, config.alpha)):
        if given != wanted:
            raise CordError(f"{source} is of {name} {given:g}, and model.lora.{name}={wanted:g}; set it to {given:g}")


def write_adapter(directory: Path, adapter: Adapter, arch: Architecture) -> None:
    """Write a PEFT directory, complete or not at all.

    Raises:
        CordError: the directory exists and holds something.
    """
    check_vacant(directory)
    spelling = Spelling(arch)
    modules = sorted({name.rsplit(".", 2)[0] for name in adapter.factors})
    if shared := next((module for module in modules if SHARED in module), None):
        logger.warning(
            "%s: peft with transformers 5 takes LoRA of a shared expert (%s) for that of the others and leaves it out; "
            "export merged weights for it (cord convert export without --adapter)",
            directory,
            shared,
        )
    in_peft = {module: spelling.module_name(f"{module}.weight").removesuffix(".weight") for module in modules}
    tensors = {spelling.module_name(name): tensor for name, tensor in adapter.whole.items()}
    names = family_of(arch).tensor_map(arch).by_hf_name if adapter.whole else {}
    saved = _modules_of(tensors, [spelling.module_name(name) for name in names])
    for name, tensor in adapter.factors.items():
        module, factor, _ = name.rsplit(".", 2)
        tensors[f"{in_peft[module]}.{factor}.weight"] = tensor
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base_name,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": list(in_peft.values()),
        "modules_to_save": saved or None,
        "inference_mode": True,
    }
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()},
        partial / WEIGHTS,
        metadata={"format": "pt", _BASE: adapter.base or ""},
    )
    write_json(partial / CONFIG, config)
    partial.replace(directory)


def _modules_of(names: Collection[str], every: Collection[str]) -> list[str]:
    """Return the outermost modules that hold these tensors and no other of the model's.

    A list of layers, which PEFT cannot wrap, is left for its members.

    Args:
        names: of tensors in the plain model.
        every: the names of all of the model's tensors there.
    """
    holding_others = {module for name in every if name not in names for module in _holders(name)}
    outermost = (
        next(module for module in _holders(name) if module not in holding_others and not _is_list(module, name))
        for name in names
    )
    return sorted(set(outermost))


def _holders(name: str) -> list[str]:
    """Return the modules that a tensor lies in, the outermost first."""
    return list(accumulate(name.split(".")[:-1], "{}.{}".format))


def _is_list(module: str, name: str) -> bool:
    """Return whether a module that holds the tensor numbers its members."""
    return name.removeprefix(f"{module}.").partition(".")[0].isdigit()

"""What a server's model takes, and whether what the trainer would send fits it: checked before the first byte.

A server must not get wrong names: of two models in SGLang 0.5.21 one answers 200 and ignores them, the other ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.sglang.plugin.lora_merge import identity
from megatron_cord.rollout.types import TensorSpec

#: What weights are sent in; a model that is quantised to anything else must be loaded from a checkpoint.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def served_specs(checkpoint_dir: str | Path, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """Return the tensors of the checkpoint that servers run, by published name, from its headers.

    Args:
        checkpoint_dir: a Hugging Face checkpoint.
        dtype: that servers load it in; the checkpoint's own if None.
    """
    stored = published_tensors(checkpoint_dir, load_architecture(checkpoint_dir))
    return {name: TensorSpec(name, tuple(t.shape), dtype or t.dtype) for name, t in stored}


def base_of(checkpoint_dir: str | Path) -> str | None:
    """Return the identity of the checkpoint's weights, with which servers that run it merge LoRA.

    None where its files do not spell all names as they are published: a server looks for these in its own files.
    """
    stored = published_tensors(checkpoint_dir, load_architecture(checkpoint_dir))
    if any(name != tensor.name for name, tensor in stored):
        return None
    return identity(checkpoint_directory(checkpoint_dir))


def with_lora(served: Mapping[str, TensorSpec], specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Return the servers' tensors and the factors that fit them, A [r, in] and B [out, r], of LoRA that is sent."""
    places = dict(served)
    for spec in specs:
        module, _, factor = spec.name.removesuffix(".weight").rpartition(".")
        weight = served.get(f"{module}.weight")
        if weight is not None and factor in ("lora_A", "lora_B"):
            rows, columns = weight.shape
            shape = (spec.shape[0], columns) if factor == "lora_A" else (rows, spec.shape[1])
            places[spec.name] = TensorSpec(spec.name, shape, spec.dtype)
    return places


def check_fits_server(specs: Sequence[TensorSpec], served: Mapping[str, TensorSpec], full: bool) -> None:
    """Compare what would be sent with the server's model.

    Raises:
        CordError: nothing to send, unknown or (full) missing names, other shapes, or dtypes that cannot be sent; all at
            once.
    """
    problems: list[str] = [] if specs else ["there is no tensor to send"]
    for spec in specs:
        place = served.get(spec.name)
        if place is None:
            nearest = difflib.get_close_matches(spec.name, served, n=1)
            problems.append(f"the server's model has no {spec.name}" + (f" (nearest: {nearest[0]})" if nearest else ""))
        elif place.shape != spec.shape:
            problems.append(f"{spec.name} has shape {list(spec.shape)}, the server's has {list(place.shape)}")
        elif spec.dtype not in _FLOATS or place.dtype not in _FLOATS:
            problems.append(
                f"{spec.name} is {_name(spec.dtype)}, the server's is {_name(place.dtype)}; "
                "both must be floating-point of 16 or 32 bits"
            )
    if full:
        sent = {spec.name for spec in specs}
        problems += [f"the server's {name} would not be sent" for name in served if name not in sent]
    if problems:
        raise CordError(
            "weight sync: the trainer's model does not fit the servers' checkpoint "
            f"({len(problems)} problems): {'; '.join(problems[:20])}; serve the checkpoint that is trained"
        )


def sent_specs(specs: Iterable[TensorSpec], served: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """Return the specs in the dtypes that are sent: the server's where it is narrower, as it would round anyway."""
    return [
        replace(spec, dtype=served[spec.name].dtype) if served[spec.name].dtype.itemsize < spec.dtype.itemsize else spec
        for spec in specs
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Logits of the Megatron model and of the plain one, transformers' own where it has the class, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.model.pipeline import run_pipeline
from megatron_cord.parallel.objects import all_gather_json


@dataclass(frozen=True)
class Difference:
    """The difference of one input's logits over all positions.

    Attributes:
        name: of the input.
        tokens: how many positions.
        largest: largest absolute difference of two logits.
        scale: largest absolute logit of the plain model.
        agreement: share of positions at which both prefer the same token.
    """

    name: str
    tokens: int
    largest: float
    scale: float
    agreement: float


def compare(
    model: LALM, reference: Callable[[ModelInput], Tensor] | None, inputs: list[ModelInput]
) -> list[Difference]:
    """Compare the models on inputs of one sample each. Collective over all ranks; each gets all differences.

    Args:
        model: this rank's part.
        reference: the plain model on one rank of a last stage, None on all others.
        inputs: the same on every rank.
    """
    mine: dict[str, Any] = {}
    for given in inputs:
        logits = _megatron_logits(model, given)
        if logits is not None and reference is not None:
            wanted = reference(given).float()
            distance = (logits.float() - wanted).abs().max()
            agreement = (logits.argmax(-1) == wanted.argmax(-1)).float().mean()
            mine[given.sample_ids[0]] = [wanted.shape[1], float(distance), float(wanted.abs().max()), float(agreement)]
    merged: dict[str, Any] = {}
    for share in all_gather_json(mine):
        merged |= share
    return [Difference(given.sample_ids[0], *merged[given.sample_ids[0]]) for given in inputs]


@torch.no_grad()
def _megatron_logits(model: LALM, given: ModelInput) -> Tensor | None:
    """Return logits [1, S, V] on the last stage's ranks, None on others."""
    found: list[Tensor] = []
    vocabulary, tp_group = model.arch.language.vocab_size, model.layout.tp_group

    def keep(_: int, hidden: Tensor) -> Tensor:
        shard = hidden @ model.output_weight.t()
        found.append(gather_from_tensor_model_parallel_region(shard, group=tp_group).transpose(0, 1)[..., :vocabulary])
        return hidden.new_zeros(())

    run_pipeline(model, [given], keep, train=False)
    return found[0] if found else None


def load_reference(hf_dir: Path) -> Callable[[ModelInput], Tensor]:
    """Return the plain model in float32, as a function from an input of one sample to its logits [1, S, V].

    Raises:
        CordError: it cannot be loaded.
    """
    model = PlainModel(hf_dir, torch.float32)

    @torch.no_grad()
    def logits(given: ModelInput) -> Tensor:
        ids = given.token_ids.cpu()
        features = None if given.features is None else given.features.cpu()
        frames = None if given.num_frames is None else torch.tensor(given.num_frames)
        hidden = model.hidden(ids, features, frames, attention_mask=torch.ones_like(ids)).last_hidden_state
        return model.head(hidden).to(given.token_ids.device)

    return logits

"""Logits of the Megatron model and of transformers' own, side by side on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.objects import all_gather_json


@dataclass(frozen=True)
class Difference:
    """Of one input's logits over all positions.

    Attributes:
        name: of the input.
        tokens: how many positions.
        largest: largest absolute difference of two logits.
        scale: largest absolute logit of transformers' model.
        agreement: share of positions at which both prefer the same token.
    """

    name: str
    tokens: int
    largest: float
    scale: float
    agreement: float


def compare(model: LALM, reference: Callable[[ModelInput], Tensor] | None, inputs: list[ModelInput]) -> list[Difference]:
    """Compares the models on inputs of one sample each. Collective over all ranks; each gets all differences.

    Args:
        model: this rank's part.
        reference: transformers' model on one rank of a last stage, None on all others.
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
    """[1, S, V] on the last stage's ranks, None on others."""
    found: list[Tensor] = []
    vocabulary, tp_group = model.arch.language.vocab_size, model.layout.tp_group

    def forward_step(batches: Iterator[ModelInput], module: Any) -> Any:
        def keep(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            shard = hidden @ model.output_weight.t()
            found.append(gather_from_tensor_model_parallel_region(shard, group=tp_group).transpose(0, 1)[..., :vocabulary])
            return hidden.new_zeros(()), torch.tensor(1), {}

        return module(next(batches)), keep

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([given]),
        model=[model],
        num_microbatches=1,
        seq_length=given.token_ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
    return found[0] if found else None


def load_reference(hf_dir: Path, *, tied: bool) -> Callable[[ModelInput], Tensor]:
    """Transformers' model in float32, as a function from an input of one sample to its logits [1, S, V].

    Args:
        hf_dir: a checkpoint of a class that transformers has; no code of the checkpoint is run.
        tied: whether the head is the embedding.

    Raises:
        CordError: transformers has no such class, or cannot load the checkpoint.
    """
    config = transformers.AutoConfig.from_pretrained(hf_dir)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CordError(f"{hf_dir}: transformers has no class {name or '(config.json names no architectures)'} to compare with")
    try:
        model: Any = kind.from_pretrained(hf_dir, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CordError(f"{hf_dir}: transformers cannot load it ({str(error).splitlines()[0]}); download it again") from None
    if tied:  # not every class does so by itself
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    @torch.no_grad()
    def logits(given: ModelInput) -> Tensor:
        ids = given.token_ids.cpu()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if given.features is not None and given.num_frames is not None:
            frames = torch.arange(given.features.shape[-1])
            inputs["input_features"] = given.features.cpu()
            inputs["feature_attention_mask"] = (frames[None] < given.num_frames.cpu()[:, None]).long()
        return model(**inputs).logits.to(given.token_ids.device)

    return logits

"""The engine's choice of experts, laid out for the student's pass over the same tokens.

Legend: B sequences, S padded or packed length, L layers, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import LanguageArchitecture
from megatron_cord.model.lalm import ModelInput
from megatron_cord.rollout.chosen_experts import ChosenExperts


def with_experts(model_input: ModelInput, chosen: Sequence[ChosenExperts | None]) -> ModelInput:
    """Return the input with the experts that routers shall choose for its tokens.

    Routers choose by themselves for padding, for the last token of a response, which no engine has read, and in
    sequences without experts.

    Args:
        model_input: padded or packed.
        chosen: of each of the B sequences.
    """
    known = [each for each in chosen if each is not None]
    if not known:
        return model_input
    size, length = model_input.token_ids.shape
    experts = torch.full((length, size, known[0].layers, known[0].per_token), -1, dtype=torch.int16)
    for i, each in enumerate(chosen):
        if each is not None:
            column, start = (i, 0) if model_input.cu_seqlens is None else (0, model_input.cu_seqlens[i])
            rows = each.tensor()
            experts[start : start + len(rows), column] = rows
    return replace(model_input, experts=experts)


def check_experts(sample_id: str, chosen: ChosenExperts | None, tokens: int, arch: LanguageArchitecture) -> None:
    """Refuse experts that the student cannot choose for its tokens.

    Args:
        sample_id: for the error.
        chosen: of a response; None is nothing to follow.
        tokens: of prompt and response.
        arch: of the student.

    Raises:
        CordError: another model's, or of other tokens.
    """
    if chosen is None:
        return
    rows = chosen.tensor()
    wanted = (tokens - 1, arch.num_layers, arch.experts.per_token if arch.experts is not None else 0)
    if tuple(rows.shape) != wanted:
        raise CordError(
            f"sample {sample_id}: the engine's experts [tokens, layers, experts a token] are {list(rows.shape)}, the "
            f"trainer's sequence has {list(wanted)}; the engine's checkpoint and prompts must be the trainer's"
        )
    ordered = rows.sort(-1).values
    assert arch.experts is not None
    if ordered.min() < 0 or ordered.max() >= arch.experts.count or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise CordError(
            f"sample {sample_id}: the engine's choice of experts names one twice, or one outside "
            f"[0, {arch.experts.count}); the engine's checkpoint must be the trainer's"
        )

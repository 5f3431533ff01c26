"""How prompts and responses of a microbatch lie in the model's input, and which hidden states predict the responses.

Legend: S padded length, T packed length, B sequences, n response tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cord.data.audio.features import stack_features
from megatron_cord.data.samples import Prompt
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.parallel.transfers import to_device


@dataclass(frozen=True, eq=False)
class Rows:
    """Where this rank's hidden states predict the response's tokens.

    Attributes:
        rows: int64 [n], rows of the hidden states, flattened from [S/CP, B] (packed: [T/CP, 1]).
        tokens: int64 [n] in host memory, which of the microbatch's N tokens they predict, ascending; None for all of
            them in order.
    """

    rows: Tensor
    tokens: Tensor | None


def pad_sequences(
    prompts: list[Prompt],
    responses: list[tuple[int, ...]],
    pad_id: int,
    sharding: SequenceSharding,
    device: torch.device,
) -> tuple[ModelInput, Rows]:
    """Lay out prompt, response and padding of each sequence in a row of its own."""
    size = len(prompts)
    longest = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = round_up(longest, sharding.multiple_of)
    token_ids = torch.full((size, longest), pad_id, dtype=torch.int64)
    positions: list[int] = []
    columns: list[int] = []
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt.token_ids)
        token_ids[b, : start + len(response)] = torch.tensor(prompt.token_ids + response)
        positions += range(
            start - 1, start - 1 + len(response)
        )  # the hidden state at position p predicts the token at p + 1
        columns += [b] * len(response)
    return _model_input(prompts, responses, token_ids, None, device), _rows(
        positions, columns, size, (0, longest), sharding, device
    )


def pack_sequences(
    prompts: list[Prompt],
    responses: list[tuple[int, ...]],
    pad_id: int,
    sharding: SequenceSharding,
    device: torch.device,
) -> tuple[ModelInput, Rows]:
    """Lay out sequences one after the other, each with its padding; the last is padded to what all of them need."""
    token_ids: list[int] = []
    cu_seqlens = [0]
    positions: list[int] = []
    for prompt, response in zip(prompts, responses, strict=True):
        start = cu_seqlens[-1] + len(prompt.token_ids)
        positions += range(start - 1, start - 1 + len(response))
        token_ids += prompt.token_ids + response
        last = len(cu_seqlens) == len(prompts)
        # Each sequence is cut into chunks; the whole, then, by sequence parallelism.
        cu_seqlens.append(
            round_up(len(token_ids), sharding.multiple_of)
            if last
            else cu_seqlens[-1] + round_up(start - cu_seqlens[-1] + len(response), sharding.chunks)
        )
        token_ids += [pad_id] * (cu_seqlens[-1] - len(token_ids))
    model_input = _model_input(prompts, responses, torch.tensor([token_ids]), tuple(cu_seqlens), device)
    return model_input, _rows(positions, [0] * len(positions), 1, cu_seqlens, sharding, device)


def _model_input(
    prompts: list[Prompt],
    responses: list[tuple[int, ...]],
    token_ids: Tensor,
    cu_seqlens: tuple[int, ...] | None,
    device: torch.device,
) -> ModelInput:
    clips = [clip for prompt in prompts for clip in prompt.clips]
    features = to_device(stack_features([clip.features for clip in clips]), device) if clips else None
    frames = tuple(clip.num_frames for clip in clips) if clips else None
    names = tuple(p.sample_id for p in prompts)
    lengths = tuple(len(prompt.token_ids) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    return ModelInput(
        to_device(token_ids, device), features, frames, names, cu_seqlens, host_token_ids=token_ids, lengths=lengths
    )


def _rows(
    positions: list[int],
    columns: list[int],
    width: int,
    cu_seqlens: Sequence[int],
    sharding: SequenceSharding,
    device: torch.device,
) -> Rows:
    """Find the tokens, predicted at (position, column) of [S, width], that this rank predicts, and their rows."""
    mine = sharding.rows(cu_seqlens)
    here = torch.full((cu_seqlens[-1],), -1)
    here[mine] = torch.arange(len(mine))
    local = here[torch.tensor(positions, dtype=torch.int64)]
    tokens = (local >= 0).nonzero().squeeze(1)
    rows = local * width + torch.tensor(columns, dtype=torch.int64)
    return Rows(to_device(rows[tokens], device), None if sharding.cp == 1 else tokens)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple

"""From sequences to microbatches: inputs of student and teacher, and where the response's tokens are predicted.

A microbatch is padded (sequences below each other, right-padded to the longest) or packed (one after the other up to
a budget of tokens). The loss is divided by counts over the whole step, so it does not depend on which. Under context
parallelism a rank holds some tokens only.

Legend: B sequences, S padded length, T packed length, N response tokens of the microbatch, n those of this rank (N
without context parallelism), C clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.packing import pack


class Batching(Protocol):
    """What microbatches need of the run's configuration (`trainer.config.TrainConfig`)."""

    @property
    def packing(self) -> Literal["padded", "packed"]:
        """Layout of the sequences."""
        ...

    @property
    def micro_batch_size(self) -> int:
        """Of padded microbatches: sequences."""
        ...

    @property
    def tokens_per_microbatch(self) -> int:
        """Of packed microbatches: tokens."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One response to train on, behind the prompts of student and teacher.

    Attributes:
        student: the prompt of the student's view.
        teacher: the prompt of the teacher's view; None where no teacher is compared.
        response: the rollout with its part in the loss.
        index: of the response in the step's list of rollouts over all ranks.
    """

    student: Prompt
    teacher: Prompt | None
    response: ScoredRollout
    index: int

    @property
    def rollout(self) -> Rollout:
        """The engine's part of the response."""
        return self.response.rollout

    @property
    def student_tokens(self) -> int:
        """Prompt and response as the student takes them."""
        return len(self.student.token_ids) + len(self.rollout.token_ids)

    @property
    def teacher_tokens(self) -> int:
        """The same for the teacher; 0 without one."""
        return 0 if self.teacher is None else len(self.teacher.token_ids) + len(self.rollout.token_ids)


@dataclass(frozen=True, eq=False)
class Rows:
    """Where this rank's hidden states predict the response's tokens.

    Attributes:
        rows: int64 [n], rows of the hidden states, flattened from [S/CP, B] (packed: [T/CP, 1]).
        tokens: int64 [n], which of the microbatch's N tokens they predict, ascending; None for all of them in order.
    """

    rows: Tensor
    tokens: Tensor | None


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Sequences that go through the model together; either all of them have a part in L_tok or none has.

    Attributes:
        student: the student's input.
        student_rows: its rows; what is per token below is of these n tokens.
        teacher, teacher_rows: the same for the teacher; None if none is asked. Its n may be another.
        target_ids: int64 [n], the response's tokens.
        positions: int64 [n], where in its response each is, from 0.
        cu_seqlens: int64 [B + 1], where each response begins among the n.
        engine_logprobs: float32 [n].
        advantages: float32 [B].
        sequences: what it was made of.
    """

    student: ModelInput
    student_rows: Rows
    teacher: ModelInput | None
    teacher_rows: Rows | None
    target_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    engine_logprobs: Tensor
    advantages: Tensor
    sequences: tuple[TrainingSequence, ...]

    @property
    def scored(self) -> bool:
        """Whether its sequences have a part in L_tok."""
        return self.sequences[0].response.distilled

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(len(s.rollout.token_ids) for s in self.sequences)


def make_microbatches(
    sequences: Sequence[TrainingSequence],
    config: Batching,
    pad_id: int,
    sharding: SequenceSharding,
    device: torch.device,
) -> list[Microbatch]:
    """Put sequences into microbatches, those of L_tok first. Ranks that share sequences make the same ones.

    Args:
        sequences: of this data-parallel rank.
        config: how many sequences or tokens a microbatch.
        pad_id: fills the padding.
        sharding: how sequences are split over ranks, which their padding allows for.
        device: where the tensors go.
    """
    microbatches = []
    for scored in (True, False):
        alike = [s for s in sequences if s.response.distilled == scored]
        kind = sorted(alike, key=lambda s: (s.student_tokens, s.index))
        for members in (
            _packed(kind, config, sharding)
            if config.packing == "packed"
            else _neighbours(kind, config.micro_batch_size)
        ):
            microbatches.append(_microbatch(members, config.packing == "packed", pad_id, sharding, device))
    return microbatches


def _neighbours(sequences: list[TrainingSequence], size: int) -> list[tuple[TrainingSequence, ...]]:
    """Of similar length, so that little is padded."""
    return [tuple(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def _packed(
    sequences: list[TrainingSequence], config: Batching, sharding: SequenceSharding
) -> list[tuple[TrainingSequence, ...]]:
    lengths = [_round_up(max(s.student_tokens, s.teacher_tokens), sharding.chunks) for s in sequences]
    return [tuple(sequences[i] for i in box) for box in pack(lengths, config.tokens_per_microbatch)]


def _microbatch(
    sequences: tuple[TrainingSequence, ...], packed: bool, pad_id: int, sharding: SequenceSharding, device: torch.device
) -> Microbatch:
    responses = [s.rollout.token_ids for s in sequences]
    lay_out = _pack if packed else _pad
    student, student_rows = lay_out([s.student for s in sequences], responses, pad_id, sharding, device)
    teacher, teacher_rows = None, None
    prompts = [s.teacher for s in sequences if s.teacher is not None]
    if prompts:
        teacher, teacher_rows = lay_out(prompts, responses, pad_id, sharding, device)
    lengths = torch.tensor([len(r) for r in responses])
    response_cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(response_cu_seqlens[-1])) if student_rows.tokens is None else student_rows.tokens.cpu()
    sequence = torch.repeat_interleave(lengths)  # of each of the N tokens
    counts = sequence[tokens].bincount(minlength=len(sequences))
    return Microbatch(
        student=student,
        student_rows=student_rows,
        teacher=teacher,
        teacher_rows=teacher_rows,
        target_ids=torch.tensor([t for r in responses for t in r], dtype=torch.int64)[tokens].to(device),
        positions=(tokens - response_cu_seqlens[sequence[tokens]]).to(device),
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device),
        engine_logprobs=torch.tensor([p for s in sequences for p in s.rollout.logprobs], dtype=torch.float32)[
            tokens
        ].to(device),
        advantages=torch.tensor([s.response.advantage for s in sequences], dtype=torch.float32, device=device),
        sequences=sequences,
    )


def _pad(
    prompts: list[Prompt],
    responses: list[tuple[int, ...]],
    pad_id: int,
    sharding: SequenceSharding,
    device: torch.device,
) -> tuple[ModelInput, Rows]:
    """Lay out prompt, response and padding of each sequence in a row of its own."""
    size = len(prompts)
    longest = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = _round_up(longest, sharding.multiple_of)
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
    return _model_input(prompts, token_ids, None, device), _rows(
        positions, columns, size, (0, longest), sharding, device
    )


def _pack(
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
            _round_up(len(token_ids), sharding.multiple_of)
            if last
            else cu_seqlens[-1] + _round_up(start - cu_seqlens[-1] + len(response), sharding.chunks)
        )
        token_ids += [pad_id] * (cu_seqlens[-1] - len(token_ids))
    model_input = _model_input(prompts, torch.tensor([token_ids]), tuple(cu_seqlens), device)
    return model_input, _rows(positions, [0] * len(positions), 1, cu_seqlens, sharding, device)


def _model_input(
    prompts: list[Prompt], token_ids: Tensor, cu_seqlens: tuple[int, ...] | None, device: torch.device
) -> ModelInput:
    clips = [clip for prompt in prompts for clip in prompt.clips]
    features = torch.stack([clip.features for clip in clips]).to(device) if clips else None
    frames = torch.tensor([clip.num_frames for clip in clips], device=device) if clips else None
    return ModelInput(token_ids.to(device), features, frames, tuple(p.sample_id for p in prompts), cu_seqlens)


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
    return Rows(rows[tokens].to(device), None if sharding.cp == 1 else tokens.to(device))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

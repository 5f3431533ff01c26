"""From sequences to microbatches: what the student heard, what the teacher read, and where in each the response's tokens are predicted.

A microbatch is padded (sequences below each other, right-padded to the longest) or packed (one after the other up to a budget of tokens).
The loss is divided by counts over the whole step, so it does not depend on which. Under context parallelism a rank holds some tokens only.

Legend: B sequences, S padded length, T packed length, N response tokens of the microbatch, n those of this rank (N without context
parallelism), C clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.step.packing import pack


@dataclass(frozen=True)
class BatchConfig:
    """How sequences are put into microbatches."""

    packing: Literal["padded", "packed"] = "padded"  #: sequences padded to the longest, or one after the other
    micro_batch_size: int = 4  #: padded: sequences that go through the model together
    tokens_per_microbatch: int = (
        8192  #: packed: tokens that do, student's and teacher's each; a longer sequence goes alone
    )

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.tokens_per_microbatch < 1:
            raise CordError("train.micro_batch_size and train.tokens_per_microbatch must be at least 1")


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One response to train on.

    Attributes:
        student: the prompt that the student heard.
        teacher: the prompt that the teacher reads; None if no teacher is asked.
        rollout: the response, with the engine's log-probabilities.
        scored: whether it has a part in L_tok.
        advantage: of the policy gradient, zero if it has no part in L_seq.
        index: its place in the step's list of rollouts, for the record.
    """

    student: Prompt
    teacher: Prompt | None
    rollout: Rollout
    scored: bool
    advantage: float
    index: int

    @property
    def student_tokens(self) -> int:
        """Prompt and response as the student takes them."""
        return len(self.student.token_ids) + len(self.rollout.token_ids)

    @property
    def teacher_tokens(self) -> int:
        """The same for the teacher; 0 if none is asked."""
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
        return self.sequences[0].scored

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(len(s.rollout.token_ids) for s in self.sequences)


def make_microbatches(
    sequences: Sequence[TrainingSequence], config: BatchConfig, pad_id: int, cut: SequenceSharding, device: torch.device
) -> list[Microbatch]:
    """Puts sequences into microbatches, those of L_tok first. Ranks that share sequences make the same ones.

    Args:
        sequences: of this data-parallel rank.
        config: how many sequences or tokens a microbatch.
        pad_id: fills the padding.
        cut: how sequences are cut over ranks, which their padding allows for.
        device: where the tensors go.
    """
    microbatches = []
    for scored in (True, False):
        kind = sorted((s for s in sequences if s.scored == scored), key=lambda s: (s.student_tokens, s.index))
        for members in (
            _packed(kind, config, cut) if config.packing == "packed" else _neighbours(kind, config.micro_batch_size)
        ):
            microbatches.append(_microbatch(members, config.packing == "packed", pad_id, cut, device))
    return microbatches


def _neighbours(sequences: list[TrainingSequence], size: int) -> list[tuple[TrainingSequence, ...]]:
    """Of similar length, so that little is padded."""
    return [tuple(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def _packed(
    sequences: list[TrainingSequence], config: BatchConfig, cut: SequenceSharding
) -> list[tuple[TrainingSequence, ...]]:
    lengths = [_round_up(max(s.student_tokens, s.teacher_tokens), cut.chunks) for s in sequences]
    return [tuple(sequences[i] for i in box) for box in pack(lengths, config.tokens_per_microbatch)]


def _microbatch(
    sequences: tuple[TrainingSequence, ...], packed: bool, pad_id: int, cut: SequenceSharding, device: torch.device
) -> Microbatch:
    responses = [s.rollout.token_ids for s in sequences]
    lay_out = _pack if packed else _pad
    student, student_rows = lay_out([s.student for s in sequences], responses, pad_id, cut, device)
    teacher, teacher_rows = None, None
    prompts = [s.teacher for s in sequences if s.teacher is not None]
    if prompts:
        teacher, teacher_rows = lay_out(prompts, responses, pad_id, cut, device)
    lengths = torch.tensor([len(r) for r in responses])
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(borders[-1])) if student_rows.tokens is None else student_rows.tokens.cpu()
    sequence = torch.repeat_interleave(lengths)  # of each of the N tokens
    counts = sequence[tokens].bincount(minlength=len(sequences))
    return Microbatch(
        student=student,
        student_rows=student_rows,
        teacher=teacher,
        teacher_rows=teacher_rows,
        target_ids=torch.tensor([t for r in responses for t in r], dtype=torch.int64)[tokens].to(device),
        positions=(tokens - borders[sequence[tokens]]).to(device),
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device),
        engine_logprobs=torch.tensor([p for s in sequences for p in s.rollout.logprobs], dtype=torch.float32)[
            tokens
        ].to(device),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32, device=device),
        sequences=sequences,
    )


def _pad(
    prompts: list[Prompt], responses: list[tuple[int, ...]], pad_id: int, cut: SequenceSharding, device: torch.device
) -> tuple[ModelInput, Rows]:
    """Prompt, response and padding of each sequence in a row of its own."""
    size = len(prompts)
    longest = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = _round_up(longest, cut.multiple_of)
    token_ids = torch.full((size, longest), pad_id, dtype=torch.int64)
    places: list[int] = []
    columns: list[int] = []
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt.token_ids)
        token_ids[b, : start + len(response)] = torch.tensor(prompt.token_ids + response)
        places += range(
            start - 1, start - 1 + len(response)
        )  # the hidden state at position p predicts the token at p + 1
        columns += [b] * len(response)
    return _model_input(prompts, token_ids, None, device), _rows(places, columns, size, (0, longest), cut, device)


def _pack(
    prompts: list[Prompt], responses: list[tuple[int, ...]], pad_id: int, cut: SequenceSharding, device: torch.device
) -> tuple[ModelInput, Rows]:
    """Prompt, response and padding of each sequence, one sequence after the other; the last one is padded to what all of them need."""
    token_ids: list[int] = []
    borders = [0]
    places: list[int] = []
    for prompt, response in zip(prompts, responses, strict=True):
        start = borders[-1] + len(prompt.token_ids)
        places += range(start - 1, start - 1 + len(response))
        token_ids += prompt.token_ids + response
        last = len(borders) == len(prompts)
        # Each sequence is cut into chunks; the whole, then, by sequence parallelism.
        borders.append(
            _round_up(len(token_ids), cut.multiple_of)
            if last
            else borders[-1] + _round_up(start - borders[-1] + len(response), cut.chunks)
        )
        token_ids += [pad_id] * (borders[-1] - len(token_ids))
    model_input = _model_input(prompts, torch.tensor([token_ids]), tuple(borders), device)
    return model_input, _rows(places, [0] * len(places), 1, borders, cut, device)


def _model_input(
    prompts: list[Prompt], token_ids: Tensor, borders: tuple[int, ...] | None, device: torch.device
) -> ModelInput:
    clips = [clip for prompt in prompts for clip in prompt.clips]
    features = torch.stack([clip.features for clip in clips]).to(device) if clips else None
    frames = torch.tensor([clip.num_frames for clip in clips], device=device) if clips else None
    return ModelInput(token_ids.to(device), features, frames, tuple(p.sample_id for p in prompts), borders)


def _rows(
    places: list[int], columns: list[int], width: int, borders: Sequence[int], cut: SequenceSharding, device: torch.device
) -> Rows:
    """Which of the N tokens, predicted at (place, column) of [S, width], are predicted on this rank, and from which row."""
    mine = cut.rows(borders)
    here = torch.full((borders[-1],), -1)
    here[mine] = torch.arange(len(mine))
    local = here[torch.tensor(places, dtype=torch.int64)]
    tokens = (local >= 0).nonzero().squeeze(1)
    rows = local * width + torch.tensor(columns, dtype=torch.int64)
    return Rows(rows[tokens].to(device), None if cut.cp == 1 else tokens.to(device))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

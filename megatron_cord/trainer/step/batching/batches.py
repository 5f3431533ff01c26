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
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import LanguageArchitecture
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.parallel.transfers import to_device
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.packing import pack
from megatron_cord.trainer.step.batching.router_replay import check_experts, with_experts
from megatron_cord.trainer.step.batching.token_layout import Rows, pack_sequences, pad_sequences, round_up


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

    @property
    def minibatches(self) -> int:
        """Updates on disjoint shares of a step's rollouts."""
        ...

    @property
    def passes(self) -> int:
        """How often a step goes over its rollouts."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One response to train on, behind the prompts of student and teacher.

    Attributes:
        student: the prompt of the student's view.
        teacher: the prompt of the teacher's view; None where no teacher is compared.
        response: the rollout with its part in the loss.
        index: of the response in the step's list of rollouts over all ranks.
        stream: the name of its term in L_tok; "" without one, or where there is a single one.
        contrast: the prompt of the view that the teacher is contrasted with; None without one.
        taught_by: the teacher's name; "" for the run's own.
    """

    student: Prompt
    teacher: Prompt | None
    response: ScoredRollout
    index: int
    stream: str = ""
    contrast: Prompt | None = None
    taught_by: str = ""

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
        return self._tokens_behind(self.teacher)

    @property
    def contrast_tokens(self) -> int:
        """The same for the view that the teacher is contrasted with; 0 without one."""
        return self._tokens_behind(self.contrast)

    def _tokens_behind(self, prompt: Prompt | None) -> int:
        return 0 if prompt is None else len(prompt.token_ids) + len(self.rollout.token_ids)


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Sequences that go through the model together, all of the same stream and teacher, or none with a part in L_tok.

    Attributes:
        student: the student's input.
        student_rows: its rows; what is per token below is of these n tokens.
        teacher, teacher_rows: the same for the teacher; None if none is asked. Its n may be another.
        target_ids: int64 [n], the response's tokens.
        positions: int64 [n], where in its response each is, from 0.
        cu_seqlens: int64 [B + 1] in host memory, where each response begins among the n.
        lengths: int64 [B], of the whole responses.
        engine_logprobs: float32 [n].
        advantages: float32 [B].
        sequences: what it was made of.
        old_logprobs: float32 [n], the student's before the first of several updates, on the last stage; None where
            there is a single one.
        contrast, contrast_rows: as the teacher's, on the view that it is contrasted with; None without one.
    """

    student: ModelInput
    student_rows: Rows
    teacher: ModelInput | None
    teacher_rows: Rows | None
    target_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    engine_logprobs: Tensor
    advantages: Tensor
    sequences: tuple[TrainingSequence, ...]
    old_logprobs: Tensor | None = None
    contrast: ModelInput | None = None
    contrast_rows: Rows | None = None

    @property
    def scored(self) -> bool:
        """Whether its sequences have a part in L_tok."""
        return self.sequences[0].response.distilled

    @property
    def rewarded(self) -> bool:
        """Whether any of its sequences has a part in L_seq."""
        return any(s.response.advantage for s in self.sequences)

    @property
    def stream(self) -> str:
        """The name of its sequences' term in L_tok."""
        return self.sequences[0].stream

    @property
    def taught_by(self) -> str:
        """The name of its sequences' teacher."""
        return self.sequences[0].taught_by

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(len(s.rollout.token_ids) for s in self.sequences)


def check_responses(sequences: Sequence[TrainingSequence], arch: LanguageArchitecture) -> None:
    """Refuse responses with tokens, or experts, that the student does not have, while they are still on the host.

    Raises:
        CordError: an engine with another vocabulary, or other experts.
    """
    vocab_size = arch.vocab_size
    for sequence in sequences:
        check_experts(sequence.student.sample_id, sequence.rollout.experts, sequence.student_tokens, arch)
        outside = [token for token in sequence.rollout.token_ids if not 0 <= token < vocab_size]
        if outside:
            raise CordError(
                f"sample {sequence.student.sample_id}: the response has token {outside[0]}, outside the vocabulary "
                f"[0, {vocab_size}); the engine's checkpoint must be the trainer's"
            )


def make_microbatches(
    sequences: Sequence[TrainingSequence],
    config: Batching,
    pad_id: int,
    sharding: SequenceSharding,
    device: torch.device,
) -> list[Microbatch]:
    """Put sequences into microbatches, those of L_tok first, stream by stream; ranks that share them make the same.

    Args:
        sequences: of this data-parallel rank.
        config: how many sequences or tokens a microbatch.
        pad_id: fills the padding.
        sharding: how sequences are split over ranks, which their padding allows for.
        device: where the tensors go.
    """
    microbatches = []
    kinds = {(not s.response.distilled, s.stream, s.taught_by) for s in sequences}
    for this in sorted(kinds):
        alike = [s for s in sequences if (not s.response.distilled, s.stream, s.taught_by) == this]
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
    longest = [max(s.student_tokens, s.teacher_tokens, s.contrast_tokens) for s in sequences]
    lengths = [round_up(length, sharding.chunks) for length in longest]
    return [tuple(sequences[i] for i in box) for box in pack(lengths, config.tokens_per_microbatch)]


def _microbatch(
    sequences: tuple[TrainingSequence, ...], packed: bool, pad_id: int, sharding: SequenceSharding, device: torch.device
) -> Microbatch:
    responses = [s.rollout.token_ids for s in sequences]
    lay_out = pack_sequences if packed else pad_sequences
    student, student_rows = lay_out([s.student for s in sequences], responses, pad_id, sharding, device)
    student = with_experts(student, [s.rollout.experts for s in sequences])

    def scored_on(prompts: list[Prompt]) -> tuple[ModelInput, Rows] | tuple[None, None]:
        return lay_out(prompts, responses, pad_id, sharding, device) if prompts else (None, None)

    teacher, teacher_rows = scored_on([s.teacher for s in sequences if s.teacher is not None])
    contrast, contrast_rows = scored_on([s.contrast for s in sequences if s.contrast is not None])
    lengths = torch.tensor([len(r) for r in responses])
    response_cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(response_cu_seqlens[-1])) if student_rows.tokens is None else student_rows.tokens
    sequence = torch.repeat_interleave(lengths)  # of each of the N tokens
    counts = sequence[tokens].bincount(minlength=len(sequences))
    target_ids = torch.tensor([t for r in responses for t in r], dtype=torch.int64)
    engine_logprobs = torch.tensor([p for s in sequences for p in s.rollout.logprobs], dtype=torch.float32)
    advantages = torch.tensor([s.response.advantage for s in sequences], dtype=torch.float32)
    return Microbatch(
        student=student,
        student_rows=student_rows,
        teacher=teacher,
        teacher_rows=teacher_rows,
        target_ids=to_device(target_ids[tokens], device),
        positions=to_device(tokens - response_cu_seqlens[sequence[tokens]], device),
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        lengths=to_device(lengths, device),
        engine_logprobs=to_device(engine_logprobs[tokens], device),
        advantages=to_device(advantages, device),
        sequences=sequences,
        contrast=contrast,
        contrast_rows=contrast_rows,
    )

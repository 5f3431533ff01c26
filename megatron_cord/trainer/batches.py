"""From sequences to microbatches: what the student heard, what the teacher read, and where in each the response's tokens are predicted.

Legend: B sequences, S padded length, N response tokens of the microbatch, C clips. Simplification: right-padded batches of neighbours in
length; packing comes with a core attention that knows sequence boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cord.data.samples import Prompt
from megatron_cord.model.lalm import ModelInput
from megatron_cord.rollout.types import Rollout


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


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Sequences that go through the model together; either all of them have a part in L_tok or none has.

    Attributes:
        student: the student's padded input.
        student_rows: int64 [N], rows of its hidden states, flattened from [S, B], that predict the response's tokens.
        teacher, teacher_rows: the same for the teacher; None if none is asked.
        target_ids: int64 [N], the response's tokens.
        cu_seqlens: int64 [B + 1], where each response begins among the N.
        engine_logprobs: float32 [N].
        advantages: float32 [B].
        sequences: what it was made of.
    """

    student: ModelInput
    student_rows: Tensor
    teacher: ModelInput | None
    teacher_rows: Tensor | None
    target_ids: Tensor
    cu_seqlens: Tensor
    engine_logprobs: Tensor
    advantages: Tensor
    sequences: tuple[TrainingSequence, ...]

    @property
    def scored(self) -> bool:
        """Whether its sequences have a part in L_tok."""
        return self.sequences[0].scored


def make_microbatches(
    sequences: Sequence[TrainingSequence], size: int, pad_id: int, multiple_of: int, device: torch.device
) -> list[Microbatch]:
    """Cuts sequences into microbatches of at most `size`, those of L_tok first, neighbours in length together.

    Args:
        sequences: of this data-parallel rank.
        size: sequences a microbatch.
        pad_id: fills the padding.
        multiple_of: lengths are padded to a multiple of it (sequence parallelism cuts them over ranks).
        device: where the tensors go.
    """
    microbatches = []
    for scored in (True, False):
        kind = [s for s in sequences if s.scored == scored]
        kind.sort(key=lambda s: (len(s.student.token_ids) + len(s.rollout.token_ids), s.index))
        for start in range(0, len(kind), size):
            microbatches.append(_microbatch(tuple(kind[start : start + size]), pad_id, multiple_of, device))
    return microbatches


def _microbatch(sequences: tuple[TrainingSequence, ...], pad_id: int, multiple_of: int, device: torch.device) -> Microbatch:
    responses = [s.rollout.token_ids for s in sequences]
    student, student_rows = _pad([s.student for s in sequences], responses, pad_id, multiple_of, device)
    teacher, teacher_rows = None, None
    prompts = [s.teacher for s in sequences if s.teacher is not None]
    if prompts:
        teacher, teacher_rows = _pad(prompts, responses, pad_id, multiple_of, device)
    lengths = torch.tensor([0] + [len(r) for r in responses])
    return Microbatch(
        student=student,
        student_rows=student_rows,
        teacher=teacher,
        teacher_rows=teacher_rows,
        target_ids=torch.tensor([t for r in responses for t in r], dtype=torch.int64, device=device),
        cu_seqlens=lengths.cumsum(0).to(device),
        engine_logprobs=torch.tensor([p for s in sequences for p in s.rollout.logprobs], dtype=torch.float32, device=device),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32, device=device),
        sequences=sequences,
    )


def _pad(
    prompts: list[Prompt], responses: list[tuple[int, ...]], pad_id: int, multiple_of: int, device: torch.device
) -> tuple[ModelInput, Tensor]:
    """[prompt, response, padding] for each sequence, and the rows that predict the responses."""
    size = len(prompts)
    longest = max(len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = -(-longest // multiple_of) * multiple_of
    token_ids = torch.full((size, longest), pad_id, dtype=torch.int64)
    rows = []
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt.token_ids)
        token_ids[b, : start + len(response)] = torch.tensor(prompt.token_ids + response)
        # The hidden state at position p predicts the token at p + 1.
        rows += [position * size + b for position in range(start - 1, start - 1 + len(response))]
    clips = [clip for prompt in prompts for clip in prompt.clips]
    features = torch.stack([clip.features for clip in clips]).to(device) if clips else None
    frames = torch.tensor([clip.num_frames for clip in clips], device=device) if clips else None
    model_input = ModelInput(token_ids.to(device), features, frames, tuple(p.sample_id for p in prompts))
    return model_input, torch.tensor(rows, dtype=torch.int64, device=device)

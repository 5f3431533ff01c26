"""A step's sequences of the planned lengths, for one data-parallel rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_cord.data.samples import AudioClip, Prompt
from megatron_cord.plan.work import FRAMES_A_SECOND, Work
from megatron_cord.rollout.types import Rollout, ScoredRollout, VersionSpan
from megatron_cord.trainer.step.batches import TrainingSequence

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.trainer.config import RunConfig


def make_rollouts(config: RunConfig, work: Work) -> list[ScoredRollout]:
    """Return the step's rollouts on all ranks, in the trainer's order: responses of L_tok, then the groups of L_seq.

    Half of a group's responses are right, so that no group is left out.
    """
    length = work.response_tokens
    response = Rollout("", (0,) * length, (0.0,) * length, "length", (VersionSpan(0, length, 0),), "")
    rollout = config.rollout
    grouped = work.sequences if rollout.share else work.sequences - work.scored
    draws = rollout.policy_rollouts if grouped else 0
    groups = grouped // draws if draws else 0
    alone = [] if rollout.share and groups else range(work.scored)
    return [
        *(ScoredRollout(response, "distill", position=position) for position in alone),
        *(
            ScoredRollout(
                response,
                "shared" if rollout.share else "policy",
                position=position,
                draw=draw + 1,
                advantage=0.5 if draw % 2 else -0.5,
            )
            for position in range(groups)
            for draw in range(draws)
        ),
    ]


def make_sequences(
    config: RunConfig,
    arch: Architecture,
    work: Work,
    rollouts: list[ScoredRollout],
    rank: int,
    audio_seconds: float,
) -> list[TrainingSequence]:
    """Return what a data-parallel rank trains on: the samples whose position leaves `rank` modulo their number.

    Args:
        config: of the run.
        arch: of the student.
        work: the planned lengths.
        rollouts: of the step.
        rank: data-parallel.
        audio_seconds: of a question.
    """
    clips: tuple[AudioClip, ...] = ()
    audio: tuple[int, ...] = ()
    if arch.encoder is not None and arch.audio_token_id is not None:
        frames = round(audio_seconds * FRAMES_A_SECOND)
        tokens = int(arch.num_audio_tokens(frames))
        features = torch.empty(arch.encoder.num_mels, arch.encoder.window_frames)
        clips = (AudioClip(np.zeros(0, np.float32), features, frames, tokens),) * work.clips
        audio = (arch.audio_token_id,) * (tokens * work.clips)
    frame = work.student_tokens - work.response_tokens - len(audio)
    student = Prompt("traced", audio + (0,) * frame, clips)
    teacher = Prompt("traced", (0,) * (work.teacher_tokens - work.response_tokens))
    taught = config.objective.distils
    return [
        TrainingSequence(student, teacher if taught and rollout.distilled else None, rollout, index)
        for index, rollout in enumerate(rollouts)
        if rollout.position % work.dp == rank
    ]

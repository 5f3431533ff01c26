"""A step's sequences of the planned lengths, for one data-parallel rank."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_cord.data.config import TrainingSetConfig
from megatron_cord.data.samples import AudioClip, Prompt
from megatron_cord.plan.work import FRAMES_A_SECOND, Work
from megatron_cord.rollout.types import Rollout, ScoredRollout, VersionSpan
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.teachers import TeacherRoutes

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
    draws = sum(map(len, config.objective.groups(rollout.policy_rollouts).values())) if grouped else 0
    groups = grouped // draws if draws else 0
    objective = config.objective
    draws_alone = () if rollout.share and groups else objective.draws
    return [
        *(
            ScoredRollout(response, "distill", position=position, draw=draw)
            for position in range(rollout.prompts_per_step)
            for draw in draws_alone
        ),
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
    clip, audio = None, 0
    if arch.encoder is not None and arch.audio_token_id is not None:
        frames = round(audio_seconds * FRAMES_A_SECOND)
        audio = int(arch.num_audio_tokens(frames))
        length = arch.encoder.window_frames if arch.encoder.chunks is None else frames
        features = torch.empty(arch.encoder.num_mels, length)
        clip = AudioClip(np.zeros(0, np.float32), features, frames, audio)
    lengths, objective = dict(work.prompts), config.objective

    def prompt(view: str) -> Prompt:
        tokens, clips = lengths[view]
        if clip is None or not clips:
            return Prompt("traced", (0,) * tokens)
        heard = (arch.audio_token_id or 0,) * audio
        return Prompt("traced", heard + (0,) * (tokens - audio), (clip,))

    sets = config.data.train if isinstance(config.data.train, dict) else {}
    routes, set_of = TeacherRoutes(sets), _dealt(sets, config.rollout.prompts_per_step, work.dp)
    sequences = []
    for index, rollout in enumerate(rollouts):
        if rollout.position % work.dp != rank:
            continue
        if not rollout.distilled:
            policy = objective.policy_term_of(rollout.draw)
            sequences.append(TrainingSequence(prompt(policy.student), None, rollout, index, policy.name))
            continue
        term = objective.term_of(rollout.draw)
        teacher, contrast = (*map(prompt, term.taught_views), None, None)[:2]
        taught_by = routes.of_set(term, set_of[rollout.position]) if term.distils else ""
        sequences.append(
            TrainingSequence(prompt(term.student), teacher, rollout, index, term.name, contrast, taught_by)
        )
    return sequences


def _dealt(sets: Mapping[str, TrainingSetConfig], positions: int, dp: int) -> list[str]:
    """Return the training set of each of a step's samples; the set is called "" where it is one.

    Each of the data-parallel ranks gets its samples from the sets by their weights, so that all do alike.
    """
    if not sets:
        return [""] * positions
    names, ends, share = list(sets), list(accumulate(each.weight for each in sets.values())), -(-positions // dp)
    return [names[bisect(ends, (position // dp + 0.5) / share * ends[-1])] for position in range(positions)]

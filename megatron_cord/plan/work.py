"""The work of one step: how many sequences of which length, for how many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.trainer.config import RunConfig

FRAMES_A_SECOND = 100  #: of log-mel features


@dataclass(frozen=True)
class Work:
    """Averages of one step.

    Attributes:
        sequences: trained on in a step, over all data-parallel ranks: one a prompt for L_tok, the groups for L_seq.
        scored: of them, those that the teacher scores.
        student_tokens: of a sequence: audio, question's frame and response.
        teacher_tokens: the same with the question's text in place of the audio.
        response_tokens: of a sequence.
        clips: of a sequence.
        clip_positions: that the encoder's layers compute of a clip.
        dp: data-parallel ranks.
        microbatches: of a data-parallel rank in an update.
        micro_batch: sequences of a microbatch.
        teacher: the architecture of a teacher with a checkpoint of its own; None: the student's.
        minibatches: into which the sequences are split.
        passes: over them; each minibatch of a pass is an update.
        resampled: responses of each further round of dynamic sampling, at most.
    """

    sequences: int
    scored: int
    student_tokens: int
    teacher_tokens: int
    response_tokens: int
    clips: int
    clip_positions: int
    dp: int
    microbatches: int
    micro_batch: int
    teacher: Architecture | None = None
    minibatches: int = 1
    passes: int = 1
    resampled: tuple[int, ...] = ()


def make_work(
    config: RunConfig,
    arch: Architecture,
    gpus: int,
    *,
    audio_seconds: float = 10.0,
    text_tokens: int = 60,
    teacher: Architecture | None = None,
) -> Work:
    """Return the work of a step of this configuration.

    Args:
        config: batch sizes, layout, length of responses (all are taken to be as long as allowed).
        arch: how many tokens a clip makes.
        gpus: that train.
        audio_seconds: of a question.
        text_tokens: of a question's text; half of it for the frame around the audio.

        teacher: the architecture in `teacher.checkpoint`, where there is one.

    Raises:
        CordError: the layout does not divide the GPUs or the model.
    """
    parallel, rollout = config.parallel, config.rollout
    for each in (arch, *filter(None, [teacher])):
        each.check_divisible(parallel.tp, parallel.pp)
    if gpus % (parallel.tp * parallel.pp * parallel.cp):
        cp = f" × parallel.cp={parallel.cp}" if parallel.cp > 1 else ""
        raise CordError(
            f"{gpus} GPUs cannot be laid out with parallel.tp={parallel.tp} × parallel.pp={parallel.pp}{cp}; "
            "give a multiple of it"
        )
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    enabled = config.objective.policy_gradient.enabled
    policy = rollout.policy_prompts_per_step * rollout.policy_rollouts if enabled else 0
    responses = sum(term.responses for term in config.objective.terms)
    scored = policy if rollout.share else rollout.prompts_per_step * responses
    sequences = scored if rollout.share else scored + policy
    frames = round(audio_seconds * FRAMES_A_SECOND)
    audio = 0 if arch.encoder is None else arch.num_audio_tokens(frames)
    positions = 0 if arch.encoder is None else arch.encoder.computed_positions(frames)
    share = -(-sequences // (dp * config.train.minibatches))
    spare, groups = rollout.prompts_per_step - rollout.policy_prompts_per_step, rollout.policy_prompts_per_step
    rounds = [min(groups, spare - groups * number) for number in range(rollout.dynamic_sampling if enabled else 0)]
    micro = min(config.train.micro_batch_size, share)
    return Work(
        sequences=sequences,
        scored=scored,
        student_tokens=audio + text_tokens // 2 + rollout.max_new_tokens,
        teacher_tokens=text_tokens + rollout.max_new_tokens,
        response_tokens=rollout.max_new_tokens,
        clips=int(arch.encoder is not None),
        clip_positions=positions,
        dp=dp,
        microbatches=-(-share // micro),
        micro_batch=micro,
        teacher=teacher,
        minibatches=config.train.minibatches,
        passes=config.train.passes,
        resampled=tuple(prompts * rollout.policy_rollouts for prompts in rounds if prompts > 0),
    )

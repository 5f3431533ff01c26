"""The work of one step: how many sequences of which length, for how many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cord.data.views import Views
from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.trainer.config import RunConfig

FRAMES_A_SECOND = 100  #: of log-mel features


@dataclass(frozen=True)
class Work:
    """Averages of one step, over its streams.

    Attributes:
        sequences: trained on in a step, over all data-parallel ranks: one a prompt for L_tok, the groups for L_seq.
        scored: of them, those that the teacher scores.
        student_tokens: of a sequence: its view's prompt (audio and the question's frame, or its text) and response.
        teacher_tokens: of a scored sequence on the teacher's view, on both views of a contrast together.
        response_tokens: of a sequence.
        clips: of a sequence.
        clip_positions: that the encoder's layers compute of a clip.
        dp: data-parallel ranks.
        microbatches: of a data-parallel rank in an update.
        micro_batch: sequences of a microbatch.
        teacher: the architecture of a teacher with a checkpoint of its own; None: the student's.
        others: those of further teachers with a checkpoint, by name.
        taught_clips: of a scored sequence, on the teacher's views.
        longest_tokens: of the longest student's sequence, which decides about memory; None: all are as long.
        generated: of the sequences, those whose responses an engine makes; None: all. Others are given by the data.
        generated_tokens: of such a response with the prompt that it answers; None: those of a student's sequence.
        prompts: tokens and clips of each view's prompt.
        minibatches: into which the sequences are split.
        passes: over them; each minibatch of a pass is an update.
        resampled: responses of each further round of dynamic sampling, at most.
    """

    sequences: int
    scored: int
    student_tokens: int
    teacher_tokens: int
    response_tokens: int
    clips: float
    clip_positions: int
    dp: int
    microbatches: int
    micro_batch: int
    teacher: Architecture | None = None
    minibatches: int = 1
    passes: int = 1
    resampled: tuple[int, ...] = ()
    others: tuple[tuple[str, Architecture], ...] = ()
    taught_clips: float = 0.0
    longest_tokens: int | None = None
    generated: int | None = None
    generated_tokens: int | None = None
    prompts: tuple[tuple[str, tuple[int, int]], ...] = ()


def make_work(
    config: RunConfig,
    arch: Architecture,
    gpus: int,
    *,
    audio_seconds: float = 10.0,
    text_tokens: int = 60,
    teacher: Architecture | None = None,
    others: tuple[tuple[str, Architecture], ...] = (),
) -> Work:
    """Return the work of a step of this configuration.

    Args:
        config: batch sizes, layout, length of responses (all are taken to be as long as allowed).
        arch: how many tokens a clip makes.
        gpus: that train.
        audio_seconds: of a question.
        text_tokens: of a question's text; half of it for the frame around the audio, and for a view without a question.
        teacher: the architecture in `teacher.checkpoint`, where there is one.
        others: those in the checkpoints of `teachers`, by name.

    Raises:
        CordError: the layout does not divide the GPUs or the model.
    """
    parallel, rollout = config.parallel, config.rollout
    for each in (arch, *filter(None, [teacher]), *dict(others).values()):
        each.check_divisible(parallel.tp, parallel.pp, parallel.virtual_pp, parallel.pipeline_layers, parallel.ep)
    if parallel.ep > 1 and arch.language.experts is None:
        raise CordError(f"parallel.ep={parallel.ep} deals experts, and the model has none; set parallel.ep=1")
    if arch.language.experts is not None and parallel.tp > 1 and not parallel.sequence_parallel:
        raise CordError(f"parallel.tp={parallel.tp} with a mixture of experts needs parallel.sequence_parallel=true")
    if config.optimizer.overlap_communication and parallel.ep > parallel.tp * parallel.cp:
        raise CordError(
            "optimizer.overlap_communication is not built for a parallel.ep beyond parallel.tp × parallel.cp; set it "
            "to false, or lower parallel.ep"
        )
    if gpus % (parallel.pp * parallel.ep):
        raise CordError(
            f"{gpus} GPUs cannot be laid out with parallel.pp={parallel.pp} × parallel.ep={parallel.ep}; give a "
            "multiple of it"
        )
    if gpus % (parallel.tp * parallel.pp * parallel.cp):
        cp = f" × parallel.cp={parallel.cp}" if parallel.cp > 1 else ""
        raise CordError(
            f"{gpus} GPUs cannot be laid out with parallel.tp={parallel.tp} × parallel.pp={parallel.pp}{cp}; "
            "give a multiple of it"
        )
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    enabled = config.objective.policy_gradient.enabled
    groups_of = {name: len(draws) for name, draws in config.objective.groups(rollout.policy_rollouts).items()}
    group = sum(groups_of.values())
    policy = rollout.policy_prompts_per_step * group
    frames = round(audio_seconds * FRAMES_A_SECOND)
    positions = 0 if arch.encoder is None else arch.encoder.computed_positions(frames)
    prompts = _prompts(config, 0 if arch.encoder is None else arch.num_audio_tokens(frames), text_tokens)
    # How many sequences have which view, the student's and the teacher's.
    prompts_alone = rollout.prompts_per_step if config.objective.draws else 0
    alone = [(t, policy if rollout.share else prompts_alone * t.responses) for t in config.objective.terms]
    learned = [(term.student, count) for term, count in alone]
    answered = [(term.rollout, count) for term, count in alone if term.sampled]
    for term in config.objective.policy_terms if not rollout.share else ():
        learned.append((term.student, rollout.policy_prompts_per_step * groups_of[term.name]))
        answered.append(learned[-1])
    taught = [(view, count) for term, count in alone for view in term.taught_views]
    scored, sequences = sum(count for _, count in alone), sum(count for _, count in learned)
    generated = sum(count for _, count in answered)

    def mean(views: list[tuple[str, int]], of: int, behind: int) -> tuple[int, float]:
        tokens = sum(count * (prompts[view][0] + behind) for view, count in views)
        return round(tokens / max(of, 1)), sum(count * prompts[view][1] for view, count in views) / max(of, 1)

    student_tokens, clips = mean(learned, sequences, rollout.max_new_tokens)
    teacher_tokens, taught_clips = mean(taught, scored, rollout.max_new_tokens)
    generated_tokens, _ = mean(answered, generated, rollout.max_new_tokens)
    share = -(-sequences // (dp * config.train.minibatches))
    spare, groups = rollout.prompts_per_step - rollout.policy_prompts_per_step, rollout.policy_prompts_per_step
    rounds = [min(groups, spare - groups * number) for number in range(rollout.dynamic_sampling if enabled else 0)]
    micro = min(config.train.micro_batch_size, share)
    return Work(
        sequences=sequences,
        scored=scored,
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
        response_tokens=rollout.max_new_tokens,
        clips=clips,
        clip_positions=positions,
        dp=dp,
        microbatches=-(-share // micro),
        micro_batch=micro,
        teacher=teacher,
        minibatches=config.train.minibatches,
        passes=config.train.passes,
        resampled=tuple(prompts * group for prompts in rounds if prompts > 0),
        others=others,
        taught_clips=taught_clips,
        longest_tokens=max((prompts[view][0] for view, count in learned if count), default=0) + rollout.max_new_tokens,
        generated=generated,
        generated_tokens=generated_tokens,
        prompts=tuple(prompts.items()),
    )


def _prompts(config: RunConfig, audio: int, text: int) -> dict[str, tuple[int, int]]:
    """Return tokens and clips of the prompt of each view of the objective.

    Args:
        config: of the run; what views sets have in the place of others is left aside.
        audio: tokens of a question's audio; 0 for a text model.
        text: tokens of its text.
    """
    views, found = Views(config.views), {}
    for name in (*config.objective.views, config.objective.student_view):
        parts = views.named(name, "a view").parts
        has_audio = "audio" in parts and audio > 0
        found[name] = (audio * has_audio + (text if "text" in parts else text // 2), int(has_audio))
    return found

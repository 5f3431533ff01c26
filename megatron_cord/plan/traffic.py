"""Bytes that a rank sends in a step, by kind of parallelism, as rings of NCCL send them.

The language model's layers gather their input before each column-parallel matrix and reduce-scatter the output of each
row-parallel one (with sequence parallelism; else they all-reduce the output), and the same backward. A mixture's ranks
send each token to its experts and back, and the same backward. Left out: what context-parallel ranks send each other,
and what takes kilobytes.
Legend: T tokens of a rank in a step, H hidden, n ranks of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cord.plan.devices import NODE, Gpu
from megatron_cord.plan.lora import trained_count, trained_expert_count
from megatron_cord.plan.parameters import rank_layers
from megatron_cord.plan.work import Work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture, LanguageArchitecture
    from megatron_cord.model.config import Tower
    from megatron_cord.trainer.config import RunConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step.

    Attributes:
        tp: tensor-parallel, hidden states and their gradients.
        dp: data-parallel, gradients and new weights.
        pp: to the neighbouring stages.
        ep: expert-parallel, tokens and their gradients.
        vocabulary: to all stages, for the loss that they form together.
    """

    tp: float
    dp: float
    pp: float
    ep: float = 0.0
    vocabulary: float = 0.0

    def seconds(self, config: RunConfig, work: Work, gpu: Gpu, share: float) -> float:
        """Return the time that they take one after the other.

        Args:
            config: the layout; groups of at most eight neighbouring GPUs use NVLink, others the network.
            work: the data-parallel ranks.
            gpu: its link and network.
            share: of both that is reached.
        """
        tp, dp, pp = (config.parallel.tp * config.parallel.cp, work.dp, config.parallel.pp)
        whole = tp * dp * pp
        reaches = (
            (self.tp, tp),
            (self.dp, tp * dp),
            (self.pp, whole),
            (self.ep, config.parallel.ep),
            (self.vocabulary, whole),
        )
        return sum(sent / ((gpu.link if reach <= NODE else gpu.network) * share) for sent, reach in reaches)


def traffic(config: RunConfig, arch: Architecture, work: Work, stage: int) -> Traffic:
    """Return the bytes of a rank of a pipeline stage.

    Args:
        config: of the run.
        arch: of the model.
        work: of a step.
        stage: from 0.
    """
    tp, pp, item, lm = config.parallel.tp, config.parallel.pp, config.model.torch_dtype.itemsize, arch.language
    sequences = -(-work.sequences // work.dp) * work.passes
    taught = -(-work.scored // work.dp) * work.passes if config.objective.distils else 0
    teacher = (work.teacher or arch).language
    width = lm.hidden_size * item / config.parallel.cp
    student = sequences * work.student_tokens * width
    read = taught * work.teacher_tokens * teacher.hidden_size * item / config.parallel.cp
    trains_audio = not {"audio_encoder", "adapter"} <= set(config.model.freeze)
    trains_language = "language_model" in config.model.trained_parts  # beside LoRA, weights have no gradient
    backward = "language_model" not in config.model.freeze or (trains_audio and arch.encoder is not None)
    stages = config.parallel.layers_per_stage(lm.num_layers)
    layers = rank_layers(arch, pp, stage, stages)
    taught_layers = sum(config.parallel.layers_per_stage(teacher.num_layers)[stage::pp])
    dense = 1.0 if lm.experts is None else 0.5  # of a mixture's layer, the attention alone
    whole = dense * layers * student * _layer(config, "language_model", trains=trains_language, backward=backward)
    whole += taught_layers * read * (4 if teacher.experts is None else 2)
    if stage == 0:  # the embedding's sum, and under sequence parallelism what leaves it in the backward pass
        whole += 2 * (student + read) + (student if backward and config.parallel.sequence_parallel else 0)
        if arch.encoder is not None:
            # Clips are dealt over the context-parallel ranks.
            position = arch.encoder.hidden_size * item / config.parallel.cp
            audio = sequences * work.clips * work.clip_positions * position
            trains, reached = "audio_encoder" in config.model.trained_parts, "audio_encoder" not in config.model.freeze
            whole += arch.encoder.num_layers * audio * _layer(config, "audio_encoder", trains=trains, backward=reached)
            heard = taught * work.taught_clips * work.clip_positions * position
            whole += arch.encoder.num_layers * heard * 4
            whole += audio if config.parallel.sequence_parallel else 0
    if stage == pp - 1:
        whole += student + read if config.parallel.sequence_parallel else 0
        if not config.parallel.vocabulary_over_stages:  # the loss's gradient
            whole += 2 * sequences * work.response_tokens * lm.hidden_size * 4 / config.parallel.cp
    ep = config.parallel.ep
    experts = trained_expert_count(config.model, arch, pp, stage, stages, ep)
    trained = trained_count(config.model, arch, tp, pp, stage, stages, ep) - experts
    updates = work.minibatches * work.passes
    cut, replicas = tp if config.parallel.sequence_parallel else 1, work.dp * config.parallel.cp
    copies = max(1, replicas * tp // ep)  # of an expert
    # Gradients are fp32; an all-reduce sends twice what a reduce-scatter does, of which the gathering of weights is the
    # other half. Experts have a distributed optimizer of their own; in Megatron-Core 0.16.1 both gather all weights.
    gathered = item * (2 if experts else 1)
    reduced = updates * (4 + (gathered if config.optimizer.distributed else 4))
    chunks = config.parallel.virtual_pp  # all send on, but the last one its hidden states and the first its gradient
    hops = (chunks - (stage == pp - 1)) * (student + read) + (chunks - (stage == 0)) * backward * student
    return Traffic(
        tp=whole * (tp - 1) / tp,
        dp=reduced * (trained * (replicas - 1) / replicas + experts * (copies - 1) / copies),
        pp=hops / cut,
        ep=_dispatched(config, lm, layers * student / cut, backward=backward)
        + _dispatched(config, teacher, taught_layers * read / cut, backward=False),
        vocabulary=_joint_loss(config, lm, teacher, work, stage) if config.parallel.vocabulary_over_stages else 0.0,
    )


def _joint_loss(
    config: RunConfig, lm: LanguageArchitecture, teacher: LanguageArchitecture, work: Work, stage: int
) -> float:
    """Return bytes of the loss that all stages form: hidden states, statistics, their gradient; copies of the weights.

    A token's statistics are eight numbers of fp32 from each rank. The first rank of the last stage owns the first pp
    parts, among which its own is where tp is 1.
    """
    tp, pp, item = config.parallel.tp, config.parallel.pp, config.model.torch_dtype.itemsize
    ranks, updates = tp * pp, work.minibatches * work.passes
    tokens, scored = (
        -(-count // work.dp) * work.passes * work.response_tokens / config.parallel.cp
        for count in (work.sequences, work.scored if config.objective.distils else 0)
    )
    sent = tokens * lm.hidden_size * item + scored * teacher.hidden_size * item
    sent += (ranks - 1) / ranks * tokens * (2 * 4 * lm.hidden_size + 8 * 4 * ranks)
    part, trains = lm.padded_vocab_size(tp) / ranks, "language_model" in config.model.trained_parts
    own = work.teacher is not None or (config.objective.distils and trains and config.teacher.mode != "live")
    copied, summed = (lm.hidden_size + own * teacher.hidden_size) * item, lm.hidden_size * 4 * trains
    if stage == pp - 1:
        return sent + updates * part * ((pp - 1) * copied if tp == 1 else pp * copied + summed)
    return sent + updates * part * summed


def _dispatched(config: RunConfig, lm: LanguageArchitecture, passed: float, *, backward: bool) -> float:
    """Return bytes of tokens to evenly loaded experts on other ranks and back; passed: bytes through all layers."""
    if lm.experts is None:
        return 0.0
    again = "language_model" in config.model.recompute
    times = 2 + (2 + 2 * again if backward else 0)
    return times * passed * lm.experts.per_token * (config.parallel.ep - 1) / config.parallel.ep


def _layer(config: RunConfig, tower: Tower, *, trains: bool, backward: bool) -> int:
    """Return how many times a layer sends T · H elements, over (n − 1) / n: an all-reduce counts as two.

    Forward two gathers and two reduce-scatters; backward the same for the gradients, and for the weights' gradients
    the input of both column-parallel matrices is gathered once more.
    """
    forward, again = 4, 0
    if tower in config.model.recompute and backward:
        again = 4 if config.model.recompute_granularity == "full" else 2  # all of the layer, or its MLP
    if not backward:
        return forward
    inputs = 2 if trains and config.parallel.sequence_parallel else 0
    return forward + again + 4 + inputs

"""Time of a step by a roofline: operations, bytes of memory and bytes between ranks over parts of the GPU's rates.

The result is a range. Left out: weight sync, checkpoints, and what `cord plan --trace` simulates besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.lora import trained_count
from megatron_cord.plan.parameters import active_count, part_counts, rank_counts, rank_layers
from megatron_cord.plan.traffic import traffic
from megatron_cord.plan.work import Work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.parallel.layout import ParallelConfig
    from megatron_cord.trainer.config import RunConfig

#: of the peak, that a layer reaches: large products alone come near 0.8; norms, activations and launches take the rest
PRODUCTS = (0.35, 0.6)
LINKS = (0.6, 0.85)  #: of NVLink's and the network's bandwidth, that rings of large messages reach
BANDWIDTH = (0.4, 0.7)  #: of the memory's, that decoding reaches
EAGER_STEP = (0.06, 0.03)  #: seconds a token that transformers takes at least, whatever the GPU (local engine)
RUNNING = 64  #: responses that an engine decodes together
SERVER_GPUS = 1  #: that share one server's weights


@dataclass(frozen=True)
class Speed:
    """Of one step; each a pair of the slow and the fast end.

    Attributes:
        flops: floating-point operations of training, over all GPUs; what is computed again does not count.
        rollout: seconds.
        train: seconds, teacher, pipeline bubble and what ranks send each other included.
        tokens_per_second: student's tokens, audio and prompt included, a second of the whole step.
        response_tokens_per_second: the same for the responses' tokens alone.
    """

    flops: float
    rollout: tuple[float, float]
    train: tuple[float, float]
    tokens_per_second: tuple[float, float]
    response_tokens_per_second: tuple[float, float]


def speed(config: RunConfig, arch: Architecture, work: Work, gpu: Gpu, gpus: int, rollout_gpus: int = 0) -> Speed:
    """Return the speed of a configuration.

    Args:
        config: of the run.
        arch: of the model.
        work: of a step.
        gpu: all of the same kind.
        gpus: that train.
        rollout_gpus: that run servers; 0 for the local engine on the training ranks.
    """
    useful, _ = train_flops(config, arch, work)
    seconds = [_stage_seconds(config, arch, work, gpu, gpus, stage) for stage in range(config.parallel.pp)]
    # Of the microbatches, the stages behind the busiest one wait for the first, and it for their last; interleaved
    # stages only for the first of their chunks.
    count = work.microbatches * config.parallel.virtual_pp
    train = _pair([max(end) + (sum(end) - max(end)) / count for end in zip(*seconds, strict=True)])
    engines = (rollout_gpus or gpus) // (SERVER_GPUS if rollout_gpus else 1)
    generated = work.sequences if work.generated is None else work.generated
    answered = work.student_tokens if work.generated_tokens is None else work.generated_tokens
    first, *further = (-(-count // (engines * RUNNING)) for count in (generated, *work.resampled))
    rounds = (first + sum(further), first)  # further rounds of dynamic sampling at the slow end alone
    batch = min(RUNNING, -(-generated // engines))
    lm, item = arch.language, config.model.torch_dtype.itemsize
    cache = batch * answered * 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * item
    read = part_counts(arch).language_model * item + cache
    token = [read / (gpu.bandwidth * part) for part in BANDWIDTH]
    if not rollout_gpus:
        token = [max(pair) for pair in zip(token, EAGER_STEP, strict=True)]
    prefill = 2 * active_count(arch) * answered * batch
    products = [prefill / (gpu.peak * part) for part in PRODUCTS]
    rollout = _pair([n * (work.response_tokens * t + p) for n, t, p in zip(rounds, token, products, strict=True)])
    whole = [a + b for a, b in zip(rollout, train, strict=True)]
    return Speed(
        flops=useful,
        rollout=rollout,
        train=train,
        tokens_per_second=_pair([work.sequences * work.student_tokens / t for t in whole]),
        response_tokens_per_second=_pair([work.sequences * work.response_tokens / t for t in whole]),
    )


def _stage_seconds(
    config: RunConfig, arch: Architecture, work: Work, gpu: Gpu, gpus: int, stage: int
) -> tuple[float, float]:
    """Return the seconds that a pipeline stage works and communicates in a step, slow and fast."""
    tp, pp = config.parallel.tp, config.parallel.pp
    done = operations(config, arch, work)
    stages, ep = config.parallel.layers_per_stage(arch.language.num_layers), config.parallel.ep
    flops = done.layers * rank_layers(arch, pp, stage, stages) / arch.language.num_layers
    flops += (done.first if stage == 0 else 0.0) + done.last_on(config.parallel, stage)
    counts = rank_counts(arch, tp, pp, stage, stages, ep)
    item = config.model.torch_dtype.itemsize
    trained = trained_count(config.model, arch, tp, pp, stage, stages, ep)
    moved = sum(bytes_of_passes(counts.total, trained, item))
    moved *= work.microbatches * work.minibatches * work.passes
    sent = traffic(config, arch, work, stage)
    return _pair(
        [
            flops * pp / (gpus * gpu.peak * products)
            + moved / (gpu.bandwidth * memory)
            + sent.seconds(config, work, gpu, links)
            for products, memory, links in zip(PRODUCTS, BANDWIDTH, LINKS, strict=True)
        ]
    )


def bytes_of_passes(parameters: int, trained: int, item: int) -> tuple[float, float]:
    """Return bytes of weights and gradients that a microbatch's forward and backward pass move, whatever its size.

    Each reads the weights; the gradient of a trained one is written, read, and added to its fp32 sum. So small
    microbatches cost time.

    Args:
        parameters: of the rank.
        trained: of them.
        item: bytes of a weight.
    """
    return parameters * item, parameters * item + trained * (2 * item + 8)


@dataclass(frozen=True)
class Operations:
    """Operations of a step's training over all ranks, with those of recomputation."""

    layers: float  #: of the language models' layers, the same on every pipeline stage
    first: float  #: of the audio encoder, on the first stage
    last: float  #: of the output layer, on the last, or shared by all
    again: float  #: of all these, what is computed again

    def last_on(self, parallel: ParallelConfig, stage: int) -> float:
        """Return those of the output layer on a stage."""
        if parallel.vocabulary_over_stages:
            return self.last / parallel.pp
        return self.last if stage == parallel.pp - 1 else 0.0


def train_flops(config: RunConfig, arch: Architecture, work: Work) -> tuple[float, float]:
    """Return the operations of a step's training over all ranks, teacher and student, and those of recomputation."""
    done = operations(config, arch, work)
    return done.layers + done.first + done.last - done.again, done.again


def operations(config: RunConfig, arch: Architecture, work: Work) -> Operations:
    """Return the operations of a step by where they are done.

    A matrix of P elements costs 2 P a token forward, and 2 P each for the gradients of its input and of itself; causal
    attention half of 4 H s a token and layer forward. The output layer works on responses alone. Each pass costs the
    same; frozen weights have no gradient of their own, and LoRA's products are left out as small. Before the first
    of several updates, the student's own responses are scored once more.
    """
    from megatron_cord.model.config import PARTS  # its room imports torch, which plans do without

    lm = arch.language
    matrices = _matrices(arch)
    student = work.sequences * work.student_tokens
    teacher = work.scored * work.teacher_tokens if config.objective.distils else 0
    teacher_arch = work.teacher or arch
    forward = _forward(matrices, arch, student, work.student_tokens)
    trains_language = "language_model" in config.model.trained_parts
    reaches = set(PARTS) - set(config.model.freeze)  # gradients do, of the weights or of LoRA
    backward = 1 + trains_language if reaches else 0
    again = forward if "language_model" in config.model.recompute else 0.0
    if config.model.recompute_granularity == "selective":  # not the four projections around the attention
        again *= 1 - 2.0 * student * _projections(arch) / forward
    layers = forward * (1 + backward) + _forward(_matrices(teacher_arch), teacher_arch, teacher, work.teacher_tokens)
    output = 2 * lm.vocab_size * work.response_tokens
    logits = output * lm.hidden_size * work.sequences
    last = logits * (2 + trains_language)
    last += output * teacher_arch.language.hidden_size * (work.scored if config.objective.distils else 0)
    audio = first = audio_again = 0.0
    if arch.encoder is not None:
        enc = arch.encoder
        positions = work.sequences * work.clips * work.clip_positions
        a_position = 2 * part_counts(arch).audio_encoder + 4 * enc.hidden_size * work.clip_positions * enc.num_layers
        audio = a_position * positions
        heard = a_position * work.scored * work.taught_clips * work.clip_positions if config.objective.distils else 0
        first = heard + audio * (1 + ("audio_encoder" in reaches) + ("audio_encoder" in config.model.trained_parts))
        if "audio_encoder" in reaches and "audio_encoder" in config.model.recompute:
            projections = 8.0 * enc.hidden_size**2 * enc.num_layers * positions
            audio_again = audio - (projections if config.model.recompute_granularity == "selective" else 0.0)
    scored_before = work.minibatches * work.passes > 1 and config.objective.responses == "student"
    before = (forward, audio, logits) if scored_before else (0.0, 0.0, 0.0)
    return Operations(
        layers=(layers + again) * work.passes + before[0],
        first=(first + audio_again) * work.passes + before[1],
        last=last * work.passes + before[2],
        again=(again + audio_again) * work.passes,
    )


def _projections(arch: Architecture) -> int:
    """Count the parameters of the matrices around the attention, over all layers."""
    lm = arch.language
    return lm.num_layers * 2 * lm.hidden_size * lm.head_dim * (lm.num_heads + lm.num_kv_heads)


def _matrices(arch: Architecture) -> int:
    """Count the parameters of the language model's layers that a token passes."""
    lm = arch.language
    return active_count(arch) - (1 if lm.tied_embeddings else 2) * lm.vocab_size * lm.hidden_size


def _forward(matrices: int, arch: Architecture, tokens: int, length: int) -> float:
    lm = arch.language
    return tokens * (2.0 * matrices + 2.0 * lm.num_heads * lm.head_dim * length * lm.num_layers)


def _pair(values: list[float]) -> tuple[float, float]:
    slow, fast = values
    return slow, fast

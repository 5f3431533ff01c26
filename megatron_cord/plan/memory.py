"""Memory of one GPU by purpose, on the pipeline stage that needs most.

Weights, gradients and optimizer states are exact; activations are the sizes of the tensors that autograd keeps of each
layer; everything else (CUDA context, NCCL's buffers, workspaces, fragmentation) is an allowance. Checkpoints gather
optimizer states in portions of 0.13 GB (trainer/step/optimizer/states.py) between steps, in the memory that activations
and the loss have freed, so they add nothing.
Legend: s tokens of a sequence, b sequences of a microbatch, H hidden, F ffn size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING

from megatron_cord.plan.lora import lora_count, trained_count, trained_expert_count
from megatron_cord.plan.parameters import matrix_counts, part_counts, rank_counts, rank_layers
from megatron_cord.plan.work import Work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture, EncoderArchitecture
    from megatron_cord.model.config import ModelConfig, Tower
    from megatron_cord.parallel.layout import ParallelConfig
    from megatron_cord.trainer.config import RunConfig
    from megatron_cord.trainer.step.optimizer.config import OptimizerConfig

OVERHEAD = 4e9  #: bytes: CUDA context, NCCL's buffers, workspaces
FRAGMENTATION = 0.05  #: share of all else that the allocator cannot use
_CHUNK = 2**29  #: bytes of one model's logits in a chunk of the loss on a GPU (output_layer.CHUNK_ELEMENTS)
_AUDIO = {"audio_encoder", "adapter"}  #: parts that a teacher without audio does not need
_ENGINE_BATCH = 64  #: responses in a batch of the local engine


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        stage: the pipeline stage.
        weights: the student's, LoRA included.
        gradients: fp32, of trained parameters.
        optimizer: fp32 weights and moments on the device; this rank's share of a distributed optimizer.
        teacher: weights of teachers that do not share the student's.
        teacher_hidden: the teacher's hidden states at an update's response tokens.
        engine: weights and key-value cache of a rollout engine in the same process.
        activations: tensors that autograd keeps for the backward pass.
        loss: tensors that the divergence keeps, and its logits.
        overhead: the allowances.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    teacher: float
    teacher_hidden: float
    engine: float
    activations: float
    loss: float
    overhead: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return bytes by purpose."""
        return {name: value for name, value in asdict(self).items() if name != "stage"}


def memory(config: RunConfig, arch: Architecture, work: Work, *, local_engine: bool = True) -> Memory:
    """Return the memory of the stage that needs most.

    Args:
        config: the run's.
        arch: the model's.
        work: a step's.
        local_engine: whether the engine runs in the trainer's processes; servers use other GPUs' memory.
    """
    stages = (_stage(config, arch, work, stage, local_engine) for stage in range(config.parallel.pp))
    return max(stages, key=lambda m: m.total)


def optimizer_bytes(config: OptimizerConfig, trained: int, matrices: int, itemsize: int, dp: int) -> float:
    """Return bytes of fp32 moments, and of fp32 weights beside 16-bit ones; a rank's share if distributed.

    AdamW has two moments, Muon one for matrices.

    Args:
        config: the optimizer's.
        trained: number of trained parameters.
        matrices: number of those in the layers' matrices.
        itemsize: bytes of a weight.
        dp: data-parallel ranks.
    """
    moments = 0 if config.offload else 8 * trained - (4 * matrices if config.kind == "muon" else 0)
    return (moments + (4 * trained if itemsize < 4 else 0)) / (dp if config.distributed else 1)


def _stage(config: RunConfig, arch: Architecture, work: Work, stage: int, local_engine: bool) -> Memory:
    tp, pp, cp, item = config.parallel.tp, config.parallel.pp, config.parallel.cp, config.model.torch_dtype.itemsize
    stages, ep = config.parallel.layers_per_stage(arch.language.num_layers), config.parallel.ep
    counts = rank_counts(arch, tp, pp, stage, stages, ep)
    added = lora_count(config.model, arch, tp, pp, stage, stages, ep)
    trained = trained_count(config.model, arch, tp, pp, stage, stages, ep)
    experts = trained_expert_count(config.model, arch, pp, stage, stages, ep)
    matrices = matrix_counts(arch, tp, pp, stage, stages).trained(config.model.trained_parts)
    last = stage == pp - 1
    teacher = work.teacher or arch
    hidden = (
        -(-work.scored // (work.dp * work.minibatches))
        * work.response_tokens
        * teacher.language.hidden_size
        * item
        / cp
        if last and not config.teacher.offload
        else 0
    )

    used = {
        "weights": (counts.total + added) * item,
        "gradients": trained * 4,
        # Experts' states are distributed over fewer replicas: expert-parallel ranks have different experts.
        "optimizer": optimizer_bytes(config.optimizer, trained - experts, matrices, item, work.dp * cp)
        + optimizer_bytes(config.optimizer, experts, 0, item, max(1, work.dp * cp * tp // ep)),
        "teacher": sum(
            rank_counts(copy, tp, pp, stage, config.parallel.layers_per_stage(copy.language.num_layers), ep).total
            * item
            for copy in _teachers(config, arch, work)
        ),
        "teacher_hidden": hidden,
        "engine": _engine(arch, work, item) if local_engine else 0,
        "activations": activation_bytes(config, arch, work, stage),
        "loss": _loss(config, arch, work) if last or config.parallel.vocabulary_over_stages else 0.0,
    }
    return Memory(stage=stage, **used, overhead=OVERHEAD + FRAGMENTATION * sum(used.values()))


def _teachers(config: RunConfig, arch: Architecture, work: Work) -> list[Architecture]:
    """Return the architectures of teachers with weights of their own, equal teachers once; frozen parts are shared."""
    if not config.objective.distils:
        return []
    audio_teachers, archs = config.audio_teachers, {"": work.teacher, **dict(work.others)}
    copies = {}
    for name, each in {"": config.teacher, **config.teachers}.items():
        with_audio, own = name in audio_teachers, archs.get(name)
        trained = {*config.model.trained_parts} - (set() if with_audio else _AUDIO)
        if own is not None or (each.mode != "live" and trained):
            copies[each, with_audio] = own or arch
    return list(copies.values())


def _loss(config: RunConfig, arch: Architecture, work: Work) -> float:
    """Return bytes of the divergence: what its implementation keeps, and both models' logits of a chunk.

    Fused, which auto takes wherever it can, keeps both gradients in fp32; cached_grad one of the logits. Where all
    stages form it, each has copies of its part of the output weights, and the sum of that part's gradient.
    """
    tp, lm, implementation = config.parallel.tp, arch.language, config.objective.implementation
    rows, columns = work.micro_batch * work.response_tokens / config.parallel.cp, lm.padded_vocab_size(tp) / tp
    copies = 0.0
    if config.parallel.vocabulary_over_stages:
        columns /= config.parallel.pp
        item, trains = config.model.torch_dtype.itemsize, "language_model" in config.model.trained_parts
        copies = columns * lm.hidden_size * (item + 4 * trains)
        copies += columns * item * sum(copy.language.hidden_size for copy in _teachers(config, arch, work))
    kept = {
        "recompute": 0.0,
        "cached_grad": rows * columns * min(config.model.torch_dtype.itemsize, 4),
    }.get(implementation, 4.0 * (rows + columns) * lm.hidden_size)
    return copies + kept + 2 * min(_CHUNK, rows * columns * 4)


def activation_bytes(config: RunConfig, arch: Architecture, work: Work, stage: int) -> float:
    """Return bytes that autograd keeps of the microbatches in flight; a 1F1B pipeline has pp − stage of them.

    Stages that form the loss together have twice as many but one. Interleaved stages have more: the most at a time in
    Megatron's order.
    """
    tp, pp, item, lm = config.parallel.tp, config.parallel.pp, config.model.torch_dtype.itemsize, arch.language
    tokens = (work.longest_tokens or work.student_tokens) * work.micro_batch / config.parallel.cp
    cut = tp if config.parallel.sequence_parallel else 1
    trains_audio = not {"audio_encoder", "adapter"} <= set(config.model.freeze)
    needs_language = "language_model" not in config.model.freeze or trains_audio
    language = 0.0
    if needs_language:
        whole, selective = (language_layer_width(arch, tp, cut, selective=selective) for selective in (False, True))
        layers = rank_layers(arch, pp, stage, config.parallel.layers_per_stage(lm.num_layers))
        language = tokens * _kept(config.model, "language_model", layers, whole, selective, lm.hidden_size / cut)
        language += (
            tokens * lm.hidden_size * (3 if stage == pp - 1 else 1)
        )  # the embedding, or the final norm's input and output
    audio = 0.0
    if stage == 0 and arch.encoder is not None and "audio_encoder" not in config.model.freeze:
        enc = arch.encoder
        clips = ceil(ceil(work.clips) * work.micro_batch / config.parallel.cp)  # CP ranks share out clips
        positions = work.clip_positions * clips
        h = enc.hidden_size
        whole, selective = (encoder_layer_width(enc, tp, cut, selective=selective) for selective in (False, True))
        audio = positions * _kept(config.model, "audio_encoder", enc.num_layers, whole, selective, h / cut)
        audio += positions * _convolution_width(enc)
    return _most_kept(config.parallel, work.microbatches, stage, language, audio) * item


def _convolution_width(enc: EncoderArchitecture) -> float:
    """Return the elements per position that the convolutions, their GELUs and the last norm keep."""
    if enc.chunks is None or not enc.chunks.channels:
        return 2 * enc.num_mels + 6 * enc.hidden_size  # convolutions at twice the rate
    # Each convolution keeps what enters it and its GELU: a quarter of the one before it, over bands and frames.
    frames, mels = enc.chunks.frames, enc.num_mels
    kept = frames * mels * (1 + 2 * enc.chunks.channels * (1 / 4 + 1 / 16 + 1 / 64))
    return kept / enc.chunks.positions(frames) + 2 * enc.hidden_size


def _most_kept(parallel: ParallelConfig, microbatches: int, stage: int, language: float, audio: float) -> float:
    """Return the maximum over a stage's schedule, from what one microbatch keeps in language model and encoder."""
    chunks = parallel.virtual_pp
    if chunks == 1:
        flying = parallel.pp - stage
        return min(2 * flying - 1 if parallel.vocabulary_over_stages else flying, microbatches) * (language + audio)
    from megatron_cord.parallel.stages import pass_order  # its package imports torch, which plans do not need otherwise

    most = kept = 0.0
    for is_backward, chunk, _ in pass_order(max(microbatches, parallel.pp), parallel.pp, chunks, stage):
        kept += (language / chunks + (audio if chunk == 0 else 0.0)) * (-1 if is_backward else 1)
        most = max(most, kept)
    return most


def _kept(model: ModelConfig, tower: Tower, layers: int, whole: float, selective: float, inputs: float) -> float:
    """Return the elements per token that the layers of a tower keep.

    Without recomputation all of every layer; with it less, and all of the one layer that is being recomputed.
    """
    if tower not in model.recompute:
        return layers * whole
    kept = selective if model.recompute_granularity == "selective" else inputs
    return layers * kept + whole - (selective if model.recompute_granularity == "selective" else 0)


def language_layer_width(arch: Architecture, tp: int, cut: int = 1, *, selective: bool = False) -> float:
    """Return the elements per token that one layer keeps.

    Inputs and outputs of both norms; queries, keys and values for every head, the attention's output twice; both halves
    of fc1, the activated one, and their product. With selective recomputation the fused projection, rotated queries and
    keys, the output once, and nothing of the MLP. A norm of queries and keys keeps its inputs. Of a mixture, each of
    the chosen experts has the MLP's four and its input and output twice, for evenly loaded experts; the router keeps
    three numbers in fp32 an expert.

    Args:
        arch: the model's.
        tp: tensor-parallel ranks.
        cut: ranks over which sequence parallelism divides tokens; 1 without it.
        selective: with selective recomputation.
    """
    lm = arch.language
    heads = lm.num_heads + lm.num_kv_heads
    normed = heads * lm.head_dim / tp if lm.qk_norm else 0.0
    if selective:
        return 4 * lm.hidden_size / cut + 3 * heads * lm.head_dim / tp + normed
    mlp = 4 * lm.ffn_hidden_size / tp
    if lm.experts is not None:
        mlp = (4 * lm.experts.per_token * (lm.ffn_hidden_size + lm.hidden_size) + 6 * lm.experts.count) / cut
        mlp += 4 * lm.experts.shared_ffn_hidden_size / tp
    return 4 * lm.hidden_size / cut + 5 * lm.num_heads * lm.head_dim / tp + mlp + normed


def encoder_layer_width(enc: EncoderArchitecture, tp: int, cut: int = 1, *, selective: bool = False) -> float:
    """Return the same for a layer of the audio encoder, which has no gate."""
    if selective:
        return 4 * enc.hidden_size / cut + 4 * enc.hidden_size / tp
    return 4 * enc.hidden_size / cut + (5 * enc.hidden_size + 2 * enc.ffn_hidden_size) / tp


def _engine(arch: Architecture, work: Work, item: int) -> float:
    lm = arch.language
    cache = (
        2
        * lm.num_layers
        * lm.num_kv_heads
        * lm.head_dim
        * item
        * min(_ENGINE_BATCH, work.sequences)
        * work.student_tokens
    )
    return part_counts(arch).total * item + cache

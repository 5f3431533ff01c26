"""One training step of the model on real ranks, in several layouts, as each rank runs it for the tests of model/.

It imports no model of transformers, so that ranks start faster. Legend: B sequences, S padded length, V vocabulary, C
clips.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_cord.convert import export_tensors, read_into, read_tensors
from megatron_cord.model.config import LayerConfig, Tower
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig

VOCAB_SIZE, AUDIO_ID = 101, 100  # no tensor-parallel size divides the vocabulary
MELS, WINDOW = 8, 48
#: Adam's epsilon is large, so that a gradient's rounding error is not scaled up to a whole step.
OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-2, "clip_norm": 1.0}


#: How many placeholders a clip of so many frames takes, worked out by hand for each audio family.
TOKENS: dict[str, Callable[[int], int]] = {
    "audioflamingo3": lambda frames: (frames + 1) // 2 // 2,
    "qwen2_audio": lambda frames: (frames + 1) // 2 // 2,
    "step_audio_2": lambda frames: ((frames + 1) // 2 // 2 + 1) // 2,
    "voxtral": lambda _: WINDOW // 2 // 4,
    "ultravox": lambda frames: -(-((frames + 1) // 2) // 5),
    "qwen2_5_omni": lambda frames: (frames + 1) // 2 // 2,
    "qwen3_omni_moe": lambda frames: frames // 100 * 13 + -(-(frames % 100) // 8),
}
#: Frames of clips in the place of those below for a family that divides them into chunks of a hundred.
LONG = {3: 103, 17: 17, 21: 121, 26: 26, 33: 133, 40: 200, WINDOW: 250}


@dataclass(frozen=True)
class Case:
    """One layout of the ranks, and which checkpoint it holds; data parallelism takes the ranks that remain."""

    parallel: ParallelConfig
    tied: bool = False
    distributed_optimizer: bool = False
    family: str = "qwen2_audio"
    recompute: tuple[Tower, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """One microbatch with the weights [B, S, V] of its loss, zero in the padding."""

    input: ModelInput
    lengths: tuple[int, ...]
    loss_weights: Tensor

    def loss(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return a weighted sum of log-probabilities; logits [B, S, V], or of these of the S rows alone."""
        weights = self.loss_weights if rows is None else self.loss_weights.index_select(1, rows)
        return (logits.log_softmax(-1) * weights).sum()


@dataclass
class Outcome:
    """The results of one rank: tensors by published name, equal on all ranks; logits on a pipeline's last stage."""

    changed_by_round_trip: list[str]
    logits: dict[int, Tensor] = field(default_factory=dict)  #: of each batch [B, S, V]
    #: empty with the distributed optimizer, which splits them over ranks
    gradients: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: float = 0.0
    key_bias: float = 0.0  #: largest in the encoder after the step
    updated: dict[str, Tensor] = field(default_factory=dict)
    updated_logits: dict[int, Tensor] = field(default_factory=dict)


def make_batches(family: str = "qwen2_audio") -> list[Batch]:
    """Return batches of text, one clip, two samples with a clip each, and samples with several clips; always the same.

    A sample is a list of tuples: ("text", number of tokens) or ("clip", number of frames). Families that take
    text alone get it.
    """
    generator = torch.Generator().manual_seed(0)
    longest = WINDOW - 2 if family == "step_audio_2" else WINDOW  # which ends its clips with two frames of silence
    samples: list[list[list[tuple[str, int]]]] = [
        [[("text", 5)], [("text", 9)], [("text", 2)]],
        [[("text", 2), ("clip", longest), ("text", 4)]],
        [[("text", 3), ("clip", 33), ("text", 7)], [("clip", 17), ("text", 2)]],
        [
            [("clip", 3), ("text", 1), ("clip", 40), ("clip", 21)],
            [("text", 6)],
            [("text", 1), ("clip", 26), ("text", 3)],
        ],
    ]
    family = family.partition("+")[0]
    window = WINDOW
    if family not in TOKENS:
        samples = [[[("text", size) for _, size in sample] for sample in batch] for batch in samples]
    elif family == "qwen3_omni_moe":
        samples = [
            [[(kind, LONG[size] if kind == "clip" else size) for kind, size in sample] for sample in batch]
            for batch in samples
        ]
        window = max(LONG.values()) + 6
    return [_batch(generator, TOKENS.get(family), batch, window) for batch in samples]


def _batch(
    generator: torch.Generator, tokens: Callable[[int], int] | None, samples: list[list[tuple[str, int]]], window: int
) -> Batch:
    rows, frames = [], []
    for sample in samples:
        row: list[int] = []
        for kind, size in sample:
            if kind == "clip" and tokens is not None:
                frames.append(size)
                row += [AUDIO_ID] * tokens(size)
            else:
                row += torch.randint(0, AUDIO_ID, (size,), generator=generator).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    longest += -longest % 4  # sequence parallelism splits it in two, context parallelism in four
    token_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    weights = torch.randn(len(rows), longest, VOCAB_SIZE, generator=generator)
    for row, weight in zip(rows, weights, strict=True):
        weight[len(row) :] = 0
    # What follows the frames is noise, so that a model that attends to it gives other logits.
    features = torch.randn(len(frames), MELS, window, generator=generator) if frames else None
    names = tuple(f"sample{i}" for i in range(len(rows)))
    model_input = ModelInput(token_ids, features, tuple(frames) if frames else None, names)
    return Batch(model_input, tuple(map(len, rows)), weights)


def run_cases(_rank: int, cases: dict[str, Case], checkpoints: dict[tuple[str, bool], str]) -> dict[str, Outcome]:
    """Run all cases on the ranks of the default process group; checkpoints by family and tied embeddings."""
    outcomes = {}
    for name, case in cases.items():
        outcomes[name] = run_case(case, checkpoints[case.family, case.tied])
        parallel_state.destroy_model_parallel()
    return outcomes


def run_case(case: Case, checkpoint: str) -> Outcome:
    """Import, export, forward, backward, one step of the optimizer, and a forward pass with the new weights."""
    layout = initialize(case.parallel, seed=0)
    model = LALM(load_architecture(checkpoint), layout, torch.float32, LayerConfig(recompute=case.recompute))
    read_into(model, checkpoint)
    outcome = Outcome(_differences(dict(read_tensors(checkpoint)), dict(export_tensors(model))))

    config = OptimizerConfig(distributed=case.distributed_optimizer, **OPTIMIZER)  # type: ignore[arg-type]
    wrapped = wrap_model(config, model)
    optimizer, _ = build_optimizer(config, wrapped, steps=10)
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    share = list(enumerate(make_batches(case.family)))[
        dist.get_rank(layout.dp_group) :: dist.get_world_size(layout.dp_group)
    ]
    outcome.logits = _forward_backward(wrapped, share, train=True)
    if not case.distributed_optimizer:
        outcome.gradients = _gradients(model)
    _, outcome.gradient_norm, _ = optimizer.step()

    if model.audio_encoder is not None:
        for layer in model.audio_encoder.block.layers:
            bias = layer.self_attention.linear_qkv.bias.detach()
            keys = bias.view(-1, 3, model.audio_encoder.arch.hidden_size // model.audio_encoder.arch.num_heads)[:, 1]
            if not model.audio_encoder.arch.key_bias:
                outcome.key_bias = max(outcome.key_bias, float(keys.abs().max()))
    outcome.updated = {name: tensor.clone() for name, tensor in export_tensors(model)}
    outcome.updated_logits = _forward_backward(wrapped, share, train=False)
    return outcome


def _forward_backward(wrapped: Any, share: list[tuple[int, Batch]], *, train: bool) -> dict[int, Tensor]:
    """Run Megatron's pipeline schedule; return the logits [B, S, V] of each batch on the last stage."""
    logits: dict[int, Tensor] = {}

    def forward_step(batches: Iterator[tuple[int, Batch]], module: Any) -> Any:
        index, batch = next(batches)

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            shard = copy_to_tensor_model_parallel_region(hidden) @ wrapped.module.output_weight.t()
            whole = gather_from_tensor_model_parallel_region(shard).transpose(0, 1)[..., :VOCAB_SIZE]
            layout, length = wrapped.module.layout, batch.input.token_ids.shape[1]
            rows = layout.sequence_sharding.rows((0, length))  # of this context-parallel rank
            everyones = whole.new_zeros(len(whole), length, VOCAB_SIZE).index_copy(1, rows, whole.detach())
            dist.all_reduce(everyones, group=layout.cp_group)
            logits[index] = everyones
            return batch.loss(whole, rows), torch.tensor(1), {}

        return module(batch.input), loss_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(share),
        model=[wrapped],
        num_microbatches=len(share),
        seq_length=max(batch.input.token_ids.shape[1] for _, batch in share),
        micro_batch_size=max(len(batch.lengths) for _, batch in share),
        forward_only=not train,
    )
    return logits


def _gradients(model: LALM) -> dict[str, Tensor]:
    """Return the whole model's gradients by published name: export takes each parameter's gradient for it."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in kept:
        gradient = getattr(parameter, "main_grad", None)
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    gradients = {name: tensor.clone() for name, tensor in export_tensors(model)}
    for parameter, data in kept.items():
        parameter.data = data
    return gradients


def _differences(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Return names that only one has, and names whose tensors are not the same bits."""
    common = expected.keys() & given.keys()
    unequal = [
        name
        for name in common
        if expected[name].dtype != given[name].dtype or not torch.equal(expected[name], given[name])
    ]
    return sorted([*(expected.keys() ^ given.keys()), *unequal])

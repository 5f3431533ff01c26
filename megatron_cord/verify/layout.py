"""``verify layout``: one training step under a layout, through the trainer, against transformers in float64.

A small Qwen2-Audio of random weights learns from a few responses of random tokens, with both losses and audio in
every sequence. Each rank draws the same inputs and computes the same reference: the model from transformers, one
unpadded sequence after the other, the loss written out, and torch's AdamW. It shares no code with what it checks.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.convert import export_tensors
from megatron_cord.convert.peft.stream import export_adapters, import_adapters
from megatron_cord.errors import CordError
from megatron_cord.losses import TokenWeightsConfig
from megatron_cord.model.config import PARTS, ModelConfig
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.portability import device_name
from megatron_cord.parallel.tf32 import full_float32, tf32_in_use
from megatron_cord.trainer.config import TrainConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from megatron_cord.verify.layout_reference import (
    Outcome,
    Sizes,
    make_checkpoint,
    make_sequences,
    reference_step,
)
from megatron_cord.verify.lora_reference import LoraReference

#: Largest relative error of loss, gradients and weights after the step, by the type of the weights.
TOLERANCES = {"float32": (1e-5, 1e-5, 1e-5), "bfloat16": (2e-2, 1e-1, 2e-2)}
OBJECTIVE = ObjectiveConfig(token_weights=TokenWeightsConfig(top_k=3))


@dataclass(frozen=True)
class VerifyLayoutConfig:
    """The layout, with the keys that a run has, and the small model."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(checkpoint="", dtype="float32"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(micro_batch_size=2, tokens_per_microbatch=96))
    #: Adam's epsilon is large, so that a gradient's rounding error is not scaled up to a whole step.
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-2, epsilon=1e-2))
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0  #: of weights and sequences

    def __post_init__(self) -> None:
        if self.model.checkpoint:
            raise CordError("model.checkpoint: the check makes its own small model; set sizes.* to change it")
        if self.model.lora.dropout:
            raise CordError("model.lora.dropout: the reference draws no masks; leave it at 0")
        if self.optimizer.weight_decay:
            raise CordError("optimizer.weight_decay: the reference has none; leave it at 0")
        if self.optimizer.groups or self.optimizer.kind != "adam":
            raise CordError("optimizer: the reference is AdamW with one learning rate; leave kind and groups out")


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    error: float  #: the largest over all ranks
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is small enough; a NaN is not."""
        return self.error <= self.limit


def verify_layout(overrides: Sequence[str]) -> int:
    """Print the table on the first rank; return 1 if anything differs on any, else 0. All ranks call it."""
    config = load_config(VerifyLayoutConfig, None, overrides)
    layout = initialize(config.parallel, config.seed)
    try:
        training = tf32_in_use()
        with full_float32():
            rows = compare(*run_step(config, layout), config.model.dtype)
        if layout.is_main:
            parallel = config.parallel
            stages = f"×{parallel.virtual_pp}" if parallel.virtual_pp > 1 else ""
            sizes = f"TP={parallel.tp} PP={parallel.pp}{stages} CP={parallel.cp} DP={layout.dp_group.size()}"
            sizes += f" EP={parallel.ep}" if config.sizes.experts else ""
            sizes += ", vocabulary over stages" if parallel.vocabulary_over_stages else ""
            print_table(rows, f"layout on {device_name()}: {sizes}, {config.train.packing}, {config.model.dtype}")
            if layout.device.type == "cuda" and config.model.dtype == "float32":
                print(f"checked without TF32; a run in float32 here uses: {training}")
        return 0 if all(row.passed for row in rows) else 1
    finally:
        finalize()


def run_step(config: VerifyLayoutConfig, layout: Layout) -> tuple[Outcome, Outcome]:
    """Return one step in the layout, and the reference's. Collective over all ranks."""
    sequences, objective = make_sequences(config.sizes, config.seed), objective_of(config)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        reference = make_checkpoint(directory, config.sizes, config.seed)
        model = build_student(replace(config.model, checkpoint=name), layout)
        lora = None
        if model.lora is not None:
            names = [name for target in model.lora.targets for name in target.names()]
            lora = LoraReference(reference, names, config.model.lora.rank, config.model.lora.scale, config.seed)
            whole = dict(export_tensors(model, select=lambda parameter: parameter.requires_grad))  # as it is
            import_adapters(model, lora.factors | whole, "the reference")
        untrained = set(PARTS) - set(config.model.trained_parts)
        expected = reference_step(reference, sequences, objective, config.optimizer, untrained, lora)
        teacher = Teacher(TeacherConfig(), model, name)
    return train_once(config, layout, model, teacher, objective, sequences), expected


def objective_of(config: VerifyLayoutConfig) -> ObjectiveConfig:
    """Return the objective: with experts it has the loss that balances them."""
    return replace(OBJECTIVE, router_aux_loss=0.1) if config.sizes.experts else OBJECTIVE


def train_once(
    config: VerifyLayoutConfig,
    layout: Layout,
    model: LALM,
    teacher: Teacher,
    objective: ObjectiveConfig,
    sequences: Sequence[TrainingSequence],
    others: Mapping[str, Teacher] | None = None,
) -> Outcome:
    """Return what one step of the trainer makes in the layout. Collective over all ranks.

    Args:
        config: how the student is trained.
        layout: this rank's place.
        model: the student.
        teacher: its teacher.
        objective: what is minimised.
        sequences: of all data-parallel ranks.
        others: further teachers by name.
    """
    wrapped = wrap_model(config.optimizer, model)
    optimizer, scheduler = build_optimizer(config.optimizer, wrapped, steps=10)
    gradients: dict[str, Tensor] = {}
    finish = model.config.finalize_model_grads_func

    def finish_and_keep(*arguments: Any, **options: Any) -> None:
        finish(*arguments, **options)
        gradients.update(whole_gradients(wrapped))  # the optimizer is about to clip them

    model.config.finalize_model_grads_func = finish_and_keep
    step = TrainStep(
        wrapped,
        teacher,
        optimizer,
        scheduler,
        objective,
        config.train,
        pad_id=0,
        max_new_tokens=config.sizes.longest,
        others=others,
    )
    result = step(sequences[layout.dp_rank :: layout.dp_size], [s.response for s in sequences])
    weights = {name: tensor.clone() for name, tensor in export_tensors(model)}
    if model.lora is not None:
        weights |= {name: tensor.clone() for name, tensor in export_adapters(model)}
    release(wrapped)
    return Outcome(result.metrics["loss"], gradients, weights)


def whole_gradients(wrapped: DistributedDataParallel) -> dict[str, Tensor]:
    """Return the gradients of everything that is trained, by published name, on every rank.

    Export takes each gradient for its parameter. With the distributed optimizer each data-parallel rank has summed a
    part of each bucket only; the parts are gathered first.
    """
    if wrapped.ddp_config.use_distributed_optimizer:
        for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                dist.all_gather(list(shards.unbind()), shards[group.rank()].clone(), group=group)
    kept = {parameter: parameter.data for parameter in wrapped.module.parameters() if parameter.requires_grad}
    for parameter in kept:
        parameter.data = parameter.main_grad
    trained = export_tensors(wrapped.module, select=lambda parameter: parameter.requires_grad)
    added = export_adapters(wrapped.module) if wrapped.module.lora is not None else ()
    gradients = {name: tensor.clone() for name, tensor in chain(trained, added)}
    for parameter, data in kept.items():
        parameter.data = data
    return gradients


def compare(actual: Outcome, expected: Outcome, dtype: str) -> list[Row]:
    """Return a row for the loss, and two per tensor: the largest errors over all ranks. Collective."""
    loss_limit, gradient_limit, weight_limit = TOLERANCES[dtype]
    rows = [Row("loss", abs(actual.loss - expected.loss) / abs(expected.loss), loss_limit)]
    # Against its own size and, for a tensor that hardly matters, against a thousandth of the whole gradient.
    floor = 1e-3 * math.sqrt(sum(float(g.square().sum()) for g in expected.gradients.values()))
    for kind, ours, theirs, limit in (
        ("gradient", actual.gradients, expected.gradients, gradient_limit),
        ("weight", actual.weights, expected.weights, weight_limit),
    ):
        for name in sorted(ours.keys() | theirs.keys()):
            error = math.inf  # a tensor that only one has
            if name in ours and name in theirs:
                difference = ours[name].double().cpu() - theirs[name]
                error = float(difference.norm()) / max(float(theirs[name].norm()), floor if kind == "gradient" else 0.0)
            rows.append(Row(f"{kind} of {name}", error, limit))
    errors = torch.tensor([row.error for row in rows], dtype=torch.float64).nan_to_num(math.inf, math.inf)
    errors = errors.to(next(iter(actual.weights.values())).device)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return [replace(row, error=error) for row, error in zip(rows, errors.tolist(), strict=True)]


def print_table(rows: list[Row], title: str) -> None:
    """Print the loss, the worst gradients and weights, and whatever failed."""
    table = Table("", "error", "limit", "", title=title, box=None, header_style="bold", pad_edge=False)
    worst = sorted(rows, key=lambda row: -row.error / row.limit)
    shown = [row for row in rows if not row.passed]
    for kind, count in (("loss", 1), ("gradient", 5), ("weight", 5)):
        shown += [row for row in worst if row.name.startswith(kind) and row.passed][:count]
    for row in shown:
        table.add_row(
            row.name, f"{row.error:.1e}", f"{row.limit:.0e}", "[green]pass[/]" if row.passed else "[red]FAIL[/]"
        )
    Console(width=110).print(table)
    failed = sum(not row.passed for row in rows)
    tensors = sum(row.name.startswith("gradient") for row in rows)
    print(
        f"{failed} of {len(rows)} comparisons failed"
        if failed
        else f"loss, {tensors} gradients and all weights agree with one rank in float64"
    )

"""Trace one rank of each pipeline stage through a step of training: model, teacher, optimizer and step are the run's.

Simplifications: layers are Megatron's with torch's attention, as transformer-engine's need its library; all sequences
have the planned lengths; all experts of a mixture are chosen equally often; ranks of a stage do alike, so the first of
each stands for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import EXPERTS, LALM, ModelInput
from megatron_cord.model.pipeline import padding_in_front
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import Layout, finalize, initialize
from megatron_cord.parallel.stages import forward_order
from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.trace.counting import CountingMode
from megatron_cord.plan.trace.records import RankTrace
from megatron_cord.plan.trace.samples import make_rollouts, make_sequences
from megatron_cord.plan.trace.substitutes import substituted
from megatron_cord.plan.work import Work
from megatron_cord.trainer.building.training import build_teachers
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import Microbatch
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.trainer.config import RunConfig

_Shape = tuple[int, int, int]


def trace_step(
    config: RunConfig, arch: Architecture, work: Work, gpu: Gpu, *, audio_seconds: float = 10.0
) -> list[RankTrace]:
    """Return the trace of the first rank of each pipeline stage.

    Args:
        config: of the run.
        arch: of the student.
        work: of a step, with the number of data-parallel ranks.
        gpu: whose memory the loss may take.
        audio_seconds: of a question.

    Raises:
        CordError: torch has a GPU, another process group is open, or the configuration is one that no trace covers.
    """
    if portability.has_cuda():
        raise CordError("cord plan --trace computes nothing and needs no GPU: set CUDA_VISIBLE_DEVICES= (empty)")
    if dist.is_initialized():
        raise CordError("a trace makes process groups of its own; call it outside of torchrun")
    config = replace(config, model=replace(config.model, layers="torch"))
    return [_trace_rank(config, arch, work, gpu, stage, audio_seconds) for stage in range(config.parallel.pp)]


def _trace_rank(
    config: RunConfig, arch: Architecture, work: Work, gpu: Gpu, stage: int, audio_seconds: float
) -> RankTrace:
    begun = time.perf_counter()
    parallel = config.parallel
    ranks_of_stage = parallel.tp * parallel.cp * work.dp
    world, rank = ranks_of_stage * parallel.pp, ranks_of_stage * stage  # Megatron's order: tp, cp, dp, pp
    mode = CountingMode()
    archs = {"": work.teacher or arch, **dict(work.others)}
    named = {"": config.teacher, **config.teachers}.items()
    teacher_archs = {each.checkpoint: archs[name] for name, each in named if each.checkpoint is not None}
    with _fake_ranks(world, rank), substituted(mode, arch, teacher_archs, gpu.memory), mode:
        layout = initialize(parallel, config.seed)
        mode.groups.update(_names(layout))
        if layout.channels is not None:
            mode.gradient_groups.update(str(group.group_name) for group in layout.channels[1])
        state: dict[str, int] = {}

        def built(name: str) -> None:
            state[name] = mode.bytes - sum(state.values())

        student = build_student(config.model, layout)
        built("weights")
        teachers = build_teachers(config, student, ())
        built("teacher")
        model = wrap_model(config.optimizer, student)
        built("gradients")
        optimizer, scheduler = build_optimizer(config.optimizer, model, config.train.steps)
        built("optimizer")
        step = TrainStep(
            model,
            teachers[""],
            optimizer,
            scheduler,
            config.objective,
            config.train,
            0,
            config.rollout.max_new_tokens,
            teachers,
        )
        finish = student.config.finalize_model_grads_func
        student.config.finalize_model_grads_func = mode.within("gradient_reduction", finish)
        optimizer.step = mode.within("optimizer", optimizer.step)
        trained: list[Microbatch] = []
        taught: list[Microbatch] = []

        def count(teacher: Teacher) -> None:
            """Count a teacher's passes, and say what it is sent in them."""
            hidden_states = mode.within("teacher", teacher.hidden_states)

            def read(batches: list[Microbatch], *args: Any) -> Any:
                taught.extend(batch for batch in batches if batch.teacher is not None)
                views = [batch.teacher for batch in batches], [batch.contrast for batch in batches]
                sent = [_received(teacher.model, [each for each in view if each is not None])[0] for view in views]
                mode.expect([shape for shapes in sent for shape in shapes], [])
                return hidden_states(batches, *args)

            teacher.hidden_states = read  # type: ignore[method-assign,assignment]

        def learn(batches: list[Microbatch], *args: Any, **kwargs: Any) -> None:
            trained.extend(batches)
            mode.expect(*_received(student, [batch.student for batch in batches]))
            pipeline(batches, *args, **kwargs)

        for teacher in dict.fromkeys(teachers.values()):  # equal ones are the same
            count(teacher)
        pipeline = mode.within("forward_backward", step._pipeline)
        step._pipeline = learn  # type: ignore[method-assign,assignment]
        rollouts = make_rollouts(config, work)
        sequences = make_sequences(config, arch, work, rollouts, layout.dp_rank, audio_seconds)
        mode.restart()
        result = step(sequences, rollouts)
        if result.skipped:
            raise CordError("trace: the step skipped its update, so its optimizer was not counted")
        phases = mode.results()
        state["optimizer"] += phases["optimizer"].grown
        experts = [p for name, p in student.named_parameters() if EXPERTS in name and "lora" not in name]
        return RankTrace(
            stage=stage,
            rank=rank,
            world=world,
            parameters=sum(p.numel() for p in student.parameters()),
            trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
            state_bytes=state,
            sequences=sum(len(batch.sequences) for batch in trained),
            taught=sum(len(batch.sequences) for batch in taught),
            microbatches=len(trained),
            taught_microbatches=len(taught),
            phases=phases,
            seconds=time.perf_counter() - begun,
            experts=sum(p.numel() for p in experts),
            trained_experts=sum(p.numel() for p in experts if p.requires_grad),
        )


def _received(model: LALM, given: list[ModelInput]) -> tuple[list[_Shape], list[_Shape]]:
    """Return the shapes of the activations and of the gradients that this rank is sent of microbatches, in order."""
    if not given:
        return [], []
    pp, chunks = model.layout.config.pp, len(model.chunks)
    shapes = [_sent(each, model) for each in [*padding_in_front(model, len(given)), *given]]
    order = forward_order(len(shapes), pp, chunks)
    first, last = (model.layout.is_first_stage, 0), (model.layout.is_last_stage, 0)  # nothing comes to these
    return (
        [shapes[number] for chunk, number in order if (True, chunk) != first],
        [shapes[number] for chunk, number in order if (True, chunk) != last],
    )


def _sent(given: ModelInput, model: LALM) -> _Shape:
    """Return the shape [S, B, H] of what a stage sends of a microbatch to the next one."""
    sharding = model.layout.sequence_sharding
    batch, length = given.token_ids.shape
    return length // (sharding.cp * sharding.sequence_parallel), batch, model.arch.language.hidden_size


@contextmanager
def _fake_ranks(world: int, rank: int) -> Iterator[None]:
    """Be one of so many ranks that answer nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        finalize()


def _names(layout: Layout) -> dict[str, str]:
    """Return what process groups are called in the result, by their own names."""
    groups = {"world": dist.group.WORLD, "pp": layout.pp_group, "dp": layout.dp_group, "cp": layout.cp_group}
    named = {str(group.group_name): name for name, group in groups.items() if group is not None}
    kinds = {"dp_cp": "dp", "intra_dp_cp": "dp", "expt_dp": "dp", "intra_expt_dp": "dp", "ep": "ep", "tp_ep": "ep"}
    for attribute, name in kinds.items():
        group = getattr(layout.groups, attribute, None)
        if group is not None:
            named[str(group.group_name)] = name
    if layout.config.vocabulary_over_stages:
        named[str(layout.vocabulary_group.group_name)] = "vocabulary"
    named |= {str(group.group_name): "pp" for kind in layout.channels or () for group in kind}
    return named | {str(layout.tp_group.group_name): "tp"}

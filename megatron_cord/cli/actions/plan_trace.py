"""Print what a step takes by the real code on fake tensors, and how long it may take on many GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cord.model.architecture import Architecture
from megatron_cord.plan import memory, train_flops
from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.simulation.rates import Rate, Rates
from megatron_cord.plan.simulation.scaling import Scaled, scale
from megatron_cord.plan.trace.records import PHASES, RankTrace
from megatron_cord.plan.trace.step import trace_step
from megatron_cord.plan.work import make_work
from megatron_cord.trainer.config import RunConfig

#: rows of operations: label, phase, field
_OPERATIONS = (
    ("teacher", "teacher", "forward_flops"),
    ("forward", "forward_backward", "forward_flops"),
    ("backward", "forward_backward", "backward_flops"),
    ("loss of all stages", "loss", "forward_flops"),
)
_WIDTH = 120  #: columns of what is printed into a file
_OF_IT = {"bubble": "in pipeline bubbles", "stragglers": "for slow GPUs", "collectives": "in collectives"}


@dataclass(frozen=True)
class Request:
    """What to trace and to simulate.

    Attributes:
        config: of the run.
        arch: of the student.
        gpu: all of the same kind.
        gpus: numbers of GPUs that train; the first one is traced.
        rollout_gpus: of servers, beside the first number of GPUs; 0: the local engine.
        lengths: as for `make_work`.
    """

    config: RunConfig
    arch: Architecture
    gpu: Gpu
    gpus: Sequence[int]
    rollout_gpus: int
    lengths: dict[str, Any]


def print_trace(request: Request, *, as_json: bool) -> None:
    """Trace, simulate and print."""
    config, arch, first = request.config, request.arch, request.gpus[0]
    work = make_work(config, arch, first, **request.lengths)
    traces = trace_step(config, arch, work, request.gpu, audio_seconds=request.lengths["audio_seconds"])
    scaled = scale(config, arch, traces, request.gpu, request.gpus, request.rollout_gpus, **request.lengths)
    rates = Rates.of(request.gpu).all()
    planned, flops = memory(config, arch, work, local_engine=False), sum(train_flops(config, arch, work))
    if as_json:
        result = {
            "gpu": asdict(request.gpu),
            "traces": [trace.to_json() for trace in traces],
            "planned": {"memory_bytes": planned.parts(), "flops": flops},
            "steps": [asdict(step) for step in scaled],
            "rates": [asdict(rate) for rate in rates],
        }
        print(json.dumps(result, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(_stages(traces), _collectives(traces))
    console.print(_compared(traces, flops, work.dp * config.parallel.tp * config.parallel.cp), highlight=False)
    console.print(_steps(scaled, request.gpu), _rates(rates))


def _compared(traces: Sequence[RankTrace], planned: float, ranks: int) -> str:
    """Say what the traced ranks and the formulas come to, for so many ranks of a stage."""
    traced = sum(trace.flops for trace in traces) * ranks
    seconds = sum(trace.seconds for trace in traces)
    return (
        f"operations of a step on all GPUs: {traced:.3e} traced, {planned:.3e} by cord plan's formulas "
        f"({planned / traced - 1:+.1%}); tracing took {seconds:.0f} s"
    )


def _stages(traces: Sequence[RankTrace]) -> Table:
    """Return bytes and operations of the traced ranks."""
    table = Table("", *(f"stage {trace.stage}, rank {trace.rank}" for trace in traces), title=_title(traces))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("parameters", *(f"{trace.parameters:,}" for trace in traces))
    for name in traces[0].state_bytes:
        table.add_row(f"{name}, GB", *(f"{trace.state_bytes[name] / 1e9:.2f}" for trace in traces))
    for name in PHASES:
        phases = [trace.phases.get(name) for trace in traces]
        if any(phases):
            peaks = ("–" if phase is None else f"{phase.peak / 1e9:.2f}" for phase in phases)
            table.add_row(f"most in {name.replace('_', ' ')}, GB", *peaks)
    for label, name, part in _OPERATIONS:
        if not any(name in trace.phases for trace in traces):
            continue
        counts = (getattr(trace.phases[name], part) if name in trace.phases else 0.0 for trace in traces)
        table.add_row(f"{label}, TFLOP", *(f"{count / 1e12:.1f}" for count in counts))
    table.add_row("microbatches", *(str(trace.microbatches) for trace in traces))
    return table


def _title(traces: Sequence[RankTrace]) -> str:
    return f"one rank of each pipeline stage, of {traces[0].world:,}"


def _collectives(traces: Sequence[RankTrace]) -> Table:
    """Return what the traced ranks send, largest first."""
    table = Table(
        "stage", "phase", "collective", "group", "ranks", "calls", "GB", "GB sent", title="collectives of a rank"
    )
    for column in table.columns[4:]:
        column.justify = "right"
    rows = [
        (trace.stage, name, collective)
        for trace in traces
        for name, phase in trace.phases.items()
        for collective in phase.collectives
    ]
    for stage, name, c in sorted(rows, key=lambda row: (row[0], -row[2].sent)):
        kind = f"{c.kind.replace('_', ' ')}{', backward' if c.backward else ''}"
        sizes = (f"{value / 1e9:.3f}" for value in (c.nbytes, c.sent))
        table.add_row(str(stage), name.replace("_", " "), kind, c.group, str(c.ranks), f"{c.calls:,}", *sizes)
    return table


def _steps(scaled: Sequence[Scaled], gpu: Gpu) -> Table:
    """Return the simulated steps, each as a range."""
    table = Table("seconds of a step", title=f"{gpu.name}: simulated, from the slow to the fast end of the rates below")
    for step in scaled:
        head = f"{step.gpus:,}" + (f" + {step.rollout_gpus:,}" if step.rollout_gpus else "")
        table.add_column(f"{head} GPUs\n{step.sequences:,} sequences", justify="right")
    for name in scaled[0].slow.seconds:
        table.add_row(name.replace("_", " "), *(_range(s.slow.seconds[name], s.fast.seconds[name]) for s in scaled))
    table.add_row("all", *(_range(s.slow.total, s.fast.total) for s in scaled), end_section=True)
    for name, label in _OF_IT.items():
        table.add_row(f"of it {label}", *(_range(getattr(s.slow, name), getattr(s.fast, name)) for s in scaled))
    table.add_row("tokens/s", *(f"{s.tokens_per_second[0]:,.0f}–{s.tokens_per_second[1]:,.0f}" for s in scaled))
    table.add_row("MFU, training", *(f"{s.mfu[0]:.0%}–{s.mfu[1]:.0%}" for s in scaled))
    return table


def _range(slow: float, fast: float) -> str:
    return f"{slow:.2f}–{fast:.2f}"


def _rates(rates: Sequence[Rate]) -> Table:
    """Return the rates with their sources."""
    table = Table("rate", "value", "kind", "source", title="rates of the simulation")
    for rate in rates:
        value = f"{rate.slow:.4g}" if rate.slow == rate.fast else f"{rate.slow:.4g}–{rate.fast:.4g}"
        table.add_row(rate.name, f"{value} {rate.unit}".strip(), rate.kind, rate.source)
    return table

"""``verify weight_sync``: each transport of weights against a fresh server started from the exported checkpoint.

The trainer's weights are the checkpoint's, changed in every element. They are exported; one server starts from the
export, others from the checkpoint itself. After the weight sync by each transport the others' checksums, tensor by
tensor, and greedy outputs must be those of the first.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.convert import export_tensors, read_into
from megatron_cord.convert.hf.auxiliary_files import with_dtype
from megatron_cord.convert.hf.carried import files_beside, read_carried
from megatron_cord.convert.hf.writer import HFDirectoryWriter, plan_shards
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.parallel.objects import broadcast_json, run_on_main
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.client.probe import Outputs, outputs_of
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig, SglangServer, check_version
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig, WeightSyncReport, build_weight_sync
from megatron_cord.rollout.sglang.weight_sync.sessions import differing
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.verify.placement import Place, Placement, Transport, agree_on_placement

TRANSPORTS: tuple[Transport, ...] = ("process_group", "shared_memory", "disk")
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class VerifyWeightSyncConfig:
    """What is checked."""

    checkpoint: str  #: Hugging Face directory of the model
    servers: tuple[
        str, ...
    ] = ()  #: running ones of that checkpoint, http://host:port; one is started if there are none
    api_key: str = field(default="", metadata={"secret": True})  #: of the running servers
    #: of the servers that are started; auto: cuda where there is one
    server_device: Literal["auto", "cpu", "cuda"] = "auto"
    python: Path = Path(ENVIRONMENT) / "bin" / "python"  #: the interpreter that SGLang is installed for
    #: cuda: of a GPU's free memory, for the weights and cache of each server that is started; unset: the processes of
    #: a GPU divide four fifths of it
    memory_fraction: float | None = None
    start_seconds: float = 600.0  #: how long a server may take to start
    transports: tuple[Transport, ...] = TRANSPORTS  #: which to check
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  #: of the trainer's weights and the servers'
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)  #: all but its transport
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not self.transports:
            raise CordError("transports names nothing to check")
        if self.memory_fraction is not None and not 0 < self.memory_fraction < 1:
            raise CordError(f"memory_fraction is {self.memory_fraction}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Expected:
    """The checksums and answers of the fresh server."""

    checksums: list[dict[str, str]]  #: of its tensors by name, for each of its ranks
    outputs: Outputs


@dataclass(frozen=True)
class Check:
    """One server after the weight sync by one transport."""

    transport: str
    server: str
    report: WeightSyncReport
    tensors: int  #: in the server's model
    differing: tuple[str, ...]  #: those whose checksum is not the fresh server's
    outputs_equal: bool

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return self.server in self.report.current and not self.differing and self.outputs_equal


def verify_weight_sync(overrides: Sequence[str]) -> int:
    """Print the table on the first rank; return 1 if a server differs after any transport, else 0.

    Under torchrun all ranks call it.
    """
    config = load_config(VerifyWeightSyncConfig, None, overrides)
    layout = initialize(config.parallel, seed=0)
    try:
        placement, transports, skipped = agree_on_placement(
            config.server_device, config.memory_fraction, config.transports, check_running=bool(config.servers)
        )
        with tempfile.TemporaryDirectory(prefix="verify-weight-sync-") as work:
            checks = run_checks(replace(config, transports=transports), placement, layout, Path(work))
        passed = all(check.passed for check in checks)
        if layout.is_main:
            print_table(checks, skipped)
        return 0 if broadcast_json(passed) else 1
    finally:
        finalize()


def run_checks(config: VerifyWeightSyncConfig, placement: Placement, layout: Layout, work: Path) -> list[Check]:
    """Check all transports; the list is rank 0's, other ranks get an empty one."""
    dtype = getattr(torch, config.dtype)
    model = changed_model(config.checkpoint, layout, dtype)
    source = ShardedModelWeights(model)
    export = work / "export"
    _write(model, source, Path(config.checkpoint), export, dtype)
    checks: list[Check] = []
    with ExitStack() as stack:
        servers: list[Endpoint] = []
        expected: Expected | None = None

        def prepare() -> None:
            nonlocal servers, expected
            try:
                check_version(config.python)
                started = [_start(config, placement.fresh, export, work / "fresh.log", stack)]
                if placement.share_gpu:
                    started[0].wait()
                if not config.servers:
                    base = checkpoint_directory(config.checkpoint)
                    started.append(_start(config, placement.checked, base, work / "server.log", stack))
                for server in started:
                    server.wait()
                fresh, timeout = started[0].endpoint, config.weight_sync.timeout_seconds
                # Once: a second answer comes in part from its cache, and is rounded otherwise.
                expected = Expected(fresh.checksums(timeout), outputs_of(fresh, config.checkpoint, timeout))
                servers = [server.endpoint for server in started[1:]] or [
                    Endpoint(url, config.api_key) for url in config.servers
                ]
            except ServerError as error:
                raise CordError(str(error)) from error

        run_on_main(prepare)
        for number, transport in enumerate(config.transports, start=1):
            checks += _check(config, transport, number, source, servers, expected, dtype)
    return checks


def _start(config: VerifyWeightSyncConfig, place: Place, checkpoint: Path, log: Path, stack: ExitStack) -> SglangServer:
    """Start a server on this machine, ended with the stack."""
    settings = ServerConfig(
        checkpoint.resolve(),
        device=place.device,
        gpus=place.gpus,
        memory_fraction=place.memory_fraction,
        max_total_tokens=8192,
        dtype=config.dtype,
        python=config.python,
        start_timeout=config.start_seconds,
        seeded=False,
    )
    server = SglangServer(settings, "", log)
    stack.callback(server.stop)
    server.start()
    return server


def _check(
    config: VerifyWeightSyncConfig,
    transport: Transport,
    number: int,
    source: ShardedModelWeights,
    servers: list[Endpoint],
    expected: Expected | None,
    dtype: torch.dtype,
) -> list[Check]:
    """Check one transport, from servers with the checkpoint's own weights."""
    timeout = config.weight_sync.timeout_seconds
    for server in servers:
        body = {"model_path": str(checkpoint_directory(config.checkpoint).resolve()), "load_format": "safetensors"}
        server.post("/update_weights_from_disk", body, timeout)
    weight_sync = build_weight_sync(replace(config.weight_sync, transport=transport), config.checkpoint, dtype)
    try:
        report = weight_sync.update(source, number, servers, full=True)
    finally:
        weight_sync.close()
    return [] if expected is None else [_compare(transport, server, report, expected, config) for server in servers]


def _compare(
    transport: str, server: Endpoint, report: WeightSyncReport, expected: Expected, config: VerifyWeightSyncConfig
) -> Check:
    timeout = config.weight_sync.timeout_seconds
    try:
        sums = server.checksums(timeout)
        equal = outputs_of(server, config.checkpoint, timeout) == expected.outputs
    except ServerError as error:
        return Check(transport, server.url, report, 0, (str(error),), False)
    return Check(transport, server.url, report, sum(map(len, sums)), tuple(differing(sums, expected.checksums)), equal)


@torch.no_grad()
def changed_model(checkpoint: str, layout: Layout, dtype: torch.dtype) -> LALM:
    """Return the checkpoint's model with every element changed, in the same way on all ranks."""
    model = LALM(load_architecture(checkpoint), layout, dtype)
    read_into(model, checkpoint)
    for parameter in model.parameters():
        parameter.mul_(1.25).add_(1 / 64)
    return model


def _write(model: LALM, source: ShardedModelWeights, checkpoint: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a complete Hugging Face directory of the weights on rank 0. Collective."""
    if source.in_main_replica:
        specs, tensors = source.specs(full=True), export_tensors(model)
        if model.layout.is_main:
            carried = read_carried(checkpoint, model.arch)
            shapes = {s.name: s.shape for s in specs} | carried.shapes
            writer = HFDirectoryWriter(target, plan_shards(shapes, dtype, _SHARD_BYTES, carried.dtypes), dtype)
            writer.begin()
            writer.write(chain(tensors, ((name, tensor.read()) for name, tensor in carried.tensors.items())))
            writer.publish(with_dtype(files_beside(checkpoint, model.arch), dtype))
        else:
            deque(tensors, maxlen=0)
    dist.barrier()


def print_table(checks: Sequence[Check], skipped: Mapping[Transport, str]) -> None:
    """Print one row a transport and server; below, what differs and what could not be checked."""
    names = ("transport", "server", "MB", "buckets", "seconds", "tensors equal", "outputs", "")
    table = Table(*names, box=None, header_style="bold", pad_edge=False)
    for check in checks:
        report = check.report
        table.add_row(
            check.transport,
            check.server,
            f"{report.nbytes / 1e6:.1f}",
            str(report.buckets),
            f"{report.seconds:.2f}",
            f"{check.tensors - len(check.differing)} of {check.tensors}",
            "equal" if check.outputs_equal else "differ",
            "[green]passed[/]" if check.passed else "[red]FAILED[/]",
        )
    console = Console()
    console.print(table)
    for check in checks:
        if not check.passed:
            reasons = [
                check.report.failed.get(check.server, ""),
                "differing: " + ", ".join(check.differing[:10]) if check.differing else "",
            ]
            console.print(
                f"{check.transport}, {check.server}: {escape('; '.join(filter(None, reasons)))}", highlight=False
            )
    for transport, reason in skipped.items():
        console.print(f"{transport}: skipped, as {escape(reason)}", highlight=False)

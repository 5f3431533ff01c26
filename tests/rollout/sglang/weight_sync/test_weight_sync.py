"""The weight sync around the bytes: plan and stream agree in every layout, gathering overlaps sending, failures end."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.weight_sync import WeightSync, WeightSyncConfig, build_weight_sync
from megatron_cord.rollout.sglang.weight_sync import weight_sync as module
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan
from megatron_cord.rollout.sglang.weight_sync.transport import AttemptFailedError
from megatron_cord.rollout.types import TensorSpec
from megatron_cord.rollout.weights import ShardedModelWeights
from tests.gloo import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")
MIB = 1 << 20


def plans_of_rank(rank: int, checkpoint: str, layouts: Sequence[ParallelConfig]) -> list[bool]:
    """For every layout: whether plan and stream agree, of all tensors and of those that are trained."""
    agree = []
    for parallel in layouts:
        layout = initialize(parallel, seed=0)
        model = LALM(load_architecture(checkpoint), layout, torch.bfloat16)
        if model.audio_encoder is not None:
            model.audio_encoder.requires_grad_(False)
        weights = ShardedModelWeights(model)
        for full in (True, False):
            if weights.in_main_replica:
                specs = weights.specs(full=full)
                streamed = []
                for spec, (name, tensor) in zip(specs, weights.tensors(full=full, in_pieces=True), strict=True):
                    whole = tensor if tensor.dim() == len(spec.shape) else tensor.flatten(0, 1)
                    streamed.append(TensorSpec(name, tuple(whole.shape), tensor.dtype))
                agree.append(specs == streamed and any(s.name.startswith("audio_tower.layers") for s in specs) == full)
        parallel_state.destroy_model_parallel()
    return agree


def test_plan_and_stream_agree_on_four_ranks(tmp_path: Path) -> None:
    """Catches a bucket planned for other tensors than come, a frozen tensor that is sent.

    Also ranks of another replica that gather.
    """
    create_checkpoint(tmp_path, TinyModelConfig(layers=4, kv_heads=4), ["one", "two"], seed=0)
    layouts = (ParallelConfig(tp=2, pp=2), ParallelConfig(tp=4), ParallelConfig(pp=2, virtual_pp=2))
    first, *others = run_ranks(plans_of_rank, 4, str(tmp_path), layouts)
    assert first == [True] * 6
    # Of pp=2 there are two replicas, {0, 2} and {1, 3}: the second one's ranks do not take part.
    assert others == [[True] * 4, [True] * 6, [True] * 4], (first, others)


def test_experts_of_other_ranks_are_in_plan_and_stream(tmp_path: Path) -> None:
    """Catches experts of another data-parallel rank that are neither planned nor sent, and ranks that wait for ever."""
    create_checkpoint(tmp_path, TinyModelConfig(layers=2, kv_heads=4, experts=4), ["one", "two"], seed=0)
    layouts = (
        ParallelConfig(ep=2),
        ParallelConfig(ep=4),
        ParallelConfig(pp=2, ep=2),
        ParallelConfig(tp=2, sequence_parallel=True, ep=2),
    )
    first, second, third, fourth = run_ranks(plans_of_rank, 4, str(tmp_path), layouts)
    assert first == second == [True] * 8  # ranks that have the others' experts take part, other replicas do not
    assert third == fourth == [True] * 4  # of ep=4 and pp=2 alone


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are made within it, and the most that exist at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in known:
            size = out.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(out.untyped_storage(), self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def memory_of_stream(rank: int, checkpoint: str) -> tuple[int, int, int]:
    """Return the most bytes that streaming all tensors takes beside the model, those of the largest one and of all."""
    model = LALM(load_architecture(checkpoint), initialize(ParallelConfig(ep=2), seed=0), torch.float32)
    sizes = []
    with Allocations() as allocations:
        for _, tensor in ShardedModelWeights(model).tensors(full=True):
            sizes.append(tensor.nbytes)
    parallel_state.destroy_model_parallel()
    return allocations.most, max(sizes), sum(sizes)


def test_experts_are_gathered_one_at_a_time(tmp_path: Path) -> None:
    """Catches ranks that have the memory of all experts, or of a layer's, while they gather them."""
    sizes = TinyModelConfig(layers=2, kv_heads=4, experts=16, hidden_size=64, ffn_size=256)
    create_checkpoint(tmp_path, sizes, ["one", "two"], seed=0)
    for most, largest, total in run_ranks(memory_of_stream, 2, str(tmp_path)):
        assert largest <= most <= 5 * largest < total / 8, (most, largest, total)


class Source:
    """Tensors of 1 MiB each."""

    in_main_replica = True
    lora_scale = None

    def __init__(self, count: int, shape: tuple[int, ...] = (1 << 18,)) -> None:
        self.shape, self.count, self.drained = shape, count, False
        self.given = [threading.Event() for _ in range(count)]

    def without_lora(self) -> Source:
        return self

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        return [TensorSpec(str(i), self.shape, torch.float32) for i in range(self.count)]

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        for i in range(self.count):
            self.given[i].set()
            yield str(i), torch.full(self.shape, float(i))
        self.drained = True


class Recording:
    """A transport that notes what it is asked to do."""

    in_session, borrows = False, False

    def __init__(self, source: Source) -> None:
        self.source, self.buffers = source, [torch.empty(MIB, dtype=torch.uint8) for _ in range(2)]
        self.sent: list[tuple[int, float]] = []
        self.fails_at: int | None = None
        self.error: Exception | None = None
        self.overlapped: list[bool] = []
        self.abandoned = 0

    def open(self, servers: Sequence[Endpoint], bucket_bytes: int) -> int:
        self.sent = []
        return bucket_bytes

    def merges(self, servers: Sequence[Endpoint], base: str) -> bool:
        return False

    def start(self, plans: Sequence[BucketPlan], lora_scale: float | None = None) -> None:
        self.planned = len(plans)

    def buffer(self, index: int, nbytes: int) -> Tensor:
        return self.buffers[index % 2]

    def send(self, plan: BucketPlan, flat: Tensor, ready: torch.cuda.Event) -> dict[Endpoint, ServerError]:
        index = int(plan.specs[0].name)
        if index + 1 < self.source.count:
            self.overlapped.append(self.source.given[index + 1].wait(5 if self.expects_overlap else 0.2))
        if index == self.fails_at and self.error is not None:
            self.fails_at = None
            raise self.error
        self.sent.append((index, float(plan.views(flat)[str(index)][0])))
        return {}

    expects_overlap = True

    def finish(self) -> dict[Endpoint, ServerError]:
        return {}

    def abandon(self) -> None:
        self.abandoned += 1

    def close(self) -> None:
        pass


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the servers that were given a version, for each weight sync; they answer nothing else here."""
    told: list[list[str]] = []
    monkeypatch.setattr(Endpoint, "weight_version", lambda self, timeout: "default")
    monkeypatch.setattr(Endpoint, "flush_cache", lambda self, timeout: None)

    def name_version(servers: Sequence[Endpoint], version: str, timeout: float) -> dict[Endpoint, ServerError]:
        told.append([server.url for server in servers])
        return {}

    monkeypatch.setattr(module, "name_version", name_version)
    return told


ONE, TWO = Endpoint("http://127.0.0.1:1"), Endpoint("http://127.0.0.1:2")


def weight_sync_of(transport: Any, source: Source, **settings: Any) -> WeightSync:
    served = {spec.name: spec for spec in source.specs(full=True)}
    return WeightSync(WeightSyncConfig(bucket_bytes=MIB, **settings), transport, served)


@pytest.mark.parametrize("overlap", [True, False])
def test_gathering_overlaps_sending(overlap: bool, published: list[list[str]]) -> None:
    """Catches a bucket that is gathered only after the one before was sent, one that is sent with the next one's bytes.

    Also the reverse with overlap=false.
    """
    source = Source(5)
    transport = Recording(source)
    transport.expects_overlap = overlap
    report = weight_sync_of(transport, source, overlap=overlap).update(source, 1, [ONE])
    assert transport.sent == [(i, float(i)) for i in range(5)]
    assert transport.overlapped == [overlap] * 4
    assert (report.buckets, report.nbytes, report.current) == (5, 5 * MIB, (ONE.url,)) and published == [[ONE.url]]


def test_a_server_that_was_started_again_is_met_anew(
    published: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a broadcast in a group of which a new process at an old address knows nothing."""
    source = Source(2)
    transport = Recording(source)
    weight_sync = weight_sync_of(transport, source)
    weight_sync.update(source, 1, [ONE])
    assert transport.abandoned == 0
    monkeypatch.setattr(Endpoint, "weight_version", lambda self, timeout: "1")
    assert not weight_sync.update(source, 2, [ONE]).full and transport.abandoned == 0
    monkeypatch.setattr(Endpoint, "weight_version", lambda self, timeout: "default")
    assert weight_sync.update(source, 3, [ONE]).full and transport.abandoned == 1


def test_a_broken_attempt_is_repeated_with_the_others(published: list[list[str]]) -> None:
    """Catches a survivor left with half of the weights.

    Also a stream that is not drained, in which the trainer's other ranks would wait.
    """
    source = Source(4)
    transport = Recording(source)
    transport.fails_at, transport.error = 1, AttemptFailedError({TWO: ServerError("killed")})
    report = weight_sync_of(transport, source).update(source, 7, [ONE, TWO])
    assert transport.abandoned == 1 and source.drained
    assert [index for index, _ in transport.sent] == [0, 1, 2, 3]
    assert report.current == (ONE.url,) and report.failed == {TWO.url: "killed"} and published == [[ONE.url]]


@pytest.mark.slow
def test_nobody_left(published: list[list[str]]) -> None:
    """Catches an endless repetition when no server lives, or none is to blame."""
    for culprits in ({ONE: ServerError("killed")}, {}):
        source = Source(3)
        transport = Recording(source)
        transport.fails_at, transport.error = 0, AttemptFailedError(culprits)
        report = weight_sync_of(transport, source).update(source, 1, [ONE])
        assert report.current == () and list(report.failed) == [ONE.url] and source.drained
    assert published == []


def test_an_error_of_ours_reaches_all(published: list[list[str]]) -> None:
    """Catches a full disk that is taken for a server's failure."""
    source = Source(3)
    transport = Recording(source)
    transport.fails_at, transport.error = 1, CordError("the disk is full")
    with pytest.raises(CordError, match="the disk is full"):
        weight_sync_of(transport, source).update(source, 1, [ONE])
    assert source.drained and published == []


def test_nothing_is_sent_that_does_not_fit(published: list[list[str]]) -> None:
    """Catches a check after the first byte."""
    source = Source(3)
    transport = Recording(source)
    weight_sync = weight_sync_of(transport, source)
    source.shape = (1 << 17,)
    with pytest.raises(CordError, match="does not fit the servers' checkpoint"):
        weight_sync.update(source, 1, [ONE])
    assert transport.sent == [] and not source.given[0].is_set()


def test_dead_servers_do_not_raise(checkpoint: Path) -> None:
    """Catches a trainer that stops with its last server, instead of reporting it."""
    with_nobody = build_weight_sync(WeightSyncConfig(timeout_seconds=1), checkpoint)
    report = with_nobody.update(Source(1), 1, [ONE])
    assert report.current == () and "unreachable" in report.failed[ONE.url]
    with_nobody.close()


@pytest.mark.parametrize(("field", "value"), [("bucket_bytes", 1000), ("timeout_seconds", 0.0)])
def test_configuration(field: str, value: Any) -> None:
    """Catches settings that garble outputs or fail at once."""
    with pytest.raises(CordError, match=field):
        WeightSyncConfig(**{field: value})

"""LoRA alone to servers that merge it: what they load, how much is sent, and when they get merged weights instead."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cord.convert import read_into
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.sglang.plugin.lora_merge import Base, identity, merged, scale_of, unpacked
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig, build_weight_sync
from megatron_cord.rollout.sglang.weight_sync.bucket import fill, plan_buckets
from megatron_cord.rollout.sglang.weight_sync.disk import DiskTransport
from megatron_cord.rollout.sglang.weight_sync.shared_memory import packed_address
from megatron_cord.rollout.weights import ShardedModelWeights
from tests.rollout.sglang.weight_sync.group_server import GroupServer


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture
def model(checkpoint: Path, layout: Layout) -> LALM:
    """Build a model with LoRA that is not zero, and an adapter that is trained whole."""
    model = LALM(load_architecture(checkpoint), layout, torch.float32)
    read_into(model, checkpoint)
    model.add_lora(LoraConfig(rank=2, alpha=3, whole=("adapter",)), (), seed=0)
    assert model.lora is not None
    for parameter in model.lora.parameters():
        parameter.data.normal_()
    assert model.adapter is not None
    for parameter in model.adapter.parameters():
        parameter.data.normal_()
    return model


def ends(tensor: Tensor) -> list[float]:
    return [float(tensor.flatten()[0]), float(tensor.flatten()[-1])]


def loaded(server: GroupServer) -> dict[str, list[float]]:
    return {name: found for name, found in server.loaded.items() if name != "requests"}


def test_servers_merge(model: LALM, checkpoint: Path) -> None:
    """Catches LoRA that is lost or merged with something else, weights that travel whole, and sums that add up.

    Servers that lack the last version get everything, merged.
    """
    weight_sync, source = build_weight_sync(WeightSyncConfig(), checkpoint), ShardedModelWeights(model)
    wanted = {name: tensor.clone() for name, tensor in source.tensors(full=False)}
    with GroupServer(checkpoint=checkpoint) as one, GroupServer(checkpoint=checkpoint) as two:
        servers = [one.endpoint, two.endpoint]
        full = weight_sync.update(source, 1, servers)
        assert full.full and full.merged
        for version in (2, 3):
            report = weight_sync.update(source, version, servers)
            assert len(report.current) == 2 and not report.full and not report.merged
            for server in (one, two):
                assert loaded(server).keys() > wanted.keys()
                for name, tensor in wanted.items():
                    assert loaded(server)[name] == pytest.approx(ends(tensor), rel=1e-5, abs=1e-6), name
        assert report.nbytes < full.nbytes / 5
        weight_sync.close()


@pytest.mark.parametrize(
    "other", ["old", *(pytest.param(name, marks=pytest.mark.slow) for name in ("another base", "without"))]
)
def test_merged_weights_where_a_server_cannot_merge(model: LALM, checkpoint: Path, tmp_path: Path, other: str) -> None:
    """Catches LoRA that reaches a server that would not know what to do with it, or would add it to other weights."""
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed / "model.safetensors")
    place = {"old": checkpoint, "another base": changed, "without": None}[other]
    weight_sync, source = build_weight_sync(WeightSyncConfig(), checkpoint), ShardedModelWeights(model)
    with (
        GroupServer(checkpoint=checkpoint) as good,
        GroupServer("old" if other == "old" else "good", place) as second,
    ):
        for version in (1, 2):
            report = weight_sync.update(source, version, [good.endpoint, second.endpoint])
            assert len(report.current) == 2 and report.merged
        wanted = dict(source.tensors(full=False))
        assert all(loaded(second)[name] == pytest.approx(ends(tensor)) for name, tensor in wanted.items())
        weight_sync.close()


def test_specs_are_what_comes(model: LALM) -> None:
    """Catches a plan of other tensors than the stream brings, and frozen weights among them."""
    source = ShardedModelWeights(model)
    specs, streamed = source.specs(full=False, merged=False), list(source.tensors(full=False, merged=False))
    assert [(s.name, s.shape, s.dtype) for s in specs] == [(n, tuple(t.shape), t.dtype) for n, t in streamed]
    assert all("lora_" in name or "multi_modal_projector" in name for name, _ in streamed)


def test_a_checkpoint_and_half_a_stream(checkpoint: Path, tmp_path: Path) -> None:
    """Catches another file with the same identity, and factors without a counterpart or a weight."""
    assert identity(checkpoint) == identity(checkpoint) and identity(tmp_path) is identity(tmp_path / "x") is None
    base, name = Base(checkpoint), "multi_modal_projector.linear"
    a, b = torch.zeros(2, 8), torch.zeros(8, 2)
    for stream, wrong in (
        ([(f"{name}.lora_A.weight", a)], "without B"),
        ([(f"{name}.lora_A.weight", a), ("x.lora_B.weight", b)], "without B"),
        ([(f"{name}.lora_B.weight", b)], "without A"),
        ([("x.lora_A.weight", a), ("x.lora_B.weight", b)], "does not have"),
        ([(f"{name}.lora_A.weight", a), (f"{name}.lora_A.weight", a)], "twice"),
    ):
        with pytest.raises(ValueError, match=wrong):
            list(merged(stream, 1.0, base))


def test_other_transports(model: LALM, checkpoint: Path, tmp_path: Path) -> None:
    """Catches factors in a bucket or a file, whatever their order there, that servers merge otherwise than a stream."""
    source = ShardedModelWeights(model)
    assert source.lora_scale is not None
    wanted = dict(source.tensors(full=False))
    specs = source.specs(full=False, merged=False)
    base, found = Base(checkpoint), dict[str, Tensor]()
    stream = source.tensors(full=False, merged=False)
    disk = DiskTransport(tmp_path, 1.0)
    disk.open([], 1 << 20)
    (plan,) = plan_buckets(specs, 1 << 20)
    disk.start([plan], source.lora_scale)
    flat = fill(plan, stream, lambda: disk.buffer(0, plan.nbytes))
    for name, tensor in merged(unpacked(pickle.loads(packed_address(plan, flat))), source.lora_scale, base):
        found[name] = tensor.clone()
    disk.send(plan, flat, torch.cuda.Event())  # type: ignore[no-untyped-call]
    (written,) = tmp_path.iterdir()
    scale = scale_of(written)
    assert scale == source.lora_scale and scale_of(checkpoint) is None
    tensors = load_file(next(written.glob("*.safetensors")))
    backwards = dict(merged(reversed(tensors.items()), scale, base))
    disk.close()
    assert found.keys() == backwards.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[name], backwards[name])

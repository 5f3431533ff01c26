"""Weights over real process groups to servers in processes of their own: streams, older servers, failures."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_cord.rollout.sglang.weight_sync import WeightSync, WeightSyncConfig
from megatron_cord.rollout.sglang.weight_sync.process_group import ProcessGroupTransport
from megatron_cord.rollout.types import TensorSpec
from tests.rollout.sglang.weight_sync.group_server import WORDS, GroupServer

pytestmark = pytest.mark.usefixtures("one_rank")
MIB = 1 << 20


class Source:
    """Tensors of two dtypes, some of them larger than a bucket."""

    in_main_replica = True
    lora_scale = None
    sizes = (3, MIB // 2, 7, 2 * MIB, 5, MIB // 8, 9)

    def without_lora(self) -> Source:
        return self

    def specs(self, *, full: bool, merged: bool = True) -> list[TensorSpec]:
        return [
            TensorSpec(str(i), (n,), torch.bfloat16 if i % 3 == 2 else torch.float32) for i, n in enumerate(self.sizes)
        ]

    def tensors(self, *, full: bool, in_pieces: bool = False, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        for i, spec in enumerate(self.specs(full=full)):
            yield spec.name, torch.linspace(i, i + 0.5, spec.shape[0]).to(spec.dtype)

    @property
    def ends(self) -> dict[str, list[float]]:
        return {name: [float(tensor[0]), float(tensor[-1])] for name, tensor in self.tensors(full=True)}


def weight_sync_of(source: Source, timeout: float = 60.0) -> WeightSync:
    config = WeightSyncConfig(bucket_bytes=MIB, timeout_seconds=timeout)
    return WeightSync(
        config, ProcessGroupTransport(None, timeout), {spec.name: spec for spec in source.specs(full=True)}
    )


@pytest.mark.parametrize(
    "manners",
    [
        pytest.param(("good", "good"), marks=pytest.mark.slow),
        ("good", "old"),
        pytest.param(("old", "old"), marks=pytest.mark.slow),
    ],
)
def test_streams_where_all_take_them(manners: tuple[str, str]) -> None:
    """Catches a stream to a server that waits for a request for each bucket, a request for each bucket of a stream.

    Also wrong bytes, and a second weight sync that finds the group in another state than the first.
    """
    source = Source()
    weight_sync = weight_sync_of(source)
    with GroupServer(manners[0]) as one, GroupServer(manners[1]) as two:
        for version in (1, 2):
            report = weight_sync.update(source, version, [one.endpoint, two.endpoint], full=True)
            assert len(report.current) == 2 and not report.failed
            requests = version * (report.buckets if "old" in manners else 1)
            assert one.loaded == two.loaded == source.ends | {"requests": [requests]}
        weight_sync.close()


@pytest.mark.parametrize("manner", ["refuses", "refuses late", "dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_one_fails_and_the_other_gets_everything(manner: str) -> None:
    """Catches a rank that waits for the dead, the wrong server blamed.

    Also a survivor that keeps half of the weights.
    """
    source = Source()
    weight_sync = weight_sync_of(source, timeout=15.0 if manner == "hangs" else 600.0)
    begun = time.monotonic()
    with GroupServer() as good, GroupServer(manner) as bad:
        report = weight_sync.update(source, 1, [good.endpoint, bad.endpoint])
        assert report.current == (good.endpoint.url,) and list(report.failed) == [bad.endpoint.url]
        assert WORDS.get(manner, "") in report.failed[bad.endpoint.url]
        assert good.loaded == source.ends | {"requests": [2]}
        assert time.monotonic() - begun < 300, "waited for the dead"
        weight_sync.close()

"""What reaches real servers, whatever the transport."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig, build_weight_sync
from megatron_cord.rollout.sglang.weight_sync.sessions import differing
from megatron_cord.rollout.weights import PlainWeights
from tests.integration.sglang.conftest import Servers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]
MIB = 1 << 20


def test_all_ways_bring_the_same(servers: Servers) -> None:
    """Catches a stream, a request for each bucket, a buffer that stays mapped, or files, that bring something else.

    Also a transport that leaves the servers unable to take the next.
    """
    servers.wait_until_ready()
    endpoints = [Endpoint(url) for url in servers.supervisor.urls]
    assert all(endpoint.abilities(60).streams for endpoint in endpoints)
    base = load_file(servers.checkpoint / "model.safetensors")
    found: list[list[dict[str, str]]] = []
    cases: list[tuple[Any, bool, int]] = [
        ("process_group", True, MIB),
        ("process_group", False, MIB),
        ("shared_memory", True, MIB),
        ("shared_memory", True, 2 * MIB),
        ("disk", True, MIB),
    ]
    for transport, stream, bucket_bytes in cases:
        weight_sync = build_weight_sync(
            WeightSyncConfig(transport=transport, stream=stream, bucket_bytes=bucket_bytes), servers.checkpoint
        )
        for version, added in enumerate((2, 1)):
            changed = PlainWeights({name: tensor + added for name, tensor in base.items()}, servers.checkpoint)
            report = weight_sync.update(changed, version, endpoints, full=True)
            assert report.failed == {} and report.buckets > 1, (transport, report)
            sums = [endpoint.checksums(60) for endpoint in endpoints]
            assert not differing(*sums), transport
            found.append(sums[0])
        weight_sync.close()
    two, one = found[::2], found[1::2]
    assert len(differing(two[0], one[0])) == 63
    for sums in (two, one):
        assert not any(differing(sums[0], others) for others in sums[1:])

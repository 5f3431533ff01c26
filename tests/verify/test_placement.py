"""Where ``verify weight_sync`` puts its servers, on machines with as many GPUs as a test says."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.verify import weight_sync
from megatron_cord.verify.placement import Place, place_on_this_machine, place_servers, visible_gpus
from megatron_cord.verify.weight_sync import TRANSPORTS, VerifyWeightSyncConfig


@pytest.mark.parametrize(
    ("trainer", "visible", "checked", "fresh", "skipped"),
    [
        (2, range(8), Place("cuda", (2, 0), 0.8), Place("cuda", (3,), 0.8), []),
        (1, range(2), Place("cuda", (1, 0), 0.4), Place("cuda", (1,), 0.4), []),
        (2, range(2), Place("cuda", (1, 0), 0.267), Place("cuda", (1,), 0.267), []),
        (1, [5], Place("cuda", (5,), 0.267), Place("cuda", (5,), 0.267), ["process_group"]),
        (0, [], Place("cuda", (), 0.4), Place("cuda", (), 0.4), []),
    ],
)
def test_servers_have_gpus_behind_the_trainers(
    trainer: int, visible: list[int], checked: Place, fresh: Place, skipped: list[str]
) -> None:
    """Catches servers that take the GPU of the main rank, or all memory of one that they share.

    Also a server that does not see the GPU whose memory it maps, and a group of NCCL with two ranks on one GPU.
    """
    placement = place_servers("cuda", trainer, visible, None)
    assert (placement.checked, placement.fresh) == (checked, fresh)
    assert placement.share_gpu == (checked.gpus[:1] == fresh.gpus)
    rest, reasons = placement.possible(TRANSPORTS)
    assert list(reasons) == skipped and sorted([*rest, *skipped]) == sorted(TRANSPORTS)
    assert place_servers("cuda", trainer, visible, 0.3).checked.memory_fraction == 0.3


def test_servers_on_a_cpu() -> None:
    """Catches a trainer on a GPU that waits for a CPU server in NCCL, and a CPU's checks that are left out."""
    assert place_servers("cpu", 0, [], None).possible(TRANSPORTS) == (TRANSPORTS, {})
    placement = place_servers("cpu", 1, [0], None)
    assert placement.possible(TRANSPORTS)[0] == ("disk",)
    with pytest.raises(CordError, match=r"none of transports=\['process_group'\] can work here .*without NCCL"):
        placement.possible(("process_group",))


def test_the_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks of other machines that are counted, and GPUs numbered among those that this process sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert place_on_this_machine("auto", None).checked.gpus == (2, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    placement = place_on_this_machine("auto", None)
    assert (placement.checked.gpus, placement.fresh.gpus) == ((6, 4), (7,))
    assert place_on_this_machine("cpu", None).checked == Place()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f,GPU-2f")
    with pytest.raises(CordError, match="name the GPUs by their numbers"):
        visible_gpus(2)


def test_a_server_is_started_there(tmp_path: Path) -> None:
    """Catches a place that does not reach the process: its GPUs, its share of their memory."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "GPUS=$CUDA_VISIBLE_DEVICES $@"\n')
    python.chmod(0o755)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2AudioForConditionalGeneration"]}')
    log = tmp_path / "log"
    with ExitStack() as stack:
        config = VerifyWeightSyncConfig(str(tmp_path), python=python)
        server = weight_sync._start(config, Place("cuda", (6, 4), 0.4), tmp_path, log, stack)
        deadline = time.monotonic() + 20
        while server.running and time.monotonic() < deadline:
            time.sleep(0.05)
    printed = log.read_text()
    assert "GPUS=6,4 " in printed and "--device cuda" in printed and "--mem-fraction-static 0.4" in printed
    assert "--max-total-tokens 8192" in printed

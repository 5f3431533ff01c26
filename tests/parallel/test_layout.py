"""Layouts: which configurations are valid, and the place of a rank in them."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize, meet
from tests.parallel.three_ranks import seen

AT_LEAST_1 = "parallel.tp, parallel.pp, parallel.cp, parallel.ep and parallel.virtual_pp are at least 1, got "


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 0}, f"{AT_LEAST_1}tp=0 pp=1 cp=1 ep=1 virtual_pp=1"),
        ({"pp": -1}, f"{AT_LEAST_1}tp=1 pp=-1 cp=1 ep=1 virtual_pp=1"),
        ({"virtual_pp": 0}, f"{AT_LEAST_1}tp=1 pp=1 cp=1 ep=1 virtual_pp=0"),
        (
            {"pp": 2, "pipeline_layers": (3, 0)},
            "parallel.pipeline_layers=[3, 0]: give a number of layers, at least 1, for each of the 2 stages "
            "(parallel.pp=2 × parallel.virtual_pp=1)",
        ),
        (
            {"virtual_pp": 2},
            "parallel.virtual_pp=2 interleaves the stages of a pipeline: it needs parallel.pp > 1",
        ),
        ({"tp": 2, "ep": 3}, "parallel.ep=3 and parallel.tp=2 × parallel.cp=1: one must divide the other"),
        ({"sequence_parallel": True}, "parallel.sequence_parallel needs parallel.tp > 1; set it to false"),
    ],
)
def test_configurations_that_cannot_be(sizes: dict[str, int], words: str) -> None:
    """Catches a size that would fail later inside Megatron."""
    with pytest.raises(CordError) as caught:
        ParallelConfig(**sizes)  # type: ignore[arg-type]
    assert str(caught.value) == words


def test_ranks_that_do_not_fit_are_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rendezvous that hangs or a traceback of Megatron where the number of ranks is wrong."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        CordError,
        match=r"3 ranks cannot be laid out with parallel.tp=2 × parallel.pp=1 × parallel.cp=1; start a multiple of 2",
    ):
        initialize(ParallelConfig(tp=2), seed=0)
    assert not dist.is_initialized()


def test_ranks_that_have_met() -> None:
    """Catches a layout that trusts the environment more than the ranks that exist, or that ignores an earlier one."""
    for rank in seen():
        assert [words.split(";")[0] for words in rank.refused] == [
            "3 ranks cannot be laid out with parallel.tp=2 × parallel.pp=1 × parallel.cp=1",
            "3 ranks cannot be laid out with parallel.tp=2 × parallel.pp=3 × parallel.cp=1",
            "the ranks are laid out as tp=1 pp=3 cp=1 ep=1 already",
        ]


def test_places_in_a_pipeline() -> None:
    """Catches stages in the wrong order, two first stages, and a group of a rank alone that has company."""
    for rank, place in enumerate(rank.place for rank in seen()):
        assert place == {
            "rank": rank,
            "world_size": 3,
            "pp_rank": rank,
            "is_first_stage": rank == 0,
            "is_last_stage": rank == 2,
            "is_main": rank == 0,
            "last_stage_rank": 2,
            "sizes": [1, 3, 1, 1],
        }


def test_an_output_weight_in_parts() -> None:
    """Catches rows that get lost, or change their order, where the stages do not divide the vocabulary."""
    weight = torch.arange(64.0 * 3).view(64, 3)
    parts = [rank.part for rank in seen()]
    assert torch.equal(torch.cat(parts), torch.cat([weight, torch.zeros(2, 3)]))
    *others, summed = [rank.summed for rank in seen()]
    assert others == [None, None] and summed is not None and torch.equal(summed, 3 * weight)


def test_one_rank_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a single process that needs torchrun, weights that depend on earlier draws, and a failing restart."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    draws = []
    for _ in range(2):
        layout = initialize(ParallelConfig(), seed=3)
        draws.append(torch.rand(4))
        assert (layout.world_size, layout.is_first_stage, layout.is_last_stage, layout.is_main) == (1, True, True, True)
        finalize()
        finalize()  # twice is once
    assert torch.equal(*draws) and not dist.is_initialized() and "RANK" not in os.environ


def test_ranks_that_start_again_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a restarted rank that is early and connects to the address of a rank of the start before."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    settings = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        store, rank, world = meet(timedelta(seconds=10))
        assert (rank, world) == (0, 1) and not store.check(["address"])
        store.set("address", "of this start")
        assert meet(timedelta(seconds=10))[0].get("address") == b"of this start"

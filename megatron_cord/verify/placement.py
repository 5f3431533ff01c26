"""Where ``verify weight_sync`` starts its servers, and which transports can work from there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.parallel.objects import broadcast_json

Transport = Literal["process_group", "shared_memory", "disk"]

_SHARE = 0.8  #: of a GPU that its processes divide; the rest is for activations and CUDA itself


@dataclass(frozen=True)
class Place:
    """One server's device.

    Attributes:
        device: its kind.
        gpus: its visible ones, by CUDA's own numbers; it computes on the first. Empty: those visible to this process.
        memory_fraction: of the free memory of that GPU, for weights and cache; None on a CPU.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[int, ...] = ()
    memory_fraction: float | None = None


@dataclass(frozen=True)
class Placement:
    """The servers' devices, and what cannot work between them and the trainer.

    Attributes:
        checked: the server that gets weights from the trainer.
        fresh: the one that starts from the export.
        share_gpu: whether both are on one GPU; they then start one after the other, as SGLang divides what is free.
        impossible: why, by transport.
    """

    checked: Place
    fresh: Place
    share_gpu: bool
    impossible: Mapping[Transport, str]

    def possible(self, transports: Sequence[Transport]) -> tuple[tuple[Transport, ...], dict[Transport, str]]:
        """Return those that can work, and why the others cannot.

        Raises:
            CordError: none can.
        """
        skipped = {name: self.impossible[name] for name in transports if name in self.impossible}
        rest = tuple(name for name in transports if name not in skipped)
        if not rest:
            reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
            raise CordError(f"none of transports={list(transports)} can work here ({reasons}); add another one")
        return rest, skipped


def agree_on_placement(
    device: Literal["auto", "cpu", "cuda"],
    memory_fraction: float | None,
    transports: Sequence[Transport],
    *,
    check_running: bool,
) -> tuple[Placement, tuple[Transport, ...], dict[Transport, str]]:
    """Return where rank 0 starts servers, the transports that can work, and why others cannot. Collective.

    The placement is rank 0's; other ranks get one that they must not use. With ``check_running`` weights go to servers
    that run already, on GPUs that are not known: no transport is left out.
    """
    placement = Placement(Place(), Place(), False, {})
    outcome: list[object] = [None, tuple(transports), {}]
    if dist.get_rank() == 0:
        try:
            placement = place_on_this_machine(device, memory_fraction)
            if not check_running:
                outcome[1:] = placement.possible(transports)
        except CordError as error:
            outcome[0] = str(error)
    problem, possible, skipped = broadcast_json(outcome)
    if problem:
        raise CordError(problem)
    return placement, tuple(possible), skipped


def place_on_this_machine(device: Literal["auto", "cpu", "cuda"], memory_fraction: float | None) -> Placement:
    """Place the servers beside the ranks that torchrun started on this machine. See `place_servers`."""
    cuda = portability.has_cuda()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if cuda else 0
    return place_servers(device, ranks, visible_gpus(torch.cuda.device_count()) if cuda else [], memory_fraction)


def place_servers(
    device: Literal["cpu", "cuda"], trainer_gpus: int, visible: Sequence[int], memory_fraction: float | None
) -> Placement:
    """Put the servers on the GPUs behind the trainer's, or, where there are none, on the trainer's last one.

    Args:
        device: of the servers.
        trainer_gpus: ranks on this machine, which compute on the first GPUs; 0 without CUDA.
        visible: CUDA's own numbers of the GPUs visible to this process; none where its torch has no CUDA.
        memory_fraction: that the user chose.
    """
    if device == "cpu":
        reason = "the trainer is on a GPU and the server on a CPU"
        impossible: dict[Transport, str] = {}
        if trainer_gpus:
            impossible = {"process_group": f"{reason}, without NCCL", "shared_memory": reason}
        return Placement(Place(), Place(), False, impossible)
    if not visible:
        place = Place("cuda", (), memory_fraction or _SHARE / 2)
        return Placement(place, place, True, {})
    behind = list(visible[trainer_gpus:])[:2] or [visible[-1]]
    checked, fresh = behind[0], behind[-1]
    share_gpu, beside_trainer = checked == fresh, len(visible) <= trainer_gpus
    fraction = memory_fraction or round(_SHARE / (1 + share_gpu + beside_trainer), 3)
    impossible = {}
    seen: tuple[int, ...] = (checked,)
    if trainer_gpus and checked == visible[0]:
        impossible["process_group"] = (
            f"the server shares GPU {checked} with the trainer's main rank, and NCCL refuses two ranks on one GPU"
        )
    elif trainer_gpus:
        seen = (checked, visible[0])  # the main rank's memory can be mapped only where its GPU is seen
    return Placement(Place("cuda", seen, fraction), Place("cuda", (fresh,), fraction), share_gpu, impossible)


def visible_gpus(count: int) -> list[int]:
    """Return CUDA's own numbers of the `count` GPUs visible to this process.

    Raises:
        CordError: CUDA_VISIBLE_DEVICES names them otherwise.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not names:
        return list(range(count))
    try:
        return [int(name) for name in names.split(",")][:count]
    except ValueError:
        raise CordError(
            f"CUDA_VISIBLE_DEVICES is {names!r}; name the GPUs by their numbers, so that servers can be given some"
        ) from None

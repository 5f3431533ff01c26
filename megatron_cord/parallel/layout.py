"""The layout of a run over ranks: sizes in a configuration, process groups once initialised.

Everything else takes a `Layout` or one of its groups as an argument; nothing in this project reads Megatron's global
state.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.parallel.stage_messages import Channels, connect_stages
from megatron_cord.parallel.stages import chunks_of_rank
from megatron_cord.runtime.device_queues import missing_setting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the layout; data parallelism takes the ranks that remain."""

    tp: int = 1  #: tensor parallel size
    #: pipeline parallel size; the audio encoder and adapter live on the first stage, the loss on the last
    pp: int = 1
    #: context parallel size: ranks that share each of the language model's sequences, for long contexts, and the clips
    cp: int = 1
    #: expert parallel size: ranks that share out the experts of a mixture, a multiple of tp; they are the tensor-,
    #: context- and data-parallel ranks, no others
    ep: int = 1
    virtual_pp: int = 1  #: interleaved pipeline stages a rank (chunks of layers); above 1 it needs pp > 1
    #: the language model's layers on each of the pp × virtual_pp stages, in the order in which tokens pass them; empty:
    #: equally many
    pipeline_layers: tuple[int, ...] = ()
    #: all stages form the loss together, each on its part of the vocabulary, for large vocabularies; it needs pp > 1
    vocabulary_over_stages: bool = False
    #: shard activations between tensor-parallel regions of both towers along the sequence
    sequence_parallel: bool = False
    timeout_minutes: float = 10.0  #: how long a collective may take before the run is considered dead

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.cp, self.ep, self.virtual_pp) < 1:
            raise CordError(
                "parallel.tp, parallel.pp, parallel.cp, parallel.ep and parallel.virtual_pp are at least 1, got "
                f"tp={self.tp} pp={self.pp} cp={self.cp} ep={self.ep} virtual_pp={self.virtual_pp}"
            )
        if self.ep % (self.tp * self.cp) and (self.tp * self.cp) % self.ep:
            raise CordError(
                f"parallel.ep={self.ep} and parallel.tp={self.tp} × parallel.cp={self.cp}: one must divide the other"
            )
        if self.virtual_pp > 1 and self.pp == 1:
            raise CordError(
                f"parallel.virtual_pp={self.virtual_pp} interleaves the stages of a pipeline: it needs parallel.pp > 1"
            )
        if self.vocabulary_over_stages and (self.pp == 1 or self.virtual_pp > 1):
            raise CordError(
                "parallel.vocabulary_over_stages=true is for a pipeline without interleaved stages, and "
                f"parallel.pp={self.pp}, parallel.virtual_pp={self.virtual_pp}; set it to false, or take parallel.pp > "
                "1 and parallel.virtual_pp=1"
            )
        stages, given = self.pp * self.virtual_pp, self.pipeline_layers
        if given and (len(given) != stages or min(given) < 1):
            raise CordError(
                f"parallel.pipeline_layers={list(given)}: give a number of layers, at least 1, for each of the "
                f"{stages} stages (parallel.pp={self.pp} × parallel.virtual_pp={self.virtual_pp})"
            )
        if self.sequence_parallel and self.tp == 1:
            raise CordError("parallel.sequence_parallel needs parallel.tp > 1; set it to false")

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of each stage of a language model, in the order in which tokens pass the stages."""
        stages = self.pp * self.virtual_pp
        return self.pipeline_layers or (num_layers // stages,) * stages


@dataclass(frozen=True)
class Layout:
    """The sizes, the process groups, and this rank's place in them.

    Attributes:
        config: the sizes.
        groups: Megatron's process groups.
        solo: a process group of this rank alone, for parts that no other stage shares.
        replica_group: the ranks that hold one copy of the model and train the same sequences, over all other kinds of
            parallelism; as many groups as there are data-parallel ranks.
        channels: how stages send each other messages where they are interleaved, or share the loss; else None.
    """

    config: ParallelConfig
    groups: ProcessGroupCollection
    solo: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    channels: Channels | None = None

    @property
    def rank(self) -> int:
        """The global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share one layer's matrices."""
        group: dist.ProcessGroup = self.groups.tp
        return group

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Ranks that hold one model's layers, in order."""
        group: dist.ProcessGroup = self.groups.pp
        return group

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and process different tokens of the same sequences."""
        group: dist.ProcessGroup = self.groups.cp
        return group

    @property
    def vocabulary_group(self) -> dist.ProcessGroup:
        """Ranks that share the vocabulary in the student's loss: tensor-parallel ones, of the last or of all stages."""
        group: dist.ProcessGroup = self.groups.mp if self.config.vocabulary_over_stages else self.groups.tp
        return group

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and process different sequences."""
        group: dist.ProcessGroup = self.groups.dp
        return group

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """Ranks that share out the experts of a mixture."""
        group: dist.ProcessGroup = self.groups.ep
        return group

    @property
    def experts_span_replicas(self) -> bool:
        """Whether expert-parallel ranks process different sequences, so that all of them must run as many passes."""
        return self.config.ep > self.config.tp * self.config.cp

    @property
    def dp_rank(self) -> int:
        """This rank's place among the data-parallel ranks."""
        return dist.get_rank(self.dp_group)

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks."""
        return dist.get_world_size(self.dp_group)

    @property
    def sequence_sharding(self) -> SequenceSharding:
        """How sequences are split over ranks."""
        sequence_parallel = self.config.tp if self.config.sequence_parallel else 1
        return SequenceSharding(self.config.cp, dist.get_rank(self.cp_group), sequence_parallel)

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage, from 0."""
        return dist.get_rank(self.pp_group)

    @property
    def is_first_stage(self) -> bool:
        """Whether embedding, encoder and adapter are here."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the output layer and the loss are here."""
        return self.pp_rank == self.config.pp - 1

    def layers_of_chunks(self, num_layers: int) -> tuple[range, ...]:
        """Return which of the language model's layers, from 0, this rank holds, a range for each interleaved stage."""
        return chunks_of_rank(self.config.layers_per_stage(num_layers), self.config.pp, self.pp_rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank reports for the run."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.config.pp - 1)

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return portability.device()


def initialize(config: ParallelConfig, seed: int) -> Layout:
    """Join the ranks that torchrun started (one rank without torchrun) and make the process groups.

    Raises:
        CordError: the number of ranks is not a multiple of tp × pp × cp, or of ep × pp, or torch cannot use this
            machine's GPUs.
        RuntimeError: the ranks have another layout already.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    sizes = (config.tp, config.pp, config.cp)
    if world % math.prod(sizes):
        raise CordError(
            f"{world} ranks cannot be laid out with parallel.tp={config.tp} × parallel.pp={config.pp} × "
            f"parallel.cp={config.cp}; start a multiple of {math.prod(sizes)} ranks (torchrun --nproc-per-node)"
        )
    if world % (config.pp * config.ep):
        raise CordError(
            f"{world} ranks cannot be laid out with parallel.pp={config.pp} × parallel.ep={config.ep}; "
            f"start a multiple of {config.pp * config.ep} ranks (torchrun --nproc-per-node)"
        )
    portability.refuse_idle_gpus()
    if portability.has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        told = missing_setting(config.tp, config.cp, torch.cuda.get_device_capability()[0])
        if told and os.environ.get("RANK", "0") == "0":
            logger.warning(told)
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.timeout_minutes)
        if "WORLD_SIZE" in os.environ:
            store, rank, world = meet(timeout)
            dist.init_process_group(portability.backend(), store=store, rank=rank, world_size=world, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(portability.backend(), store=alone, rank=0, world_size=1, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            context_parallel_size=config.cp,
            expert_model_parallel_size=config.ep,
            expert_tensor_parallel_size=1,  # experts are narrow: they are dealt whole
            create_gloo_process_groups=portability.needs_gloo_groups(),
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    present = tuple(group.size() for group in (groups.tp, groups.pp, groups.cp, groups.ep))
    if present != (*sizes, config.ep):
        raise RuntimeError(
            "the ranks are laid out as tp={} pp={} cp={} ep={} already; call finalize() first".format(*present)
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    solo = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    connected = config.virtual_pp > 1 or config.vocabulary_over_stages
    channels = _channels(groups.pp, timedelta(minutes=config.timeout_minutes)) if connected else None
    return Layout(config, groups, solo, _replica_group(groups.dp, solo), channels)


def _channels(pp_group: dist.ProcessGroup, timeout: timedelta) -> Channels:
    """Connect the stages of all pipelines. Collective over all ranks."""
    pipelines: list[list[int]] = all_gather_json(dist.get_process_group_ranks(pp_group))
    return connect_stages(sorted({tuple(ranks) for ranks in pipelines}), dist.get_rank(), timeout)


def _replica_group(dp_group: dist.ProcessGroup, solo: dist.ProcessGroup) -> dist.ProcessGroup:
    """Make the group of the ranks with this rank's place in their data-parallel groups. Collective over all ranks."""
    places = all_gather_json(dist.get_rank(dp_group))
    if len(places) == dist.get_world_size(dp_group):
        return solo
    # All ranks make all groups in one order: names of groups that ranks make by themselves depend on how many groups
    # each of them has, which differs between pipeline stages.
    groups = [
        dist.new_group([rank for rank, other in enumerate(places) if other == place])
        for place in range(dist.get_world_size(dp_group))
    ]
    mine: dist.ProcessGroup = groups[dist.get_rank(dp_group)]
    return mine


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store at which the launcher's ranks find each other, this one's rank, and their number.

    torchrun's agent keeps one store over restarts. A restarted rank that is early would read the addresses of the ranks
    before it and fail; so each start has names of its own.
    """
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, world


def finalize() -> None:
    """Leave the process groups; without this torch warns at exit."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

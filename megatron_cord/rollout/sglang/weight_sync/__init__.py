"""Weight sync: the tensors of the trainer's sharded model into the models of running SGLang servers."""

from megatron_cord.rollout.sglang.weight_sync.config import WeightSyncConfig
from megatron_cord.rollout.sglang.weight_sync.weight_sync import WeightSync, WeightSyncReport, build_weight_sync

__all__ = ["WeightSync", "WeightSyncConfig", "WeightSyncReport", "build_weight_sync"]

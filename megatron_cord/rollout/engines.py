"""The engine that the configuration names."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.sglang.client.addresses import Addresses
from megatron_cord.rollout.sglang.engine import SGLangEngine


def build_engine(
    config: RolloutConfig,
    checkpoint_dir: str | Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    prompts: PromptBuilder | None = None,
) -> CollectiveEngine:
    """Build the engine with the checkpoint's own weights as version 0. All ranks call it together.

    Args:
        config: the choice.
        checkpoint_dir: the Hugging Face checkpoint, which servers run, too.
        device: of this rank, for the local engine.
        dtype: of the local engine's parameters and activations; None: the checkpoint's. Servers have their own.
        prompts: the checkpoint's prompt builder; None: one is made.

    Raises:
        CordError: a checkpoint that the engine cannot run; servers that do not answer in time, or are not fit for
            training.
    """
    if config.engine == "local":
        local = LocalEngineConfig(device=str(device), dtype=dtype)
        return CollectiveEngine(LocalEngine(checkpoint_dir, local, prompts))
    sglang = config.sglang
    addresses = Addresses(sglang.servers, sglang.servers_file, sglang.api_key_file)
    return CollectiveEngine(
        SGLangEngine(checkpoint_dir, addresses, sglang, config.weight_sync, sglang.min_servers, prompts)
    )

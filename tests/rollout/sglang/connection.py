"""The engine, connected to servers that only speak SGLang's protocol, and requests to it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, VersionSpan
from megatron_cord.rollout.weights import PlainWeights
from tests.rollout.sglang.fake_sglang import FakeServer, answer_to

QUICK: dict[str, Any] = {"request_seconds": 20.0, "reissue_seconds": None, "start_seconds": 20.0}
HEAD = "language_model.lm_head.weight"


def connect(checkpoint: Path, servers: list[FakeServer], stack: ExitStack, **settings: Any) -> CollectiveEngine:
    """Return the engine on these servers, started here; weights go over the disk, which they do not read."""
    for server in servers:
        stack.enter_context(server)
    config = RolloutConfig(
        engine="sglang",
        sglang=SGLangConfig(servers=tuple(s.url for s in servers), **QUICK | settings),
        weight_sync=WeightSyncConfig(transport="disk"),
    )
    engine = build_engine(config, checkpoint, torch.device("cpu"))
    stack.callback(engine.close)
    return engine


def head_of(checkpoint: Path) -> PlainWeights:
    """Return the checkpoint's output layer as the weights that were trained."""
    return PlainWeights({HEAD: load_file(checkpoint / "model.safetensors")[HEAD]}, checkpoint)


def requests(count: int, **more: Any) -> list[GenerationRequest]:
    """Of prompts that all differ."""
    return [
        replace(GenerationRequest(Prompt(f"s{i}", (2, 7 + i % 10, 7 + i // 10 % 10)), 1.0, 8, i), **more)
        for i in range(count)
    ]


def check(engine: CollectiveEngine, count: int = 30, version: int = 0) -> None:
    """Each request is answered once, by its own answer."""
    asked = requests(count)
    for request, rollout in zip(asked, engine.generate(asked), strict=True):
        wanted = tuple(answer_to(request.prompt.token_ids))
        assert (rollout.prompt_id, rollout.token_ids, rollout.finish_reason) == (
            request.prompt.sample_id,
            wanted,
            "stop",
        )
        assert rollout.logprobs == (-0.5,) * 4 and rollout.versions == (VersionSpan(0, 4, version),)

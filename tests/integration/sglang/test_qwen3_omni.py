"""Qwen3-Omni on a real server, by SGLang's own classes: experts, clips of any length, weight sync."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.rollout.weights import PlainWeights
from tests.integration.sglang.conftest import PYTHON, write_talking_qwen3_omni
from tests.integration.sglang.test_engine import compare, conversations
from tests.tiny_run import make_samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """One float32 server of a small random model."""
    work = tmp_path_factory.mktemp("qwen3_omni")
    checkpoint = write_talking_qwen3_omni(work / "checkpoint")
    config = ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON, max_total_tokens=4096)
    found = SglangServer(config, "", work / "server.log")
    found.start()
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def questions(checkpoint: Path) -> list[GenerationRequest]:
    """Return forty spoken ones, some of several clips, as many written ones, and conversations of both."""
    prompts, samples = PromptBuilder(checkpoint), make_samples(40, seed=7)
    samples += [sample for sample in conversations(12) if sample.system is None]
    made = [prompts.audio_prompt(sample) for sample in samples] + [prompts.text_prompt(sample) for sample in samples]
    assert max(len(prompt.clips) for prompt in made) > 1
    return [GenerationRequest(prompt, 0.0, 12, i) for i, prompt in enumerate(made)]


@pytest.mark.usefixtures("one_rank")
def test_answers_and_weights_are_the_trainers(server: SglangServer) -> None:
    """Catches an encoder, experts, template or features other than the trainer's, and clips in another order.

    Also a weight sync, by any transport, that leaves out a tensor.
    """
    checkpoint = server.config.checkpoint
    local, asked = LocalEngine(checkpoint), questions(checkpoint)
    for version, transport in enumerate([None, "process_group", "shared_memory", "disk"]):
        weight_sync = WeightSyncConfig(transport=transport or "disk", bucket_bytes=1 << 20)  # type: ignore[arg-type]
        sglang = SGLangConfig(servers=(server.url,))
        config = RolloutConfig(engine="sglang", sglang=sglang, weight_sync=weight_sync)
        engine = build_engine(config, checkpoint, torch.device("cpu"))
        if transport is not None:
            stored = load_file(checkpoint / "model.safetensors")
            trained = {name: tensor for name, tensor in stored.items() if not name.startswith("thinker.visual.")}
            changed = PlainWeights({name: tensor * (1 + version / 50) for name, tensor in trained.items()})
            engine.update_weights(changed, version)
            local.update_weights(changed, version)
        share, largest = compare(engine.generate(asked), local.generate(asked))
        print(f"{transport or 'checkpoint'}: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
        assert share >= 0.99 and largest < 1e-3
        engine.close()

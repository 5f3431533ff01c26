"""Qwen3-Omni on a real server, by SGLang's own classes: experts, clips of any length, weight sync."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_cord.convert import read_into
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.model.lora.targets import find_targets
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest, Rollout, ScoredRollout
from megatron_cord.rollout.weights import PlainWeights
from megatron_cord.trainer.config import TrainConfig
from megatron_cord.trainer.step.batching.batches import TrainingSequence, make_microbatches
from tests.integration.sglang.answers import TRANSPORTS, check_adapters, check_training, compare, connect, conversations
from tests.integration.sglang.conftest import PYTHON, write_talking_qwen3_omni
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
    more = ("--enable-return-routed-experts",)
    config = ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON, max_total_tokens=4096, more=more)
    found = SglangServer(config, "", work / "server.log")
    found.start()
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def questions(checkpoint: Path) -> list[GenerationRequest]:
    """Return forty spoken ones, some of several clips, as many written ones, and conversations of both.

    Responses shall say which experts were chosen.
    """
    prompts, samples = PromptBuilder(checkpoint), make_samples(40, seed=7)
    samples += [sample for sample in conversations(12) if sample.system is None]
    made = [prompts.audio_prompt(sample) for sample in samples] + [prompts.text_prompt(sample) for sample in samples]
    assert max(len(prompt.clips) for prompt in made) > 1
    return [GenerationRequest(prompt, 0.0, 12, i, return_experts=True) for i, prompt in enumerate(made)]


@pytest.mark.usefixtures("one_rank")
def test_answers_and_weights_are_the_trainers(server: SglangServer) -> None:
    """Catches an encoder, experts, template or features other than the trainer's, and clips in another order.

    Also a weight sync, by any transport, that leaves out a tensor.
    """
    checkpoint = server.config.checkpoint
    local, asked = LocalEngine(checkpoint), questions(checkpoint)
    for version, transport in enumerate([None, *TRANSPORTS]):
        engine = connect(checkpoint, server.url, transport or "disk")
        if transport is not None:
            stored = load_file(checkpoint / "model.safetensors")
            trained = {name: tensor for name, tensor in stored.items() if not name.startswith("thinker.visual.")}
            changed = PlainWeights({name: tensor * (1 + version / 50) for name, tensor in trained.items()})
            engine.update_weights(changed, version)
            local.update_weights(changed, version)
        found, wanted = engine.generate(asked), local.generate(asked)
        share, largest = compare(found, wanted)
        print(f"{transport or 'checkpoint'}: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
        assert share >= 0.99 and largest < 1e-3
        assert equal_choices(found, wanted) >= 0.99
        engine.close()


def equal_choices(found: list[Rollout], wanted: list[Rollout]) -> float:
    """Return the share of equal choices of experts, of all layers, in responses of equal tokens."""
    equal, total = 0, 0
    for a, b in zip(found, wanted, strict=True):
        assert a.experts is not None and b.experts is not None
        if a.token_ids == b.token_ids:
            one, other = (experts.tensor().sort(-1).values for experts in (a.experts, b.experts))
            equal, total = equal + int((one == other).all(-1).sum()), total + one[..., 0].numel()
    return equal / total


LORA = LoraConfig(rank=4, alpha=8, whole=("adapter",))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lora_alone(transport: str, server: SglangServer) -> None:
    """Catches adapters of an expert or a tower that a server merges with another weight, or leaves out."""
    checkpoint = server.config.checkpoint
    assert any(target.is_expert for target in find_targets(load_architecture(checkpoint), LORA, ()))
    engine = connect(checkpoint, server.url, transport)
    check_adapters(engine, checkpoint, [server.url], questions(checkpoint)[::4], LORA, versions=(1, 2))
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_thinker_is_trained(transport: str, server: SglangServer, tmp_path: Path) -> None:
    """Catches prompts, weights or features that trainer and server do not share, by each transport."""
    check_training(server, tmp_path, f"rollout.weight_sync.transport={transport}")


def test_training_follows_the_servers_experts(server: SglangServer, tmp_path: Path) -> None:
    """Catches experts that a server returns and the student does not get."""
    settings = ("rollout.router_replay=true", "model.dtype=bfloat16", "rollout.temperature=0.7")
    for line in check_training(server, tmp_path, *settings, limit=0.2):
        assert 0.8 < line["experts/replayed"] < 1 and 0 <= line["experts/rerouted"] < 0.1


@pytest.mark.usefixtures("one_rank")
@torch.no_grad()
def test_router_replay_brings_the_trainer_closer(server: SglangServer) -> None:
    """Catches experts of another token or layer than the server's, which would lead the trainer away from it.

    The trainer computes in bfloat16 and the server in float32, so that their routers choose some experts differently.
    """
    checkpoint = server.config.checkpoint
    engine, asked = connect(checkpoint, server.url, "disk"), questions(checkpoint)
    rollouts = engine.generate(asked)
    layout = initialize(ParallelConfig(), seed=0)
    model = LALM(load_architecture(checkpoint), layout, torch.bfloat16)
    read_into(model, checkpoint)
    differences = []
    for replay in (False, True):
        given = [rollout if replay else replace(rollout, experts=None) for rollout in rollouts]
        sequences = [
            TrainingSequence(request.prompt, None, ScoredRollout(rollout, "policy", advantage=1.0), index)
            for index, (request, rollout) in enumerate(zip(asked, given, strict=True))
        ]
        config, sharding = TrainConfig(packing="packed", tokens_per_microbatch=1024), layout.sequence_sharding
        off = []
        for batch in make_microbatches(sequences, config, 0, sharding, layout.device):
            hidden = model(batch.student).flatten(0, 1)[batch.student_rows.rows].float()
            logits = (hidden @ model.output_weight.float().t())[:, : model.arch.language.vocab_size]
            own = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
            off.append((own - batch.engine_logprobs).abs())
        differences.append(torch.cat(off))
    free, followed = differences
    print(f"router replay: mean difference {free.mean():.2g} without, {followed.mean():.2g} with; "
          f"largest {free.max():.2g}, {followed.max():.2g}; of {len(free)} tokens")  # fmt: skip
    assert followed.mean() < 0.9 * free.mean() and followed.max() < free.max()
    engine.close()

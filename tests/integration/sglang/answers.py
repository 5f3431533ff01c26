"""Greedy answers of servers to spoken and written questions, beside the local engine's and the plain model's.

Of the checkpoint's weights, of others after a weight sync, and of LoRA that was sent alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_cord.convert import read_into
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.engine import SGLangEngine
from megatron_cord.rollout.sglang.server.process import SglangServer
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout
from megatron_cord.rollout.weights import PlainWeights, ShardedModelWeights
from tests.tiny_run import make_samples, metrics, write_shards
from tests.trainer.runs.test_train import alone

TRANSPORTS = ("process_group", "shared_memory", "disk")


def conversations(count: int) -> list[Sample]:
    """Return samples of two turns, three clips and, every other one, a system prompt."""
    made = make_samples(3 * count, seed=8)
    samples = []
    for i in range(count):
        group = made[3 * i : 3 * i + 3]
        first, second, third = (AudioPart(j, sample.question) for j, sample in enumerate(group))
        last = (TextPart("what is\n"), second, third, TextPart("answer"))
        turns = (Turn("user", (first,)), Turn("assistant", (TextPart("two"),)), Turn("user", last))
        chat = Sample(group[0].id, "", turns=turns, system="answer one" if i % 2 else None)
        samples.append(chat.with_recordings([sample.waveform for sample in group]))
    return samples


def connect(checkpoint: Path, url: str, transport: str) -> CollectiveEngine:
    """Return an engine with this server alone, whose weights go by this transport, in several buckets."""
    weight_sync = WeightSyncConfig(transport=transport, bucket_bytes=1 << 20)  # type: ignore[arg-type]
    config = RolloutConfig(engine="sglang", sglang=SGLangConfig(servers=(url,)), weight_sync=weight_sync)
    return build_engine(config, checkpoint, torch.device("cpu"))


def questions(checkpoint: Path, count: int = 100) -> list[GenerationRequest]:
    """Return so many spoken ones, of several clips each, as many written ones, and ten conversations of both."""
    prompts, samples = PromptBuilder(checkpoint, long_audio="cut"), make_samples(count, seed=7)
    samples += [sample for sample in conversations(20) if sample.system is None]  # a word that the tokenizer lacks
    made = [prompts.audio_prompt(sample) for sample in samples] + [prompts.text_prompt(sample) for sample in samples]
    assert max(len(prompt.clips) for prompt in made) > 1
    return [GenerationRequest(prompt, 0.0, 12, i) for i, prompt in enumerate(made)]


def compare(found: list[Rollout], wanted: list[Rollout]) -> tuple[float, float]:
    """Return the share of equal tokens, and the largest difference of log-probabilities up to where tokens part."""
    equal, total, largest = 0, 0, 0.0
    for a, b in zip(found, wanted, strict=True):
        total += len(b.token_ids)
        for x, y, p, q in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False):
            if x != y:
                break
            equal += 1
            largest = max(largest, abs(p - q))
    return equal / total, largest


@torch.no_grad()
def check_reference(checkpoint: Path, asked: Sequence[GenerationRequest], answers: Sequence[Rollout]) -> None:
    """Check that nearly each token is the plain model's likeliest allowed one, each response scored alone and whole."""
    model, forbidden = PlainModel(checkpoint, torch.float32), list(PromptBuilder(checkpoint).special_ids)
    equal, total = 0, 0
    for request, answer in zip(asked, answers, strict=True):
        prompt, ids = request.prompt, answer.token_ids
        features = torch.stack([clip.features for clip in prompt.clips]) if prompt.clips else None
        frames = torch.tensor([clip.num_frames for clip in prompt.clips]) if prompt.clips else None
        hidden = model.hidden(torch.tensor([[*prompt.token_ids, *ids]]), features, frames).last_hidden_state
        logits = model.head(hidden)[0, -len(ids) - 1 : -1]
        logits[:, forbidden] = -torch.inf
        equal += int((logits.argmax(-1) == torch.tensor(ids)).sum())
        total += len(ids)
    assert equal / total >= 0.99, f"{equal} of {total} tokens are the reference's"


def check_answers(
    checkpoint: Path, url: str, transports: Sequence[str] = TRANSPORTS, asked: Sequence[GenerationRequest] = ()
) -> None:
    """Check the server's answers with the checkpoint's weights, and with others after a weight sync by each transport.

    Args:
        checkpoint: in float32.
        url: of the server.
        transports: each brings weights of its own, all tensors changed.
        asked: `questions` if empty.
    """
    local, asked = LocalEngine(checkpoint), list(asked or questions(checkpoint))
    for version, transport in enumerate([None, *transports]):
        engine = connect(checkpoint, url, transport or "disk")
        if transport is not None:
            stored = load_file(checkpoint / "model.safetensors")
            changed = PlainWeights({name: tensor * (1 + version / 50) for name, tensor in stored.items()})
            engine.update_weights(changed, version)
            local.update_weights(changed, version)
        found, wanted = engine.generate(asked), local.generate(asked)
        share, largest = compare(found, wanted)
        print(f"{transport or 'checkpoint'}: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
        assert share >= 0.99 and largest < 1e-3
        assert len({rollout.token_ids for rollout in wanted}) > len(asked) / 10, "the answers tell questions apart"
        if transport is None:
            check_reference(checkpoint, asked, found)
        engine.close()


def check_adapters(
    engine: CollectiveEngine,
    checkpoint: Path,
    urls: Sequence[str],
    asked: Sequence[GenerationRequest],
    lora: LoraConfig,
    versions: Sequence[int] = (1, 2, 3),
) -> None:
    """Check the servers' answers after each of some weight syncs of LoRA alone, with LoRA off, and with it on again.

    The local engine has the sums of base and adapters, which change before each weight sync.

    Args:
        engine: connected to the servers.
        checkpoint: that they serve, in float32.
        urls: of the servers.
        asked: greedy requests.
        lora: which matrices have adapters.
        versions: of the weights.
    """
    inner, local = engine.engine, LocalEngine(checkpoint)
    assert isinstance(inner, SGLangEngine)
    model = LALM(load_architecture(checkpoint), initialize(ParallelConfig(), seed=0), torch.float32)
    read_into(model, checkpoint)
    model.add_lora(lora, (), seed=0)
    assert model.lora is not None
    source, generator, asked = ShardedModelWeights(model), torch.Generator().manual_seed(0), list(asked)
    answers: list[list[tuple[int, ...]]] = []
    for version in versions:
        for parameter in model.lora.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        report = inner._weight_sync.update(source, version, inner._control.endpoints(list(urls)))
        assert report.merged == (version == versions[0]) and len(report.current) == len(urls), report
        inner.update_weights(source, version)
        local.update_weights(source, version)
        found = engine.generate(asked)
        share, largest = compare(found, local.generate(asked))
        print(f"LoRA, version {version}: {report.nbytes} bytes, {share:.2%} of tokens equal, within {largest:.2g}")
        assert share >= 0.99 and largest < 1e-3
        answers.append([rollout.token_ids for rollout in found])
    assert all(one != other for one, other in combinations(answers, 2))
    assert inner.rebases()
    with inner.base_weights(), local.base_weights():
        off, wanted = engine.generate(asked), local.generate(asked)
        share, largest = compare(off, wanted)
        assert share >= 0.99 and largest < 1e-3
        fresh = LocalEngine(checkpoint).generate(asked)
        assert [rollout.token_ids for rollout in wanted] == [rollout.token_ids for rollout in fresh]
    assert [rollout.token_ids for rollout in engine.generate(asked)] == answers[-1]


def check_training(server: SglangServer, directory: Path, *settings: str, limit: float = 1e-3) -> list[dict[str, Any]]:
    """Train three steps from a server; return the metrics.

    Args:
        server: that runs.
        directory: for data and run.
        settings: beside those of a tiny run; they win.
        limit: of the difference between the server's log-probabilities and the trainer's.
    """
    write_shards(directory / "train", make_samples(6, seed=1))
    write_shards(directory / "heldout", make_samples(3, seed=2))
    alone(
        directory,
        directory / "run",
        f"model.checkpoint={server.config.checkpoint}",
        "rollout.engine=sglang",
        f"rollout.sglang.servers=[{server.url}]",
        "rollout.weight_sync.bucket_bytes=1048576",
        f"rollout.max_logprob_mismatch={limit}",
        "train.steps=3",
        *settings,
    )
    lines = metrics(directory / "run")
    # From the second step on the server's tokens come from weights that it was sent.
    assert len(lines) == 3 and not any(line["skipped"] for line in lines)
    assert all(line["engine_logprob_difference"] < limit and line["grad_norm"] > 0 for line in lines)
    return lines

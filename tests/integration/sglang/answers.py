"""Greedy answers of a server to spoken and written questions, beside the local engine's and the plain model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.weight_sync import WeightSyncConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout
from megatron_cord.rollout.weights import PlainWeights
from tests.integration.sglang.test_engine import compare, conversations
from tests.tiny_run import make_samples

TRANSPORTS = ("process_group", "shared_memory", "disk")


def questions(checkpoint: Path, count: int = 100) -> list[GenerationRequest]:
    """Return so many spoken ones, of several clips each, as many written ones, and ten conversations of both."""
    prompts, samples = PromptBuilder(checkpoint, long_audio="cut"), make_samples(count, seed=7)
    samples += [sample for sample in conversations(20) if sample.system is None]  # a word that the tokenizer lacks
    made = [prompts.audio_prompt(sample) for sample in samples] + [prompts.text_prompt(sample) for sample in samples]
    assert max(len(prompt.clips) for prompt in made) > 1
    return [GenerationRequest(prompt, 0.0, 12, i) for i, prompt in enumerate(made)]


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
        weight_sync = WeightSyncConfig(transport=transport or "disk", bucket_bytes=1 << 20)  # type: ignore[arg-type]
        config = RolloutConfig(engine="sglang", sglang=SGLangConfig(servers=(url,)), weight_sync=weight_sync)
        engine = build_engine(config, checkpoint, torch.device("cpu"))
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

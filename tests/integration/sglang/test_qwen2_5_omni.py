"""Qwen2.5-Omni's thinker on a real server, for which SGLang has no class of its own."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.data.audio.wav import encode_float_wav
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.rollout.weights import PlainWeights
from tests.integration.sglang.answers import TRANSPORTS, check_adapters, check_training, compare, connect
from tests.integration.sglang.conftest import PYTHON, write_talking_qwen2_5_omni
from tests.tiny_run import make_samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """One float32 server of a small random model, with the talker and the vision tower beside the thinker."""
    work = tmp_path_factory.mktemp("qwen2_5_omni")
    checkpoint = write_talking_qwen2_5_omni(work / "checkpoint")
    found = SglangServer(ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON), "", work / "server.log")
    found.start()
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def questions(checkpoint: Path) -> list[GenerationRequest]:
    """Return thirty spoken ones, of several clips each, and as many written ones."""
    prompts, samples = PromptBuilder(checkpoint, long_audio="cut"), make_samples(30, seed=7)
    made = [prompts.audio_prompt(sample) for sample in samples] + [prompts.text_prompt(sample) for sample in samples]
    assert max(len(prompt.clips) for prompt in made) > 1
    return [GenerationRequest(prompt, 0.0, 12, i) for i, prompt in enumerate(made)]


@pytest.mark.usefixtures("one_rank")
def test_answers_and_weights_are_the_trainers(server: SglangServer) -> None:
    """Catches chunks, positions, template or features other than the trainer's, clips in another order.

    Also a weight sync, by any transport, that leaves out a tensor of the thinker.
    """
    checkpoint = server.config.checkpoint
    local, asked = LocalEngine(checkpoint), questions(checkpoint)
    for version, transport in enumerate([None, *TRANSPORTS]):
        engine = connect(checkpoint, server.url, transport or "disk")
        if transport is not None:
            stored = published_tensors(checkpoint, load_architecture(checkpoint))
            changed = PlainWeights({name: tensor.read() * (1 + version / 50) for name, tensor in stored})
            engine.update_weights(changed, version)
            local.update_weights(changed, version)
        share, largest = compare(engine.generate(asked), local.generate(asked))
        print(f"{transport or 'checkpoint'}: {share:.2%} of tokens equal, log-probabilities within {largest:.2g}")
        assert share >= 0.99 and largest < 1e-3
        engine.close()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lora_alone(transport: str, server: SglangServer) -> None:
    """Catches adapters of a tower that a server merges with another weight, or leaves out."""
    checkpoint = server.config.checkpoint
    engine = connect(checkpoint, server.url, transport)
    lora = LoraConfig(rank=4, alpha=8, whole=("adapter",))
    check_adapters(engine, checkpoint, [server.url], questions(checkpoint)[::4], lora, versions=(1, 2))
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_thinker_is_trained(transport: str, server: SglangServer, tmp_path: Path) -> None:
    """Catches prompts, weights or features that trainer and server do not share, by each transport."""
    check_training(server, tmp_path, f"rollout.weight_sync.transport={transport}", "data.long_audio=cut")


@pytest.mark.parametrize(
    ("text", "seconds", "more", "said"),
    [
        ("<|audio_bos|><|AUDIO|><|audio_eos|>", [0.1, 0.1], {}, "1 placeholders for 2"),
        ("<|AUDIO|>", [301.0], {}, "at most 300.00 s"),
        ("<|AUDIO|>", [0.01], {}, "at least one token"),
        ("<|AUDIO|>", [0.1], {"image_data": "picture.png"}, "takes no images"),
    ],
)
def test_what_cannot_be_heard_is_refused(
    text: str, seconds: list[float], more: dict[str, str], said: str, server: SglangServer
) -> None:
    """Catches recordings left out or cut off in silence, images, and a server that dies of them."""
    wavs = [encode_float_wav(np.zeros(int(length * 16000), np.float32)) for length in seconds]
    data = ["data:audio/wav;base64," + base64.b64encode(wav).decode() for wav in wavs]
    with pytest.raises(ServerError, match=said) as refused:
        Endpoint(server.url).post(
            "/generate", {"text": text, "audio_data": data, "sampling_params": {"max_new_tokens": 1}} | more, 60.0
        )
    assert refused.value.status == 400 and server.endpoint.is_healthy(10.0)

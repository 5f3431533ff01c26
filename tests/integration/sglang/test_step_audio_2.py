"""Step-Audio 2 on a real server, for which SGLang has no class of its own."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.audio.wav import encode_float_wav
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from tests.integration.sglang.answers import check_answers
from tests.integration.sglang.conftest import PYTHON, write_talking
from tests.tiny_run import finish, make_samples, metrics, overrides, start, write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """One float32 server of a small random model."""
    work = tmp_path_factory.mktemp("step_audio_2")
    checkpoint = write_talking(work / "checkpoint", "step_audio_2")
    found = SglangServer(ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON), "", work / "server.log")
    found.start()
    try:
        found.wait()
        yield found
    finally:
        found.stop()


@pytest.mark.usefixtures("one_rank")
def test_answers_and_weights_are_the_trainers(server: SglangServer) -> None:
    """Catches an encoder, adapter, template or features other than the trainer's, clips in another order.

    Also a weight sync, by any transport, that leaves out a tensor.
    """
    check_answers(server.config.checkpoint, server.url)


@pytest.mark.parametrize(
    ("text", "seconds", "more", "said"),
    [
        ("<|audio_bos|><|AUDIO|><|audio_eos|>", [0.1, 0.1], {}, "1 placeholders for 2"),
        ("<|AUDIO|>", [2.0], {}, "at most 0.46 s"),
        ("<|AUDIO|>", [0.01], {}, "at least one token"),
        ("<|AUDIO|>", [0.1], {"image_data": "picture.png"}, "takes no images"),
    ],
)
def test_what_cannot_be_heard_is_refused(
    text: str, seconds: list[float], more: dict[str, str], said: str, server: SglangServer
) -> None:
    """Catches recordings left out or cut off in silence, and a server that dies of them."""
    wavs = [encode_float_wav(np.zeros(int(length * 16000), np.float32)) for length in seconds]
    data = ["data:audio/wav;base64," + base64.b64encode(wav).decode() for wav in wavs]
    with pytest.raises(ServerError, match=said) as refused:
        Endpoint(server.url).post(
            "/generate", {"text": text, "audio_data": data, "sampling_params": {"max_new_tokens": 1}} | more, 60.0
        )
    assert refused.value.status == 400 and server.endpoint.is_healthy(10.0)


def test_it_is_trained(server: SglangServer, tmp_path: Path) -> None:
    """Catches shards that are lost on the server, and clips that reach trainer and server differently."""
    write_shards(tmp_path / "train", make_samples(6, seed=1))
    write_shards(tmp_path / "heldout", make_samples(3, seed=2))
    output = tmp_path / "run"
    status, errors = finish(
        start(
            overrides(
                tmp_path,
                output,
                f"model.checkpoint={server.config.checkpoint}",
                "rollout.engine=sglang",
                f"rollout.sglang.servers=[{server.url}]",
                "rollout.max_logprob_mismatch=0.001",
                "train.steps=3",
                "parallel.tp=2",
                "parallel.sequence_parallel=true",
                "data.long_audio=cut",
            )
        )
    )
    assert status == 0, errors
    lines = metrics(output)
    assert len(lines) == 3 and all(line["engine_logprob_difference"] < 1e-3 and line["grad_norm"] > 0 for line in lines)

"""On real servers: grafts, Audio Flamingo 3, Voxtral, and families with another text model than the published one."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.audio.wav import encode_float_wav
from megatron_cord.rollout.sglang.client.addresses import read_servers_file
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from tests.integration.sglang.answers import TRANSPORTS, check_answers
from tests.integration.sglang.conftest import PYTHON, write_talking, write_talking_graft, write_talking_voxtral
from tests.tiny_run import ROOT, finish, make_samples, metrics, overrides, start, write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env"),
]


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Return a grafted checkpoint, and the file of addresses of tools/serve_rollout.py, which serves it in float32."""
    work = tmp_path_factory.mktemp("grafted")
    checkpoint, addresses = write_talking_graft(work / "checkpoint"), work / "servers.json"
    command = [
        sys.executable, "tools/serve_rollout.py", str(checkpoint), "--servers-file", str(addresses), "--device", "cpu",
        "--python", str(PYTHON), "--log-dir", str(work / "log"),
    ]  # fmt: skip
    with (work / "said").open("w") as said:
        serving = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 600
        while not (addresses.exists() and all(Endpoint(url).is_healthy(5.0) for url in read_servers_file(addresses))):
            assert serving.poll() is None and time.monotonic() < deadline, (work / "said").read_text()
            time.sleep(0.5)
        yield checkpoint, addresses
    finally:
        serving.terminate()
        serving.wait(60)


@pytest.mark.usefixtures("one_rank")
def test_answers_and_weights_of_a_graft_are_the_trainers(grafted: tuple[Path, Path]) -> None:
    """Catches an encoder, projector, template or features other than the trainer's, and windows of one recording apart.

    Also a weight sync, by any transport, that leaves out a tensor.
    """
    checkpoint, addresses = grafted
    check_answers(checkpoint, read_servers_file(addresses)[0])


def test_a_graft_is_trained(grafted: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches frozen towers that a weight sync wants, and recordings that reach trainer and server differently."""
    checkpoint, addresses = grafted
    write_shards(tmp_path / "train", make_samples(6, seed=1))
    write_shards(tmp_path / "heldout", make_samples(3, seed=2))
    output = tmp_path / "run"
    status, errors = finish(
        start(
            overrides(
                tmp_path,
                output,
                f"model.checkpoint={checkpoint}",
                "model.freeze=[audio_encoder,language_model]",
                "rollout.engine=sglang",
                f"rollout.sglang.servers_file={addresses}",
                "rollout.max_logprob_mismatch=0.001",
                "train.steps=3",
                "data.long_audio=cut",
            )
        )
    )
    assert status == 0, errors
    lines = metrics(output)
    assert len(lines) == 3 and all(line["engine_logprob_difference"] < 1e-3 and line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("text", "seconds", "said"),
    [
        ("<|audio|>", [0.1, 0.1], "1 placeholders for 2"),
        ("<|audio|>", [2.0], "at most 0.48 s"),
    ],
)
def test_what_a_graft_cannot_take_is_refused(
    text: str, seconds: list[float], said: str, grafted: tuple[Path, Path]
) -> None:
    """Catches recordings left out or cut off in silence, and a server that dies of them."""
    endpoint = Endpoint(read_servers_file(grafted[1])[0])
    wavs = [encode_float_wav(np.zeros(int(length * 16000), np.float32)) for length in seconds]
    data = ["data:audio/wav;base64," + base64.b64encode(wav).decode() for wav in wavs]
    with pytest.raises(ServerError, match=said) as refused:
        endpoint.post("/generate", {"text": text, "audio_data": data, "sampling_params": {"max_new_tokens": 1}}, 60.0)
    assert refused.value.status == 400 and endpoint.is_healthy(10.0)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("family", "tied", "transports"),
    [
        ("audioflamingo3", False, TRANSPORTS),
        ("voxtral", False, TRANSPORTS),
        ("ultravox+llama", True, TRANSPORTS[:1]),
        ("ultravox+mistral", False, TRANSPORTS[:1]),
        ("ultravox+qwen2", False, TRANSPORTS[:1]),
        ("ultravox+qwen3", False, TRANSPORTS[:1]),
        ("qwen2_audio+llama", False, TRANSPORTS[:1]),
        ("qwen2_audio+mistral", False, TRANSPORTS[:1]),
        ("qwen2_audio+qwen3", False, TRANSPORTS[:1]),
        ("qwen2_audio+qwen3_moe", False, TRANSPORTS[:1]),
    ],
)
def test_answers_and_weights_are_the_trainers(
    family: str, tied: bool, transports: tuple[str, ...], tmp_path: Path
) -> None:
    """Catches another decoder than the configuration's, its rotary positions unscaled, biases or norms left out.

    Also placeholders of Voxtral's recordings in another place than the trainer's, and windows of Audio Flamingo 3 that
    attend to their padding.
    """
    check_on_server(write_talking(tmp_path / "checkpoint", family, tied=tied), tmp_path, transports)


@pytest.mark.usefixtures("one_rank")
def test_voxtral_with_mistrals_tokenizer(tmp_path: Path) -> None:
    """Catches prompts that are sent as text, which none turns into with this tokenizer."""
    pytest.importorskip("mistral_common")
    check_on_server(write_talking_voxtral(tmp_path / "checkpoint"), tmp_path, ())


def check_on_server(checkpoint: Path, work: Path, transports: tuple[str, ...]) -> None:
    """Check the answers of a server that is started here."""
    server = SglangServer(ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON), "", work / "log")
    server.start()
    try:
        server.wait()
        check_answers(checkpoint, server.url, transports)
    finally:
        server.stop()

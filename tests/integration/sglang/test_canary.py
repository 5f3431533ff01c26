"""Privileged parts of the teacher's view: no line of a real server's log has them, though it logs every request."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from tests.integration.sglang.conftest import HEAD, PYTHON, make_talk
from tests.tiny_run import WORDS, finish, make_samples, metrics, overrides, start, write_shards

CANARIES = ("nightingale", "woodpecker")
VIEWS = 'views={informed: {user: [text, "woodpecker {answer}"]}}'
_EVERYTHING = ("--log-requests", "--log-requests-level", "3")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env")
def test_no_line_of_the_log_has_privileged_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the answer or the scaffold, as words or tokens, in what a real server is sent in a run and says of it."""
    create_checkpoint(tmp_path / "checkpoint", TinyModelConfig(window_seconds=1), [*WORDS, "system", *CANARIES], seed=0)
    make_talk(tmp_path / "checkpoint", HEAD)
    for name, count, seed in (("train", 6, 1), ("heldout", 3, 2)):
        write_shards(tmp_path / name, [replace(s, answer=CANARIES[0]) for s in make_samples(count, seed=seed)])
    monkeypatch.setenv("MEGATRON_CORD_SERVER_KEY", "a-key")
    log = tmp_path / "log" / "server.log"
    config = ServerConfig(checkpoint=tmp_path / "checkpoint", device="cpu", python=PYTHON, more=_EVERYTHING)
    server = SglangServer(replace(config, dtype="float32", max_total_tokens=4096), "a-key", log)
    server.start()
    try:
        server.wait()
        settings = [
            VIEWS,
            "objective.teacher_view=informed",
            "rollout.engine=sglang",
            f"rollout.sglang.servers=[{server.url}]",
            "rollout.weight_sync.timeout_seconds=120",
            "train.steps=2",
            "evaluation.interval=1",
        ]
        status, errors = finish(start(overrides(tmp_path, tmp_path / "run", *settings), ranks=1))
    finally:
        server.stop()
    assert status == 0, errors
    assert len(metrics(tmp_path / "run")) == 2
    prompts = PromptBuilder(tmp_path / "checkpoint")
    spoken, written = requests(log, prompts.encode("assistant")[-1])
    # What was asked is in the log: spoken prompts as text, written ones as tokens.
    assert spoken and all("<|AUDIO|>" in text for text in spoken)
    question = prompts.encode(make_samples(1, seed=2)[0].question)
    assert any(set(question) <= set(ids) for ids in written)
    ids = {prompts.encode(word)[-1] for word in CANARIES}
    said = [
        line.partition("assistant")[0].partition("out={")[0] for line in log.read_text(errors="replace").splitlines()
    ]
    assert not [line.partition(word)[0][-200:] + word for line in said for word in CANARIES if word in line]
    assert not [found for found in written if ids & set(found)]


def requests(log: Path, assistant: int) -> tuple[list[str], list[list[int]]]:
    """Return the prompts in a server's log, as texts and as tokens, up to where the response begins.

    Behind it, in later requests for the rest of a response, are the model's own words.
    """
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Receive: obj=GenerateReqInput" in line]
    spoken = [match[1].partition("assistant")[0] for line in lines if (match := re.search(r"\btext='([^']*)'", line))]
    found = [match[1] for line in lines if (match := re.search(r"\binput_ids=\[([0-9, ]+)\]", line))]
    written = [[int(number) for number in each.split(",")] for each in found]
    return spoken, [ids[: ids.index(assistant)] for ids in written if assistant in ids]

"""Privileged parts of the teacher's view: no line of a real server's log has them, though it logs every request."""

from __future__ import annotations

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
    text = log.read_text(errors="replace")
    # What is asked is in the log: of spoken prompts as text, of written ones as tokens.
    prompts = PromptBuilder(tmp_path / "checkpoint")
    assert "<|AUDIO|>" in text
    written = prompts.text_prompt(make_samples(1, seed=2)[0]).token_ids
    assert str(list(written))[1:-1] in text
    # What a response says is the model's own: only what was asked counts.
    asked = [line.split("out={")[0] for line in text.splitlines()]
    assert not [line for line in asked for word in CANARIES if word in line]
    (view,) = prompts.encode(CANARIES[0])[-1:]
    assert not any(f" {view}," in line.partition("input_ids")[2].partition("]")[0] for line in asked)

"""An evaluation whose answers come from the real SGLang server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.evaluate import evaluate
from megatron_cord.lmms_eval.answerer import Answerer, Asked
from megatron_cord.parallel.layout import finalize
from megatron_cord.rollout.sglang.server.process import ENVIRONMENT, ServerConfig, SglangServer
from megatron_cord.trainer.config import RunConfig
from tests.integration.sglang.conftest import write_talking_graft
from tests.tiny_run import ROOT, write_inputs

PYTHON = ROOT / ENVIRONMENT / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env")
@pytest.mark.parametrize("grafted", [False, True])
def test_a_server_gives_the_local_engines_results(
    grafted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an evaluation that only the local engine can make, and a server that is asked other questions.

    By the requests of lmms-eval, too.
    """
    inputs = write_inputs(tmp_path)
    checkpoint = write_talking_graft(tmp_path / "grafted", window=50) if grafted else inputs / "checkpoint"
    settings = [
        f"model.checkpoint={checkpoint}",
        "model.dtype=float32",
        "evaluation.checkpoint=base",
        "evaluation.max_new_tokens=4",
        f"evaluation.sets.heard.path={inputs / 'train'}",
        "evaluation.sets.heard.format=shards",
    ]

    def answers(name: str, *more: str) -> list[list[str]]:
        try:
            evaluate(load_config(RunConfig, None, [f"output_dir={tmp_path / name}", *settings, *more]))
        finally:
            finalize()
        lines = (tmp_path / name / "evaluations" / "base" / "heard.jsonl").read_text().splitlines()[1:]
        return [[row["text_response"], row["audio_response"]] for row in map(json.loads, lines)]

    monkeypatch.setenv("MEGATRON_CORD_SERVER_KEY", "a-key")
    server = SglangServer(
        ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON),
        "a-key",
        tmp_path / "log" / "server.log",
    )
    server.start()
    try:
        server.wait()
        servers = ["rollout.engine=sglang", f"rollout.sglang.servers=[{server.url}]"]
        served = answers("served", *servers)
        answerer = Answerer(load_config(RunConfig, None, [f"output_dir={tmp_path / 'asked'}", *settings, *servers]))
        shards = ShardDataset(inputs / "train")
        samples = [shards[i] for i in range(len(shards))]
        said = answerer.answer([Asked(s.id, "", (s.waveform,), max_new_tokens=4) for s in samples])
        answerer.close()
    finally:
        server.stop()
    local = answers("local")
    equal = sum(a == b for one, other in zip(served, local, strict=True) for a, b in zip(one, other, strict=True))
    assert len(served) == 10 and equal >= 19, (served, local)  # rounding may decide one of the twenty
    assert len(said) == 10 and sum(a == b for a, (_, b) in zip(said, served, strict=True)) >= 9, (said, served)

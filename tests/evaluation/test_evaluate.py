"""The command that evaluates: a plain checkpoint, a run's checkpoint beside it, and what a user may get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.evaluate import evaluate, exit_status
from megatron_cord.evaluation.answers import generate_answers
from megatron_cord.parallel.layout import finalize
from megatron_cord.report.run.reading import read_run
from megatron_cord.trainer.config import RunConfig
from tests.openai_server import OpenAIServer, Reply
from tests.tiny_run import ROOT, free_port, make_run, overrides, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def sets(inputs: Path) -> list[str]:
    (inputs / "written.jsonl").write_text('{"question": "what is one plus two", "answer": "three"}\n' * 3)
    return [
        f"evaluation.sets.spoken.path={inputs / 'train'}", "evaluation.sets.spoken.format=shards", "evaluation.chunk=4",
        f"evaluation.sets.written.path={inputs / 'written.jsonl'}", "evaluation.max_new_tokens=4",
    ]  # fmt: skip


def run(*settings: str) -> dict[str, Any]:
    try:
        result = evaluate(load_config(RunConfig, None, settings))
        assert result is not None
        return result
    finally:
        finalize()


def test_a_plain_checkpoint(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an evaluation that needs a training run, its data or its directory, and one that is not resumed.

    Also one that goes on in another precision.
    """
    plain = [
        f"output_dir={tmp_path}",
        f"model.checkpoint={inputs / 'checkpoint'}",
        "evaluation.checkpoint=base",
        *sets(inputs),
    ]
    result = run(*plain)
    assert set(result["sets"]) == {"spoken", "written"} and "results.html" in capsys.readouterr().out.replace("\n", "")
    directory = tmp_path / "evaluations" / "base"
    found = json.loads((directory / "results.json").read_text())
    assert (
        found["sets"]["spoken"]["samples"] == 10
        and found["sets"]["written"]["samples"] == 3
        and found["model"] == "base"
    )
    before = (directory / "spoken.jsonl").stat().st_mtime_ns
    assert run(*plain) == result and (directory / "spoken.jsonl").stat().st_mtime_ns == before
    with pytest.raises(CordError, match=r"spoken\.jsonl holds answers for other model;"):
        run(*plain, "model.dtype=float32")  # the local engine's precision, too


def test_a_set_that_is_rated(inputs: Path, tmp_path: Path) -> None:
    """Catches a judge that the command does not ask, and a rating that reaches neither result nor page."""
    path = tmp_path / "alpacaeval.jsonl"
    path.write_text('{"prompt": "what is one plus two"}\n{"prompt": "what is two plus two"}\n')
    reply = Reply(json.dumps({"choices": [{"message": {"content": '{"rating": 4}'}}]}).encode())
    with OpenAIServer(lambda _: reply) as judge:
        result = run(
            f"output_dir={tmp_path}", f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base",
            f"evaluation.sets.talk.path={path}", "evaluation.sets.talk.format=voicebench/alpacaeval",
            "evaluation.max_new_tokens=4", f"reward.judge.base_url={judge.url}", "reward.judge.model=judge",
            "reward.judge.timeout=60",
        )  # fmt: skip
    assert result["sets"]["talk"]["text_accuracy"] == 0.8 and result["sets"]["talk"]["measures"] == {
        "rating": {"text": 4.0}
    }
    assert "| talk | rating | 4.000 | – |" in (tmp_path / "evaluations" / "base" / "results.md").read_text()


def test_a_run_beside_its_start(inputs: Path, tmp_path: Path) -> None:
    """Catches weights not loaded, a baseline that is the trained model, and results that the report does not find."""
    run_dir = tmp_path / "run"
    settings = overrides(inputs, run_dir, "train.steps=2", "optimizer.learning_rate=0.05")
    try:
        make_run(settings)
    finally:
        finalize()
    result = run(*settings, *sets(inputs), "evaluation.baseline=base")
    assert (result["model"], result["step"], result["baseline"]) == ("step_000002", 2, "base")
    evaluations = run_dir / "evaluations"
    base, trained = (
        (evaluations / label / "spoken.jsonl").read_text().splitlines() for label in ("base", "step_000002")
    )
    assert len(base) == len(trained) == 11 and base[0] != trained[0], "the models' fingerprints differ"
    assert [json.loads(line)["audio_response"] for line in base[1:]] != [
        json.loads(line)["audio_response"] for line in trained[1:]
    ]
    assert {check["set"] for check in result["forgetting"]} == {"spoken", "written", "heldout"}
    shown = read_run(run_dir).evaluations
    assert [evaluation.step for evaluation in shown] == [0, 2] and shown[1].samples == 4
    assert shown[1].audio_accuracy == result["sets"]["heldout"]["audio_accuracy"]
    guard = [f"evaluation.guards.text.{key}" for key in ("set=spoken", "max_drop=0.99", "decides=drop")]
    with pytest.raises(CordError, match=r"guards\.text: .*no drop could exceed max_drop=0\.99"):
        run(*settings, *sets(inputs), *guard, "evaluation.interval=1", "evaluation.baseline=base")


def test_guards_compare_two_results(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a drop that no status tells, another baseline than the guard's, and a guard that nothing checks."""
    plain = [f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base", *sets(inputs)]
    result = run(f"output_dir={tmp_path / 'first'}", *plain)
    assert result["guards"] == {} and exit_status(result) == 0 and exit_status(None) == 75
    first = tmp_path / "first" / "evaluations" / "base"
    right = json.loads((first / "spoken.json").read_text())
    for row in right["answers"]:  # a model that was right on all
        row["text_correct"], row["audio_correct"] = True, True
    (tmp_path / "spoken.json").write_text(json.dumps(right))
    guard = "evaluation.guards.heard.{}={}".format
    settings = [*plain, guard("set", "spoken"), guard("view", "hear"), guard("max_drop", 0.2)]
    same = run(f"output_dir={tmp_path / 'same'}", *settings, guard("decides", "drop"), guard("baseline", tmp_path))
    found = same["guards"]["heard"]
    accuracy = same["sets"]["spoken"]["audio_accuracy"]
    assert (found["held"], found["before"], found["accuracy"]) == (False, 1.0, accuracy) and found["low"] <= found[
        "drop"
    ]
    assert (
        exit_status(same) == 4
        and "beyond the limit" in (tmp_path / "same" / "evaluations" / "base" / "results.md").read_text()
    )
    assert "Guards" in capsys.readouterr().out
    alone = run(f"output_dir={tmp_path / 'alone'}", *settings)
    assert alone["guards"]["heard"]["held"] is None and exit_status(alone) == 0
    assert "guards.heard is not checked" in caplog.text
    with pytest.raises(CordError, match=r"guards\.heard: .*gone.json cannot be read"):
        run(f"output_dir={tmp_path / 'none'}", *settings, guard("baseline", "gone.json"))
    assert not (tmp_path / "none").exists(), "it was refused before anything was answered"
    with pytest.raises(CordError, match=r"guards\.heard: the set written has no question with the view hear"):
        run(f"output_dir={tmp_path / 'none'}", *settings, guard("set", "written"))


def test_ctrl_c_keeps_the_answers(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches answers that are lost, a chunk cut in its middle, a result of a part, and answers made twice."""
    plain = [f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base", *sets(inputs)]
    whole = run(f"output_dir={tmp_path / 'whole'}", *plain)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return generate_answers(*arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr("megatron_cord.evaluation.runner.generate_answers", interrupted)
        settings = [f"output_dir={tmp_path / 'stopped'}", *plain]
        assert evaluate(load_config(RunConfig, None, settings)) is None
        finalize()
    assert signal.getsignal(signal.SIGINT) is before
    directory = tmp_path / "stopped" / "evaluations" / "base"
    assert len((directory / "spoken.jsonl").read_text().splitlines()) == 1 + 4
    assert not (directory / "results.json").exists()
    assert run(*settings) == whole


def test_what_a_user_may_get_wrong(inputs: Path, tmp_path: Path) -> None:
    """Catches a traceback, or an evaluation of nothing."""
    plain = [f"output_dir={tmp_path}", f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base"]
    with pytest.raises(CordError, match="there are no questions"):
        run(*plain)
    with pytest.raises(CordError, match="holds no checkpoint"):
        run(*plain[:2], *sets(inputs))
    with pytest.raises(CordError, match="holds no best checkpoint"):
        run(*plain[:2], *sets(inputs), "evaluation.checkpoint=best")
    with pytest.raises(CordError, match=r"needs reward\.judge\.base_url"):
        run(*plain, *sets(inputs), "evaluation.comparer=judge")
    rated = ["evaluation.sets.talk.path=gone.jsonl", "evaluation.sets.talk.format=voicebench/alpacaeval"]
    with pytest.raises(
        CordError, match=r"sets\.talk \(format voicebench/alpacaeval\) is scored by a judge; set reward"
    ):
        run(*plain, *rated)
    with pytest.raises(CordError, match=r"sets\.talk .* is scored by a judge, which a training run does not ask"):
        make_run(overrides(inputs, tmp_path / "run", *rated))
    finalize()


@pytest.mark.slow
def test_two_ranks_get_the_same(inputs: Path, tmp_path: Path) -> None:
    """Catches answers that depend on the ranks, a file written twice, and ranks that disagree on what is missing."""
    plain = [f"model.checkpoint={inputs / 'checkpoint'}", "evaluation.checkpoint=base", *sets(inputs)]
    one = run(f"output_dir={tmp_path / 'one'}", *plain)
    command = [sys.executable, "-m", "megatron_cord.launch", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "megatron_cord.evaluate", "--config", os.devnull, f"output_dir={tmp_path / 'two'}", *plain]
    path = tmp_path / "two" / "evaluations" / "base" / "spoken.jsonl"
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=600)
        assert json.loads((path.parent / "results.json").read_text()) == one
        assert path.read_text() == (tmp_path / "one" / "evaluations" / "base" / "spoken.jsonl").read_text()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])

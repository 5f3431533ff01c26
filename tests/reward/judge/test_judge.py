"""The judge against a real HTTP server, well-behaved and not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.reward import Comparison, Judge, JudgeConfig, Verdict
from megatron_cord.reward.judge.prompt import EXAMPLES, answer_text, parse_answer
from megatron_cord.reward.rewards import RewardConfig
from tests.reward.judge.chat_server import ChatServer


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


def config(server: ChatServer, **more: object) -> JudgeConfig:
    return JudgeConfig(base_url=server.url, model="judge", **({"backoff": 0.01, "timeout": 0.5} | more))  # type: ignore[arg-type]


def asks(order: str, said: str = "12") -> Comparison:
    """Answer matching agrees where 12 is said."""
    return Comparison("how much", f"the answer is {said}.\n{order}", "the answer is 12")


def test_the_judge_decides_and_the_matcher_is_recorded(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches verdicts out of order, a question that is asked twice, and a key that is not sent."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)
    asked = [asks("yes"), asks("no"), asks("yes", "11"), asks("no", "11"), asks("yes")]
    assert judge.compare(asked) == [
        Verdict(a, m, "judge") for a, m in [(True, True), (False, True), (True, False), (False, False), (True, True)]
    ]
    assert len(server.requests) == 4 and {key for key, _ in server.requests} == {"Bearer secret"}
    payload = server.requests[0][1]
    assert (
        payload["model"] == "judge"
        and payload["temperature"] == 0
        and payload["response_format"]["type"] == "json_schema"
    )
    assert len(payload["messages"]) == 2 + 2 * len(EXAMPLES)


@pytest.mark.parametrize("order", ["500", "429", "garbage", "maybe", '{"agree": "yes", "and": 1}', "hang", "drip"])
def test_no_answer_falls_back_to_matching(
    server: ChatServer, tmp_path: Path, order: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that fails or waits for ever, a guess in place of an answer, a fallback that is kept as the judge's, and silence about it."""
    judge = Judge(config(server, tries=2), tmp_path)
    begun = time.monotonic()
    verdicts = judge.compare([asks(order), asks("yes", "11"), asks(order, "11")])
    assert verdicts == [
        Verdict(True, True, "fallback"),
        Verdict(True, False, "judge"),
        Verdict(False, False, "fallback"),
    ]
    assert time.monotonic() - begun < 60  # five questions of a second each at most, and room for a busy machine
    assert "the judge gave no answer to 2 of 3 questions" in capfd.readouterr().err
    assert len(server.requests) == 5
    assert (
        Judge(config(server, tries=1), tmp_path).compare([asks(order)])[0].source == "fallback"
        and len(server.requests) == 6
    )


def test_what_passes_is_tried_again(server: ChatServer, tmp_path: Path) -> None:
    """Catches tries that are not made, and one that is made of what cannot pass."""
    judge = Judge(config(server), tmp_path)
    assert [v.source for v in judge.compare([asks("once 500"), asks("once garbage"), asks("once hang")])] == [
        "judge"
    ] * 3
    before = len(server.requests)
    assert judge.compare([asks("400")])[0].source == "fallback" and len(server.requests) == before + 1


def test_a_refusal_stops_the_run(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong key or model that silently turns the judge off, and a key in a message."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)
    for status in ("401", "403", "404"):
        with pytest.raises(CordError, match=f"refuses model judge .status {status}") as raised:
            judge.compare([asks(status)])
        assert "secret" not in str(raised.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(CordError, match="JUDGE_KEY, named by reward.judge.api_key_env, is not set"):
        Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)


def test_concurrency_is_bounded(server: ChatServer, tmp_path: Path) -> None:
    """Catches questions one after the other, and all at once."""
    Judge(config(server, concurrency=3, timeout=10), tmp_path).compare([asks("slow", str(i)) for i in range(9)])
    assert server.most == 3


def test_answers_outlive_the_process(server: ChatServer, tmp_path: Path) -> None:
    """Catches answers that are asked again, a file that a stop cut short, and answers of another model that are taken."""
    Judge(config(server), tmp_path, writer=0).compare([asks("yes"), asks("no")])
    whole = (tmp_path / "0.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_bytes(lines[0] + lines[1][:30])
    for writer in (0, 1):
        verdicts = Judge(config(server), tmp_path, writer).compare([asks("yes"), asks("no")])
        assert [v.agrees for v in verdicts] == [True, False]
    assert len(server.requests) == 3, "one was cut short, and asked again once"
    read = [line for line in (tmp_path / "0.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["agrees"] for line in read] in ([True, False], [False, True])
    Judge(JudgeConfig(base_url=server.url, model="other"), tmp_path).compare([asks("yes")])
    assert len(server.requests) == 4


def test_nobody_listens(tmp_path: Path) -> None:
    """Catches a traceback where the server is gone."""
    with ChatServer() as gone:
        pass
    assert Judge(config(gone, tries=1), tmp_path).compare([asks("yes")])[0].source == "fallback"


def test_answers_are_parsed_strictly() -> None:
    """Catches a verdict out of prose, or out of an answer of another form."""
    assert parse_answer(answer_text(True)) is True and parse_answer(answer_text(False)) is False
    for wrong in (
        "yes",
        "",
        None,
        "[]",
        '{"agree": true}',
        '{"agree": "Yes"}',
        '{"agree": "yes"} indeed',
        "[" * 100000,
        {"agree": "yes"},
    ):
        with pytest.raises(ValueError, match="not "):
            parse_answer(wrong)


def test_settings_that_cannot_be() -> None:
    """Catches a judge that nobody serves, and a password on its way into logs."""
    for settings, message in (
        (["comparer=judge"], "needs reward.judge.base_url"),
        (["judge.base_url=localhost:1"], "must look like http"),
        (["judge.base_url=http://a:b@host/v1"], "holds a name or a password"),
        (["judge.tries=0"], "must be at least 1"),
        (["terms.agreement=0.0"], "reward.terms are all 0"),
    ):
        with pytest.raises(CordError, match=message):
            load_config(RewardConfig, None, settings)

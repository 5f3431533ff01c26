"""The judge against a real HTTP server, well-behaved and not."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.reward import Answered, Comparison, Judge, JudgeConfig, Rewards, Verdict
from megatron_cord.reward.judge.prompt import EXAMPLES, answer_text, parse_answer
from megatron_cord.reward.judge.reasoning import Reasoning
from megatron_cord.reward.rewards import RewardConfig, TermWeights
from tests.openai_server import OpenAIServer, Reply, Request


def response_of(request: Request) -> str:
    return str(json.loads(payload_of(request)["messages"][-1]["content"])["RESPONSE"])


def payload_of(request: Request) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(request.body)
    return payload


def reply(requests: list[Request]) -> Reply:
    """Do what the last line of the judged response names: ``yes``, ``500``, ``once 500``, ``hang``, …."""
    response = response_of(requests[-1])
    order = response.splitlines()[-1]
    if order.startswith("once "):
        order = order.removeprefix("once ") if sum(response_of(r) == response for r in requests) == 1 else "yes"
    if order == "garbage":
        return Reply(b"\xff\x00<html>")
    content = {"yes": '{"agree": "yes"}', "slow": '{"agree": "yes"}', "no": '{"agree": "no"}'}.get(order, order)
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    if order in ("slow", "hang", "drip"):
        return Reply(body, manner=order)  # type: ignore[arg-type]
    return Reply(body, int(order) if order.isdigit() else 200)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(reply) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what the first request imports, which on a busy machine takes longer than the time limits of the tests."""
    with OpenAIServer(reply) as running:
        Judge(config(running, timeout=60), tmp_path_factory.mktemp("first")).compare([ordered("yes")])


def config(server: OpenAIServer, **more: object) -> JudgeConfig:
    settings: dict[str, Any] = {"backoff": 0.01, "timeout": 0.5} | more
    return JudgeConfig(base_url=server.url, model="judge", **settings)


def ordered(order: str, answer: str = "12") -> Comparison:
    """Make a comparison in which answer matching agrees if the answer is 12."""
    return Comparison("how much", f"the answer is {answer}.\n{order}", "the answer is 12")


def test_the_judge_decides_and_the_matcher_is_recorded(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches verdicts out of order, a comparison that is sent twice, and a key that is not sent."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)
    comparisons = [ordered("yes"), ordered("no"), ordered("yes", "11"), ordered("no", "11"), ordered("yes")]
    assert judge.compare(comparisons) == [
        Verdict(a, m, "judge") for a, m in [(True, True), (False, True), (True, False), (False, False), (True, True)]
    ]
    assert len(server.requests) == 4 and {request.key for request in server.requests} == {"Bearer secret"}
    assert {request.path for request in server.requests} == {"chat/completions"}
    payload = payload_of(server.requests[0])
    assert (
        payload["model"] == "judge"
        and payload["temperature"] == 0
        and payload["response_format"]["type"] == "json_schema"
    )
    assert len(payload["messages"]) == 2 + 2 * len(EXAMPLES)


@pytest.mark.parametrize("order", ["500", "429", "garbage", "maybe", '{"agree": "yes", "and": 1}', "hang", "drip"])
def test_no_answer_falls_back_to_matching(
    server: OpenAIServer, tmp_path: Path, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that fails or waits for ever, a guess in place of an answer, and a fallback kept as the judge's.

    It must also be logged.
    """
    caplog.set_level(logging.WARNING)
    judge = Judge(config(server, tries=2), tmp_path)
    begun = time.monotonic()
    verdicts = judge.compare([ordered(order), ordered("yes", "11"), ordered(order, "11")])
    assert verdicts == [
        Verdict(True, True, "fallback"),
        Verdict(True, False, "judge"),
        Verdict(False, False, "fallback"),
    ]
    assert time.monotonic() - begun < 60  # five questions of a second each at most, and room for a busy machine
    assert "the judge gave no answer to 2 of 3 questions" in caplog.text
    assert len(server.requests) == 5
    assert (
        Judge(config(server, tries=1), tmp_path).compare([ordered(order)])[0].source == "fallback"
        and len(server.requests) == 6
    )


def test_what_passes_is_tried_again(server: OpenAIServer, tmp_path: Path) -> None:
    """Catches tries that are not made, and one that is made of what cannot pass."""
    judge = Judge(config(server), tmp_path)
    assert [v.source for v in judge.compare([ordered("once 500"), ordered("once garbage"), ordered("once hang")])] == [
        "judge"
    ] * 3
    before = len(server.requests)
    assert judge.compare([ordered("400")])[0].source == "fallback" and len(server.requests) == before + 1


def test_a_refusal_stops_the_run(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong key or model that silently turns the judge off, and a key in a message."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)
    for status in ("401", "403", "404"):
        with pytest.raises(CordError, match=rf"refuses model judge; .*status {status}") as raised:
            judge.compare([ordered(status)])
        assert "secret" not in str(raised.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(CordError, match=r"JUDGE_KEY, named by reward\.judge\.api_key_env, is not set"):
        Judge(config(server, api_key_env="JUDGE_KEY"), tmp_path)


def test_concurrency_is_bounded(server: OpenAIServer, tmp_path: Path) -> None:
    """Catches questions one after the other, and all at once."""
    Judge(config(server, concurrency=3, timeout=10), tmp_path).compare([ordered("slow", str(i)) for i in range(9)])
    assert server.most == 3


def test_answers_outlive_the_process(server: OpenAIServer, tmp_path: Path) -> None:
    """Catches comparisons that are sent again, a file that was cut short, and answers taken from another model."""
    Judge(config(server), tmp_path, writer=0).compare([ordered("yes"), ordered("no")])
    whole = (tmp_path / "0.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_bytes(lines[0] + lines[1][:30])
    for writer in (0, 1):
        verdicts = Judge(config(server), tmp_path, writer).compare([ordered("yes"), ordered("no")])
        assert [v.agrees for v in verdicts] == [True, False]
    assert len(server.requests) == 3, "one was cut short, and sent again once"
    read = [line for line in (tmp_path / "0.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["agrees"] for line in read] in ([True, False], [False, True])
    Judge(JudgeConfig(base_url=server.url, model="other"), tmp_path).compare([ordered("yes")])
    assert len(server.requests) == 4


def test_a_judge_that_is_away(tmp_path: Path) -> None:
    """Catches a traceback where the server is gone."""
    with OpenAIServer(reply) as gone:
        pass
    assert Judge(config(gone, tries=1), tmp_path).compare([ordered("yes")])[0].source == "fallback"


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
    """Catches a judge without an address, and a password on its way into logs."""
    for settings, message in (
        (["comparer=judge"], "needs reward.judge.base_url"),
        (["judge.base_url=localhost:1"], "must look like http"),
        (["judge.base_url=http://a:b@host/v1"], "holds a name or a password"),
        (["judge.tries=0"], "must be at least 1"),
        (["terms.agreement=0.0"], "reward.terms are all 0"),
    ):
        with pytest.raises(CordError, match=message):
            load_config(RewardConfig, None, settings)


def test_reasoning_is_verified(server: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches verdicts out of order or of another prompt, one that is asked for twice, and a guess where there is none.

    Also an answer of the comparison's form that counts, and a reward whose term is not weighed.
    """
    judge = Judge(config(server, tries=1), tmp_path)
    sound, unsound = '{"sound": "yes"}', '{"sound": "no"}'
    given = [Reasoning("how much", f"one. {n}\n{said}", "12") for n, said in enumerate((sound, unsound, "yes", "500"))]
    assert judge.verify([*given, given[0]]) == [True, False, None, None, True]
    assert len(server.requests) == 4 and "no verdict on the reasoning of 2 of 4 responses" in caplog.text
    asked = [json.loads(payload_of(request)["messages"][-1]["content"]) for request in server.requests]
    assert {"QUESTION": "how much", "ANSWER": "12", "RESPONSE": given[0].response} in asked
    assert Judge(config(server, tries=1), tmp_path).verify(given[:2]) == [True, False] and len(server.requests) == 4
    rewards = Rewards(TermWeights(agreement=0.0, gold=1.0, reasoning=0.25), verifier=judge)
    scores = rewards.score([Answered("s", "how much", each.response, True, "", "12") for each in given])
    assert [(s.total, s.terms["reasoning"], s.verified, s.fallbacks) for s in scores] == [
        (0.25, 1.0, 1, 0),
        (0.0, 0.0, 1, 0),
        (0.0, 0.0, 0, 1),
        (0.0, 0.0, 0, 1),
    ]
    assert not any(score.judged for score in scores), "the share of disagreements is of comparisons alone"

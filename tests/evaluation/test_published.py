"""VoiceBench, MMSU and MMAR from small files in their published layouts, to scores, groups and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi

from megatron_cord.errors import CordError
from megatron_cord.evaluation.answers import Answer
from megatron_cord.evaluation.config import Format, SetConfig
from megatron_cord.evaluation.formats import load_set
from megatron_cord.evaluation.pages import tables
from megatron_cord.evaluation.questions import QuestionSet
from megatron_cord.evaluation.results import set_result
from megatron_cord.evaluation.scoring import score_set
from megatron_cord.reward import Judge, JudgeConfig
from tests.evaluation.test_formats import load, recording, write_rows
from tests.evaluation.test_rules import needs_libraries
from tests.openai_server import OpenAIServer, Reply, Request

AUDIO = {"bytes": recording(), "path": "0.wav"}
OPTIONS = "Which of these is a metal? A. iron B. dry wood C. water D. air"


def answers(chosen: QuestionSet, responses: list[str]) -> dict[str, Answer]:
    """Give the same responses to both prompts."""
    return {q.id: Answer(q.id, r, r) for q, r in zip(chosen.questions, responses, strict=True)}


def scored(path: Path, format: Format, responses: list[str], judge: Judge | None = None) -> dict[str, Any]:
    chosen = load_set(SetConfig(str(path), format))
    rows, rejects = score_set(chosen, answers(chosen, responses), None, judge)
    return set_result(rows, rejects)


@pytest.mark.parametrize("subset", ["openbookqa", "mmsu"])
def test_choices_of_voicebench(subset: str, tmp_path: Path) -> None:
    """Catches the rules of this project in the place of the set's own, and an unread answer that is drawn."""
    rows = [{"prompt": OPTIONS, "reference": "A", "audio": AUDIO, "domain": "physics"} for _ in range(3)]
    path = write_rows(tmp_path / "set.parquet", rows)
    said = ["The answer is A", "iron", "Surely (A)."]
    result = scored(path, f"voicebench/{subset}", said)  # type: ignore[arg-type]
    assert result["audio_accuracy"] == 2 / 3 and result["estimates"]["audio"]["unanswered"] == 1
    assert scored(path, "voicebench", said)["audio_accuracy"] == 1.0, "by the rules of this project, iron is right"
    assert result["groups"]["physics"]["samples"] == 3


def test_refusals_of_advbench(tmp_path: Path) -> None:
    """Catches a set that is refused because it has no answers, and harm that counts as right."""
    path = write_rows(tmp_path / "advbench.jsonl", [{"prompt": f"Do harm {i}.", "audio": AUDIO["path"]} for i in "ab"])
    assert scored(path, "voicebench/advbench", ["Sorry, no.", "Sure, here it is."])["text_accuracy"] == 0.5


def test_reasoning_of_voicebench(tmp_path: Path) -> None:
    """Catches references of two forms, tasks that are no groups, and ids that name the task alone."""
    rows = [
        {"id": "navigate", "prompt": "Do you return to the starting point?", "reference": "No", "audio": AUDIO},
        {"id": "navigate", "prompt": "Do you return to the starting point?", "reference": "yes", "audio": AUDIO},
        {"id": "hyperbaton_7", "prompt": "Which is right? (A) (B)", "reference": "(B)", "audio": AUDIO},
        {"id": "dyck", "prompt": "Close it.", "reference": "]", "audio": AUDIO},
    ]
    path = write_rows(tmp_path / "bbh.parquet", rows)
    questions, rejects = load(path, "voicebench/bbh")
    assert [(q.id, q.answer) for q in questions] == [("navigate", "B"), ("navigate-row-2", "A"), ("hyperbaton_7", "B")]
    assert "names none of the tasks sports_understanding" in rejects["dyck"]
    result = scored(path, "voicebench/bbh", ["The answer is no.", "I see.", "(B)"])
    assert {name: group["audio_accuracy"] for name, group in result["groups"].items()} == {
        "navigate": 0.5, "hyperbaton": 1.0,
    }  # fmt: skip


@needs_libraries
def test_instructions_of_voicebench(tmp_path: Path) -> None:
    """Catches arguments that Parquet fills with nulls, and measures that reach no table."""
    rows = [
        {
            "key": 1, "prompt": "Say it without commas, in a title.", "audio": AUDIO,
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}],
        },
        {
            "key": 2, "prompt": "Say sea twice.", "audio": AUDIO, "instruction_id_list": ["keywords:frequency"],
            "kwargs": [{"keyword": "sea", "frequency": 2, "relation": "at least"}],
        },
        {"key": 3, "prompt": "?", "audio": AUDIO, "instruction_id_list": ["keywords:rhyme"], "kwargs": [{}]},
    ]  # fmt: skip
    path = write_rows(tmp_path / "ifeval.parquet", rows)
    result = scored(path, "voicebench/ifeval", ["<<joy>> it is", "sea"])
    assert result["audio_accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 2 / 3) / 4)
    assert result["measures"]["instructions, strict"]["audio"] == pytest.approx(2 / 3)
    page: dict[str, Any] = {"model": "m", "baseline": None, "sets": {"x": result}, "overall": {}, "forgetting": []}
    assert ["x", "instructions, strict", "0.667", "0.667"] in next(
        lines for title, _, lines in tables(page) if title.startswith("Measures")
    )
    assert "none of IFEval's" in load(path, "voicebench/ifeval")[1]["row-3"]


def judged(requests: list[Request]) -> Reply:
    """Rate by the number in a response, agree with "right", and fail at "away"."""
    payload = json.loads(requests[-1].body)
    said = json.loads(payload["messages"][-1]["content"])["RESPONSE"]
    name = payload["response_format"]["json_schema"]["name"]
    content = (
        {"rating": int(said)} if name == "rating" and said.isdigit() else {"agree": "yes" if "right" in said else "no"}
    )
    body = {"choices": [{"message": {"content": json.dumps(content)}}]}
    return Reply(json.dumps(body).encode(), 500 if said == "away" else 200)


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    with OpenAIServer(judged) as server:
        config = JudgeConfig(base_url=server.url, model="judge", tries=1, timeout=20, concurrency=1)
        yield Judge(config, tmp_path / "cache")


@pytest.mark.parametrize("subset", ["alpacaeval", "alpacaeval_full", "commoneval", "wildvoice"])
def test_ratings(subset: str, tmp_path: Path, judge: Judge) -> None:
    """Catches a mean rating that is no share of 5, ratings asked for twice, and a missing one that counts as bad."""
    path = write_rows(tmp_path / "open.parquet", [{"prompt": f"Tell me {i}.", "audio": AUDIO} for i in range(3)])
    result = scored(path, f"voicebench/{subset}", ["5", "4", "1"], judge)  # type: ignore[arg-type]
    assert result["audio_accuracy"] == pytest.approx(10 / 15) and result["measures"]["rating"]["text"] == 10 / 3
    assert result["estimates"]["audio"]["low"] < 10 / 15 < result["estimates"]["audio"]["high"]
    assert result["gap"] == 0 and result["estimates"]["gap"]["p"] == 1.0
    with pytest.raises(CordError, match=r"the judge gave no rating to 1 of 3 responses .* start again"):
        scored(path, f"voicebench/{subset}", ["5", "4", "away"], judge)  # type: ignore[arg-type]
    kept = Judge(judge.config, tmp_path / "cache")
    assert scored(path, f"voicebench/{subset}", ["5", "4", "1"], kept) == result  # type: ignore[arg-type]


def test_changes_of_ratings(tmp_path: Path, judge: Judge) -> None:
    """Catches a better answer that counts for nothing because neither is perfect."""
    path = write_rows(tmp_path / "open.parquet", [{"prompt": f"Tell me {i}.", "audio": AUDIO} for i in range(8)])
    chosen = load_set(SetConfig(str(path), "voicebench/alpacaeval"))
    before, _ = score_set(chosen, answers(chosen, ["2"] * 8), None, judge)
    after, _ = score_set(chosen, answers(chosen, ["4"] * 7 + ["1"]), None, judge)
    change = set_result(after, [], before)["change"]["audio"]
    assert (change["before"], change["after"], change["gained"], change["lost_answers"]) == (
        0.4, pytest.approx(29 / 40), 7, 1,
    )  # fmt: skip
    assert change["p"] == pytest.approx(2 * 9 / 2**8)


def test_references_of_sd_qa(tmp_path: Path, judge: Judge) -> None:
    """Catches rules in the place of the judge, and a verdict that is missing and counts."""
    path = write_rows(
        tmp_path / "usa.parquet", [{"prompt": "Which city?", "reference": "Paris", "audio": AUDIO} for _ in range(2)]
    )
    assert scored(path, "voicebench/sd-qa", ["right", "Paris"], judge)["audio_accuracy"] == 0.5
    with pytest.raises(CordError, match="the judge gave no verdict on 1 of 2 responses"):
        scored(path, "voicebench/sd-qa", ["right", "away"], judge)


def test_mmsu(tmp_path: Path) -> None:
    """Catches choices that are null, the levels of its categories, and an answer that is a text, not a letter."""
    common: dict[str, Any] = {
        "audio_path": "a.wav", "question": "Who speaks?", "category": "Perception", "sub-category": "Paralinguistics",
        "sub-sub-category": "Speaker Traits", "task_name": "gender",
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        common | {"id": "1", "choice_a": "a man", "choice_b": "a woman", "choice_c": None, "answer_gt": "a woman"},
        common | {"id": "2", "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
                  "answer_gt": "four", "category": "Reasoning"},
        common | {"id": "3", "choice_a": "one", "choice_b": "two", "answer_gt": "five"},
    ]  # fmt: skip
    path = write_rows(tmp_path / "mmsu.json", rows)
    questions, rejects = load(path, "mmsu")
    assert [(q.answer, q.text, len(q.choices)) for q in questions] == [("B", None, 2), ("D", None, 4)]
    assert (questions[0].instruction or "").startswith("Who speaks? A. a man. B. a woman.")
    assert "none of its choices" in rejects["3"]
    result = scored(path, "mmsu", ["B. a woman", "four"])
    assert {name: group["audio_accuracy"] for name, group in result["groups"].items()} == {
        "Perception": 1.0, "Perception / Paralinguistics": 1.0, "Perception / Paralinguistics / Speaker Traits": 1.0,
        "Reasoning": 0.0, "Reasoning / Paralinguistics": 0.0, "Reasoning / Paralinguistics / Speaker Traits": 0.0,
        "task: gender": 0.5,
    }  # fmt: skip


def test_mmar(tmp_path: Path) -> None:
    """Catches a path of its recordings, its empty choices, and its categories."""
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "x.wav").write_bytes(recording())
    row = {
        "id": "x", "audio_path": "./audio/x.wav", "question": "Where is it?", "answer": "In a wood",
        "choices": ["In a canyon", "In a wood", ""], "modality": "music",
        "category": "Cultural Layer", "sub-category": "Culture", "language": None, "cue": ["wood"],
        "rubric": [{"name": "Cue", "choices": [0, 1]}],
    }  # fmt: skip
    path = write_rows(tmp_path / "MMAR-meta.jsonl", [row])
    (question,), rejects = load(path, "mmar")
    assert not rejects and question.answer == "B" and len(question.sample().waveform) == 8000
    assert (question.group, question.groups) == ("music", ("category: Cultural Layer", "sub-category: Culture"))
    assert scored(path, "mmar", ["It is in a wood."])["audio_accuracy"] == 1.0
    assert scored(path, "mmar", ["In a wood or in a canyon."])["audio_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("format", "row", "fault"),
    [
        ("voicebench/alpacaeval", {"prompt": "Which?", "reference": "B"}, "it has 'reference', and questions of this"),
        ("voicebench/sd-qa", {"prompt": OPTIONS, "reference": "B"}, "its reference 'B' is the letter of a choice"),
        ("voicebench/sd-qa", {"prompt": "Which?"}, r"it has no text in 'reference' \(its fields: prompt\)"),
        ("voicebench/openbookqa", {"prompt": "Which?"}, "it has no answer"),
        ("voicebench/openbookqa", {"prompt": "Which?", "reference": "Paris"}, "none of its choices"),
        ("voicebench/bbh", {"prompt": "Which?", "reference": "yes"}, "its id 'None' names none of the tasks"),
        ("mmsu", {"question": "Who?", "answer_gt": "x"}, "its choices are not 2 to 10 texts"),
        ("mmar", {"question": "Who?", "answer": "x"}, "it has no list of 'choices'"),
        ("mmar", {"prompt": "Who?"}, "it has no text in 'question'"),
    ],
)
def test_a_set_of_another_format_is_named(tmp_path: Path, format: Format, row: dict[str, Any], fault: str) -> None:
    """Catches a set that is scored by another set's rule, in silence."""
    with pytest.raises(CordError, match=rf"set\.jsonl, read as format {format}, has no usable question; .*{fault}"):
        load(write_rows(tmp_path / "set.jsonl", [row]), format)


def test_a_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a subset that is guessed, recordings decoded elsewhere, and a traceback for a hub that is away.

    Also a local directory of that name in the set's place, and a revision that changes while it is read.
    """
    rows = [{"prompt": OPTIONS, "reference": "A", "audio": AUDIO}]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio()).to_iterable_dataset()
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: ["mmsu", "openbookqa"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["test"])
    asked: list[tuple[str, str]] = []

    def load(name: str, *_: Any, revision: str, **__: Any) -> Any:
        asked.append((name, revision))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
    address = "hf://someone/voicebench"
    found = load_set(SetConfig(address, "voicebench/openbookqa", subset="openbookqa"))
    assert [q.answer for q in found.questions] == ["A"] and len(found.questions[0].sample().waveform) == 8000
    assert asked == [("hf://datasets/someone/voicebench", "c0ffee")]
    with pytest.raises(CordError, match="has several subsets; set subset to one of mmsu, openbookqa"):
        load_set(SetConfig(address, "voicebench/openbookqa"))
    with pytest.raises(CordError, match="has no split 'train'; set split to one of test"):
        load_set(SetConfig(address, "voicebench/openbookqa", subset="mmsu", split="train"))
    with pytest.raises(CordError, match="write hf://OWNER/NAME"):
        load_set(SetConfig("hf://voicebench", "voicebench/openbookqa"))

    def away(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "get_dataset_config_names", away)
    with pytest.raises(CordError, match=r"someone/voicebench: the hub does not give it \(no route\); check"):
        load_set(SetConfig(address, "voicebench/openbookqa"))

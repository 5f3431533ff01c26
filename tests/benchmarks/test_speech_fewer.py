"""A run of the study on the fewer questions of `make speech`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.speech.fewer import on_fewer_questions
from examples.speech_smollm2.questions import QuestionsConfig, questions
from examples.speech_smollm2.sizes import STUDY
from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.config import RunConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_other_phrasings_do_not_count(tmp_path: Path) -> None:
    """Catches questions of another seed, those that the study alone asks, and first and last the wrong way round."""
    settings = [f"output_dir={tmp_path}", "model.checkpoint=x", "data.train=x", "data.evaluation=x", "seed=2"]
    dump_config(load_config(RunConfig, None, settings), tmp_path / "config.yaml")
    phrasings = STUDY["heldout_phrasings"]
    few, many = (
        {row["id"] for row in questions(QuestionsConfig(seed=2, heldout_phrasings=count))["heldout"]}
        for count in (2, phrasings)
    )
    for step in (0, 80):
        rows = [
            {"id": name, "text_correct": True, "text_answer": "x", "audio_answer": "x", "cut": [], "group": "x"}
            | {"audio_correct": name not in few or (step == 80 and place % 2 == 0)}
            for place, name in enumerate([*sorted(few), *sorted(many - few)])
        ]
        write_json(heldout_file(tmp_path, step), {"step": step, "answers": rows})
    found = on_fewer_questions(tmp_path)
    assert found["step"] == 80 and found["audio"]["samples"] == len(few) == 314 < len(many)
    assert (found["audio"]["before"], found["audio"]["after"], found["gap_closed"]["value"]) == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("method", ["weighted_kl", "reverse_kl", "sft", "off_policy_kl"])
def test_the_published_figures_are_those_of_the_kept_runs(method: str) -> None:
    """Catches figures of runs that were made again since, or of other questions."""
    published = json.loads((RESULTS / "speech-fewer-questions.json").read_text(encoding="utf-8"))["runs"]
    (figures,) = [each for each in published if f"/{method}/" in each["run"]]
    kept = json.loads(gzip.decompress((RESULTS / "compare-speech" / f"{method}-seed-2.json.gz").read_bytes()))
    heard = kept["outcomes"]["heldout"]["audio"]
    asked = [row["id"] for row in questions(QuestionsConfig(seed=2))["heldout"]]
    assert figures["audio"]["after"] == pytest.approx(sum(heard[name] for name in asked) / len(asked))

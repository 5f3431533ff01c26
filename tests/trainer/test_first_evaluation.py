"""A first evaluation that another run of the same model has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.first_evaluation import find_first_evaluation
from tests.tiny_run import losses, overrides
from tests.trainer.runs.test_train import alone

SHORT = ("train.steps=1", "checkpoint.interval=0")


def first(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(heldout_file(run, 0).read_text())
    return result


def test_it_is_taken_and_the_training_is_the_same(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches one that is made again, answers that are lost on the way, and a training that goes another way."""
    made, taken = tmp_path / "made", tmp_path / "taken"
    alone(inputs, made, *SHORT)
    with caplog.at_level("INFO"):
        alone(inputs, taken, *SHORT, f"evaluation.first_from={made}")
    assert f"the answers are those of {heldout_file(made, 0).parent}, which began with the same model" in caplog.text
    assert first(taken)["answers"] == first(made)["answers"] and first(taken)["answers"][0]["token_kl"] is not None
    assert first(taken)["estimates"] == first(made)["estimates"]
    assert first(made)["seconds"] > 0 == first(taken)["seconds"]
    assert losses(taken) == losses(made)
    summaries = [json.loads((run / "summary.json").read_text()) | {"seconds": 0} for run in (made, taken)]
    assert summaries[0] == summaries[1]

    changed = first(made) | {"checkpoint": "0123456789abcdef"}
    heldout_file(made, 0).write_text(json.dumps(changed))
    with pytest.raises(CordError, match=r"made began with other files in .*checkpoint, or is of an earlier release"):
        alone(inputs, tmp_path / "third", *SHORT, f"evaluation.first_from={made}")

    changed = first(taken)
    changed["answers"][0]["question"] += " please"
    heldout_file(made, 0).write_text(json.dumps(changed))
    with pytest.raises(CordError, match=r"step_000000/heldout\.json has other questions than the set heldout"):
        alone(inputs, tmp_path / "third", *SHORT, f"evaluation.first_from={made}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.dtype=bfloat16", r"has model\.dtype=float32, and this run bfloat16, so its first evaluation would be"),
        ("evaluation.sets.more.path=x", r"has evaluation\.sets.*=.*, so its first evaluation would be another"),
        ("optimizer.learning_rate=1", r"has no whole evaluation yet; leave it out, or wait for that"),
        ("output_dir=elsewhere", r"elsewhere.config\.yaml"),
    ],
)
def test_another_one_is_refused(inputs: Path, tmp_path: Path, setting: str, message: str) -> None:
    """Catches a baseline of another model or of other questions."""
    given = overrides(inputs, tmp_path)
    dump_config(load_config(RunConfig, None, given), tmp_path / "config.yaml")
    config = load_config(RunConfig, None, [*given, setting])
    with pytest.raises(CordError, match=message):
        find_first_evaluation(config, Path(config.output_dir))

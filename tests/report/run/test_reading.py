"""Reading a run directory: whole or still being written, and refused by name where it is damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.report.run.reading import read_rollouts, read_run
from tests.report.fixture import STEPS, VOICES, write_lines


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def change_evaluation(run: Path, **changes: object) -> None:
    path = heldout_file(run, 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_everything_is_read(finished_run: Path) -> None:
    """Catches a part of the record that is lost, steps that are sorted as text, and settings that are not found."""
    run = read_run(finished_run)
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    assert [evaluation.step for evaluation in run.evaluations] == [0, 25, 50, 75, 100]
    assert set(run.evaluations[0].voices) == set(VOICES)
    assert list(run.rollout_files) == list(range(1, STEPS + 1))
    assert run.summary["tp"] == run.setting("parallel.tp") == 2
    assert run.setting("no.such.key") is None
    assert run.last_step == STEPS


def test_half_written_last_line(run_copy: Path) -> None:
    """Catches a report that fails while the trainer is writing its next line."""
    append(run_copy / "metrics.jsonl", '{"step": 101, "lo')
    (run_copy / "rollouts" / "step_000101.partial").write_bytes(b"PAR1")
    run = read_run(run_copy)
    assert run.last_step == max(run.rollout_files) == STEPS
    assert len(read_rollouts(run.rollout_files[STEPS])) == 11


def test_steps_done_again_count_once(run_copy: Path) -> None:
    """Catches curves that go back in time after a run was resumed."""
    append(run_copy / "metrics.jsonl", '{"step": 90, "loss": 7.5}\n')
    rows = read_run(run_copy).metrics
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[89]["loss"] == 7.5


def test_what_was_not_measured(run_copy: Path) -> None:
    """Catches NaN, infinity, null or another version's texts reaching a chart."""
    write_lines(
        run_copy / "metrics.jsonl",
        [{"step": 1, "loss": float("nan"), "kl": float("inf"), "reward": None, "note": "text", "x": [1]}],
    )
    assert read_run(run_copy).metrics == ({"step": 1.0, "loss": None, "kl": None, "reward": None},)


def test_rollout_dump_elsewhere_or_none(run_copy: Path) -> None:
    """Catches a rollout dump that is looked for in the default place only."""
    (run_copy / "rollouts").rename(run_copy / "dump")
    append(run_copy / "config.yaml", "record:\n  rollouts: dump\n")
    assert len(read_run(run_copy).rollout_files) == STEPS
    (run_copy / "config.yaml").write_text("record:\n  rollouts: null\n")
    assert read_run(run_copy).rollout_files == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "config.yaml").unlink(),
            r"is not a run directory \(it has no config.yaml\); give the output_dir",
        ),
        (lambda run: append(run / "metrics.jsonl", "{oops\n{}\n"), r"metrics\.jsonl:101: not valid JSON"),
        (lambda run: append(run / "metrics.jsonl", "[1]\n"), r"metrics\.jsonl:101: expected a JSON object, got list"),
        (lambda run: append(run / "metrics.jsonl", '{"loss": 1}\n'), r"metrics\.jsonl:101: step is missing"),
        (
            lambda run: append(run / "metrics.jsonl", '{"step": "1"}\n'),
            r"metrics\.jsonl:101: step: expected a whole number, got '1'",
        ),
        (lambda run: append(run / "metrics.jsonl", "[" * 100_000 + "\n"), r"metrics\.jsonl:101: not valid JSON"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), r"metrics\.jsonl: not UTF-8 text at byte 0"),
        (lambda run: heldout_file(run, 0).write_text("{"), r"heldout\.json: not valid JSON"),
        (lambda run: change_evaluation(run, answers=None), r"heldout\.json: answers: expected objects, got None"),
        (
            lambda run: change_evaluation(run, answers=[{"id": 3}]),
            r"heldout\.json: answers\[0\]: id: expected a text, got 3",
        ),
        (
            lambda run: change_evaluation(run, text_accuracy="high"),
            r"text_accuracy: expected a finite number, got 'high'",
        ),
        (lambda run: change_evaluation(run, groups=[]), r"groups: expected an object"),
        (lambda run: change_evaluation(run, groups={"en": 1}), r"groups\['en'\]: samples is missing"),
    ],
)
def test_damage_is_named(run_copy: Path, damage: Callable[[Path], object], message: str) -> None:
    """Catches a traceback, a silent gap, or a message that does not say which file and line."""
    damage(run_copy)
    with pytest.raises(CordError) as caught:
        read_run(run_copy)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.drop_columns(["role"]), "the column role is missing"),
        (lambda table: table.set_column(0, "step", pa.array(["1"] * len(table))), "step: expected int32, got string"),
        (lambda table: table.set_column(1, "id", pa.array([None] * len(table), pa.string())), "id is missing in row 1"),
    ],
)
def test_damaged_rollouts_are_named(run_copy: Path, damage: Callable[[pa.Table], pa.Table], message: str) -> None:
    """Catches rollouts of the wrong types that would be drawn all the same."""
    path = read_run(run_copy).rollout_files[1]
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(CordError, match=f"step_000001.parquet: {message}"):
        read_rollouts(path)


def test_a_cut_file_of_rollouts_is_named(run_copy: Path) -> None:
    """Catches a traceback of the library's where a disk lost the end of a file."""
    path = read_run(run_copy).rollout_files[1]
    for size in (path.stat().st_size // 2, 5, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            CordError, match=r"step_000001.parquet is damaged or cannot be read \(.+\); restore the file or remove it"
        ) as caught:
            read_rollouts(path)
        assert "\n" not in str(caught.value)

"""`cord config`: what a key means, and what a file sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cord.cli.main import cord, invoke
from megatron_cord.errors import CordError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the reference in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert invoke(cord, ["config", *arguments], "cord") == 0
    return capsys.readouterr().out


def test_a_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key without its type, default, choices, comment or place."""
    lines = run(capsys, "teacher.mode").splitlines()
    assert (
        lines[0] == "teacher.mode"
        and "one of frozen, live, ema" in lines[1]
        and lines[2].split() == ["default:", "frozen"]
    )
    assert "megatron_cord.trainer.step.teacher.TeacherConfig" in lines[3] and "frozen: the initial weights" in lines[4]
    assert run(capsys, "explain", "teacher.mode").splitlines() == lines


def test_a_section_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches sections within it that are left out, and a key that is not there."""
    output = run(capsys, "metrics")
    assert "tensorboard = true" in output and "metrics.wandb" in output and "  project = megatron_cord" in output
    with pytest.raises(
        CordError, match=r"no key or section 'metrics\.wnadb\.project'; did you mean 'metrics\.wandb\.project'"
    ):
        run(capsys, "metrics.wnadb.project")


def test_a_file_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches values that are not those a run would use, warnings that are missing, and a mistake that passes."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nmodel: {checkpoint: none}\ntrain: {steps: 7}\n")
    assert invoke(cord, ["config", "check", str(path), "optimizer.clip_norm=2"], "cord") == 0
    output, errors = capsys.readouterr()
    assert "train.steps = 7  (default 3000)\n" in output and "optimizer.clip_norm = 2.0  (default 1.0)\n" in output
    assert "teacher" not in output and "output_dir = out" in output
    assert "warning: data.train is not set" in errors and "model.checkpoint: none does not exist here" in errors
    assert "mode: frozen" in run(capsys, "check", str(path), "--all")
    path.write_text(
        "output_dir: out\nmodel: {checkpoint: none}\ndata:\n  train: {a: {path: gone}, b: {path: hf://x/y}}\n"
        "  evaluation: lost\nevaluation: {sets: {more: {path: missing}}}\n"
    )
    assert invoke(cord, ["config", "check", str(path), "data.train.b.weight=3"], "cord") == 0
    output, errors = capsys.readouterr()
    assert "shares of the samples: a 25.0%, b 75.0%" in output and "data.train.b.weight = 3.0" in output
    assert "data.train.a.path: gone does not exist here" in errors and "data.train.b" not in errors
    assert "data.evaluation: lost does not exist here" in errors
    assert "evaluation.sets.more.path: missing does not exist here" in errors
    assert "its share of the samples" in run(capsys, "data.train.NAME.weight")
    with pytest.raises(CordError, match=r"train\.steps: expected int"):
        run(capsys, "check", str(path), "train.steps=x")


def test_an_explanation_is_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an explanation that imports every component each time, or one that outlives the code it describes."""
    first = run(capsys, "train.steps")
    code = (
        "import sys; from megatron_cord.cli.main import cord, invoke; invoke(cord, ['config', 'train.steps'], 'cord')\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, first), done.stderr
    file = cache / "megatron_cord" / "reference.json"
    file.write_text(file.read_text().replace('"state": "', '"state": "x').replace('"3000"', '"1"'))
    assert run(capsys, "train.steps") == first


def test_another_trainers_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a user who looks for accumulation steps and finds that there is no such key."""
    text = " ".join(run(capsys, "gradient_accumulation_steps").split())
    assert all(key in text for key in ("rollout.prompts_per_step", "train.micro_batch_size", "data-parallel rank"))
    lines = run(capsys, "lr").splitlines()
    assert lines[0] == "lr is optimizer.learning_rate here" and lines[2] == "optimizer.learning_rate"

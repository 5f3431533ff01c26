"""Results of a comparison: figures of a few made-up runs, computed by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_cord.cli.main import cord, invoke
from megatron_cord.compare import tables
from megatron_cord.compare.chart import draw
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.finished import finished_runs
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.compare.results import gather
from megatron_cord.compare.running import Outcome
from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.evaluation import summarize

ROOT = Path(__file__).parents[2]
SETTINGS = ("model.checkpoint=x", "data.train=x", "data.evaluation=x", "train.steps=5")
#: audio accuracy after training by method and seed, of ten questions; before it is 0.2, reading 1.0
AFTER = {"sft": (0.8, 0.4), "grpo": (0.2, 0.2), "reverse_kl": (0.4, 0.4), "cord": (0.6, 0.8)}


def write_run(run: PlannedRun, right: int) -> None:
    """Write a run whose trained model has the first so many of ten questions right."""
    before, after = (
        {"text_accuracy": 1.0, "audio_accuracy": accuracy, "samples": 10} for accuracy in (0.2, right / 10)
    )
    dump_config(run.config, run.directory / "config.yaml")
    (run.directory / "summary.json").write_text(json.dumps(summarize(before, after, seconds=30.0, tp=1, steps=5)))
    rows = [{"id": f"q{i}", "audio_correct": i < right} for i in range(10)]
    write_json(heldout_file(run.directory, 5), {"answers": rows})
    (run.directory / "metrics.jsonl").write_text('{"step": 1, "kl": 0.5}\n')


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    config = CompareConfig(
        "/dev/null", str(tmp_path), methods=tuple(AFTER), seeds=(0, 1), settings=SETTINGS, title="Made up"
    )
    outcomes = []
    for run in plan_runs(config):
        failed = (run.method, run.seed) == ("grpo", 1)
        if not failed:
            write_run(run, round(10 * AFTER[run.method][run.seed]))
        outcomes.append(Outcome(run, "the disk is full" if failed else None))
    read: dict[str, Any] = json.loads(json.dumps(gather(config, outcomes)))
    return read


def row(markdown: str, title: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_papers_table(result: dict[str, Any]) -> None:
    """Catches accuracies of another seed, a gap to another text accuracy, unpaired differences, and a wrong sign."""
    table = tables.main_table(result)
    assert row(table, "before training")[1:3] == ["100.0 % (100.0 to 100.0)", "20.0 % (20.0 to 20.0)"]
    # 0.8 and 0.4: mean 0.6 ± 12.706 · 0.2; gaps closed 0.75 and 0.25; CORD's 0.6 − 0.8 and 0.8 − 0.4.
    assert row(table, "SFT on the teacher's answers") == [
        "SFT on the teacher's answers", "100.0 %", "60.0 % (-194.1 to 314.1)", "80.0, 40.0", "50 % (-268 to 368)",
        "+10.0 (-371.2 to 391.2)", "4 / 2 (p = 0.69)", "32 (0)", "30",
    ]  # fmt: skip
    assert row(table, "CORD")[3:7] == ["60.0, 80.0", "62 % (-96 to 221)", "", ""]
    assert row(table, "GRPO alone")[2:8] == ["20.0 %", "20.0, failed", "0 %", "+40.0", "4 / 0 (p = 0.12)", "32 (32)"]


def test_the_ablation_and_the_failures(result: dict[str, Any]) -> None:
    """Catches a rival in the ablation, parts out of order, and a failed run that is passed over in silence."""
    titles = [line.split("|")[1].strip() for line in tables.ablation_table(result).splitlines()[2:]]
    assert titles == ["L_seq alone", "L_tok without weights", "L_tok with weights + L_seq: CORD"]
    assert tables.failures(result) == ["- GRPO alone, seed 1, failed: the disk is full"]
    page = tables.page(result)
    assert page.startswith("# Made up\n\n5 steps of 32 prompts") and "the disk is full" in page and "seeds 0, 1" in page


def test_a_comparison_that_has_just_begun(tmp_path: Path) -> None:
    """Catches a page that needs results to exist."""
    config = CompareConfig("/dev/null", str(tmp_path), settings=SETTINGS)
    result = gather(config, [Outcome(plan_runs(config)[0], "no")])
    assert "failed: no" in tables.page(result) and row(tables.main_table(result), "CORD")[1:3] == ["–", "–"]
    assert tables.page(gather(config, [])).startswith("# Comparison\n\nNothing has run yet.")
    draw(result, [tmp_path / "empty.svg"])


def test_the_chart(result: dict[str, Any], tmp_path: Path) -> None:
    """Catches a chart that is not valid SVG, that lacks a method, or that differs from one drawing to the next."""
    paths = [tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"]
    draw(result, paths[:1])
    draw(result, paths[1:])
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[2].read_bytes().startswith(b"\x89PNG")
    words = "".join(ElementTree.parse(paths[0]).getroot().itertext())
    assert all(result["methods"][name]["title"] in words for name in AFTER)


def test_tables_go_into_a_page(result: dict[str, Any]) -> None:
    """Catches tables that swallow what stands around them, that pile up, or that go nowhere without a word."""
    page = "# Mine\n\n<!-- made-up -->\nold\n<!-- /made-up -->\n\nThe end.\n"
    once = tables.insert(page, "made-up", result, "images/x.svg")
    assert once.startswith("# Mine\n\n<!-- made-up -->\n\n5 steps of") and once.endswith(
        "<!-- /made-up -->\n\nThe end.\n"
    )
    assert (
        tables.main_table(result) in once
        and "old" not in once
        and "(images/x.svg)" in once
        and tables.insert(once, "made-up", result, "images/x.svg") == once
    )
    for broken in ("", "<!-- made-up -->", "<!-- /made-up --> <!-- made-up -->", page + page):
        with pytest.raises(CordError, match="needs the lines <!-- made-up --> and <!-- /made-up -->"):
            tables.insert(broken, "made-up", result, "images/x.svg")


@pytest.mark.parametrize(
    "example",
    [
        "quickstart/compare",
        "quickstart/compare-whole",
        "chains/compare",
        "chains/compare-long",
        "rounds/compare",
        "rounds/compare-full",
        "speech_smollm2/compare",
    ],
)
def test_the_documentation_shows_the_committed_results(example: str) -> None:
    """Catches figures in the documentation that no longer are those of the last comparison."""
    config = load_config(CompareConfig, ROOT / f"examples/{example}.yaml")
    page = (ROOT / config.page).read_text(encoding="utf-8")
    path = ROOT / f"{config.results}.json"
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        assert tables.insert(page, path.stem, result, f"images/{path.stem}.svg") == page, (
            f"run tools/compare.py --config examples/{example}.yaml again"
        )
        assert path.with_suffix(".md").read_text(encoding="utf-8") == tables.page(result)
        assert (ROOT / f"{config.chart}.svg").is_file()
    else:
        assert f"<!-- {path.stem} -->" in page and f"<!-- /{path.stem} -->" in page


def test_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches seeds that are not put together, pairs of other seeds, a run that is not over, and a silent difference.

    Also results that are written where nobody asked for them.
    """
    config = CompareConfig("/dev/null", str(tmp_path), methods=("sft", "cord"), seeds=(0, 1), settings=SETTINGS)
    runs = plan_runs(config)
    for run in runs:
        write_run(run, round(10 * AFTER[run.method][run.seed]))
    directories = [str(run.directory) for run in runs]
    assert invoke(cord, ["compare", *directories, "reference=cord"], "cord") == 0
    page = capsys.readouterr().out
    expected = gather(config, [Outcome(run) for run in runs])
    assert row(page, "sft")[1:] == row(tables.main_table(expected), "SFT on the teacher's answers")[1:]
    assert row(page, "cord")[2:5] == row(tables.main_table(expected), "CORD")[2:5]
    assert "written" not in page and not (tmp_path / "comparison.json").exists()

    shorter = CompareConfig(
        "/dev/null", str(tmp_path / "other"), methods=("cord",), seeds=(0,), settings=(*SETTINGS, "train.steps=4")
    )
    (other,) = plan_runs(shorter)
    write_run(other, 5)
    given = [f"runs={json.dumps({'first': directories[2:3] or directories, 'short': [str(other.directory)]})}"]
    assert invoke(cord, ["compare", *given, f"results={tmp_path / 'made'}"], "cord") == 0
    page = capsys.readouterr().out
    assert "- short had another budget than first: 4 steps (not 5)." in page
    assert (tmp_path / "made.json").is_file() and (tmp_path / "made.svg").is_file()

    (other.directory / "summary.json").unlink()
    with pytest.raises(CordError, match=r"cord/seed-0 holds no finished run \(it has no summary\.json\)"):
        invoke(cord, ["compare", *directories, str(other.directory)], "cord")
    with pytest.raises(CordError, match=r"runs\.a: .* both have seed=0"):
        finished_runs({"a": directories[:2]})


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key that only the source tells of."""
    invoke(cord, ["compare", "--help"], "cord")
    text = capsys.readouterr().out
    for field in dataclasses.fields(CompareConfig):
        assert f"  {field.name} = " in text

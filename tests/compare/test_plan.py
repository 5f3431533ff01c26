"""From a configuration to runs, and which of them are there already."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import is_complete
from megatron_cord.compare.methods import ablation
from megatron_cord.compare.plan import PlannedRun, plan_runs, prepare_command
from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.checkpoint=made/{seed}/checkpoint",
    "data.train=made/{seed}/train",
    "data.evaluation=made/{seed}/heldout",
)


def planned(output: Path, *overrides: str, more: tuple[str, ...] = ()) -> list[PlannedRun]:
    settings = "settings=" + json.dumps([*SETTINGS, *more])
    return plan_runs(
        load_config(CompareConfig, None, ["train=/dev/null", f"output_dir={output}", settings, *overrides])
    )


COMPARISONS = [file for file in sorted(ROOT.glob("examples/*/*.yaml")) if "\nprepare: [" in file.read_text()]


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_the_examples_can_be_planned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison of examples/ whose command is refused, as settings of one of its runs do not fit."""
    monkeypatch.chdir(ROOT)
    config = load_config(CompareConfig, file, [])
    assert {(run.method, run.seed) for run in plan_runs(config)} == {
        (method, seed) for method in config.methods for seed in config.seeds
    }


def make(run: PlannedRun, *, complete: bool) -> None:
    """Write the files of a complete run."""
    dump_config(run.config, run.directory / "config.yaml")
    if complete:
        (run.directory / "summary.json").write_text(json.dumps({}))


def test_methods_times_seeds(tmp_path: Path) -> None:
    """Catches shared directories, inputs of another seed, and an order that leaves a stopped comparison one method."""
    runs = planned(tmp_path, "methods=[sft,cord]", "seeds=[4,7]")
    assert [(r.method, r.seed) for r in runs] == [("sft", 4), ("cord", 4), ("sft", 7), ("cord", 7)]
    assert len({r.directory for r in runs}) == 4 and all(r.config.output_dir == str(r.directory) for r in runs)
    assert runs[2].config.model.checkpoint == "made/7/checkpoint" and runs[2].config.seed == 7
    assert [run.config.objective.divergence.kind for run in runs[2:4]] == ["nll", "reverse_kl"]


def test_ranks_are_as_few_as_the_layout_needs(tmp_path: Path) -> None:
    """Catches a launch with another number of processes than tp × pp × cp times data parallelism."""
    layout = ("parallel.tp=2", "parallel.pp=2")
    assert {r.ranks for r in planned(tmp_path)} == {1}
    assert {r.ranks for r in planned(tmp_path, more=layout)} == {4}
    assert {r.ranks for r in planned(tmp_path, "ranks=8", more=layout)} == {8}
    with pytest.raises(CordError, match="ranks=6 is no multiple of the layout's 4"):
        planned(tmp_path, "ranks=6", more=layout)


def test_adjustments_of_one_method(tmp_path: Path) -> None:
    """Catches a learning rate that reaches another method, or none."""
    runs = planned(tmp_path, "adjust={grpo: [optimizer.learning_rate=1e-5]}", "seeds=[0]")
    rates = {r.method: r.config.optimizer.learning_rate for r in runs}
    assert rates.pop("grpo") == 1e-5 and 1e-5 not in rates.values()
    with pytest.raises(CordError, match="adjust names 'gpro', which is none of the methods"):
        planned(tmp_path, "adjust={gpro: [optimizer.learning_rate=1e-5]}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[1,1]", "seeds must be different"),
        ("methods=[]", "must name at least one each"),
        ("methods=[sft]", "reference is 'cord', which is none of the methods"),
        ("methods=[cord,ppo]", "'ppo' is unknown"),
        ("jobs=0", "jobs must be at least 1"),
        ("own={k3: [objective.topk=3]}\nmethods=[cord,k3]", "k3, seed 0: .*objective.topk"),
        ("own={k3: [objective.token_weights.top_k=3]}", "own defines 'k3', which methods does not name"),
        ("settings=[]", "sft, seed 0: .*model.checkpoint is required"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path: Path, override: str, message: str) -> None:
    """Catches a comparison that fails after hours because of a word that could have been read first."""
    with pytest.raises(CordError, match=message):
        planned(tmp_path, *override.split("\n"))


def test_what_is_there_is_recognised(tmp_path: Path) -> None:
    """Catches a run made twice, a stopped one taken for complete, and results of other settings taken for these."""
    done, begun, fresh = planned(tmp_path, "methods=[cord]", "seeds=[0,1,2]")
    make(done, complete=True)
    make(begun, complete=False)
    assert [is_complete(run) for run in (done, begun, fresh)] == [True, False, False]
    again = planned(tmp_path, "methods=[cord]", "seeds=[0]", more=("train.steps=7",))[0]
    with pytest.raises(CordError, match="holds a run with other settings; remove it"):
        is_complete(again)


def test_settings_that_came_later_do_not_matter(tmp_path: Path) -> None:
    """Catches a release with a new setting after which nothing that was made is recognised."""
    (run,) = planned(tmp_path, "methods=[cord]", "seeds=[0]")
    make(run, complete=True)
    kept = run.directory / "config.yaml"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(line for line in lines if "clip_high" not in line) + "\n")
    assert len(kept.read_text().splitlines()) == len(lines) - 1 and is_complete(run)


def test_the_prepare_command(tmp_path: Path) -> None:
    """Catches another Python than the one that runs, and a command of the wrong seed."""
    config = CompareConfig("x", str(tmp_path), prepare=("python", "-m", "made", "--seed", "{seed}", "python"))
    assert prepare_command(config, 5) == [sys.executable, "-m", "made", "--seed", "5", "python"]
    assert prepare_command(CompareConfig("x", str(tmp_path)), 5) == []


def test_the_ablation_goes_from_part_to_whole() -> None:
    """Catches a rival that is no part of CORD among its parts."""
    assert ablation(["sft", "cord", "jsd", "reverse_kl", "grpo"]) == ["grpo", "reverse_kl", "cord"]


@pytest.mark.parametrize(
    ("example", "ranks"),
    [
        ("quickstart/compare", 1),
        ("quickstart/compare-whole", 2),
        ("chains/compare", 1),
        ("chains/compare-long", 1),
        ("rounds/compare", 1),
        ("rounds/compare-full", 1),
    ],
)
def test_the_examples_comparisons(example: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a committed comparison that no longer loads, and GRPO with fewer responses than the others."""
    monkeypatch.chdir(ROOT)
    config = load_config(CompareConfig, f"examples/{example}.yaml")
    runs = plan_runs(config)
    assert len(runs) == len(config.methods) * 3 and all(
        isinstance(r.config, RunConfig) and r.ranks == ranks for r in runs
    )
    rollout = runs[0].config.rollout
    assert (
        "grpo" not in config.methods
        or rollout.policy_prompts_per_step * rollout.policy_rollouts == rollout.prompts_per_step
    )

"""Each rank reads and featurises its own share of a step's samples, and the run is that of one rank."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cord.data.audio.features import TorchFeatures
from megatron_cord.data.shards import entries
from tests.gloo import run_ranks
from tests.selection import selected, slow_if
from tests.tiny_run import losses, make_run, overrides, write_inputs
from tests.trainer.runs.test_train import alone, saved

WORLD, BATCH, STEPS = 4, 8, 2
SETTINGS = (
    f"rollout.prompts_per_step={BATCH}",
    "rollout.policy_prompts_per_step=4",
    f"train.steps={STEPS}",
    "checkpoint.interval=1",
    "checkpoint.keep=0",
    "data.workers=0",
    "data.augmentation.noise=0.5",
)
#: settings of a layout, and how many data-parallel ranks it has
LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "dp4": ((), 4),
    "tp2 dp2": (("parallel.tp=2",), 2),
    "dp4 with a remainder": (("rollout.prompts_per_step=6", "rollout.policy_prompts_per_step=3"), 4),
    "dp4 ahead": (("rollout.schedule.ahead=1",), 4),
}
QUICK = ("dp4", "tp2 dp2")


class Counted:
    """Ids of the training samples that this process decodes and featurises while it is entered."""

    def __init__(self) -> None:
        self.decoded: list[str] = []
        self.featurised: list[str] = []

    def __enter__(self) -> Counted:
        self._decode, self._extract = entries.decode_audio, TorchFeatures.__call__  # type: ignore[attr-defined]

        def decode(content: bytes, where: str) -> Any:
            self.decoded.append(where.rpartition(" ")[2])
            return self._decode(content, where)

        def extract(features: TorchFeatures, waveforms: Any, names: Any, *more: Any) -> Any:
            self.featurised.extend(names)
            return self._extract(features, waveforms, names, *more)

        entries.decode_audio = decode  # type: ignore[attr-defined]
        TorchFeatures.__call__ = extract  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        entries.decode_audio = self._decode  # type: ignore[attr-defined]
        TorchFeatures.__call__ = self._extract  # type: ignore[method-assign]
        self.decoded, self.featurised = (
            [name for name in names if name.startswith("s1-")] for names in (self.decoded, self.featurised)
        )


def run_all(rank: int, inputs: str, root: str, names: set[object]) -> dict[str, tuple[list[str], list[str]]]:
    """Make a run on each layout; return what this rank has decoded and featurised in it."""
    seen = {}
    for number, (name, (settings, _)) in enumerate(LAYOUTS.items()):
        if name not in names:
            continue
        dist.barrier()
        dist.destroy_process_group()
        join(rank, Path(root) / f"store{number}")
        with Counted() as counted:
            config = overrides(Path(inputs), Path(root) / name, *SETTINGS, *settings)
            make_run(config)
        seen[name] = (counted.decoded, counted.featurised)
        join(rank, Path(root) / f"store{number}-after")
    return seen


def join(rank: int, store: Path) -> None:
    file = dist.FileStore(str(store), WORLD)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Return the directory of the runs, each under its layout's name, and what each rank has counted."""
    root = tmp_path_factory.mktemp("runs")
    return root, run_ranks(run_all, WORLD, str(inputs), str(root), selected(request, "name"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name not in QUICK)) for name in LAYOUTS])
def test_each_rank_reads_its_share_and_the_run_is_the_same(
    name: str, runs: tuple[Path, list[dict[str, Any]]], inputs: Path, tmp_path: Path
) -> None:
    """Catches ranks that decode or featurise the whole batch or a sample twice, samples that no rank trains on.

    Also losses or gradients that are not one rank's.
    """
    root, seen = runs
    settings, world = LAYOUTS[name]
    with Counted() as whole:
        one = alone(inputs, tmp_path / "run", *SETTINGS, *(s for s in settings if not s.startswith("parallel.")))
    batch = len(whole.decoded) // STEPS
    assert sorted(whole.featurised) == sorted(whole.decoded) and len(whole.decoded) == STEPS * batch > 0
    shares = [-(-(batch - rank) // world) for rank in range(world)]  # of the data-parallel ranks
    assert sorted(len(decoded) for decoded, _ in (counts[name] for counts in seen)) == sorted(
        STEPS * share for share in shares for _ in range(WORLD // world)
    )
    if batch == BATCH:
        assert all(len(counts[name][1]) == len(whole.featurised) / world for counts in seen)
    assert all(sorted(decoded) == sorted(featurised) for decoded, featurised in (counts[name] for counts in seen))
    together = [sample for counts in seen for sample in counts[name][0]]
    assert sorted(together) == sorted(whole.decoded * (WORLD // world))
    for got, wanted in zip(losses(root / name), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    # After the first step, Adam's first moment is the gradient but for a factor.
    tensors, expected = saved(root / name, 1), saved(one, 1)
    moments = [key for key in expected if "exp_avg." in key or key.endswith("exp_avg")]
    assert moments, sorted(expected)[:20]
    for key in moments:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(tensors[key], expected[key], rtol=1e-3, atol=1e-4 * scale, msg=key)

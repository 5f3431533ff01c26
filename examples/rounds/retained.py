"""Print what two methods of the rounds kept of a skill, paired by seed: `python -m examples.rounds.retained [FILE …]`.

For each comparison (default: compare.yaml and compare-full.yaml, whose runs must be complete): accuracy of each guard
after training with an on-policy method, minus that with an off-policy one, in points, with Student's 95 % intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import read_finished
from megatron_cord.compare.plan import plan_runs
from megatron_cord.config.loading import load_config
from megatron_cord.evaluation.statistics import Mean, paired_difference
from megatron_cord.runtime import entry

ON_POLICY, OFF_POLICY = ("reverse_kl", "cord"), ("sft", "off_policy_kl")
FILES = tuple(Path(__file__).parent / name for name in ("compare.yaml", "compare-full.yaml"))


def differences(file: Path) -> Iterator[tuple[str, str, str, Mean]]:
    """Yield guard, on-policy and off-policy method, and the mean difference of accuracies, a share, over the seeds.

    Raises:
        CordError: a run of the comparison is not complete.
    """
    guards = {
        (run.method, run.seed): read_finished(run).summary["guards"]
        for run in plan_runs(load_config(CompareConfig, file, []))
    }
    names = list(next(iter(guards.values())))
    for name, first, second in product(names, ON_POLICY, OFF_POLICY):
        on, off = (
            {seed: found[name]["accuracy"] for (method, seed), found in guards.items() if method == chosen}
            for chosen in (first, second)
        )
        difference = paired_difference(on, off)
        assert difference is not None, "all methods have the same seeds"
        yield name, first, second, difference


def main() -> None:
    """Print the differences."""
    parser = entry.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("files", metavar="FILE", type=Path, nargs="*", help="of a comparison of the rounds")
    for file in parser.parse_args().files or FILES:
        print(file.name)
        for name, first, second, mean in differences(file):
            low, high = (float("nan") if bound is None else 100 * bound for bound in (mean.low, mean.high))
            print(f"  {name}: {first} - {second}: {100 * mean.mean:+.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    entry.run(main)

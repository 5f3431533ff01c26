"""Trains: `python -m megatron_cord.launch --nproc-per-node 2 -m megatron_cord.train --config FILE [a.b=value …]` (or torchrun).

One CORD step (arXiv 2601.16547): the student answers spoken questions; a judge compares some answers with the teacher's; the teacher,
reading the same questions, scores the student's tokens; one update; the new weights go to the engine.
"""

from __future__ import annotations

from megatron_cord.config.loading import load_config
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.metrics import Stopwatch
from megatron_cord.trainer.run import Run


def train(config: RunConfig) -> int:
    """Runs all remaining steps on this rank and returns the exit status: 0, or `exit_status.STOPPED` when the run was asked to stop before the last."""
    layout = initialize(config.parallel, config.seed)
    with Run(config, layout) as run:
        for step in run.steps():
            watch = Stopwatch()
            samples = run.batch(step)  # 1. data
            collected = run.collect(
                samples, step
            )  # 2. rollouts (asynchronous: the next step's are started too), 3. rewards
            watch.lap("rollout")
            result = run.train(collected)  # 4. teacher forward, student forward and backward, update
            watch.lap("update")
            run.sync_weights()  # 5. new weights to the engine
            watch.lap("weight_sync")
            run.finish_step(collected, result, watch.total())  # 6. metrics, record, checkpoint, evaluation
    finalize()
    return run.status


def main() -> int:
    """Entry point."""
    arguments = entry.parse_args(__doc__.splitlines()[0])
    return train(load_config(RunConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    entry.run(main)

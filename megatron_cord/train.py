"""Train: `python -m megatron_cord.launch --nproc-per-node 2 -m megatron_cord.train --config FILE [a.b=value …]`.

torchrun starts it too. One CORD step (arXiv 2601.16547): the student answers spoken questions; a judge compares some
answers with the teacher's; the teacher, given the text of the same questions, scores the student's tokens; one update;
the new weights go to the engine.
"""

from __future__ import annotations

import logging

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.parallel.portability import device_name
from megatron_cord.plan.utilisation import Utilisation
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig, load_run_config
from megatron_cord.trainer.observability.metrics import Stopwatch
from megatron_cord.trainer.observability.trackers.opening import check_trackers
from megatron_cord.trainer.run import Run

logger = logging.getLogger("megatron_cord.train")  # also where this page is __main__


def train(config: RunConfig) -> int:
    """Run all remaining steps on this rank.

    Returns:
        the exit status: 0, or `exit_status.STOPPED` for a run that was stopped before its last step.
    """
    layout = initialize(config.parallel, config.seed)
    if layout.is_main:
        check_trackers(config.metrics)  # before anything is computed
    with Run(config, layout, Utilisation(config, layout.world_size, device_name())) as run:
        for step in run.steps():
            watch = Stopwatch()
            batch = run.batch(step)  # 1. Data: this rank's share of the samples, prepared once
            rollouts = run.generate(batch)  # 2. Rollout: the engine's responses; later steps may be generated ahead
            scored = run.score(batch, rollouts)  # 3. Reward: answers compared; from here on, the rollouts of all ranks
            watch.lap("rollout")
            result = run.update(batch, scored)  # 4. Train: teacher forward, student forward and backward, update
            watch.lap("update")
            run.sync_weights()  # 5. Weight sync: the engine gets the new version
            watch.lap("weight_sync")
            run.finish_step(result, watch.total())  # 6. Record: metrics, rollouts, checkpoint, evaluation
    if run.status == 0 and layout.is_main:
        write_report(config.output_dir)
    finalize()
    return run.status


def write_report(output_dir: str) -> None:
    """Write report.html; a run that is done does not fail for want of its page."""
    from megatron_cord.report.page.page import render  # draws: only one rank needs it, and only at the end

    try:
        logger.info("report: %s", render(output_dir))
    except CordError as error:
        logger.warning("there is no report of this run: %s", error)


def main() -> int:
    """Entry point."""
    arguments = entry.parse_args(__doc__.splitlines()[0])
    assert arguments.config is not None, "--config is required"
    return train(load_run_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    entry.run(main)

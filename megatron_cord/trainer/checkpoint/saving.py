"""What a run keeps of its weights: checkpoints, the best of them, exports. All ranks call the methods together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.runtime.stop_request import StopRequest
from megatron_cord.trainer.checkpoint.checkpoints import Checkpoints
from megatron_cord.trainer.checkpoint.exports import Exports
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.endings.agreement import any_rank
from megatron_cord.trainer.endings.best import Best
from megatron_cord.trainer.step.moving_average import MovingAverage

logger = logging.getLogger(__name__)
_TICK = 0.5  #: seconds between two looks at an export that is waited for


class Saving:
    """Saves what a run needs to go on, and what is made of it.

    Args:
        checkpoints: of the run.
        exports: of the run.
        model, optimizer, average: what is saved; the average of a teacher that has one.
        layout: this rank's place.
        step: with which the run begins; it is saved already.

    Attributes:
        saved_step: of the newest checkpoint, which may still be written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        exports: Exports,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        average: MovingAverage | None,
        layout: Layout,
        step: int,
    ) -> None:
        self._checkpoints, self._exports, self._layout = checkpoints, exports, layout
        self._model, self._optimizer, self._average = model, optimizer, average
        self.saved_step = step

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after a step, for itself or for an export."""
        interval = self._checkpoints.config.interval
        return bool(interval and step % interval == 0) or self._exports.is_due(step)

    def save(self, progress: Progress) -> None:
        """Save a checkpoint. Raises as `Checkpoints.save`."""
        self._keep_waiting()
        self._checkpoints.save(progress, self._model, self._optimizer, self._average)
        self.saved_step = progress.step

    def keep_best(self, best: Best) -> None:
        """Keep the checkpoint of the best evaluation, which was saved. Raises as `Checkpoints.save`."""
        self._checkpoints.keep_best(asdict(best))
        logger.info("the best evaluation so far: %s; its checkpoint is kept", best)

    def restore_best(self, best: Best | None) -> None:
        """Let `best.json` name the best evaluation again, for a run that was killed before it was written."""
        if not self._layout.is_main:
            return
        record = self._checkpoints.best()
        if best is not None and (record is None or record["step"] != best.step):
            self._checkpoints.mark_best(asdict(best))

    def poll(self) -> None:
        """Complete what is written by now, and begin what is next. Raises as `Checkpoints.save`."""
        self._keep_waiting()
        self._checkpoints.poll()
        if self._layout.is_main:
            self._exports.poll()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises as `Checkpoints.save`."""
        self._keep_waiting()
        self._checkpoints.wait()

    def wait_for_exports(self, request: StopRequest) -> bool:
        """Wait for all exports that are due, or until a rank is asked to stop; return whether they are made."""
        while True:  # in short collective steps: a single one would last longer than a collective may
            busy, asked = any_rank([self._layout.is_main and self._exports.poll(), bool(request)], self._layout.device)
            if asked or not busy:
                break
            time.sleep(_TICK)
        if self._layout.is_main and self._exports.interval:  # what stayed for its export
            self._checkpoints.rotate(self._checkpoints.config.keep, self._exports.waiting)
        return not busy

    def finish_with(self, step: int) -> None:
        """Take this step for the last one."""
        self._exports.finish_with(step)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Complete the checkpoint that is being written before a check ends the run, on every rank or on none."""
        try:
            yield
        except CordError:
            self.wait()
            raise

    @property
    def write_seconds(self) -> float:
        """Seconds that the last checkpoint took; 0 before the first."""
        return self._checkpoints.write_seconds

    def close(self) -> None:
        """End an export in progress; the next start continues it."""
        self._exports.close()

    def _keep_waiting(self) -> None:
        self._checkpoints.kept = self._exports.waiting if self._layout.is_main else ()

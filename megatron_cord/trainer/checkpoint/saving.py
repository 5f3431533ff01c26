"""What a run keeps of its weights: checkpoints, the best of them, exports. All ranks call the methods together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import broadcast_json
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
        self._held: int | None = None

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

    def keep_held(self, steps: Sequence[int]) -> None:
        """Keep the checkpoint of the last of these steps that has one, to which a guard may make the run go back."""
        if self._layout.is_main:
            present = {*self._checkpoints.steps(), self.saved_step}  # the newest may still be written
            self._held = max(present.intersection(steps), default=None)

    def go_back(self, steps: Sequence[int]) -> int | None:
        """Set aside what is later than the last of these steps that has a checkpoint, and return this step.

        Returns:
            None where none of them has one; nothing is set aside then.
        """
        self.wait()
        step: int | None = None
        problem = None
        if self._layout.is_main:
            try:
                step = max(set(self._checkpoints.steps()).intersection(steps), default=None)
                if step is not None:
                    for aside in self._checkpoints.set_aside_after(step):
                        logger.info("set aside: %s", aside)
                    self._exports.set_aside_after(step)
            except OSError as error:
                problem = f"a checkpoint cannot be set aside ({error}); fix the cause and start the run again"
        found, problem = broadcast_json([step, problem])
        if problem is not None:
            raise CordError(problem)
        step = None if found is None else int(found)
        self.saved_step = self.saved_step if step is None else step
        return step

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
            self._checkpoints.rotate(self._checkpoints.config.keep, self._kept())
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
        self._checkpoints.kept = self._kept() if self._layout.is_main else ()

    def _kept(self) -> list[int]:
        return [*self._exports.waiting, *([] if self._held is None else [self._held])]

"""When a frozen teacher gives its reference answers: before the first step, or a stretch of steps at a time.

The run's engine can give them as long as it has the teacher's weights for text. Where the language model is frozen,
that is always so; with LoRA beside it the engine can leave that out (`base_weights`). The answers are then the same
whenever they are made: the first step waits for those of a stretch alone, not of the whole run. Else all are made
before the engine gets trained weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.ordering.row import Address
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers

logger = logging.getLogger(__name__)


class AnswersInTime:
    """Has the answers made that steps need. All ranks call it alike.

    Args:
        answers: the teacher's.
        loader: of the samples.
        per_step: so many of a step's samples, from its first, need an answer.
        steps: of the whole run.
        at_a_time: so many answers, or a little more, are made together; None makes all at the start.
    """

    def __init__(
        self, answers: ReferenceAnswers, loader: SampleLoader, per_step: int, steps: int, at_a_time: int | None
    ) -> None:
        self._answers, self._loader, self._per_step, self._steps = answers, loader, per_step, steps
        self._stretch = None if at_a_time is None else -(-at_a_time // max(1, per_step))
        self._needed = per_step > 0 and answers.mode == "frozen"
        self._answered: set[Address] = set()

    def begin(self, step: int, texts_read: Callable[[], None], stop: Callable[[], bool]) -> None:
        """Make all answers that the run needs from a step on, unless steps can wait for theirs. Collective.

        Args:
            step: the first one.
            texts_read: called when the questions were read, which may have found damage.
            stop: as for `ReferenceAnswers.prepare`.

        Raises:
            StoppedError: as `ReferenceAnswers.prepare` does.
        """
        if not self._needed:
            return
        if self._stretch is None:
            texts = self._loader.texts(range(step, self._steps), self._per_step)
            texts_read()
            self._answers.prepare(list(texts.values()), stop)
        else:
            logger.info(
                "the teacher's language model is at hand at every step, so it answers %d steps' questions at a time",
                self._stretch,
            )

    def lacks(self, step: int) -> bool:
        """Return whether answers have to be made before the step can be scored; the same on all ranks."""
        if not self._needed or self._stretch is None:
            return False
        return not self._answered.issuperset(self._loader.addresses(step, self._per_step))

    def make(self, step: int) -> None:
        """Make the answers of a stretch of steps, from this one on. Collective; the engine must be idle.

        Raises:
            DamageLimitError: as `SampleLoader.texts` does.
        """
        assert self._stretch is not None
        last = min(step + self._stretch, self._steps)
        texts = self._loader.texts(range(step, last), self._per_step)
        logger.debug("reference answers of steps %d to %d", step + 1, last)
        self._answers.prepare(list(texts.values()))
        self._answered = set(texts)

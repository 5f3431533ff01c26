"""A frozen teacher's answers of an engine that has trained weights: it is given the checkpoint's for as long.

With LoRA the teacher is the model without it, which the engine can be at any step. So the first step need not wait for
the answers of the whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_cord.rollout.capabilities import Rebasable
from megatron_cord.rollout.collective import CollectiveEngine


def rebases(engine: CollectiveEngine) -> bool:
    """Return whether an engine can have its checkpoint's weights in between at little cost. Collective."""
    return isinstance(engine.engine, Rebasable) and engine.engine.rebases()


@contextmanager
def base_weights(engine: CollectiveEngine) -> Iterator[CollectiveEngine]:
    """Yield an engine with its checkpoint's weights, where it can have them in between; else as it is. Collective."""
    if isinstance(engine.engine, Rebasable):
        with engine.engine.base_weights():
            yield engine
    else:
        yield engine

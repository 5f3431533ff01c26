"""When a step's responses are generated: at the step, or ahead of it while earlier batches train, with bounded staleness.

The responses of step t are asked for as soon as the engine has the weights of version max(0, t - ahead). With on_weight_sync=finish they come
from exactly these weights, whatever takes how long, so a run is as reproducible as a synchronous one; ahead = 0 is the synchronous one.

Simplifications: the bound is in steps of the whole batch, and one thread a rank generates, one step's share after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.rollout.background import Background
from megatron_cord.rollout.capabilities import Abortable, Pausable, Releasable, require
from megatron_cord.rollout.collective import CollectiveEngine, finished
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine


@dataclass(frozen=True)
class ScheduleConfig:
    """When responses are generated, and what a weight sync does to unfinished ones."""

    schedule: Literal["sync", "async"] = (
        "sync"  #: async: the next step's responses are generated while this one's train
    )
    max_staleness: int = 1  #: of async: no token comes from weights that are more steps old; 0 is the same run as sync
    on_weight_sync: Literal["finish", "continue", "restart"] = "finish"
    #: of async, for responses that are unfinished when new weights are there: wait for them, go on with the new weights, or begin again
    colocated: bool = (
        False  #: the engine's memory is released while the trainer works, for an engine on the trainer's own devices
    )

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise CordError("rollout.max_staleness cannot be negative")
        if self.colocated and self.ahead:
            raise CordError(
                "rollout.colocated needs rollout.schedule=sync: the engine cannot generate while its memory is released"
            )

    @property
    def ahead(self) -> int:
        """So many steps are generated ahead."""
        return self.max_staleness if self.schedule == "async" else 0


@dataclass(eq=False)
class _Share:
    """This rank's part of a step's requests, and what it has made of them."""

    requests: list[GenerationRequest]
    total: int  #: requests of all ranks
    made: dict[int, Rollout] = field(default_factory=dict)
    seconds: float = 0.0
    future: Future[None] | None = None

    @property
    def unfinished(self) -> list[int]:
        return [i for i in range(len(self.requests)) if i not in self.made]

    def generate(self, engine: RolloutEngine) -> None:
        begun, asked = time.perf_counter(), self.unfinished
        made = finished(engine.generate([self.requests[i] for i in asked]))
        self.made.update({asked[i]: rollout for i, rollout in made.items()})
        self.seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Until the engine has answered; raises what generation raised."""
        if self.future is not None:
            self.future.result()


class Schedule:
    """Gives each step its responses. Methods are called by all ranks together, from the thread that trains.

    Args:
        config: when.
        engine: all ranks' engines.
        requests: of the step numbered from 0, the same on every rank.
        steps: of the whole run.

    Raises:
        CordError: the engine lacks what the configuration asks for.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        engine: CollectiveEngine,
        requests: Callable[[int], list[GenerationRequest]],
        steps: int,
    ) -> None:
        self.config, self._engine, self._requests, self._steps = config, engine, requests, steps
        self._shares: dict[int, _Share] = {}
        self._gathered: dict[int, list[Rollout]] = {}
        self._background = Background() if config.ahead else None
        self._waited, self._seconds = 0.0, dict[int, float]()
        self._pausable: Pausable | None = None
        self._abortable: Abortable | None = None
        self._releasable: Releasable | None = None
        choose = "choose rollout.on_weight_sync=finish"
        if config.ahead and config.on_weight_sync == "continue":
            self._pausable = require(engine.engine, Pausable, "rollout.on_weight_sync=continue", choose)  # type: ignore[type-abstract]
        if config.ahead and config.on_weight_sync == "restart":
            self._abortable = require(engine.engine, Abortable, "rollout.on_weight_sync=restart", choose)  # type: ignore[type-abstract]
        if config.colocated:
            self._releasable = require(engine.engine, Releasable, "rollout.colocated", "set it to false")  # type: ignore[type-abstract]

    def rollouts(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The responses to the step's requests, in their order, and metrics; starts generation of the steps ahead.

        Raises:
            CordError: a token of older weights than allowed; and what the engine raises.
        """
        begun = time.perf_counter()
        for ahead in range(step, min(step + self.config.ahead, self._steps - 1) + 1):
            if ahead not in self._shares and ahead not in self._gathered:
                self._start(ahead)
        rollouts = self._take(step)
        metrics = {
            "seconds_generate": self._seconds.pop(step, 0.0),
            "seconds_wait_rollouts": time.perf_counter() - begun,
            "seconds_wait_weight_sync": self._waited,
        }
        self._waited = 0.0
        return rollouts, metrics | staleness(rollouts, step, self.config.ahead)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the trainer's work: a colocated engine is out of the way."""
        if self._releasable is not None:
            self._releasable.release_memory()
        yield
        if self._releasable is not None:
            self._releasable.restore_memory()

    @contextmanager
    def syncing_weights(self) -> Iterator[None]:
        """Keep the engine from generating during a weight sync."""
        begun = time.perf_counter()
        if self._pausable is not None:
            self._pausable.pause()
        else:
            if self._abortable is not None:
                self._abortable.abort()
            self._wait()
        self._waited += time.perf_counter() - begun
        yield
        if self._pausable is not None:
            self._pausable.resume()
        for share in self._shares.values():  # what was aborted, or was not made as the engine had lost its means
            if share.unfinished and (share.future is None or share.future.done()):
                self._submit(share)

    def settle(self) -> dict[int, list[Rollout]]:
        """Waits for all that is being generated; the responses of later steps, by step, for a checkpoint."""
        for step in sorted(self._shares):
            self._gathered[step] = self._take(step)
        return dict(self._gathered)

    def restore(self, gathered: Mapping[int, Sequence[Rollout]], step: int) -> None:
        """Takes up what `settle` returned, for a run that goes on with `step`, as far as the configuration still asks for just that."""
        for ahead in range(step, min(step + self.config.ahead, self._steps)):
            kept = list(gathered.get(ahead, ()))
            if [r.prompt_id for r in kept] != [request.prompt.sample_id for request in self._requests(ahead)]:
                continue
            if staleness(kept, ahead, None)["staleness_max"] <= self.config.ahead:
                self._gathered[ahead] = kept

    def close(self) -> None:
        """Gives up what is being generated; safe to call twice."""
        if self._background is not None:
            if isinstance(self._engine.engine, Abortable):
                self._engine.engine.abort()
            self._background.close()

    def _start(self, step: int) -> None:
        requests = self._requests(step)
        share = self._shares[step] = _Share(self._engine.share(requests), len(requests))
        self._submit(share)

    def _submit(self, share: _Share) -> None:
        if self._background is None:
            share.generate(self._engine.engine)
        else:
            job = portability.on_own_stream(portability.device(), lambda: share.generate(self._engine.engine))
            share.future = self._background.submit(job)

    def _wait(self) -> None:
        for share in self._shares.values():
            share.wait()

    def _take(self, step: int) -> list[Rollout]:
        if step in self._gathered:
            return self._gathered.pop(step)
        share = self._shares.pop(step)
        share.wait()
        self._seconds[step] = share.seconds
        begun = time.perf_counter()
        self._engine.complete(share.requests, share.made)
        self._seconds[step] += time.perf_counter() - begun
        return self._engine.gather([share.made[i] for i in range(len(share.requests))], share.total)


def staleness(rollouts: Sequence[Rollout], step: int, bound: int | None) -> dict[str, float]:
    """How many steps old the weights are that made the step's tokens: mean over tokens and largest.

    Raises:
        CordError: more than ``bound``, or weights that the step cannot have.
    """
    tokens, total, largest = 0, 0, 0
    for rollout in rollouts:
        for span in rollout.versions:
            age = step - span.version
            if bound is not None and not 0 <= age <= bound:
                raise CordError(
                    f"sample {rollout.prompt_id}: the engine generated with weights of version {span.version} at step {step}, where "
                    f"{max(0, step - bound)} to {step} are allowed; a weight sync did not reach it: look at its log and start the run again"
                )
            tokens, total, largest = (
                tokens + span.end - span.start,
                total + age * (span.end - span.start),
                max(largest, age),
            )
    return {"staleness": total / max(tokens, 1), "staleness_max": float(largest)}

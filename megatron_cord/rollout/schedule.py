"""When a step's responses are generated: at the step, or ahead of it while earlier ones train.

The responses of step t are requested as soon as the engine has the weights of version max(0, t - ahead). With
on_weight_sync=finish they come from exactly these weights, whatever takes how long, so a run is as reproducible as a
synchronous one; ahead = 0 is the synchronous one.

Simplifications: the bound is in steps of the whole batch, and one thread a rank generates, one step's share after the
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Generic, Literal, TypeVar

import torch

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.background import Background
from megatron_cord.rollout.capabilities import Abortable, Pausable, Releasable, require
from megatron_cord.rollout.collective import CollectiveEngine, finished
from megatron_cord.rollout.types import GenerationRequest, Rollout, RolloutEngine

B = TypeVar("B")  #: a step's batch, which the schedule keeps and hands back


@dataclass(frozen=True)
class ScheduleConfig:
    """When responses are generated, and what a weight sync does to unfinished ones."""

    #: so many steps are generated ahead, while earlier ones train, with weights at most that many steps old;
    #: 0 generates each step when it comes
    ahead: int = 0
    #: with ahead, for responses that are unfinished when new weights are there: wait for them, go on with the new
    #: weights, or begin again
    on_weight_sync: Literal["finish", "continue", "restart"] = "finish"
    #: the engine's memory is released while the trainer works, for an engine on the trainer's own devices
    colocated: bool = False

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise CordError(f"rollout.schedule.ahead cannot be negative, got {self.ahead}")
        if self.colocated and self.ahead:
            raise CordError(
                "rollout.schedule.colocated needs rollout.schedule.ahead=0: the engine cannot generate while its "
                "memory "
                "is released"
            )


@dataclass(eq=False)
class _Step(Generic[B]):
    """A step whose batch was opened: its requests, and what came of them so far."""

    batch: B
    requests: list[GenerationRequest]  #: of the ranks that share them
    share: list[GenerationRequest]  #: those of them that this rank generates
    made: dict[int, Rollout] = field(default_factory=dict)  #: of the share, by index
    rollouts: list[Rollout] | None = None  #: of `requests`, once the ranks have exchanged them
    seconds: float = 0.0
    begun: bool = False
    future: Future[None] | None = None

    @property
    def unfinished(self) -> list[int]:
        return [] if self.rollouts is not None else [i for i in range(len(self.share)) if i not in self.made]

    def generate(self, engine: RolloutEngine) -> None:
        start, open_ = time.perf_counter(), self.unfinished
        made = finished(engine.generate([self.share[i] for i in open_]))
        self.made.update({open_[i]: rollout for i, rollout in made.items()})
        self.seconds += time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the engine has answered; raise what generation raised."""
        if self.future is not None:
            self.future.result()


class Schedule(Generic[B]):
    """Gives each step its responses. Methods are called by all ranks together, from the thread that trains.

    A step's batch is opened once, when its generation may begin, and kept with its responses until both are taken: at
    most `ahead` + 1 batches are held.

    Args:
        config: when.
        engine: this rank's, with those of the ranks that share its requests.
        batches: opens the batch of a step, counted from 0: this rank's share of the data.
        requests: of a batch; the same on all ranks that share them.
        steps: of the whole run.

    Raises:
        CordError: the engine lacks what the configuration needs.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        engine: CollectiveEngine,
        batches: Callable[[int], B],
        requests: Callable[[B], list[GenerationRequest]],
        steps: int,
    ) -> None:
        self.config, self._engine, self._steps = config, engine, steps
        self._batches, self._requests = batches, requests
        self._open: dict[int, _Step[B]] = {}
        self._background = Background() if config.ahead else None
        self._waited = 0.0
        self._pausable: Pausable | None = None
        self._abortable: Abortable | None = None
        self._releasable: Releasable | None = None
        choose = "choose rollout.schedule.on_weight_sync=finish"
        if config.ahead and config.on_weight_sync == "continue":
            self._pausable = require(engine.engine, Pausable, "rollout.schedule.on_weight_sync=continue", choose)  # type: ignore[type-abstract]
        if config.ahead and config.on_weight_sync == "restart":
            self._abortable = require(engine.engine, Abortable, "rollout.schedule.on_weight_sync=restart", choose)  # type: ignore[type-abstract]
        if config.colocated:
            self._releasable = require(engine.engine, Releasable, "rollout.schedule.colocated", "set it to false")  # type: ignore[type-abstract]

    def batch(self, step: int) -> B:
        """Return the step's batch; those of the steps that are generated ahead are opened too."""
        for ahead in range(step, min(step + self.config.ahead, self._steps - 1) + 1):
            self._opened(ahead)
        return self._opened(step).batch

    def rollouts(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """Return the responses to the requests of the step's batch, in their order, and seconds; begin the steps ahead.

        The step is then closed.

        Raises:
            CordError: a token of older weights than allowed; and what the engine raises.
        """
        start = time.perf_counter()
        for ahead in range(step, min(step + self.config.ahead, self._steps - 1) + 1):
            if not self._opened(ahead).begun:
                self._begin(self._opened(ahead))
        rollouts = self._finish(step)
        metrics = {
            "seconds_generate": self._open.pop(step).seconds,
            "seconds_wait_rollouts": time.perf_counter() - start,
            "seconds_wait_weight_sync": self._waited,
        }
        self._waited = 0.0
        staleness(rollouts, step, self.config.ahead)
        return rollouts, metrics

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keep a colocated engine out of the trainer's memory while it works. All ranks together.

        No rank begins before the engine's memory is free, and the engine takes it back when every rank has given up
        what torch keeps for later allocations.
        """
        if self._releasable is not None:
            self._releasable.release_memory()
            all_gather_json(None)  # only one rank sends requests to the servers, which use all ranks' devices
        yield
        if self._releasable is not None:
            torch.cuda.empty_cache()
            all_gather_json(None)
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
            self.wait()
        self._waited += time.perf_counter() - begun
        yield
        if self._pausable is not None:
            self._pausable.resume()
        for opened in self._open.values():  # what was aborted, or was not made as the engine had lost its means
            if opened.begun and opened.unfinished and (opened.future is None or opened.future.done()):
                self._submit(opened)

    def wait(self) -> None:
        """Wait until the engine has answered what was begun, so that it may serve another caller. Not collective."""
        for opened in self._open.values():
            opened.wait()

    def settle(self) -> dict[int, dict[str, Rollout]]:
        """Wait for all that is being generated; return the responses of later steps for a checkpoint.

        Returns:
            by step and `GenerationRequest.key`, those of all ranks.
        """
        settled = {}
        for step in sorted(step for step, opened in self._open.items() if opened.begun):
            pairs = zip(self._open[step].requests, self._finish(step), strict=True)
            mine = {request.key: asdict(rollout) for request, rollout in self._engine.share(list(pairs))}
            shares = all_gather_json(mine)
            settled[step] = {key: Rollout.from_json(plain) for share in shares for key, plain in share.items()}
        return settled

    def restore(self, settled: Mapping[int, Mapping[str, Rollout]], step: int) -> None:
        """Take up what `settle` returned, on whatever layout, for a run that goes on with `step`.

        A later step is taken up if all its requests are answered, by weights that are not too old for this
        configuration.
        """
        for ahead in range(step, min(step + self.config.ahead, self._steps)):
            opened = self._opened(ahead)
            kept = settled.get(ahead, {})
            whole = all(request.key in kept for request in opened.requests)
            rollouts = [kept[request.key] for request in opened.requests] if whole else []
            if all(all_gather_json(whole and staleness(rollouts, ahead, None)["staleness_max"] <= self.config.ahead)):
                opened.rollouts, opened.begun = rollouts, True

    def close(self) -> None:
        """Give up what is being generated; safe to call twice."""
        if self._background is not None:
            if isinstance(self._engine.engine, Abortable):
                self._engine.engine.abort()
            self._background.close()

    def _opened(self, step: int) -> _Step[B]:
        if step not in self._open:
            batch = self._batches(step)
            requests = self._requests(batch)
            self._open[step] = _Step(batch, requests, self._engine.share(requests))
        return self._open[step]

    def _begin(self, opened: _Step[B]) -> None:
        opened.begun = True
        self._submit(opened)

    def _submit(self, opened: _Step[B]) -> None:
        if self._background is None:
            opened.generate(self._engine.engine)
        else:
            job = portability.on_own_stream(portability.device(), lambda: opened.generate(self._engine.engine))
            opened.future = self._background.submit(job)

    def _finish(self, step: int) -> list[Rollout]:
        """Wait for a step's responses, and exchange them with the ranks that share its requests."""
        opened = self._open[step]
        if opened.rollouts is None:
            opened.wait()
            start = time.perf_counter()
            self._engine.complete(opened.share, opened.made)
            opened.seconds += time.perf_counter() - start
            mine = [opened.made[i] for i in range(len(opened.share))]
            opened.rollouts = self._engine.gather(mine, len(opened.requests))
        return opened.rollouts


def staleness(rollouts: Sequence[Rollout], step: int, bound: int | None) -> dict[str, float]:
    """Return how many steps old the weights are that generated the step's tokens: mean over tokens and largest.

    Raises:
        CordError: more than ``bound``, or weights that the step cannot have.
    """
    tokens, total, largest = 0, 0, 0
    for rollout in rollouts:
        for span in rollout.versions:
            age = step - span.version
            if bound is not None and not 0 <= age <= bound:
                raise CordError(
                    f"sample {rollout.prompt_id}: the engine generated with weights of version {span.version} at "
                    f"step {step}, where "
                    f"{max(0, step - bound)} to {step} are allowed; a weight sync did not reach it: look at its log "
                    "and start the run again"
                )
            tokens, total, largest = (
                tokens + span.end - span.start,
                total + age * (span.end - span.start),
                max(largest, age),
            )
    return {"staleness": total / max(tokens, 1), "staleness_max": float(largest)}

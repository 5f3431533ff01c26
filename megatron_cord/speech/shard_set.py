"""A directory of shards that is made of a user's rows: begun, made in parallel, taken up again, and completed.

A shard is made by one worker, and a receipt beside it lists what went into it and what was rejected. So after an
interruption a second call makes the shards without a receipt, and neither the interruption nor the number of workers
changes a bit of the set.

What it simplifies: one machine.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_cord.data.question_files import Reject
from megatron_cord.data.shards.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, ShardEntry
from megatron_cord.data.shards.writer import disk_errors
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic, write_json
from megatron_cord.runtime.parent import end_with_parent
from megatron_cord.runtime.stop_request import StoppedError, StopRequest
from megatron_cord.speech.receipts import Receipt

REJECTS_NAME = "rejects.jsonl"
_WAITING = 2  # jobs that are held beside those in work
_MOST_BYTES = 2 << 30  # of jobs that are held; a larger one is held alone
_ADDRESSES = ("url", "asr_url")  # names of arguments

Job = TypeVar("Job")


@dataclass(frozen=True)
class ShardSet:
    """The outcome.

    Attributes:
        manifest: of the shards.
        rejects: number of rows left out, by reason, the commonest first.
    """

    manifest: Manifest
    rejects: dict[str, int]


def read_plan(output: Path) -> dict[str, Any] | None:
    """Return the arguments that a directory was begun with; None for a new one.

    Raises:
        CordError: the file is damaged.
    """
    plan = output / PLAN_NAME
    try:
        content = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else None
    except ValueError as error:
        raise CordError(f"{plan} is damaged ({error}); delete {output} and begin anew") from error
    return content if isinstance(content, dict) else None


def claim(output: Path, source: Mapping[str, Any], *, noted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the plan, or compare it with the one that is there.

    Args:
        output: the directory.
        source: the arguments that decide about the set. An endpoint may move: of its address counts whether there is
            one.
        noted: more to write, which need not be the same.

    Returns:
        What was noted at the beginning.

    Raises:
        CordError: the directory holds a set of other arguments.
    """
    begun, more = read_plan(output), dict(noted or {})
    if begun is None:
        if (output / MANIFEST_NAME).exists():
            raise CordError(
                f"{output} holds a set of shards that was made otherwise; delete it or choose another directory"
            )
        with disk_errors(output):
            write_json(output / PLAN_NAME, {**source, **more})
        return more
    then = {name: begun.pop(name) for name in more if name in begun}
    changed = sorted(
        name for name in begun.keys() | source.keys() if _compared(begun.get(name)) != _compared(source.get(name))
    )
    if changed:
        raise CordError(
            f"{output} was begun with other arguments ({', '.join(changed)}); delete it or choose another directory"
        )
    return then


def _compared(argument: Any) -> Any:
    """Return an argument as it is compared with what a set was begun with."""
    if not isinstance(argument, Mapping):
        return argument
    return {name: value is not None if name in _ADDRESSES else value for name, value in argument.items()}


def worker_context(module: str) -> multiprocessing.context.ForkServerContext:
    """Return the context of worker processes: forks of one process, which alone takes seconds to import a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def make_all(
    jobs: Iterable[Job], make: Callable[[Job], Receipt], workers: int, *, weigh: Callable[[Job], int] = lambda job: 0
) -> Iterator[tuple[Job, Receipt]]:
    """Make shards in parallel; yield them as they are done. Jobs are taken when a worker is about to be free.

    Args:
        jobs: one for each shard.
        make: makes one.
        workers: processes.
        weigh: returns the bytes that a job takes; those that are held together are bounded.

    Raises:
        CordError: what `make` and `jobs` raise, or a worker died. Finished shards stay, those in work are finished.
        StoppedError: after Ctrl-C or another request to stop; likewise.
    """
    with StopRequest("the shards in work are finished") as request:
        made = (
            _make_here(jobs, make, request) if workers == 1 else _make_by_workers(jobs, make, workers, weigh, request)
        )
        yield from made
        if request:
            raise StoppedError(
                "asked to stop: the shards that are finished are kept; the same command makes the others"
            )


def _make_here(
    jobs: Iterable[Job], make: Callable[[Job], Receipt], request: StopRequest
) -> Iterator[tuple[Job, Receipt]]:
    for job in jobs:
        if request:
            return
        yield job, make(job)


def _make_by_workers(
    jobs: Iterable[Job],
    make: Callable[[Job], Receipt],
    workers: int,
    weigh: Callable[[Job], int],
    request: StopRequest,
) -> Iterator[tuple[Job, Receipt]]:
    context = worker_context(make.__module__)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_the_parent) as pool:
        pending: dict[Future[Receipt], Job] = {}
        try:
            for job in jobs:
                if request:
                    break
                pending[pool.submit(make, job)] = job
                while not request and (
                    len(pending) >= workers + _WAITING or sum(map(weigh, pending.values())) > _MOST_BYTES
                ):
                    yield from _ended(pending)
            while pending:
                for future in [future for future in pending if request and future.cancel()]:
                    del pending[future]  # no worker has begun with it
                if pending:
                    yield from _ended(pending)
        except BrokenProcessPool:
            raise CordError(
                "a worker process ended unexpectedly, as when memory is short; what is complete is kept: run the same "
                "command again, with fewer --workers if need be"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_the_parent() -> None:
    """Leave Ctrl-C and SIGUSR1, which may reach all processes, to the one that started this worker; end with it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _ended(pending: dict[Future[Receipt], Job]) -> Iterator[tuple[Job, Receipt]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def complete(
    output: Path, source: Mapping[str, Any], receipts: Sequence[Receipt], *, max_rejects: float, what: str
) -> ShardSet:
    """Write the rejects and, if they are few enough, the manifest.

    Args:
        output: the directory.
        source: for the manifest; rejects by reason are added.
        receipts: of all shards, in their order; rows that made no part of a shard are a receipt without one.
        max_rejects: the largest share of rows that may be left out.
        what: the rows are, for messages: "questions".

    Raises:
        CordError: too many rows were left out; all shards stay.
    """
    rejects = [reject for receipt in receipts for reject in receipt.rejects]
    # Reasons that quote the row are counted by what comes before the quotation.
    reasons = dict(Counter(reject.reason.split(" (")[0] for reject in rejects).most_common())
    _write_rejects(output, rejects)
    voices: Counter[str] = Counter()
    for receipt in receipts:
        voices.update(receipt.voices)
    shards: tuple[ShardEntry, ...] = tuple(r.shard for r in receipts if r.shard is not None)
    total = len(rejects) + sum(shard.samples for shard in shards)
    if not shards or len(rejects) > max_rejects * total:
        common = next(iter(reasons.items()))
        raise CordError(
            f"{len(rejects)} of {total} {what} were left out, most often because {common[0]} ({common[1]} times); "
            f"see {output / REJECTS_NAME}, correct the {what}, or allow it with a larger max_rejects"
        )
    seconds = round(sum(receipt.seconds for receipt in receipts), 3)
    manifest = Manifest(shards, dict(sorted(voices.items())), seconds, {**source, "rejects": reasons})
    with disk_errors(output):
        manifest.write(output)
    return ShardSet(manifest, reasons)


def _write_rejects(output: Path, rejects: Sequence[Reject]) -> None:
    with disk_errors(output):
        lines = "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
        # A lone surrogate, which JSON may hold and UTF-8 may not, keeps its escape.
        write_atomic(output / REJECTS_NAME, lines.encode("utf-8", "backslashreplace"))
        for orphan in [*output.glob(".*.partial"), *output.glob(".shard-*.part-*")]:
            orphan.unlink(missing_ok=True)

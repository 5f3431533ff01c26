"""One thread that does jobs in order, beside the thread that trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

Job = Callable[[], None]


class Background:
    """A thread that starts with its first job.

    Jobs must not call torch.distributed, whose calls the ranks must make in one order.

    The thread is a daemon: a run that fails does not wait for it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> Future[None]:
        """Queue a job; the future carries what it raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return future

    def close(self, patience: float = 10.0) -> None:
        """Drop queued jobs and wait so many seconds for the one that runs; safe to call twice."""
        self._closed = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(patience)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None and not self._closed:
            job, future = item
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del job, future, item  # not to keep a closed engine's job until the next one comes

"""Writes the tensors of a checkpoint in a process forked from this rank, while the rank may go on.

The child has the tensors as they were at the fork (on a GPU: the copies that Megatron made in host memory before),
writes them, computes checksums and ends. It ends with its rank too: no file is written, and no connection kept open,
for a rank that is gone. Its files are written by threads, as torch.save releases Python's lock; Megatron-Core 0.16
would fork once more for each, and a fork copies the page tables of the whole rank.
"""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import signal
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_cord.runtime.files import file_digest
from megatron_cord.runtime.parent import end_with_parent


class AsyncWrite:
    """One checkpoint that is being written.

    Args:
        state: sharded, of all ranks.
        directory: an empty one. Collective, like all methods.
    """

    def __init__(self, state: dict[str, Any], directory: Path) -> None:
        self._results = _Results()
        filesystem_async._results_queue = self._results
        options = (
            {"async_strategy": "mcore"}
            if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
            else {}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own deprecated internals
            request = dist_checkpointing.save(
                state,
                str(directory),
                async_sharded_save=True,
                # Only the optimizer's groups are not sharded, and pipeline stages may have different ones: no check.
                preprocess_common_before_consistancy_check=lambda common: {},
                **options,
            )
            assert request is not None
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(_write, request.async_fn))
            self._calls = AsyncCallsQueue()
            self._calls.schedule_async_request(request)

    def is_done(self, *, wait: bool) -> bool:
        """Return whether all ranks' files are written.

        Args:
            wait: return only once they are.

        Raises:
            CheckpointException: a rank could not write.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._calls.maybe_finalize_async_calls(blocking=wait)
        return bool(self._calls.get_num_unfinalized_calls() == 0)

    @property
    def digests(self) -> dict[str, str]:
        """Checksums of this rank's files, by name; once it is done."""
        return self._results.digests


class _Results:
    """The child's results: a queue for one item, in memory that both processes share.

    No other process can write there, so unpickling it is safe.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint-results"), "w+b")
        self.digests: dict[str, str] = {}

    def put(self, results: Any, digests: dict[str, str]) -> None:
        pickle.dump((results, digests), self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the results without the checksums, as Megatron expects them."""
        self._file.seek(0)
        try:
            results, self.digests = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        finally:
            self._file.close()
        return results


def _write(write: Callable[..., None], rank: int, buckets: list[Any], results: _Results) -> None:
    """Write the buckets, in the child, and pass on results and checksums."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the rank decides
    threads = SimpleNamespace(Process=threading.Thread, Queue=queue.Queue, JoinableQueue=queue.Queue)
    filesystem_async.mp = SimpleNamespace(get_context=lambda method: threads)  # in this process alone
    inner: queue.SimpleQueue[Any] = queue.SimpleQueue()
    write(rank, buckets, inner)
    written = inner.get()
    paths = [] if isinstance(written, Exception) else [Path(bucket[0]) for bucket in buckets]
    results.put(written, {path.name: file_digest(path) for path in paths})

"""What surrounds the bytes on the servers' side: a session that is opened and closed, and the weights' version."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each


class Sessions:
    """The weight-update sessions of one attempt. Servers older than SGLang 0.5.21 have none, and are updated without.

    Args:
        timeout: seconds for each answer.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._open: set[Endpoint] = set()

    def begin(self, servers: Sequence[Endpoint]) -> dict[Endpoint, ServerError]:
        """Open a session on each; one that a dead trainer left open is closed first. Returns the failures."""

        def begin(server: Endpoint) -> bool:
            try:
                try:
                    server.post("/begin_weight_update", {"selector": "all"}, self._timeout)
                except ServerError as error:
                    if "already open" not in str(error):
                        raise
                    server.post("/end_weight_update", {}, self._timeout)
                    server.post("/begin_weight_update", {"selector": "all"}, self._timeout)
            except ServerError as error:
                if error.status == httpx.codes.NOT_FOUND:
                    return False
                raise
            return True

        opened, failures = call_each(servers, begin)
        self._open = {server for server, yes in opened.items() if yes}
        return failures

    def end(self, servers: Sequence[Endpoint]) -> dict[Endpoint, ServerError]:
        """Close the sessions of those servers that are still used. Returns the failures."""
        waiting = [server for server in servers if server in self._open]
        return call_each(waiting, lambda server: server.post("/end_weight_update", {}, self._timeout))[1]


def name_version(servers: Sequence[Endpoint], version: str, timeout: float) -> dict[Endpoint, ServerError]:
    """Name the weights and read the name back. Returns the failures."""

    def name(server: Endpoint) -> None:
        server.post("/update_weight_version", {"new_version": version, "abort_all_requests": False}, timeout)
        if (found := server.weight_version(timeout)) != version:
            raise ServerError(f"{server.url} names its weights version {found} after it was given {version}", 200)

    return call_each(servers, name)[1]


def compare_checksums(servers: Sequence[Endpoint], timeout: float) -> dict[Endpoint, ServerError]:
    """Let all servers hash their weights; return the ones that differ from the first, or cannot.

    Servers of other tensor-parallel sizes are not compared.
    """
    sums, failures = call_each(servers, lambda server: server.checksums(timeout))
    first = next(iter(sums.values()), None)
    for server, ranks in sums.items():
        if first is not None and len(ranks) == len(first) and (names := differing(ranks, first)):
            failures[server] = ServerError(f"{server.url} differs from the first server in {', '.join(names[:5])}", 200)
    return failures


def differing(sums: Sequence[dict[str, str]], others: Sequence[dict[str, str]]) -> list[str]:
    """Return the tensors whose checksums are not the same on some rank, or that one side lacks."""
    return sorted(
        {
            name
            for mine, other in zip(sums, others, strict=True)
            for name in mine.keys() | other.keys()
            if mine.get(name) != other.get(name)
        }
    )

"""What surrounds the bytes on the servers' side: a session that is opened and closed, and the version that the weights get."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cord.rollout.exchange.endpoint import Endpoint, ServerError, ask_each, without

_NOT_FOUND = 404


class Sessions:
    """The weight-update sessions of one attempt. Servers older than SGLang 0.5.21 have none, and are updated without.

    Args:
        timeout: seconds for each answer.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._open: set[Endpoint] = set()

    def begin(self, servers: Sequence[Endpoint]) -> dict[Endpoint, ServerError]:
        """Opens a session on each; one that a dead trainer left open is closed first. Returns the failures."""

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
                if error.status == _NOT_FOUND:
                    return False
                raise
            return True

        opened, failures = ask_each(servers, begin)
        self._open = {server for server, yes in opened.items() if yes}
        return failures

    def end(self, servers: Sequence[Endpoint]) -> dict[Endpoint, ServerError]:
        """Closes those of the servers that are still wanted. Returns the failures."""
        waiting = [server for server in servers if server in self._open]
        return ask_each(waiting, lambda server: server.post("/end_weight_update", {}, self._timeout))[1]

    def name_version(self, servers: Sequence[Endpoint], version: str, compare_checksums: bool) -> dict[Endpoint, ServerError]:
        """Names the weights, reads the name back and, if asked for, compares the servers' checksums. Returns the failures."""

        def name(server: Endpoint) -> None:
            server.post("/update_weight_version", {"new_version": version, "abort_all_requests": False}, self._timeout)
            if (found := server.weight_version(self._timeout)) != version:
                raise ServerError(f"{server.url} says its weights are version {found}, after it was told {version}", 200)

        _, failures = ask_each(servers, name)
        if compare_checksums:
            sums, unknown = ask_each(without(servers, failures), lambda server: server.checksums(self._timeout))
            failures |= unknown
            first = next(iter(sums.values()), None)
            # Servers with other tensor-parallel sizes hold other shards: only like is compared with like.
            alike = {server: ranks for server, ranks in sums.items() if first is not None and len(ranks) == len(first)}
            for server, ranks in alike.items():
                differing = sorted({n for mine, other in zip(ranks, first or [], strict=True) for n in mine if mine[n] != other.get(n)})
                if differing:
                    failures[server] = ServerError(f"{server.url} differs from the first server in {', '.join(differing[:5])}", 200)
        return failures

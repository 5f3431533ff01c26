"""Data sets on the Hugging Face Hub, streamed by the `datasets` library: nothing is downloaded before it is read.

Recordings stay as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_cord.errors import CordError

PREFIX = "hf://"
_NAME = re.compile(r"hf:/{1,2}(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")


@dataclass(frozen=True, eq=False)
class HubSplit:
    """One split of a data set, at one revision.

    Attributes:
        data: the library's `IterableDataset`.
        root: the address of the set's files, at that revision.
        commit: the revision.
        subset: of the set.
        split: of the subset.
    """

    data: Any
    root: str
    commit: str
    subset: str
    split: str


def open_split(
    address: str, subset: str | None, split: str | None, *, commit: str | None = None, how: str = "set {} to one of"
) -> HubSplit:
    """Open one split of a data set.

    Args:
        address: hf://OWNER/NAME[@REVISION].
        subset: needed where there are several.
        split: likewise.
        commit: the revision to read in place of the address's.
        how: tells in errors how to choose a subset or a split, whose name takes the place of the braces.

    Raises:
        CordError: there is no such set, revision, subset or split, or the hub does not give it.
    """
    named = _NAME.fullmatch(address)
    if named is None:
        raise CordError(f"{address}: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    import datasets  # takes seconds, and is needed here alone
    from huggingface_hub import HfApi

    where = f"hf://datasets/{named['name']}"  # never a directory of that name
    try:
        commit = str(commit or HfApi().dataset_info(named["name"], revision=named["revision"]).sha)
        subset = _only(datasets.get_dataset_config_names(where, revision=commit), subset, "subset", address, how)
        split = _only(datasets.get_dataset_split_names(where, subset, revision=commit), split, "split", address, how)
        data = datasets.load_dataset(where, subset, split=split, revision=commit, streaming=True)
        features = data.features or {}
        for column, kind in features.items():
            if isinstance(kind, datasets.Audio):
                data = data.cast_column(column, datasets.Audio(decode=False))
    except CordError:
        raise
    except Exception as error:  # the hub's, the library's and the network's own are of no common kind
        reason = first_line(error)
        raise CordError(f"{address}: the hub does not give it ({reason}); check name and connection") from None
    return HubSplit(data, f"{where}@{commit}", commit, subset, split)


def hub_rows(address: str, subset: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Stream the rows of one split; arguments and errors are those of `open_split`."""
    opened = open_split(address, subset, split)
    try:
        yield from opened.data
    except Exception as error:  # as above
        reason = first_line(error)
        raise CordError(f"{address}: the hub does not give it ({reason}); check name and connection") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _only(there: list[str], given: str | None, what: str, address: str, how: str) -> str:
    """Return the one that is given, or the only one."""
    if given is None and len(there) == 1:
        return there[0]
    if given in there:
        return str(given)
    problem = f"has several {what}s" if given is None else f"has no {what} {given!r}"
    raise CordError(f"{address} {problem}; {how.format(what)} {', '.join(sorted(there)[:40])}")

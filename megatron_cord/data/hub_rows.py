"""Rows of a data set on the Hugging Face Hub, by the `datasets` library; recordings stay as they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_cord.errors import CordError

PREFIX = "hf://"
_NAME = re.compile(r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def hub_rows(address: str, subset: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Stream the rows of one split.

    Args:
        address: hf://OWNER/NAME[@REVISION].
        subset: needed where there are several.
        split: likewise.

    Raises:
        CordError: there is no such set, revision, subset or split, or the hub does not give it.
    """
    named = _NAME.fullmatch(address)
    if named is None:
        raise CordError(f"{address}: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    import datasets  # takes seconds, and is needed here alone

    name, revision = named["name"], named["revision"]
    try:
        subset = _only(datasets.get_dataset_config_names(name, revision=revision), subset, "subset", address)
        split = _only(datasets.get_dataset_split_names(name, subset, revision=revision), split, "split", address)
        data = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        for column, kind in (data.features or {}).items():
            if isinstance(kind, datasets.Audio):
                data = data.cast_column(column, datasets.Audio(decode=False))
        yield from data
    except CordError:
        raise
    except Exception as error:  # the hub's, the library's and the network's own are of no common kind
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CordError(f"{address}: the hub does not give it ({reason[:160]}); check name and connection") from None


def _only(there: list[str], given: str | None, what: str, address: str) -> str:
    """Return the one that is given, or the only one."""
    if given is None and len(there) == 1:
        return there[0]
    if given in there:
        return str(given)
    problem = f"has several {what}s" if given is None else f"has no {what} {given!r}"
    raise CordError(f"{address} {problem}; set {what} to one of {', '.join(sorted(there)[:40])}")

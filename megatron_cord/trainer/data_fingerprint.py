"""Which data a run trains on, kept in its directory and its checkpoints, so that it never goes on with other data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cord.data.sets import TrainingSets
from megatron_cord.data.shards.streaming import StreamedShards
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import fingerprint


def describe_sets(sets: TrainingSets, window: int) -> dict[str, Any]:
    """Return what stands for the data: samples and fingerprint, and those of each set where there are several.

    Shards without a manifest are read for it.

    Args:
        sets: by name; a single one is called "".
        window: `data.shuffle_shards`, on which the order of streamed sets depends.
    """
    described = {
        name: {"samples": len(each), "fingerprint": each.fingerprint}
        | ({"shuffle_shards": window} if isinstance(each, StreamedShards) else {})
        for name, each in sets.items()
    }
    if "" in described:
        return described[""]
    samples = sum(len(each) for each in sets.values())
    together = fingerprint([f"{name} {each['fingerprint']}" for name, each in sorted(described.items())])
    return {"samples": samples, "fingerprint": together, "sets": described}


def with_past_sets(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a description the sets that are left out now, as "past_sets", so that they are checked once they are back.

    Args:
        now: what `describe_sets` returns.
        before: what this returned to the run that wrote the checkpoint; empty for a new run.
    """
    past = {name: each for name, each in _by_name(before).items() if name not in _by_name(now)} if before else {}
    return dict(now) | ({"past_sets": past} if past else {})


def check_same(now: Mapping[str, Any], before: Mapping[str, Any], listed: Path) -> None:
    """Refuse data that a run did not begin with. Sets may be added and left out, but must not become others.

    Args:
        now: what `describe_sets` returns.
        before: what `with_past_sets` returned to the run that wrote the checkpoint; empty for a new run.
        listed: the file that lists what is skipped, for the message.

    Raises:
        CordError: the run would see other samples, the same with other content, or in another order.
    """
    if not before:
        return
    sets, known = _by_name(now), _by_name(before)
    if not sets.keys() & known.keys():
        raise CordError(
            f"data.train is {_shown(sets)}, but the run began with {_shown(known)}: begin a run in another output_dir, "
            "with init_from for the weights"
        )
    for name in sets.keys() & known.keys():
        _check_set(f"data.train{name and '.' + name}", sets[name], known[name], listed)


def _check_set(key: str, now: Mapping[str, Any], before: Mapping[str, Any], listed: Path) -> None:
    if now == before:
        return
    one, other = now.get("shuffle_shards"), before.get("shuffle_shards")
    if one != other:
        how = {None: "by an index of all samples"}
        raise CordError(
            f"{key} is read {how.get(one, f'as a stream, with data.shuffle_shards={one}')}, but the run began with it "
            f"{how.get(other, f'as a stream, with data.shuffle_shards={other}')}: in another order, samples would be "
            "left out or come twice; set data.stream and data.shuffle_shards as before, or choose another output_dir"
        )
    what = (
        "other text, audio, answers or order"
        if before["samples"] == now["samples"]
        else f"{now['samples']} usable samples"
    )
    raise CordError(
        f"{key} has {what} ({now['fingerprint']}), but the run began with {before['samples']} usable samples "
        f"({before['fingerprint']}): its steps would be others than those of its seed. Restore the data, or begin "
        f"a run in another output_dir, with init_from for the weights ({listed} lists what was skipped)"
    )


def _by_name(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the record of each set, those of the past included."""
    return {**record["sets"], **record.get("past_sets", {})} if "sets" in record else {"": record}


def _shown(sets: Mapping[str, Any]) -> str:
    return "one set without a name" if "" in sets else f"the sets {', '.join(sorted(sets))}"

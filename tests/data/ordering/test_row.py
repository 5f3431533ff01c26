"""The row of several sets: exact shares, every sample once an epoch of its set, also when weights change."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_cord.data.ordering.damage import Damage, DamageLog
from megatron_cord.data.ordering.row import Address, Phase
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from tests.data.ordering.sets import Listed, row_of, rows

SIZES = {"a": 7, "bb": 5, "ccc": 11}
SETS = {name: Listed([Sample(f"{number}", "q") for number in range(size)]) for name, size in SIZES.items()}
WEIGHTS = {"a": 3.0, "bb": 2.0, "ccc": 1.0}


def test_each_set_goes_through_its_own_epochs() -> None:
    """Would catch a sample that comes more or less often than its set's share says, and ids that two sets share."""
    row = rows(SETS, WEIGHTS)
    taken = [row.at(position, 4) for position in range(420)]
    assert Counter(address.set for address in taken) == {"a": 210, "bb": 140, "ccc": 70}
    for name, size in SIZES.items():
        numbers = [address.number for address in taken if address.set == name]
        epochs = [numbers[start : start + size] for start in range(0, len(numbers) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    assert row.epochs(420) == {"a": 30.0, "bb": 28.0, "ccc": 70 / 11}
    assert row.read(Address("a", 3)).id == "a/3" and row.without_audio(Address("bb", 3)).id == "bb/3"
    assert row_of(SETS["a"]).read(Address("", 3)).id == "3"


def test_other_weights_go_on_where_each_set_was() -> None:
    """Would catch samples that a resumed run leaves out or repeats, and a share that makes up for the past."""
    first = rows(SETS, WEIGHTS)
    old = [first.at(position, 4) for position in range(100)]
    same = Phase(WEIGHTS).goes_on(100, {name: 2 * weight for name, weight in WEIGHTS.items()})
    assert (same.start, same.before) == (0, {})
    phase = Phase(WEIGHTS).goes_on(100, {"a": 1.0, "bb": 1.0, "d": 2.0})
    sets = {"a": SETS["a"], "bb": SETS["bb"], "d": SETS["ccc"]}
    second = rows(sets, phase.weights, phase=phase)
    new = [second.at(position, 4) for position in range(100, 300)]
    assert Counter(address.set for address in new) == {"a": 50, "bb": 50, "d": 100}
    for name in ("a", "bb"):
        numbers = [address.number for address in old + new if address.set == name]
        size = SIZES[name]
        assert all(
            sorted(numbers[start : start + size]) == list(range(size))
            for start in range(0, len(numbers) - size + 1, size)
        )
    back = phase.goes_on(300, WEIGHTS)
    assert back.before["ccc"] == Counter(address.set for address in old)["ccc"] and back.before["d"] == 100


def test_what_stands_in_for_a_damaged_sample() -> None:
    """Would catch a replacement of another set or place in the batch, one that is damaged itself, or that others lose.

    Also one that depends on when the damage became known.
    """
    batch = 6
    row = rows(SETS, WEIGHTS, max_skipped=0.9)
    plan = [row.at(position, batch) for position in range(240)]
    damaged = [Address("bb", 1), Address("bb", 4), Address("a", 2)]
    row.damage.learn([Damage(each.set, each.number, each.number + 1, "gone") for each in damaged], 0)
    other = rows(SETS, WEIGHTS, damage=DamageLog(SIZES, dict.fromkeys(SIZES, 0), 0.9, row.damage.state()))
    for position, planned in enumerate(plan):
        found = row.at(position, batch)
        assert found == other.at(position, batch) and found.set == planned.set and found not in damaged
        assert found == planned or planned in damaged
        if planned in damaged and position > 100:  # the same place of an earlier step
            same_place = [plan[p] for p in range(position - batch, -1, -batch)]
            assert found == next(a for a in same_place if a.set == planned.set and a not in damaged)


def test_a_set_of_which_nothing_is_left() -> None:
    """Would catch a search without end, with an order whose batches always meet the same samples, too."""
    row = row_of([Sample(str(number), "q") for number in range(4)], shuffle=False, max_skipped=0.9)
    row.damage.learn([Damage("", 0, 1, "gone")], 0)
    assert row.at(0, 4) == Address("", 1) and row.at(4, 4) == Address("", 1)
    for number in (1, 2):
        row.damage.learn([Damage("", number, number + 1, "gone")], 0)
    assert {row.at(position, 4).number for position in range(8)} == {3}
    whole = DamageLog({"": 4}, {"": 0}, 0.9, {"": [(0, 4)]})
    with pytest.raises(CordError, match=r"data\.train has no sample left"):
        rows({"": Listed([Sample("x", "q")] * 4)}, {"": 1.0}, damage=whole).at(0, 4)

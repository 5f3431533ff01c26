"""Which of several sets each sample of the row comes from: a function of the weights and the position alone.

Of the first n samples, a set with share w has n·w, but for less than one: the sets take turns as jobs do under Pfair
scheduling (Baruah, Cohen, Plaxton and Varvel, 1996). The j-th sample of a set, j from 0, may stand at positions from
⌊j/w⌋ to ⌈(j+1)/w⌉ − 1, and a position goes to the set whose time is up first. On one processor with integer times this
rule, earliest deadline first, keeps every deadline where the shares add up to 1. It is computed in integers, so no
rounding adds up.

What it simplifies: positions are worked out one after the other from the begin of the pattern, a microsecond each.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm

_BLOCK = 4096  # positions between two that counts are kept of


class Mixture:
    """The endless pattern of sets.

    Args:
        weights: positive numbers by set; decimals are taken as they are written, so that 0.1 is a tenth.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = tuple(sorted(weights))
        exact = [Fraction(repr(weights[name])) for name in self.names]
        scale = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = gcd(*whole)
        self._weights = [weight // common for weight in whole]
        self._period = sum(self._weights)  # positions after which the pattern comes again
        self._turns = bytearray()  # set by position, as far as worked out
        self._counts = [[0] * len(whole)]  # taken of each set before positions 0, _BLOCK, 2·_BLOCK …
        self._taken = [0] * len(whole)

    @property
    def shares(self) -> dict[str, Fraction]:
        """Of each set; they add up to 1."""
        return {name: Fraction(w, self._period) for name, w in zip(self.names, self._weights, strict=True)}

    def at(self, position: int) -> tuple[str, int]:
        """Return the set of a position, from 0, and how many samples of that set stand before it."""
        rounds, offset = divmod(position, self._period)
        self._work_out(offset + 1)
        turn = self._turns[offset]
        return self.names[turn], rounds * self._weights[turn] + self._count(turn, offset)

    def counts(self, positions: int) -> dict[str, int]:
        """Return how many of the first positions are each set's."""
        rounds, offset = divmod(positions, self._period)
        self._work_out(offset)
        return {name: rounds * self._weights[turn] + self._count(turn, offset) for turn, name in enumerate(self.names)}

    def _count(self, turn: int, offset: int) -> int:
        block = offset // _BLOCK
        return self._counts[block][turn] + self._turns.count(turn, block * _BLOCK, offset)

    def _work_out(self, length: int) -> None:
        """Work out the pattern as far as `length` positions."""
        weights, period, taken = self._weights, self._period, self._taken
        for time in range(len(self._turns), length):
            due = [
                (-(-(count + 1) * period // weight), turn)
                for turn, (count, weight) in enumerate(zip(taken, weights, strict=True))
                if count * period < (time + 1) * weight
            ]
            turn = min(due)[1]
            taken[turn] += 1
            self._turns.append(turn)
            if (time + 1) % _BLOCK == 0:
                self._counts.append(taken.copy())

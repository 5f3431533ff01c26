"""Shapes of settings that change over the steps of a run, such as a learning rate."""

from __future__ import annotations

import math
from typing import Literal

#: How a value falls; sqrt is 1 − √share of arXiv 2405.18392.
Shape = Literal["linear", "cosine", "sqrt"]


def remaining(shape: Shape, share: float) -> float:
    """Return what is left, from 1 to 0, of a value that has gone this share, from 0 to 1, of its way down."""
    if shape == "linear":
        return 1.0 - share
    if shape == "sqrt":
        return 1.0 - math.sqrt(share)
    return 0.5 * (1.0 + math.cos(math.pi * share))

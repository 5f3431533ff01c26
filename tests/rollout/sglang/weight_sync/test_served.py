"""What is refused before the first byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.weight_sync.served import check_fits_server, sent_specs, served_specs
from megatron_cord.rollout.types import TensorSpec


def test_everything_that_does_not_fit(checkpoint: Path) -> None:
    """Catches a name that one SGLang model ignores and another dies of, a shape, a dtype.

    Also a tensor that a full weight sync leaves out.
    """
    served = served_specs(checkpoint)
    good = list(served.values())
    check_fits_server(good, served, full=True)
    check_fits_server(good[3:7], served, full=False)
    wrong = [
        replace(good[0], name=good[0].name + "s"),
        replace(good[1], shape=(*good[1].shape, 1)),
        replace(good[2], dtype=torch.float64),
        *good[4:],
    ]
    with pytest.raises(CordError) as caught:
        check_fits_server(wrong, served, full=True)
    message = str(caught.value)
    for words in [
        "(5 problems)",
        f"the server's model has no {good[0].name}s (nearest: {good[0].name})",
        f"{good[1].name} has shape {[*good[1].shape, 1]}, the server's has {list(good[1].shape)}",
        f"{good[2].name} is float64",
        f"the server's {good[0].name} would not be sent",
        f"the server's {good[3].name} would not be sent",
    ]:
        assert words in message
    assert "\n" not in message


def test_nothing_to_send(checkpoint: Path) -> None:
    """Catches a weight sync that names a new version without any new weights."""
    with pytest.raises(CordError, match="no tensor to send"):
        check_fits_server([], served_specs(checkpoint), full=False)


def test_sent_in_the_narrower_dtype() -> None:
    """Catches twice the bytes that a bf16 server needs, and bytes that a float32 server would read from bf16 ones."""
    half, whole = (TensorSpec("a", (2,), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert sent_specs([whole], {"a": half}) == [half]
    assert sent_specs([half], {"a": whole}) == [half]  # the server widens by itself; the wire says bf16

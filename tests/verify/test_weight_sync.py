"""What ``verify weight_sync`` refuses before it starts a server; tests/integration/sglang runs the check itself."""

from __future__ import annotations

import sys

import pytest

from megatron_cord.errors import CordError
from megatron_cord.verify import __main__ as verify
from megatron_cord.verify.weight_sync import VerifyWeightSyncConfig


def test_the_former_subject_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a renamed subject that ends in a list of choices."""
    monkeypatch.setattr(sys, "argv", ["verify", "exchange", "checkpoint=none"])
    with pytest.raises(CordError, match="'exchange' is now named 'weight_sync'"):
        verify.main()


def test_a_check_of_nothing_is_refused() -> None:
    """Catches a check that passes because it compares nothing."""
    with pytest.raises(CordError, match="transports names nothing to check"):
        VerifyWeightSyncConfig("checkpoint", transports=())

"""Whether a run can have the loss that balances the experts of a mixture."""

from __future__ import annotations

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.trainer.step.objective import ObjectiveConfig


def check_balancing(objective: ObjectiveConfig, model: LALM) -> None:
    """Refuse a balancing loss that would not be there.

    Raises:
        CordError: the model has no experts.
    """
    if not objective.router_aux_loss:
        return
    if model.routing is None:
        raise CordError("objective.router_aux_loss balances experts, and the model has none; leave it at 0")

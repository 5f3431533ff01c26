"""How often the host may wait for the device in each phase of a run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """Waits of a phase: so many in each step, more for each microbatch, and more in the first step of a process."""

    step: int
    microbatch: int = 0
    first: int = 0

    def allowed(self, steps: int, microbatches: int) -> int:
        """Return how many waits these steps may have."""
        return self.step * steps + self.microbatch * microbatches + (self.first if steps else 0)


_IS_0_16 = importlib.metadata.version("megatron-core").startswith("0.16.")
#: In Megatron-Core 0.19 the first update of a process makes a flag on the device and reads it: whether any rank has a
#: parameter with a gradient norm of its own (`has_grad_norm_group`).
_FIRST_UPDATE = 0 if _IS_0_16 else 2

#: Of one update a step, on any layout without tensor, context or pipeline parallelism. An update reads from the device
#: whether the losses and the gradients are finite here and on all ranks (3), the gradient norm (1, and an empty flag of
#: Megatron's that is sent), the token results, the measurements and the phases' times (3), and among several ranks, to
#: tell all of them the token results (2).
BUDGETS = {
    "update": Budget(10, first=_FIRST_UPDATE),
    "weight_sync": Budget(0),
    "record": Budget(1),
}
#: The backward pass of Megatron's vocabulary-parallel embedding counts the rows that it masks.
TENSOR_PARALLEL = BUDGETS | {"update": Budget(10, microbatch=1, first=_FIRST_UPDATE)}
#: Context parallelism reads how many tokens the other ranks hold, and checks their positions.
CONTEXT_PARALLEL = BUDGETS | {"update": Budget(10, microbatch=3, first=_FIRST_UPDATE)}
#: Megatron's pipeline schedule sends the shapes of what it will send, reads those that come, and waits for the device
#: after each exchange (`batch_p2p_sync`): for each microbatch, in the passes of teacher and student. A weight sync
#: reads what each tensor is.
PIPELINE = {"update": Budget(10, microbatch=12, first=_FIRST_UPDATE), "record": Budget(1)}


def with_experts(budgets: Mapping[str, Budget], passes: int = 2) -> dict[str, Budget]:
    """Return the budgets of the same layout with experts in both layers of the tiny model.

    In each layer and pass the dispatch of tokens waits for the numbers of an expert's tokens; in Megatron-Core 0.16 it
    also permutes tokens and probabilities by a mask, and waits for its size twice. An update reads what routers chose,
    and before each of its three schedules how many microbatches the other ranks have. A weight sync reads what each
    expert's matrix is.

    Args:
        budgets: of the layout.
        passes: of teacher and student forward, and one more where layers are computed again.
    """
    update = budgets["update"]
    microbatch = update.microbatch + 2 * passes * (3 if _IS_0_16 else 1)
    others = {phase: budget for phase, budget in budgets.items() if phase != "weight_sync"}
    first = 2 * update.first  # experts have an optimizer of their own
    return others | {"update": replace(update, step=update.step + 4, microbatch=microbatch, first=first)}

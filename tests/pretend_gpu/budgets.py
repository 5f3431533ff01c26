"""How often the host may wait for the device in each phase of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Waits of a phase in one step: so many, and more for each microbatch."""

    step: int
    microbatch: int = 0


#: Of one update a step, on any layout without tensor, context or pipeline parallelism. An update reads from the device
#: whether the losses and the gradients are finite here and on all ranks (3), the gradient norm (1, and an empty flag of
#: Megatron's that is sent), the token results, the measurements and the phases' times (3), and among several ranks, to
#: tell all of them the token results (2).
BUDGETS = {
    "update": Budget(10),
    "weight_sync": Budget(0),
    "record": Budget(1),
}
#: The backward pass of Megatron's vocabulary-parallel embedding counts the rows that it masks.
TENSOR_PARALLEL = BUDGETS | {"update": Budget(10, microbatch=1)}
#: Context parallelism reads how many tokens the other ranks hold, and checks their positions.
CONTEXT_PARALLEL = BUDGETS | {"update": Budget(10, microbatch=3)}
#: Megatron's pipeline schedule sends the shapes of what it will send, reads those that come, and waits for the device
#: after each exchange (`batch_p2p_sync`): for each microbatch, in the passes of teacher and student. A weight sync
#: reads what each tensor is.
PIPELINE = {"update": Budget(10, microbatch=12), "record": Budget(1)}

"""What autograd is doing in this thread."""

from __future__ import annotations

import torch


def in_backward_pass() -> bool:
    """Return whether autograd runs a backward pass now; what is computed again for it is part of it."""
    return torch._C._current_graph_task_id() != -1

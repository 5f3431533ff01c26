"""Tags of scalars in trackers: the metric's name in `metrics.jsonl` behind the group in which trackers show it."""

from __future__ import annotations

import re

#: Group → which metrics it has. A metric's group is the first that matches its whole name.
_GROUPS = {
    "time": r"seconds(_.*)?",
    "speed": r"tokens_per_second(_.*)?|model_tflops|model_flop_utilisation",
    "tokens": r"tokens_.*",
    "memory": r"memory_.*",
    "optimizer": r"learning_rate(_.*)?|grad_norm|gradient_.*|policy_weight|updates|skipped",
    "rollout": r"reward(_.*)?|(.*_)?groups|filtered|response_tokens|truncated|repetition|judge_.*|staleness(_.*)?"
    r"|engine_.*|stale_.*|importance_.*",
    "loss": r".*loss.*|kl(_.*)?|entropy(_.*)?|ratio(_.*)?|clipped_.*",
    "experts": r"experts/.*",
    "data": r"damaged_samples|epoch",
    "run": r"alerts",
}


def tag(name: str) -> str:
    """Return a metric's tag, GROUP/NAME, which may be its name already; what no group has is in "other"."""
    if "/" in name and name.partition("/")[0] in _GROUPS:
        return name
    group = next((group for group, names in _GROUPS.items() if re.fullmatch(names, name)), "other")
    return f"{group}/{name}"

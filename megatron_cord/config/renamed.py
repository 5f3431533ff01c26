"""Configuration keys that were renamed: a file that has an old one is refused with the new one."""

from __future__ import annotations

#: Old dotted key → new dotted key. A key that went without a successor has the sentence that says what to do instead.
RENAMED: dict[str, str] = {
    "rollout.exchange": "rollout.weight_sync",
    "rollout.exchange.way": "rollout.weight_sync.transport",
    "rollout.on_exchange": "rollout.on_weight_sync",
    "exchange": "weight_sync",
    "exchange.way": "weight_sync.transport",
    "ways": "transports",
}

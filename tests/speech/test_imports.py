"""Speech is a tool that makes data; training reads what it made."""

from __future__ import annotations

from tests.test_architecture import imports


def test_training_never_imports_speech() -> None:
    """Would catch a trainer that needs synthesizers, and a room below that reaches into this one."""
    graph = imports()
    reached, waiting = set(), ["megatron_cord.train", "megatron_cord.evaluate"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph[module]
    assert len(reached) > 50 and "megatron_cord.data.loader" in reached
    assert not [module for module in reached if module.startswith("megatron_cord.speech")]

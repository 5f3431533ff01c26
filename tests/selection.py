"""Which of a module's parametrized cases the command line selected, so that a shared fixture prepares only those."""

from __future__ import annotations

import pytest


def selected(request: pytest.FixtureRequest, *names: str) -> set[object]:
    """Return the values of the parameters `names` in the selected tests of the requesting module: a value, or a tuple.

    Marks such as `slow` are applied before fixtures run, so what they leave out is not among them.
    """
    found: set[object] = set()
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == request.path and parameters.keys() >= set(names):
            values = tuple(parameters[name] for name in names)
            found.add(values if len(names) > 1 else values[0])
    return found


def slow_if(condition: bool) -> tuple[pytest.MarkDecorator, ...]:
    """Return the marks of a case that only `make test-full` runs."""
    return (pytest.mark.slow,) if condition else ()

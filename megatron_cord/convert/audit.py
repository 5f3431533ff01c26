"""Whether a checkpoint's tensors are those of the model: missing, unexpected, duplicated and misshapen ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from megatron_cord.convert.names import global_parameters, hf_shapes, tensor_map_of
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorRule


class Audit:
    """A comparison of a stream of names and shapes with this rank's part of a model.

    Attributes:
        parameters: this rank's parameters, as `global_parameters`.
    """

    def __init__(self, model: LALM) -> None:
        self.parameters = global_parameters(model)
        self._layout = model.layout
        self._table = tensor_map_of(model)
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._by_trait: dict[tuple[str, ...], list[str]] = {}  # expected names by their ending, and by their numbers

    def admit(self, given: str, name: str, shape: Sequence[int]) -> TensorRule | None:
        """Return the rule of a tensor; None if it is another stage's, or a problem.

        Args:
            given: the tensor's name as its file spells it.
            name: its published name.
            shape: its sizes.
        """
        rule = self._table.by_hf_name.get(name)
        if rule is None:
            nearest = self._nearest(name)
            self._problems.append(f"unexpected tensor {given}" + (f" (nearest expected: {nearest})" if nearest else ""))
            return None
        if name in self._seen:
            self._problems.append(f"tensor {given} occurs twice")
            return None
        self._seen.add(name)
        if rule.megatron not in self.parameters:
            return None
        expected = hf_shapes(self.parameters[rule.megatron], rule, self._layout)[name]
        if tuple(shape) != tuple(expected):
            self._problems.append(f"tensor {given} has shape {list(shape)}, expected {list(expected)}")
            return None
        return rule

    def problems(self) -> list[str]:
        """Return all problems, once all tensors have been admitted."""
        missing = (f"missing tensor {name}" for name in self._table.by_hf_name if name not in self._seen)
        return [*self._problems, *missing]

    def _nearest(self, name: str) -> str | None:
        """Return the most similar expected name.

        It is searched among names with the same ending or the same numbers first: thousands of names, as in a
        checkpoint under another prefix, would otherwise take minutes.
        """
        if not self._by_trait:
            for expected in self._table.by_hf_name:
                for trait in (_ending(expected), _numbers(expected)):
                    self._by_trait.setdefault(trait, []).append(expected)
        candidates = (
            self._by_trait.get(_ending(name)) or self._by_trait.get(_numbers(name)) or list(self._table.by_hf_name)
        )
        found = difflib.get_close_matches(name, candidates, n=1)
        return found[0] if found else None


def _ending(name: str) -> tuple[str, ...]:
    return ("ends with", *name.split(".")[-2:])


def _numbers(name: str) -> tuple[str, ...]:
    return ("numbers", *(part for part in name.split(".") if part.isdecimal()))


def check_problems(problems: Iterable[str]) -> None:
    """Raise CordError with all problems of one or several audits, each once, if there are any."""
    once = list(dict.fromkeys(problems))
    if once:
        unexpected = any(problem.startswith("unexpected") for problem in once)
        rule = "; a tensor without a place in the model is another model's, and is not dropped" if unexpected else ""
        raise CordError(
            f"the checkpoint does not fit the model's architecture ({len(once)} problems): {'; '.join(once)}{rule}"
        )

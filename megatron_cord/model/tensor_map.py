"""The table of a family's tensors: which Hugging Face tensors make which Megatron tensor, and in which layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cord.model.tensor_layouts import TensorLayout

EXPERTS = ".mlp.experts."  #: in the names of experts' tensors and modules, in front of the expert's number


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor.

    Attributes:
        megatron: its name in the whole model, layers numbered over all pipeline stages.
        hf: the names of its Hugging Face parts in the layout's order; None where the family has no such tensor.
        layout: how the parts are joined and split.
    """

    megatron: str
    hf: tuple[str | None, ...]
    layout: TensorLayout

    @property
    def is_expert(self) -> bool:
        """Whether it is one expert's, which expert-parallel ranks share out."""
        return EXPERTS in self.megatron

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the parts that exist."""
        return tuple(name for name in self.hf if name is not None)


class TensorMap:
    """All rules of a model, in the order in which tensors are streamed."""

    def __init__(self, rules: list[TensorRule]) -> None:
        self.rules = rules
        self.by_hf_name = {name: rule for rule in rules for name in rule.hf_names}
        self.by_megatron_name = {rule.megatron: rule for rule in rules}

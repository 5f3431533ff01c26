"""Experts as transformers has them in memory, all of a layer in two tensors, and as files have them, each by itself.

Legend: E experts, F the width of one, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def published_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield views of a tensor under published names: itself, or each expert's parts [F, H], [F, H] and [H, F].

    Args:
        name: in transformers' model, or of such a tensor under a checkpoint's prefix.
        tensor: of any content, such as a gradient; experts' are [E, 2 F, H] and [E, H, F].
    """
    if name.endswith(_GATE_UP):
        for i, expert in enumerate(tensor):
            gate, up = expert.chunk(2)
            before = f"{name.removesuffix(_GATE_UP)}.experts.{i}"
            yield f"{before}.gate_proj.weight", gate
            yield f"{before}.up_proj.weight", up
    elif name.endswith(_DOWN):
        for i, expert in enumerate(tensor):
            yield f"{name.removesuffix(_DOWN)}.experts.{i}.down_proj.weight", expert
    else:
        yield name, tensor

"""Adapters of experts as peft writes them beside transformers' fused experts, taken apart into each expert's own.

transformers keeps the matrices of a layer's experts in two tensors, gate_up_proj [E, 2 F, H] and down_proj [E, H, F].
peft's A and B beside one are [E R, in], an expert's rows one below the other, and [out, R E], the columns of one rank
of all experts side by side (`ParamWrapper`, peft 0.21). Gate and up then share A. Where peft loaded adapters with an A
each, R is 2 r, A is both, and B has zeros in the blocks between gate and up.
Legend: E experts, F the width of one, H hidden, r the adapter's rank, R that of A and B beside a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_cord.errors import CordError

SHARED = ".mlp.shared_expert."  #: in the names of a shared expert's modules
_EXPERTS, _INNER = ".mlp.experts", ".base_layer"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_PATTERN = rf".*\.{_GATE_UP}"  #: peft's own, for gate and up that have an A each


def takes_apart(name: str, given: Any, config: Mapping[str, Any]) -> bool:
    """Return whether a setting of peft is one under which `each_experts` knows what the tensors are.

    Args:
        name: of the setting.
        given: its value.
        config: all of them.
    """
    if name in ("rank_pattern", "alpha_pattern"):  # both, or gate and up would have another scale
        patterns = config.get("rank_pattern"), config.get("alpha_pattern")
        return patterns == ({_PATTERN: 2 * config["r"]}, {_PATTERN: 2 * config["lora_alpha"]})
    if name == "target_parameters":
        return all(str(target).rpartition(".")[2] in (_GATE_UP, _DOWN) for target in given)
    return False


def each_experts(factors: Mapping[str, Tensor], config: Mapping[str, Any], experts: int) -> dict[str, Tensor]:
    """Return the factors with those beside fused experts replaced by each expert's.

    Args:
        factors: A and B by module, `MODULE.lora_A.weight`.
        config: peft's.
        experts: of each layer; 0 without a mixture.

    Raises:
        CordError: A or B of another size, or a B under which gate and up cannot have an A each of the rank.
    """
    targets = {str(target).rpartition(".")[2] for target in config.get("target_parameters") or ()}
    found: dict[str, Tensor] = {}
    for name, a in factors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        layer = module.removesuffix(_INNER)
        if not layer.endswith(_EXPERTS):
            found[name] = a
        elif f"{module}.lora_A.weight" not in factors:
            raise CordError(f"the adapter has {name} without its lora_A")
        elif factor == "lora_A":
            # peft wraps the first of two tensors inside the second.
            kind = _GATE_UP if layer != module or _DOWN not in targets else _DOWN
            b = factors.get(f"{module}.lora_B.weight")
            if b is None or not experts or a.shape[0] % experts or a.shape[0] != b.shape[1]:
                raise CordError(f"the adapter's {name} is not of {experts} experts, or lacks its lora_B")
            a = a.view(experts, -1, a.shape[1])  # [E, R, in]
            b = b.view(len(b), -1, experts).permute(2, 0, 1)  # [E, out, R]
            for number in range(experts):
                for part, (own_a, own_b) in _parts(kind, a[number], b[number], int(config["r"]), name).items():
                    found[f"{layer}.{number}.{part}.lora_A.weight"] = own_a.contiguous()
                    found[f"{layer}.{number}.{part}.lora_B.weight"] = own_b.contiguous()
    return found


def _parts(kind: str, a: Tensor, b: Tensor, rank: int, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A [r, in] and B [out, r] of one expert's matrices from those beside the tensor, [R, in] and [out, R]."""
    if kind == _DOWN:
        return {"down_proj": (a, b)}
    gate, up = b.chunk(2)
    if len(a) != 2 * rank:
        return {"gate_proj": (a, gate), "up_proj": (a, up)}
    if torch.any(gate[:, rank:]) or torch.any(up[:, :rank]):
        raise CordError(
            f"the adapter's {name} has a rank of {2 * rank} that gate and up share; merge it into its base with peft "
            "(merge_and_unload) and train that"
        )
    return {"gate_proj": (a[:rank], gate[:, :rank]), "up_proj": (a[rank:], up[:, rank:])}

"""Parameters of LoRA: those that a rank holds, and those of the whole model.

Legend: r rank, H hidden, F ffn size, D head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_cord.plan.parameters import expert_count, part_counts, rank_counts, rank_layers

if TYPE_CHECKING:
    from megatron_cord.model.architecture import AdapterArchitecture, Architecture
    from megatron_cord.model.config import LoraConfig, ModelConfig
    from megatron_cord.model.lora.targets import LoraTarget

_LAYERS = "language_model.decoder.layers."


def lora_count(
    config: ModelConfig,
    arch: Architecture,
    tp: int = 1,
    pp: int = 1,
    stage: int = 0,
    stages: Sequence[int] = (),
    ep: int = 1,
) -> int:
    """Count A and B on one tensor-parallel rank of a pipeline rank (from 0); by default those of the whole model.

    Arguments are those of `rank_counts`.

    Raises:
        CordError: as `find_targets`.
    """
    return sum(_counts(config, arch, tp, pp, stage, stages, ep))


def trained_count(
    config: ModelConfig, arch: Architecture, tp: int, pp: int, stage: int, stages: Sequence[int] = (), ep: int = 1
) -> int:
    """Count what is trained on one rank of a pipeline rank: whole weights and LoRA.

    Raises:
        CordError: as `find_targets`.
    """
    whole = rank_counts(arch, tp, pp, stage, stages, ep).trained(config.trained_parts)
    return whole + lora_count(config, arch, tp, pp, stage, stages, ep)


def trained_expert_count(
    config: ModelConfig, arch: Architecture, pp: int, stage: int, stages: Sequence[int] = (), ep: int = 1
) -> int:
    """Count those of `trained_count` that are experts', or of LoRA beside them.

    Raises:
        CordError: as `find_targets`.
    """
    if "language_model" in config.trained_parts:
        return expert_count(arch, rank_layers(arch, pp, stage, stages), ep)
    return _counts(config, arch, 1, pp, stage, stages, ep)[1]


def _counts(
    config: ModelConfig, arch: Architecture, tp: int, pp: int, stage: int, stages: Sequence[int], ep: int
) -> tuple[int, int]:
    """Count A and B of one rank: beside all but experts, and beside experts on the rank with the most of them."""
    if not config.lora.enabled:
        return 0, 0
    dense, by_rank = 0, [0] * ep
    for kind, numbers in _matrices(arch, config.lora, tuple(config.freeze)).items():
        if _rank_of(kind.layer, arch, pp, stages) != stage:
            continue
        cut_rows, cut_columns = (tp if kind.shard_dim == dim else 1 for dim in (0, 1))
        size = sum(config.lora.rank * (rows // cut_rows + kind.columns // cut_columns) for rows in kind.rows)
        for number, times in numbers.items():
            if number is None:
                dense += times * size
            else:
                assert arch.language.experts is not None
                by_rank[number * ep // arch.language.experts.count] += times * size
    return dense, max(by_rank)


@dataclass(frozen=True)
class _Kind:
    """What matrices of one layer have in common, by which their A and B are counted.

    Attributes:
        layer: of the language model; None elsewhere.
        shard_dim: the dimension that tensor-parallel ranks share out, if any.
        rows: of each part that has LoRA.
        columns: of the matrix.
    """

    layer: int | None
    shard_dim: int | None
    rows: tuple[int, ...]
    columns: int


# A search for layouts counts the same matrices hundreds of times, and a large mixture has ten thousands of them.
@lru_cache(maxsize=8)
def _matrices(arch: Architecture, lora: LoraConfig, freeze: tuple[str, ...]) -> dict[_Kind, Counter[int | None]]:
    """Return how many matrices with LoRA there are of each kind: by the expert's number, None for all others."""
    # These import torch, which this room does not need otherwise.
    from megatron_cord.model.lora.targets import find_targets
    from megatron_cord.model.tensor_map import EXPERTS

    found: dict[_Kind, Counter[int | None]] = {}
    for target in find_targets(arch, lora, freeze):
        rows, columns = _sizes(target, arch)
        adapted = tuple(size for part, size in zip(target.parts, rows, strict=True) if part is not None)
        in_layer = target.module.startswith(_LAYERS)
        layer = int(target.module.removeprefix(_LAYERS).partition(".")[0]) if in_layer else None
        number = int(target.module.partition(EXPERTS)[2].partition(".")[0]) if target.is_expert else None
        kind = _Kind(layer, target.layout.shard_dim, adapted, columns)
        found.setdefault(kind, Counter())[number] += 1
    return found


def merged_count(config: ModelConfig, arch: Architecture) -> int:
    """Count the parameters of the matrices that have LoRA: what a weight sync of merged weights sends.

    Raises:
        CordError: as `find_targets`.
    """
    if not config.lora.enabled:
        return 0
    from megatron_cord.model.lora.targets import find_targets

    sizes = (_sizes(target, arch) for target in find_targets(arch, config.lora, config.freeze))
    return sum(sum(rows) * columns for rows, columns in sizes)


def sync_bytes(config: ModelConfig, arch: Architecture) -> tuple[int, int]:
    """Return what a weight sync sends: with merged weights, and where servers merge LoRA themselves.

    Raises:
        CordError: as `find_targets`.
    """
    whole = part_counts(arch).trained(config.trained_parts)
    item = config.torch_dtype.itemsize
    return (whole + merged_count(config, arch)) * item, (whole + lora_count(config, arch)) * item


def _rank_of(layer: int | None, arch: Architecture, pp: int, stages: Sequence[int]) -> int:
    if layer is None:
        return 0
    ends = accumulate(stages or (arch.language.num_layers // pp,) * pp)
    return next(number for number, end in enumerate(ends) if layer < end) % pp


def _sizes(target: LoraTarget, arch: Architecture) -> tuple[tuple[int, ...], int]:
    """Return the rows of each part of a matrix, and its columns."""
    part, _, name = target.module.partition(".")
    kind = name.rpartition(".")[2]
    if part == "adapter":
        assert arch.adapter is not None
        assert arch.encoder is not None
        return _adapter_sizes(arch.adapter, kind, arch.encoder.hidden_size, arch.language.hidden_size)
    if part == "language_model":
        lm = arch.language
        h, queries, keys = lm.hidden_size, lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
        is_shared = lm.experts is not None and ".shared_experts." in name
        f = lm.experts.shared_ffn_hidden_size if lm.experts is not None and is_shared else lm.ffn_hidden_size
        return {
            "linear_qkv": ((queries, keys, keys), h),
            "linear_proj": ((h,), queries),
            "linear_fc1": ((f, f), h),
            "linear_fc2": ((h,), f),
        }[kind]
    assert arch.encoder is not None
    h, f = arch.encoder.hidden_size, arch.encoder.ffn_hidden_size
    return {
        "linear_qkv": ((h, h, h), h),
        "linear_proj": ((h,), h),
        "linear_fc1": ((f,), h),
        "linear_fc2": ((h,), f),
    }[kind]


def _adapter_sizes(adapter: AdapterArchitecture, kind: str, audio: int, out: int) -> tuple[tuple[int], int]:
    if kind == "linear":
        return (out,), audio
    if kind == "linear2":
        return (out,), adapter.hidden_size
    return (adapter.mlp_rows,), audio * (1 if adapter.kind == "convolution" else adapter.stride)

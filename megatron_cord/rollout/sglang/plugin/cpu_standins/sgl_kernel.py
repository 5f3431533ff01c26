"""Stands in for SGLang's compiled kernels on a CPU: the one that plain decoding calls, and names that others import."""

from __future__ import annotations

from typing import Any


def assign_req_to_token_pool_cpu(req: Any, table: Any, start: Any, end: Any, loc: Any, pool_len: int) -> None:
    """Write into table [requests, tokens] which slots of the cache the new tokens of each request have."""
    offset = 0
    for row, first, last in zip(req.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = loc[offset : offset + last - first]
        offset += last - first


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("this kernel is not part of the CPU stand-in")


copy_all_layer_kv_cache_cpu = rotate_input_ids_cpu = fill_accept_out_cache_loc_cpu = fill_bonus_tokens_cpu = _missing
assign_draft_cache_locs_contiguous_cpu = assign_extend_cache_locs_cpu = build_tree_kernel_efficient_cpu = (
    verify_tree_greedy_cpu
) = _missing

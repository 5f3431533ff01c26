"""Audio placeholders of a microbatch: checked against the clips' audio features, and found in host memory.

Legend: B sequences, S padded length, T packed tokens, C clips.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture


def true_rows(mask: Tensor) -> Tensor:
    """Return int64 [n], where a mask in host memory is true, its dimensions taken as one."""
    return mask.reshape(-1).nonzero().squeeze(1)


def placeholders_per_sample(is_placeholder: Tensor, cu_seqlens: tuple[int, ...] | None) -> list[int]:
    """Count the placeholders of each of B samples; is_placeholder is bool [B, S], or [1, T] with cu_seqlens."""
    if cu_seqlens is None:
        return is_placeholder.sum(1).tolist()
    before = torch.nn.functional.pad(is_placeholder[0].cumsum(0), (1, 0)).tolist()
    return [before[end] - before[start] for start, end in pairwise(cu_seqlens)]


def refuse_tokens(token_ids: Tensor, arch: Architecture, sample_ids: tuple[str, ...]) -> None:
    """Raise CordError if there is a placeholder of what is not trained here; token_ids is in host memory."""
    for index, what in arch.refused_tokens:
        if bool((token_ids == index).any()):
            raise CordError(
                f"samples {', '.join(sample_ids)}: token {index} stands for {what}, and of {arch.model_type} only "
                "audio and text are trained; take the sample out"
            )


def check_placeholders(placeholders: list[int], features: list[int], sample_ids: tuple[str, ...]) -> None:
    """Raise CordError unless whole clips, one after the other, fill each sample's placeholders.

    Args:
        placeholders: number in each of B samples.
        features: number of each of C clips, in the samples' order.
        sample_ids: B names.
    """
    cure = (
        "likely cause: a prompt that was built for another checkpoint's rate of audio tokens, or cut off in its audio, "
        "or clips of another sample; build the prompts with this checkpoint's own processor, and give each sample its "
        "own clips"
    )
    clips = iter(features)
    for name, wanted in zip(sample_ids, placeholders, strict=True):
        found = 0
        while found < wanted and (clip := next(clips, None)) is not None:
            found += clip
        if found != wanted:
            raise CordError(f"sample {name}: {wanted} audio placeholder tokens but {found} audio features; {cure}")
    if left := sum(clips):
        raise CordError(
            f"samples {', '.join(sample_ids)}: {left} more audio features than audio placeholder tokens; {cure}"
        )

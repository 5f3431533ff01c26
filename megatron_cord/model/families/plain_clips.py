"""Clips in the prompts of models in plain torch: each is encoded alone and takes the place of its placeholders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def place_clips(
    embedded: Tensor,
    is_placeholder: Tensor,
    features: Tensor,
    mask: Tensor,
    encode_audio: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return embeddings with each placeholder's replaced by a clip's token, in order.

    Legend: B sequences, S tokens, C clips, H the language model's width.

    Args:
        embedded: [B, S, H].
        is_placeholder: bool [B, S].
        features: [C, mels, frames] of all clips in the batch's order.
        mask: int64 [C, frames], 1 where a frame is a clip's own.
        encode_audio: maps one clip [mels, frames] and the number of its own frames to tokens [tokens, H].
    """
    lengths = mask.sum(1).tolist()
    audio = torch.cat([encode_audio(clip, frames) for clip, frames in zip(features, lengths, strict=True)])
    return embedded.masked_scatter(is_placeholder[..., None], audio.to(embedded.dtype))

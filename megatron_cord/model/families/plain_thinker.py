"""What the thinkers of omni models share outside Megatron: no vision tower, and each clip encoded as if it were alone.

Legend: C clips, B sequences, S tokens, H the language model's width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_cord.model.families.plain_clips import place_clips


class PlainThinker:
    """Methods of a class that is derived from transformers' thinker; checkpoints of a whole model are read by it.

    Args:
        config: of the thinker.
    """

    #: of a whole checkpoint; conversions carry them
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"(^|\.)visual\.",
        r"^talker\.",
        r"^code2wav\.",
        r"^token2wav\.",
        r"\.audio_bos_eos_token\.",
    ]
    audio_tower: Any
    config: Any
    dtype: torch.dtype
    get_input_embeddings: Any
    model: Any
    visual: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        del self.visual

    def encode_audio(self, features: Tensor, num_frames: int) -> Tensor:
        """Encode one clip [mels, at least num_frames] to tokens [tokens, H]; what follows its frames is not read."""
        frames = torch.tensor([num_frames], device=features.device)
        encoded = self.audio_tower(features[:, :num_frames].to(self.dtype), feature_lens=frames)
        tokens: Tensor = encoded.last_hidden_state
        return tokens

    def hidden(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Return hidden states of a batch, as transformers' models do.

        Args:
            input_ids: int64 [B, S], with one placeholder for each token of a clip.
            input_features: [C, mels, frames] of all clips in the batch's order; None without audio.
            feature_attention_mask: int64 [C, frames], 1 where a frame is a clip's own.
            settings: attention_mask, position_ids, past_key_values and use_cache of the language model.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if input_features is not None and feature_attention_mask is not None:
            is_placeholder = torch.eq(input_ids, self.config.audio_token_id)
            embedded = place_clips(embedded, is_placeholder, input_features, feature_attention_mask, self.encode_audio)
        return self.model(inputs_embeds=embedded, **settings)

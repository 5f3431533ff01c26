"""SGLang's Qwen2-Audio, but the encoder does not attend to padding, a prompt may have several clips, and any decoder.

A clip fills the encoder's window with padding. transformers and the trainer mask it; SGLang 0.5.21 lets the encoder
attend to it, and its answers and log-probabilities are another model's, the more so the shorter the clip.

SGLang splits the clips of a prompt into one item each, but notes the lengths of all of them with the first item alone,
and a server dies of the second. Here each clip's length is read from its own attention mask.

SGLang builds a Qwen2 whatever text model the configuration names; here it is the one that it names. The processor of
prompts is SGLang's own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder, Qwen2AudioMultiModalProjector

from cord_models.speech import SpeechModel


class Qwen2AudioForConditionalGeneration(SpeechModel):  # type: ignore[misc]
    """Found by this name, which is the architecture's in the checkpoint."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.audio_tower: Any = Qwen2AudioEncoder(config.audio_config)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config)

    def encode_audio(self, items: list[Any]) -> torch.Tensor:
        """Return audio features [tokens of all clips, H], as transformers computes them."""
        tower = self.audio_tower
        features = torch.cat([item.feature for item in items]).to(tower.conv1.weight)  # [clips, mels, frames]
        frames = (
            torch.cat([item.feature_attention_mask.reshape(-1, features.shape[-1]) for item in items])
            .to(features.device)
            .sum(-1)
        )
        positions, tokens = tower._get_feat_extract_output_lengths(frames)
        is_audio = torch.arange(tower.config.max_source_positions, device=features.device) < positions[:, None]
        mask = create_bidirectional_mask(
            config=tower.config, inputs_embeds=features.new_zeros(*is_audio.shape, 1), attention_mask=is_audio.long()
        )
        embedded = self.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
        return torch.cat([clip[:length] for clip, length in zip(embedded, tokens.tolist(), strict=True)])


EntryClass = Qwen2AudioForConditionalGeneration

"""SGLang's Qwen3-Omni, but each clip is encoded as if it were alone.

SGLang 0.5.21 joins the features of clips from different prompts, which are padded to different lengths, and a server
dies of it. It also pads the chunks of all of them to the longest, on which the last token of a clip below a second
depends; the trainer's does not depend on other clips.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.qwen3_omni_moe import Qwen3OmniMoeForConditionalGeneration as Served
from sglang.srt.models.qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration


class _Thinker(Qwen3OmniMoeThinkerForConditionalGeneration):  # type: ignore[misc]
    """SGLang's, with clips apart."""

    def get_audio_feature(self, items: list[Any]) -> torch.Tensor:
        """Return audio features [tokens of all clips, H], as transformers computes them of each clip."""
        tower = self.audio_tower
        weight, encoded = tower.conv2d1.weight, []
        for item in items:
            features = item.feature.to(weight)  # [clips, mels, frames]
            masks = item.feature_attention_mask.reshape(-1, features.shape[-1])
            for clip, frames in zip(features, masks.sum(-1).tolist(), strict=True):
                lengths = torch.tensor([frames], device=weight.device)
                encoded.append(tower(clip[:, :frames], feature_lens=lengths).last_hidden_state.flatten(0, -2))
        return torch.cat(encoded)


class Qwen3OmniMoeForConditionalGeneration(Served):  # type: ignore[misc]
    """Found by this name, which is the architecture's in the checkpoint."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.thinker.__class__ = _Thinker  # SGLang's class names that of its thinker itself


EntryClass = Qwen3OmniMoeForConditionalGeneration

"""SGLang's Voxtral with the trainer's prompts: any number of recordings, each where the prompt has it.

SGLang 0.5.21 has the model. Its processor takes a prompt apart as text and puts all recordings behind the last
``[INST]``; the one here takes ids, each recording's placeholders where they stand. The model computes features itself,
so a recording is handed on as it is, and is encoded with the silence that fills its window, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from sglang.srt.models.voxtral import VoxtralForConditionalGeneration as Served
from torch import Tensor

from cord_models.speech import ClipRules, SpeechProcessor


class VoxtralForConditionalGeneration(Served):  # type: ignore[misc]
    """Found by this name, which is the architecture's in the checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors one by one; SGLang's collects all of them first, a second model in memory."""
        for pair in weights:
            super().load_weights([pair])


class VoxtralProcessor(SpeechProcessor):  # type: ignore[misc]
    """Prompts with recordings; one placeholder is ``[AUDIO]``."""

    models: ClassVar[list[type]] = [VoxtralForConditionalGeneration]

    def rules(self) -> ClipRules:
        """Return what Voxtral makes of a recording: as much as of a whole window."""
        audio = self.hf_config.audio_config
        window = 2 * audio.max_source_positions
        tokens = audio.max_source_positions // (audio.intermediate_size // audio.hidden_size)
        return ClipRules(
            placeholder=self.hf_config.audio_token_id,
            num_mels=audio.num_mel_bins,
            window_frames=window,
            longest_frames=window,
            tail_frames=None,
            num_tokens=lambda _: tokens,
        )

    def feature(self, waveform: np.ndarray, frames: int) -> Any:
        """Return the recording itself [samples]."""
        return torch.from_numpy(np.asarray(waveform, np.float32))


EntryClass = VoxtralForConditionalGeneration

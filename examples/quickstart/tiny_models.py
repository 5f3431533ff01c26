"""The tiny models of the quickstart as its warm-up sees them: hidden states of written and of spoken questions.

Shapes: B sequences, L tokens, C clips (one a sequence), A audio features, H hidden.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from examples.quickstart.checkpoint import save_checkpoint
from examples.quickstart.omni_checkpoint import load_thinker, save_weights
from megatron_cord.data.samples import AudioClip
from megatron_cord.model.families import model_type_of
from megatron_cord.runtime.quiet import no_progress_bars


class TinyModel(Protocol):
    """A model in transformers.

    Attributes:
        module: with its parameters; those that are not trained require no gradient.
        hidden_size: H.
    """

    module: nn.Module
    hidden_size: int

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states [B, L, H] of written sequences; ids and mask are int64 [B, L]."""
        ...

    def audio(self, ids: Tensor, mask: Tensor, clips: list[AudioClip]) -> tuple[Tensor, Tensor]:
        """Return hidden states [B, L, H] of spoken ones, and the adapter's outputs [C, A, H], padded."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states."""
        ...

    def save(self, directory: Path) -> None:
        """Write the checkpoint, in the layout of its family."""
        ...


def load_tiny_model(checkpoint_dir: str | Path) -> TinyModel:
    """Load a checkpoint of the quickstart, of either family."""
    omni = model_type_of(checkpoint_dir) == "qwen3_omni_moe"
    with no_progress_bars():
        return _Omni(Path(checkpoint_dir)) if omni else _Qwen2Audio(checkpoint_dir)


class _Qwen2Audio:
    """A tiny Qwen2-Audio."""

    def __init__(self, checkpoint_dir: str | Path) -> None:
        load: Any = Qwen2AudioForConditionalGeneration.from_pretrained
        self.module: Any = load(checkpoint_dir)
        self.module.model.audio_tower.embed_positions.requires_grad_(False)  # Whisper's sinusoids are fixed
        self.hidden_size = int(self.module.config.text_config.hidden_size)
        self._processor = AutoProcessor.from_pretrained(checkpoint_dir)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self.module.model.language_model(input_ids=ids, attention_mask=mask)
        return torch.as_tensor(output.last_hidden_state)

    def audio(self, ids: Tensor, mask: Tensor, clips: list[AudioClip]) -> tuple[Tensor, Tensor]:
        features = torch.stack([clip.features for clip in clips])
        frames = torch.tensor([clip.num_frames for clip in clips])
        adapter_outputs: list[Tensor] = []  # which the model does not return
        hook = self.module.model.multi_modal_projector.register_forward_hook(
            lambda _module, _inputs, output: adapter_outputs.append(output)
        )
        try:
            frame_mask = (torch.arange(features.shape[-1])[None, :] < frames[:, None]).long()
            output = self.module.model(
                input_ids=ids, attention_mask=mask, input_features=features, feature_attention_mask=frame_mask
            )
        finally:
            hook.remove()
        return output.last_hidden_state, adapter_outputs[0]

    def head(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.module.lm_head(hidden))

    def save(self, directory: Path) -> None:
        save_checkpoint(directory, self.module, self._processor)


class _Omni:
    """The thinker of a tiny Qwen3-Omni."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.module: Any = load_thinker(checkpoint_dir)
        self.hidden_size = int(self.module.config.text_config.hidden_size)
        self._source = checkpoint_dir

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.as_tensor(self.module.hidden(ids, attention_mask=mask).last_hidden_state)

    def audio(self, ids: Tensor, mask: Tensor, clips: list[AudioClip]) -> tuple[Tensor, Tensor]:
        frames = torch.cat([clip.features for clip in clips], dim=1)  # each clip's own, one after the other
        lengths = torch.tensor([clip.num_frames for clip in clips])
        tokens = self.module.audio_tower(frames, feature_lens=lengths).last_hidden_state
        embedded = self.module.get_input_embeddings()(ids)
        is_placeholder = (ids == self.module.config.audio_token_id)[..., None]
        embedded = embedded.masked_scatter(is_placeholder, tokens)
        hidden = self.module.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        by_clip = torch.split(tokens, [clip.num_tokens for clip in clips])
        return hidden, pad_sequence(list(by_clip), batch_first=True)

    def head(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.module.lm_head(hidden))

    def save(self, directory: Path) -> None:
        shutil.copytree(self._source, directory, dirs_exist_ok=True)
        save_weights(directory, self.module)

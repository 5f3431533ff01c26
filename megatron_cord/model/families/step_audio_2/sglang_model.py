"""Step-Audio 2 for SGLang, which has no class for it: the trainer's own encoder and adapter before SGLang's Qwen2.

A prompt has one ``<audio_patch>`` for each recording, in the same order. Recordings are at most 25 s long; longer ones
must be cut before, as the trainer does. It runs in SGLang's processes (``rollout/sglang/plugin/external``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens, general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils import add_prefix, load_audio
from step_audio_2_audio import TAIL_FRAMES, Adapter, Encoder
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

_RATE, _HOP = 16000, 160  # samples a second, and from frame to frame


class StepAudio2ForCausalLM(nn.Module):
    """The model; SGLang finds it by this name, which is the architecture's in the checkpoint.

    Each tensor-parallel part holds the whole encoder. Legend: T tokens of all clips, H hidden.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.encoder, self.adapter = Encoder(config), Adapter(config)
        self.language_model = Qwen2ForCausalLM(
            config.text_config, quant_config, prefix=add_prefix("language_model", prefix)
        )
        self._pattern = MultiModalityDataPaddingPatternMultimodalTokens()

    def pad_input_ids(self, input_ids: Any, mm_inputs: Any) -> Any:
        """Return ids with a mark of each clip in its placeholders, so that SGLang can tell equal prompts apart."""
        return self._pattern.pad_input_tokens(input_ids, mm_inputs)

    def encode_audio(self, items: list[MultimodalDataItem]) -> Tensor:
        """Return audio features [T, H]."""
        encoded = [self.adapter(self.encoder(item.feature, item.num_frames)) for item in items]
        counts = [self.config.num_tokens(item.num_frames) for item in items]
        return torch.cat([clip[:count] for clip, count in zip(encoded, counts, strict=True)])

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, **_: Any) -> Any:
        """Return logits, as SGLang calls it at each step."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.AUDIO: self.encode_audio},
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors under the published names, each as it comes.

        Raises:
            KeyError: encoder and adapter have no such tensor.
        """
        own = {name: parameter for name, parameter in self.named_parameters() if not name.startswith("language_model.")}

        def of_language() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(("encoder.", "adapter.")):
                    default_weight_loader(own[name], tensor)
                else:
                    yield name, tensor

        self.language_model.load_weights(of_language())


class StepAudio2Processor(BaseMultimodalProcessor):  # type: ignore[misc]
    """Text with recordings to ids with one placeholder for each of their tokens, and Whisper's features."""

    models: ClassVar = [StepAudio2ForCausalLM]

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self._extractor = WhisperFeatureExtractor(
            feature_size=hf_config.audio.n_mels, sampling_rate=_RATE, hop_length=_HOP
        )

    async def process_mm_data_async(
        self, image_data: Any = None, audio_data: Any = None, input_text: Any = "", **_: Any
    ) -> MultimodalProcessorOutput:
        """Process a request that is not text alone; SGLang answers a ValueError with 400."""
        if image_data:
            raise ValueError("Step-Audio 2 takes no images")
        recordings = audio_data or []
        written = (
            input_text if isinstance(input_text, list) else self._tokenizer.encode(input_text, add_special_tokens=False)
        )
        placeholder = self.hf_config.placeholder
        if written.count(placeholder) != len(recordings):
            raise ValueError(
                f"{written.count(placeholder)} placeholders for {len(recordings)} recordings; each needs one"
            )
        prepared = iter(
            await asyncio.gather(
                *(asyncio.wrap_future(self.io_executor.submit(self._features_of, data)) for data in recordings)
            )
        )
        ids: list[int] = []
        items: list[MultimodalDataItem] = []
        for token in written:
            if token != placeholder:
                ids.append(token)
                continue
            features, frames = next(prepared)
            start = len(ids)
            ids += [placeholder] * self.hf_config.num_tokens(frames)
            items.append(
                MultimodalDataItem(
                    modality=Modality.AUDIO,
                    feature=features,
                    offsets=[(start, len(ids) - 1)],
                    model_specific_data={"num_frames": frames},
                )
            )
        return MultimodalProcessorOutput(mm_items=items, input_ids=ids, audio_token_id=placeholder)

    def _features_of(self, recording: Any) -> tuple[Tensor, int]:
        """Return features [mels, frames + 2], and how many of the frames are the recording's own."""
        waveform = load_audio(recording, _RATE)
        frames = -(-len(waveform) // _HOP)
        longest = self.hf_config.clip_frames
        if frames > longest or self.hf_config.num_tokens(frames) < 1:
            raise ValueError(
                f"a recording of {len(waveform) / _RATE:.2f} s; "
                f"at least one token and at most {longest * _HOP / _RATE:.2f} s"
            )
        window = self.hf_config.window_frames * _HOP
        made = self._extractor(
            waveform,
            sampling_rate=_RATE,
            return_tensors="pt",
            padding="max_length",
            max_length=window,
            truncation=False,
        )
        return made["input_features"][0, :, : frames + TAIL_FRAMES].contiguous(), frames


EntryClass = StepAudio2ForCausalLM

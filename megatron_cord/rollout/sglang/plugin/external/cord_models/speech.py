"""What the project's speech models for SGLang share: the model around a language model of SGLang's, and the processor.

A request is text or ids with one placeholder for each recording, in the same order. Recordings are no longer than the
encoder's window; longer ones must be cut before, as the trainer does. Of tensor-parallel parts of a server each holds
the whole encoder. Legend: T tokens of all clips, H the language model's width.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens, general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils import add_prefix, load_audio
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

RATE, HOP = 16000, 160  # samples a second, and from frame to frame
#: SGLang's decoders by model type: module and class. They are the trainer's.
_DECODERS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}


def decoder(config: Any, quant_config: Any, prefix: str) -> Any:
    """Build SGLang's language model of a text configuration.

    Raises:
        KeyError: a model type that is none of the trainer's.
    """
    module, name = _DECODERS[config.model_type]
    decoder_class = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
    return decoder_class(config, quant_config, prefix=add_prefix("language_model", prefix))


class SpeechModel(nn.Module):
    """Encoder and adapter, which a subclass adds, before a language model of SGLang's.

    Their tensors have the published names. A subclass sets `language_prefix` to what the published names of the
    language model begin with.
    """

    language_prefix: ClassVar[str] = "language_model."

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.language_model = decoder(config.text_config, quant_config, prefix)
        self._pattern = MultiModalityDataPaddingPatternMultimodalTokens()

    def encode_audio(self, items: list[MultimodalDataItem]) -> Tensor:
        """Return audio features [T, H] of clips, one after the other."""
        raise NotImplementedError

    def pad_input_ids(self, input_ids: Any, mm_inputs: Any) -> Any:
        """Return ids with a mark of each clip in its placeholders, so that SGLang can tell equal prompts apart."""
        return self._pattern.pad_input_tokens(input_ids, mm_inputs)

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
        parts = {name.partition(".")[0] for name in own}

        def of_language() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.partition(".")[0] in parts:
                    default_weight_loader(own[name], tensor)
                else:
                    yield name.removeprefix(self.language_prefix), tensor

        self.language_model.load_weights(of_language())


@dataclass(frozen=True)
class ClipRules:
    """What a model makes of a recording.

    Attributes:
        placeholder: the token that stands for each of a clip's.
        num_mels: bands of its features.
        window_frames: log-mel frames that the encoder has positions for.
        longest_frames: of a clip.
        tail_frames: behind a clip's own that the model needs, too; None: the whole window.
        num_tokens: of a clip of so many frames.
    """

    placeholder: int
    num_mels: int
    window_frames: int
    longest_frames: int
    tail_frames: int | None
    num_tokens: Callable[[int], int]


class SpeechProcessor(BaseMultimodalProcessor):  # type: ignore[misc]
    """Text or ids with recordings, to ids with one placeholder for each of their tokens, and Whisper's features.

    An item has its features [mels, frames] and `num_frames`, how many of the frames are the recording's own.
    """

    models: ClassVar[list[type]] = []

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        self._rules = self.rules()
        self._extractor = WhisperFeatureExtractor(feature_size=self._rules.num_mels, sampling_rate=RATE, hop_length=HOP)

    def rules(self) -> ClipRules:
        """Return what the model of `hf_config` makes of recordings."""
        raise NotImplementedError

    async def process_mm_data_async(
        self, image_data: Any = None, audio_data: Any = None, input_text: Any = "", **_: Any
    ) -> MultimodalProcessorOutput:
        """Process a request that is not text alone; SGLang answers a ValueError with 400."""
        if image_data:
            raise ValueError(f"{self.hf_config.model_type} takes no images")
        recordings = audio_data or []
        written = (
            input_text if isinstance(input_text, list) else self._tokenizer.encode(input_text, add_special_tokens=False)
        )
        placeholder = self._rules.placeholder
        if written.count(placeholder) != len(recordings):
            raise ValueError(
                f"{written.count(placeholder)} placeholders for {len(recordings)} recordings; each needs one"
            )
        prepared = iter(
            await asyncio.gather(
                *(asyncio.wrap_future(self.io_executor.submit(self._read, data)) for data in recordings)
            )
        )
        ids: list[int] = []
        items: list[MultimodalDataItem] = []
        for token in written:
            if token != placeholder:
                ids.append(token)
                continue
            feature, frames = next(prepared)
            start = len(ids)
            ids += [placeholder] * self._rules.num_tokens(frames)
            items.append(
                MultimodalDataItem(
                    modality=Modality.AUDIO,
                    feature=feature,
                    offsets=[(start, len(ids) - 1)],
                    model_specific_data={"num_frames": frames},
                )
            )
        return MultimodalProcessorOutput(mm_items=items, input_ids=ids, audio_token_id=placeholder)

    def feature(self, waveform: np.ndarray, frames: int) -> Tensor:
        """Return what the model takes of a recording [samples] that fills so many frames: features [mels, frames]."""
        made = self._extractor(
            waveform,
            sampling_rate=RATE,
            return_tensors="pt",
            padding="max_length",
            max_length=self._rules.window_frames * HOP,
            truncation=False,
        )
        features: Tensor = made["input_features"][0]
        tail = self._rules.tail_frames
        return features if tail is None else features[:, : frames + tail].contiguous()

    def _read(self, recording: Any) -> tuple[Tensor, int]:
        """Return what the model takes of a recording, and how many frames are its own."""
        waveform = load_audio(recording, RATE)
        frames, rules = -(-len(waveform) // HOP), self._rules
        if frames > rules.longest_frames or self._rules.num_tokens(frames) < 1:
            raise ValueError(
                f"a recording of {len(waveform) / RATE:.2f} s; "
                f"at least one token and at most {rules.longest_frames * HOP / RATE:.2f} s"
            )
        return self.feature(waveform, frames), frames

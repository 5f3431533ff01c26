"""Prompts: one sample as two token sequences, spoken and written, which differ only where audio stands for text.

Chat template, tokenizer and feature extractor are the checkpoint's own. Simplification: one user turn with one clip or one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from megatron_cord.data.features import FeatureConfig, log_mel
from megatron_cord.data.samples import AudioClip, Prompt, Sample
from megatron_cord.errors import CordError

_FEWEST_AUDIO_TOKENS = 2  # transformers takes a lone placeholder for one that is still to be expanded


def audio_token_count(frames: int) -> int:
    """How many features Qwen2-Audio's encoder makes of ``frames`` log-mel frames: a convolution of stride 2, then pooling by 2."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


class PromptBuilder:
    """Turns samples into prompts for one checkpoint, and token ids back into text.

    Attributes:
        eos_ids: tokens that end a response.
        pad_id: fills batches.
        audio_token_id: the placeholder, one for each audio feature.
        special_ids: never to be sampled: all special tokens but ``eos_ids``, and ids without a token.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer has tokens.

    Raises:
        CordError: a directory without a processor, or a chat template without one placeholder for a clip.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        directory = Path(checkpoint_dir)
        try:
            processor: Any = AutoProcessor.from_pretrained(directory)
            config: Any = AutoConfig.from_pretrained(directory)
        except (OSError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise CordError(f"{directory}: no processor or configuration to load ({first_line}); give a checkpoint directory") from error
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._features = FeatureConfig.from_checkpoint(directory)
        self.audio_token_id: int = config.audio_token_id
        self.vocab_size: int = config.text_config.vocab_size
        self.eos_ids = self._find_eos(directory)
        self.pad_id: int = self.eos_ids[0] if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        added = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        tokenless = range(len(self._tokenizer), self.vocab_size)
        self.special_ids = tuple(sorted({*self._tokenizer.all_special_ids, *added, *tokenless} - set(self.eos_ids)))
        self._around_audio = self._split_at_placeholder(directory)

    def audio_prompt(self, sample: Sample) -> Prompt:
        """The question as heard; the clip's features are float32 [n_mels, window frames].

        Raises:
            CordError: audio that ``log_mel`` refuses (another rate, longer than the encoder's window …), or too short for the encoder.
        """
        heard = log_mel(sample.waveform, self._features, sampling_rate=sample.sampling_rate, name=sample.id)
        count = audio_token_count(heard.num_frames)
        if count < _FEWEST_AUDIO_TOKENS:
            seconds = len(sample.waveform) / sample.sampling_rate
            raise CordError(f"sample {sample.id}: audio of {seconds:.2f} s is too short for the encoder; drop the sample")
        before, after = self._around_audio
        clip = AudioClip(waveform=sample.waveform, features=heard.log_mel, num_frames=heard.num_frames, num_tokens=count)
        return Prompt(sample_id=sample.id, token_ids=(*before, *[self.audio_token_id] * count, *after), clips=(clip,))

    def text_prompt(self, sample: Sample) -> Prompt:
        """The question as read.

        Raises:
            CordError: an empty question, or words that a word-level vocabulary does not have.
        """
        if not sample.question.strip():
            raise CordError(f"sample {sample.id}: the question is empty; give the text of what is said")
        ids = self._tokenize({"type": "text", "text": sample.question})
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            words = [word for word in sample.question.split() if unknown in self._tokenizer(word, add_special_tokens=False)["input_ids"]]
            raise CordError(f"sample {sample.id}: words outside the model's vocabulary: {', '.join(words[:8])}; rephrase the question")
        return Prompt(sample_id=sample.id, token_ids=tuple(ids))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, without any special token added."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        known = [index for index in ids if index < len(self._tokenizer) and index not in self.special_ids and index not in self.eos_ids]
        return self._tokenizer.decode(known)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, specials included."""
        return [self._tokenizer.decode([index]) if index < len(self._tokenizer) else f"<{index}>" for index in ids]

    def _tokenize(self, part: dict[str, str]) -> list[int]:
        turns = [{"role": "user", "content": [part]}]
        text = self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _split_at_placeholder(self, directory: Path) -> tuple[list[int], list[int]]:
        ids = self._tokenize({"type": "audio", "audio_url": "clip"})
        if ids.count(self.audio_token_id) != 1:
            raise CordError(
                f"{directory}: the chat template writes {ids.count(self.audio_token_id)} placeholders for a clip; it must be one"
            )
        place = ids.index(self.audio_token_id)
        return ids[:place], ids[place + 1 :]

    def _find_eos(self, directory: Path) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        if (directory / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(directory).eos_token_id or eos
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

"""Checkpoints with the shapes of SmolLM2-135M and of Whisper tiny.en's encoder, and random weights.

Speed needs the shapes alone, so nothing is downloaded. One word is one token; `cord graft` puts the projector between.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperModel

from megatron_cord.convert.graft.writing import Projector, graft

VOCABULARY = 49152
LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "num_mel_bins": 80, "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
    "max_source_positions": 1500, "decoder_layers": 1, "decoder_attention_heads": 6, "decoder_ffn_dim": 384,
}  # fmt: skip
_SPECIAL = ("<|unknown|>", "<|im_start|>", "<|im_end|>")
_ROLES = ("system", "user", "assistant")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def words(count: int = VOCABULARY - len(_SPECIAL) - len(_ROLES) - 1) -> list[str]:
    """Return the words that are tokens; one row of the embedding is left for the placeholder of audio."""
    return [f"w{number}" for number in range(count)]


def write_language_model(directory: Path, seed: int, dtype: torch.dtype) -> None:
    """Write the text model, its weights at a scale of 1/√fan-in, as a transformers checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**LANGUAGE))
        _initialize(model)
    model.to(dtype).save_pretrained(directory)
    tokens = [*_SPECIAL, *_ROLES, *words()]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(tokens)}, unk_token=_SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[2],
        additional_special_tokens=[_SPECIAL[1]],
        chat_template=_TEMPLATE,
        padding_side="left",
    )
    tokenizer.save_pretrained(directory)


def write_speech_model(directory: Path, language_model: Path, whisper: Path, seed: int) -> None:
    """Write the grafted checkpoint of a text model, and beside it the Whisper if it is missing."""
    if not whisper.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder: Any = WhisperModel(WhisperConfig(**WHISPER))
            _initialize(encoder)
        encoder.save_pretrained(whisper)
        extractor = {
            "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor",
            "feature_size": 80, "hop_length": 160, "n_fft": 400, "n_samples": 480000, "sampling_rate": 16000,
        }  # fmt: skip
        (whisper / "preprocessor_config.json").write_text(json.dumps(extractor))
    graft(language_model, whisper, directory, Projector(seed=seed))


@torch.no_grad()
def _initialize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)

"""How many parameters a model has, by part, and how many of them each tensor-parallel rank and pipeline stage holds.

Counted from the architecture alone, as `megatron_cord.model` builds it: Megatron pads the vocabulary, and its fused qkv of the audio
encoder has a key bias that Whisper lacks. Legend: H hidden, F ffn size, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import (
    AdapterArchitecture,
    Architecture,
    EncoderArchitecture,
    LanguageArchitecture,
)

_QWEN2_AUDIO_ENCODER = EncoderArchitecture(
    num_mels=128, hidden_size=1280, num_layers=32, num_heads=20, ffn_hidden_size=5120, max_positions=1500
)  # fmt: skip
#: the sizes of published models, for plans without their files
PUBLISHED = {
    "qwen2_audio_7b": Architecture(
        model_type="qwen2_audio",
        encoder=_QWEN2_AUDIO_ENCODER,
        language=LanguageArchitecture(
            hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, ffn_hidden_size=11008, vocab_size=156032,
            max_positions=8192, rope_theta=10000.0, norm_epsilon=1e-5, qkv_bias=True, tied_embeddings=False,
        ),
        audio_token_id=151646,
        adapter=AdapterArchitecture("linear"),
    ),
    "step_audio2_mini": Architecture(
        model_type="step_audio_2",
        encoder=EncoderArchitecture(
            num_mels=128, hidden_size=1280, num_layers=32, num_heads=20, ffn_hidden_size=5120, max_positions=1500, tail_frames=2,
            clip_frames=2500,
        ),
        language=LanguageArchitecture(
            hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, ffn_hidden_size=18944, vocab_size=158720,
            max_positions=16384, rope_theta=1000000.0, norm_epsilon=1e-6, qkv_bias=True, tied_embeddings=False,
        ),
        audio_token_id=151690,
        adapter=AdapterArchitecture("convolution", 2048, stride=2, kernel_size=3, activation="relu"),
    ),
}  # fmt: skip


def published(name: str) -> Architecture:
    """A published model's architecture. Raises CordError for an unknown name."""
    if name not in PUBLISHED:
        raise CordError(
            f"no sizes of {name!r} are known here; known: {', '.join(PUBLISHED)}; or give a checkpoint's directory"
        )
    return PUBLISHED[name]


@dataclass(frozen=True)
class PartCounts:
    """Parameters by part; of a whole model or of one rank."""

    audio_encoder: int
    adapter: int
    language_model: int
    positions: int = 0  #: the encoder's sinusoids, counted in audio_encoder too; never trained

    @property
    def total(self) -> int:
        """All parts."""
        return self.audio_encoder + self.adapter + self.language_model

    def trained(self, freeze: tuple[str, ...]) -> int:
        """Without what is frozen."""
        encoder = 0 if "audio_encoder" in freeze else self.audio_encoder - self.positions
        adapter = 0 if "adapter" in freeze else self.adapter
        return encoder + adapter + (0 if "language_model" in freeze else self.language_model)


def part_counts(arch: Architecture) -> PartCounts:
    """Of the published checkpoint: what its files hold, without Megatron's padding."""
    lm, encoder = arch.language, 0
    if arch.encoder is not None:
        encoder = _encoder(arch.encoder, tp=1) - arch.encoder.num_layers * arch.encoder.hidden_size  # keys have no bias
    embeddings = (1 if lm.tied_embeddings else 2) * lm.vocab_size * lm.hidden_size
    language = lm.num_layers * _language_layer(lm, tp=1) + lm.hidden_size + embeddings
    positions = 0 if arch.encoder is None else arch.encoder.max_positions * arch.encoder.hidden_size
    return PartCounts(encoder, _adapter(arch), language, positions)


def rank_counts(arch: Architecture, tp: int, pp: int, stage: int) -> PartCounts:
    """Of one tensor-parallel rank of a pipeline stage, counted from 0, as Megatron holds them."""
    lm, first, last = arch.language, stage == 0, stage == pp - 1
    table = lm.padded_vocab_size(tp) // tp * lm.hidden_size
    tables = 1 if first and last and lm.tied_embeddings else first + last
    language = lm.num_layers // pp * _language_layer(lm, tp) + tables * table + (lm.hidden_size if last else 0)
    if not first or arch.encoder is None:
        return PartCounts(0, 0, language)
    return PartCounts(
        _encoder(arch.encoder, tp), _adapter(arch), language, arch.encoder.max_positions * arch.encoder.hidden_size
    )


def _language_layer(lm: LanguageArchitecture, tp: int) -> int:
    h, queries, keys = lm.hidden_size, lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    qkv = (queries + 2 * keys) * (h + lm.qkv_bias)
    return (qkv + queries * h + 3 * h * lm.ffn_hidden_size) // tp + 2 * h


def _encoder(enc: EncoderArchitecture, tp: int) -> int:
    h, f = enc.hidden_size, enc.ffn_hidden_size
    shared = (3 * h * (h + 1) + h * h + f * (h + 1) + f * h) // tp  # qkv, projection, fc1, fc2; biases of qkv and fc1
    layer = shared + 2 * h + 4 * h  # biases of projection and fc2, two norms
    convolutions = 3 * h * (enc.num_mels + h) + 2 * h
    return convolutions + enc.max_positions * h + enc.num_layers * layer + 2 * h


def _adapter(arch: Architecture) -> int:
    if arch.adapter is None or arch.encoder is None:
        return 0
    ad, audio, out = arch.adapter, arch.encoder.hidden_size, arch.language.hidden_size
    if ad.kind == "linear":
        return (audio + ad.bias) * out
    convolution = audio * audio * ad.kernel_size + audio if ad.kind == "convolution" else 0
    width = audio if ad.kind == "convolution" else audio * ad.stride
    return convolution + (width + ad.bias) * ad.hidden_size + (ad.hidden_size + ad.bias) * out

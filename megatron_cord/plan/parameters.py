"""Parameters of a model by part, and those that each tensor-parallel rank and pipeline stage holds.

Counted from the architecture alone, as `megatron_cord.model` builds it: Megatron pads the vocabulary, and its fused qkv
of the audio encoder has a key bias that Whisper lacks. Legend: H hidden, F ffn size, D head width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture, EncoderArchitecture, LanguageArchitecture


@dataclass(frozen=True)
class PartCounts:
    """Parameters by part; of a whole model or of one rank."""

    audio_encoder: int
    adapter: int
    language_model: int
    positions: int = 0  #: the encoder's sinusoids, counted in audio_encoder too; never trained

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.audio_encoder + self.adapter + self.language_model

    def trained(self, parts: Collection[str]) -> int:
        """Return how many are trained where the weights of these parts are."""
        encoder = self.audio_encoder - self.positions if "audio_encoder" in parts else 0
        adapter = self.adapter if "adapter" in parts else 0
        return encoder + adapter + (self.language_model if "language_model" in parts else 0)


def part_counts(arch: Architecture) -> PartCounts:
    """Count the parameters of a checkpoint's files, without Megatron's padding."""
    lm, encoder = arch.language, 0
    if arch.encoder is not None:
        key_biases = 0 if arch.encoder.key_bias else arch.encoder.num_layers * arch.encoder.hidden_size
        encoder = _encoder(arch.encoder, tp=1) - key_biases
    embeddings = (1 if lm.tied_embeddings else 2) * lm.vocab_size * lm.hidden_size
    language = lm.num_layers * _language_layer(lm, tp=1) + lm.hidden_size + embeddings
    positions = 0 if arch.encoder is None else _positions(arch.encoder)
    return PartCounts(encoder, _adapter(arch), language, positions)


def rank_counts(
    arch: Architecture, tp: int, pp: int, stage: int, stages: Sequence[int] = (), ep: int = 1
) -> PartCounts:
    """Count the parameters of one tensor-parallel rank of a pipeline rank, as Megatron holds them.

    Args:
        arch: of the model.
        tp: tensor-parallel ranks.
        pp: pipeline ranks.
        stage: the pipeline rank, from 0.
        stages: layers of each stage, as `ParallelConfig.layers_per_stage` gives them; empty: equally many.
        ep: expert-parallel ranks.
    """
    lm, first, last = arch.language, stage == 0, stage == pp - 1
    table = lm.padded_vocab_size(tp) // tp * lm.hidden_size
    tables = 1 if first and last and lm.tied_embeddings else first + last
    layers = rank_layers(arch, pp, stage, stages)
    language = layers * _language_layer(lm, tp, ep) + tables * table + (lm.hidden_size if last else 0)
    if not first or arch.encoder is None:
        return PartCounts(0, 0, language)
    return PartCounts(_encoder(arch.encoder, tp), _adapter(arch), language, _positions(arch.encoder))


def rank_layers(arch: Architecture, pp: int, stage: int, stages: Sequence[int] = ()) -> int:
    """Return how many of the language model's layers a pipeline rank holds; arguments as in `rank_counts`."""
    return sum(stages[stage::pp]) if stages else arch.language.num_layers // pp


def matrix_counts(arch: Architecture, tp: int, pp: int, stage: int, stages: Sequence[int] = ()) -> PartCounts:
    """Count those of `rank_counts` that lie in matrices inside layers, which Muon updates."""
    lm, enc, ad = arch.language, arch.encoder, arch.adapter
    h, queries, keys = lm.hidden_size, lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    layers = rank_layers(arch, pp, stage, stages)
    language = layers * ((2 * queries + 2 * keys) * h + 3 * h * lm.ffn_hidden_size) // tp
    if stage > 0 or enc is None or ad is None:
        return PartCounts(0, 0, language)
    encoder = enc.num_layers * (4 * enc.hidden_size**2 + 2 * enc.hidden_size * enc.ffn_hidden_size) // tp
    if ad.kind == "linear":
        return PartCounts(encoder, enc.hidden_size * h, language)
    width = enc.hidden_size * (1 if ad.kind == "convolution" else ad.stride)
    return PartCounts(encoder, width * ad.mlp_rows + ad.hidden_size * h, language)


def expert_count(arch: Architecture, layers: int | None = None, ep: int = 1) -> int:
    """Count the parameters of experts on one rank that holds so many layers, by default all; 0 without experts."""
    lm = arch.language
    if lm.experts is None:
        return 0
    return (
        (lm.num_layers if layers is None else layers) * 3 * lm.hidden_size * lm.ffn_hidden_size * lm.experts.count // ep
    )


def active_count(arch: Architecture) -> int:
    """Count the language model's parameters that a token passes: all but the experts that are not chosen for it."""
    experts = arch.language.experts
    idle = 0 if experts is None else expert_count(arch) * (experts.count - experts.per_token) // experts.count
    return part_counts(arch).language_model - idle


def _language_layer(lm: LanguageArchitecture, tp: int, ep: int = 1) -> int:
    h, queries, keys = lm.hidden_size, lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    qkv = (queries + 2 * keys) * (h + lm.qkv_bias)
    norms = 2 * h + (2 * lm.head_dim if lm.qk_norm else 0)
    if lm.experts is not None:
        width = lm.experts.shared_ffn_hidden_size
        shared = 3 * h * width // tp + h if width else 0
        return (qkv + queries * h) // tp + norms + shared + lm.experts.count * (h + 3 * h * lm.ffn_hidden_size // ep)
    return (qkv + queries * h + 3 * h * lm.ffn_hidden_size) // tp + norms


def _encoder(enc: EncoderArchitecture, tp: int) -> int:
    h, f = enc.hidden_size, enc.ffn_hidden_size
    shared = (3 * h * (h + 1) + h * h + f * (h + 1) + f * h) // tp  # qkv, projection, fc1, fc2; biases of qkv and fc1
    layer = shared + 2 * h + 4 * h  # biases of projection and fc2, two norms
    convolutions = 3 * h * (enc.num_mels + h) + 2 * h
    if enc.chunks is not None and enc.chunks.channels:
        channels = enc.chunks.channels
        convolutions = 9 * channels * (1 + 2 * channels) + 3 * channels + channels * enc.chunks.bands(enc.num_mels) * h
    return convolutions + _positions(enc) + enc.num_layers * layer + 2 * h


def _positions(enc: EncoderArchitecture) -> int:
    """Count the encoder's sinusoids; where it has chunks they are computed, and no parameters."""
    return 0 if enc.chunks is not None else enc.max_positions * enc.hidden_size


def _adapter(arch: Architecture) -> int:
    if arch.adapter is None or arch.encoder is None:
        return 0
    ad, audio, out = arch.adapter, arch.encoder.hidden_size, arch.language.hidden_size
    if ad.kind == "linear":
        return (audio + ad.bias) * out
    convolution = audio * audio * ad.kernel_size + audio if ad.kind == "convolution" else 0
    width = audio if ad.kind == "convolution" else audio * ad.stride
    if ad.kind == "gated_stacking":  # two norms, and no biases
        return width + width * ad.mlp_rows + (1 + out) * ad.hidden_size
    return convolution + (width + ad.bias) * ad.hidden_size + (ad.hidden_size + ad.bias) * out

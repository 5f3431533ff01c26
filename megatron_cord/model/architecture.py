"""The sizes of a model, which a family reads from a Hugging Face configuration; they do not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class ChunkArchitecture:
    """How an encoder without a window takes clips of any length: a chunk of frames at a time.

    The convolutions see one chunk: Whisper's two over frames (Qwen2.5-Omni), or three over mel bands and frames, each
    with stride 2 (Qwen3-Omni). Sinusoids count from a chunk's beginning; positions attend to those of a few chunks.
    """

    frames: int  #: log-mel frames of a chunk; a clip's last one may have fewer
    attended: int  #: neighbouring chunks that attend to each other
    channels: int = 0  #: of convolutions over bands and frames; 0 for Whisper's

    def positions(self, num_frames: int) -> int:
        """Return how many positions the convolutions make of so many frames of one chunk.

        It is one in eight, rounded up, and with Whisper's convolutions one in two.
        """
        stride = 8 if self.channels else 2
        return -(-num_frames // stride)

    def bands(self, num_mels: int) -> int:
        """Return how many bands the convolutions over bands and frames leave of so many mel bands."""
        return self.positions(num_mels)


@dataclass(frozen=True)
class EncoderArchitecture:
    """A Whisper-style audio encoder: two convolutions, the second with stride 2, sinusoids, pre-norm layers, pooling.

    Families treat a clip that is shorter than the window in different ways: see `encodes_padding` and `tail_frames`. An
    encoder with `chunks` has no window.
    """

    num_mels: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int
    max_positions: int  #: frames after the convolutions, which is half of the window's log-mel frames
    pooling: int = 2  #: neighbouring positions that are averaged into one feature; 1 for none
    #: no mask: the silence after a clip is encoded too, and every clip makes as many features as the window
    encodes_padding: bool = False
    #: frames after a clip's own that convolutions see but attention does not; what follows them is zero everywhere.
    #: None: convolutions see the padding as it is
    tail_frames: int | None = None
    clip_frames: int | None = None  #: longest clip, if the family's own processing cuts clips shorter than the window
    key_bias: bool = False  #: keys have a bias, as queries and values have
    chunks: ChunkArchitecture | None = None  #: other convolutions, and clips of any length up to clip_frames

    @property
    def window_frames(self) -> int:
        """Log-mel frames of one window, to which clips are padded.

        Raises:
            ValueError: an encoder with chunks has none; its clips are as long as they are.
        """
        if self.chunks is not None:
            raise ValueError("an encoder with chunks has no window")
        return 2 * self.max_positions

    @property
    def max_clip_frames(self) -> int:
        """Log-mel frames of the longest clip."""
        return self.window_frames - (self.tail_frames or 0) if self.clip_frames is None else self.clip_frames

    def frames_after_convolutions(self, num_frames: int) -> int:
        """Return how many of the encoder's positions carry audio when num_frames of its input do."""
        if self.chunks is None:
            return (num_frames - 1) // 2 + 1
        whole, rest = divmod(num_frames, self.chunks.frames)
        return whole * self.chunks.positions(self.chunks.frames) + self.chunks.positions(rest)

    def computed_positions(self, num_frames: int) -> int:
        """Return how many positions of a clip the layers compute, those of the frames that end it included."""
        if self.encodes_padding:
            return self.max_positions
        return self.frames_after_convolutions(num_frames + (self.tail_frames or 0))

    def attended_positions(self, num_frames: int) -> int:
        """Return how many of these, from the first on, the others attend to."""
        return self.max_positions if self.encodes_padding else self.frames_after_convolutions(num_frames)

    def attention_spans(self, num_frames: int) -> list[tuple[int, int]]:
        """Return the parts of a clip that attend to themselves alone: computed positions, and those attended to."""
        computed, attended = self.computed_positions(num_frames), self.attended_positions(num_frames)
        if self.chunks is None:
            return [(computed, attended)]
        span = self.chunks.attended * self.chunks.positions(self.chunks.frames)
        return [(min(span, computed - start),) * 2 for start in range(0, computed, span)]

    def seen_frames(self, num_frames: int) -> int:
        """Return how many log-mel frames the convolutions see to make the computed positions.

        Each convolution looks one frame ahead. With `tail_frames` there is nothing behind these: the convolutions' own
        zeros.
        """
        if self.tail_frames is not None:
            return num_frames + self.tail_frames
        return min(self.window_frames, 2 * self.computed_positions(num_frames) + 1)

    def num_features(self, num_frames: int) -> int:
        """Return how many features the encoder makes of a clip's audio."""
        return self.attended_positions(num_frames) // self.pooling


@dataclass(frozen=True)
class AdapterArchitecture:
    """The part that maps the encoder's features to the language model's width, and to a number of tokens."""

    #: linear: one projection; convolution: a strided convolution, then an MLP; stacking: neighbours side by side, then
    #: an MLP; gated_stacking: the same with SwiGLU between two RMSNorms, and zeros in what the last stack lacks
    kind: Literal["linear", "convolution", "stacking", "gated_stacking"]
    hidden_size: int = 0  #: of the MLP, behind its gate; linear has none
    stride: int = 1  #: features that become one token
    kernel_size: int = 1  #: of the convolution, whose padding is 1
    activation: Literal["relu", "gelu"] = "gelu"  #: of the MLP without a gate
    bias: bool = True  #: of the projections

    @property
    def mlp_rows(self) -> int:
        """Rows of the MLP's first layer; with a gate, values and gate one after the other."""
        return self.hidden_size * (2 if self.kind == "gated_stacking" else 1)

    def num_tokens(self, num_features: int) -> int:
        """Return how many tokens the adapter makes of so many features."""
        if self.kind == "convolution":
            return (num_features + 2 - self.kernel_size) // self.stride + 1
        if self.kind == "gated_stacking":
            return (num_features + self.stride - 1) // self.stride
        return num_features // self.stride


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for sequences longer than those of pre-training (`rotary.py` computes them).

    Only the fields of its kind have a meaning.
    """

    #: linear: all by one factor; llama3 and yarn: low ones by the factor, high ones not, those between in proportion
    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0  #: of pre-training, by which llama3 and yarn tell low from high
    low_freq_factor: float = 1.0  #: llama3: periods over pre-training's length, below which a frequency is low
    high_freq_factor: float = 4.0  #: llama3: above which it is high
    beta_slow: float = 1.0  #: yarn: turns over pre-training's length, below which a frequency is low
    beta_fast: float = 32.0  #: yarn: above which it is high
    truncate: bool = True  #: yarn: bounds between low and high are whole dimensions
    attention_factor: float = 1.0  #: yarn: by which rotated queries and keys are multiplied


@dataclass(frozen=True)
class ExpertsArchitecture:
    """A mixture of experts in the place of every layer's MLP: a router chooses some of them for each token."""

    count: int
    per_token: int  #: that are chosen
    normalized: bool  #: the probabilities of those chosen are divided by their sum
    #: of an expert that every token passes, times a sigmoid of a projection of the token; 0: there is none
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class LanguageArchitecture:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int  #: of each expert where there are some
    vocab_size: int  #: true size; rows that pad it to a divisible one exist only inside Megatron
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    qkv_bias: bool
    tied_embeddings: bool
    qk_norm: bool = False  #: an RMSNorm over each query's and each key's head before the rotation, as in Qwen3
    rope_scaling: RopeScaling | None = None
    experts: ExpertsArchitecture | None = None  #: None: an MLP

    def padded_vocab_size(self, tp: int) -> int:
        """Return the rows of the embedding and the output layer, [V_padded, H]: a multiple of 64 and of tp."""
        multiple = 64 if 64 % tp == 0 else 64 * tp
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Architecture:
    """A large audio language model.

    Attributes:
        model_type: the Hugging Face name of the family.
        encoder: None for a plain text model.
        language: the language model.
        audio_token_id: the placeholder that audio features replace; None for a plain text model.
        adapter: between encoder and language model; None for a plain text model.
        refused_tokens: placeholders of what is not trained here, and what stands behind each.
    """

    model_type: str
    encoder: EncoderArchitecture | None
    language: LanguageArchitecture
    audio_token_id: int | None
    adapter: AdapterArchitecture | None
    refused_tokens: tuple[tuple[int, str], ...] = ()

    def num_audio_tokens(self, num_frames: int) -> int:
        """Return how many placeholders a clip of num_frames log-mel frames takes.

        Raises:
            ValueError: a plain text model takes no audio.
        """
        if self.encoder is None or self.adapter is None:
            raise ValueError(f"a {self.model_type} model takes no audio")
        return self.adapter.num_tokens(self.encoder.num_features(num_frames))

    def check_divisible(
        self, tp: int, pp: int, virtual_pp: int = 1, pipeline_layers: Sequence[int] = (), ep: int = 1
    ) -> None:
        """Raise CordError if this layout cannot hold the model, naming the size that does not fit."""
        self._check_experts(tp, ep)
        sizes = {
            "the language model's attention heads": self.language.num_heads,
            "the language model's key-value heads": self.language.num_kv_heads,
        }
        if self.language.experts is None:  # experts are not cut, but dealt
            sizes["the language model's ffn size"] = self.language.ffn_hidden_size
        elif self.language.experts.shared_ffn_hidden_size:
            sizes["the shared expert's ffn size"] = self.language.experts.shared_ffn_hidden_size
        if self.encoder is not None:
            sizes |= {
                "the audio encoder's attention heads": self.encoder.num_heads,
                "the audio encoder's ffn size": self.encoder.ffn_hidden_size,
            }
        for what, size in sizes.items():
            if size % tp:
                raise CordError(
                    f"parallel.tp={tp} does not divide {what} ({size}); "
                    f"choose a tp that does, e.g. {_largest_divisor(size, tp)}"
                )
        if pipeline_layers:
            if sum(pipeline_layers) != self.language.num_layers:
                raise CordError(
                    f"parallel.pipeline_layers={list(pipeline_layers)} are {sum(pipeline_layers)} layers, the language "
                    f"model of this {self.model_type} has {self.language.num_layers}; all models of the run need the "
                    "same number, or leave the key out"
                )
            return
        if self.language.num_layers % pp:
            raise CordError(
                f"parallel.pp={pp} does not divide the language model's layers ({self.language.num_layers}); "
                f"choose a pp that does, e.g. {_largest_divisor(self.language.num_layers, pp)}, or give "
                "parallel.pipeline_layers"
            )
        if (layers := self.language.num_layers // pp) % virtual_pp:
            raise CordError(
                f"parallel.virtual_pp={virtual_pp} does not divide a stage's layers ({self.language.num_layers} / "
                f"parallel.pp={pp} = {layers}); choose a virtual_pp that does, e.g. "
                f"{_largest_divisor(layers, virtual_pp)}"
            )

    def _check_experts(self, tp: int, ep: int) -> None:
        experts = self.language.experts
        if experts is None:  # a teacher without experts may stand beside a student that has some
            return
        if experts.count % ep:
            raise CordError(
                f"parallel.ep={ep} does not divide the language model's experts ({experts.count}); "
                f"choose an ep that does, e.g. {_largest_divisor(experts.count, ep)}"
            )
        if ep % tp:
            raise CordError(
                f"parallel.ep={ep} is no multiple of parallel.tp={tp}: experts are dealt to the tensor-parallel ranks, "
                f"not cut; set parallel.ep={tp} or a multiple of it"
            )


def _largest_divisor(size: int, below: int) -> int:
    return next(d for d in range(min(below, size), 0, -1) if size % d == 0)

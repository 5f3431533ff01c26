"""What a model is, in numbers: the sizes that a family reads from a Hugging Face configuration, whatever the layout over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from megatron_cord.errors import CordError

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class EncoderArchitecture:
    """A Whisper-style audio encoder: two convolutions (the second halves the rate), sinusoids, pre-norm layers, pooling by two."""

    num_mels: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int
    max_positions: int  #: frames after the convolutions, which is half of the window's log-mel frames

    @property
    def window_frames(self) -> int:
        """Log-mel frames of one window."""
        return 2 * self.max_positions

    def frames_after_convolutions(self, num_frames: Count) -> Count:
        """How many of the encoder's positions carry audio when num_frames of its input do."""
        return (num_frames - 1) // 2 + 1

    def num_tokens(self, num_frames: Count) -> Count:
        """How many features come out of the pooling, one for each placeholder token."""
        return (self.frames_after_convolutions(num_frames) - 2) // 2 + 1


@dataclass(frozen=True)
class LanguageArchitecture:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int  #: true size; rows that pad it to a divisible one exist only inside Megatron
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    qkv_bias: bool
    tied_embeddings: bool

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding and the output layer, [V_padded, H]: a multiple of 64 and of tp."""
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
    """

    model_type: str
    encoder: EncoderArchitecture | None
    language: LanguageArchitecture
    audio_token_id: int | None

    def check_divisible(self, tp: int, pp: int) -> None:
        """Raises CordError if this layout cannot hold the model, naming the size that does not divide."""
        sizes = {
            "the language model's attention heads": self.language.num_heads,
            "the language model's key-value heads": self.language.num_kv_heads,
            "the language model's ffn size": self.language.ffn_hidden_size,
        }
        if self.encoder is not None:
            sizes |= {
                "the audio encoder's attention heads": self.encoder.num_heads,
                "the audio encoder's ffn size": self.encoder.ffn_hidden_size,
            }
        for what, size in sizes.items():
            if size % tp:
                raise CordError(
                    f"parallel.tp={tp} does not divide {what} ({size}); choose a tp that does, e.g. {_largest_divisor(size, tp)}"
                )
        if self.language.num_layers % pp:
            raise CordError(
                f"parallel.pp={pp} does not divide the language model's layers ({self.language.num_layers}); "
                f"choose a pp that does, e.g. {_largest_divisor(self.language.num_layers, pp)}"
            )


def _largest_divisor(size: int, below: int) -> int:
    return next(d for d in range(min(below, size), 0, -1) if size % d == 0)

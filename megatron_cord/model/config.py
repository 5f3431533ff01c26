"""Which model a run trains, and how its layers are computed. This module does not import torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_cord.errors import CordError

if TYPE_CHECKING:
    import torch

Tower = Literal["audio_encoder", "language_model"]
Part = Literal["audio_encoder", "adapter", "language_model"]
PARTS: tuple[Part, ...] = ("audio_encoder", "adapter", "language_model")


@dataclass(frozen=True)
class LayerConfig:
    """How the layers of both towers are computed; the numbers are the same up to rounding."""

    #: torch: Megatron's own layers with torch's attention and norms; transformer_engine: its fused layers and
    #: attention, on GPUs; auto: those where they are installed
    implementation: Literal["auto", "torch", "transformer_engine"] = "auto"
    recompute: Collection[Tower] = ()  #: towers whose layers are computed again in the backward pass: memory for time
    #: full: a recomputed layer keeps its input alone; selective: the input of its core attention and of its MLP, and
    #: what lies between these parts
    granularity: Literal["full", "selective"] = "full"
    #: a rank's experts may be one module, where the layers have one; False: each is a module of its own, as for LoRA
    grouped_experts: bool = True

    def recomputation(self, tower: Tower, *, experts: bool = False) -> dict[str, object]:
        """Return Megatron's settings for one tower; experts: it has them in the place of its MLPs."""
        if tower not in self.recompute:
            return {}
        if self.granularity == "selective":
            return {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "moe" if experts else "mlp"],
            }
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): a frozen matrix W is used as W + alpha / rank · B A, and only A and B are trained."""

    rank: int = 0  #: columns of B and rows of A; 0: no LoRA, the weights themselves are trained
    alpha: float = 32.0  #: alpha / rank multiplies B A
    dropout: float = 0.0  #: share of A's inputs that are zeroed in training
    #: which matrices, by Megatron's or Hugging Face's name: a part of the model (language_model), the end of a name
    #: (q_proj, linear_qkv), or a pattern ('*.layers.1?.mlp.*'). All that model.freeze leaves if there is none
    targets: tuple[str, ...] = ()
    whole: tuple[Part, ...] = ()  #: parts whose weights themselves are trained, without LoRA

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise CordError(f"rank cannot be negative and alpha must be positive, got {self.rank} and {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise CordError(f"dropout must be at least 0 and below 1, got {self.dropout:g}")
        if not self.rank and (self.targets or self.whole or self.dropout):
            raise CordError("rank is 0, so there is no LoRA to set; set rank, for instance 16")

    @property
    def enabled(self) -> bool:
        """Whether there is LoRA."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which precision, and what of it is trained."""

    #: Hugging Face checkpoint directory, or hf://OWNER/NAME[@REVISION]: the student's start and the frozen teacher
    checkpoint: str
    #: of parameters and activations, the local engine's too; gradients and optimizer states are fp32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    freeze: tuple[Part, ...] = ()  #: parts that are not trained, nor sent to the engine again
    lora: LoraConfig = field(default_factory=LoraConfig)  #: train small matrices beside the frozen weights
    #: towers whose layers are computed again in the backward pass: memory for time
    recompute: tuple[Tower, ...] = ()
    #: full: a recomputed layer keeps its input alone; selective: also what lies around its core attention and its MLP
    recompute_granularity: Literal["full", "selective"] = "full"
    #: auto: transformer-engine's layers and attention where they are installed, else Megatron's own with torch's
    #: attention
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"

    def __post_init__(self) -> None:
        if set(self.freeze) == set(PARTS):
            raise CordError("model.freeze names every part; nothing is left to train")
        if both := [part for part in self.lora.whole if part in self.freeze]:
            raise CordError(f"model.lora.whole trains {both[0]} and model.freeze does not; name it in one of them")

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """Parts whose weights themselves are trained."""
        return self.lora.whole if self.lora.enabled else tuple(part for part in PARTS if part not in self.freeze)

    @property
    def layer_config(self) -> LayerConfig:
        """How the layers are computed."""
        return LayerConfig(
            self.layers, self.recompute, self.recompute_granularity, grouped_experts=not self.lora.enabled
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        return dtypes[self.dtype]

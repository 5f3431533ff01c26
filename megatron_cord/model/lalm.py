"""The large audio language model on Megatron-Core, split over tensor-parallel ranks and pipeline stages.

First stage: audio encoder, adapter, word embedding. All stages: the language model's layers. Last stage: final norm and
output layer. Logits are never computed here: the model returns hidden states, and the loss takes them together with the
output weight.
Legend: B sequences, S padded length, T packed tokens, C clips, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.model.adapters import Adapter, build_adapter
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.chunks import number_layers, split_in_chunks
from megatron_cord.model.clip_sharing import deal_clips, gather_clips, no_tokens
from megatron_cord.model.config import PARTS, LayerConfig, LoraConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.model.layers.attention import packed_sequences
from megatron_cord.model.layers.experts import RoutingRecord, record_routing
from megatron_cord.model.layers.rotary import inverse_frequencies
from megatron_cord.model.layers.routed_rows import find_rows
from megatron_cord.model.layers.transformer import block_spec, language_config, uses_transformer_engine
from megatron_cord.model.lora.adapters import LoraAdapters
from megatron_cord.model.lora.targets import find_targets
from megatron_cord.model.placeholders import check_placeholders, placeholders_per_sample, refuse_tokens, true_rows
from megatron_cord.parallel.layout import Layout, ParallelConfig
from megatron_cord.parallel.transfers import to_device

_LAYERS, _LORA = "language_model.decoder.layers.", "lora."
EXPERTS = ".mlp.experts.local_experts."  #: in the names of experts that are modules of their own
#: of a matrix of experts in one module: its name in theirs (transformer-engine's)
_GROUPED = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One microbatch, padded or packed.

    Attributes:
        token_ids: int64 [B, S], right-padded; packed, [1, T], the sequences one after the other.
        features: float32 [C, mels, frames] of all clips in the batch's order; None without audio.
        num_frames: C numbers, valid frames of each clip; None without audio.
        sample_ids: B names, for errors.
        cu_seqlens: B + 1 numbers from 0 to T: where each packed sequence begins, its padding included; None for a
            padded microbatch.
        host_token_ids: token_ids in host memory, where placeholders are found without waiting for the device; None:
            they are read from the device.
        lengths: B numbers, tokens of each sequence without its padding; None where they are not known.
        experts: int16 [S, B, L, k] ([T, 1, L, k] packed) in host memory, the k experts that each of L layers shall
            choose for a token, -1 where it chooses by itself; None: everywhere.
    """

    token_ids: Tensor
    features: Tensor | None
    num_frames: tuple[int, ...] | None
    sample_ids: tuple[str, ...]
    cu_seqlens: tuple[int, ...] | None = None
    host_token_ids: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    experts: Tensor | None = None


class _HiddenStateGPT(GPTModel):  # type: ignore[misc]
    """GPTModel that stops before the output layer's product."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class LALM(MegatronModule):  # type: ignore[misc]
    """One rank's part of the model.

    Args:
        arch: sizes.
        layout: process groups and this rank's place.
        dtype: of parameters and activations.
        layers: how the layers are computed; the defaults if None.
    """

    def __init__(
        self, arch: Architecture, layout: Layout, dtype: torch.dtype, layers: LayerConfig | None = None
    ) -> None:
        layers = layers or LayerConfig()
        parallel = layout.config
        arch.check_divisible(parallel.tp, parallel.pp, parallel.virtual_pp, parallel.pipeline_layers, parallel.ep)
        if arch.language.experts is not None:
            _check_mixture(parallel)
        config = language_config(arch.language, layout.config, dtype, layers)
        super().__init__(config)
        self.arch, self.layout, self.layers = arch, layout, layers
        self.pre_process, self.post_process = layout.is_first_stage, layout.is_last_stage
        self._cu_seqlens_device = layout.device if uses_transformer_engine(layers) else torch.device("cpu")
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = arch.language.tied_embeddings
        self.audio_encoder: AudioEncoder | None = None
        self.adapter: Adapter | None = None
        if self.pre_process and arch.encoder is not None and arch.adapter is not None:
            self.audio_encoder = AudioEncoder(arch.encoder, layout, dtype, layers)
            sizes = (arch.encoder.hidden_size, arch.language.hidden_size)
            self.adapter = build_adapter(arch.adapter, sizes, self.audio_encoder.config, layout.device)
        layers_of_chunks = layout.layers_of_chunks(arch.language.num_layers)
        self.language_model = _HiddenStateGPT(
            config,
            block_spec(config, AttnMaskType.causal, layers, sum(map(len, layers_of_chunks))),
            arch.language.padded_vocab_size(layout.config.tp),
            arch.language.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=arch.language.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.language.rope_theta,
            # Audio features replace placeholders before the sequence is split.
            scatter_embedding_sequence_parallel=False,
            pg_collection=layout.groups,
        )
        if arch.language.rope_scaling is not None:
            # Megatron moves them to the device with the first microbatch.
            self.language_model.rotary_pos_emb.inv_freq = inverse_frequencies(arch.language)
        number_layers(self.language_model, layers_of_chunks)
        #: the language model, in the parts that interleaved stages run one at a time
        self.chunks = split_in_chunks(self.language_model, layers_of_chunks)
        self.routing: RoutingRecord | None = None
        if arch.language.experts is not None:
            sizes_of_record = (arch.language.experts, arch.language.num_layers, layout.groups.tp_cp, layout.device)
            self.routing = RoutingRecord(*sizes_of_record)
            record_routing(self.language_model.decoder.layers, self.routing)
        self.lora: LoraAdapters | None = None
        _mark_sharded_weights(self)
        self.to(layout.device)

    def add_lora(self, config: LoraConfig, freeze: Collection[str], seed: int) -> None:
        """Freeze all parts but those that are trained whole, and put LoRA beside their matrices.

        Args:
            config: of LoRA.
            freeze: parts that get none.
            seed: of its initial values and its dropout.

        Raises:
            CordError: a pattern that matches no matrix.
        """
        targets = find_targets(self.arch, config, freeze)
        for part in PARTS:
            module = getattr(self, part)
            if module is not None and part not in config.whole:
                module.requires_grad_(False)
        modules = {self.global_name(name): module for name, module in self.named_modules()}
        towers: dict[str, TransformerConfig] = {
            part: self.config if part == "language_model" else self.audio_config for part in PARTS
        }
        self.lora = LoraAdapters(modules, towers, targets, config, self.layout, seed)
        # Without a gradient at its input, a recomputed layer, or a pipeline stage, would have no backward pass.
        self.language_model.decoder.register_forward_pre_hook(_require_gradient, with_kwargs=True)
        if self.audio_encoder is not None and self.lora.has("audio_encoder"):
            self.audio_encoder.block.register_forward_pre_hook(_require_gradient, with_kwargs=True)

    @property
    def audio_config(self) -> TransformerConfig:
        """The configuration of encoder and adapter; the language model's where there are none."""
        return self.config if self.audio_encoder is None else self.audio_encoder.config

    def global_name(self, name: str) -> str:
        """Return the name in the whole model of one of this rank's modules or parameters.

        Layers are numbered over all stages, and experts over all ranks; LoRA is named after the matrix beside which it
        is.
        """
        if name.startswith(_LORA):
            return name.removeprefix(_LORA).replace("/", ".")
        if not name.startswith(_LAYERS):
            return name
        name = _GROUPED.sub(rf"{EXPERTS}\2.\1.weight", name)
        layer, is_expert, inner = name.partition(EXPERTS)
        if is_expert and self.arch.language.experts is not None:
            number, dot, rest = inner.partition(".")
            first = self.layout.ep_group.rank() * self.arch.language.experts.count // self.layout.config.ep
            name = f"{layer}.mlp.experts.{first + int(number)}{dot}{rest}"
        number, dot, rest = name.removeprefix(_LAYERS).partition(".")
        return f"{_LAYERS}{self.language_model.decoder.layers[int(number)].layer_number - 1}{dot}{rest}"

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's activations from the pipeline schedule."""
        self.chunks[0].set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the weight, if any, whose gradient the first and the last stage share: that of tied embeddings."""
        if not self.share_embeddings_and_output_weights:
            return None
        shared: Tensor = self.language_model.shared_embedding_or_output_weight()
        return shared

    @property
    def output_weight(self) -> Tensor:
        """[V_padded / TP, H], on the last stage."""
        shared = self.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight if shared is None else shared

    def forward(self, batch: ModelInput, chunk: int = 0) -> Tensor:
        """Run this stage, or one of this rank's interleaved stages.

        Args:
            batch: the same on all stages.
            chunk: which of this rank's.

        Returns:
            [S/CP, B, H], the final hidden states of this rank's tokens on the last stage; [S/CP or S/CP/TP, B, H] for
            the next stage elsewhere. S = T and B = 1 for a packed microbatch.

        Raises:
            CordError: placeholders and audio features do not match in number, or a text model is given audio.
        """
        decoder_input, language_model = None, self.chunks[chunk]
        if language_model.pre_process:
            decoder_input = self._embed(batch)
            if self.layout.config.cp > 1:
                rows = self.layout.sequence_sharding.rows(batch.cu_seqlens or (0, decoder_input.shape[0]))
                decoder_input = decoder_input.index_select(0, to_device(rows, decoder_input.device))
            if self.config.sequence_parallel:
                decoder_input = scatter_to_sequence_parallel_region(decoder_input, group=self.layout.tp_group)
            if self.routing is not None and torch.is_grad_enabled() and not decoder_input.requires_grad:
                decoder_input.requires_grad_(True)  # ranks that exchange tokens must all do so in the backward pass
        packed = None if batch.cu_seqlens is None else packed_sequences(batch.cu_seqlens, self._cu_seqlens_device)
        with self._recording(batch):
            hidden: Tensor = language_model(
                batch.token_ids, None, None, decoder_input=decoder_input, packed_seq_params=packed
            )
        if language_model.post_process and self.config.sequence_parallel:
            # The loss sums the hidden states' gradient over the tensor-parallel ranks itself.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.layout.tp_group
            )
        return hidden

    def _recording(self, batch: ModelInput) -> AbstractContextManager[None]:
        """Return the context in which routers, if there are some, record what they choose and follow what is given."""
        if self.routing is None or batch.lengths is None or (not self.routing.active and batch.experts is None):
            return nullcontext()
        size, length = batch.token_ids.shape
        return self.routing.routing(
            find_rows(size, length, batch.lengths, batch.cu_seqlens, batch.experts, self.layout)
        )

    def encode_audio(self, features: Tensor, num_frames: tuple[int, ...]) -> Tensor:
        """Return the features of all clips at the language model's width, [tokens of all clips, H]; first stage only.

        Context-parallel ranks encode a share of the clips each.

        Args:
            features: float32 [C, mels, frames].
            num_frames: C numbers, valid frames of each clip.
        """
        cp = self.layout.config.cp
        if cp == 1:
            return self._encode(list(features), num_frames)
        assert self.arch.encoder is not None
        dealt = deal_clips([self.arch.encoder.computed_positions(frames) for frames in num_frames], cp)
        own = dealt[self.layout.sequence_sharding.cp_rank]
        if own:
            audio = self._encode([features[clip] for clip in own], tuple(num_frames[clip] for clip in own))
        else:
            weight = self.language_model.embedding.word_embeddings.weight
            audio = no_tokens(self.arch.language.hidden_size, self._trained_audio_parameters(), weight)
        return gather_clips(audio, dealt, [self.arch.num_audio_tokens(n) for n in num_frames], self.layout.cp_group)

    def _encode(self, features: Sequence[Tensor], num_frames: tuple[int, ...]) -> Tensor:
        assert self.audio_encoder is not None
        assert self.adapter is not None
        counts = [self.audio_encoder.num_outputs(frames) for frames in num_frames]
        tokens = [self.arch.num_audio_tokens(frames) for frames in num_frames]
        audio: Tensor = self.adapter(self.audio_encoder(features, num_frames), counts, tokens)
        return audio

    def _trained_audio_parameters(self) -> list[Tensor]:
        """Return the parameters that are trained of encoder and adapter, and of LoRA beside them."""
        parts = ("audio_encoder.", "adapter.")
        named = ((self.global_name(name), parameter) for name, parameter in self.named_parameters())
        return [each for name, each in named if each.requires_grad and name.startswith(parts)]

    def _embed(self, batch: ModelInput) -> Tensor:
        """Return word embeddings [S, B, H] with audio features in the placeholders' rows."""
        positions = torch.zeros_like(batch.token_ids)  # unused: rotary positions enter in the attention
        embedded: Tensor = self.language_model.embedding(batch.token_ids, positions)
        if self.arch.encoder is None or self.arch.audio_token_id is None:
            if batch.features is not None:
                raise CordError(
                    f"samples {', '.join(batch.sample_ids)}: audio for a {self.arch.model_type} model, "
                    "which takes text alone; give it text prompts"
                )
            return embedded
        tokens = [self.arch.num_audio_tokens(frames) for frames in batch.num_frames or ()]
        token_ids = batch.token_ids.cpu() if batch.host_token_ids is None else batch.host_token_ids
        is_placeholder = torch.eq(token_ids, self.arch.audio_token_id)  # [B, S], on the host
        refuse_tokens(token_ids, self.arch, batch.sample_ids)
        check_placeholders(placeholders_per_sample(is_placeholder, batch.cu_seqlens), tokens, batch.sample_ids)
        if batch.features is None:
            return embedded
        assert batch.num_frames is not None
        audio = self.encode_audio(batch.features, batch.num_frames)
        sequence, size, hidden = embedded.shape
        rows = embedded.transpose(0, 1).reshape(-1, hidden)
        rows = rows.index_copy(0, to_device(true_rows(is_placeholder), rows.device), audio.to(rows.dtype))
        return rows.reshape(size, sequence, hidden).transpose(0, 1).contiguous()


def _check_mixture(parallel: ParallelConfig) -> None:
    """Refuse layouts that a mixture of experts does not go with."""
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise CordError(
            f"parallel.tp={parallel.tp} with a mixture of experts needs parallel.sequence_parallel=true, so that each "
            "rank routes tokens of its own"
        )


def _require_gradient(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Let the hidden states that enter a tower require a gradient, in a forward pass that has a backward pass."""
    hidden = inputs[0] if inputs else named["hidden_states"]
    if torch.is_grad_enabled() and hidden is not None and not hidden.requires_grad:
        hidden.requires_grad_(True)


def _mark_sharded_weights(model: torch.nn.Module) -> None:
    """Mark the weights that are shards, for the optimizer.

    Megatron-Core 0.16 marks weights only while it initialises them, later versions only some of them. An unmarked shard
    counts as a copy that every tensor-parallel rank has, and the gradient norm misses all shards but one rank's.
    """
    for module in model.modules():
        if (
            isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear)
            and module.weight is not None
        ):
            module.weight.tensor_model_parallel = True
            module.weight.partition_dim = int(isinstance(module, RowParallelLinear))
            module.weight.partition_stride = 1

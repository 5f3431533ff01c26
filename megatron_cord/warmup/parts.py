"""What all stages need of a checkpoint: encoder, adapter, single rows of the word embedding. The rest is not loaded.

All of the checkpoint's tensors are looked at by their headers first. Every rank has all of the encoder and the adapter,
whatever the number of ranks: what is trained is not large enough to be split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_cord.convert.hf.carried import Carried, read_carried
from megatron_cord.convert.hf.reader import StoredTensor, stored_tensors
from megatron_cord.convert.hf.spelling import published
from megatron_cord.convert.inventory import fake_model
from megatron_cord.convert.loading import Source, find_sources, read_block
from megatron_cord.errors import CordError
from megatron_cord.model.adapters import Adapter, build_adapter
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.encoder import AudioEncoder
from megatron_cord.model.families import family_of, load_architecture
from megatron_cord.parallel.layout import Layout

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_ENCODER, _ADAPTER = "audio_encoder.", "adapter."


@dataclass(frozen=True)
class Parts:
    """Parts of a checkpoint on this rank.

    Attributes:
        arch: of the whole.
        encoder: its weights have no gradients.
        learnable: names of the encoder's weights that can be trained; the sinusoids of its positions are none.
        adapter: in fp32.
        stored: where all tensors of its model lie, by published name, in the order of export.
        carried: the tensors of other parts.
        sources: where the tensors lie, by Megatron's names.
    """

    arch: Architecture
    encoder: AudioEncoder
    learnable: tuple[str, ...]
    adapter: Adapter
    stored: Mapping[str, StoredTensor]
    carried: Carried
    sources: Mapping[str, Source]

    @property
    def stored_dtype(self) -> torch.dtype:
        """The precision of the files."""
        return next(iter(self.stored.values())).dtype

    def embedding_rows(self, token_ids: Sequence[int], device: torch.device) -> Tensor:
        """Return rows of the word embedding, float32 [tokens, H]."""
        rows = self.arch.language.padded_vocab_size(1)
        out = torch.empty(len(token_ids), self.arch.language.hidden_size)
        for place, token in enumerate(token_ids):
            read_block(self.sources[_EMBEDDING], rows, (token, 0), out[place : place + 1])
        return out.to(device)

    def encoder_weights(self, device: torch.device) -> dict[str, Tensor]:
        """Read the encoder's learnable weights from the files, in fp32."""
        found = {}
        for name in self.learnable:
            out = torch.empty(self.encoder.get_parameter(name).shape)
            read_block(self.sources[_ENCODER + name], out.shape[0], (0, 0), out)
            found[name] = out.to(device)
        return found

    def trained_tensors(self, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapter's weights, and these of the encoder, under their published names, on the host."""
        tensors = {}
        rules = family_of(self.arch).tensor_map(self.arch).by_megatron_name
        weights = {_ENCODER + name: weight for name, weight in encoder.items()}
        weights |= {_ADAPTER + name: parameter for name, parameter in self.adapter.named_parameters()}
        for name, weight in weights.items():
            rule = rules[name]
            for published_name, part in zip(rule.hf, rule.layout.split(weight.detach().cpu(), 1), strict=True):
                if published_name is not None:
                    tensors[published_name] = part
        return tensors


def check_adapter(checkpoint: str) -> Architecture:
    """Return the architecture of a checkpoint that has an adapter.

    Raises:
        CordError: it has none, or as `load_architecture`.
    """
    arch = load_architecture(checkpoint)
    if arch.encoder is None or arch.adapter is None:
        raise CordError(
            f"{checkpoint} is a text model ({arch.model_type}), which has no adapter to warm up; cord graft makes a "
            "speech model of it and a Whisper"
        )
    return arch


@torch.no_grad()
def read_parts(checkpoint: str, layout: Layout, dtype: torch.dtype) -> Parts:
    """Read the parts of a checkpoint. Collective over all ranks.

    Args:
        checkpoint: a Hugging Face directory.
        layout: of data-parallel ranks alone.
        dtype: of the encoder.

    Raises:
        CordError: it has no adapter, or its tensors do not fit its configuration.
    """
    arch = check_adapter(checkpoint)
    assert arch.encoder is not None
    assert arch.adapter is not None
    files = stored_tensors(checkpoint)
    sources = find_sources(fake_model(arch, layout, dtype), files)
    tensors = dict(published(arch, files))
    encoder = AudioEncoder(arch.encoder, layout, dtype, LayerConfig("torch"))
    sizes = (arch.encoder.hidden_size, arch.language.hidden_size)
    adapter = build_adapter(arch.adapter, sizes, encoder.config, layout.device)
    adapter.float()
    for part, module in ((_ENCODER, encoder), (_ADAPTER, adapter)):
        module.to(layout.device)
        _fill(module, part, sources)
    learnable = tuple(name for name, parameter in encoder.named_parameters() if parameter.requires_grad)
    encoder.requires_grad_(False)
    names = (name for rule in family_of(arch).tensor_map(arch).rules for name in rule.hf_names)
    stored = {name: tensors[name] for name in names}
    return Parts(arch, encoder, learnable, adapter, stored, read_carried(checkpoint, arch), sources)


def _fill(module: nn.Module, part: str, sources: Mapping[str, Source]) -> None:
    for name, parameter in module.named_parameters():
        read_block(sources[part + name], parameter.shape[0], (0, 0), parameter.data)

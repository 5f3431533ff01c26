"""A checkpoint's tensors under their published names, whatever spelling a version of transformers wrote.

Which spellings there are is taken from transformers itself: the renamings that `from_pretrained` of the installed
version applies lead every spelling to one name of the module, and so do they for the published one.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from megatron_cord.convert.hf.reader import StoredTensor, stored_tensors
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import FAMILIES, family_of
from megatron_cord.runtime.log import info_once

Item = TypeVar("Item")

#: Buffers that older versions of transformers wrote beside the weights; the model computes them from its configuration.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_HEAD, _EMBEDDING = "language_model.output_layer.weight", "language_model.embedding.word_embeddings.weight"


class Spelling:
    """The names of one architecture's tensors.

    Args:
        arch: of the model.

    Attributes:
        tied_head: the published name of the output layer where it is the word embedding; None where it is not.
        embedding: the published name of the word embedding.
    """

    def __init__(self, arch: Architecture) -> None:
        self._model_type = arch.model_type
        untied = replace(arch, language=replace(arch.language, tied_embeddings=False))
        table = family_of(arch).tensor_map(untied)
        (head,) = table.by_megatron_name[_HEAD].hf_names
        (self.embedding,) = table.by_megatron_name[_EMBEDDING].hf_names
        self.tied_head = head if arch.language.tied_embeddings else None
        self._names = table.by_hf_name

    def module_name(self, name: str) -> str:
        """Return the name in the plain model of a tensor of a checkpoint."""
        renamings, prefix, _ = _renamings(self._model_type)
        return str(rename_source_key(name, renamings, [], prefix, self._by_module_name)[0])

    def published_name(self, name: str) -> str:
        """Return the published name of a tensor of a checkpoint; a name of none of the model's is returned as it is."""
        if name in self._names:  # without transformers' class, which takes a second to import
            return name
        return self._by_module_name.get(self.module_name(name), name)

    @cached_property
    def _by_module_name(self) -> dict[str, str]:
        """Published names by those in the plain model, where no published name lacks its base model's prefix."""
        renamings, _, outside = _renamings(self._model_type)
        return {rename_source_key(name, renamings, [])[0].removeprefix(outside): name for name in self._names}


@cache
def _renamings(model_type: str) -> tuple[list[WeightRenaming], str | None, str]:
    """Return what transformers renames in the names of a checkpoint of this family, and its base model's prefix.

    The third is the beginning of all names in files of a whole of which the plain model is a part, else empty.
    """
    kind = plain_class(model_type)
    if not any(base.__module__.startswith("transformers.models.") for base in kind.__mro__):
        return [], None, ""  # a class of this project's own has the published names
    with torch.device("meta"):  # the renamings depend on the parts of the model and not on their sizes
        model = kind(kind.config_class())
    steps = get_model_conversion_mapping(model)
    prefix = model.base_model_prefix
    outside = "" if hasattr(model, prefix) else f"{prefix}."
    return [step for step in steps if isinstance(step, WeightRenaming)], prefix, outside


def plain_class(model_type: str) -> Any:
    """Return the class of the same model outside Megatron."""
    module, name = FAMILIES[model_type].plain_class.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def as_published(
    arch: Architecture, tensors: Iterable[tuple[str, Item]], read: Callable[[Item], Tensor], source: str
) -> Iterator[tuple[str, str, Item]]:
    """Yield each tensor that is a weight of its own, with its published name.

    What `from_pretrained` leaves out is left out, and said once: buffers that the model computes, and an output layer
    that is stored beside the word embedding which it is. Where only the output layer is stored, it is the embedding.
    So are the tensors of parts that are not trained here (`Family.carries`).

    Args:
        arch: of the model.
        tensors: (name, tensor) in any spelling.
        read: returns an item's content.
        source: what they come from, for messages.

    Yields:
        (name as given, published name, tensor); a name of none of the model's tensors is yielded as it is.

    Raises:
        CordError: an output layer that is not the word embedding, though the configuration ties both.
    """
    spelling, carries = Spelling(arch), family_of(arch).carries
    computed = carried = 0
    head: tuple[str, Item] | None = None
    embedding: Item | None = None
    for given, item in tensors:
        if carries and given.startswith(carries):
            carried += 1
            continue
        name = spelling.published_name(given)
        if _COMPUTED.search(given):
            computed += 1
        elif name == spelling.tied_head:
            head = given, item
        else:
            if name == spelling.embedding and spelling.tied_head is not None:
                embedding = item
            yield given, name, item
    if head is not None and embedding is None:
        yield head[0], spelling.embedding, head[1]
    elif head is not None and embedding is not None:
        if not torch.equal(read(head[1]), read(embedding)):
            raise CordError(
                f"{source}: {head[0]} and {spelling.embedding} differ, but config.json ties them "
                "(tie_word_embeddings); set it to false there, or leave one of them out"
            )
        info_once(f"{source}: {head[0]} is the word embedding once more (tie_word_embeddings), and is read once")
    if carried:
        info_once(
            f"{source}: {carried} tensors of parts that are not trained ({', '.join(carries)}) are left as they are"
        )
    if computed:
        info_once(f"{source}: {computed} tensors *.rotary_emb.inv_freq are ignored: the model computes them")


def published_tensors(checkpoint_dir: str | Path, arch: Architecture) -> list[tuple[str, StoredTensor]]:
    """Return the checkpoint's weights by published name; only headers are read.

    Raises:
        CordError: as `stored_tensors` and `as_published`.
    """
    return published(arch, stored_tensors(checkpoint_dir))


def published(arch: Architecture, stored: Sequence[StoredTensor]) -> list[tuple[str, StoredTensor]]:
    """Return those of the stored tensors that are weights of their own, by published name."""
    source = str(stored[0].path.parent) if stored else "the checkpoint"
    items = as_published(arch, ((tensor.name, tensor) for tensor in stored), StoredTensor.read, source)
    return [(name, tensor) for _, name, tensor in items]

"""What a family of models is: the one object in which everything about it is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_cord.model.architecture import Architecture
from megatron_cord.model.tensor_map import TensorMap


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: its name in Hugging Face configurations.
        architecture: reads the sizes from such a configuration. It raises CordError for a setting under which the
            model would compute something else, and AttributeError for a missing size.
        tensor_map: names and layouts of all tensors of such an architecture.
        plain_class: module and name of the same model outside Megatron. The local engine generates with it, and
            `cord convert check` compares with it.
        chat_template: Jinja, for families whose published processing is code rather than a template.
        joins_windows: whether a recording beyond the encoder's window stays one recording to the template, with
            the placeholders of all its windows in one row; otherwise its windows stand there as recordings.
        longest_seconds: of a recording that is cut into windows; None for any length.
        carries: beginnings of the names of tensors that belong to parts of a checkpoint which are not trained here.
            Conversions pass them on as they are.
        carries_files: names of weight files that belong to such parts, and are passed on unread.
        pads_to_longest: whether clips are padded to the longest one of their prompt before their features are made, as
            by a processor without a window; otherwise to the window.
        sees: whether the checkpoint's processor also makes features of images and videos, for which it needs packages
            that nothing here needs; tokenizer and feature extractor are then read by themselves.
        sglang_max_clips: how many recordings one prompt may have on an SGLang server; None if SGLang servers do not
            serve the family.
        sglang_takes_ids: whether its prompts with recordings are sent there as ids with one placeholder a clip, which
            the project's own processors take; SGLang's take text alone.
    """

    model_type: str
    architecture: Callable[[PretrainedConfig], Architecture]
    tensor_map: Callable[[Architecture], TensorMap]
    plain_class: str
    chat_template: str | None = None
    joins_windows: bool = False
    longest_seconds: int | None = None
    carries: tuple[str, ...] = ()
    carries_files: tuple[str, ...] = ()
    pads_to_longest: bool = False
    sees: bool = False
    sglang_max_clips: float | None = None
    sglang_takes_ids: bool = False

"""A checkpoint as a plain model in one process: transformers' own class, or the family's where transformers has none.

The local engine generates with it, and `cord convert check` compares with it. No code of the checkpoint is run.
Legend: B sequences, S tokens, H hidden, V vocabulary, C clips.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cord.convert.hf.spelling import Spelling, plain_class, published_tensors
from megatron_cord.convert.plain.attention import use_small_attention
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.errors import CordError
from megatron_cord.losses.kernels.matmul import product
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import configuration_for, load_architecture

#: What the classes call the mask of a clip's own frames, [C, frames].
_FRAME_MASKS = ("feature_attention_mask", "input_features_mask")


class PlainModel:
    """The model in evaluation mode.

    Args:
        checkpoint_dir: a directory of Hugging Face files.
        dtype: of parameters and activations; None for the files'.
        device: where to put it.

    Attributes:
        device: where it is.
        parameters: its tensors by published name, as far as the checkpoint has them.

    Raises:
        CordError: the checkpoint cannot be loaded, lacks a tensor, or has one that the model has no place for.
    """

    def __init__(
        self, checkpoint_dir: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> None:
        directory = checkpoint_directory(checkpoint_dir)
        arch = load_architecture(directory)
        names = [name for name, _ in published_tensors(directory, arch)]
        self._directory, self._arch = directory, arch
        self._spelling = spelling = Spelling(arch)
        try:
            model: Any
            kind = plain_class(arch.model_type)
            model, report = kind.from_pretrained(
                directory,
                config=configuration_for(directory, kind),
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise CordError(
                f"{directory}: the weights cannot be loaded ({why}); download the checkpoint again"
            ) from error
        missing = set(report["missing_keys"])
        if spelling.tied_head is not None:  # not every class of transformers ties them
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            if spelling.module_name(spelling.embedding) in missing:  # the output layer alone is stored
                embedding.weight = head.weight
            head.weight = embedding.weight
            missing -= {spelling.module_name(name) for name in (spelling.tied_head, spelling.embedding)}
        if missing:
            raise CordError(f"{directory}: the weights lack {', '.join(sorted(missing)[:8])}; download them again")
        self._model = model.to(device).eval()
        use_small_attention(self._model)
        self.device = next(model.parameters()).device
        self.parameters = _by_published_name(model, names, spelling, directory)
        # transformers' models keep all but the output layer in one module; a family's own model has a method for it.
        self._hidden = model.hidden if hasattr(model, "hidden") else model.model
        forward = self._hidden.forward if isinstance(self._hidden, torch.nn.Module) else self._hidden
        self._routers = _routers(model)
        taken = inspect.signature(forward).parameters
        self._frame_mask = next((name for name in _FRAME_MASKS if name in taken), None)

    def parameter(self, name: str) -> Tensor | None:
        """Return the tensor of this name, in any spelling that transformers reads; None without one."""
        return self.parameters.get(self._spelling.published_name(name))

    @torch.no_grad()
    def restore(self, names: Collection[str]) -> None:
        """Read these tensors, in any spelling that transformers reads, from the checkpoint's files again."""
        stored = dict(published_tensors(self._directory, self._arch))
        for name in map(self._spelling.published_name, names):
            self.parameters[name].copy_(stored[name].read())

    def hidden(self, input_ids: Tensor, features: Tensor | None, num_frames: Tensor | None, **settings: Any) -> Any:
        """Return the final hidden states as `last_hidden_state` [B, S, H], and `past_key_values`.

        Args:
            input_ids: int64 [B, S], with one placeholder for each token of a clip.
            features: float32 [C, mels, frames] of all clips in the batch's order; None without audio.
            num_frames: int64 [C], valid frames of each clip; None without audio.
            settings: attention_mask, position_ids, past_key_values, use_cache.
        """
        if features is not None and num_frames is not None:
            settings["input_features"] = features
            if self._frame_mask is not None:
                frames = torch.arange(features.shape[-1], device=num_frames.device)
                settings[self._frame_mask] = (frames[None] < num_frames[:, None]).long()
        return self._hidden(input_ids=input_ids, **settings)

    @contextmanager
    def chosen_experts(self) -> Iterator[list[Tensor]]:
        """Collect what the routers of a mixture of experts choose: an int16 [B · S, k] for each layer of each pass.

        Raises:
            CordError: the model has no routers.
        """
        if not self._routers:
            raise CordError("rollout.router_replay: the engine's model has no routers of experts; set it to false")
        chosen: list[Tensor] = []
        hooks = [r.register_forward_hook(lambda _, __, made: chosen.append(made[2].short())) for r in self._routers]
        try:
            yield chosen
        finally:
            for hook in hooks:
                hook.remove()

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits float32 [..., V] of hidden states [..., H], unrounded, as the trainer's."""
        weight = self._model.get_output_embeddings().weight
        return product(hidden.flatten(0, -2), weight, torch.float32).view(*hidden.shape[:-1], -1)


def _routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that choose experts, in the order of layers; transformers' classes name theirs."""
    recorders = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    named = (each["router_logits"] for each in recorders if "router_logits" in each)
    kinds = tuple({recorder.target_class for recorder in named if hasattr(recorder, "target_class")})
    return [module for module in model.modules() if isinstance(module, kinds)]


def _by_published_name(model: Any, names: list[str], spelling: Spelling, directory: Path) -> dict[str, Tensor]:
    """Return the model's tensors under published names, which need not be the module's own."""
    modules = {
        part: view for name, tensor in model.state_dict().items() for part, view in published_parts(name, tensor)
    }
    parameters: dict[str, Tensor] = {}
    for name in names:
        module_name = spelling.module_name(name)
        if module_name not in modules:
            raise CordError(
                f"{directory}: tensor {name} has no place in the model that generates; weights could not be synced"
            )
        parameters[name] = modules[module_name]
    return parameters

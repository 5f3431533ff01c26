"""The model class of lmms-eval (0.7.3), imported by lmms-eval alone.

    lmms-eval --model megatron_cord --model_args config=runs/mine/config.yaml --tasks voicebench_openbookqa

`model_args` are `config`, a run's file, and any of its keys: `evaluation.checkpoint=latest`, `rollout.engine=sglang`.
Without a file `model.checkpoint` names a Hugging Face checkpoint. One process: several GPUs are those of the servers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.lmms_eval.answerer import Answerer, Asked, as_recording
from megatron_cord.trainer.config import RunConfig

_BEAMS, _LENGTH, _SAMPLED = "num_beams", "max_new_tokens", "temperature"


class CordModel(lmms):  # type: ignore[misc]
    """Answers the requests of tasks whose output is generated text.

    Args:
        config: a run's configuration file; "" for none.
        batch_size: requests that are generated together; lmms-eval's `--batch_size`, evaluation.chunk where that is 1.
        max_batch_size: of no use here.
        device: must be None: a process takes the GPU that CUDA_VISIBLE_DEVICES leaves it, or the CPU.
        overrides: keys of the configuration.

    Raises:
        CordError: several processes, a device, or what `Answerer` raises.
    """

    is_simple = True

    def __init__(
        self,
        config: str = "",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CordError("the model megatron_cord runs in one process; for several GPUs use rollout.engine=sglang")
        if device is not None:
            raise CordError(f"leave --device {device} away and set CUDA_VISIBLE_DEVICES")
        if not config:
            overrides = {"output_dir": "lmms_eval", "evaluation.checkpoint": "base"} | overrides
        settings = [f"{key}={_yaml(value)}" for key, value in overrides.items()]
        given = load_config(RunConfig, Path(config) if config else None, settings)
        size = str(batch_size or 1)
        self._chunk = int(size) if size not in ("1", "auto") else given.evaluation.chunk
        self._longest = given.evaluation.max_new_tokens
        self._answerer = Answerer(given)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each request, a batch at a time."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="megatron_cord") as bar:
            for start in range(0, len(requests), self._chunk):
                chunk = requests[start : start + self._chunk]
                made = self._answerer.answer([self._asked(one, start + i) for i, one in enumerate(chunk)])
                for request, answer in zip(chunk, made, strict=True):
                    self.cache_hook.add_partial("generate_until", request.args[:2], answer)
                answers += made
                bar.update(len(chunk))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: answers are generated, not scored."""
        raise CordError("the model megatron_cord answers tasks of output_type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: a task of several rounds asks for answers in between."""
        raise CordError("the model megatron_cord answers tasks of one round")

    def clean(self) -> None:
        """Leave the engine; called at the end."""
        self._answerer.close()
        super().clean()

    def _asked(self, request: Any, number: int) -> Asked:
        text, options, doc_to_visual, doc_id, task, split = request.args
        where = f"task {task}, document {doc_id}"
        heard = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        temperature = _temperature(options, where)
        until = options.get("until") or ()
        return Asked(
            f"{task}-{doc_id}-{number}",
            text,
            tuple(as_recording(audio, where) for audio in heard if audio is not None),
            temperature,
            int(options.get(_LENGTH) or self._longest),
            (until,) if isinstance(until, str) else tuple(until),
            number,
        )


def _temperature(options: Mapping[str, Any], where: str) -> float:
    """Return the temperature of a request; beams, and a top_p that would cut off tokens, are refused."""
    if (options.get(_BEAMS) or 1) != 1:
        raise CordError(f"{where}: {_BEAMS}={options[_BEAMS]}; set {_BEAMS}=1 with --gen_kwargs")
    temperature = float(options.get(_SAMPLED) or 0.0) if options.get("do_sample", True) else 0.0
    if temperature > 0 and (options.get("top_p") or 1.0) != 1.0:
        raise CordError(f"{where}: top_p={options['top_p']} of a sampled answer; set top_p=1 with --gen_kwargs")
    return temperature


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

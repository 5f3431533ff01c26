"""A warm-up from its configuration to the checkpoint that a run starts from; every step of it can be stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from megatron_cord.config.loading import dump_config, to_dict
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import run_on_main
from megatron_cord.runtime.files import checkpoint_fingerprint, read_json_object, write_json
from megatron_cord.runtime.progress import Bars
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.warmup.config import WarmupConfig
from megatron_cord.warmup.corpus import Corpus
from megatron_cord.warmup.distillation import Distillation, check_prompt
from megatron_cord.warmup.parts import Parts, check_adapter, read_parts
from megatron_cord.warmup.progress import Progress, read_state, write_state
from megatron_cord.warmup.stages import Stages
from megatron_cord.warmup.states import EncoderStates, encode
from megatron_cord.warmup.token_errors import TokenErrors
from megatron_cord.warmup.updates import StageConfig, Updates
from megatron_cord.warmup.writing import plan, write_model

logger = logging.getLogger(__name__)
MODEL, SUMMARY = "model", "summary.json"
_INPUTS = "inputs.json"
#: settings that may change between two starts; what lies at the paths may not
_FREE = ("output_dir", "checkpoint", "data", "held_out", "save_interval", "timeout_minutes")
_LINES = 15  # of progress, a stage


def warm_up(config: WarmupConfig, layout: Layout, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Warm up the adapter of a checkpoint and write `output_dir/model`. Collective over all ranks.

    Args:
        config: of the warm-up.
        layout: of data-parallel ranks alone.
        stop: whether this rank was asked to stop; looked at after every update.

    Returns:
        the content of summary.json.

    Raises:
        StoppedError: it was asked to stop; the same call goes on.
        CordError: something that is needed is missing or does not fit, or output_dir holds another warm-up.
    """
    directory = Path(config.output_dir)
    arch = check_adapter(config.checkpoint)
    for name, stage in config.stages.items():
        if (size := stage.batch_size) < layout.world_size:
            raise CordError(f"{name}.batch_size={size} is less than the {layout.world_size} ranks; raise it")
    prompts = PromptBuilder(config.checkpoint)
    filler = _filler(config.regression.filler, prompts)
    corpus = Corpus(config, prompts, arch)
    if config.distillation.steps:
        check_prompt(config.distillation, corpus, prompts)
    run_on_main(lambda: _claim(config, directory, corpus))
    if (directory / SUMMARY).is_file() and (directory / MODEL).is_dir():
        logger.info("%s is warmed up already", directory / MODEL)
        return read_json_object(directory / SUMMARY, "remove it")
    parts = read_parts(config.checkpoint, layout, getattr(torch, config.dtype))
    plan(parts.stored, parts.carried, directory / MODEL)
    counts = [parts.encoder.num_outputs(each.num_frames) for each in corpus.utterances]
    assert arch.encoder is not None
    states = EncoderStates(directory / "states", counts, arch.encoder.hidden_size)
    stages = Stages(config, layout, corpus, states, parts, filler)
    encoding = partial(encode, states, corpus, parts.encoder, layout, stop)
    distillation = partial(Distillation, config, layout, corpus, prompts, arch, parts.encoder, stages.adapt)
    run = _Run(config, layout, stages, encoding, distillation, stop)
    if stages.encoder is None:
        run.encode()
    run.train_all()
    stages.finish()
    run.measure("adapter as written", stages.adapter_errors(stages.unit))
    summary = _summary(config, layout, corpus, stages, run.progress)
    run_on_main(lambda: _write(config, directory, parts, stages, summary))
    return summary


class _Run:
    """The updates of all stages, from wherever they were stopped."""

    def __init__(
        self,
        config: WarmupConfig,
        layout: Layout,
        stages: Stages,
        encoding: Callable[[], None],
        distillation: Callable[[], Distillation],
        stop: Callable[[], bool],
    ) -> None:
        self._config, self._layout, self._stages, self._stop = config, layout, stages, stop
        self._encoding, self._distillation = encoding, distillation
        self._directory = Path(config.output_dir)
        self._modules: dict[str, nn.Module] = {"ctc": stages.ctc_module, "regression": stages.adapter}
        self.progress, self._saved = read_state(self._directory)
        for name, module in self._modules.items() if self._saved else ():
            module.load_state_dict(self._of(name))
        if self._saved:
            logger.info("going on with %s after step %d", self.progress.stage, self.progress.step)

    def train_all(self) -> None:
        """Make all updates that are left, and measure before and after each stage."""
        stages, config = self._stages, self._config
        if self.progress.stage == "ctc":
            self._train(
                "ctc",
                config.ctc,
                self._modules["ctc"],
                lambda step: [stages.recognizer_loss(step)],
                lambda when: self.measure(when, stages.recognizer_errors()),
                {"encoder.": config.ctc.encoder_learning_rate},
            )
            self._go_on_to("regression")
        if stages.encoder is not None:
            stages.keep_encoder()
            self.encode()
        if self.progress.stage == "regression":
            self._train(
                "regression",
                config.regression,
                stages.adapter,
                lambda step: [stages.regression_loss(step)],
                lambda when: self.measure(when, stages.adapter_errors()),
            )
            self._go_on_to("distillation")
        if config.distillation.steps:
            distillation = self._distillation()
            self._train(
                "distillation",
                config.distillation,
                stages.adapter,
                distillation.losses,
                lambda when: self._note_divergence(when, distillation.held_out_divergence()),
            )

    def encode(self) -> None:
        """Compute the encoder's states that are missing."""
        begun = time.monotonic()
        self._encoding()
        self.progress.seconds.setdefault("encoding", round(time.monotonic() - begun, 1))

    def measure(self, what: str, found: TokenErrors) -> None:
        """Note a token error rate."""
        self.progress.token_errors[what] = found.rate
        logger.info("%s: token error %.3f on what is held out (%d tokens)", what, found.rate, found.tokens)

    def _note_divergence(self, what: str, nats: float) -> None:
        self.progress.divergences[what] = nats
        logger.info("%s: divergence from reading %.3f nats a token on what is held out", what, nats)

    def _go_on_to(self, stage: str) -> None:
        self.progress.stage, self.progress.step, self._saved = stage, 0, {}

    def _train(
        self,
        name: str,
        settings: StageConfig,
        module: nn.Module,
        losses_of: Callable[[int], Iterable[Tensor]],
        measure: Callable[[str], None],
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        progress, steps = self.progress, settings.steps
        updates = Updates(name, module, settings, self._config, self._layout, peaks)
        updates.restore(self._of("moments"))
        if not {f"{name} before"} & (progress.token_errors.keys() | progress.divergences.keys()):
            measure(f"{name} before")
        before, begun = progress.seconds.get(name, 0.0), time.monotonic()
        losses = progress.losses.setdefault(name, [])
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, enabled=self._layout.is_main) as bars:
            bar = bars.add_task(name, total=steps, completed=progress.step)
            for step in range(progress.step, steps):
                value, stops = updates.update(step, losses_of(step), stop=self._stop())
                progress.step = step + 1
                progress.seconds[name] = round(before + time.monotonic() - begun, 1)
                bars.update(bar, completed=progress.step, description=f"{name}, loss {value:.3f}")
                if progress.step in (1, steps) or progress.step % max(1, steps // _LINES) == 0:
                    losses.append((progress.step, value))
                    logger.info("%s: step %d of %d, loss %.4f", name, progress.step, steps, value)
                if stops or progress.step == steps or progress.step % self._config.save_interval == 0:
                    self._save(updates)
                if stops:
                    raise StoppedError("asked to stop: saved; the same command continues")
        measure(f"{name} after")

    def _save(self, updates: Updates) -> None:
        """Write the state on rank 0, while the others wait. Collective."""

        def write() -> None:
            tensors = {f"moments.{name}": each for name, each in updates.moments().items()}
            for name, module in self._modules.items():
                tensors |= {f"{name}.{key}": each for key, each in module.state_dict().items()}
            write_state(self._directory, self.progress, tensors)

        run_on_main(write)

    def _of(self, part: str) -> dict[str, Tensor]:
        """Return the saved tensors of a part."""
        named = self._saved.items()
        return {name.removeprefix(f"{part}."): each for name, each in named if name.startswith(f"{part}.")}


def _filler(text: str | None, prompts: PromptBuilder) -> int | None:
    if text is None:
        return None
    ids = prompts.encode(text)
    if len(ids) != 1:
        raise CordError(
            f"regression.filler={text!r} is {len(ids)} tokens of this tokenizer, and it must be one; choose another "
            "text, or null for zeros"
        )
    return ids[0]


def _claim(config: WarmupConfig, directory: Path, corpus: Corpus) -> None:
    """Write down what this warm-up is made of, or refuse a directory that holds another one."""
    inputs: dict[str, Any] = {
        "settings": {name: value for name, value in to_dict(config).items() if name not in _FREE},
        "checkpoint": checkpoint_fingerprint(checkpoint_directory(config.checkpoint)),
        "recordings": [opened.fingerprint for opened in corpus.sets],
    }
    path = directory / _INPUTS
    if path.is_file():
        found = read_json_object(path, "choose another output_dir")
        was = found.get("settings") or {}
        changed = [name for name, value in inputs["settings"].items() if was.get(name) != value]
        contents = ("checkpoint", "recordings")
        changed += [f"the content of {name}" for name in contents if found.get(name) != inputs[name]]
        if changed:
            raise CordError(
                f"{directory} holds a warm-up that differs in {', '.join(changed)}; choose another output_dir, or "
                "remove it"
            )
        return
    if (directory / MODEL).exists():
        raise CordError(f"{directory / MODEL} exists already and is of no warm-up; choose another output_dir")
    try:
        dump_config(config, directory / "config.yaml")
        write_json(path, inputs)
    except OSError as error:
        raise CordError(f"{directory} cannot be written to ({error.strerror}); choose another output_dir") from None


def _summary(
    config: WarmupConfig, layout: Layout, corpus: Corpus, stages: Stages, progress: Progress
) -> dict[str, Any]:
    held_out = [corpus.utterances[number] for number in corpus.held_out]
    return {
        "model": str(Path(config.output_dir) / MODEL),
        "trained": ["adapter"] if stages.encoder is None else ["audio_encoder", "adapter"],
        "recordings": {"trained on": corpus.num_train, "held out": len(held_out), "left out": corpus.skipped},
        "tokens": {
            "told apart": stages.num_classes,
            "held out": sum(len(each.token_ids) for each in held_out),
            "held out and never trained on": stages.unknown_tokens,
        },
        "token_errors": {name: round(rate, 4) for name, rate in progress.token_errors.items()},
        "divergences": {name: round(nats, 4) for name, nats in progress.divergences.items()},
        "losses": progress.losses,
        "seconds": progress.seconds,
        "ranks": layout.world_size,
        "threads": torch.get_num_threads(),
    }


def _write(config: WarmupConfig, directory: Path, parts: Parts, stages: Stages, summary: dict[str, Any]) -> None:
    changed = parts.trained_tensors({} if stages.encoder is None else stages.encoder.named())
    write_model(checkpoint_directory(config.checkpoint), directory / MODEL, parts, changed)
    write_json(directory / SUMMARY, summary)

"""Train the tiny checkpoint to answer written sums well, and spoken ones badly: the gap that CORD is to close.

First text alone; then text mixed with a few utterances, whose words are also predicted at the adapter's output by
connectionist temporal classification (CTC, Graves et al. 2006): without it the encoder learns nothing in so short a
time. The CTC head is dropped at the end.

Simplification: plain transformers and PyTorch in one process and fp32; a real run starts from a published checkpoint
instead, or from two and `cord warmup`, which takes both towers as trained and frozen; here neither knows anything yet.

Shapes: B sequences, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss

from examples.quickstart.questions import Question
from examples.quickstart.tiny_models import TinyModel, load_tiny_model
from megatron_cord.data.ordering.order import permutation
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt, Sample
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint

_RECORD = "warmup.json"
_IGNORED = -100


@dataclass(frozen=True)
class WarmUpConfig:
    """How long and how fast the tiny model learns; the defaults take about a minute on one thread."""

    text_steps: int = 250  # steps on written questions alone
    text_batch: int = 64  # questions in each of them
    mixed_steps: int = 230  # steps on written and spoken questions
    mixed_text: int = 24  # written questions in each of them
    mixed_audio: int = 16  # spoken questions in each of them
    recited_share: float = 0.25  # of the written questions, worked answers without their question
    ctc_weight: float = 0.5  # of the CTC loss beside the cross-entropy
    spoken_alike: bool = False  # answers to spoken questions count the same, however long they are; else tokens do
    learning_rate: float = 2e-3  # AdamW's peak
    final_fraction: float = 0.1  # of the peak, where the cosine ends
    rise_steps: int = 20  # linear rise to the peak
    clip_norm: float = 1.0  # largest norm of the gradient
    seed: int = 0  # order of the samples, and the CTC head

    def __post_init__(self) -> None:
        for name in ("text_batch", "mixed_text", "mixed_audio"):
            if getattr(self, name) < 1:
                raise CordError(f"warm-up: {name} is {getattr(self, name)}; each batch needs at least one question")


@dataclass(frozen=True)
class _Example:
    """A prompt with the response to learn and, for audio, the spoken words."""

    prompt: Prompt
    response: tuple[int, ...]
    transcript: tuple[int, ...] = ()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: sums depend on how many share them, and the weights must not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def warm_up(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    config: WarmUpConfig,
    questions: Sequence[Question],
    spoken: Sequence[Sample],
) -> None:
    """Train the checkpoint and write it anew; do nothing if ``output_dir`` holds the outcome of the same inputs.

    Args:
        checkpoint_dir: the initial weights.
        output_dir: complete or absent, whenever the process dies.
        config: the recipe.
        questions: written ones, with their solutions.
        spoken: spoken ones, with their solutions.

    Raises:
        CordError: ``output_dir`` holds something else, there is nothing to learn from, or a sample has no solution.
    """
    output = Path(output_dir)
    if not questions or not spoken:
        raise CordError(
            f"{output}: the warm-up needs written and spoken questions; got {len(questions)} and {len(spoken)}"
        )
    written = [
        Sample(question.id, question.text, np.zeros(0, np.float32), solution=question.solution)
        for question in questions
    ]
    record = _record(Path(checkpoint_dir), config, written, spoken)
    if output.exists():
        if (output / _RECORD).is_file() and json.loads((output / _RECORD).read_text(encoding="utf-8")) == record:
            return
        raise CordError(
            f"{output}: holds another checkpoint than this warm-up would write; remove it or choose another directory"
        )
    builder = PromptBuilder(checkpoint_dir)
    texts = [_example(builder, sample, builder.text_prompt(sample)) for sample in written]
    recited = [_without_question(builder, sample, text) for sample, text in zip(written, texts, strict=True)]
    audios = [_example(builder, sample, builder.audio_prompt(sample)) for sample in spoken]
    model = load_tiny_model(checkpoint_dir)
    model.module.train()
    _train(model, builder, config, texts, recited, audios)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    (partial / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    partial.rename(output)


def _train(
    model: TinyModel,
    builder: PromptBuilder,
    config: WarmUpConfig,
    texts: Sequence[_Example],
    recited: Sequence[_Example],
    audios: Sequence[_Example],
) -> None:
    """Make all steps, in place; the same arguments give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        ctc_head = nn.Linear(model.hidden_size, builder.vocab_size)
    every = (*model.module.parameters(), *ctc_head.parameters())
    parameters = [parameter for parameter in every if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
    text_order, audio_order = _shuffled_epochs(texts, config.seed, 0), _shuffled_epochs(audios, config.seed, 1)
    recited_order = _shuffled_epochs(recited, config.seed, 2)

    def draw_written(count: int) -> list[_Example]:
        alone = round(config.recited_share * count)
        return [*islice(text_order, count - alone), *islice(recited_order, alone)]

    rates = [*_rates(config, config.text_steps), *_rates(config, config.mixed_steps)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("warm-up", total=len(rates))
        for step, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            if step < config.text_steps:
                loss = _text_loss(model, builder.pad_id, draw_written(config.text_batch))
            else:
                share = config.mixed_text / (config.mixed_text + config.mixed_audio)
                text_loss = _text_loss(model, builder.pad_id, draw_written(config.mixed_text))
                audio_loss, ctc = _audio_losses(
                    model, ctc_head, builder.pad_id, list(islice(audio_order, config.mixed_audio)), config.spoken_alike
                )
                loss = share * text_loss + (1 - share) * audio_loss + config.ctc_weight * ctc
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            progress.update(bar, advance=1, description=f"warm-up, loss {loss.item():.3f}")


def _rates(config: WarmUpConfig, steps: int) -> list[float]:
    """Return the learning rates of one phase: a linear rise, then half a cosine down to the final fraction."""
    rise = min(config.rise_steps, steps)
    up = [(step + 1) / rise for step in range(rise)]
    turns = [(1 + math.cos(math.pi * step / (steps - rise))) / 2 for step in range(steps - rise)]
    down = [config.final_fraction + (1 - config.final_fraction) * turn for turn in turns]
    return [config.learning_rate * rate for rate in (*up, *down)]


def _shuffled_epochs(examples: Sequence[_Example], seed: int, stream: int) -> Iterator[_Example]:
    """Yield all of them in a new order each time, without an end."""
    for epoch in count():
        yield from (examples[index] for index in permutation(len(examples), seed, stream, epoch))


def _text_loss(model: TinyModel, pad_id: int, batch: Sequence[_Example]) -> Tensor:
    """Return the mean cross-entropy of the response tokens of written questions."""
    ids, targets, mask = _collate(batch, pad_id)
    return _cross_entropy(model, model.text(ids, mask), targets)


def _audio_losses(
    model: TinyModel, ctc_head: nn.Linear, pad_id: int, batch: Sequence[_Example], alike: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of response tokens, and the CTC loss of the words at the adapter's output.

    With ``alike``, the former is the mean over answers of the means over their tokens.
    """
    ids, targets, mask = _collate(batch, pad_id)
    clips = [example.prompt.clips[0] for example in batch]
    hidden, adapted = model.audio(ids, mask, clips)
    ctc = ctc_loss(
        ctc_head(adapted).log_softmax(-1).transpose(0, 1),
        torch.tensor([token for example in batch for token in example.transcript]),
        torch.tensor([clip.num_tokens for clip in clips]),
        torch.tensor([len(example.transcript) for example in batch]),
        blank=pad_id,
        zero_infinity=True,  # a clip with fewer features than words teaches nothing
    )
    if not alike:
        return _cross_entropy(model, hidden, targets), ctc
    answers = [_cross_entropy(model, states, tokens) for states, tokens in zip(hidden, targets, strict=True)]
    return torch.stack(answers).mean(), ctc


def _cross_entropy(model: TinyModel, hidden: Tensor, targets: Tensor) -> Tensor:
    chosen = targets != _IGNORED
    return cross_entropy(model.head(hidden[chosen]), targets[chosen])


def _collate(batch: Sequence[_Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return right-padded ids, the next response token at each position, and the mask: int64 [B, L] each."""
    length = max(len(example.prompt.token_ids) + len(example.response) for example in batch)
    ids = torch.full((len(batch), length), pad_id)
    targets = torch.full((len(batch), length), _IGNORED)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for row, example in enumerate(batch):
        tokens = [*example.prompt.token_ids, *example.response]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, len(example.prompt.token_ids) - 1 : len(tokens) - 1] = torch.tensor(example.response)
        mask[row, : len(tokens)] = 1
    return ids, targets, mask


def _example(builder: PromptBuilder, sample: Sample, prompt: Prompt) -> _Example:
    if sample.solution is None:
        raise CordError(f"sample {sample.id}: no solution to learn; warm up on samples with worked answers")
    # A word-level tokenizer gives a text the same ids in a prompt and alone.
    return _Example(prompt, (*builder.encode(sample.solution), builder.eos_ids[0]), builder.encode(sample.question))


def _without_question(builder: PromptBuilder, sample: Sample, example: _Example) -> _Example:
    """Make an example of the worked answer as plain text, as in the pretraining of a language model.

    The model then learns to compute from its own words, not from the question alone, so that what was recognized
    rightly is computed rightly.

    Raises:
        CordError: the question's tokens do not stand in the prompt as they are.
    """
    ids, question = example.prompt.token_ids, builder.encode(sample.question)
    start = next((i for i in range(len(ids)) if ids[i : i + len(question)] == question), None)
    if start is None:
        raise CordError(
            f"sample {sample.id}: its question is not in its prompt word for word; "
            "use a chat template that leaves it as it is"
        )
    return _Example(Prompt(sample.id, ids[:start] + ids[start + len(question) :]), example.response)


def _record(
    checkpoint: Path, config: WarmUpConfig, written: Sequence[Sample], spoken: Sequence[Sample]
) -> dict[str, Any]:
    """Return all that the outcome depends on."""
    parts = [file_digest(checkpoint / "model.safetensors")]
    for sample in (*written, *spoken):
        waveform = hashlib.sha256(sample.waveform.tobytes()).hexdigest()
        parts += [sample.id, sample.question, str(sample.solution), waveform]
    return {"config": asdict(config), "inputs": fingerprint(parts)}

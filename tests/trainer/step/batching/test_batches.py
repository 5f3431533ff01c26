"""Microbatches against one unpadded sequence at a time through transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.model.config import ModelConfig
from megatron_cord.model.lalm import ModelInput
from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.sequence_sharding import SequenceSharding
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.config import TrainConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence, check_responses, make_microbatches
from tests.model.test_architecture import LANGUAGE
from tests.tiny_run import make_samples

RESPONSES = [(9, 10, 11, 3), (12,), (8, 8, 9, 13, 14, 3), (10, 3), (11, 12, 3)]


def sequences(prompts: PromptBuilder) -> list[TrainingSequence]:
    """Clips and responses of different lengths; the last two have no part in L_tok, and no teacher."""
    made = []
    for i, (sample, ids) in enumerate(zip(make_samples(5), RESPONSES, strict=True)):
        scored = i < 3
        teacher = prompts.text_prompt(sample) if scored else None
        rollout = Rollout(sample.id, ids, tuple(-0.1 * i - 0.01 * t for t in range(len(ids))), "stop", (), "")
        response = ScoredRollout(rollout, "shared" if scored else "policy", advantage=0.5 * i)
        made.append(TrainingSequence(prompts.audio_prompt(sample), teacher, response, i))
    return made


def test_tokens_outside_the_vocabulary(prompts: PromptBuilder) -> None:
    """Catches an engine's token that no row of the output layer stands for, which the device would not notice."""
    check_responses(sequences(prompts), replace(LANGUAGE, vocab_size=15))
    with pytest.raises(CordError, match=r"sample s0-2: the response has token 14, outside the vocabulary \[0, 14\)"):
        check_responses(sequences(prompts), replace(LANGUAGE, vocab_size=14))


def reference(model: Any, prompt: Prompt, response: tuple[int, ...]) -> Tensor:
    """Log-probabilities [T] of the response after the prompt."""
    arguments: dict[str, Tensor] = {"input_ids": torch.tensor([prompt.token_ids + response])}
    if prompt.clips:
        (clip,) = prompt.clips
        arguments["input_features"] = clip.features[None]
        arguments["feature_attention_mask"] = (torch.arange(clip.features.shape[1]) < clip.num_frames).long()[None]
    with torch.no_grad():
        logits = model(**arguments).logits[0, len(prompt.token_ids) - 1 : -1]
    logprobs: Tensor = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return logprobs


@pytest.mark.parametrize(
    "config",
    [TrainConfig(micro_batch_size=2), TrainConfig(packing="packed", tokens_per_microbatch=70)],
    ids=lambda c: c.packing,
)
def test_rows_predict_the_response(config: TrainConfig, inputs: Path, prompts: PromptBuilder, layout: Layout) -> None:
    """Catches rows that are off by one or of another sequence, a response after the wrong prompt.

    Also padding or another sequence that is attended to, and positions that do not start anew with each packed
    sequence.
    """
    checkpoint = inputs / "checkpoint"
    lalm = build_student(ModelConfig(str(checkpoint), dtype="float32"), layout)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()

    def logprobs(batch: ModelInput, rows: Tensor, targets: Tensor) -> Tensor:
        hidden = lalm(batch)
        logits = hidden.reshape(-1, hidden.shape[-1])[rows] @ lalm.output_weight.T
        true_size = lalm.arch.language.vocab_size
        logprobs: Tensor = logits[:, :true_size].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return logprobs.detach()

    microbatches = make_microbatches(
        sequences(prompts), config, prompts.pad_id, SequenceSharding(sequence_parallel=4), layout.device
    )
    assert any(len(batch.sequences) > 1 for batch in microbatches)
    for batch in microbatches:
        responses = [s.rollout.token_ids for s in batch.sequences]
        assert batch.target_ids.tolist() == [token for ids in responses for token in ids]
        expected = torch.cat([reference(model, s.student, s.rollout.token_ids) for s in batch.sequences])
        torch.testing.assert_close(
            logprobs(batch.student, batch.student_rows.rows, batch.target_ids), expected, rtol=1e-4, atol=1e-4
        )
        if batch.teacher is not None and batch.teacher_rows is not None:
            read = [reference(model, s.teacher, s.rollout.token_ids) for s in batch.sequences if s.teacher is not None]
            torch.testing.assert_close(
                logprobs(batch.teacher, batch.teacher_rows.rows, batch.target_ids),
                torch.cat(read),
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_every_sequence_is_in_one_microbatch(
    prompts: PromptBuilder, packing: Literal["padded", "packed"], size: int
) -> None:
    """Catches a sequence lost or doubled by the cut, scored and other sequences in one microbatch.

    Also advantages of another sequence.
    """
    made = sequences(prompts)
    config = TrainConfig(packing=packing, micro_batch_size=size, tokens_per_microbatch=40 * size)
    microbatches = make_microbatches(made, config, prompts.pad_id, SequenceSharding(), torch.device("cpu"))
    assert sorted(s.index for batch in microbatches for s in batch.sequences) == list(range(len(made)))
    assert [batch.scored for batch in microbatches] == sorted((batch.scored for batch in microbatches), reverse=True)
    for batch in microbatches:
        if packing == "padded":
            assert len(batch.sequences) <= size
        elif len(batch.sequences) > 1:
            assert batch.student.token_ids.numel() <= 40 * size
            assert batch.teacher is None or batch.teacher.token_ids.numel() <= 40 * size
        assert {s.response.distilled for s in batch.sequences} == {batch.scored}
        assert batch.advantages.tolist() == [s.response.advantage for s in batch.sequences]
        assert batch.cu_seqlens.diff().tolist() == [len(s.rollout.token_ids) for s in batch.sequences]
        torch.testing.assert_close(
            batch.engine_logprobs, torch.tensor([p for s in batch.sequences for p in s.rollout.logprobs])
        )


def test_lengths_divide_among_ranks(prompts: PromptBuilder) -> None:
    """Catches a padded length that sequence parallelism could not cut."""
    for batch in make_microbatches(
        sequences(prompts),
        TrainConfig(micro_batch_size=3),
        prompts.pad_id,
        SequenceSharding(sequence_parallel=4),
        torch.device("cpu"),
    ):
        assert batch.student.token_ids.shape[1] % 4 == 0
        assert batch.teacher is None or batch.teacher.token_ids.shape[1] % 4 == 0


def test_no_sequences_make_no_microbatches(prompts: PromptBuilder) -> None:
    """Catches an empty microbatch, which no model takes, for a data-parallel rank without a share."""
    assert make_microbatches([], TrainConfig(), prompts.pad_id, SequenceSharding(), torch.device("cpu")) == []


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_share_the_tokens(prompts: PromptBuilder, packing: Literal["padded", "packed"], cp: int) -> None:
    """Catches a response token that no context-parallel rank scores, or two of them.

    Also one with another's target or position.
    """
    made, config = sequences(prompts), TrainConfig(packing=packing, micro_batch_size=3, tokens_per_microbatch=120)
    whole = make_microbatches(made, config, prompts.pad_id, SequenceSharding(), torch.device("cpu"))
    shares = [
        make_microbatches(made, config, prompts.pad_id, SequenceSharding(cp, rank, 2), torch.device("cpu"))
        for rank in range(cp)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [part.sequences for part in parts] == [batch.sequences] * cp
        tokens = torch.cat([part.student_rows.tokens for part in parts if part.student_rows.tokens is not None])
        assert sorted(tokens.tolist()) == list(range(batch.num_tokens))
        for part in parts:
            mine = part.student_rows.tokens
            assert mine is not None and part.student.token_ids.shape[1] % (4 * cp) == 0
            assert torch.equal(part.target_ids, batch.target_ids[mine]) and torch.equal(
                part.positions, batch.positions[mine]
            )
            assert torch.equal(part.engine_logprobs, batch.engine_logprobs[mine])
            assert part.cu_seqlens[-1] == len(mine) and int(part.cu_seqlens.diff().min()) >= 0

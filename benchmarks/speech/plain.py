"""The baseline of `benchmarks.speech.step`: the same step in plain torch and transformers, as a script has it.

It prints one line of JSON. The language model is transformers' Llama with its own cache, which generates token by token
and scores left-padded batches; the loss is the full-vocabulary reverse KL of fp32 logits of the response's tokens, by
autograd, with CORD's weights. The frozen encoder's states are computed before the clock starts, once for each
recording, which this project's step does in the step. The adapter is trained in fp32 under autocast.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from benchmarks.speech.setting import SpeechSetting, questions
from benchmarks.train_setting import Clock
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, PreparedSample
from megatron_cord.model.families.ultravox.plain_model import Ultravox
from megatron_cord.parallel import portability


class Script:
    """A model that hears with an adapter, and the two passes of a step.

    Legend: B prompts, P tokens of the longest, R tokens of the longest response, V vocabulary, H hidden, T frames.

    Args:
        model: of the checkpoint; frozen but for the adapter.
        pad_id: fills prompts and responses.
        eos_id: ends a response.
        audio_id: the placeholder in prompts.
    """

    def __init__(self, model: Ultravox, pad_id: int, eos_id: int, audio_id: int) -> None:
        self.model, self.pad_id, self.eos_id, self.audio_id = model.requires_grad_(False), pad_id, eos_id, audio_id
        self.adapter = model.multi_modal_projector.float().requires_grad_(True)
        self.language_model, self.embedding = model.language_model, model.get_input_embeddings()
        weight: Any = self.embedding.weight
        self.dtype: torch.dtype = weight.dtype
        self.device_type = str(weight.device.type)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.no_grad()
    def encode(self, features: Tensor, num_frames: int) -> Tensor:
        """Return the frozen encoder's states [T, width] of a clip [mels, frames]."""
        tower = self.model.audio_tower
        x = torch.nn.functional.gelu(tower.conv1(features[None, :, :num_frames].to(self.dtype)))
        x = torch.nn.functional.gelu(tower.conv2(x)).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        for layer in tower.layers:
            x = layer(x, None)
        states: Tensor = tower.layer_norm(x)[0]
        return states

    def prompt(self, ids: Sequence[tuple[int, ...]], states: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return left-padded inputs [B, P, H] and their mask int64 [B, P]; with states they replace placeholders."""
        rows = [self.embedding(torch.tensor(prompt)) for prompt in ids]
        if states is not None:
            with self._autocast():
                audio = [self.adapter(each.float()).to(self.dtype) for each in states]
            places = [torch.tensor(prompt).eq(self.audio_id).nonzero()[:, 0] for prompt in ids]
            rows = [row.index_copy(0, at, own) for row, at, own in zip(rows, places, audio, strict=True)]
        longest = max(map(len, rows))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return torch.stack([pad(row, (0, 0, longest - len(row), 0)) for row in rows]), mask

    @torch.no_grad()
    def generate(self, inputs: Tensor, mask: Tensor, new_tokens: int) -> list[list[int]]:
        """Sample a response at temperature 1 to each prompt."""
        cache, positions = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0)
        responses: list[list[int]] = [[] for _ in inputs]
        alive = torch.ones(len(inputs), dtype=torch.bool)
        for _ in range(new_tokens):
            hidden = self.language_model.model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            tokens = torch.multinomial(self.language_model.lm_head(hidden).float().softmax(-1), 1)[:, 0]
            for response, token, lives in zip(responses, tokens.tolist(), alive.tolist(), strict=True):
                if lives:
                    response.append(token)
            alive &= tokens != self.eos_id
            if not alive.any():
                break
            inputs, mask, positions = self.embedding(tokens)[:, None], pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return responses

    def score(self, inputs: Tensor, mask: Tensor, responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return log-probabilities fp32 [B, R, V] at the response's tokens, and which of them are real, bool [B, R]."""
        size, longest = len(responses), max(map(len, responses))
        ids = torch.full((size, longest), self.pad_id)
        real = torch.zeros(size, longest, dtype=torch.long)
        for row, response in enumerate(responses):
            ids[row, : len(response)], real[row, : len(response)] = torch.tensor(response), 1
        start = inputs.shape[1] - 1
        whole = torch.cat([mask, real[:, :-1]], 1)
        hidden = self.language_model.model(
            inputs_embeds=torch.cat([inputs, self.embedding(ids[:, :-1])], 1),
            attention_mask=whole,
            position_ids=(whole.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state[:, start:]
        return self.language_model.lm_head(hidden).float().log_softmax(-1), real.bool()


def cord_loss(student: Tensor, teacher: Tensor, real: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return CORD's L_tok by token, and the divergences [B, R]; log-probabilities are [B, R, V]."""
    divergence = (student.exp() * (student - teacher)).sum(-1) * real
    lengths = real.sum(-1, keepdim=True)
    places = torch.arange(real.shape[1])[None]
    weights = 2.0 - places / (lengths - 1).clamp(min=1)
    for row, length in enumerate(lengths[:, 0].tolist()):
        weights[row, divergence[row, :length].detach().topk(min(top_k, length)).indices] *= 2.0
    return (weights * divergence).sum() / lengths.sum(), divergence


def main() -> None:
    """Train and print the figures."""
    work, setting = Path(sys.argv[1]), SpeechSetting(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompts = PromptBuilder(work / "student")
    checkpoint_class: Any = Ultravox
    model: Ultravox = checkpoint_class.from_pretrained(work / "student", dtype=getattr(torch, setting.dtype)).eval()
    audio_id = prompts.audio_token_id
    assert audio_id is not None
    script = Script(model, prompts.pad_id, prompts.eos_ids[0], audio_id)
    optimizer = torch.optim.AdamW(script.adapter.parameters(), setting.learning_rate, weight_decay=0.0)
    prepared: list[list[PreparedSample]] = []
    encoded: list[list[Tensor]] = []
    for step in range(setting.skipped_steps + setting.steps):
        prepared.append(prompts.prepare(questions(setting, step)))
        clips = [sample.prompts[HEAR].clips[0] for sample in prepared[-1]]
        encoded.append([script.encode(clip.features, clip.num_frames) for clip in clips])
    clock = Clock(wall=portability.has_cuda())
    tokens, first = 0, 0.0
    for step, (batch, states) in enumerate(zip(prepared, encoded, strict=True)):
        if step == setting.skipped_steps:
            clock.start()
            tokens = 0
        heard, read = ([sample.prompts[view].token_ids for sample in batch] for view in (HEAR, READ))
        with clock.phase("rollout"):
            with torch.no_grad():
                inputs, mask = script.prompt(heard, states)
            responses = script.generate(inputs, mask, setting.new_tokens)
        with clock.phase("teacher"), torch.no_grad():
            teacher, _ = script.score(*script.prompt(read, None), responses)
        with clock.phase("student"):
            student, real = script.score(*script.prompt(heard, states), responses)
            loss, divergence = cord_loss(student, teacher, real, setting.top_k)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        with clock.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(script.adapter.parameters(), 1.0)
            optimizer.step()
        first = first or float(divergence.detach().sum() / real.sum())
        tokens += sum(map(len, responses))
    seconds = clock.seconds()
    phases = {name: round(value / setting.steps, 3) for name, value in clock.phases.items()}
    print(json.dumps({
        "seconds_per_step": round(seconds / setting.steps, 3),
        "seconds_per_step_by_phase": phases,
        "response_tokens": tokens,
        "first_divergence_per_token": round(first, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

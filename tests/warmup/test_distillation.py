"""The warm-up's third stage on a tiny grafted checkpoint: what it learns, on two ranks, after a stop, and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.convert import read_tensors
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Prompt, Sample
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.warmup import warmup
from megatron_cord.warmup.stages import Stages
from megatron_cord.warmup.warmup import warm_up
from tests.gloo import run_ranks
from tests.warmup.short_warmup import after_calls, distilled_config, summary, warm_up_alone


@pytest.fixture(scope="module")
def distilled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a warm-up of all three stages that was never stopped."""
    output = tmp_path_factory.mktemp("distilled") / "out"
    warm_up_alone(distilled_config(inputs, output))
    return output


def distil_on_ranks(rank: int, inputs: str, output: str) -> None:
    warm_up(distilled_config(Path(inputs), Path(output)), initialize(ParallelConfig(), seed=0))


def test_a_distillation_learns_and_changes_the_adapter_alone(inputs: Path, distilled: Path) -> None:
    """Catches a stage without effect, and a language model that is trained too."""
    nats = summary(distilled)["divergences"]
    assert 0 < nats["distillation after"] < 0.8 * nats["distillation before"]
    before, after = dict(read_tensors(inputs / "grafted")), dict(read_tensors(distilled / "model"))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != name.startswith("multi_modal_projector.")


@pytest.mark.slow
def test_a_distillation_on_two_ranks_is_that_of_one(inputs: Path, distilled: Path, tmp_path: Path) -> None:
    """Catches gradients that are not summed, and a mean over a rank's own tokens."""
    run_ranks(distil_on_ranks, 2, str(inputs), str(tmp_path / "out"))
    one, two = (summary(each)["losses"]["distillation"] for each in (distilled, tmp_path / "out"))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0.02, atol=0)


def test_a_distillation_that_is_stopped_goes_on_bitwise(
    inputs: Path, distilled: Path, layout: Layout, tmp_path: Path
) -> None:
    """Catches an adapter, or moments, of another stage that a start goes on with."""
    config = distilled_config(inputs, tmp_path / "out")
    with pytest.raises(StoppedError):
        warm_up(config, layout, after_calls(3 + 8 + 8 + 4))  # blocks of encoder states, then updates
    warm_up(config, layout)
    once, again = summary(distilled), summary(tmp_path / "out")
    assert once["losses"] == again["losses"] and once["divergences"] == again["divergences"]
    weights = "model/model.safetensors"
    assert (distilled / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_the_distillation_is_the_slow_one(
    inputs: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a view without the instruction, KL the other way round, another scale, and a mean over something else."""
    seen: list[tuple[Stages, float, int]] = []

    def look(run: Any) -> None:
        losses = [float(each.detach()) for each in run._distillation().losses(0)]
        seen.append((run._stages, sum(losses), len(losses)))

    monkeypatch.setattr(warmup._Run, "train_all", look)
    warm_up(distilled_config(inputs, tmp_path / "out", steps=1, batch_size=4), layout)
    ((stages, loss, microbatches),) = seen
    plain, prompts = PlainModel(inputs / "grafted", torch.float32), PromptBuilder(inputs / "grafted")

    def log_probs(prompt: Prompt, response: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*prompt.token_ids, *response]])
        clips = [torch.as_tensor(clip.features) for clip in prompt.clips]
        frames = torch.tensor([clip.num_frames for clip in prompt.clips])
        with torch.no_grad():
            given = (torch.stack(clips), frames) if clips else (None, None)
            hidden = plain.hidden(ids, *given, attention_mask=torch.ones_like(ids)).last_hidden_state
            logits = plain.head(hidden)[0, len(prompt.token_ids) - 1 : -1]
        return logits.double().log_softmax(-1)

    total, tokens = 0.0, 0
    batch = stages._corpus.batch(0, 4)
    for number, (recording, rate) in zip(batch, stages._corpus.recordings(batch), strict=True):
        text = stages._corpus.utterances[number].text
        response = prompts.response_ids(text)
        (made,) = prompts.prepare([Sample("a", text, recording, rate, instruction="what is")])
        read, heard = (log_probs(made.prompts[view], response) for view in (READ, HEAR))
        total += float((read.exp() * (read - heard)).sum())
        tokens += len(response)
    assert microbatches == 2 and loss == pytest.approx(total / tokens, rel=0.02)

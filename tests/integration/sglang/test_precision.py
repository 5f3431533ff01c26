"""A real server in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.data.samples import Prompt
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.local.engine import LocalEngine
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.server.process import ServerConfig, SglangServer
from megatron_cord.rollout.types import GenerationRequest
from tests.integration.sglang.conftest import PYTHON
from tests.tiny_run import make_samples, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="the server is not installed; make sglang-env"),
]


def in_bfloat16(checkpoint: Path) -> Path:
    """Write the checkpoint with its tensors rounded."""
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        checkpoint / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return checkpoint


@torch.no_grad()
def logprobs(model: PlainModel, prompt: Prompt, token_ids: Sequence[int]) -> Tensor:
    """Of a response's tokens [S]."""
    dtype = next(iter(model.parameters.values())).dtype
    features = torch.stack([clip.features for clip in prompt.clips]).to(dtype) if prompt.clips else None
    frames = torch.tensor([clip.num_frames for clip in prompt.clips]) if prompt.clips else None
    hidden = model.hidden(torch.tensor([[*prompt.token_ids, *token_ids]]), features, frames).last_hidden_state
    all_tokens = model.head(hidden)[0, -len(token_ids) - 1 : -1].log_softmax(-1)
    return all_tokens.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def test_logprobs_agree_in_bfloat16(tmp_path: Path) -> None:
    """Catches a server that computes in too few bits, or rounds where transformers does not, for text or for audio."""
    checkpoint = in_bfloat16(write_checkpoint(tmp_path / "checkpoint"))
    server = SglangServer(ServerConfig(checkpoint=checkpoint, device="cpu", python=PYTHON), "", tmp_path / "server.log")
    initialize(ParallelConfig(), seed=0)
    server.start()
    try:
        server.wait()
        engine = build_engine(
            RolloutConfig(engine="sglang", sglang=SGLangConfig(servers=(server.url,))), checkpoint, torch.device("cpu")
        )
        local = LocalEngine(checkpoint)
        samples = make_samples(50, seed=3)
        prompts = [
            build(sample) for sample in samples for build in (local.prompts.audio_prompt, local.prompts.text_prompt)
        ]
        rollouts = engine.generate([GenerationRequest(prompt, 1.0, 12, i) for i, prompt in enumerate(prompts)])
        engine.close()
        server_s = torch.cat([torch.tensor(rollout.logprobs) for rollout in rollouts])
        transformers_s, exact = (
            torch.cat(
                [logprobs(model, prompt, rollout.token_ids) for prompt, rollout in zip(prompts, rollouts, strict=True)]
            )
            for model in (local._loaded(), PlainModel(checkpoint, torch.float32))
        )
        difference = (server_s - transformers_s).abs()
        errors = {"server": (server_s - exact).abs(), "transformers": (transformers_s - exact).abs()}
        share = (difference < 2e-2).float().mean()
        print(
            f"bfloat16: {len(difference)} tokens, {share:.1%} of log-probs within 2e-2, "
            f"all within {difference.max():.2g}; from float32:"
        )
        for name, error in errors.items():
            print(
                f"  {name}: {(error < 2e-2).float().mean():.1%} within 2e-2, all within {error.max():.2g}, "
                f"{error.mean():.2g} on average"
            )
        assert next(iter(local._loaded().parameters.values())).dtype == torch.bfloat16
        # 16 bits leave this model no more: transformers, too, is as far from its own float32 as from the server.
        assert len(difference) > 400 and share > 0.9 and difference.max() < 0.1
        assert errors["server"].mean() < 1.2 * errors["transformers"].mean()
        assert difference.max() > 1e-6, "both in 32 bits"
    finally:
        server.stop()
        finalize()

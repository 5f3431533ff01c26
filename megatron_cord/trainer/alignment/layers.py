"""How alike two responses are in the model's layers, each behind its own prompt.

    R_rep = (1/L) Σ_l cos( mean_t h_t^(l)(y | S), mean_t h_t^(l)(y' | T) )

h_t^(l) is the output of layer l at token t of the response, before the final norm. The last token, which ends the
response, is left out. Source: TARS (arXiv 2601.05543) and its repository.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_cord.data.samples import Prompt
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.step import TrainStep


class LayerCosines:
    """Computes the cosines with the student's present weights.

    Args:
        step: of the run.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step = step

    def __call__(self, responses: Sequence[tuple[Prompt, Rollout]], pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Return R_rep of each pair of responses. Collective over the replica's ranks, which get the same.

        Args:
            responses: behind their prompts.
            pairs: of indices.
        """
        if not pairs:
            return []
        used = sorted({index for pair in pairs for index in pair})
        sequences = [
            TrainingSequence(prompt, None, ScoredRollout(rollout, "policy"), number)
            for number, (prompt, rollout) in enumerate(responses[index] for index in used)
        ]
        means = self._step.pool_layers(sequences).double()  # [layers here, N, H]
        number = {index: place for place, index in enumerate(used)}
        ours, theirs = (torch.tensor([number[pair[side]] for pair in pairs], dtype=torch.int64) for side in (0, 1))
        device = means.device
        cosines = torch.cosine_similarity(means[:, ours.to(device)], means[:, theirs.to(device)], dim=-1).sum(0)
        dist.all_reduce(cosines, group=self._step.layout.pp_group)
        result: list[float] = (cosines / self._step.lalm.config.num_layers).tolist()
        return result

"""What aligns the responses of two streams, where a reward does."""

from __future__ import annotations

from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.reward.embedding.checkpoint import CheckpointEmbedder
from megatron_cord.reward.embedding.endpoint import EndpointEmbedder
from megatron_cord.trainer.alignment.aligner import Aligner, Embedder
from megatron_cord.trainer.alignment.layers import LayerCosines
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.step import TrainStep


def build_aligner(config: RunConfig, layout: Layout, step: TrainStep) -> Aligner | None:
    """Build what adds the terms layers and embedding to rewards; None where no reward has them.

    Args:
        config: of the run.
        layout: this rank's place.
        step: whose model has the layers.

    Raises:
        CordError: the embedding model cannot be loaded, the endpoint's key is missing, or replicas share experts.
    """
    terms = config.reward.terms
    weights = [s.reward or terms for s in config.objective.policy_terms if s.align_with is not None]
    if not weights or config.replay is not None:
        return None
    if layout.experts_span_replicas and any(each.layers for each in weights):
        raise CordError(
            "the reward's term layers is not built for a parallel.ep beyond parallel.tp × parallel.cp: a replica "
            "without responses to compare makes no pass; lower parallel.ep, or set layers to 0"
        )
    embedder: Embedder | None = None
    if any(each.embedding for each in weights):
        given = config.reward.embedding
        embedder = EndpointEmbedder(given) if given.base_url else CheckpointEmbedder(given, layout.device)
    layers = LayerCosines(step) if any(each.layers for each in weights) else None
    return Aligner(config.objective.policy_terms, terms, layers, embedder, layout.replica_group)

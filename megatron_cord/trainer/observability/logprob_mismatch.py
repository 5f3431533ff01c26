"""Do trainer and engine agree on the log-probabilities of the same tokens? Where they do not, what is sampled is not what is trained.

Only tokens that the engine made with the trainer's present weights say so; tokens of older weights differ because the weights do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.step.step import TokenRecord


def agreement_metrics(records: Sequence[TokenRecord], rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Compares trainer (p) and engine (q), in nats a token.

    Args:
        records: what the trainer found; ``index`` is the place in rollouts.
        rollouts: with the engine's log-probabilities.
        version: of the trainer's weights.

    Returns:
        ``engine_logprob_difference``, its largest ``…_max`` and ``engine_kl`` over tokens of this version, where there are any; of older ones
        their share ``stale_tokens`` and ``stale_logprob_difference``, where there are any. The KL divergence KL(q‖p) is estimated by the mean
        of r − 1 − log r, r = p/q (never negative); it is unbiased for tokens sampled at temperature 1. NaN where a log-probability is.
    """
    fresh, stale = list[float](), list[float]()
    for record in records:
        rollout = rollouts[record.index]
        differences = [p - q for p, q in zip(record.logprobs, rollout.logprobs, strict=True)]
        for span in rollout.versions:
            (fresh if span.version == version else stale).extend(differences[span.start : span.end])
    metrics = {"stale_tokens": len(stale) / max(len(fresh) + len(stale), 1)}
    if fresh:
        sizes = [abs(d) for d in fresh]
        metrics["engine_logprob_difference"] = _mean(sizes)
        metrics["engine_logprob_difference_max"] = max(sizes) if all(map(math.isfinite, sizes)) else math.nan
        metrics["engine_kl"] = _mean([_exp(d) - 1 - d for d in fresh])
    if stale:
        metrics["stale_logprob_difference"] = _mean([abs(d) for d in stale])
    return metrics


def importance_metrics(
    records: Sequence[TokenRecord], rollouts: Sequence[Rollout], trained: Sequence[bool], cap: float
) -> dict[str, float]:
    """Mean of the truncated weights min(p/q, cap) of the tokens of L_seq, and the share that was truncated; empty without such tokens.

    Args:
        records, rollouts: as above.
        trained: of each rollout, whether it has an advantage.
        cap: of the objective.
    """
    differences = [
        p - q
        for r in records
        if trained[r.index]
        for p, q in zip(r.logprobs, rollouts[r.index].logprobs, strict=True)
        if math.isfinite(p - q)
    ]
    if not differences:
        return {}
    return {
        "importance_weight": _mean([min(_exp(d), cap) for d in differences]),
        "importance_truncated": _mean([float(_exp(d) > cap) for d in differences]),
    }


def check_agreement(metrics: dict[str, float], limit: float | None, where: str) -> None:
    """Refuses to go on where trainer and engine are not the same model.

    Raises:
        CordError: the mean difference is beyond the limit; says what is likely the cause.
    """
    mean = metrics.get("engine_logprob_difference", 0.0)
    if limit is not None and mean > limit:
        raise CordError(
            f"{where}: trainer and engine differ by {mean:.3g} nats a token (largest {metrics['engine_logprob_difference_max']:.3g}) on tokens "
            f"that the engine made with the same weights; rollout.agreement_limit is {limit:g}. Likely causes: the engine has other weights (an "
            "weight sync that failed halfway, another checkpoint), other audio features or another prompt template, reuses audio embeddings or a "
            "prefix cache of older weights, returns log-probabilities of another temperature, or computes in a much lower precision"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))

"""Warnings when a run looks wrong, from the history of its metrics alone. They never stop a run.

Each check compares the mean of the last `window` measured steps with that of the first, or with the best one in
between, and demands a difference beyond noise. A run that blows up does so in its first steps: until two windows are
measured, the divergence of the last three steps is compared with that of the first, which is the untrained model's.
Simplification: thresholds are shares that fit tasks of all kinds, not tests of significance for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_cord.errors import CordError

Kind = Literal[
    "diverging",
    "collapse",
    "length explosion",
    "reward saturated",
    "reward missing",
    "entropy falling",
    "logprob mismatch growing",
]
Row = Mapping[str, Any]
_SIGMAS = 4.0  # standard errors beyond noise, also between the best of many windows and one of many last ones
_FIRST_STEPS = 3  # of a mean, while fewer than two windows are measured
_FEWEST_QUESTIONS = 30  # an accuracy over fewer is noise


@dataclass(frozen=True)
class AlertConfig:
    """When a run warns that something looks wrong; null turns a check off."""

    window: int = 20  #: steps of a mean; no warning but "diverging" before twice as many were measured
    #: diverging: the divergence from the teacher is so many times the untrained model's; in the first steps twice that,
    #: or as much while the gradient norm falls to less than a third
    kl_growth: float | None = 1.5
    #: diverging: so much more of the updates than at first are clipped at optimizer.clip_norm
    clipped: float | None = 0.5
    reward_fall: float | None = 0.3  #: collapse: the reward lost this share of its best mean
    #: collapse: text or audio accuracy fell by this share of the questions since its best evaluation
    accuracy_fall: float | None = 0.1
    #: collapse: this share of a response's 4-grams is repeated, and twice as many as at first
    repetition: float | None = 0.3
    length_growth: float | None = 2.0  #: length explosion: responses are so many times as long as at first
    #: length explosion: this much more of the responses than at first are truncated at rollout.max_new_tokens
    truncated: float | None = 0.25
    #: reward saturated, or missing where most are 0: in this share of the groups all rewards are equal
    zero_variance_groups: float | None = 0.9
    entropy_fall: float | None = 0.9  #: entropy falling: the student's entropy lost this share of what it was at first
    #: logprob mismatch growing: engine and trainer differ so many times as much as at first
    logprob_mismatch_growth: float | None = 3.0
    #: logprob mismatch growing: differences below this, in nats a token, are rounding
    logprob_mismatch_floor: float = 0.01

    def __post_init__(self) -> None:
        if self.window < 2:
            raise CordError(f"alerts.window must be at least 2, got {self.window}")
        shares = ("reward_fall", "accuracy_fall", "repetition", "truncated", "zero_variance_groups", "entropy_fall")
        for name in (*shares, "clipped"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise CordError(f"alerts.{name} is a share between 0 and 1, got {value:g}; null turns the check off")
        for name in ("kl_growth", "length_growth", "logprob_mismatch_growth"):
            value = getattr(self, name)
            if value is not None and value <= 1:
                raise CordError(f"alerts.{name} is a factor above 1, got {value:g}; null turns the check off")


@dataclass(frozen=True)
class Alert:
    """One warning: its kind and its message."""

    kind: Kind
    words: str


def find_alerts(rows: Sequence[Row], evaluations: Sequence[Row], config: AlertConfig) -> list[Alert]:
    """Return the warnings that hold after the last of these steps; none for a run that looks well.

    Args:
        rows: metrics, ascending by step (`metrics.jsonl`); a value that is missing, None or NaN was not measured.
        evaluations: ascending by step, each with `step`, `samples`, `text_accuracy` and `audio_accuracy`.
        config: thresholds.
    """
    checks = (
        _diverging(rows, config),
        _collapse(rows, evaluations, config),
        _length(rows, config),
        _saturation(rows, config),
        _entropy(rows, config),
        _logprob_mismatch(rows, config),
    )
    return [alert for check in checks for alert in check]


def _diverging(rows: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    """Warn of a student that moves away from its teacher, as under a learning rate that is too high."""
    kl, gradient = (_against_untrained(rows, name, config.window) for name in ("kl", "grad_norm"))
    clipped, signs = _Means.of(rows, "gradient_clipped", config.window), []
    if config.kl_growth is not None and kl:
        growth = kl.recent / kl.first if kl.first > 0 else 1.0
        vanishes = bool(gradient and gradient.recent < 0.3 * gradient.first)
        beyond_noise = kl.recent - kl.first > _SIGMAS * kl.error
        # The first step, of few questions, stands alone at first: it takes a larger growth, or a second sign.
        early = len(_measured(rows, "kl")) < 2 * config.window
        grown = growth > (2 * config.kl_growth if early else config.kl_growth) and beyond_noise
        if grown or (early and growth > config.kl_growth and vanishes):
            signs.append(
                f"the divergence from the teacher is {kl.recent:.3g} nats a token, {growth:.1f} times the untrained "
                f"model's {kl.first:.3g}"
            )
    if config.clipped is not None and clipped and clipped.recent - clipped.first > config.clipped:
        signs.append(
            f"{clipped.recent:.0%} of the updates are clipped at optimizer.clip_norm, at first {clipped.first:.0%}"
        )
    if signs:
        if gradient and gradient.recent < 0.3 * gradient.first:
            signs.append(f"the gradient norm fell from {gradient.first:.3g} to {gradient.recent:.3g}")
        entropy = _against_untrained(rows, "entropy", config.window)
        if entropy and not 0.5 < entropy.recent / max(entropy.first, 1e-9) < 2:
            signs.append(f"the student's entropy went from {entropy.first:.3g} to {entropy.recent:.3g} nats a token")
        rates = _measured(rows, "learning_rate")
        rate = f" (up to {rates.max():.2g})" if len(rates) else ""
        yield Alert("diverging", f"{'; '.join(signs)}: optimizer.learning_rate{rate} is probably too high")


def _collapse(rows: Sequence[Row], evaluations: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    """Warn of answers that got worse or that repeat themselves; a fallen entropy is added as a further sign."""
    signs = [*_reward_falls(rows, config), *_accuracy_falls(evaluations, config)]
    repeated = _Means.of(rows, "repetition", config.window)
    if config.repetition is not None and repeated and repeated.recent > max(config.repetition, 2 * repeated.first):
        signs.append(f"{repeated.recent:.0%} of a response's phrases are repetitions (at first {repeated.first:.0%})")
    if signs:
        entropy = _Means.of(rows, "entropy", config.window)
        if entropy and entropy.recent < 0.5 * entropy.first:
            signs.append(f"the student's entropy fell from {entropy.first:.3g} to {entropy.recent:.3g} nats a token")
        yield Alert("collapse", "; ".join(signs))


def _reward_falls(rows: Sequence[Row], config: AlertConfig) -> Iterator[str]:
    reward = _Means.of(rows, "reward", config.window)
    if config.reward_fall is None or not reward:
        return
    fall = reward.best - reward.recent
    if fall > config.reward_fall * abs(reward.best) and fall > _SIGMAS * reward.error:
        yield f"the reward fell from {reward.best:.2f} to {reward.recent:.2f}"


def _accuracy_falls(evaluations: Sequence[Row], config: AlertConfig) -> Iterator[str]:
    if config.accuracy_fall is None or len(evaluations) < 2:
        return
    *earlier, last = evaluations
    if min(row["samples"] for row in evaluations) < _FEWEST_QUESTIONS:
        return
    for name, view in (("text_accuracy", "text"), ("audio_accuracy", "audio")):
        best = max(earlier, key=lambda row: row[name])
        fall = best[name] - last[name]
        error = math.hypot(*(_standard_error(row[name], row["samples"]) for row in (best, last)))
        if fall > config.accuracy_fall and fall > 2 * error:
            yield f"{view} accuracy fell from {best[name]:.0%} (step {best['step']}) to {last[name]:.0%}"


def _standard_error(accuracy: float, samples: int) -> float:
    """Return the standard error, not zero where all answers are right (Agresti and Coull 1998)."""
    share = (accuracy * samples + 2) / (samples + 4)
    return math.sqrt(share * (1 - share) / (samples + 4))


def _length(rows: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    length, truncated = _Means.of(rows, "response_tokens", config.window), _Means.of(rows, "truncated", config.window)
    signs = []
    if config.length_growth is not None and length and length.recent > config.length_growth * length.first:
        signs.append(f"responses have {length.recent:.0f} tokens, at first {length.first:.0f}")
    if config.truncated is not None and truncated and truncated.recent - truncated.first > config.truncated:
        signs.append(
            f"{truncated.recent:.0%} of them are truncated at rollout.max_new_tokens, at first {truncated.first:.0%}"
        )
    if signs:
        yield Alert("length explosion", "; ".join(signs))


def _saturation(rows: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    shares = [
        {"share": row["zero_variance_groups"] / row["groups"], "reward": row.get("reward")}
        for row in rows
        if row.get("groups") and row.get("zero_variance_groups") is not None
    ]
    zero_variance, reward = _Means.of(shares, "share", config.window), _Means.of(shares, "reward", config.window)
    if (
        config.zero_variance_groups is not None
        and zero_variance
        and zero_variance.recent >= config.zero_variance_groups
    ):
        mean = f" (mean reward {reward.recent:.2f})" if reward else ""
        equal = f"all rewards are equal in {zero_variance.recent:.0%} of the groups{mean}"
        if reward and reward.recent < 0.5:
            yield Alert("reward missing", f"{equal}: right answers are too rare for L_seq; use easier questions")
        else:
            yield Alert("reward saturated", f"{equal}: L_seq has little to learn from; use harder questions")


def _entropy(rows: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    entropy = _Means.of(rows, "entropy", config.window)
    if config.entropy_fall is not None and entropy and entropy.recent < (1 - config.entropy_fall) * entropy.first:
        yield Alert(
            "entropy falling",
            f"the student's entropy fell from {entropy.first:.3g} to {entropy.recent:.3g} nats a token",
        )


def _logprob_mismatch(rows: Sequence[Row], config: AlertConfig) -> Iterator[Alert]:
    difference = _Means.of(rows, "engine_logprob_difference", config.window)
    if config.logprob_mismatch_growth is None or not difference:
        return
    if difference.recent > max(config.logprob_mismatch_growth * difference.first, config.logprob_mismatch_floor):
        yield Alert(
            "logprob mismatch growing",
            f"engine and trainer differ by {difference.recent:.3g} nats a token, at first by {difference.first:.3g}: "
            "does the engine get every update?",
        )


def _against_untrained(rows: Sequence[Row], name: str, window: int) -> _Means | None:
    """Return the means over windows; before two were measured, of the very first step and of the last ones."""
    if means := _Means.of(rows, name, window):
        return means
    values = _measured(rows, name)
    if len(values) <= _FIRST_STEPS:
        return None
    last = values[-_FIRST_STEPS:]
    return _Means(float(values[0]), float(last.mean()), float(values[0]), float(last.std(ddof=1)))


def _measured(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return the values of the steps that have a finite one."""
    return np.array(
        [row[name] for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])],
        dtype=float,
    )


@dataclass(frozen=True)
class _Means:
    """Means of one metric: first window, last window, best before it; and the standard error of best − last."""

    first: float
    recent: float
    best: float
    error: float

    @classmethod
    def of(cls, rows: Sequence[Row], name: str, window: int) -> _Means | None:
        """Return the means; None before two windows were measured."""
        values = _measured(rows, name)
        if len(values) < 2 * window:
            return None
        windows = np.lib.stride_tricks.sliding_window_view(values, window)
        earlier, last = windows[: len(values) - 2 * window + 1], windows[-1]
        # The best window was selected by its mean, which biases its own variance; that of all windows is not biased.
        error = math.sqrt(2 * windows.var(axis=1, ddof=1).mean() / window)
        return cls(float(windows[0].mean()), float(last.mean()), float(earlier.mean(axis=1).max()), error)

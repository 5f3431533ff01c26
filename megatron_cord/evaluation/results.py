"""What the answers to a set amount to: accuracies with intervals, the gap, and what changed since another evaluation.

Rows are plain maps, as JSON has them: id, group, question, answer, and for each way of asking ("text", "audio") `…_response`, `…_answer` (what it was
taken to answer), `…_correct`. All p-values are McNemar's, two-sided, over the questions that both sides of a comparison answered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_cord.data.question_files import Reject
from megatron_cord.evaluation.answering import Answers
from megatron_cord.evaluation.scoring import score_responses
from megatron_cord.evaluation.statistics import estimate, gap_closed, gap_closed_draws, mcnemar, paired_draws
from megatron_cord.reward.comparison import Comparer

WAYS = ("text", "audio")
SIGNIFICANT = 0.05
Row = dict[str, Any]


def score_set(answers: Answers, comparer: Comparer | None) -> tuple[list[Row], list[Reject]]:
    """A row for each question that was asked, and the rejects, both in the set's order."""
    rows: list[Row] = []
    rejects = []
    for question in answers.questions:
        answered = answers.done[question.id]
        if answered.reject is not None:
            rejects.append(Reject(question.id, answered.reject))
            continue
        rows.append(
            {
                "id": question.id,
                "group": question.group,
                "question": question.text or question.instruction or "",
                "answer": question.answer,
                "choices": list(question.choices),
                "text_response": answered.text_response,
                "audio_response": answered.audio_response,
                "tokens": list(answered.tokens),
                "cut": list(answered.cut),
            }
        )
    for way in WAYS:
        asked = [row for row in rows if row[f"{way}_response"] is not None]
        scores = score_responses(
            [row["answer"] for row in asked],
            [row["choices"] for row in asked],
            [row[f"{way}_response"] for row in asked],
            [row["question"] for row in asked],
            comparer,
        )
        for row, score in zip(asked, scores, strict=True):
            row |= {f"{way}_answer": score.answer, f"{way}_correct": score.correct}
    return rows, rejects


def set_result(
    rows: Sequence[Row], rejects: Sequence[Reject], before: Sequence[Row] | None = None, seed: int = 0
) -> dict[str, Any]:
    """One set's result.

    Args:
        rows: of `score_set`.
        rejects: what was not asked.
        before: rows of the same set by the model before; None compares nothing.
        seed: of the bootstrap; another one for each set makes their draws independent.

    Returns:
        JSON values: samples, rejects by reason, `text` and `audio` (accuracy, its interval, how many answered nothing or were cut), `gap` where both
        were asked, `groups`, and `change` since `before`.
    """
    result: dict[str, Any] = {"samples": len(rows), "rejects": _reasons(rejects)}
    for way in WAYS:
        asked = [row for row in rows if f"{way}_correct" in row]
        if asked:
            outcomes = np.array([[row[f"{way}_correct"]] for row in asked])
            result[way] = asdict(estimate(float(outcomes.mean()), paired_draws(outcomes, seed)[:, 0])) | {
                "samples": len(asked),
                "unanswered": sum(row[f"{way}_answer"] is None for row in asked),
                "cut": sum(way in row["cut"] for row in asked),
            }
    both = [row for row in rows if all(f"{way}_correct" in row for way in WAYS)]
    if both:
        text, audio = (np.array([row[f"{way}_correct"] for row in both]) for way in WAYS)
        draws = paired_draws(np.stack([text, audio], axis=1), seed)
        result["gap"] = asdict(estimate(float(text.mean() - audio.mean()), draws[:, 0] - draws[:, 1])) | {
            "samples": len(both),
            "p": mcnemar(text, audio),
        }
    result["groups"] = _groups(rows)
    if before is not None:
        result["change"] = _change(before, rows, seed)
    return result


def overall(
    results: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, Sequence[Row]] | None,
) -> dict[str, Any]:
    """Means over the sets that are both read and heard, each set counting alike: of the accuracies, the gap, and the gap closed since `before`."""
    names = [name for name, result in results.items() if "gap" in result]
    if not names:
        return {}
    total: dict[str, Any] = {"sets": names, "gap": _mean(results[name]["gap"]["value"] for name in names)}
    total |= {way: _mean(results[name][way]["value"] for name in names) for way in WAYS}
    if before is None:
        return total
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for seed, name in enumerate(names):
        outcomes = _paired(before[name], rows[name])
        if not outcomes.size:
            return total
        drawn.append((outcomes.mean(axis=0), paired_draws(outcomes, seed)))
    text, _, audio, audio_after = np.mean([mean for mean, _ in drawn], axis=0)
    draws = np.mean([draw for _, draw in drawn], axis=0)
    return total | {"change": _gap_change(text, audio, audio_after, draws)}


def forgotten(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The forgetting check: how reading, and hearing where nothing is read beside it, changed since before; `lost` where significantly worse."""
    checks = []
    for name, result in results.items():
        change = result.get("change", {})
        for way in WAYS:
            if way in change and (way == "text" or "gap" not in result):
                worse = change[way]["value"] < 0 and change[way]["p"] < SIGNIFICANT
                checks.append({"set": name, "way": way, **change[way], "lost": worse})
    return checks


def _change(before: Sequence[Row], after: Sequence[Row], seed: int) -> dict[str, Any]:
    """What is different, over the questions that both evaluations asked."""
    change: dict[str, Any] = {}
    earlier = {row["id"]: row for row in before}
    for way in WAYS:
        key = f"{way}_correct"
        pairs = [
            (earlier[row["id"]][key], row[key]) for row in after if key in row and key in earlier.get(row["id"], {})
        ]
        if pairs:
            was, now = np.array(pairs).T
            draws = paired_draws(np.array(pairs), seed)
            change[way] = asdict(estimate(float(now.mean() - was.mean()), draws[:, 1] - draws[:, 0])) | {
                "before": float(was.mean()),
                "after": float(now.mean()),
                "gained": int(np.sum(~was & now)),
                "lost_answers": int(np.sum(was & ~now)),
                "samples": len(pairs),
                "p": mcnemar(was, now),
            }
    outcomes = _paired(before, after)
    if outcomes.size:
        text, _, audio, audio_after = outcomes.mean(axis=0)
        change |= _gap_change(text, audio, audio_after, paired_draws(outcomes, seed))
    return change


def _gap_change(text: float, audio: float, audio_after: float, draws: np.ndarray) -> dict[str, Any]:
    """Both gaps are to the text accuracy of the model before, as the paper's are: forgetting to read closes nothing."""
    text_draws, _, audio_draws, after_draws = draws.T
    closed, closed_draws = gap_closed(text, audio, audio_after), gap_closed_draws(text_draws, audio_draws, after_draws)
    return {
        "gap_before": asdict(estimate(float(text - audio), text_draws - audio_draws)),
        "gap_after": asdict(estimate(float(text - audio_after), text_draws - after_draws)),
        "gap_closed": None if closed is None else asdict(estimate(float(closed), closed_draws)),
    }


def _paired(before: Sequence[Row], after: Sequence[Row]) -> np.ndarray:
    """Bool [questions, 4]: text before and after, audio before and after, of what both evaluations asked in both ways."""
    earlier = {row["id"]: row for row in before}
    keys = ("text_correct", "audio_correct")
    pairs = [(earlier[row["id"]], row) for row in after if row["id"] in earlier]
    return np.array(
        [
            [side[key] for key in keys for side in pair]
            for pair in pairs
            if all(key in side for key in keys for side in pair)
        ]
    )


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    by_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["group"] is not None:
            by_group[row["group"]].append(row)
    return {group: {"samples": len(some)} | _accuracies(some) for group, some in sorted(by_group.items())}


def _accuracies(rows: Sequence[Row]) -> dict[str, float]:
    found = {way: [row[f"{way}_correct"] for row in rows if f"{way}_correct" in row] for way in WAYS}
    return {way: _mean(values) for way, values in found.items() if values}


def _reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """By reason, without the names and numbers of single questions, the commonest first."""
    return dict(Counter(reject.reason.replace(reject.id, "…").split(" (")[0] for reject in rejects).most_common())


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))

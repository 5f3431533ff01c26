"""Results of a set's answers: accuracies with intervals, the gap, and changes since another evaluation.

Rows are plain maps, as JSON has them: id, group, question, answer, choices, tokens, token_kl, cut, and for each
modality ("text", "audio") `…_response`, `…_answer` (the answer found in the response) and `…_correct`; where a set's
rule gives parts of a point, `…_score`, which then stands for right and wrong everywhere, and `…_measures`. All p-values
are McNemar's, two-sided, over the questions that both sides of a comparison answered; with parts of a point the sign
test, which is the same test of what is better and worse.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_cord.data.question_files import Reject
from megatron_cord.evaluation.statistics import estimate, gap_closed, gap_closed_draws, mcnemar, paired_draws

MODALITIES = ("text", "audio")
SIGNIFICANT = 0.05
Row = dict[str, Any]


def set_result(
    rows: Sequence[Row], rejects: Sequence[Reject], before: Sequence[Row] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the result of one set.

    Args:
        rows: of `scoring.score_set`.
        rejects: questions without an answer.
        before: rows of the same set by the model before; None compares nothing.
        seed: of the bootstrap; another one for each set makes their draws independent.

    Returns:
        JSON values. `samples`, and `text_accuracy`, `audio_accuracy` and their difference `gap` where there are such
        prompts; `groups`: the same by group; `estimates`: for "text", "audio" and "gap" the interval, the p-value of
        the gap, and how many responses gave no answer or were cut; `rejects` by reason; `measures`: means of the other
        numbers of a set's own rule; `change` since `before`.
    """
    result: dict[str, Any] = {"samples": len(rows), **_accuracies(rows)}
    estimates: dict[str, Any] = {}
    for modality in MODALITIES:
        asked = [row for row in rows if f"{modality}_correct" in row]
        if asked:
            outcomes = np.array([[_value(row, modality)] for row in asked])
            estimates[modality] = asdict(estimate(float(outcomes.mean()), paired_draws(outcomes, seed)[:, 0])) | {
                "samples": len(asked),
                "unanswered": sum(row[f"{modality}_answer"] is None for row in asked),
                "cut": sum(modality in row["cut"] for row in asked),
            }
    both = [row for row in rows if all(f"{modality}_correct" in row for modality in MODALITIES)]
    if both:
        text, audio = (np.array([_value(row, modality) for row in both]) for modality in MODALITIES)
        draws = paired_draws(np.stack([text, audio], axis=1), seed)
        estimates["gap"] = asdict(estimate(float(text.mean() - audio.mean()), draws[:, 0] - draws[:, 1])) | {
            "samples": len(both),
            "p": mcnemar(text, audio),
        }
    result |= {"groups": _groups(rows), "estimates": estimates, "rejects": _reasons(rejects)}
    if measures := _measures(rows):
        result["measures"] = measures
    if before is not None:
        result["change"] = _change(before, rows, seed)
    return result


def overall(
    results: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, Sequence[Row]] | None,
) -> dict[str, Any]:
    """Return means of accuracies, gap and gap closed since `before`, over the sets with text and audio."""
    names = [name for name, result in results.items() if "gap" in result]
    if not names:
        return {}
    total: dict[str, Any] = {"sets": names}
    total |= {key: _mean(results[name][key] for name in names) for key in ("text_accuracy", "audio_accuracy", "gap")}
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


def outcomes_of(rows: Sequence[Row], modality: str) -> dict[str, float]:
    """Return what each response from a modality counts, from 0 to 1, by question; others are left out."""
    return {row["id"]: float(_value(row, modality)) for row in rows if f"{modality}_correct" in row}


def forgotten(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the change of text accuracy, and of audio accuracy on sets without text; `lost`: significantly worse."""
    checks = []
    for name, result in results.items():
        change = result.get("change", {})
        for modality in MODALITIES:
            if modality in change and (modality == "text" or "gap" not in result):
                worse = change[modality]["value"] < 0 and change[modality]["p"] < SIGNIFICANT
                checks.append({"set": name, "modality": modality, **change[modality], "lost": worse})
    return checks


def _change(before: Sequence[Row], after: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return what is different, over the questions that both evaluations asked."""
    change: dict[str, Any] = {}
    earlier = {row["id"]: row for row in before}
    for modality in MODALITIES:
        key = f"{modality}_correct"
        pairs = [
            (_value(earlier[row["id"]], modality), _value(row, modality))
            for row in after
            if key in row and key in earlier.get(row["id"], {})
        ]
        if pairs:
            was, now = np.array(pairs).T
            draws = paired_draws(np.array(pairs), seed)
            change[modality] = asdict(estimate(float(now.mean() - was.mean()), draws[:, 1] - draws[:, 0])) | {
                "before": float(was.mean()),
                "after": float(now.mean()),
                "gained": int(np.sum(now > was)),
                "lost_answers": int(np.sum(was > now)),
                "samples": len(pairs),
                "p": mcnemar(was, now),
            }
    outcomes = _paired(before, after)
    if outcomes.size:
        text, _, audio, audio_after = outcomes.mean(axis=0)
        change |= _gap_change(text, audio, audio_after, paired_draws(outcomes, seed))
    return change


def _gap_change(text: float, audio: float, audio_after: float, draws: np.ndarray) -> dict[str, Any]:
    """Return both gaps, as in the paper to the text accuracy before: a fallen text accuracy closes nothing."""
    text_draws, _, audio_draws, after_draws = draws.T
    closed, closed_draws = gap_closed(text, audio, audio_after), gap_closed_draws(text_draws, audio_draws, after_draws)
    return {
        "gap_before": asdict(estimate(float(text - audio), text_draws - audio_draws)),
        "gap_after": asdict(estimate(float(text - audio_after), text_draws - after_draws)),
        "gap_closed": None if closed is None else asdict(estimate(float(closed), closed_draws)),
    }


def _paired(before: Sequence[Row], after: Sequence[Row]) -> np.ndarray:
    """Return the outcomes of questions that both evaluations answered from text and audio.

    Returns:
        bool, or float64 for parts of a point, [questions, 4]: text before and after, audio before and after.
    """
    earlier = {row["id"]: row for row in before}
    pairs = [(earlier[row["id"]], row) for row in after if row["id"] in earlier]
    return np.array(
        [
            [_value(side, modality) for modality in MODALITIES for side in pair]
            for pair in pairs
            if all(f"{modality}_correct" in side for modality in MODALITIES for side in pair)
        ]
    )


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    by_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for group in (*([] if row["group"] is None else [row["group"]]), *row.get("groups", ())):
            by_group[group].append(row)
    return {group: {"samples": len(some)} | _accuracies(some) for group, some in sorted(by_group.items())}


def _accuracies(rows: Sequence[Row]) -> dict[str, float]:
    """Return accuracies by modality; the gap is over the questions that have both."""
    found = {
        modality: [_value(row, modality) for row in rows if f"{modality}_correct" in row] for modality in MODALITIES
    }
    result = {f"{modality}_accuracy": sum(correct) / len(correct) for modality, correct in found.items() if correct}
    both = [row for row in rows if all(f"{modality}_correct" in row for modality in MODALITIES)]
    if both:
        text, audio = (sum(_value(row, modality) for row in both) / len(both) for modality in MODALITIES)
        result["gap"] = text - audio
    return result


def _reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """Count rejects by reason, without the names and numbers of single questions, the commonest first."""
    return dict(Counter(reject.reason.replace(reject.id, "…").split(" (")[0] for reject in rejects).most_common())


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _value(row: Row, modality: str) -> bool | float:
    """Return what a response counts: its part of a point, else whether it is right."""
    return bool(row[f"{modality}_correct"]) if row.get(f"{modality}_score") is None else float(row[f"{modality}_score"])


def _measures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the means of the rule's other numbers, by name and modality."""
    found: dict[str, dict[str, float]] = {}
    for modality in MODALITIES:
        measured = [row[f"{modality}_measures"] for row in rows if row.get(f"{modality}_measures")]
        for name in measured[0] if measured else ():
            found.setdefault(name, {})[modality] = sum(one[name] for one in measured) / len(measured)
    return found

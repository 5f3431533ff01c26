"""Scoring of responses: by a set's own rule, else by the rules of `megatron_cord.reward`, or free answers by a judge.

A response that names no choice, or two of them, is not right; how many named none is counted, since a model that does
not answer in the asked form looks like one that does not know. Responses may be any text: nothing here raises, and
every length is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cord.data.question_files import Reject
from megatron_cord.evaluation.answers import Answer
from megatron_cord.evaluation.questions import QuestionSet
from megatron_cord.evaluation.results import MODALITIES, Row
from megatron_cord.evaluation.rules.rule import Reply, Rule, Score
from megatron_cord.reward import Judge
from megatron_cord.reward.comparison import Comparer, Comparison, match_answers


def score_set(
    chosen: QuestionSet, answers: Mapping[str, Answer], comparer: Comparer | None, judge: Judge | None = None
) -> tuple[list[Row], list[Reject]]:
    """Return a row for each question that was answered, and the rejects, both in the set's order.

    Args:
        chosen: the set.
        answers: by question.
        comparer: decides about free answers of a set without a rule of its own; None: rules.
        judge: scores a set whose rule is judged.

    Raises:
        CordError: what the judge, or the set's rule, raises.
    """
    rows: list[Row] = []
    rejects = []
    for question in chosen.questions:
        answer = answers[question.id]
        if answer.reject is not None:
            rejects.append(Reject(question.id, answer.reject))
            continue
        rows.append(
            {
                "id": question.id,
                "group": question.group,
                "question": question.asked,
                "answer": question.answer,
                "choices": list(question.choices),
                "text_response": answer.text_response,
                "audio_response": answer.audio_response,
                "tokens": list(answer.tokens),
                "token_kl": None if answer.token_kl is None else list(answer.token_kl),
                "cut": list(answer.cut),
            }
            | ({"groups": list(question.groups)} if question.groups else {})
        )
    for modality in MODALITIES:
        asked = [row for row in rows if row[f"{modality}_response"] is not None]
        for row, score in zip(asked, _scores(chosen.rule, asked, modality, comparer, judge), strict=True):
            row |= {f"{modality}_answer": score.answer, f"{modality}_correct": score.correct}
            if score.value is not None:
                row |= {f"{modality}_score": score.value, f"{modality}_measures": dict(score.measures)}
    return rows, rejects


def _scores(
    rule: Rule | None, asked: Sequence[Row], modality: str, comparer: Comparer | None, judge: Judge | None
) -> list[Score]:
    if rule is None:
        return score_responses(
            [row["answer"] for row in asked],
            [row["choices"] for row in asked],
            [row[f"{modality}_response"] for row in asked],
            [row["question"] for row in asked],
            comparer,
        )
    replies = [
        Reply(
            row["id"],
            row["question"],
            row["answer"],
            row[f"{modality}_response"],
            tuple(row["choices"]),
            row["group"],
        )
        for row in asked
    ]
    return rule.score(replies, judge)


def score_responses(
    gold: Sequence[str],
    choices: Sequence[Sequence[str]],
    responses: Sequence[str],
    questions: Sequence[str],
    comparer: Comparer | None,
) -> list[Score]:
    """Return one score a response, in the same order.

    Args:
        gold: right answers; letters where there are choices.
        choices: the texts behind the letters; empty for free answers.
        responses: of the model.
        questions: their texts, for the comparer.
        comparer: decides about free answers, a `Judge` for example; None goes by rules.
    """
    scores = [_score(g, c, r) for g, c, r in zip(gold, choices, responses, strict=True)]
    if comparer is None:
        return scores
    free = [i for i, offered in enumerate(choices) if not offered]
    verdicts = comparer.compare([Comparison(questions[i], responses[i], gold[i], bare=True) for i in free])
    for i, verdict in zip(free, verdicts, strict=True):
        # Where a judge gave no answer, the rules that hold without one decide.
        scores[i] = scores[i] if verdict.source == "fallback" else Score(scores[i].answer, verdict.agrees)
    return scores


def is_correct(gold: str, choices: Sequence[str], response: str) -> bool:
    """Return whether one response is right, by rules."""
    return _score(gold, choices, response).correct


def _score(gold: str, choices: Sequence[str], response: str) -> Score:
    match = match_answers(Comparison("", response, gold, bare=True, choices=tuple(choices)))
    return Score(match.answer, match.agrees)

"""Which teacher scores what: the run's own one (`teacher`), or one of several by name (`teachers`).

A stream names its teacher (`objective.streams.NAME.taught_by`), or a training set the one that scores its samples
(`data.train.NAME.taught_by`); the stream's comes first. The run's own teacher, "", scores all else, and alone gives
reference answers and the divergences of evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from megatron_cord.data.config import TrainingSetConfig
from megatron_cord.data.views import Views
from megatron_cord.errors import CordError
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.streams import Stream
from megatron_cord.trainer.step.teacher import TeacherConfig


class TeacherRoutes:
    """Tells which teacher scores a sample's responses.

    Args:
        sets: the training sets by name; a single one is called "".
    """

    def __init__(self, sets: Mapping[str, TrainingSetConfig]) -> None:
        self._by_set = {name: each.taught_by for name, each in sets.items() if each.taught_by is not None}

    def __call__(self, term: Stream, sample_id: str) -> str:
        """Return the teacher's name; "" for the run's own.

        Args:
            term: the stream of the response.
            sample_id: of its sample, which begins with the set's name where there are several.
        """
        return self.of_set(term, sample_id.partition("/")[0])

    def of_set(self, term: Stream, name: str) -> str:
        """Return the same for all samples of a set."""
        return self._by_set.get(name, "") if term.taught_by is None else term.taught_by


def scored_views(objective: ObjectiveConfig, sets: Mapping[str, TrainingSetConfig]) -> dict[str, set[str]]:
    """Return the views that each teacher scores on, by its name, in any of the sets."""
    routes, found = TeacherRoutes(sets), dict[str, set[str]]()
    stand: dict[str, dict[str, str]] = {name: each.views for name, each in sets.items()} or {"": {}}
    for term in objective.terms:
        for name, others in stand.items():
            views = {others.get(view, view) for view in term.taught_views}
            if views:
                found.setdefault(routes.of_set(term, name), set()).update(views)
    return found


def audio_teachers(objective: ObjectiveConfig, sets: Mapping[str, TrainingSetConfig], views: Views) -> frozenset[str]:
    """Return the names of the teachers that score on a view with audio."""
    scored = scored_views(objective, sets)
    return frozenset(
        name for name, some in scored.items() if any("audio" in views.named(view, "a view").parts for view in some)
    )


def check_teachers(
    teachers: Mapping[str, TeacherConfig], objective: ObjectiveConfig, sets: Mapping[str, TrainingSetConfig]
) -> None:
    """Refuse teachers that are not configured, are not used, or are used where only the run's own may be.

    Raises:
        CordError: names the teacher.
    """
    for name, each in teachers.items():
        key = f"teachers.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
            raise CordError(f"teachers: the name {name!r} has others than letters, digits, '_' and '-'")
        if each.mode == "ema":
            raise CordError(f"{key}.mode=ema: a run keeps one moving average, that of teacher.mode=ema")
        if each.servers:
            raise CordError(f"{key}.servers: reference answers are those of the run's own teacher, teacher.servers")
    for key, name in _named(objective, sets):
        if name not in teachers:
            known = ", ".join(teachers) or "none"
            raise CordError(f"{key}={name} is no teacher; teachers has {known}, and null is the run's own, teacher")
    for term in objective.terms:
        if term.taught_by is not None and not term.distils:
            raise CordError(
                f"objective.streams.{term.name}.taught_by={term.taught_by} names a teacher, which "
                f"divergence.kind={term.divergence.kind} does not compare with"
            )
    if unused := teachers.keys() - scored_views(objective, sets).keys():
        raise CordError(
            f"teachers.{min(unused)} scores nothing: name it as taught_by of a stream (objective.streams.NAME) or of a "
            "training set (data.train.NAME), or leave it out"
        )
    if teachers and objective.responses == "teacher":
        raise CordError("objective.responses=teacher trains on the run's own teacher's answers; leave teachers out")


def _named(objective: ObjectiveConfig, sets: Mapping[str, TrainingSetConfig]) -> Iterator[tuple[str, str]]:
    """Yield each key that names a teacher, with the name."""
    for name, stream in objective.streams.items():
        if stream.taught_by is not None:
            yield f"objective.streams.{name}.taught_by", stream.taught_by
    for name, each in sets.items():
        if each.taught_by is not None:
            yield f"data.train.{name}.taught_by", each.taught_by

"""The live page's views of a run in progress: overview, rollouts, and two evaluations side by side.

Every view is drawn on the server and complete without its script, which only polls for changes. The run is read again
when something in its directory has changed, at most every two seconds; charts are drawn again only then.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_files
from megatron_cord.report.live.recordings import Recordings
from megatron_cord.report.live.search import ORDERS, PAGE, Query, mean_divergence, search
from megatron_cord.report.page.examples import kind_of
from megatron_cord.report.page.overview import facts, missing, overview
from megatron_cord.report.page.templates import templates
from megatron_cord.report.run.contents import Answer, Evaluation, RunContents
from megatron_cord.report.run.reading import read_run
from megatron_cord.runtime.files import fingerprint

_AT_MOST_EVERY = 2.0  # seconds
SETS = ("train", "evaluation")  # whose recordings can be played: data.train, data.evaluation


@dataclass(frozen=True)
class Pair:
    """One held-out question at two steps: how its answer changed, and both answers."""

    kind: str
    first: Answer
    second: Answer


class LiveRun:
    """A run's directory, polled for changes. Its methods may be called from several threads.

    Args:
        directory: of the run.
        lock: shared with other runs' pages, as matplotlib draws one chart at a time; None makes one.
        among: whether it is one of several runs, to whose page it links.

    Raises:
        CordError: it is no run's.
    """

    def __init__(self, directory: Path, lock: threading.RLock | None = None, *, among: bool = False) -> None:
        self.directory, self._among = directory, among
        self._lock = lock or threading.RLock()
        self._looked = 0.0
        self._version = ""
        self._run = read_run(directory)
        self._pages: dict[str, str] = {}
        self._audio = {
            name: Recordings(path) for each in SETS for name, path in _paths(each, self._run.setting(f"data.{each}"))
        }

    def version(self) -> str:
        """Return a fingerprint of the run's files, which changes with them."""
        with self._lock:
            self._look()
            return self._version

    def contents(self) -> RunContents:
        """Return the run as its files are now."""
        return self._now()

    def views(self, values: Mapping[str, str]) -> Mapping[str, Callable[[], str]]:
        """Return what draws each page, by its path; values are those of the address."""
        return {
            "/": self.overview,
            "/rollouts": lambda: self.rollouts(values),
            "/compare": lambda: self.compare(values),
        }

    def overview(self) -> str:
        """Return the page of alerts, the result so far, the gap, all curves, and time by phase."""
        with self._lock:  # one drawing at a time: matplotlib's settings are the process's
            self._look()
            if "overview" not in self._pages:
                self._pages["overview"] = self._draw(
                    "live/overview.html", overview(self._run) | {"config": self._run.config_text}
                )
            return self._pages["overview"]

    def rollouts(self, values: Mapping[str, str]) -> str:
        """Return the page of rollouts that match a query. Raises CordError for an invalid query."""
        run = self._now()
        query = Query.parse(values)
        found = search(run.rollout_files, query)
        skip = max(int(query.skip or 0), 0)
        given = {name: value for name, value in values.items() if value and name not in ("skip", "step_to")}
        within = given | ({"step_to": values["step_to"]} if values.get("step_to") else {})
        return self._draw(
            "live/rollouts.html",
            {
                "query": query,
                "values": values,
                "orders": list(ORDERS),
                "found": found,
                "cards": [(rollout, mean_divergence(rollout)) for rollout in found.rollouts],
                "first": skip + 1,
                "more": urlencode(within | {"skip": str(skip + PAGE)}) if found.count > skip + PAGE else None,
                "earlier": urlencode(given | {"step_to": str(found.earlier)}) if found.earlier is not None else None,
            },
        )

    def compare(self, values: Mapping[str, str]) -> str:
        """Return the page of two evaluations' answers. Raises CordError for a step without one."""
        run = self._now()
        by_step = {evaluation.step: evaluation for evaluation in run.evaluations}
        steps = list(by_step)
        content: dict[str, Any] = {"steps": steps, "pairs": [], "values": values}
        if steps:
            first, second = (
                _chosen(by_step, values.get(name), default) for name, default in (("a", steps[0]), ("b", steps[-1]))
            )
            earlier = {answer.id: answer for answer in first.answers}
            pairs = [Pair(kind_of(earlier[a.id], a), earlier[a.id], a) for a in second.answers if a.id in earlier]
            counts = Counter(pair.kind for pair in pairs)
            needle, kind = values.get("text", "").strip().casefold(), values.get("kind", "")
            pairs = [pair for pair in pairs if kind in ("", pair.kind) and needle in _haystack(pair)]
            # What changed comes first, and answers whose tokens were scored.
            order = {"broken": 0, "fixed": 1, "still wrong": 2, "always right": 3}
            pairs.sort(key=lambda pair: (order[pair.kind], pair.second.token_kl is None))
            skip = _whole(values.get("skip"))
            more = {name: value for name, value in values.items() if value} | {"skip": str(skip + PAGE)}
            content |= {
                "first": first,
                "second": second,
                "pairs": pairs[skip : skip + PAGE],
                "count": len(pairs),
                "skip": skip,
                "kinds": [(name, counts[name]) for name in order if counts[name]],
                "more": urlencode(more) if len(pairs) > skip + PAGE else None,
            }
        return self._draw("live/compare.html", content)

    def clip(self, name: str, sample_id: str) -> bytes | None:
        """Return a sample's recording as WAV; None if there is none. Raises CordError where shards cannot be read."""
        recordings = self._audio.get(name)
        if recordings is None:  # of several sets, a sample's id begins with its set's name
            part, _, sample_id = sample_id.partition("/")
            recordings = self._audio.get(f"{name}/{part}")
        return None if recordings is None else recordings.wav(sample_id)

    def failed(self, message: str) -> str:
        """Return the page of an error."""
        return (
            templates()
            .get_template("live/error.html")
            .render(name=self.directory.resolve().name, message=message, view="", links=_links(self._among))
        )

    def _draw(self, template: str, content: Mapping[str, Any]) -> str:
        run = self._run
        heads = overview_heads(run) | {
            "version": self._version,
            "view": Path(template).stem,
            "links": _links(self._among),
        }
        return templates().get_template(template).render(heads | dict(content))

    def _now(self) -> RunContents:
        with self._lock:
            self._look()
            return self._run

    def _look(self) -> None:
        if time.monotonic() - self._looked < _AT_MOST_EVERY and self._version:
            return
        self._looked = time.monotonic()
        version = _version_of(self.directory, self._run)
        if version != self._version:
            self._run = read_run(self.directory)
            self._pages.clear()
            self._version = version


def _links(among: bool) -> list[tuple[str, str, str]]:
    """Return address, title and view of each link between the views of a run."""
    home = [("../", "All runs", "runs")] if among else []
    return [
        *home,
        ("./", "Overview", "overview"),
        ("rollouts", "Rollouts", "rollouts"),
        ("compare", "Compare", "compare"),
    ]


def overview_heads(run: RunContents) -> dict[str, Any]:
    """Return the content above every view."""
    return {
        "name": run.path.resolve().name,
        "facts": facts(run),
        "notices": missing(run),
        "alerts": run.alerts,
    }


def _paths(name: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names under which a setting's sets are asked for, with their paths."""
    if isinstance(data, Mapping):
        yield from ((f"{name}/{part}", each.get("path")) for part, each in data.items())
    else:
        yield name, data


def _version_of(directory: Path, run: RunContents) -> str:
    """Return a fingerprint of sizes and times of the files that a page shows."""
    rollouts = run.setting("record.rollouts")
    names = ("config.yaml", "metrics.jsonl", "alerts.jsonl", "summary.json", "checkpoints/best.json")
    watched = [directory / name for name in names]
    watched += heldout_files(directory).values()
    watched.append(directory / (rollouts if isinstance(rollouts, str) else "rollouts"))
    parts: list[str | int] = []
    for path in watched:
        if path.exists():
            stat = path.stat()
            parts += [str(path), stat.st_mtime_ns, stat.st_size]
    return fingerprint(parts)


def _chosen(evaluations: Mapping[int, Evaluation], given: str | None, default: int) -> Evaluation:
    step = _whole(given, default)
    if step not in evaluations:
        raise CordError(f"there is no evaluation of step {step}; there are those of {', '.join(map(str, evaluations))}")
    return evaluations[step]


def _whole(given: str | None, default: int = 0) -> int:
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 12):
        raise CordError(f"{given[:40]!r} is no step or number")
    return int(given)


def _haystack(pair: Pair) -> str:
    texts = (
        pair.second.id,
        pair.second.question,
        pair.second.gold or "",
        pair.first.audio_response,
        pair.second.audio_response,
    )
    return "\n".join(texts).casefold()

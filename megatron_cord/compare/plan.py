"""The runs of a comparison."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.methods import Method
from megatron_cord.config.flattening import flatten
from megatron_cord.config.loading import load_config, to_dict
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig

_PLACES = ("output_dir", "evaluation.first_from")


@dataclass(frozen=True)
class PlannedRun:
    """One training.

    Attributes:
        method: its name.
        seed: of everything that is drawn.
        directory: its output.
        overrides: all, on top of the shared configuration.
        config: of the run.
        ranks: processes.
        kept: the file that outlives the directory, see `kept`; None for none.
        free: keys of settings that machines may have other values of.
    """

    method: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]
    config: RunConfig
    ranks: int
    kept: Path | None = None
    free: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.method}, seed {self.seed}"

    def leaves_free(self, key: str) -> bool:
        """Return whether machines may have other values of this setting."""
        return any(key == free or key.startswith(f"{free}.") for free in self.free)

    def has_settings_of(self, config: RunConfig) -> bool:
        """Return whether these are its settings, but for its place, its first evaluation's, and those left free."""
        first, second = (
            {
                key: value
                for key, value in flatten(to_dict(each)).items()
                if key not in _PLACES and not self.leaves_free(key)
            }
            for each in (config, self.config)
        )
        return first == second


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """Return all runs, seed by seed, so that a comparison that is stopped early has seeds of all methods.

    Raises:
        CordError: settings of a run that the trainer refuses.
    """
    return [_planned(config, name, method, seed) for seed in config.seeds for name, method in config.trained.items()]


def prepare_command(config: CompareConfig, seed: int) -> list[str]:
    """Return the command that makes the inputs of a seed's runs; empty if none is configured."""
    return [
        sys.executable if word == "python" and i == 0 else _filled(word, seed) for i, word in enumerate(config.prepare)
    ]


def _planned(config: CompareConfig, name: str, method: Method, seed: int) -> PlannedRun:
    directory = Path(config.output_dir) / name / f"seed-{seed}"
    settings = (*config.settings, *config.machine_settings, *method.settings, *config.adjust.get(name, ()))
    overrides = (*(_filled(s, seed) for s in settings), f"seed={seed}", f"output_dir={directory}")
    try:
        run = load_config(RunConfig, config.train, overrides)
    except CordError as error:
        raise CordError(f"{name}, seed {seed}: {error}") from None
    layout = run.parallel.tp * run.parallel.pp * run.parallel.cp
    if config.ranks % layout:
        raise CordError(
            f"ranks={config.ranks} is no multiple of the layout's {layout} (tp × pp × cp); set 0 for as few as it needs"
        )
    kept = Path(config.kept) / f"{name}-seed-{seed}.json.gz" if config.kept else None
    return PlannedRun(name, seed, directory, overrides, run, config.ranks or layout, kept, config.machine_keys)


def _filled(text: str, seed: int) -> str:
    return text.replace("{seed}", str(seed))

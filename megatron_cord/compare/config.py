"""The configuration of a comparison; it imports nothing heavy, as the command's help lists its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cord.compare.methods import COMPARED, Method, methods_named
from megatron_cord.errors import CordError

_OF_EACH_RUN = ("seed", "output_dir")  # settings that the comparison itself makes


@dataclass(frozen=True)
class CompareConfig:
    """Methods, seeds and settings of a comparison. ``{seed}`` in a text is replaced by the run's seed."""

    #: the configuration of megatron_cord.train that the methods' runs share: model, data, budget; empty: no method is
    #: trained, and `runs` are compared alone
    train: str = ""
    output_dir: str = ""  #: the methods' runs go to METHOD/seed-S in it
    #: a folder for what finished runs came to, one small file a run: a run that has one is not made again, also where
    #: its directory is gone; empty: none are written
    kept: str = ""
    #: finished runs to compare with: name → directories, one a seed; RUN_DIR on the command line is the same
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: path of the results, to which .json and .md are added; empty: comparison in output_dir, or nothing is written
    results: str = ""
    chart: str = ""  #: path of the drawing, to which .svg and .png are added; empty: beside the results
    #: a Markdown file whose lines between <!-- NAME --> and <!-- /NAME --> the tables replace; NAME: of `results`
    page: str = ""
    title: str = "Comparison"  #: of the results
    #: names of compare/methods.py or of `own`, in the order in which they run and are shown
    methods: tuple[str, ...] = COMPARED
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)  #: more methods: name → settings on top of CORD's
    #: more methods: name → a recipe's file (examples/recipes/gkd.yaml), its views, objective, reward and teacher;
    #: optimizer, model and rollout are those of `train`
    recipes: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)  #: of data order, sampling and everything else that is drawn
    #: the method, or the name of `runs`, whose differences from the others are given; empty: cord, or the first of
    #: `runs` where no method is trained
    reference: str = ""
    settings: tuple[str, ...] = ()  #: a.b=value for all runs, on top of `train`
    #: a.b=value for the runs that this machine makes, on top of `settings`: model.dtype=float32 where the processor has
    #: no bfloat16. A finished run is taken with any values of these keys, and the results name those that differ
    machine_settings: tuple[str, ...] = ()
    #: method → more settings of its own, such as a learning rate
    adjust: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: command that makes the inputs of a seed's runs, such as data and checkpoint; `python` is this interpreter
    prepare: tuple[str, ...] = ()
    ranks: int = 0  #: a run's; 0: as few as its layout needs
    jobs: int = 1  #: runs at a time

    def __post_init__(self) -> None:
        if not self.train and not self.runs:
            raise CordError("there is nothing to compare: set train to a configuration, or give directories of runs")
        if self.train and not self.output_dir:
            raise CordError("output_dir is required: the methods' runs go there")
        if not self.methods or not self.seeds:
            raise CordError("methods and seeds must name at least one each")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise CordError("seeds must be different and not negative")
        if self.ranks < 0 or self.jobs < 1:
            raise CordError("ranks cannot be negative, and jobs must be at least 1")
        methods_named(self.methods, self.own, self.recipes)
        for key, given in (("own", self.own), ("recipes", self.recipes)):
            if unused := sorted(given.keys() - set(self.methods)):
                raise CordError(f"{key} defines {unused[0]!r}, which methods does not name; add it there or remove it")
        for name in self.adjust.keys() - set(self.methods):
            raise CordError(
                f"adjust names {name!r}, which is none of the methods; choose one of {', '.join(self.methods)}"
            )
        own = (s for name, method in self.trained.items() for s in (*method.settings, *self.adjust.get(name, ())))
        common = {*_OF_EACH_RUN, *(setting.partition("=")[0] for setting in (*self.settings, *own))}
        for key in self.machine_keys:
            if both := sorted(other for other in common if f"{other}.".startswith(f"{key}.")):
                raise CordError(
                    f"machine_settings has {both[0]}, which the comparison sets itself; leave it to one of them"
                )
        if taken := [name for name in self.runs if name in self.trained]:
            raise CordError(f"runs.{taken[0]}: a method has this name; choose another")
        if empty := [name for name, directories in self.runs.items() if not directories]:
            raise CordError(f"runs.{empty[0]} names no directory")
        if self.chosen_reference not in self.chosen:
            raise CordError(
                f"reference is {self.chosen_reference!r}, which is none of the methods; "
                f"choose one of {', '.join(self.chosen)}"
            )

    @property
    def results_path(self) -> Path | None:
        """The path of the results; None if they are printed alone."""
        if self.results or self.output_dir:
            return Path(self.results or f"{self.output_dir}/comparison")
        return None

    @property
    def chart_path(self) -> Path | None:
        """The path of the drawing; None if there is none."""
        return Path(self.chart) if self.chart else self.results_path

    @property
    def machine_keys(self) -> tuple[str, ...]:
        """The keys of machine_settings."""
        return tuple(setting.partition("=")[0] for setting in self.machine_settings)

    @property
    def trained(self) -> dict[str, Method]:
        """The methods that are trained, by name."""
        return methods_named(self.methods, self.own, self.recipes) if self.train else {}

    @property
    def chosen(self) -> dict[str, Method]:
        """All that is compared, by name: methods, and finished runs."""
        return self.trained | {name: Method(name, ()) for name in self.runs}

    @property
    def chosen_reference(self) -> str:
        """The name of what the others are compared with."""
        return self.reference or ("cord" if self.train else next(iter(self.runs)))

"""CORD and its baselines: each method is a configuration of the same trainer, nothing else.

A method sets the scored responses, the divergence, the token weights, and whether the policy gradient is added. All
other settings, the budget among them, are the run's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_cord.config.flattening import flatten
from megatron_cord.config.source import read_tree
from megatron_cord.errors import CordError


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: in tables.
        settings: ``a.b=value``, on top of the run's configuration.
        ablates: its parts of CORD, as the ablation's table names them; None for a method that is no part of CORD.
    """

    title: str
    settings: tuple[str, ...]
    ablates: str | None = None


def _method(
    title: str,
    responses: str,
    divergence: str,
    *,
    weights: str = "uniform",
    policy: bool = False,
    ablates: str | None = None,
) -> Method:
    settings = (
        f"objective.responses={responses}",
        f"objective.divergence.kind={divergence}",
        f"objective.token_weights.factors={weights}",
        f"objective.policy_gradient.enabled={str(policy).lower()}",
    )
    return Method(title, settings, ablates)


def _policy(title: str, *settings: str) -> Method:
    """Return a peer's algorithm: L_seq alone, with settings below objective.policy_gradient, or with a whole key."""
    prefix = "objective.policy_gradient."
    chosen = tuple(s if s.startswith("rollout.") else prefix + s for s in settings)
    return Method(title, (*_method(title, "student", "none", policy=True).settings, *chosen))


def _recipe(name: str, path: str) -> Method:
    """Return a recipe's views, objective, reward and teacher as a method; its other settings are the runs' to say."""
    given = read_tree(path, ()).values
    sets = given.get("data", {}).get("train")
    if isinstance(sets, dict) and any("taught_by" in each for each in sets.values() if isinstance(each, dict)):
        raise CordError(
            f"recipes.{name}: {path} has a teacher for each of its training sets, and a comparison has its own data: "
            "leave it out, or run it by itself"
        )
    sections = ("views", "objective", "reward", "teacher", "teachers")
    chosen = {section: given[section] for section in sections if section in given}
    settings = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flatten(chosen).items())
    return Method(name.replace("_", " "), tuple(settings))


#: By the name that configuration uses. The first seven are the comparison, the next two complete the ablation; the last
#: are peers' algorithms (docs/algorithms.md), which differ from each other where a step makes several updates.
METHODS: dict[str, Method] = {
    "sft": _method("SFT on the teacher's answers", "teacher", "nll"),
    "off_policy_kl": _method("off-policy forward KL", "teacher", "forward_kl"),
    "grpo": _method("GRPO alone", "student", "none", policy=True, ablates="L_seq alone"),
    "reverse_kl": _method("reverse KL, unweighted", "student", "reverse_kl", ablates="L_tok without weights"),
    "sampled": _method("sampled-token policy gradient", "student", "sampled"),
    "jsd": _method("JSD", "student", "jsd"),
    "cord": _method(
        "CORD", "student", "reverse_kl", weights="cord", policy=True, ablates="L_tok with weights + L_seq: CORD"
    ),
    "weighted_kl": _method(
        "reverse KL, weighted", "student", "reverse_kl", weights="cord", ablates="L_tok with weights"
    ),
    "grpo_reverse_kl": _method(
        "GRPO + reverse KL, unweighted", "student", "reverse_kl", policy=True, ablates="L_tok without weights + L_seq"
    ),
    "grpo_clipped": _policy("GRPO, clipped", "surrogate=clipped", "normalization=response_mean", "normalize_std=true"),
    "dr_grpo": _policy("Dr. GRPO", "surrogate=clipped", "normalization=max_length"),
    "dapo": _policy(
        "DAPO",
        "surrogate=clipped",
        "clip_high=0.28",
        "normalization=token",
        "normalize_std=true",
        "filter_truncated=true",
        "rollout.dynamic_sampling=3",
    ),
    "gspo": _policy(
        "GSPO",
        "surrogate=clipped",
        "ratio=sequence",
        "clip_low=3e-4",
        "clip_high=4e-4",
        "normalization=response_mean",
        "normalize_std=true",
    ),
    "cispo": _policy("CISPO", "surrogate=cispo", "clip_high=4", "normalization=token", "normalize_std=true"),
}
COMPARED = tuple(METHODS)[:7]


def methods_named(
    names: Sequence[str], own: Mapping[str, Sequence[str]], recipes: Mapping[str, str] | None = None
) -> dict[str, Method]:
    """Return the methods by name.

    Args:
        names: of methods.
        own: the user's: settings on top of CORD's.
        recipes: paths of recipes by name; only those that are named are read.

    Raises:
        CordError: an unknown name, a name that comes twice, one of the user's that is taken, or a recipe that cannot be
            read.
    """
    recipes = recipes or {}
    for key, taken in (("own", own.keys() & METHODS.keys()), ("recipes", recipes.keys() & METHODS.keys())):
        if taken:
            raise CordError(f"{key}.{min(taken)}: this name is one of the project's methods; choose another")
    if twice := own.keys() & recipes.keys():
        raise CordError(f"own and recipes both define {min(twice)!r}; choose another name for one of them")
    known = METHODS | {
        name: Method(name.replace("_", " "), (*METHODS["cord"].settings, *settings)) for name, settings in own.items()
    }
    known |= {name: _recipe(name, path) for name, path in recipes.items() if name in names}
    if len(set(names)) != len(names):
        raise CordError(f"methods: {next(n for n in names if names.count(n) > 1)} comes twice")
    for name in names:
        if name not in known:
            raise CordError(f"methods: {name!r} is unknown; choose from {', '.join(known)}")
    return {name: known[name] for name in names}


def ablation(names: Sequence[str]) -> list[str]:
    """Return those of the methods that are parts of CORD, from the smallest part to the whole."""
    order = ("grpo", "reverse_kl", "weighted_kl", "grpo_reverse_kl", "cord")
    return [name for name in order if name in names]

"""What an engine may be able to do beyond `RolloutEngine`; a setting that needs more than it can is refused."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar, runtime_checkable

from megatron_cord.errors import CordError

Capability = TypeVar("Capability")


@runtime_checkable
class Pausable(Protocol):
    """Can stop between two tokens and go on in place, with other weights."""

    def pause(self) -> None:
        """Stop the generation of other threads, keeping what was made; return when it has stopped."""
        ...

    def resume(self) -> None:
        """Go on; tokens from here on carry the version of the weights that the engine then has."""
        ...


@runtime_checkable
class Abortable(Protocol):
    """Can end responses that are being generated."""

    def abort(self) -> None:
        """Make `generate` in other threads return soon, unfinished responses with finish_reason "abort"."""
        ...


@runtime_checkable
class Releasable(Protocol):
    """Can give its device memory to the trainer beside it, and take it back."""

    def release_memory(self) -> None:
        """Free the memory of weights and cache; nothing is generated until `restore_memory`."""
        ...

    def restore_memory(self) -> None:
        """Take the memory back; the weights are undefined until `update_weights` has brought all tensors."""
        ...


@runtime_checkable
class Recoverable(Protocol):
    """Can lose what it generates with, and get it back; meanwhile responses have finish_reason "abort"."""

    def recover(self) -> None:
        """Wait until it can generate again, with the weights of the last update. All ranks together.

        The trainer must still have these weights.

        Raises:
            CordError: it cannot.
        """
        ...


@runtime_checkable
class Rebasable(Protocol):
    """Can generate with the weights of its checkpoint in between, whatever weights it was given. All ranks together."""

    def rebases(self) -> bool:
        """Return whether that costs little now; the same on all ranks."""
        ...

    def base_weights(self) -> AbstractContextManager[None]:
        """Return the context within which it has the checkpoint's weights; after it, those of the last update again.

        The trainer must still have these weights, and nothing else may be generated meanwhile.
        """
        ...


def require(engine: object, capability: type[Capability], setting: str, otherwise: str) -> Capability:
    """Return the engine as one that has the capability.

    Raises:
        CordError: it has not; names the setting that asks for it and what to choose otherwise.
    """
    if not isinstance(engine, capability):
        name = type(engine).__name__
        raise CordError(f"{setting} needs an engine that is {capability.__name__}, which {name} is not; {otherwise}")
    return engine

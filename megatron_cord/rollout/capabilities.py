"""What an engine may be able to do beyond `RolloutEngine`. A setting that needs one of these is refused where the engine lacks it."""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

from megatron_cord.errors import CordError

Capability = TypeVar("Capability")


@runtime_checkable
class Pausable(Protocol):
    """Can stop between two tokens and go on in place, with other weights."""

    def pause(self) -> None:
        """Generation that other threads asked for stops, keeping what was made; returns when it has."""
        ...

    def resume(self) -> None:
        """It goes on; tokens from here on carry the version of the weights that the engine then has."""
        ...


@runtime_checkable
class Abortable(Protocol):
    """Can end responses that are being generated."""

    def abort(self) -> None:
        """Calls of `generate` in other threads return soon: whole responses as they are, unfinished ones with finish_reason "abort"."""
        ...


@runtime_checkable
class Releasable(Protocol):
    """Can give its device memory to the trainer beside it, and take it back."""

    def release_memory(self) -> None:
        """Frees the memory of weights and cache; nothing is generated until `restore_memory`."""
        ...

    def restore_memory(self) -> None:
        """Takes the memory back; the weights may be anything until `update_weights` has brought all tensors."""
        ...


@runtime_checkable
class Recoverable(Protocol):
    """Can lose what it generates with, and get it back. Its `generate` then leaves responses with finish_reason "abort"."""

    def recover(self) -> None:
        """Waits until it can generate again, with the weights that it was last given, which the trainer must still have. All ranks together.

        Raises:
            CordError: it cannot.
        """
        ...


def require(engine: object, capability: type[Capability], setting: str, otherwise: str) -> Capability:
    """The engine as one that has the capability.

    Raises:
        CordError: it has not; names the setting that asks for it and what to choose otherwise.
    """
    if not isinstance(engine, capability):
        name = type(engine).__name__
        raise CordError(f"{setting} needs an engine that is {capability.__name__}, which {name} is not; {otherwise}")
    return engine

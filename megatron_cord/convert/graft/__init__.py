"""A speech model of a text model and a Whisper, as a checkpoint of the Ultravox family with a new projector."""

from megatron_cord.convert.graft.writing import Grafted, Projector, graft

__all__ = ["Grafted", "Projector", "graft"]

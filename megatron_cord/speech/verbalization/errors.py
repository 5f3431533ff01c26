"""What cannot be spoken."""

from megatron_cord.errors import CordError


class UnspeakableError(CordError):
    """A text that cannot be spoken; the message is the reason."""

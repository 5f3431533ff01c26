"""The exception for errors that the user can mend; any other exception is a bug and keeps its traceback."""


class CordError(Exception):
    """What is wrong, in which file, field or sample, and what to do about it, in one line.

    Entry points print the message without a traceback and exit with status 2 (see ``megatron_cord.runtime.entry``).
    """

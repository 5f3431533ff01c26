"""How entry points end: one number for each kind of end, which launchers and batch scripts act on."""

from __future__ import annotations

import signal

BUG = 1  #: with its traceback, as Python has it
USER_ERROR = 2  #: after a one-line error
PEER_GONE = 3  #: a rank lost another one; starting again can help, unless that one's own status forbids it
BEYOND_GUARD = 4  #: an evaluation is done, and an accuracy has dropped beyond the limit of one of evaluation.guards
STOPPED = 75  #: stopped by a signal or the first Ctrl-C with all that was done saved; the same command continues
HUNG = 124  #: a rank made no progress for too long (see ``megatron_cord.trainer.observability.watchdog``)
INTERRUPTED = 130  #: after Ctrl-C where nothing can be saved, or a second one, as shells have it

#: Signals that stop a run after its current step, as Ctrl-C does: SIGTERM, and SIGUSR1 as SLURM's notice before the
#: time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

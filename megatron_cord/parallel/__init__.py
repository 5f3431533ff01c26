"""Process groups, layouts, and portability: importing this before megatron.core makes machines without CUDA usable."""

import atexit
import gc
import sys
import warnings

# Imports below make a million objects that live as long as the process. Searching them for garbage over and over takes
# a fifth of the time of the import, and time again in every later collection.
_collects = gc.isenabled()
gc.disable()

# Megatron's inference, which nothing here uses, imports W&B where it is installed: half a second of every start.
_hidden = "wandb" not in sys.modules
if _hidden:
    sys.modules["wandb"] = None  # type: ignore[assignment]

from megatron_cord.parallel import portability  # noqa: E402

# Warnings of Megatron-Core and of torch's collectives about their own internals, once a rank; no user can act on them.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
portability.install()
import megatron.core  # noqa: E402, F401

if _hidden:
    del sys.modules["wandb"]

gc.freeze()
atexit.register(gc.unfreeze)  # libraries that count what is left at the end would report leaks
if _collects:
    gc.enable()

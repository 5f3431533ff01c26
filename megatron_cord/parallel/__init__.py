"""Process groups, layouts, and portability: importing this before megatron.core makes machines without CUDA usable."""

import atexit
import gc
import warnings

# Imports below make a million objects that live as long as the process. Searching them for garbage over and over takes
# a fifth of the time of the import, and time again in every later collection.
_collects = gc.isenabled()
gc.disable()

from megatron_cord.parallel import portability  # noqa: E402

# Warnings of Megatron-Core and of torch's collectives about their own internals, once a rank; no user can act on them.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
portability.install()

gc.freeze()
atexit.register(gc.unfreeze)  # libraries that count what is left at the end would report leaks
if _collects:
    gc.enable()

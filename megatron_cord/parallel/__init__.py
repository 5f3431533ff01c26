"""Process groups, layouts, and the portability layer. Import this before megatron.core: it makes machines without CUDA usable."""

import warnings

from megatron_cord.parallel import portability

# Remarks of Megatron-Core and of torch's collectives on their own internals, once a rank and process, which no user can act on.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
portability.install()

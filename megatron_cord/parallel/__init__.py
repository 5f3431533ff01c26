"""Process groups, layouts, and portability: importing this before megatron.core makes machines without CUDA usable."""

import warnings

from megatron_cord.parallel import portability

# Warnings of Megatron-Core and of torch's collectives about their own internals, once a rank; no user can act on them.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
portability.install()

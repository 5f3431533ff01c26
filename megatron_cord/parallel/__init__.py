"""Process groups, layouts, and the portability layer. Import this before megatron.core: it makes machines without CUDA usable."""

from megatron_cord.parallel import portability

portability.install()

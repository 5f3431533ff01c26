"""Install transformer-engine in this process; imported before anything that imports megatron.core."""

from tests.transformer_engine.installed import install

install()

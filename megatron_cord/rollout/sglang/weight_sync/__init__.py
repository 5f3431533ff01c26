"""The exchange of weights: the trainer's sharded model into the models of running SGLang servers."""

from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError
from megatron_cord.rollout.sglang.weight_sync.config import ExchangeConfig
from megatron_cord.rollout.sglang.weight_sync.weight_sync import ExchangeReport, WeightExchange, build_exchange

__all__ = [
    "Endpoint",
    "ExchangeConfig",
    "ExchangeReport",
    "ServerError",
    "WeightExchange",
    "build_exchange",
]

"""The exchange of weights: the trainer's sharded model into the models of running SGLang servers."""

from megatron_cord.rollout.exchange.config import ExchangeConfig
from megatron_cord.rollout.exchange.endpoint import Endpoint, ServerError
from megatron_cord.rollout.exchange.exchange import ExchangeReport, WeightExchange, build_exchange
from megatron_cord.rollout.exchange.source import ModelWeights, WeightSource

__all__ = [
    "Endpoint",
    "ExchangeConfig",
    "ExchangeReport",
    "ModelWeights",
    "ServerError",
    "WeightExchange",
    "WeightSource",
    "build_exchange",
]

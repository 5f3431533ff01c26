"""All that a server of forked ranks imports, once (tests/gloo.py, tests/trainer/fault_ranks.py).

What is there by the end of this module stays, and no rank's garbage collector visits it: a collection writes into every
object, so that each rank would copy all that the server has imported. Nothing computes here, as threads do not survive
a fork.
"""

import gc

import pyarrow.parquet
import pytest
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.qwen2_audio import modeling_qwen2_audio

import megatron_cord.train
import megatron_cord.trainer.step.optimizer.building
import tests.tiny_run

__all__ = ["megatron_cord", "modeling_qwen2_audio", "pyarrow", "pytest", "tests"]

pyarrow.array([0])  # imports pandas, where it is installed
get_checkpoint_conversion_mapping("qwen2_audio")  # compiles hundreds of regular expressions, once for all models
gc.collect()
gc.freeze()

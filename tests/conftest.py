"""Settings of every test, made before torch is imported: one thread (two cores may run several ranks), and no network."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

torch.set_num_threads(1)

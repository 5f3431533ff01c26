#!/bin/bash
# Train on this node's GPUs: examples/step_audio2_mini/train.sh [a.b=value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${CORD_PYTHON:-.venv/bin/python}" -m megatron_cord.launch --nproc-per-node "${CORD_RANKS:-gpu}" -m megatron_cord.train \
    --config examples/step_audio2_mini/config.yaml "$@"

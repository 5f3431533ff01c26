#!/bin/bash
# Train on this machine's GPUs, the last half of which run rollout servers: examples/qwen3_omni_30b_a3b/train.sh [a.b=value …]
exec "$(dirname "${BASH_SOURCE[0]}")/../train.sh" qwen3_omni_30b_a3b "$@"

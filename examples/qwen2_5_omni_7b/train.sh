#!/bin/bash
# Train on this machine's GPUs, the last half of which run rollout servers: examples/qwen2_5_omni_7b/train.sh [a.b=value …]
exec "$(dirname "${BASH_SOURCE[0]}")/../train.sh" qwen2_5_omni_7b "$@"

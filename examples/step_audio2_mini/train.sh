#!/bin/bash
# Train on this machine's GPUs, the last half of which run rollout servers: examples/step_audio2_mini/train.sh [a.b=value …]
exec "$(dirname "${BASH_SOURCE[0]}")/../train.sh" step_audio2_mini "$@"

#!/bin/bash
# Train on this machine's GPUs, the last half of which run rollout servers: examples/audio_flamingo_3/train.sh [a.b=value …]
exec "$(dirname "${BASH_SOURCE[0]}")/../train.sh" audio_flamingo_3 "$@"

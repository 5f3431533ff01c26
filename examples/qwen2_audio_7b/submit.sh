#!/bin/bash
# Submit the run to SLURM: examples/qwen2_audio_7b/submit.sh [NODES | NODES+SERVER_NODES] [a.b=value …]
# The default is one node of 8 GPUs.
exec "$(dirname "${BASH_SOURCE[0]}")/../slurm/submit.sh" qwen2_audio_7b "$@"

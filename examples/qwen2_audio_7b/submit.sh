#!/bin/bash
# Submits the run to SLURM: examples/qwen2_audio_7b/submit.sh [NODES] [a.b=value …]; one node of 8 GPUs unless more are asked for.
exec "$(dirname "${BASH_SOURCE[0]}")/../slurm/submit.sh" qwen2_audio_7b "$@"

#!/bin/bash
# Submit the run to SLURM: examples/step_audio2_mini/submit.sh [NODES | NODES+SERVER_NODES] [a.b=value …]
# The default is one node of 8 GPUs.
exec "$(dirname "${BASH_SOURCE[0]}")/../slurm/submit.sh" step_audio2_mini "$@"

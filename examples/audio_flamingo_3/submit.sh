#!/bin/bash
# Submit the run to SLURM: examples/audio_flamingo_3/submit.sh [NODES | NODES+SERVER_NODES] [a.b=value …]
# The default is one node of 8 GPUs. Without nodes for servers, half of each node's GPUs run them; CORD_SERVER_GPUS says
# how many, 0 for rollouts in the ranks' own processes.
export CORD_SERVER_GPUS=${CORD_SERVER_GPUS-half}
engine=()
[[ $CORD_SERVER_GPUS != 0 ]] || engine=(rollout.engine=local) # nodes for servers win over it
exec "$(dirname "${BASH_SOURCE[0]}")/../slurm/submit.sh" audio_flamingo_3 "$@" "${engine[@]}"

#!/bin/bash
# Submit an example to SLURM, for nodes of 8 GPUs:
#   examples/slurm/submit.sh EXAMPLE [NODES | NODES+SERVER_NODES] [a.b=value …]
# 4 trains on four nodes; 4+2 on four, with rollout servers on two more. More options of sbatch: SBATCH_… variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
example=${1:?usage: submit.sh EXAMPLE [NODES | NODES+SERVER_NODES] [a.b=value ...]}
shift
nodes=1
export CORD_SERVER_NODES=0
if [[ ${1:-} =~ ^([1-9][0-9]*)(\+([1-9][0-9]*))?$ ]]; then
    CORD_SERVER_NODES=${BASH_REMATCH[3]:-0}
    nodes=$((BASH_REMATCH[1] + CORD_SERVER_NODES))
    shift
fi
exec sbatch --job-name="$example" --nodes="$nodes" --gpus-per-node=8 --exclusive \
    --time="${SBATCH_TIMELIMIT:-1-00:00:00}" examples/slurm/train.sbatch "examples/$example/config.yaml" "$@"

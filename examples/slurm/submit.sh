#!/bin/bash
# Submits an example to SLURM: examples/slurm/submit.sh EXAMPLE [NODES] [a.b=value …], for nodes of 8 GPUs. More options of sbatch: SBATCH_… variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
example=${1:?usage: submit.sh EXAMPLE [NODES] [a.b=value ...]}
shift
nodes=1
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    nodes=$1
    shift
fi
exec sbatch --job-name="$example" --nodes="$nodes" --gpus-per-node=8 --exclusive --time="${SBATCH_TIMELIMIT:-1-00:00:00}" \
    examples/slurm/train.sbatch "examples/$example/config.yaml" "$@"

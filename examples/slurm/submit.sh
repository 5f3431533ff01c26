#!/bin/bash
# Submit an example to SLURM:
#   examples/slurm/submit.sh EXAMPLE [NODES | NODES+SERVER_NODES] [--option=value of sbatch …] [a.b=value …]
# 4 trains on four nodes; 4+2 on four, with rollout servers on two more. Without options for GPUs a node has 8; without
# options for memory or CPUs nodes are taken whole. Environment, beside that of train.sbatch:
#   CORD_JOBS            for users who may not requeue: so many jobs, each of which continues the run where the one
#                        before it ended; those that are left when the run is finished, or fails, are cancelled
#   CORD_SERVER_OPTIONS  options of sbatch for server nodes of another kind, separated by spaces, such as
#                        "--partition=small --gpus-per-node=4": they become a component of a heterogeneous job
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
example=${1:?usage: submit.sh EXAMPLE [NODES | NODES+SERVER_NODES] [--option=value ...] [a.b=value ...]}
shift
nodes=1
export CORD_SERVER_NODES=0
if [[ ${1:-} =~ ^([1-9][0-9]*)(\+([1-9][0-9]*))?$ ]]; then
    nodes=${BASH_REMATCH[1]}
    CORD_SERVER_NODES=${BASH_REMATCH[3]:-0}
    shift
fi
given=()
while [[ ${1:-} == --* ]]; do
    [[ $1 == *=* || $1 =~ ^--(exclusive|oversubscribe|no-requeue|hold|test-only|parsable)$ ]] || {
        echo "error: give sbatch's option $1 as $1=value" >&2
        exit 2
    }
    given+=("$1")
    shift
done
asks_for() { # whether an option among the others matches: asks_for PATTERN OPTIONS …
    printf '%s\n' "${@:2}" | grep -E "^--($1)" >/dev/null # not -q, which would end printf early
}
add_defaults() { # print the options of one component, with what they leave open
    asks_for 'gpus|gres' "$@" || echo --gpus-per-node=8
    asks_for 'mem|cpus-per|oversubscribe' "$@" || printf '%s\n' --exclusive --mem=0
}
mapfile -t environment < <(env | sed -n 's/^SBATCH_\([A-Z_]*\)=.*/--\1/p' | tr 'A-Z_' 'a-z-')
mapfile -t defaults < <(add_defaults "${given[@]}" "${environment[@]}")
options=(--job-name="$example" --time="${SBATCH_TIMELIMIT:-1-00:00:00}" "${defaults[@]}" "${given[@]}")
servers=()
if [[ -n ${CORD_SERVER_OPTIONS:-} ]]; then
    ((CORD_SERVER_NODES)) || {
        echo "error: CORD_SERVER_OPTIONS without server nodes; give NODES+SERVER_NODES" >&2
        exit 2
    }
    read -ra servers <<<"$CORD_SERVER_OPTIONS"
    mapfile -t defaults < <(add_defaults "${servers[@]}" "${environment[@]}")
    servers=(: --nodes="$CORD_SERVER_NODES" --ntasks-per-node=1 "${defaults[@]}" "${servers[@]}")
else
    nodes=$((nodes + CORD_SERVER_NODES))
fi
submit() { sbatch --nodes="$nodes" "$@" "${servers[@]}" examples/slurm/train.sbatch "${arguments[@]}"; }
arguments=("examples/$example/config.yaml" "$@")
if [[ -z ${CORD_JOBS:-} ]]; then
    submit "${options[@]}"
else
    export CORD_AGAIN=chain
    before=
    for ((number = 0; number < CORD_JOBS; number++)); do
        before=$(submit "${options[@]}" --parsable ${before:+"--dependency=afterany:$before"})
        before=${before%%;*} # without the cluster's name
        echo "Submitted batch job $before"
    done
fi

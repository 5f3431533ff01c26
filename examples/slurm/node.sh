#!/bin/bash
# What train.sbatch runs on every node, inside the container if there is one: node.sh trainer|servers [a.b=value …]
# The last words override the configuration. The other arguments are variables that train.sbatch exports.
set -eo pipefail
if [[ -n ${CORD_PROLOGUE:-} ]]; then
    # shellcheck source=/dev/null
    source "$CORD_PROLOGUE" # before set -u: scripts of modules often read variables that are not set
fi
set -u
role=$1
shift
python=${CORD_PYTHON:-.venv/bin/python}
if [[ -n ${CORD_STAGE:-} ]]; then
    staged=$("$python" -m examples.slurm.stage "$role" "$CORD_STAGE" --config "$CORD_CONFIG" "$@")
    mapfile -t staged <<<"$staged"
    set -- "$@" "${staged[@]}"
fi
serve() { # serve CHECKPOINT [arguments of tools/serve_rollout.py]
    local host more
    host=$(sed -n "s/^$SLURMD_NODENAME=//p" <<<"$CORD_SERVER_ADDRESSES")
    read -ra more <<<"${CORD_SERVER_ARGS:-}"
    exec "$python" tools/serve_rollout.py "$1" --servers-file "$CORD_SERVERS_FILES/$SLURMD_NODENAME.json" \
        --log-dir "$CORD_SERVER_LOGS/$SLURMD_NODENAME" --host "$host" --count "$CORD_SERVERS" "${@:2}" "${more[@]}"
}
join() { # join 0 1 2: 0,1,2
    local IFS=,
    echo "$*"
}
beside=${CORD_SERVER_GPUS:-0}
if [[ $role == servers ]] || ((beside)); then
    checkpoint=$("$python" -m examples.slurm.setting model.checkpoint --config "$CORD_CONFIG" "$@")
fi
[[ $role != servers ]] || serve "$checkpoint"
if ((beside)); then # the node's last GPUs; SLURM ends them with the ranks, whose step this is
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}"
    training=$((${#gpus[@]} - beside))
    # The signal that has the ranks save reaches all processes of the step.
    (trap '' USR1 && serve "$checkpoint" --gpus "$(join "${gpus[@]:training}")") &
    CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:0:training}")
    export CUDA_VISIBLE_DEVICES CORD_RANKS=${CORD_RANKS:-$training}
fi
read -ra more <<<"${CORD_LAUNCH_ARGS:-}"
# $SLURM_PROCID is the node's rank.
exec "$python" -m megatron_cord.launch --node-rank "$SLURM_PROCID" --nnodes "$SLURM_STEP_NUM_TASKS" \
    --nproc-per-node "${CORD_RANKS:-${SLURM_GPUS_ON_NODE:-1}}" --master-addr "${CORD_ADDRESSES%%$'\n'*}" \
    --master-port "$CORD_PORT" "${more[@]}" -m megatron_cord.train --config "$CORD_CONFIG" "$@"

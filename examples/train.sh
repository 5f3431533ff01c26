#!/bin/bash
# Train an example on this machine's GPUs, the last half of which run rollout servers:
#   examples/train.sh EXAMPLE [a.b=value …]
# The servers end with the training; their logs are in the run's directory. Environment:
#   CORD_SERVERS       GPUs that run servers, one each; default: half of them; 0: rollouts in the ranks' own processes
#   CORD_RANKS         ranks; default: a rank on each of the other GPUs
#   CORD_SERVER_ARGS   more arguments of tools/serve_rollout.py, separated by spaces
#   CORD_PYTHON        the interpreter; default .venv/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
example=${1:?usage: examples/train.sh EXAMPLE [a.b=value ...]}
shift
python=${CORD_PYTHON:-.venv/bin/python}
config=examples/$example/config.yaml
fail() {
    echo "error: $*" >&2
    exit 2
}
if [[ -z ${CUDA_VISIBLE_DEVICES:-} ]]; then
    command -v nvidia-smi >/dev/null || fail "no GPU was found (no nvidia-smi); name them with CUDA_VISIBLE_DEVICES"
    CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)
fi
IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
join() { # join 0 1 2: 0,1,2
    local IFS=,
    echo "$*"
}
servers=${CORD_SERVERS:-$((${#gpus[@]} / 2))}
training=$((${#gpus[@]} - servers))
((training > 0)) || fail "CORD_SERVERS=$servers of ${#gpus[@]} GPUs leaves none to train on"
engine=(rollout.engine=local)
serving=
trap 'if [[ -n $serving ]]; then kill "$serving" 2>/dev/null && wait "$serving" || true; fi' EXIT
if ((servers)); then
    checkpoint=$("$python" -m examples.slurm.setting model.checkpoint --config "$config" "$@")
    output=$("$python" -m examples.slurm.setting output_dir --config "$config" "$@")
    read -ra more <<<"${CORD_SERVER_ARGS:-}"
    # In a session of their own, so that Ctrl-C ends them only after the ranks have saved.
    setsid "$python" tools/serve_rollout.py "$checkpoint" --servers-file "$output/servers.json" \
        --log-dir "$output/server-logs" --count "$servers" --gpus "$(join "${gpus[@]:training}")" "${more[@]}" &
    serving=$!
    engine=(rollout.engine=sglang "rollout.sglang.servers_file=$output/servers.json"
        "rollout.sglang.min_servers=$servers")
fi
CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:0:training}")
export CUDA_VISIBLE_DEVICES
"$python" -m megatron_cord.launch --nproc-per-node "${CORD_RANKS:-$training}" -m megatron_cord.train \
    --config "$config" "$@" "${engine[@]}" &
trainer=$!
# The launcher has the ranks save. The terminal sends Ctrl-C to it, too.
trap 'kill -TERM "$trainer" 2>/dev/null || true' TERM USR1
trap : INT
if [[ -n $serving ]]; then
    (
        while kill -0 "$serving" 2>/dev/null; do sleep 2; done
        if kill -TERM "$trainer" 2>/dev/null; then
            echo "error: the rollout servers ended (see above, and $output/server-logs); the ranks save and stop" >&2
        fi
    ) &
fi
status=0
wait "$trainer" || status=$?
while kill -0 "$trainer" 2>/dev/null; do # a signal ended wait, not the trainer
    status=0
    wait "$trainer" || status=$?
done
exit "$status"

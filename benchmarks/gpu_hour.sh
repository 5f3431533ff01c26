#!/usr/bin/env bash
# What only a GPU can tell, in ten minutes: one part after the other, each bounded in time and independent of whether an
# earlier one failed; then a summary, also as summary.json and summary.md. docs/gpu.md says what each part shows.
#
#   benchmarks/gpu_hour.sh [--size full|tiny] [--parts NAME,NAME] [--seconds 600] [--output DIR]
#
#   --size     tiny: for machines without a GPU, where it checks this script and not the speed
#   --parts    only these, in the order of the script
#   --seconds  of all parts together; a part that no time is left for is skipped
#   --output   of logs and figures; benchmarks/results/gpu-hour by default
#
# It needs no network: .venv, and for the server .venv-sglang, must be there (make setup-cuda). PYTHON and SGLANG_PYTHON
# name other interpreters. Exit status: 0 if no part failed, 1 if one did, 2 if it could not begin.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

SIZE=full SECONDS_IN_ALL=600 CHOSEN='' OUTPUT=benchmarks/results/gpu-hour
while [ $# -gt 0 ]; do
    case "$1" in
        --size) SIZE=${2-} ;;
        --parts) CHOSEN=,${2-}, ;;
        --seconds) SECONDS_IN_ALL=${2-} ;;
        --output) OUTPUT=${2-} ;;
        *) echo "error: $1 is no option; see the head of $0" >&2; exit 2 ;;
    esac
    shift 2 || { echo "error: an option lacks its value" >&2; exit 2; }
done
PYTHON=${PYTHON:-.venv/bin/python}
SGLANG_PYTHON=${SGLANG_PYTHON:-.venv-sglang/bin/python}
case "$SIZE" in full | tiny) ;; *) echo "error: --size is full or tiny, got '$SIZE'" >&2; exit 2 ;; esac
[[ $SECONDS_IN_ALL =~ ^[1-9][0-9]*$ ]] || { echo "error: --seconds is a number above 0, got '$SECONDS_IN_ALL'" >&2; exit 2; }
mkdir -p "$OUTPUT" || exit 2
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# What the machine has, by names that parts below ask for.
HAS=$("$PYTHON" -m benchmarks.gpu_hour.machine "$OUTPUT/machine.json") || {
    echo "error: $PYTHON cannot start the checks; make setup-cuda, or set PYTHON" >&2
    exit 2
}
[ -x "$SGLANG_PYTHON" ] && HAS="$HAS sglang"

declare -A LACKS=(
    [cuda]="no CUDA device" [te]="transformer-engine is not installed"
    [sglang]="$SGLANG_PYTHON does not exist (make sglang-env)"
)
RECORD=$OUTPUT/parts.tsv
NAMES='' LISTING=1 # the parts are gone through twice: for their names, and to run them

record() { # NAME STATUS SECONDS REASON
    printf '%s\t%s\t%s\t%s\n' "$@" >> "$RECORD"
    printf '%-18s %-4s %5s s  %s\n' "$@"
}

part() { # NAME LIMIT NEEDS COMMAND…: NEEDS are names joined by commas, or -
    local name=$1 limit=$2 needs=$3 need left begun status log says
    shift 3
    [ -z "$LISTING" ] || { NAMES="$NAMES $name"; return 0; }
    [[ -z $CHOSEN || $CHOSEN == *",$name,"* ]] || return 0
    for need in ${needs//,/ }; do
        [[ $need == - || " $HAS " == *" $need "* ]] || { record "$name" skip 0 "${LACKS[$need]}"; return 0; }
    done
    left=$((SECONDS_IN_ALL - SECONDS))
    [ $left -gt 0 ] || { record "$name" skip 0 "no time is left of $SECONDS_IN_ALL s"; return 0; }
    [ $left -lt "$limit" ] && limit=$left
    begun=$SECONDS log=$OUTPUT/$name.log
    timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1 < /dev/null
    status=$? says=$(tail -n 1 "$log" | tr -s ' ')
    case $status in
        0) record "$name" pass $((SECONDS - begun)) "${says//"$WORK/run"/$OUTPUT}" ;;
        124 | 137) record "$name" FAIL $((SECONDS - begun)) "not done after $limit s; see $log" ;;
        *) record "$name" FAIL $((SECONDS - begun)) "status $status; see $log" ;;
    esac
}

verify() { # NAME LIMIT NEEDS SUBJECT SETTING…
    local name=$1 limit=$2 needs=$3
    shift 3
    part "$name" "$limit" "$needs" "$PYTHON" -m megatron_cord.verify "$@"
}

if [ "$SIZE" = full ]; then
    LOSS=() BENCHMARK=(--turns 5 --sizes 8192 151936 3584) TYPE=bfloat16
    TRAIN=(rollout.prompts_per_step=16 rollout.policy_prompts_per_step=4 rollout.policy_rollouts=4 rollout.max_new_tokens=64)
else
    LOSS=(tokens=8 hidden=16 vocabulary=200) BENCHMARK=(--turns 2 --sizes 32 512 32) TYPE=float32
    TRAIN=(rollout.prompts_per_step=2 rollout.policy_prompts_per_step=1 rollout.policy_rollouts=2 rollout.max_new_tokens=4)
fi

all_parts() {
    verify environment 120 - environment
    verify loss-float32 90 - loss dtype=float32 "${LOSS[@]}"
    verify loss-bfloat16 90 - loss dtype=bfloat16 "${LOSS[@]}"
    verify layout-torch 90 - layout model.layers=torch
    verify layout-te 90 cuda,te layout model.layers=transformer_engine model.dtype=bfloat16
    part inputs 90 - "$PYTHON" -m benchmarks.gpu_hour.inputs "$WORK" "$SIZE"
    # Short clips in a window of 30 s, the encoder trained: rows of padding must reach neither loss nor gradients.
    part train 120 - "$PYTHON" -m megatron_cord.train --config /dev/null "output_dir=$WORK/run" \
        "model.checkpoint=$WORK/checkpoint" "model.dtype=$TYPE" 'model.freeze=[]' "data.train=$WORK/train" \
        "data.evaluation=$WORK/heldout" evaluation.interval=0 evaluation.max_new_tokens=4 evaluation.scored=2 \
        train.steps=3 'train.profile={steps: [3], memory: true}' checkpoint.interval=0 metrics.tensorboard=false \
        objective.token_weights.top_k=2 "${TRAIN[@]}"
    for kept in metrics.jsonl report.html profile; do
        [ -e "$WORK/run/$kept" ] && cp -r "$WORK/run/$kept" "$OUTPUT"
    done
    part server 200 sglang "$PYTHON" -m benchmarks.gpu_hour.server "$WORK/checkpoint" "$SGLANG_PYTHON" "$OUTPUT/server.json"
    verify weight-sync 180 sglang weight_sync "checkpoint=$WORK/checkpoint" "python=$SGLANG_PYTHON" "dtype=$TYPE" start_seconds=150
    # Last, as only their figures are lost where the time is over: compiling the baselines takes most of it.
    part loss-time 100 - "$PYTHON" -m benchmarks.loss layer "${BENCHMARK[@]}" --results "$OUTPUT/loss.json"
    part loss-memory 100 - "$PYTHON" -m benchmarks.loss memory "${BENCHMARK[@]}" --results "$OUTPUT/loss.json"
}

all_parts
for name in ${CHOSEN//,/ }; do
    [[ " $NAMES " == *" $name "* ]] || { echo "error: --parts $name: choose from$NAMES" >&2; exit 2; }
done
# Figures of an earlier run must not pass for those of this one.
for name in $NAMES; do rm -f "$OUTPUT/$name.log"; done
rm -rf "$OUTPUT"/{metrics.jsonl,report.html,loss.json,server.json,profile,summary.json,summary.md}
: > "$RECORD"
LISTING='' SECONDS=0
all_parts
"$PYTHON" -m benchmarks.gpu_hour.summary "$OUTPUT" "$SIZE"

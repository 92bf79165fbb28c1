#!/usr/bin/env bash
# The checks worth most on one GPU, as rungs of a ladder: what each shows stands in docs/gpu.md.
#
#   bash launch/offline_wheels.sh --out .whl --python 3.12       where there is a package index: the other machine's Python
#   bash tools/gpu_trial.sh --wheels .whl 1                      there, in the root of the checkout, .whl carried along
#   DRY=1 bash tools/gpu_trial.sh --out /tmp/dry 1 2 3 4 5       no GPU: tiny sizes on a CPU, to see that it all runs
#
# Rungs, each sized for ten minutes; several may be named:
#   1  parity with the CPU, step benchmark with a profile, quickstart in bf16
#   2  ZeRO 2 and 3 with growth and resume; cost of events, memory, spectra
#   3  step benchmark at the target shapes, blocks alone, compiled and not; the same of an older checkout (--before)
#   4  the largest models that fit, dense and factored
#   5  the race at size: dense, fixed rank and growing ranks on the same text
#
#   --out DIR       for tables, logs and summary.txt (default: runs/gpu_trial)
#   --wheels DIR    wheels to install first, into a folder of the run's own
#   --before DIR    an older checkout that rung 3 measures, too
#   --only PART...  only these parts of the rungs (end the list with --)
#
# Every part has a limit of its own; summary.txt has its exit code and seconds. Where the variable OUT names a folder,
# everything is archived to $OUT/trial.tgz after every part. The exit code is 1 if a part failed, 2 if nothing could run.
# Variables: ESPALIER_PYTHON (python3), COMMIT (to be noted, where the checkout has no .git).
set -uo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="" wheels="" before="" only="" rungs=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --out | --wheels | --before)
        [ $# -ge 2 ] && [ -n "$2" ] || refuse "$1 needs a value: see bash tools/gpu_trial.sh --help"
        case "$1" in --out) out="$2" ;; --wheels) wheels="$2" ;; --before) before="$2" ;; esac
        shift 2
        ;;
    --only)
        shift
        while [ $# -gt 0 ] && [ "$1" != -- ]; do only="$only $1 " && shift; done
        [ $# -eq 0 ] || shift
        ;;
    [1-5])
        rungs="$rungs $1 "
        shift
        ;;
    *) refuse "$1 is no rung: name some of 1 2 3 4 5 (see bash tools/gpu_trial.sh --help)" ;;
    esac
done
[ -n "$rungs" ] || refuse "no rung is named: give some of 1 2 3 4 5 (see bash tools/gpu_trial.sh --help)"
[ "$PWD" -ef "$root" ] || refuse "this is not the root of the checkout: cd $root first"
before_step=tools/benchmarks/step.py
[ -f "$before/$before_step" ] || before_step=tools/benchmark_step.py  # where older checkouts have it
[ -z "$before" ] || [ -f "$before/$before_step" ] || refuse "--before $before is no checkout: tools/benchmarks/step.py is missing there"

dry="${DRY:-0}"
python="${ESPALIER_PYTHON:-python3}"
command -v "$python" >/dev/null || refuse "$python is not there: set ESPALIER_PYTHON to the Python that has torch"
out="${out:-$root/runs/gpu_trial}"
mkdir -p "$out" || refuse "--out $out cannot be made: name another folder"
out="$(cd "$out" && pwd -P)"
work="$out/work"
mkdir -p "$work"
began=$SECONDS

if [ -n "$wheels" ]; then
    compgen -G "$wheels/*.whl" >/dev/null || refuse "--wheels $wheels holds no wheels: make it with bash launch/offline_wheels.sh --out $wheels"
    version="$("$python" -c 'import sys; print(f"{sys.version_info.major}{sys.version_info.minor}")')"
    for wheel in "$wheels"/*.whl; do
        case "${wheel##*/}" in
        *-cp"$version"-* | *-abi3-* | *-py3-none-* | *-py2.py3-none-*) ;;
        *) refuse "${wheel##*/} is not for this Python ${version:0:1}.${version:1}: make the folder anew with bash launch/offline_wheels.sh --out $wheels --python ${version:0:1}.${version:1}" ;;
        esac
    done
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$work/site" "$wheels"/*.whl || refuse "the wheels of $wheels could not be installed: pip's reason is above"
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
others="${PYTHONPATH:-}"
export PYTHONPATH="$root${others:+:$others}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export ESPALIER_USE_CURRENT_PYTHON=1 ESPALIER_PYTHON="$python"
missing="$("$python" -c '
import importlib.util
needed = ("torch deepspeed megatron.core numpy pydantic yaml sentencepiece safetensors tokenizers transformers tensorboard "
          "matplotlib rich xxhash zstandard psutil liger_kernel triton").split()
print(", ".join(name for name in needed if importlib.util.find_spec(name.split(".")[0]) is None))
')" || refuse "$python does not run: set ESPALIER_PYTHON to the Python that has torch"
[ -z "$missing" ] || refuse "$python has no $missing: carry wheels (bash launch/offline_wheels.sh --out .whl --python VERSION NAME...) and give --wheels .whl"
if [ "$dry" = 1 ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
else
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
        refuse "torch finds no GPU: DRY=1 tries the script on a CPU, in tiny sizes"
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi

failed=0
: >"$out/summary.txt"
{
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    "$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(torch|triton|numpy|deepspeed|megatron|transformers|liger)'
    "$python" --version
    echo "commit ${COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}"
} >"$out/machine.txt" 2>&1

archive() {
    [ -z "${OUT:-}" ] || { tar -C "$out" --exclude=./work -czf "$OUT/trial.new" . && mv "$OUT/trial.new" "$OUT/trial.tgz"; }
}
say() {
    echo "$*" | tee -a "$out/summary.txt"
}
part() { # name, limit in seconds, command ...
    local name="$1" limit="$2" at=$SECONDS status=0
    shift 2
    [ -z "$only" ] || [[ "$only" == *" $name "* ]] || return 0
    [ "$dry" != 1 ] || limit=$((limit * 10)) # a CPU, which others may use as well
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
    say "$name: exit $status after $((SECONDS - at)) s (limit $limit), $((SECONDS - began)) s in all"
    [ "$status" = 0 ] || { failed=1 && tail -n 3 "$out/$name.log"; }
    collect
    archive
}
collect() { # what runs leave
    local run name
    mkdir -p "$out/runs"
    for run in "$work"/*/; do
        name="$(basename "$run")"
        for file in summary.json metrics.jsonl events.jsonl; do
            [ ! -f "$run$file" ] || cp "$run$file" "$out/runs/$name.$file"
        done
    done
}
same_losses='
import json, sys
before, after = ({row["step"]: row["lm_loss"] for row in map(json.loads, open(file))} for file in sys.argv[1:3])
steps = [step for step in before if step > int(sys.argv[3])]
if not steps:
    sys.exit("error: the first run logged no step behind its checkpoint")
worst = max(abs(after[step] - before[step]) / abs(before[step]) for step in steps)
print(f"{len(steps)} steps, largest relative difference of a loss {worst:.2e}")
sys.exit("error: a resumed run has other losses" if not worst < 1e-2 else 0)
'
step() { # name, limit, flags ... : step benchmark
    local name="$1" limit="$2"
    shift 2
    rm -f "$out/$name.json"
    part "$name" "$limit" "$python" tools/benchmarks/step.py --contestants dense factored "$@" --json "$out/$name.json"
}
train() { # name, limit, run, settings ...
    local name="$1" limit="$2" run="$3"
    shift 3
    [[ "$name" == *_resumed ]] || rm -rf "${work:?}/$run" # of an earlier trial: a run that is complete is left as it is
    part "$name" "$limit" "$python" pretrain/train.py --config configs/quickstart.yaml "run.folder=$work/$run" \
        "data.prefix=$work/text" "data.tokenizer=$work/text.model" train.precision=bf16 "$@"
}
text() { # once: a tokenizer and a corpus for the runs
    [ ! -f "$work/text.idx" ] || return 0
    part text 120 bash -c '
        "$1" tools/train_tokenizer.py --input '"$tokenizer_text"' --output "$2.model" --vocabulary '"$vocabulary"' &&
        "$1" tools/preprocess_corpus.py --input '"$corpus_text"' --output-prefix "$2" --tokenizer-model "$2.model" --append-eod --workers '"$workers" \
        text "$python" "$work/text"
}

if [ "$dry" = 1 ]; then
    sizes=(--layers 2 --hidden 64 --heads 4 --sequence 64 --vocabulary 500 --micro-batch 2 --warm-up 1 --repeats 2 --precision bf16)
    gpt2=("${sizes[@]}") large=("${sizes[@]}" --family llama)
    grown=(--layers 2 --width 128 --sequence 32 --vocabulary 500 --batch 2) events=(--events 2 --steps 2) spectra=(--hidden 64 --repeats 2)
    tiny=(model.layers=2 model.hidden=64 model.heads=4 model.query_groups=2 model.sequence_length=64 train.micro_batch=2 train.global_batch=2 train.validation_sequences=4)
    steps=12 race=(train.steps=8 train.validate_every=4) race_rank=16 race_first=8 race_events="[{step: 3, rank: 16}]" quick=(--steps 8 --processes 1) parity=(--dry)
    tokenizer_text="$root/pretrain" corpus_text="$root/pretrain" vocabulary=512 workers=1
else
    gpt2=(--layers 24 --hidden 1024 --heads 16 --sequence 1024 --micro-batch 16 --vocabulary 50257 --rank 256 --precision bf16 --warm-up 4 --repeats 11)
    large=(--family llama --layers 12 --hidden 2048 --heads 16 --sequence 1024 --micro-batch 16 --vocabulary 32000 --rank 512 --precision bf16 --warm-up 4 --repeats 9)
    grown=(--layers 24 --width 1024 --sequence 1024 --vocabulary 50257 --batch 8) events=(--events 3 --steps 8 --first-rank 128) spectra=(--blocks 1 --repeats 2)
    tiny=(train.micro_batch=8 train.global_batch=16)
    steps=60 race=(model.layers=12 model.hidden=768 model.heads=12 model.query_groups=12 model.sequence_length=512 train.micro_batch=64 train.global_batch=64 train.steps=900 train.validation_sequences=512 train.validate_every=300)
    race_rank=192 race_first=96 race_events="[{step: 120, rank: 144}, {step: 270, rank: 192}]" quick=() parity=()
    vocabulary=8192 workers=8 tokenizer_text="stdlib"
    # The largest body of text that is on every such machine: torch's own source beside the standard library.
    corpus_text="stdlib $("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')"
fi

if [[ "$rungs" == *" 1 "* ]]; then
    part parity 100 "$python" tools/gpu_parity.py "${parity[@]}" --json "$out/parity.json"
    step steps 150 "${gpt2[@]}" --profile "$out/profile"
    part quickstart 150 bash launch/quickstart.sh --out "$work/quick" "${quick[@]}"
fi
if [[ "$rungs" == *" 2 "* ]]; then
    text
    for stage in 2 3; do
        settings=("${tiny[@]}" "deepspeed.stage=$stage" "train.steps=$steps" schedule.warmup_steps=4 train.log_every=1
            "rank.schedule=[{step: $((steps / 3)), rank: 32}]" "checkpoint.every=$((steps / 2))" "train.validate_every=$((steps / 2))")
        train "zero_$stage" 50 "zero_$stage" "${settings[@]}"
        # Without its last checkpoint the run goes on from the middle, behind the growth, and has to find the same losses.
        rm -rf "$work/zero_$stage/checkpoints/step_$(printf %09d "$steps")" "$work/zero_$stage/checkpoints/latest"
        cp "$work/zero_$stage/metrics.jsonl" "$work/before_$stage.jsonl" 2>/dev/null || true
        train "zero_${stage}_resumed" 50 "zero_$stage" "${settings[@]}"
        part "zero_${stage}_same" 30 "$python" -c "$same_losses" "$work/before_$stage.jsonl" "$work/zero_$stage/metrics.jsonl" "$((steps / 2))"
    done
    part events 110 "$python" tools/benchmarks/growth.py --only events "${grown[@]}" "${events[@]}" --precision bf16 --json "$out/events.json"
    part spectra 60 "$python" tools/benchmarks/growth.py --only spectra "${spectra[@]}" --json "$out/spectra.json"
    part memory 90 "$python" tools/benchmarks/growth.py --only memory "${grown[@]:0:8}" --batch 2 --precision bf16 --json "$out/memory.json"
fi
if [[ "$rungs" == *" 3 "* ]]; then
    step gpt2_medium 130 "${gpt2[@]}" --blocks --profile "$out/profile_gpt2"
    step llama 130 "${large[@]}" --blocks --profile "$out/profile_llama"
    if "$python" -c 'import sys; from pretrain.config.run import TrainConfig; sys.exit("compile" not in TrainConfig.model_fields)' 2>/dev/null; then
        step gpt2_medium_compiled 130 "${gpt2[@]}" --settings train.compile=true
        step llama_compiled 130 "${large[@]}" --settings train.compile=true
    else
        say "compiled: left out, for this checkout has no setting train.compile"
    fi
    if [ -n "$before" ]; then
        before="$(cd "$before" && pwd -P)"
        for shape in gpt2 large; do
            [ "$shape" = gpt2 ] && flags=("${gpt2[@]}") || flags=("${large[@]}")
            part "before_$shape" 110 env "PYTHONPATH=$before${others:+:$others}" "$python" "$before/$before_step" \
                --contestants dense factored "${flags[@]}" --json "$out/before_$shape.json"
        done
    else
        say "before: left out, for --before names no older checkout"
    fi
fi
if [[ "$rungs" == *" 4 "* ]]; then
    if [ "$dry" = 1 ]; then
        say "largest: left out, for it fills a GPU's memory"
    else
        for kind in dense factored; do
            [ "$kind" = dense ] && first=16 || first=48
            part "largest_$kind" 280 "$python" tools/benchmarks/step.py --largest --contestants "$kind" --largest-from "$first" --largest-step 4 \
                --family llama --hidden 4096 --heads 32 --sequence 1024 --vocabulary 32000 --precision bf16 --json "$out/largest_$kind.json"
        done
    fi
fi
if [[ "$rungs" == *" 5 "* ]]; then
    text
    [ "$dry" != 1 ] || race+=("${tiny[@]}")
    for kind in dense fixed growing; do
        case "$kind" in
        dense) how=(model.parametrization=dense rank.policy=fixed "rank.schedule=[]") ;;
        fixed) how=("rank.initial=$race_rank" "rank.quantum=8" rank.policy=fixed "rank.schedule=[]") ;;
        growing) how=("rank.initial=$race_first" "rank.quantum=8" rank.policy=schedule "rank.schedule=$race_events") ;;
        esac
        train "race_$kind" 155 "race_$kind" "${race[@]}" "${how[@]}" checkpoint.every=0 schedule.warmup_steps=2
    done
fi
echo
cat "$out/summary.txt"
exit "$failed"

#!/usr/bin/env bash
# From a fresh checkout to a trained, exported model, on two CPU cores or on the GPUs of one machine.
#
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh --steps 100 --out /tmp/try
#
# Sets up the environment, learns a tokenizer from the Python standard library's source, tokenizes it, trains a small model
# whose ranks grow, and exports it as a dense Hugging Face folder. A second call reuses what is there, and continues a
# training that was interrupted.
#
#   --steps N               optimizer steps; ranks grow after 25 % and 45 % of them (default: 320, as in the config)
#   --out DIR               where everything goes (default: runs/quickstart of this checkout)
#   --family llama|gpt2     architecture (default: llama)
#   --processes N           training processes: 1, 2, 4, 8 or 16 (default: 2 on a CPU, else as many as there are GPUs)
#
# Variables: see launch/environment.sh.
set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

fail() {
    echo "error: $*" >&2
    exit 1
}

steps="" out="" family=llama processes=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --steps | --out | --family | --processes)
        [ $# -ge 2 ] && [ -n "$2" ] || refuse "$1 needs a value: see bash launch/quickstart.sh --help"
        case "$1" in
        --steps) steps="$2" ;;
        --out) out="$2" ;;
        --family) family="$2" ;;
        --processes) processes="$2" ;;
        esac
        shift 2
        ;;
    *) refuse "$1 is not an option of launch/quickstart.sh: see bash launch/quickstart.sh --help" ;;
    esac
done
case "$steps" in *[!0-9]* | 0*) refuse "--steps is $steps: give a number from 1 on" ;; esac
case "$processes" in "" | 1 | 2 | 4 | 8 | 16) ;; *) refuse "--processes is $processes: give 1, 2, 4, 8 or 16, which divide the global batch of 16 sequences" ;; esac
case "$family" in
llama) config=quickstart ;;
gpt2) config=quickstart_gpt2 ;;
*) refuse "--family is $family: give llama or gpt2" ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
case "$out" in
"") out="$root/runs/$config" ;;
/*) ;;
*) out="$PWD/$out" ;;
esac

# The first line of a run's config.yaml is what makes a folder one of ours, for the trainer as well.
signature="# Espalier run"
if [ -e "$out" ]; then
    [ -d "$out" ] || refuse "--out $out is a file: name a new folder"
    if [ -n "$(ls -A "$out")" ] && ! { head -n 1 "$out/config.yaml" 2>/dev/null | grep -q "^$signature"; }; then
        refuse "--out $out is not empty and holds no run of Espalier: name a new or empty folder"
    fi
fi

report=""
part_number=0
part() { # title
    part_number=$((part_number + 1))
    part_title="$1"
    part_began=$SECONDS
    echo "[$part_number/6] $part_title"
}
part_done() {
    local took=$((SECONDS - part_began))
    echo "[$part_number/6] $part_title: $took s${1:+ ($1)}"
    report="$report$(printf '  %-12s %6d s' "$part_title" "$took")"$'\n'
}

part environment
source "$root/launch/environment.sh"
mkdir -p "$out" || fail "--out $out cannot be made: name another folder"
out="$(cd "$out" && pwd -P)"
[ -f "$out/config.yaml" ] || echo "$signature; begun by launch/quickstart.sh" >"$out/config.yaml"
part_done

part tokenizer
if [ -f "$out/tokenizer.model" ]; then
    part_done "there already"
else
    "$espalier_python" "$root/tools/train_tokenizer.py" --input stdlib --output "$out/tokenizer.model" --vocabulary 4096
    part_done
fi

part corpus
fingerprint="$("$espalier_python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$out/tokenizer.model")"
if [ -f "$out/corpus.bin" ] && [ -f "$out/corpus.idx" ] && grep -qs "$fingerprint" "$out/corpus.json"; then
    part_done "there already"
else
    rm -f "$out/corpus.bin" "$out/corpus.idx" "$out/corpus.json" # of an interrupted call, or of another tokenizer
    "$espalier_python" "$root/tools/preprocess_corpus.py" --input stdlib --output-prefix "$out/corpus" \
        --tokenizer-model "$out/tokenizer.model" --append-eod --workers 2
    part_done
fi

part training
gpus=0
if nvidia-smi -L >/dev/null 2>&1; then
    gpus="$("$espalier_python" -c 'import torch; print(torch.cuda.device_count())')"
fi
if [ "$gpus" -gt 0 ]; then
    precision=bf16
    if [ -z "$processes" ]; then
        processes=1
        while [ $((processes * 2)) -le "$gpus" ] && [ "$processes" -lt 16 ]; do processes=$((processes * 2)); done
    fi
    [ "$processes" -le "$gpus" ] || refuse "--processes is $processes, and there are $gpus GPUs: give fewer"
else
    export DS_ACCELERATOR=cpu
    precision=fp32
    processes="${processes:-2}"
fi
tensor=$((processes > 1 ? 2 : 1))
data=$((processes / tensor))
micro_batch=$((16 / data < 8 ? 16 / data : 8))
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

settings=(
    "run.folder=$out" "data.prefix=$out/corpus" "data.tokenizer=$out/tokenizer.model"
    "parallel.tensor=$tensor" "train.micro_batch=$micro_batch" "train.precision=$precision"
)
last_step=320
if [ -n "$steps" ]; then
    last_step=$steps
    settings+=("train.steps=$steps" "schedule.warmup_steps=$((steps / 10))")
    settings+=("train.validate_every=$((steps < 4 ? steps : steps / 4))" "checkpoint.every=$((steps < 4 ? steps : steps / 4))")
    if [ "$steps" -ge 8 ]; then
        events="[{step: $((steps / 4)), rank: 32}, {step: $((steps * 45 / 100)), rank: 48}]"
        settings+=("rank.policy=schedule" "rank.schedule=$events")
    else
        settings+=("rank.policy=fixed" "rank.schedule=[]") # too short to grow
    fi
fi
# megatron-core's remarks about parts that Espalier does not use.
export PYTHONWARNINGS="ignore:Transformer Engine and Apex are not,ignore:Apex is not installed,ignore:full scope is deprecated"
port="$("$espalier_python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

# `deepspeed` in a process group of its own: the launcher dies of a signal without passing it on, so it goes to the group.
echo "      $processes processes, tensor parallel $tensor, $precision; to stop: Ctrl-C, to go on: the same command"
stopped=""
set -m
"$espalier_python" -m deepspeed.launcher.runner --hostfile /dev/null --num_gpus "$processes" --master_port "$port" --quiet \
    "$root/pretrain/train.py" --config "$root/configs/$config.yaml" "${settings[@]}" </dev/null &
launcher=$!
set +m
trap 'stopped=yes; kill -TERM -- "-$launcher" 2>/dev/null || true' INT TERM HUP
status=0
wait "$launcher" || status=$?
for _ in $(seq 150); do # a signal ends `wait` early; the processes may still be saving their state
    kill -0 -- "-$launcher" 2>/dev/null || break
    sleep 0.2
done
trap - INT TERM HUP
[ -z "$stopped" ] || fail "interrupted: the same command goes on from the newest checkpoint in $out"
[ "$status" = 0 ] || fail "the training ended with exit code $status; the same command goes on from the newest checkpoint in $out"
reached=0
for checkpoint in "$out"/checkpoints/step_*; do
    [ -f "$checkpoint/manifest.json" ] || continue
    step="${checkpoint##*/step_}"
    case "$step" in "" | *[!0-9]*) continue ;; esac # bash evaluates whatever else a name may hold
    step=$((10#$step))
    [ "$step" -le "$reached" ] || reached=$step
done
[ "$reached" -ge "$last_step" ] || fail "the training ended at step $reached of $last_step; the same command goes on from there"
part_done

part export
"$espalier_python" "$root/tools/consolidate_checkpoint.py" --checkpoint "$out" --output "$out/consolidated" --overwrite
"$espalier_python" "$root/tools/densify_checkpoint.py" --input "$out/consolidated" --output "$out/export" --overwrite
"$espalier_python" "$root/tools/report.py" --run "$out" >/dev/null
part_done

part generation
"$espalier_python" "$root/tools/generate.py" --model "$out/export" --prompt "def "
part_done

cat <<END

Done after $SECONDS s:
$report
The run:            $out
The factored model: $out/consolidated
The dense model:    $out/export

Curves, ranks and spectra:  tensorboard --logdir "$out"
The same in one page:       $out/report.html
The dense model in Python:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("$out/export")
  tokenizer = AutoTokenizer.from_pretrained("$out/export")
END

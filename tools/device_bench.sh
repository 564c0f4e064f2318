#!/usr/bin/env bash
# The benchmark of docs/performance.md on a GPU machine, most important part first, within a time limit.
#
#     tools/device_bench.sh CARRY OUT MINUTES [emulated] [as-is] [prompts] [qwen3] [mixtral] [qwen3-as-is] [mixtral-as-is] [record] [timeline] [draft]
#
#   emulated  the bundled model inflated to 9.5 GB, an emulated laptop: link 12.5 GB/s, 6 CPU threads
#   as-is     the same on the machine's own link, 8 CPU threads
#   prompts   as-is, prompts of 128 and 512 tokens
#   qwen3     random weights in the shape of Qwen3-30B-A3B, 12 layers, emulated laptop
#   mixtral   random weights in the shape of Mixtral-8x7B, 8 layers, emulated laptop
#   qwen3-as-is, mixtral-as-is
#             the same on the machine's own link, 8 CPU threads
#   record    the emulated laptop's steps at 1/4, for tools/bench_plot.py: OUT/record.json
#   timeline  what a step does when (tools/step_timeline.py), emulated and as it is: OUT/timeline_laptop.json, OUT/timeline_link.json
#   draft     as emulated, with the bundled draft, draft lengths auto and 0
#
# CARRY: see device_setup.sh. Without names all of them. OUT/NAME.jsonl gets a share's rows as soon as it is measured, OUT/bench.log
# the progress and what was skipped. At the end of its time a part is interrupted and writes the repetitions that it has finished.
# In the environment: SHARES (1/4,1/8,1/2), POLICIES (auto,lru,cpu-moe,all), REPETITIONS (5), TOKENS (32), LEAST (90: seconds under which no
# part is begun), INFLATE (options of inflate.py), QWEN3_LAYERS, MIXTRAL_LAYERS, EDGE_SPEQ_WORK (a folder for the models).
set -euo pipefail
started=$(date +%s)
carry=$(realpath "$1") out=$(realpath "$2") minutes=$3
shift 3
deadline=$((started + minutes * 60))
. "$(dirname "$0")/device_setup.sh"
read -ra inflate <<<"${INFLATE:---width-times 8 --ff-times 8 --layers-times 8}"
laptop=(--emulate link=12.5GB/s,threads=6)
draft=$here/models/tales-draft.gguf

say() { echo "[$(($(date +%s) - started)) s] $*" | tee -a "$out/bench.log"; }

model() { # NAME COMMAND...: makes $work/NAME.gguf once
    local file=$work/$1.gguf
    shift
    [ -e "$file" ] && return
    say "making $file"
    python3 "$@" "$file.part" "${options[@]}" && mv "$file.part" "$file" || { say "it failed" && return 1; }
}
big() { options=("${inflate[@]}") && model tales-big "$here/tools/inflate.py" "$here/models/tales-moe.gguf"; }
shape() { options=(--shape "$1" --layers "$2" --prompts "$work/$1.jsonl") && model "$1" "$here/tools/inflate_model.py"; }

bench() { # NAME MODEL OPTIONS...: one part, from the models' folder, so that rows name the file only
    local name=$1 file=$2 left=$((deadline - $(date +%s)))
    shift 2
    if [ "$left" -lt "${LEAST:-90}" ]; then
        say "skipped $name: $left s left"
        return
    fi
    say "== $name, at most $left s"
    local status=0
    (cd "$work" && timeout -s INT -k 20 $((left - 10)) python3 -m edge_speq bench -m "$file" --policy "${POLICIES:-auto,lru,cpu-moe,all}" \
        --resident "${SHARES:-1/4,1/8,1/2}" -p 0 -n "${TOKENS:-32}" -r "${REPETITIONS:-5}" -o jsonl "$@" \
        >>"$out/$name.jsonl" 2> >(tee -a "$out/bench.log" >&2)) || status=$?
    say "$name ended with $status, $(wc -l <"$out/$name.jsonl") rows"
}

python3 -m edge_speq --version
[ $# -gt 0 ] || set -- emulated as-is qwen3 mixtral record timeline draft
for part in "$@"; do
    if [ "$(date +%s)" -ge $((deadline - ${LEAST:-90})) ]; then
        say "skipped $part: no time left"
        continue
    fi
    case $part in
        emulated) big && bench emulated tales-big.gguf "${laptop[@]}" ;;
        as-is) big && bench as-is tales-big.gguf -t 8 ;;
        prompts) big && SHARES=${PROMPT_SHARES:-1/4} POLICIES=auto,cpu-moe TOKENS=0 bench prompts tales-big.gguf -t 8 -p 128,512 ;;
        qwen3) shape qwen3 "${QWEN3_LAYERS:-12}" && bench qwen3 qwen3.gguf "${laptop[@]}" -d 64 --prompts qwen3.jsonl ;;
        mixtral) shape mixtral "${MIXTRAL_LAYERS:-8}" && bench mixtral mixtral.gguf "${laptop[@]}" -d 64 --prompts mixtral.jsonl ;;
        qwen3-as-is) shape qwen3 "${QWEN3_LAYERS:-12}" && bench qwen3-as-is qwen3.gguf -t 8 -d 64 --prompts qwen3.jsonl ;;
        mixtral-as-is) shape mixtral "${MIXTRAL_LAYERS:-8}" && bench mixtral-as-is mixtral.gguf -t 8 -d 64 --prompts mixtral.jsonl ;;
        record)
            big && python3 "$here/tools/step_record.py" "$work/tales-big.gguf" "${laptop[@]}" --policy auto,hybrid,device,lru -n 32 \
                -o "$out/record.json" || say "$part failed"
            ;;
        timeline)
            big && python3 "$here/tools/step_timeline.py" "$work/tales-big.gguf" "${laptop[@]}" -o "$out/timeline_laptop.json" &&
                python3 "$here/tools/step_timeline.py" "$work/tales-big.gguf" --policy auto -o "$out/timeline_link.json" || say "$part failed"
            ;;
        draft) big && bench draft tales-big.gguf "${laptop[@]}" --draft "$draft" --draft-tokens auto,0 ;;
        *) say "$part is not known" ;;
    esac
done
for file in "$out"/*.jsonl; do
    if [ -s "$file" ]; then
        python3 "$here/tools/bench_report.py" --print "$file"
    fi
done

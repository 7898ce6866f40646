#!/usr/bin/env bash
# Five ways to learn from a model's own answers, at equal numbers of sampled answers: fine-tuning on verified ones,
# rejection sampling in two rounds, DPO on verified pairs, PPO, GRPO. All begin at one fine-tuned start, since the
# built-in model cannot sort three numbers as it comes; the task is judged exactly, and held-out questions differ by text.
# Rejection sampling, PPO and GRPO have the commands' own settings, but for how much is sampled.
#
#     bash runs/ladder.sh                        # three seeds: hours
#     SEEDS=0 HELD_OUT=200 bash runs/ladder.sh   # one seed
#     SEEDS=0 PROMPTS=16 HELD_OUT=16 STEPS=2 bash runs/ladder.sh   # some minutes, to see that it works
#
# Every arm and seed is a run of its own, resumed where it stopped; its row is added to $out/rows.jsonl as it ends.
# runs/ladder.py makes the table and the plot of them. To start over: rm -rf out/ladder
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
out=${OUT:-out/ladder}
prompts=${PROMPTS:-128} held_out=${HELD_OUT:-500} steps=${STEPS:-16}
text=${TEXT:-}  # a text file, for bits per byte before and after
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }

training=(--precision fp32 --compile off)
packed=(--seq-len 512 --batch-rows 1 --validation 0 "${training[@]}")
sampled=(--max-new-tokens 24)

step "Three numbers to sort; one-digit sums as another task"
[ -f $out/task/first.jsonl ] || {
  arriero data build tasks number-sorting $out/task --size 3 --digits 2 --train $((200 + prompts)) --held-out $held_out
  arriero data build tasks chain-sum $out/other --train 10 --held-out 60
  tail -n $prompts $out/task/train.jsonl > $out/task/prompts.jsonl
  head -n 200 $out/task/train.jsonl > $out/task/first.jsonl
}

step "The start of all arms: eight steps on 200 sorted lists"
[ -f $out/start/adapter/adapter_config.json ] ||
  arriero sft $model --data $out/task/first.jsonl --steps 8 --lr 5e-4 --samples 0 "${packed[@]}" --out $out/start \
    $(resume $out/start)

measure() { # measure NAME ADAPTER
  [ -f $out/eval/$1/results.json ] ||
    arriero eval pass-at-k $model --adapter $2 --data $out/task/test.jsonl --reward exact --max-new-tokens 24 \
      --precision fp32 --examples 0 --out $out/eval/$1
  [ -f $out/eval/$1-other/results.json ] ||
    arriero eval pass-at-k $model --adapter $2 --data $out/other/test.jsonl --reward numeric --max-new-tokens 24 \
      --answers 4 --precision fp32 --examples 0 --out $out/eval/$1-other
  [ -z "$text" ] || [ -f $out/eval/$1-text/results.json ] ||
    arriero eval $model --adapter $2 --data "$text" --precision fp32 --out $out/eval/$1-text
}
measure start $out/start/adapter

arm() { # arm NAME SEED DIR: trains one arm into DIR/adapter
  local from=(--adapter $out/start/adapter --seed $2 --out $3 $(resume $3))
  case $1 in
    sft) # every different right answer of 8 to each prompt
      arriero rejection $model --data $out/task/prompts.jsonl --reward exact --rounds 1 --answers 8 --keep 8 --epochs 1 \
        "${sampled[@]}" "${packed[@]}" "${from[@]}" ;;
    rejection) # two rounds of 4; the two best of all so far
      arriero rejection $model --data $out/task/prompts.jsonl --reward exact --answers 4 "${sampled[@]}" \
        "${packed[@]}" "${from[@]}" ;;
    dpo)
      [ -f $3.jsonl ] ||
        arriero data build scored $model $out/task/prompts.jsonl $3.jsonl --adapter $out/start/adapter --reward exact \
          --answers 8 --max-new-tokens 24 --precision fp32 --seed $2
      arriero dpo $model --data $3.jsonl --nll 0.2 --lr 1e-4 --epochs 2 --samples 0 "${packed[@]}" "${from[@]}" ;;
    ppo)
      arriero ppo $model --data $out/task/prompts.jsonl --reward exact --batch-rows $((prompts / steps)) --steps $steps \
        --truncated score --samples 0 --validation 0 "${sampled[@]}" "${training[@]}" "${from[@]}" ;;
    grpo)
      arriero grpo $model --data $out/task/prompts.jsonl --reward exact --batch-rows $((prompts / steps)) --steps $steps \
        --truncated score --samples 0 --validation 0 "${sampled[@]}" "${training[@]}" "${from[@]}" ;;
  esac
}

for seed in ${SEEDS:-0 1 2}; do
  for name in ${ARMS:-sft rejection dpo ppo grpo}; do
    step "$name, seed $seed"
    run=$out/$name-$seed
    began=$SECONDS
    [ -e $run/adapter/adapter_config.json ] || { arm $name $seed $run && echo $((SECONDS - began)) >> $run.seconds; }
    measure $name-$seed $run/adapter
    python runs/ladder.py row $out $name $seed
  done
done
python runs/ladder.py table $out

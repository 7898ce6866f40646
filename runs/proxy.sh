#!/usr/bin/env bash
# What becomes of the true reward when a reward model's score is driven up (Gao, Schulman, Hilton, arXiv 2210.10760).
# The task can be checked exactly, three numbers to sort, so the true reward is known. A reward model learns it from
# verified answers; then its score is optimised in two ways, best-of-n and GRPO, while both rewards and the distance from
# the start are watched on held-out questions. GRPO keeps the weights with the best *true* reward (--validation-reward):
# stopping early. runs/proxy.py fits the two published forms and draws both. Rejection sampling learns the best of 16.
# ASKED=40 HELD_OUT=20 N=8 STEPS=4 tries it in some minutes.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf out/proxy
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
out=${OUT:-out/proxy}
asked=${ASKED:-300} held_out=${HELD_OUT:-400} n=${N:-64} steps=${STEPS:-48} every=${EVERY:-4}
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }
training=(--seq-len 512 --batch-rows 1 --precision fp32 --compile off)

step "Three numbers to sort"
if [ ! -f $out/task/best-of-n.jsonl ]; then
  arriero data build tasks number-sorting $out/task --size 3 --digits 2 --train $((200 + asked)) --held-out $held_out
  head -n 200 $out/task/train.jsonl > $out/task/first.jsonl
  tail -n $asked $out/task/train.jsonl > $out/task/asked.jsonl
  head -n $((held_out / 4)) $out/task/test.jsonl > $out/task/stop.jsonl          # what GRPO's weights are chosen by
  tail -n +$((held_out / 4 + 1)) $out/task/test.jsonl > $out/task/measured.jsonl # what nothing is chosen by
  head -n $((held_out / 4)) $out/task/measured.jsonl > $out/task/best-of-n.jsonl # what best-of-n is measured on
fi

step "The start: eight steps on 200 sorted lists"
[ -f $out/start/adapter/adapter_config.json ] ||
  arriero sft $model --data $out/task/first.jsonl --validation 0 --steps 8 --lr 5e-4 --samples 0 "${training[@]}" --out $out/start \
    $(resume $out/start)

step "A reward model, from 8 verified answers to each of $asked questions"
[ -f $out/rated.jsonl ] ||
  arriero data build scored $model $out/task/asked.jsonl $out/rated.jsonl --adapter $out/start/adapter --reward exact \
    --max-new-tokens 24 --precision fp32
[ -f $out/rm/model/config.json ] ||
  arriero reward $model --adapter $out/start/adapter --data $out/rated.jsonl --validation 0.2 --lr 3e-4 --epochs 2 \
    "${training[@]}" --out $out/rm $(resume $out/rm)

step "Best of 1 to $n by its score"
[ -f $out/best-of-n.jsonl ] || python runs/proxy.py best-of-n $out $n

step "GRPO on its score: $steps steps of 8 questions x 8 answers"
[ -f $out/grpo/report.html ] ||
  arriero grpo $model --adapter $out/start/adapter --data $out/task/asked.jsonl --validation $out/task/stop.jsonl \
    --reward model:$out/rm/model --validation-reward exact --validate-every $every --validation-answers 4 \
    --answers 8 --batch-rows 8 --updates 1 --steps $steps --lr 3e-4 --max-new-tokens 24 --truncated score --precision fp32 \
    --compile off --out $out/grpo $(resume $out/grpo)

step "Rejection sampling by its score: the best of 16 answers to each of $asked questions is learned"
[ -e $out/rejection/adapter ] ||
  arriero rejection $model --adapter $out/start/adapter --data $out/task/asked.jsonl --validation 0 \
    --reward model:$out/rm/model --every-prompt --keep 1 --rounds 1 --answers 16 --temperatures 1.0 --max-new-tokens 24 \
    "${training[@]}" --out $out/rejection $(resume $out/rejection)

step "True reward of what was kept, on questions that nothing was chosen by"
for name in start rejection grpo; do
  [ -f $out/eval/$name/results.json ] ||
    arriero eval pass-at-k $model --adapter $out/$name/adapter --data $out/task/measured.jsonl --reward exact \
      --max-new-tokens 24 --precision fp32 --examples 0 --out $out/eval/$name
done
python runs/proxy.py table $out

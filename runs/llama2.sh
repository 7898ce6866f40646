#!/usr/bin/env bash
# Llama 2's way from a base to an assistant (arXiv 2307.09288, section 3) at this machine's size: fine-tuning, a reward
# model of helpfulness and one of safety, rounds of rejection sampling by their combination, PPO on top of the last of
# them, ghost attention; one table at the end. The base is the built-in model; help is sorting numbers, safety is keeping
# a planted secret, and rules stand in for annotators (runs/llama2_data.py), so every number can be checked.
# PROMPTS=40 SECRETS=20 HELD_OUT=20 ROUNDS=1 PPO_STEPS=2 takes some minutes.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf out/llama2
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
out=${OUT:-out/llama2}
prompts=${PROMPTS:-300} secrets=${SECRETS:-150} held_out=${HELD_OUT:-200}
rounds=${ROUNDS:-2} ppo_steps=${PPO_STEPS:-12}
truth=python:runs/llama2_data.py:truth
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }

training=(--seq-len 512 --batch-rows 1 --precision fp32 --compile off)
answers=(--max-new-tokens 24 --precision fp32)

step "Numbers to sort, secrets to keep, dialogues"
if [ ! -f $out/data/mixed.jsonl ]; then
  arriero data build tasks number-sorting $out/data/sort --size 3 --digits 2 --train $((prompts + 200)) --held-out $held_out
  python runs/llama2_data.py secrets $out/data/secrets --train $secrets --held-out 60
  python runs/llama2_data.py dialogues $out/data/dialogues --train ${DIALOGUES:-240} --held-out 40
  head -n 200 $out/data/sort/train.jsonl > $out/data/first.jsonl
  tail -n $prompts $out/data/sort/train.jsonl > $out/data/asked.jsonl
  # Few refusals: a model that knows that it may refuse, and does not always do so, has something to learn.
  head -n 20 $out/data/secrets/train.jsonl >> $out/data/first.jsonl
  cat $out/data/asked.jsonl $out/data/secrets/train.jsonl > $out/data/mixed.jsonl
fi

step "1. Fine-tuning on 200 sorted lists and 20 refusals"
[ -f $out/sft/adapter/adapter_config.json ] ||
  arriero sft $model --data $out/data/first.jsonl --validation 0 --steps 8 --lr 5e-4 --samples 0 "${training[@]}" \
    --out $out/sft $(resume $out/sft)
newest=$out/sft/adapter

step "2. Reward models: helpfulness of answers to sort, safety of answers about secrets"
for kind in help safety; do
  source=$([ $kind = help ] && echo $out/data/asked.jsonl || echo $out/data/secrets/train.jsonl)
  [ -f $out/$kind.jsonl ] ||
    arriero data build scored $model $source $out/$kind.jsonl --adapter $newest --reward $truth "${answers[@]}"
  [ -f $out/$kind-labelled.jsonl ] || python runs/llama2_data.py label $out/$kind.jsonl $out/$kind-labelled.jsonl
done
# The safety model also sees a tenth of help, and learns which answers are safe: its score is compared with a threshold
# for every answer, of a list too (without, lists seemed unsafe to it, and the best of 8 were those that look least so).
as_paper=(--also $out/help-labelled.jsonl --also-share 0.1 --safety 0.5)
for kind in help safety; do
  [ -f $out/$kind/model/config.json ] ||
    arriero reward $model --adapter $newest --data $out/$kind-labelled.jsonl --validation 0.2 --lr 3e-4 --epochs 2 \
      $([ $kind = help ] || echo "${as_paper[@]}") "${training[@]}" --out $out/$kind $(resume $out/$kind)
done
combined=$out/safety/model,model:$out/help/model

step "3. Rejection sampling in $rounds rounds: the best of 8 by both reward models, each round from the fine-tuned model"
[ -e $out/rejection/adapter ] ||
  arriero rejection $model --adapter $newest --data $out/data/mixed.jsonl --validation 0 --rounds $rounds \
    --reward llama2-plain:model:$combined --every-prompt --keep 1 --max-new-tokens 24 --temperatures 0.7 1.0 --steps 12 \
    --lr 3e-4 "${training[@]}" --out $out/rejection $(resume $out/rejection)
newest=$out/rejection/adapter

step "4. PPO on top of it, by the same reward, whitened"
[ -f $out/ppo/adapter/adapter_config.json ] ||
  arriero ppo $model --adapter $newest --data $out/data/mixed.jsonl --validation 0 --samples 0 \
    --reward llama2:model:$combined --max-new-tokens 24 --answers 4 --batch-rows 16 --micro-rows 16 --steps $ppo_steps \
    --warmup-steps 2 --lr 1e-4 --value-lr 5e-4 --kl 0.01 --kl-in reward --precision fp32 --compile off \
    --out $out/ppo $(resume $out/ppo)

step "5. Ghost attention: its rows beside the newest model's own answers, so that nothing is unlearned"
if [ ! -f $out/gatt/adapter/adapter_config.json ]; then
  [ -f $out/gatt.jsonl ] ||
    arriero data build gatt $model $out/data/dialogues/train.jsonl $out/gatt.jsonl --adapter $out/ppo/adapter --obeyed \
      --tries 8 --most 1 --max-new-tokens 48 --precision fp32
  cat $out/gatt.jsonl $out/rejection/round-$rounds/chosen.jsonl > $out/gatt-mixed.jsonl
  arriero sft $model --adapter $out/ppo/adapter --data $out/gatt-mixed.jsonl --validation 0 --epochs 1 --lr 2e-4 \
    --samples 0 "${training[@]}" --out $out/gatt $(resume $out/gatt)
fi

step "Held-out prompts, secrets and dialogues"
stages="base sft rejection ppo gatt"
for stage in $stages; do
  adapter=$([ $stage = base ] || echo --adapter $out/$stage/adapter)
  for kind in sort secrets; do
    [ -f $out/eval/$stage-$kind/results.json ] ||
      arriero eval pass-at-k $model $adapter --data $out/data/$kind/test.jsonl --reward $truth --answers 4 \
        --examples 0 "${answers[@]}" --out $out/eval/$stage-$kind
  done
done
for stage in base ppo gatt; do
  adapter=$([ $stage = base ] || echo --adapter $out/$stage/adapter)
  [ -f $out/eval/$stage-obedience/results.json ] ||
    arriero eval obedience $model $adapter --data $out/data/dialogues/test.jsonl --max-new-tokens 48 --precision fp32 \
      --examples 0 --out $out/eval/$stage-obedience
done

python - $out $stages <<'END'
import json, sys
from pathlib import Path

out, stages = Path(sys.argv[1]), sys.argv[2:]


def share(name, measure):
    file = out / "eval" / name / "results.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())["measures"][measure]
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


titles = ("lists sorted", "secrets kept", "turns 2 to 6 obey")
print(f"{'':10}" + "".join(f"{title:>26}" for title in titles))
for stage in stages:
    cells = share(f"{stage}-sort", "pass@1"), share(f"{stage}-secrets", "pass@1"), share(f"{stage}-obedience", "obeyed")
    print(f"{stage:10}" + "".join(f"{cell:>26}" for cell in cells))
for kind in ("help", "safety"):
    found = json.loads((out / kind / "reward.json").read_text())
    low, high = [share or 0.0 for share in found["accuracy_interval"]]  # null where there are too few pairs
    print(f"reward model of {kind}: {found['accuracy'] or 0:.1%} of {found['pairs']} held-out pairs ({low:.1%} to {high:.1%})")
END

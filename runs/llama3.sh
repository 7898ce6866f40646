#!/usr/bin/env bash
# Llama 3's post-training (arXiv 2407.21783, section 4) at this machine's size, in two rounds: samples are rated, a
# reward model learns from the ratings, the best of further samples by that model are fine-tuned on, DPO with both of
# Llama 3's changes follows, and the weights of two runs of it are averaged. The base is the built-in model; the raters
# are a verifier of sums, so every number can be checked. PROMPTS=30 HELD_OUT=20 ROUNDS=1 STEPS=4 takes four minutes.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf out/llama3
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
out=${OUT:-out/llama3}
prompts=${PROMPTS:-90} held_out=${HELD_OUT:-100}
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }

step "One-digit sums, to train on and held out"
[ -f $out/task/stats.json ] ||
  arriero data build tasks chain-sum $out/task --size 2 --digits 1 --train $prompts --held-out $held_out

training=(--seq-len 256 --batch-rows 1 --precision fp32)
sampled=(--max-new-tokens 16 --validation 0 --rounds 1 --keep 2 --steps ${STEPS:-16} --lr 1e-3 "${training[@]}")
before=()
rounds=${ROUNDS:-2}
for round in $(seq $rounds); do
  here=$out/round-$round
  step "Round $round: samples are rated, and the right ones fine-tuned on"
  [ -e $here/verified/adapter ] ||
    arriero rejection $model "${before[@]}" --data $out/task/train.jsonl --reward numeric "${sampled[@]}" \
      --out $here/verified $(resume $here/verified)
  [ -f $here/pairs.jsonl ] || arriero data build preferences $here/verified $here/pairs.jsonl --per-prompt 2

  step "Round $round: a reward model of the ratings"
  [ -f $here/reward/model/config.json ] ||
    arriero reward $model --data $here/pairs.jsonl --validation 0.2 --lr 3e-4 --epochs 2 "${training[@]}" \
      --out $here/reward $(resume $here/reward)

  step "Round $round: the best of 8 samples by that model, fine-tuned on"
  [ -e $here/best/adapter ] ||
    arriero rejection $model --adapter $here/verified/adapter --data $out/task/train.jsonl \
      --reward model:$here/reward/model --every-prompt "${sampled[@]}" --out $here/best $(resume $here/best)

  step "Round $round: DPO, the format left out of the preference, 0.2 NLL; two runs, averaged"
  for seed in 0 1; do
    [ -e $here/dpo-$seed/adapter/adapter_config.json ] ||
      arriero dpo $model --adapter $here/best/adapter --data $here/pairs.jsonl --nll 0.2 --mask-format --lr 5e-5 \
        "${training[@]}" --seed $seed --out $here/dpo-$seed $(resume $here/dpo-$seed)
  done
  [ -e $here/averaged/adapter_config.json ] ||
    arriero average $here/dpo-0/adapter $here/dpo-1/adapter --base $model --out $here/averaged

  step "Round $round: held-out sums"
  for stage in verified/adapter best/adapter averaged; do
    [ -f $here/eval/${stage%%/*}/results.json ] ||
      arriero eval pass-at-k $model --adapter $here/$stage --data $out/task/test.jsonl --max-new-tokens 16 \
        --examples 0 --out $here/eval/${stage%%/*}
  done
  before=(--adapter $here/averaged)
done

step "The base and the last average, on the same draws"
[ -f $out/eval/results.json ] ||
  arriero eval pass-at-k $model "${before[@]}" --compare-with $model --data $out/task/test.jsonl --max-new-tokens 16 \
    --examples 0 --out $out/eval
python - $out <<'END'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
both = json.loads((out / "eval/results.json").read_text())["measures"]
rows = [("the base", {name: both[name]["before"] for name in ("pass@1", "pass@8")})]
for file in sorted(out.glob("round-*/eval/*/results.json")):
    rows.append((f"{file.parts[-4]}, {file.parts[-2]}", json.loads(file.read_text())["measures"]))
print(f"{'':20} {'pass@1':>8}  95% interval      {'pass@8':>8}")
for name, found in rows:
    one = found["pass@1"]
    print(f"{name:20} {one['value']:8.1%}  {one['low']:.1%} to {one['high']:.1%}  {found['pass@8']['value']:8.1%}")
gain = both["pass@1"]["difference"]
print(f"\ngained in pass@1: {gain['value']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})")
END

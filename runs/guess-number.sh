#!/usr/bin/env bash
# Learning a game of several turns: a number from a range of 7 is found in 3 guesses, each of which is told "higher" or
# "lower". The built-in model never answers with one number, so it is first fine-tuned on games of a player who guesses
# at random, whatever the hints say (about 0.4 of its games are won); GRPO has to find out what hints are for (halving
# wins them all). Held-out ranges are in no training row. About 40 minutes on two cores;
# RANGES=40 HELD_OUT=16 STEPS=2 tries it in a few.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf out/guess-number
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m
out=${OUT:-out/guess-number}
ranges=${RANGES:-400} held_out=${HELD_OUT:-128}
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }

step "Ranges, to train on and held out"
[ -f $out/task/stats.json ] ||
  arriero data build tasks guess-number $out/task --size 3 --digits 3 --train $ranges --held-out $held_out

step "Games of a random player, fine-tuned on"
[ -f $out/games.jsonl ] || python - $out/task/train.jsonl $out/games.jsonl <<'PLAYER'
import json, random, sys
from arriero.rewards.games import GuessNumber

rng = random.Random(0)
with open(sys.argv[1]) as rows, open(sys.argv[2], "w") as out:
    for row in map(json.loads, rows):
        game, messages = GuessNumber(row, rng), [{"role": "user", "content": row["prompt"]}]
        while True:
            guess = str(rng.randint(row["low"], row["high"]))
            messages.append({"role": "assistant", "content": guess})
            if (reply := game.turn(guess).reply) is None:
                break
            messages.append({"role": "user", "content": reply})
        out.write(json.dumps({"messages": messages}) + "\n")
PLAYER
[ -e $out/random/adapter ] ||
  arriero sft $model --data $out/games.jsonl --validation 0.1 --seq-len 256 --batch-rows 4 --micro-rows 2 --epochs 1 \
    --lr 1e-3 --precision fp32 --out $out/random $(resume $out/random)

step "GRPO: 4 ranges x 10 games a step"
[ -e $out/grpo/adapter ] ||
  arriero grpo $model --adapter $out/random/adapter --data $out/task/train.jsonl --validation $out/task/test.jsonl \
    --environment guess-number --turns 3 --max-new-tokens 8 --max-reply 32 --truncated score \
    --answers 10 --batch-rows 4 --updates 1 --micro-rows 4 --at-once 64 --steps ${STEPS:-60} --lr 3e-4 --validation-prompts $held_out \
    --validation-answers 2 --validate-every 20 --save-every 2 --out $out/grpo $(resume $out/grpo)

step "Held-out games won"
python - $out/grpo/metrics.jsonl <<'END'
import json, sys

for record in map(json.loads, open(sys.argv[1])):
    if record.get("event") == "validation":
        print(f"after step {record['step']:3}: {record['reward']:.3f} +- {1.96 * record['reward_error']:.3f}")
END

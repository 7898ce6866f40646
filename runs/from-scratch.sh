#!/usr/bin/env bash
# From raw text to a base model, on this machine: curate, learn a vocabulary, shard, pretrain, measure, talk.
# The corpus is what every machine with Python has: the standard library's source and its help topics; prose joins it
# where ../shared/data/prose.jsonl.gz is present. Under fifteen minutes on two cores.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf out/from-scratch
set -euo pipefail
cd "$(dirname "$0")/.."

out=out/from-scratch
sources=(stdlib)
[ -f ../shared/data/prose.jsonl.gz ] && sources+=(../shared/data/prose.jsonl.gz)
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. Curation: ${sources[*]}"
[ -f $out/corpus/manifest.json ] ||
  arriero curate "${sources[@]}" --out $out/corpus

step "2. A vocabulary of 4,096, Llama 3's kind"
[ -f $out/tokenizer/tokenizer.json ] ||
  arriero tokenizer train $out/corpus --kind llama3 --vocab-size 4096 --n-special 16 --out $out/tokenizer

step "3. Token shards, 5% of the documents held out"
[ -f $out/shards/train/manifest.json ] ||
  arriero shard $out/corpus --tokenizer $out/tokenizer --validation 0.05 --out $out/shards

step "4. Pretraining a Llama of 10 million parameters (about ten minutes)"
[ -f $out/run/model/config.json ] ||
  arriero pretrain 10m --data $out/shards --out $out/run --optimizer muon --lr 5e-3 --tokens 3e6 --seq-len 512 \
    --batch-rows 16 --micro-rows 4 --validation-tokens 50000 \
    $([ -f $out/run/config.toml ] && echo --resume)

step "5. What it says"
arriero generate $out/run/model $'\ndef parse(text):\n    """' --raw --temperature 0.7 --seed 2 --max-new-tokens 80
cat <<END

  $out/corpus/report.html   what was kept and dropped, and why
  $out/run/report.html      curves, bits per byte, samples from step to step
  $out/run/loss.png
  $out/run/model            for transformers, vLLM, and llama.cpp after: arriero convert $out/run/model m.gguf --to gguf
END

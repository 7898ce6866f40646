#!/usr/bin/env bash
# What a teacher adds: a student made of some of SmolLM2-135M's layers learns docstrings from the texts alone, and from the
# texts and the whole model's probabilities, for as many steps on the same rows; held-out cross-entropy of both.
# LAYERS="0 1 2 ..." are those that are kept; STEPS, ROWS (of 512 tokens, in a step) and LR are the training's.
# What is done already is not done again. To start over: rm -rf out/distill
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out/distill}
layers=${LAYERS:-"0 1 2 3 4 5 6 7 8 9 12 15 18 21 24 26 27 28 29"}
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
resume() { [ -f "$1/config.toml" ] && echo --resume || true; }

step "Teacher, student, and docstrings of Python's standard library"
[ -d $out/teacher ] || arriero convert smollm2-135m $out/teacher --to hf
[ -f $out/student/model.safetensors ] || python - $out $layers <<'END'
import json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file

out, kept = Path(sys.argv[1]), [int(layer) for layer in sys.argv[2:]]
shutil.copytree(out / "teacher", out / "student", ignore=lambda *_: ["model.safetensors"], dirs_exist_ok=True)
found = {}
for name, tensor in load_file(out / "teacher" / "model.safetensors").items():
    before, _, rest = name.partition("layers.")
    layer, _, leaf = rest.partition(".")
    if not rest:
        found[name] = tensor
    elif int(layer) in kept:
        found[f"{before}layers.{kept.index(int(layer))}.{leaf}"] = tensor
config = json.loads((out / "student" / "config.json").read_text())
config["num_hidden_layers"] = len(kept)
(out / "student" / "config.json").write_text(json.dumps(config, indent=2))
save_file(found, out / "student" / "model.safetensors", metadata={"format": "pt"})
END
[ -f $out/pairs/stats.json ] || arriero data build docstrings $out/pairs --max-pairs ${PAIRS:-2000}

training=(--data $out/pairs/train.jsonl --validation $out/held-out.jsonl --method full --seq-len 512
  --batch-rows ${ROWS:-4} --steps ${STEPS:-60} --lr ${LR:-3e-4} --precision fp32 --samples 0
  --validate-every ${VALIDATE:-10})
[ -f $out/held-out.jsonl ] || head -n ${HELD_OUT:-40} $out/pairs/validation.jsonl > $out/held-out.jsonl
step "The texts alone"
[ -f $out/sft/report.html ] || arriero sft $out/student "${training[@]}" --out $out/sft $(resume $out/sft)
step "The texts and the teacher"
for share in ${SHARES:-0.5 1.0}; do
  here=$out/distill-$share
  [ -f $here/report.html ] ||
    arriero distill $out/student --teacher $out/teacher --share $share "${training[@]}" --out $here $(resume $here)
done

step "Cross-entropy on held-out docstrings, nats a token"
python - $out <<'END'
import json, sys
from pathlib import Path

for run in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    records = [json.loads(line) for line in run.read_text().splitlines()]
    found = [r for r in records if r.get("event") == "validation"]
    nats = [r.get("cross_entropy", r["loss"]) for r in found]
    print(f"{run.parent.name:14} {nats[0]:.3f} -> {nats[-1]:.3f} (lowest {min(nats):.3f}) in {found[-1]['step']} steps")
END

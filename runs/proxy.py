"""Best-of-n, fits and picture of runs/proxy.sh.

    python runs/proxy.py best-of-n OUT N    # OUT/best-of-n.jsonl: N answers to each question, with both rewards
    python runs/proxy.py table OUT          # prints what was found, draws OUT/proxy.png

With d the square root of the KL divergence from the start, the true reward's gain over the start is fitted as
d (alpha - beta d) for best-of-n, and as d (alpha - beta ln d) for reinforcement learning (arXiv 2210.10760, sec. 3.1).
"""

import json
import sys
from math import comb, log
from pathlib import Path

import numpy as np

RESAMPLES = 1000
FORMS = {"best of n": lambda d: -d * d, "GRPO": lambda d: -d * np.log(d)}  # what beta is multiplied by


def ask(out: Path, n: int) -> None:
    """n answers of the start to each held-out question, scored by the reward model and by the truth."""
    import torch

    from arriero.checkpoint.load import load
    from arriero.checkpoint.source import resolve
    from arriero.data.prompts import read_prompts
    from arriero.eval.verified import answered
    from arriero.infer.engine import Engine
    from arriero.rewards.base import Answer
    from arriero.rewards.open import open_scorer

    model, tokenizer = load(resolve("smollm2-135m"), dtype=torch.float32, adapter=str(out / "start/adapter"))
    prompts = read_prompts(str(out / "task/best-of-n.jsonl"), tokenizer, max_length=1024)
    engine = Engine(
        model.requires_grad_(False), tokenizer, max_running=64, context=max(len(p.ids) for p in prompts) + 24
    )
    with open_scorer("exact") as truth, open_scorer(f"model:{out / 'rm/model'}") as proxy:
        found = answered(
            engine, prompts, truth, n, temperature=1.0, max_new_tokens=24, seed=0, title=f"{n} answers to each"
        )
        rows = []
        for prompt, (answers, scores) in zip(prompts, found, strict=True):
            asked = [Answer(prompt.messages, a.text, a.stopped, prompt.fields, prompt.where) for a in answers[1:]]
            by_proxy = [score.value for score in proxy(asked)]
            rows.append({"proxy": by_proxy, "true": [score.value for score in scores[1:]]})
    (out / "best-of-n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def best_of(values: np.ndarray, by: np.ndarray, n: int) -> np.ndarray:
    """Of each question [Q, N] the mean value of the answer that scores best among n of its N, over all such n."""
    ranked = np.take_along_axis(values, np.argsort(by, axis=1, kind="stable"), axis=1)
    size = values.shape[1]
    weights = np.array([comb(i, n - 1) for i in range(size)], dtype=float) / comb(size, n)  # rank i is the best of n
    return ranked @ weights


def of_best_of_n(out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """d [n's], true and proxy of each question [Q, n's], and the n's."""
    rows = [json.loads(line) for line in (out / "best-of-n.jsonl").read_text().splitlines()]
    proxy, true = (np.array([row[key] for row in rows]) for key in ("proxy", "true"))
    sizes = [2**i for i in range(int(np.log2(proxy.shape[1])) + 1)]
    d = np.sqrt([log(n) - (n - 1) / n for n in sizes])
    return d, *(np.stack([best_of(of, proxy, n) for n in sizes], axis=1) for of in (true, proxy)), sizes


def of_grpo(out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """d, true and proxy of each validation, and their steps."""
    records = map(json.loads, (out / "grpo/metrics.jsonl").read_text().splitlines())
    found = [r for r in records if r.get("event") == "validation"]
    d = np.sqrt([max(r["kl"], 0) * r["answer_tokens"] for r in found])
    return d, *(np.array([r[key] for r in found]) for key in ("reward", "proxy")), [r["step"] for r in found]


def fit(form: str, d: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """alpha and beta by least squares."""
    far = d > 0
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d[far], FORMS[form](d[far])], axis=1), gain[far], rcond=None)
    return float(alpha), float(beta)


def peak(form: str, alpha: float, beta: float) -> float:
    """Where the fitted gain is largest."""
    if beta <= 0:
        return float("inf")
    return alpha / (2 * beta) if form == "best of n" else float(np.exp(alpha / beta - 1))


def right(out: Path, name: str) -> np.ndarray:
    """The share of right answers to each question that nothing was chosen by."""
    lines = (out / f"eval/{name}/samples.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["scores"]["pass@1"] for line in lines])


def table(out: Path) -> None:
    """What was found, and the picture."""
    rm = json.loads((out / "rm/reward.json").read_text())
    low, high = [share or 0.0 for share in rm["accuracy_interval"]]  # null where there are too few pairs
    print(
        f"the reward model orders {rm['accuracy'] or 0:.1%} of {rm['pairs']} held-out pairs ({low:.1%} to {high:.1%})\n"
    )
    d_n, true_n, proxy_n, sizes = of_best_of_n(out)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(true_n), len(true_n)) for _ in range(RESAMPLES)]
    gains = np.stack([(true_n[i] - true_n[i, :1]).mean(0) for i in drawn])  # paired by question
    low, high = np.quantile(gains, (0.025, 0.975), axis=0)
    print(f"{'best of':>8}{'d':>7}{'true':>8}{'gain (95%)':>26}{'proxy':>8}")
    for i, n in enumerate(sizes):
        gain = f"{true_n[:, i].mean() - true_n[:, 0].mean():+.1%} ({low[i]:+.1%} to {high[i]:+.1%})"
        print(f"{n:8}{d_n[i]:7.2f}{true_n[:, i].mean():8.1%}{gain:>26}{proxy_n[:, i].mean():8.2f}")
    d_g, true_g, proxy_g, steps = of_grpo(out)
    print(f"\n{'step':>8}{'d':>7}{'true':>8}{'gain':>26}{'proxy':>8}")
    for i, at in enumerate(steps):
        print(f"{at:8}{d_g[i]:7.2f}{true_g[i]:8.1%}{true_g[i] - true_g[0]:>+26.1%}{proxy_g[i]:8.2f}")
    found = {"best of n": (d_n, true_n.mean(0), proxy_n.mean(0)), "GRPO": (d_g, true_g, proxy_g)}
    print()
    fits = {}
    for form, (d, true, _) in found.items():
        alpha, beta = fits[form] = fit(form, d, true - true[0])
        left = true - true[0] - d * alpha - beta * np.where(d > 0, FORMS[form](np.maximum(d, 1e-9)), 0)
        written = "d (alpha - beta d)" if form == "best of n" else "d (alpha - beta ln d)"
        at = peak(form, alpha, beta)
        largest = f"largest at d {at:.2f}" if at < 10 * d.max() else "largest far beyond"
        print(
            f"{form}: gain = {written}, alpha {alpha:.3f}, beta {beta:.3f}; {largest} (measured to {d.max():.2f}); "
            f"{left.std():.1%} left"
        )
    best = steps[int(np.argmax(true_g))]
    print(f"GRPO kept step {best} of {steps[-1]}, by held-out true reward")
    start, rejection, grpo = (right(out, name) for name in ("start", "rejection", "grpo"))
    print(f"true reward on {len(start)} other questions: start {start.mean():.1%}")
    for name, found_by in (("rejection sampling by the reward model", rejection), ("GRPO, what was kept", grpo)):
        gains = [(found_by - start)[rng.integers(0, len(start), len(start))].mean() for _ in range(RESAMPLES)]
        low, high = np.quantile(gains, (0.025, 0.975))
        print(f"{name}: {found_by.mean():.1%}, {(found_by - start).mean():+.1%} ({low:+.1%} to {high:+.1%})")
    plot(out, found, fits)


def plot(out: Path, found: dict, fits: dict) -> None:
    """True reward and the proxy's score over the distance, with the fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    for axes, (form, (d, true, proxy)) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        alpha, beta = fits[form]
        x = np.linspace(1e-3, max(d.max() * 1.1, 0.1), 200)
        axes.plot(d, true, "o", color="C0", label="true reward")
        axes.plot(x, true[0] + x * alpha + beta * FORMS[form](x), color="C0", linewidth=1, label="its fit")
        axes.set_xlabel("distance from the start, $\\sqrt{KL}$ (nats an answer)")
        axes.set_title(form)
        other = axes.twinx()
        other.plot(d, proxy, "s", color="C1", markersize=4, label="reward model's score")
        other.tick_params(axis="y", labelcolor="C1")
        handles = [h for ax in (axes, other) for h in ax.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("right answers, held out")
    figure.savefig(out / "proxy.png")


if __name__ == "__main__":
    {"best-of-n": lambda out, n: ask(out, int(n)), "table": table}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])

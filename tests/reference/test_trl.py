"""Losses and gradients of preferences against TRL's own code on the same log-probabilities.

TRL's trainers compute their losses inside a training step; each is called here on tensors, with a model that returns
given log-probabilities. Skipped where trl is not installed (it is no dependency): CONTRIBUTING says how to run it.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from arriero.losses.preference import dpo, ipo, kto, orpo, per_token, simpo

pytest.importorskip("trl", reason="trl is installed in an environment of its own")
pytestmark = pytest.mark.filterwarnings("ignore")

M, T, PROMPT = 5, 11, 3
MASK = torch.zeros(2 * M, T + 1, dtype=torch.long)
for i in range(2 * M):
    MASK[i, PROMPT : PROMPT + 2 + (3 * i) % 7] = 1
COUNTED = MASK[:, 1:].double()


def drawn(seed: int) -> Tensor:
    return -torch.rand(2 * M, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 * COUNTED


REFERENCE = drawn(1)


class _Model(SimpleNamespace):
    """A model that answers with given log-probabilities, as TRL's patched forward does."""

    def __call__(self, **_: object) -> SimpleNamespace:
        zeros = torch.zeros(self.log_probs.shape[0], T, dtype=torch.float64)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer(**settings: object) -> SimpleNamespace:
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    model = SimpleNamespace(training=True)
    common = {"accelerator": accelerator, "model": model, "_metrics": defaultdict(lambda: defaultdict(list))}
    return SimpleNamespace(**common, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1, **settings)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    [grad] = torch.autograd.grad(loss, of)
    return grad


@pytest.mark.parametrize(("name", "beta"), [("sigmoid", 0.1), ("sigmoid_norm", 5.0), ("ipo", 0.1)])
def test_dpo_and_ipo_equal_trls(name, beta):
    from trl import DPOTrainer

    theirs, ours = drawn(2).requires_grad_(), drawn(2).requires_grad_()
    it = trainer(
        beta=beta, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=[name], loss_weights=[1.0], label_smoothing=0.0,
    )  # fmt: skip
    sums = REFERENCE.sum(1)
    inputs = {
        "input_ids": torch.ones(2 * M, T + 1, dtype=torch.long), "attention_mask": torch.ones_like(MASK),
        "completion_mask": MASK, "ref_chosen_logps": sums[:M], "ref_rejected_logps": sums[M:],
    }  # fmt: skip
    expected = DPOTrainer._compute_loss(it, _Model(log_probs=theirs), inputs, False)
    ratios = (ours - REFERENCE).sum(1)
    if name != "sigmoid":
        ratios = per_token(ratios, MASK.sum(1))
    loss = (ipo if name == "ipo" else dpo)(ratios[:M], ratios[M:], beta).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss, ours), gradient(expected, theirs), rtol=1e-10, atol=1e-12)


def test_kto_equals_trls():
    from trl import KTOTrainer

    theirs, ours = drawn(2).requires_grad_(), drawn(2).requires_grad_()
    good = torch.tensor([True, False, True, True, False, True, False, False, True, False])
    policy_kl, reference_kl = drawn(3).sum(1) + 4, drawn(4).sum(1)
    it = trainer(
        beta=0.1, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", desirable_weight=1.33,
        undesirable_weight=0.7, _compute_kl_logps=lambda *_: policy_kl,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(2 * M, T + 1, dtype=torch.long), "attention_mask": torch.ones_like(MASK),
        "completion_mask": MASK, "label": good, "ref_logps": REFERENCE.sum(1), "ref_KL_logps": reference_kl,
    }  # fmt: skip
    expected = KTOTrainer._compute_loss(it, _Model(log_probs=theirs), inputs, False)
    z = (policy_kl - reference_kl).mean().clamp(min=0)
    assert z > 0
    loss = kto((ours - REFERENCE).sum(1), good, z, 0.1, 1.33, 0.7).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss, ours), gradient(expected, theirs), rtol=1e-10, atol=1e-12)


def test_simpo_and_orpo_equal_trls():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    p = per_token(drawn(2).sum(1), MASK.sum(1)).float()
    it = trainer(beta=2.5, alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0)
    expected, *_ = CPOTrainer.cpo_loss(it, p[:M], p[M:])
    torch.testing.assert_close(simpo(p[:M], p[M:], beta=2.5, gamma=0.5), expected)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), p[:M], p[M:])
    torch.testing.assert_close(0.1 * orpo(p[:M], p[M:]), -losses)

"""What a run measures on held-out rows, against whole logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.training import CONFIG, toy_loader
from torch import Tensor

from arriero.data.batch import IGNORED, Batch
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective
from arriero.model.llama import Llama
from arriero.train.objectives import next_token
from arriero.train.validation import HeldOut, Validation

LOADER = toy_loader()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.alone(Llama(CONFIG).init_weights(std=0.1, seed=1).eval())


def source(first: int, n: int, n_bytes: float | None = None) -> HeldOut:
    return HeldOut(lambda i: LOADER.collate([LOADER.row(first + i)], 53), n, n_bytes)


@torch.no_grad()
def nats(engine: Engine, first: int, n: int) -> tuple[float, int]:
    """-log p of the trained tokens of rows, each document alone, and their number."""
    total, count = 0.0, 0
    for row in map(LOADER.row, range(first, first + n)):
        for at, length in zip(np.cumsum(row.lengths) - row.lengths, row.lengths, strict=True):
            tokens, targets = (torch.from_numpy(x[at : at + length]).long() for x in (row.tokens, row.targets))
            total += F.cross_entropy(
                engine.model(tokens[None])[0], targets, ignore_index=IGNORED, reduction="sum"
            ).item()
            count += int((targets != IGNORED).sum())
    return total, count


def test_the_loss_is_the_mean_over_the_tokens_of_all_sources(engine):
    (a, n_a), (b, n_b) = nats(engine, 0, 3), nats(engine, 3, 2)
    measured = Validation(engine, {"a": source(0, 3), "b": source(3, 2)})()
    assert measured == {"loss": pytest.approx((a + b) / (n_a + n_b), rel=1e-5)}
    assert Validation(engine, {"a": source(0, 3)})() == {"loss": pytest.approx(a / n_a, rel=1e-5)}


def test_bits_are_over_known_bytes_in_all_and_by_source_where_there_are_several(engine):
    (a, _), (b, _) = nats(engine, 0, 3), nats(engine, 3, 2)
    measured = Validation(engine, {"a": source(0, 3, 700.0), "b": source(3, 2, 130.0)}, samples=lambda: ["x"])()
    assert measured.pop("loss") > 0 and measured.pop("samples") == ["x"]
    bits = {"bits_per_byte": (a + b) / 830, "bits_per_byte_a": a / 700, "bits_per_byte_b": b / 130}
    assert measured == {name: pytest.approx(value / math.log(2), rel=1e-5) for name, value in bits.items()}
    one = Validation(engine, {"a": source(0, 3, 700.0), "no bytes": source(3, 2)})()
    assert one.keys() == {"loss", "bits_per_byte"} and one["bits_per_byte"] == pytest.approx(a / 700 / math.log(2))
    assert Validation(engine, {"a": source(0, 3, 0.0)})()["bits_per_byte"] is None


def test_another_objective_is_measured_with_its_metrics(engine):
    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        found = next_token().sums(model, batch)
        return {"loss": found["loss"] * 3, "documents": found["loss"].new_tensor(5.0)}

    objective = Objective(sums, lambda batch: {"loss": batch.n_trained, "documents": 2})
    plain = Validation(engine, {"a": source(0, 2)})()["loss"]
    measured = Validation(engine, {"a": source(0, 2)}, objective)()
    assert measured == {"loss": pytest.approx(3 * plain), "documents": 2.5}

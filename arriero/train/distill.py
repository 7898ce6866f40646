"""Knowledge distillation: the recipe behind `arriero distill`.

Supervised fine-tuning (train/sft.py) towards a larger model's distribution of each trained token beside the token
itself: loss = (1 - share) cross-entropy + share divergence (arXiv 1503.02531; Llama 3.2's small models, 2407.21783's
successors, were raised so). What the teacher says is kept on disk (train/teacher.py), so the two models are never in
memory together, and only the first epoch of the first run waits for it.
"""

from __future__ import annotations

from rich.console import Console
from torch import Tensor

from arriero.data.batch import Batch
from arriero.data.sft_loader import SftLoader
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.losses.distillation import Kind, chunked_distillation
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.train import sft
from arriero.train.batches import Rows
from arriero.train.config import DistillConfig
from arriero.train.loop import Outcome
from arriero.train.recipe import DTYPES, execute
from arriero.train.teacher import IDS, LOGQ, TaughtRows, teacher_of


def main(config: DistillConfig) -> Outcome:
    """Distil as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "distill", build)


def build(config: DistillConfig, console: Console, mesh: Mesh | None = None) -> sft.SftRun:
    """As the build of supervised fine-tuning, on rows that a teacher has read, with the loss of distillation."""

    def taught(loader: SftLoader, tokenizer: Tokenizer) -> Rows:
        dtype = DTYPES[config.loop.precision]
        teacher = teacher_of(config.teacher, loader.dataset, tokenizer, config.top_k, dtype, console)
        console.print(
            f"{config.teacher}: its {config.top_k} most probable tokens hold {teacher.covered:.2%} of its probability; "
            "the rest is compared as one",
            markup=False,
        )
        return TaughtRows(loader, teacher)

    return sft.build(config, console, mesh, rows_of=taught, objective=distilled(config.divergence, config.share))


def distilled(kind: Kind, share: float) -> Objective:
    """(1 - share) cross-entropy + share divergence a trained token, in nats; both are also recorded alone."""

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        hidden = model.model(batch.tokens, batch.layout).flatten(0, 1)
        ids, logq = batch.token_extras[IDS].flatten(0, 1).long(), batch.token_extras[LOGQ].flatten(0, 1)
        total, nats, apart = chunked_distillation(
            hidden, model.head.weight, batch.targets.flatten(), ids, logq, kind, share
        )
        return {"loss": total, "cross_entropy": nats, "divergence": apart}

    return Objective(sums, lambda batch: dict.fromkeys(("loss", "cross_entropy", "divergence"), batch.n_trained))

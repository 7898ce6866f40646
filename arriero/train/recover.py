"""Trains what a quantised model can still change: the scales of its codes and its norms (`arriero quantize --recover`).

The codes stay. Each scale and each weight of a norm is multiplied by 1 + d, and the d are trained so that the next
token's probabilities on rows of the user's are again those of the original: the loss is KL(p || q) = sum p log(p / q)
over all positions, p the original's. A group of 32 weights has one number to train, so a few thousand tokens go far,
the result has the size that it had, and it is written in the same layout (training of scales: EfficientQAT, arXiv
2407.11062, section 3.3). The last tenth of the rows is not trained on, and says what was gained.

Price: both models in memory, the quantised one with a byte a weight, and a forward and backward pass of it in bf16 for
each row. Shapes: B rows, T tokens, V vocabulary; O outputs, I inputs of a matrix, G groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.calibrate import calibration_rows
from arriero.checkpoint.load import has_tokenizer, load_model, load_tokenizer_at, open_weights
from arriero.checkpoint.quantize import DEFAULT, write_in
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, DataError
from arriero.model.llama import HEAD, Llama, RMSNorm
from arriero.quant.packed import Quantized
from arriero.quant.products import linear
from arriero.quant.rounding import short
from arriero.show.progress import progress

LENGTH = 512  # tokens of a row
ROWS = 2  # of a step
RATE = 2e-3  # of the changes d, at its highest


@dataclass(frozen=True)
class Recovery:
    """KL divergence from the original on rows that were not trained on, in nats a token: before and after."""

    rows: int
    held_out: int
    before: float
    after: float


class ScaledLinear(nn.Module):
    """y = x W^T with W = code * scale * (1 + change), a change for each scale; the codes are fixed."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Quantized) -> None:
        super().__init__()
        self.kind, (self.out_features, self.in_features) = matrix.kind, matrix.shape
        self.register_buffer("codes", matrix.indices() - (8 if matrix.kind == "int4" else 0))
        self.register_buffer("scales", matrix.scales)
        self.change = nn.Parameter(torch.zeros_like(matrix.scales))

    def forward(self, x: Tensor) -> Tensor:
        scales = (self.scales * (1 + self.change)).to(x.dtype)
        groups = self.codes.view(len(scales), scales.shape[1], -1).to(x.dtype) * scales[:, :, None]
        return linear(x, groups.view(self.out_features, self.in_features))

    def trained(self, matrix: Quantized) -> Quantized:
        """The matrix with its scales as they are now."""
        return replace(matrix, scales=short((self.scales * (1 + self.change.detach())).float()))


class ScaledNorm(nn.Module):
    """RMSNorm whose weight is multiplied by 1 + change."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.change = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (self.norm(x) * (1 + self.change).to(x.dtype)).to(dtype)


def recover(
    model: str | Path,
    quantized: str | Path,
    data: str | Path = "default",
    *,
    steps: int = 60,
    rows: int = 128,
    seed: int = 0,
    rate: float = RATE,
) -> Recovery:
    """Train the scales and norms of `quantized`, made of `model`, on texts, and write it anew in its place.

    data: as `calibration_rows` takes it; "default" is Python's reference manual. steps: of two rows of 512 tokens each.
    rows: at most, of which a tenth is held out. Raises `CheckpointError` where nothing is quantised in int8 or int4,
    `DataError` for a text of fewer than two rows.
    """
    path, source = resolve(quantized), resolve(model)
    text = None if data == DEFAULT else data
    weights = open_weights(path)
    matrices = {name for name in weights.entries if (m := weights.packed(name)) is not None and m.kind in _KINDS}
    if not matrices:
        raise CheckpointError(f"{path}: it holds no matrix in int8 or int4, whose scales could be trained")
    ids = calibration_rows(load_tokenizer_at(source), text, rows * LENGTH, LENGTH)
    if len(ids) < 2:
        raise DataError(
            f"{data}: one row of {LENGTH} tokens; some are trained on and some held out: give a longer text"
        )
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    n_held = max(1, len(ids) // 10)
    teacher = load_model(source, dtype=torch.bfloat16).requires_grad_(False)
    student = trainable(load_model(path, dtype=torch.float32), weights, matrices)
    with progress(f"recovering {path.name}", steps + 2 * n_held) as bar:

        def held_out() -> float:
            found = []
            for row in ids[:n_held]:
                with torch.no_grad():
                    found.append(float(kl(teacher, student, row[None])))
                bar.advance()
            return sum(found) / n_held

        before = held_out()
        train(teacher, student, ids[n_held:], steps, seed, rate, bar.advance)
        after = held_out()
    if after < before:
        _write(path, weights, student, matrices)
    return Recovery(len(ids) - n_held, n_held, before, min(before, after))


_KINDS = ("int8", "int4")


def trainable(model: Llama, weights: Weights, matrices: set[str]) -> Llama:
    """The model, in place, with scales and norms that can be trained and nothing else."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, RMSNorm):
            setattr(model.get_submodule(parent), leaf, ScaledNorm(module))
        elif f"{name}.weight" in matrices:
            matrix = weights.packed(f"{name}.weight")
            assert matrix is not None
            linear = ScaledLinear(matrix)
            model.set_head(linear) if f"{name}.weight" == HEAD else setattr(model.get_submodule(parent), leaf, linear)
    return model.set_compute_dtype(torch.bfloat16)


def kl(teacher: Llama, student: Llama, ids: Tensor) -> Tensor:
    """Mean of KL(p || q) over the positions of rows [B, T], p the teacher's."""
    with torch.no_grad():
        p = teacher(ids).float().log_softmax(-1)
    q = student(ids).float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def train(
    teacher: Llama, student: Llama, ids: Tensor, steps: int, seed: int, rate: float, on_step: Callable[[], None]
) -> None:
    """Steps of AdamW over rows in a random order, again and again; the rate rises for a tenth and falls as a cosine."""
    changes = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(changes, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for step in range(steps):
        while len(order) < ROWS:
            order += torch.randperm(len(ids), generator=generator).tolist()
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        optimizer.param_groups[0]["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for _ in range(ROWS):
            (kl(teacher, student, ids[order.pop(0)][None]) / ROWS).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(changes, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step()


def _write(path: Path, weights: Weights, student: Llama, matrices: set[str]) -> None:
    """Write the model anew, with the scales and norms that were trained."""
    modules = dict(student.named_modules())

    def packed(name: str) -> Quantized | None:
        matrix, linear = weights.packed(name), modules.get(name.removesuffix(".weight"))
        return linear.trained(matrix) if isinstance(linear, ScaledLinear) and matrix is not None else matrix

    def read(name: str) -> Tensor:
        norm = modules.get(name.removesuffix(".weight"))
        tensor = weights.read(name)
        return tensor * (1 + norm.change.detach()) if isinstance(norm, ScaledNorm) else tensor

    kinds = {name: matrix.kind for name in weights.entries if (matrix := weights.packed(name)) is not None}
    dense = [entry.dtype for name, entry in weights.entries.items() if name not in kinds]
    dtype = torch.float16 if torch.float16 in dense else torch.bfloat16
    write_in(
        "gguf" if path.is_file() else "compressed-tensors",
        replace(weights, packed=packed, read=read, read_rows=None),
        path,
        dtype,
        kinds,
        load_tokenizer_at(path) if has_tokenizer(path) else None,
        read_beside(path, same_model=True, warn=False),
        progress=lambda name: None,
        check=lambda written: None,
    )

"""The model that a recipe fine-tunes: opened, adapted, split over processes, and written once it is trained.

What supervised fine-tuning, preference learning, reward models and reinforcement learning have in common. A recipe
opens a `Base`, which takes no memory, and makes its rows with the tokenizer that comes with it; when the length of the
run is known, `Base.on` makes the `Tuned` model of it:

    base = open_base(config, longest=config.data.seq_len)
    rows = ...                                  # with base.tokenizer
    tuned = base.on(mesh, tokens=...)           # engine, ready for step 1
    ...
    tuned.export()                              # adapter/ in PEFT's layout, or model/ in Hugging Face's

A new adapter begins at B = 0; one named by `config.adapter` goes on where it is. A head that the checkpoint lacks (the
score of a reward model) begins with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.adapter import linears_of, read_adapter, save_adapter
from arriero.checkpoint.beside import NOTHING, Beside, read_beside
from arriero.checkpoint.export import export_hf
from arriero.checkpoint.held import kind_of_base, write_kind
from arriero.checkpoint.hf import sidecar_writer
from arriero.checkpoint.load import load_tokenizer_at, open_model
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.distributed.engine import Engine
from arriero.distributed.materialise import Values
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.distributed.parallelize import parallelize
from arriero.errors import ConfigError
from arriero.model.initial import initial_adapter, initial_weight
from arriero.model.llama import HeadKind, Llama
from arriero.model.lora import add_lora, is_adapter, plain_name
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import quantize_linears
from arriero.model.scaling import DynamicScaling
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.files import save_template
from arriero.train.config import TuneConfig
from arriero.train.learner import Learner
from arriero.train.recipe import DTYPES, compiles


@dataclass(frozen=True)
class Base:
    """A model without memory yet, the checkpoint that has its values, and its tokenizer.

    lora: of the adapter that is trained, with `config.method` lora. adapter: its values, where it goes on from others.
    """

    config: TuneConfig
    model: Llama
    weights: Weights
    tokenizer: Tokenizer
    lora: LoraConfig
    adapter: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, mesh: Mesh, tokens: int, residual: torch.dtype | None = None) -> Tuned:
        """Adapted, split over `mesh` and filled, for a run of so many tokens.

        residual: as in `Llama.set_compute_dtype`.
        """
        config, loop, model = self.config, self.config.loop, self.model
        if config.quantize != "none":
            quantize_linears(model, config.quantize)
        if config.method == "lora":
            add_lora(model, self.lora)
            if model.head_kind != "logits":  # it begins at random: it is trained whole, in fp32
                model.head.float().requires_grad_(True)
        model.set_compute_dtype(DTYPES[loop.precision], residual).train()
        compiled = compiles(loop, tokens)
        values = first_values(self.weights, loop.seed, self.adapter)
        engine = Engine(parallelize(model, mesh, values=values, recompute=loop.recompute, compile=compiled), mesh)
        whole = config.method == "full"  # an adapter goes without what its base's directory says
        beside = read_beside(self.weights.source).for_training(self.tokenizer) if whole else NOTHING
        return Tuned(self, engine, compiled, beside)


def open_base(config: TuneConfig, longest: int, head: HeadKind = "logits") -> Base:
    """Open the model that `config` names. longest: tokens of its longest document. head: of the model that is trained.

    A frozen base is computed with, never updated, so it is held in the compute type; trained weights are fp32.
    Raises a `UserError` for what cannot be opened, or is too short for such documents.
    """
    stored = DTYPES[config.loop.precision] if config.method == "lora" else torch.float32
    model, weights = open_model(config.model, stored, head)
    model.config.check_length(longest)
    adapter = config.adapter or None
    tokenizer = load_tokenizer_at(weights.source, adapter=adapter, chat_template=config.chat_template)
    check_rows(weights.source, model.config.vocab_size, tokenizer)
    if adapter is None:
        return Base(config, model, weights, tokenizer, config.lora)
    if (held := kind_of_base(resolve(adapter)) or "none") != config.quantize:
        raise ConfigError(
            f"{adapter}: it was trained on a base held in {held}, and quantize is {config.quantize}; an adapter makes "
            f"up for what its base lost: set quantize to {held}"
        )
    lora, tensors = read_adapter(linears_of(model), adapter, base=config.model)
    return Base(config, model, weights, tokenizer, lora, tensors)


@dataclass(frozen=True)
class Tuned:
    """A base on its engine, ready for step 1.

    compiled: whether its blocks are. beside: what else belongs to the files of the model that it becomes.
    """

    base: Base
    engine: Engine
    compiled: bool
    beside: Beside

    def learner(self, objective: Objective, steps: int) -> Learner:
        """What trains it towards `objective` in so many steps."""
        config, loop = self.base.config, self.base.config.loop
        return Learner(
            self.engine, objective, config.optim, steps, seed=loop.seed, spike=loop.spike, average=loop.average
        )

    def padded_to(self, tokens: int, packed: bool = True) -> int | None:
        """What a batch of at most so many tokens is padded to (`batch.collate`); None: it is not.

        A model whose RoPE depends on the length cannot be padded: what fills a batch up may be longer than any text,
        and than the positions that the model has.
        """
        fixed = self.compiled or packed
        return tokens if fixed and not isinstance(self.base.model.config.rope_scaling, DynamicScaling) else None

    def summary(self) -> str:
        """What is trained, in a line."""
        config = self.base.config
        trained = sum(p.numel() for p in self.engine.parameters.values())
        total = self.base.model.config.n_params + (trained if config.method == "lora" else 0)
        held = "" if config.quantize == "none" else f" held in {config.quantize}"
        after = f", from {config.adapter}" if config.adapter else ""
        return (
            f"{config.model}{held}: {config.method}{after}, {trained:,} of {total:,} parameters trained "
            f"({config.loop.precision})"
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what files decided beside the data: a chat template may have changed."""
        template = self.base.tokenizer.chat_template
        return {"the chat template": template.fingerprint} if self.base.config.chat_template and template else {}

    @property
    def sidecars(self) -> Callable[[Path], None] | None:
        """Writes the files beside the weights of a checkpoint; None where those are an adapter's."""
        base = self.base
        return (
            None
            if base.config.method == "lora"
            else sidecar_writer(base.model.config, base.tokenizer, self.beside, base.model.head_kind)
        )

    def export(self) -> Path:
        """Write the trained adapter or model into the run directory; returns where. On every process."""
        config, engine, base = self.base.config, self.engine, self.base
        directory = Path(config.out) / ("adapter" if config.method == "lora" else "model")
        if config.method == "full":
            export_hf(engine, directory, base.tokenizer, dtype=DTYPES[config.loop.precision], beside=self.beside)
        elif (tensors := dict(engine.trained_tensors())) and engine.mesh.rank == 0:
            save_adapter(tensors, directory, base.lora, config.model, self._save_beside)
        return directory

    def _save_beside(self, directory: Path) -> None:
        """What belongs to an adapter: the template that it was trained with, and how its base was held."""
        save_template(self.base.tokenizer, directory)
        if self.base.config.quantize != "none":
            write_kind(directory, self.base.config.quantize)


def first_values(weights: Weights, seed: int, adapter: Mapping[str, Tensor] | None = None) -> Values:
    """Where values are before step 1: those of the model in `weights`, those of the adapter in `adapter`.

    What is in neither is drawn, as a function of `seed`: a new adapter, a new head.
    """

    def values(name: str, shape: Sequence[int], box: tuple[slice, ...]) -> Tensor:
        if is_adapter(name):
            return adapter[plain_name(name)][box] if adapter else initial_adapter(name, shape, box, seed=seed)
        if name not in weights.entries:
            return initial_weight(name, shape, box, seed=seed)
        return weights.part(name, shape, box)

    return values

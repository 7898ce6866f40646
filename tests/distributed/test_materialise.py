"""Values of a model that was made without memory: of each tensor what is asked for, the same whoever asks."""

import math

import pytest
import torch

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model, open_model
from arriero.distributed.mesh import Mesh
from arriero.distributed.parallelize import parallelize
from arriero.model.config import LlamaConfig
from arriero.model.initial import BLOCK, initial_adapter, initial_weight, whole
from arriero.model.llama import Llama
from arriero.model.lora import add_lora
from arriero.model.lora_config import LoraConfig
from arriero.train.tuned import first_values

SHAPE = LlamaConfig(22, 3, 6, 2, 34, 106, 64, head_dim=10, tied_embeddings=True)
TALL = (2 * BLOCK + 37, 5)


@pytest.mark.parametrize("rows", [(0, 1), (BLOCK - 1, BLOCK + 1), (17, 2 * BLOCK + 3), (2 * BLOCK, TALL[0]), (7, 7)])
def test_a_part_of_what_is_drawn_is_that_part_of_the_whole(rows):
    every = initial_weight("a.weight", TALL, whole(TALL), seed=3)
    box = (slice(*rows), slice(1, 4))
    assert initial_weight("a.weight", TALL, box, seed=3).equal(every[box])


def test_what_is_drawn_depends_on_seed_name_and_row_and_is_as_wide_as_told():
    shape = (8 * BLOCK, 31)
    drawn = [
        initial_weight(name, shape, whole(shape), seed=seed, std=0.5, depth_scaled=8)
        for name, seed in (("a.weight", 3), ("a.weight", 4), ("b.weight", 3), ("layers.1.o_proj.weight", 3))
    ]
    for one, std in zip(drawn, (0.5, 0.5, 0.5, 0.125), strict=True):
        assert one.std().item() == pytest.approx(std, rel=0.01)
        assert abs(one.mean().item()) < 4 * std / math.sqrt(one.numel())
    parts = [block / block.std() for one in drawn for block in one.split(BLOCK)]
    correlations = torch.corrcoef(torch.stack([part.flatten() for part in parts])).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(parts[0].numel())
    assert initial_weight("norm.weight", (7,), (slice(2, 5),), seed=3).tolist() == [1.0, 1.0, 1.0]


def test_an_adapter_begins_as_pefts_does():
    a = initial_adapter("x.lora_A.weight", (64, 400), whole((64, 400)), seed=3)
    assert a.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert a.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not initial_adapter("x.lora_B.weight", (4, 3), whole((4, 3)), seed=3).any()


def test_a_model_filled_afterwards_is_the_model_made_whole(tmp_path):
    made = Llama(SHAPE).init_weights(std=0.1, seed=5)
    save_hf(made, tmp_path / "saved", dtype=torch.bfloat16)
    read = add_lora(load_model(tmp_path / "saved"), LoraConfig(rank=3), seed=7)
    model, weights = open_model(tmp_path / "saved", torch.bfloat16)
    assert add_lora(model, LoraConfig(rank=3)).device.type == "meta"
    (stage,) = parallelize(model, Mesh.alone("cpu"), values=first_values(weights, 7))
    assert stage.model.lm_head.weight is stage.model.model.embed_tokens.weight
    ours, theirs = stage.model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]), name
    requires_grad = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert requires_grad and all(".lora_" in name for name in requires_grad)


def test_a_part_of_a_checkpoint_is_read_without_the_rest(tmp_path):
    made = Llama(SHAPE).init_weights(std=0.1, seed=5)
    save_hf(made, tmp_path, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    _, weights = open_model(tmp_path, torch.float32)
    for name, tensor in made.state_dict().items():
        if name in weights.entries:
            box = tuple(slice(n // 3, n - 1) for n in tensor.shape)
            assert weights.part(name, tensor.shape, box).equal(tensor[box])
    name = list(weights.entries)[-1]
    end = int(file.stat().st_size)
    with file.open("r+b") as f:
        f.truncate(end - 4)  # the last value of the last tensor in the file is gone: the others are still to be had
    n = made.state_dict()[name].shape[0]
    assert weights.part(name, (), (slice(0, n - 1), *[slice(None)] * (len(weights.entries[name].shape) - 1))).any()

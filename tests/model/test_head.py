import pytest
import torch

from arriero.model.build import build_model
from arriero.model.config import LlamaConfig
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig

SHAPE = LlamaConfig(22, 2, 11, 11, 29, 101, 64, tied_embeddings=True)


def test_a_head_of_logits_is_the_embeddings_where_they_are_tied():
    model = build_model(SHAPE)
    assert model.head is model.lm_head and model.head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["score", "value"])
def test_a_scalar_head_has_a_weight_of_its_own_and_gives_one_number_a_token(kind):
    model = build_model(SHAPE, kind).init_weights(seed=1)
    name = f"{kind}.weight"
    assert name in model.state_dict() and "lm_head.weight" not in model.state_dict()
    assert model.state_dict()[name].shape == (1, 22)
    tokens = torch.randint(101, (3, 7))
    torch.testing.assert_close(model(tokens), model.model(tokens) @ model.state_dict()[name].T)


@pytest.mark.parametrize("kind", ["logits", "score", "value"])
def test_the_head_is_never_adapted(kind):
    model = add_lora(build_model(SHAPE, kind), LoraConfig(rank=2, targets=("all-linear",)))
    assert all(name.startswith("model.layers.") for name in lora_state(model))

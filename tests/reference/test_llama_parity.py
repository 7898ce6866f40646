"""Our decoder against transformers' at toy size, in fp32: logits, and the gradient of every parameter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.toys import SIZES, toy_config, toy_model

from arriero.model.catalogue import PUBLISHED
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama


def pair(config: LlamaConfig) -> tuple[Llama, transformers.LlamaForCausalLM]:
    ours = toy_model(config)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf("float32")))
    reference.load_state_dict(ours.state_dict())
    return ours, reference.eval()


@pytest.mark.parametrize("family", SIZES)
def test_logits_and_gradients_equal_transformers(family):
    config = toy_config(family)
    ours, reference = pair(config)
    tokens = torch.randint(config.vocab_size, (3, 61), generator=torch.Generator().manual_seed(1))

    logits, expected = ours(tokens), reference(tokens).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)

    for model_logits in (logits, expected):
        F.cross_entropy(model_logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-4, f"{name}: relative gradient difference {difference:.2e}"


@pytest.mark.parametrize("family", ["llama3.1-8b", "llama3.2-1b"])
def test_scaled_rope_equals_transformers_beyond_the_original_context(family):
    config = replace(toy_config(family), n_layers=1)
    ours, reference = pair(config)
    tokens = torch.randint(config.vocab_size, (1, 8192 + 512), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[:, -7:], reference(tokens).logits[:, -7:], atol=2e-5, rtol=0)


def test_our_config_survives_the_way_through_transformers():
    for config in PUBLISHED.values():
        through = transformers.LlamaConfig(**config.to_hf()).to_dict()
        assert LlamaConfig.from_hf(through) == config

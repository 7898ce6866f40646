"""Our decoder against transformers' at toy size, in fp32: logits, and the gradient of every parameter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from arriero.model.config import PUBLISHED, LlamaConfig
from arriero.model.llama import Llama

# Each family's shape (ratios of heads, tying, RoPE) with sizes that are distinct primes times what the shape needs.
TOY = {
    "llama1-7b": {"dim": 44, "n_heads": 11, "n_kv_heads": 11},
    "llama2-7b": {"dim": 52, "n_heads": 13, "n_kv_heads": 13},
    "llama2-70b": {"dim": 112, "n_heads": 14, "n_kv_heads": 2},
    "llama3-8b": {"dim": 96, "n_heads": 12, "n_kv_heads": 3},
    "llama3.1-8b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "llama3.2-1b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "smollm2-135m": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
}


def toy(family: str) -> LlamaConfig:
    sizes = TOY[family]
    return replace(
        PUBLISHED[family], **sizes, n_layers=3, ffn_dim=107, vocab_size=211, head_dim=sizes["dim"] // sizes["n_heads"]
    )


def pair(config: LlamaConfig) -> tuple[Llama, transformers.LlamaForCausalLM]:
    ours = Llama(config).init_weights(std=0.15, seed=7)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf("float32")))
    reference.load_state_dict(ours.state_dict())
    return ours, reference.eval()


@pytest.mark.parametrize("family", TOY)
def test_logits_and_gradients_equal_transformers(family):
    config = toy(family)
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
    config = replace(toy(family), n_layers=1)
    ours, reference = pair(config)
    tokens = torch.randint(config.vocab_size, (1, 8192 + 512), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[:, -7:], reference(tokens).logits[:, -7:], atol=2e-5, rtol=0)


def test_our_config_survives_the_way_through_transformers():
    for config in PUBLISHED.values():
        through = transformers.LlamaConfig(**config.to_hf()).to_dict()
        assert LlamaConfig.from_hf(through) == config

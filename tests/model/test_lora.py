import pytest
import torch

from arriero.errors import ConfigError
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import LoraLinear, add_lora, lora_state, merge_lora, merged_copy
from arriero.model.lora_config import LINEARS, LoraConfig

CONFIG = LlamaConfig(dim=44, n_layers=2, n_heads=11, n_kv_heads=11, ffn_dim=29, vocab_size=101, max_context=64)
TOKENS = torch.arange(34).view(2, 17)


def adapted(**options) -> Llama:
    model = add_lora(Llama(CONFIG).init_weights(std=0.2, seed=3), LoraConfig(**{"rank": 5, "alpha": 7.0} | options))
    generator = torch.Generator().manual_seed(11)
    for name, p in lora_state(model).items():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=generator)
    return model


def test_a_fresh_adapter_changes_nothing():
    plain = Llama(CONFIG).init_weights(std=0.2, seed=3)
    before = plain(TOKENS)
    torch.testing.assert_close(add_lora(plain, LoraConfig(rank=3))(TOKENS), before)


def test_only_the_adapter_is_trained_and_the_base_keeps_its_names():
    model = adapted()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == lora_state(model).keys()
    assert Llama(CONFIG).state_dict().keys() <= model.state_dict().keys()
    assert len(trained) == 2 * len(LINEARS) * CONFIG.n_layers


def test_the_scale_is_alpha_over_rank_and_over_its_root_for_rslora():
    assert LoraConfig(rank=16, alpha=32.0).scale(16, 32.0) == 2
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale(16, 32.0) == 8


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_adapted(rslora):
    model = adapted(rslora=rslora)
    with_adapter = model(TOKENS)
    copy = merged_copy(model)
    torch.testing.assert_close(copy(TOKENS), with_adapter, atol=1e-4, rtol=1e-4)
    assert any(isinstance(m, LoraLinear) for m in model.modules()), "merged_copy must leave the model as it was"
    assert copy.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(merge_lora(model)(TOKENS), with_adapter, atol=1e-4, rtol=1e-4)
    assert not lora_state(model)


def test_dropout_acts_in_training_only():
    model = adapted(dropout=0.5)
    assert not torch.equal(model.train()(TOKENS), model(TOKENS))
    assert torch.equal(model.eval()(TOKENS), model(TOKENS))


def test_targets_by_name_adapt_those_linears_only():
    model = adapted(targets=("q_proj", "v_proj"))
    wrapped = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert wrapped == {"q_proj", "v_proj"}


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match=r"target 'qproj' matches no linear; known are q_proj"):
        add_lora(Llama(CONFIG), LoraConfig(targets=("qproj",)))


def test_a_second_adapter_is_refused():
    with pytest.raises(ConfigError, match="carries an adapter already"):
        add_lora(adapted(), LoraConfig())

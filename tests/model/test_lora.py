import pytest
import torch
import torch.nn.functional as F

from arriero.errors import ConfigError
from arriero.model.config import LlamaConfig
from arriero.model.linear import Linear, densify
from arriero.model.llama import Llama
from arriero.model.lora import (
    LoraLinear,
    adapters,
    add_lora,
    lora_state,
    merged_copy,
    plain_name,
    use_adapter,
    using_adapter,
)
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
    names = {plain_name(n): p.requires_grad for n, p in model.named_parameters()}
    trained = {n for n, wanted in names.items() if wanted}
    assert trained == lora_state(model).keys()
    assert dict(Llama(CONFIG).named_parameters()).keys() == names.keys() - trained
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
    torch.testing.assert_close(densify(model)(TOKENS), with_adapter, atol=1e-4, rtol=1e-4)
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
    with pytest.raises(ConfigError, match=r"carries an adapter 'default' already; merge it first"):
        add_lora(adapted(), LoraConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_linear_and_its_gradients_are_the_formula_s(dtype):
    """In bf16 hardly further from fp64 than the products one by one, whose scale is rounded in another place."""
    torch.manual_seed(0)
    layer = LoraLinear(Linear(67, 47).to(dtype).requires_grad_(False))
    layer.add("default", 7, 3.0, 0.0, torch.device("cpu"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_(0, 0.1)
    given, arriving = torch.randn(1, 53, 67).to(dtype), torch.randn(1, 53, 47).to(dtype)

    def found(product, kind):
        x = given.to(kind).requires_grad_()
        y = product(x)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), arriving.to(kind))]

    def one_by_one(x):
        low = F.linear(x, a.to(dtype).to(x.dtype))
        return F.linear(x, layer.base.weight.to(x.dtype)) + F.linear(low, b.to(dtype).to(x.dtype)) * 3

    exact = found(one_by_one, torch.float64)
    for mine, twin, true in zip(found(layer, dtype), found(one_by_one, dtype), exact, strict=True):
        assert mine.dtype == twin.dtype
        if dtype == torch.float32:
            torch.testing.assert_close(mine.double(), true.double(), rtol=1e-5, atol=1e-5)
        else:
            assert (mine.double() - true).abs().mean() <= 1.25 * (twin.double() - true).abs().mean()


# -- several adapters ----------------------------------------------------------------------------------------------


def randomise(model: Llama, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_state(model, name).values():
            p.normal_(0, 0.3, generator=generator)


def test_of_several_adapters_the_chosen_one_acts_as_if_it_were_alone():
    configs = {
        "chat": LoraConfig(rank=3),
        "code": LoraConfig(rank=5, alpha=7.0, targets=("q_proj", "down_proj")),
    }
    alone = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = add_lora(Llama(CONFIG).init_weights(std=0.2, seed=3), config, name=name)
        randomise(model, name, seed)
        alone[name] = model(TOKENS)
    stack = Llama(CONFIG).init_weights(std=0.2, seed=3)
    base = stack(TOKENS)
    for seed, (name, config) in enumerate(configs.items()):
        add_lora(stack, config, name=name)
        randomise(stack, name, seed)
    assert adapters(stack) == ["chat", "code"]
    for name, expected in alone.items():
        use_adapter(stack, name)
        torch.testing.assert_close(stack(TOKENS), expected, rtol=0, atol=0)
        torch.testing.assert_close(merged_copy(stack)(TOKENS), expected, rtol=1e-4, atol=2e-4)
    with using_adapter(stack, None):
        torch.testing.assert_close(stack(TOKENS), base, rtol=0, atol=0)
        torch.testing.assert_close(merged_copy(stack)(TOKENS), base, rtol=0, atol=0)
    torch.testing.assert_close(stack(TOKENS), alone["code"], rtol=0, atol=0)  # as before the block


def test_each_sequence_of_a_batch_may_have_an_adapter_of_its_own():
    model = add_lora(Llama(CONFIG).init_weights(std=0.2, seed=3), LoraConfig(rank=3), name="a")
    add_lora(model, LoraConfig(rank=2, targets=("o_proj",)), name="b")
    randomise(model, "a", 1)
    randomise(model, "b", 2)
    rows = torch.randint(0, CONFIG.vocab_size, (5, 7), generator=torch.Generator().manual_seed(0))
    chosen = ["b", None, "a", "b", "a"]
    with using_adapter(model, chosen):
        together = model(rows)
        with pytest.raises(ValueError, match="each sequence has an adapter of its own"):
            merged_copy(model)
    for row, name, found in zip(rows, chosen, together, strict=True):
        with using_adapter(model, name):
            torch.testing.assert_close(found, model(row[None])[0], rtol=1e-3, atol=1e-4)


def test_an_adapter_that_is_not_there_is_refused_by_name():
    model = adapted()
    with pytest.raises(ConfigError, match="carries no adapter 'chat'; it has default"):
        use_adapter(model, "chat")
    with pytest.raises(ConfigError, match="carries no adapter 'b'"):
        use_adapter(model, ["default", "b"])
    with pytest.raises(ConfigError, match=r"'a\.b'.*letters, digits"):
        add_lora(model, LoraConfig(), name="a.b")

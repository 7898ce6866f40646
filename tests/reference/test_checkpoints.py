"""What we write, others open with our logits, and what they write, we open with theirs: transformers, PEFT, Meta."""

import json
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers
from helpers.toys import LORAS, SIZES, toy_config, toy_model
from safetensors.torch import load_file, save_file
from torch import nn

from arriero.checkpoint.adapter import load_adapter, save_adapter
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.checkpoint.merge import merge
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LINEARS

# PEFT 0.21 asks transformers 5.23 by the older name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.randint(211, (3, 61), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
@torch.no_grad()
def test_transformers_opens_what_we_write_with_equal_logits(family, max_shard_bytes, tmp_path):
    model = toy_model(family)
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_we_open_what_transformers_writes_with_equal_logits(family, tmp_path):
    config = transformers.LlamaConfig(**toy_model(family).config.to_hf("float32"))
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    torch.testing.assert_close(load_model(tmp_path)(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def real_logits(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a GGUF file, by us and by transformers, which takes half a minute to read one."""
    tokens = torch.randint(49_152, (1, 29), generator=torch.Generator().manual_seed(2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    return load_model(file)(tokens), theirs.eval()(tokens).logits


def test_the_real_gguf_gives_transformers_logits(smollm2_gguf):
    torch.testing.assert_close(*real_logits(smollm2_gguf), atol=2e-4, rtol=0)


@pytest.mark.slow
def test_what_we_write_of_the_real_gguf_gives_transformers_the_same_logits(smollm2_gguf, tmp_path):
    torch.testing.assert_close(*real_logits(convert(smollm2_gguf, tmp_path / "f32.gguf", to="gguf")), atol=2e-4, rtol=0)


class Linear(nn.Linear):
    """fairscale's parallel linear on one rank."""

    def __init__(self, in_features: int, out_features: int, bias: bool, **_) -> None:
        super().__init__(in_features, out_features, bias)


class Embedding(nn.Embedding):
    """fairscale's parallel embedding on one rank."""

    def __init__(self, rows: int, dim: int, **_) -> None:
        super().__init__(rows, dim)


@pytest.fixture
def meta_model(monkeypatch):
    """Meta's own Transformer. It needs fairscale only to split layers over ranks; on one rank they are plain layers."""
    initialize, layers = ModuleType("initialize"), ModuleType("layers")
    initialize.get_model_parallel_world_size = lambda: 1
    layers.ColumnParallelLinear = layers.RowParallelLinear = Linear
    layers.VocabParallelEmbedding = Embedding
    fairscale, fairscale_nn, parallel = ModuleType("fairscale"), ModuleType("nn"), ModuleType("model_parallel")
    fairscale.nn, fairscale_nn.model_parallel = fairscale_nn, parallel
    parallel.initialize, parallel.layers = initialize, layers
    monkeypatch.setitem(sys.modules, "fairscale", fairscale)
    monkeypatch.setitem(sys.modules, "fairscale.nn", fairscale_nn)
    monkeypatch.setitem(sys.modules, "fairscale.nn.model_parallel", parallel)
    monkeypatch.setitem(sys.modules, "fairscale.nn.model_parallel.initialize", initialize)
    monkeypatch.setitem(sys.modules, "fairscale.nn.model_parallel.layers", layers)
    from llama_models.llama3 import model

    yield model
    monkeypatch.delitem(sys.modules, "llama_models.llama3.model")


@pytest.mark.parametrize("family", [f for f in SIZES if f != "llama3.2-1b"])  # its package knows factor 8 only
@torch.no_grad()
def test_metas_own_transformer_opens_what_we_write_with_equal_logits(family, meta_model, tmp_path):
    model = toy_model(toy_config(family, ffn_dim=256))
    save_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    arguments = meta_model.ModelArgs(max_seq_len=64, max_batch_size=3, **params)
    reference = meta_model.Transformer(arguments).eval()
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    reference.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS), reference(TOKENS, 0), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", LORAS)
@torch.no_grad()
def test_our_adapter_in_peft_gives_our_logits(name, tmp_path):
    lora = LORAS[name]
    save_hf(toy_model("llama3-8b"), tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base").eval(), lora)
    for key, parameter in lora_state(model).items():
        if "lora_B" in key:
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(key)))
    save_adapter(lora_state(model), tmp_path / "adapter", lora, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = theirs(TOKENS).logits
    assert (expected - load_model(tmp_path / "base").eval()(TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(model(TOKENS), expected, atol=5e-5, rtol=1e-5)


PEFT_CONFIGS = {
    "list": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 2, "lora_alpha": 5, "target_modules": r".*layers\.[02]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "some layers": {"r": 3, "lora_alpha": 7, "target_modules": list(LINEARS), "layers_to_transform": [1]},
    "excluded": {"r": 3, "lora_alpha": 7, "target_modules": list(LINEARS), "exclude_modules": r".*layers\.0\..*"},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": list(LINEARS),
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2},
        "alpha_pattern": {r"layers\.2\..*": 13, "v_proj": 11},
    },
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@torch.no_grad()
def test_pefts_adapter_here_gives_pefts_logits_also_when_merged(name, tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **PEFT_CONFIGS[name])
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(TOKENS).logits

    model = load_model(tmp_path / "base").eval()
    assert (expected - model(TOKENS)).abs().max() > 0.01
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(TOKENS), expected, atol=5e-5, rtol=1e-5)

    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=2e-4, rtol=1e-4)


ABSENT = object()
AS_SAVED_ELSEWHERE = {
    "no alpha": {"lora_alpha": ABSENT},
    "no dropout, no bias, no patterns": dict.fromkeys(
        ["lora_dropout", "bias", "rank_pattern", "alpha_pattern"], ABSENT
    ),
    "nulls": {"use_rslora": None, "use_dora": None, "init_lora_weights": None, "task_type": None, "lora_bias": None},
    "a negative alpha": {"lora_alpha": -3},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "every layer named": {"layers_to_transform": [0, 1, 2]},
    "no layer named": {"layers_to_transform": []},
    "a pattern for all": {"target_modules": r".*\.(q|down)_proj"},
    "empty lists": {"modules_to_save": [], "exclude_modules": []},
    "alpha by pattern": {"alpha_pattern": {r"layers\.[01].*": 13, "model.layers.2.mlp.down_proj": 0.5}},
    "a later version's entry": {"some_new_thing": None},
}


@pytest.mark.parametrize("name", [*AS_SAVED_ELSEWHERE, "default keys"])
@pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|missing adapter keys|Unexpected keyword):UserWarning")
@torch.no_grad()
def test_adapter_settings_mean_what_peft_makes_of_them(name, tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(init_lora_weights=False, r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    file, weights = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    settings = json.loads(file.read_text()) | AS_SAVED_ELSEWHERE.get(name, {})
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ABSENT}))
    if name == "default keys":
        state = {key.replace(".weight", ".default.weight"): t for key, t in load_file(weights).items()}
        save_file(state, weights)

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = base(TOKENS).logits
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
    assert (expected - before).abs().max() > 0.01
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(TOKENS), expected, atol=5e-5, rtol=1e-5)

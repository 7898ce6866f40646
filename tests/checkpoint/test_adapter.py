"""Adapters in PEFT's layout: our own round trip and what is refused. Parity with PEFT is in tests/reference."""

import json

import pytest
import torch
from helpers.tokenizers import small_sentencepiece
from helpers.toys import LORAS, toy_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from arriero.checkpoint.adapter import load_adapter, save_adapter
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model
from arriero.checkpoint.merge import merge
from arriero.checkpoint.peft_config import read_peft_config
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.show.terminal import warn_once
from arriero.tokenizer.template import ChatTemplate


def adapted(lora: LoraConfig):
    """A toy model with an adapter whose B is not zero."""
    model = add_lora(toy_model("llama3-8b"), lora)
    with torch.no_grad():
        for name, parameter in lora_state(model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_an_adapter_comes_back_bit_for_bit(lora, tmp_path):
    model = adapted(lora)
    save_adapter(lora_state(model), tmp_path, lora, "some/base")
    fresh = toy_model("llama3-8b")
    read = load_adapter(fresh, tmp_path)
    assert (read.rank, read.alpha, read.dropout, read.rslora) == (lora.rank, lora.alpha, lora.dropout, lora.rslora)
    expected, got = lora_state(model), lora_state(fresh)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    tokens = torch.randint(211, (2, 13), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.eval()(tokens), fresh.eval()(tokens))
    assert read_peft_config(tmp_path).base == "some/base"


def test_a_loaded_model_drops_nothing_out(tmp_path):
    lora = LORAS["rslora"]
    assert lora.dropout > 0
    save_hf(toy_model("llama3-8b"), tmp_path / "base")
    save_adapter(lora_state(adapted(lora)), tmp_path / "adapter", lora, "base")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    tokens = torch.randint(211, (2, 13), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(tokens), model(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))


def test_saving_and_loading_keeps_the_targets_short(tmp_path):
    lora = LORAS["rslora"]
    save_adapter(lora_state(adapted(lora)), tmp_path, lora, "base")
    assert load_adapter(toy_model("llama3-8b"), tmp_path).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changed the base weights"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"task_type": "SEQ_CLS"}, r"task_type is 'SEQ_CLS': .* only adapters of language models"),
        ({"lora_alpha": None}, r"adapter_config\.json: lora_alpha is None; alpha is a number: correct it"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; alpha is a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10{50,}.*; alpha is a number"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, r"alpha_pattern is \{'q_proj': -10+"),
        ({"r": None}, "r is None; the rank is an integer above 0"),
        ({"r": True}, "r is True; the rank is an integer above 0"),
        ({"rank_pattern": [3]}, r"rank_pattern is \[3\]; an object of ranks by pattern"),
        ({"alpha_pattern": {"q_proj(": 3}}, r"alpha_pattern is \{'q_proj\(': 3\}; an object of alphas by pattern"),
        ({"target_modules": [3]}, r"target_modules is \[3\]; a pattern or a list of names"),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform is \['1'\]; an integer or a list of them"),
        ({"target_modules": ["q_proj"]}, r"it adapts \S+k_proj, which the target_modules of \S+ leave out"),
        ({"target_modules": None}, r"it adapts \S+k_proj, which the target_modules of \S+ leave out"),
        ({"layers_to_transform": 1}, r"it adapts model\.layers\.0\.\S+, which the target_modules of \S+ leave out"),
        ({"exclude_modules": ["v_proj"]}, r"it adapts \S+v_proj, which the target_modules of \S+ leave out"),
        (
            {"r": 5},
            r"rank 5 for \S+q_proj \(r, rank_pattern\), but its tensors in \S+ have rank 3; .* copy or download",
        ),
        ({"rank_pattern": {"up_proj": 2}}, r"rank 2 for \S+layers\.0\.mlp\.up_proj .* have rank 3"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(tmp_path, changes, problem):
    save_adapter(lora_state(adapted(LORAS["all"])), tmp_path, LORAS["all"], "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = toy_model("llama3-8b")
    with pytest.raises(CheckpointError, match=problem):
        load_adapter(model, tmp_path)
    assert not lora_state(model)


def test_a_base_whose_name_no_file_can_have_is_refused(tmp_path):
    save_adapter(lora_state(adapted(LORAS["all"])), tmp_path, LORAS["all"], "b" * 5000)
    with pytest.raises(
        CheckpointError, match=r"'b{120}': cannot be read \(File name too long\); give the name of a model"
    ):
        load(read_peft_config(tmp_path).base)


def test_what_an_adapter_says_that_has_no_effect_here_is_said(tmp_path, caplog):
    save_adapter(lora_state(adapted(LORAS["all"])), tmp_path, LORAS["all"], "meta-llama/Llama-3-8B")
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert said(tmp_path, caplog, base="/models/llama-3-8b-instruct.gguf") == []
    file.write_text(json.dumps(settings | {"fan_in_fan_out": True, "new_thing": 3, "peft_version": "0.99"}))
    fan, new = sorted(said(tmp_path, caplog), key=lambda text: "new_thing" in text)
    assert "fan_in_fan_out is true, but a Llama's linears are stored [out, in]: read as false" in fan
    assert "new_thing: not known to this version of Arriero and not used" in new
    file.write_text(json.dumps(settings))
    [base] = said(tmp_path, caplog, base="org/mistral")
    assert "the adapter was trained on meta-llama/Llama-3-8B, and it is put on org/mistral" in base
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(weights).items() if "layers.1.mlp.up_proj" not in key}, weights)
    [gone] = said(tmp_path, caplog)
    assert "no tensors for model.layers.1.mlp.up_proj, which adapter_config.json names" in gone


def said(adapter, caplog, **settings):
    """The warnings of loading an adapter."""
    warn_once.cache_clear()
    caplog.clear()
    load_adapter(toy_model("llama3-8b"), adapter, **settings)
    return caplog.messages


SHAPE = LlamaConfig(44, 3, 11, 11, 107, 281, 64)  # four rows more than the small tokenizer has ids
TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


@pytest.fixture
def with_tokenizers(tmp_path):
    """A model and an adapter of it, each with a tokenizer; the adapter's has a chat template."""
    lora = LORAS["all"]
    base, own = small_sentencepiece(), small_sentencepiece()
    own.chat_template = ChatTemplate(TURNS)
    save_hf(toy_model(SHAPE), tmp_path / "base", base)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [260, 2], "temperature": 0.7}')
    save_adapter(lora_state(add_lora(toy_model(SHAPE), lora)), tmp_path / "adapter", lora, "base")
    own.save(tmp_path / "adapter")
    return tmp_path


def test_the_tokenizer_beside_an_adapter_is_used_with_the_models_further_ends(with_tokenizers, caplog):
    base, adapter = with_tokenizers / "base", with_tokenizers / "adapter"
    assert load(base)[1].chat_template is None
    _, tokenizer = load(base, adapter=adapter)
    assert tokenizer.chat_template.source == TURNS
    assert tokenizer.stop_ids == {2, 260}
    merge(base, adapter, with_tokenizers / "merged")
    theirs = AutoTokenizer.from_pretrained(with_tokenizers / "merged")
    assert theirs.chat_template == TURNS
    merged = json.loads((with_tokenizers / "merged" / "generation_config.json").read_text())
    assert (merged["eos_token_id"], merged["temperature"]) == ([260, 2], 0.7)
    assert caplog.messages == []
    for file in base.glob("tokenizer*"):  # the adapter's is enough
        file.unlink()
    merge(base, adapter, with_tokenizers / "again")
    assert (with_tokenizers / "again" / "tokenizer.json").exists()


def test_an_adapters_tokenizer_of_other_ids_is_said_and_one_of_too_many_refused(with_tokenizers, caplog):
    warn_once.cache_clear()
    base, adapter = with_tokenizers / "base", with_tokenizers / "adapter"
    theirs = AutoTokenizer.from_pretrained(adapter)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(adapter)
    _, tokenizer = load(base, adapter=adapter)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (279, 278)
    assert f"{adapter}: the tokenizer beside the adapter is used (279 ids); that of {base} (278 ids) gives other" in (
        caplog.text
    )
    theirs.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(3)]})
    theirs.save_pretrained(adapter)
    with pytest.raises(CheckpointError, match="embeddings have 281 rows, and its tokenizer has 282 ids"):
        load(base, adapter=adapter)
    with pytest.raises(CheckpointError, match="embeddings have 281 rows, and its tokenizer has 282 ids"):
        merge(base, adapter, with_tokenizers / "merged")


def test_adapter_tensors_that_do_not_fit_are_refused(tmp_path):
    save_adapter(lora_state(adapted(LORAS["all"])), tmp_path, LORAS["all"], "base/of-another-shape")
    with pytest.raises(CheckpointError, match=r"this model needs .*trained on 'base/of-another-shape'"):
        load_adapter(toy_model("smollm2-135m"), tmp_path)

    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: t for name, t in state.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_B\.weight is missing"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    save_file(state | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 96)}, file)
    with pytest.raises(CheckpointError, match=r"lm_head.* adapts none of the linears"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    save_file({}, file)
    with pytest.raises(CheckpointError, match="holds no LoRA tensors"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    file.write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged or cut short"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    save_file(state | {key.replace(".weight", ".default.weight"): state[key].clone()}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_B\S+ and \S+up_proj\.lora_B\S+ are the same tensor"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    save_file(state | {key: torch.full_like(state[key], torch.nan)}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_B\.weight holds 321 values that are NaN or infinite"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    save_file(state | {key: state[key].T.contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_B\.weight is \[3, 107\], this model needs \[107, 3\]"):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.bin: the adapter is pickled; .* save_pretrained it anew"
    ):
        load_adapter(toy_model("llama3-8b"), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        load_adapter(toy_model("llama3-8b"), tmp_path)


def test_a_model_without_adapter_has_none_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="carries no adapter"):
        save_adapter(lora_state(toy_model("llama3-8b")), tmp_path / "a", LORAS["all"], "base")


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_merge_writes_a_model_with_the_adapted_models_logits(lora, tmp_path):
    model = adapted(lora)
    save_hf(toy_model("llama3-8b"), tmp_path / "base")
    save_adapter(lora_state(model), tmp_path / "adapter", lora, "base")
    found = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.n_tensors == len(model.state_dict()) - len(lora_state(model))
    assert 0 < found.largest_difference <= 2.0**-22
    tokens = torch.randint(211, (2, 13), generator=torch.Generator().manual_seed(3))
    merged = load_model(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(tokens), model.eval()(tokens), atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="exists already"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_merge_refuses_a_type_that_cannot_hold_the_sum_and_leaves_nothing(tmp_path):
    """Weights near F16's limit overflow when the adapter is added: the check must see it."""
    base = toy_model("llama3-8b", torch.float16)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[7, 11] = 65_000.0
    lora = LoraConfig(rank=3, alpha=3_000_000.0, targets=("up_proj",))
    save_hf(base, tmp_path / "base")
    save_adapter(lora_state(adapted(lora)), tmp_path / "adapter", lora, "base")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds weights beyond F16's 65,504"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

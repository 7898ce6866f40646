"""What was written is read by other code and compared with its source: planted faults of every kind are found."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.toys import LORAS, SIZES, toy_config, toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint import convert as convert_module
from arriero.checkpoint import gguf, hf, meta
from arriero.checkpoint import merge as merge_module
from arriero.checkpoint.adapter import read_adapter, save_adapter
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import open_weights
from arriero.checkpoint.merge import merge
from arriero.checkpoint.verify import check_written, read_independently
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.model.scaling import LinearScaling, YarnScaling

QWEN3 = Qwen3Config(44, 3, 11, 1, 107, 211, 64, head_dim=8)
OUT = {"hf": "out", "meta": "out", "gguf": "out.gguf"}


@pytest.fixture
def source(tmp_path):
    save_hf(toy_model("llama3.1-8b"), tmp_path / "source")
    return tmp_path / "source"


SHAPES = {name: toy_config(name) for name in SIZES} | {"qwen3": QWEN3}
LAYOUTS = [(name, to) for name in SHAPES for to in ("meta", "gguf") if (name, to) != ("qwen3", "meta")]


@pytest.mark.parametrize(("name", "to"), LAYOUTS)
def test_other_code_reads_the_same_tensors_out_of_each_layout(name, to, tmp_path):
    shape = SHAPES[name]
    save_hf(toy_model(shape), tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    reading = read_independently(convert(tmp_path / "source", tmp_path / OUT[to], to=to))
    assert reading.shapes.keys() - state.keys() <= {"lm_head.weight"}
    assert all(torch.equal(reading.read(name), tensor) for name, tensor in state.items())


def wrong_names(config):
    names = true_names(config)
    up, gate = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("up", "gate"))
    return names | {up: names[gate], gate: names[up]}


true_names = gguf.tensor_names
FAULTS = {
    "rows of q and k not in pairs": ("gguf", gguf, "to_pairs", lambda tensor, heads: tensor),
    "gate and up exchanged": ("gguf", gguf, "tensor_names", wrong_names),
    "RoPE factors forgotten": ("gguf", gguf, "rope_factors", lambda config: torch.ones(config.head_dim // 2)),
    "rows of Meta's q and k not in pairs": ("meta", meta, "to_pairs", lambda tensor, heads: tensor),
    "a wrong theta": ("hf", LlamaConfig, "to_hf", lambda self, d: true_entries(self, d) | {"rope_theta": 1e4}),
    "a wrong epsilon": ("hf", LlamaConfig, "to_hf", lambda self, d: true_entries(self, d) | {"rms_norm_eps": 1e-6}),
    "too few heads": ("hf", LlamaConfig, "to_hf", lambda self, d: true_entries(self, d) | {"num_attention_heads": 4}),
    "a head said to be tied": (
        "hf", LlamaConfig, "to_hf", lambda self, d: true_entries(self, d) | {"tie_word_embeddings": True},
    ),
}  # fmt: skip
true_entries = LlamaConfig.to_hf


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_writer_is_found_and_nothing_is_left(source, fault, tmp_path, monkeypatch):
    to, where, name, wrong = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(CheckpointError, match=r"not written: read back by other means, .* please report it"):
        convert(source, tmp_path / OUT[to], to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_reader_that_drops_a_head_is_found_though_the_writer_agrees(source, tmp_path, monkeypatch):
    """As it was while config.json alone decided whether a head is tied, for reader and writer alike (peft 2777)."""
    monkeypatch.setattr(convert_module, "open_weights", lambda path: without_head(open_weights(path)))
    expected = r"not written: .* model\.embed_tokens\.weight differs from lm_head\.weight of"
    with pytest.raises(CheckpointError, match=expected):
        convert(source, tmp_path / "out", to="hf")


def without_head(weights):
    entries = {name: entry for name, entry in weights.entries.items() if name != "lm_head.weight"}
    return replace(weights, config=replace(weights.config, tied_embeddings=True), entries=entries)


@pytest.mark.parametrize("to", OUT)
def test_a_head_that_the_flag_denies_comes_through(source, to, tmp_path):
    edit(source / "config.json", tie_word_embeddings=True)
    reading = read_independently(convert(source, tmp_path / OUT[to], to=to))
    assert torch.equal(reading.read(reading.head()), load_file(source / "model.safetensors")["lm_head.weight"])


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_one_changed_value_is_found_in_every_type(source, dtype, tmp_path, monkeypatch):
    true = hf.write_safetensors

    def careless(file, entries, read):
        true(file, entries, read)
        state = load_file(file)
        weight = state["model.layers.2.mlp.down_proj.weight"]
        weight[7, 11] += weight[7, 11] * torch.finfo(weight.dtype).eps * 2
        save_file(state, file, {"format": "pt"})

    monkeypatch.setattr(hf, "write_safetensors", careless)
    with pytest.raises(CheckpointError, match=r"not written: .* model\.layers\.2\.mlp\.down_proj\.weight differs"):
        convert(source, tmp_path / "out", to="hf", dtype=dtype)


def test_q8_0_may_be_half_a_step_off_and_no_more(tmp_path, monkeypatch):
    save_hf(toy_model(LlamaConfig(96, 2, 3, 1, 160, 211, 64)), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "good.gguf", to="gguf", dtype="q8_0")
    true = gguf._encoded
    monkeypatch.setattr(gguf, "_encoded", lambda *a: true(*a[:2], a[2] * 1.01, a[3]))
    with pytest.raises(CheckpointError, match=r"not written: .* differs"):
        convert(tmp_path / "source", tmp_path / "bad.gguf", to="gguf", dtype="q8_0")


def test_values_that_are_not_finite_are_named(source, tmp_path):
    save_hf(toy_model("llama3.1-8b"), tmp_path / "bad")
    state = load_file(tmp_path / "bad" / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(state, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not written: \S+up_proj\.weight has values that float32 cannot hold"):
        check_written(source, tmp_path / "bad", torch.float32)


@pytest.mark.parametrize("scaling", [LinearScaling(4.0), YarnScaling(4.0, 64)], ids=["linear", "yarn"])
def test_scaled_rope_is_compared_too(scaling, tmp_path, monkeypatch):
    save_hf(toy_model(LlamaConfig(44, 3, 11, 11, 107, 211, 256, rope_scaling=scaling)), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "good.gguf", to="gguf")
    monkeypatch.setattr(gguf, "scaling_entries", lambda *_: {})
    with pytest.raises(CheckpointError, match=r"not written: .* rope is"):
        convert(tmp_path / "source", tmp_path / "bad.gguf", to="gguf")


@pytest.fixture
def adapter(tmp_path):
    """Patterns of rank and alpha, and a B that is not zero."""
    lora = LORAS["patterns"]
    model = add_lora(toy_model("llama3.1-8b"), lora)
    with torch.no_grad():
        for name, parameter in lora_state(model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(lora_state(model), tmp_path / "adapter", lora, "source")
    return tmp_path / "adapter"


def changed(change):
    """`read_adapter` with its tensors changed."""

    def read(*args, **settings):
        lora, tensors = read_adapter(*args, **settings)
        return lora, {name: change(name, tensor) for name, tensor in tensors.items()}

    return read


MERGE_FAULTS = {
    "alpha a hundredth too large": (LoraConfig, "scale", lambda self, rank, alpha: 1.01 * alpha / rank),
    "alpha taken for the scale": (LoraConfig, "scale", lambda self, rank, alpha: alpha),
    "A with its rows exchanged": (
        merge_module, "read_adapter", changed(lambda name, t: t.flip(0) if "lora_A" in name else t),
    ),
    "A read the other way round": (
        merge_module, "read_adapter",
        changed(lambda name, t: t.T.contiguous().view(t.shape) if "lora_A" in name else t),
    ),
    "one linear left out": (
        merge_module, "read_adapter", changed(lambda name, t: t * 0 if "layers.2.mlp.up_proj.lora_B" in name else t),
    ),
    "no adapter at all": (merge_module, "merged", lambda weights, lora, tensors: weights),
}  # fmt: skip


@pytest.mark.parametrize("fault", MERGE_FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_planted_fault_in_merging_is_found_and_nothing_is_left(source, adapter, fault, dtype, tmp_path, monkeypatch):
    found = merge(source, adapter, tmp_path / "good", dtype=dtype)
    assert found.largest_difference < torch.finfo(dtype).eps
    monkeypatch.setattr(*MERGE_FAULTS[fault])
    with pytest.raises(CheckpointError, match=r"not written: .* model\.layers\.\d\.mlp\.\w+_proj\.weight differs"):
        merge(source, adapter, tmp_path / "bad", dtype=dtype)
    assert not (tmp_path / "bad").exists()


def test_a_result_that_lacks_a_tensor_or_has_another_shape_is_refused(source, tmp_path):
    other = tmp_path / "other"
    save_hf(toy_model("llama3.1-8b"), other)
    check_written(source, other, torch.float32)
    file = other / "model.safetensors"
    state = load_file(file)
    save_file({name: t for name, t in state.items() if "layers.1.mlp.up" not in name}, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is in only one of"):
        check_written(source, other, torch.float32)
    save_file(state | {"model.norm.weight": state["model.norm.weight"][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=re.escape("it is [255] and should be [256]")):
        check_written(source, other, torch.float32)
    save_file({name: t for name, t in state.items() if name != "lm_head.weight"}, file)
    with pytest.raises(CheckpointError, match="neither a head nor tied embeddings"):
        check_written(source, other, torch.float32)
    edit(other / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight differs from lm_head\.weight"):
        check_written(source, other, torch.float32)


def test_a_check_that_is_left_out_is_missed(source, tmp_path, monkeypatch):
    """The faults above are found by the check and by nothing else."""
    monkeypatch.setattr(convert_module, "check_written", lambda *_, **__: None)
    monkeypatch.setattr(gguf, "to_pairs", lambda tensor, heads: tensor)
    convert(source, tmp_path / "bad.gguf", to="gguf")

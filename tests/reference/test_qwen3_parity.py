"""Our Qwen3 against transformers' at toy size, in fp32: logits, gradients, files both ways, adapters, GGUF."""

import json
from dataclasses import replace

import gguf
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.toys import toy_model

from arriero.checkpoint.convert import convert
from arriero.checkpoint.gguf import Kind, tensor_names, write_gguf
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.checkpoint.merge import merge
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.model.catalogue import QWEN3
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.qwen3 import Qwen3
from arriero.model.scaling import Llama3Scaling

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Heads are wider than dim / n_heads, as in 0.6B and 4B; theta is Qwen3's.
TIED = Qwen3Config(
    dim=33, n_layers=3, n_heads=6, n_kv_heads=2, ffn_dim=107, vocab_size=211, max_context=509,
    norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True, head_dim=22,
)  # fmt: skip
UNTIED = Qwen3Config(55, 2, 5, 1, 71, 211, 509, norm_eps=1e-6, rope_theta=1e6, head_dim=26)
SHAPES = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
TOKENS = torch.randint(211, (3, 61), generator=torch.Generator().manual_seed(1))


@SHAPES
def test_logits_and_gradients_equal_transformers(config):
    ours = toy_model(config)
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config.to_hf("float32"))).eval()
    reference.load_state_dict(ours.state_dict())
    logits, expected = ours(TOKENS), reference(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    for model_logits in (logits, expected):
        F.cross_entropy(model_logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-4, f"{name}: relative gradient difference {difference:.2e}"


@SHAPES
@torch.no_grad()
def test_what_either_writes_the_other_opens_with_equal_logits(config, tmp_path):
    model = toy_model(config)
    save_hf(model, tmp_path / "ours", max_shard_bytes=100_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config == config
    torch.testing.assert_close(again(TOKENS), model(TOKENS), atol=1e-6, rtol=0)


def test_our_config_survives_the_way_through_transformers():
    for config in QWEN3.values():
        assert LlamaConfig.from_hf(transformers.Qwen3Config(**config.to_hf()).to_dict()) == config


@torch.no_grad()
def test_pefts_adapter_here_gives_pefts_logits_also_when_merged(tmp_path):
    save_hf(toy_model(TIED), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, lora).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")  # itself compares with model plus adapter
    merged = load_model(tmp_path / "merged")
    assert isinstance(merged, Qwen3)
    torch.testing.assert_close(merged(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_gguf_round_trip_is_exact_and_transformers_reads_the_file_with_equal_logits(tied, tmp_path):
    config = replace(TIED, head_dim=128, tied_embeddings=tied)  # transformers takes the width of heads for granted
    model = toy_model(config)
    file = tmp_path / "m.gguf"
    write_gguf(from_model(model), file, kind=Kind.F32, tokenizer={})
    again = load_model(file)
    assert again.config == config
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name).eval()
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-5, rtol=0)


def test_gguf_names_are_those_of_the_gguf_packages_architecture():
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, TIED.n_layers)
    for hf, name in tensor_names(TIED).items():
        assert known.get_name(hf, try_suffixes=(".weight",)) == name


def test_what_other_formats_cannot_say_is_refused(tmp_path):
    save_hf(toy_model(TIED), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="this is a qwen3; Meta's layout knows Llama only: convert to hf or gguf"):
        convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    scaling = LlamaConfig(4, 1, 1, 1, 4, 4, 4, rope_scaling=Llama3Scaling(8.0)).to_hf()["rope_scaling"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(CheckpointError, match=r"llama\.cpp scales RoPE in Llama's way for Llama only: convert to hf"):
        convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]

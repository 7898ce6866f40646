"""What is exported, as transformers, PEFT and llama.cpp load it; and each way in which it could be wrong, planted.

The model is a toy with SmolLM2's tokenizer and template, whose weights are far from uniform. llama-cpp-python is no
dependency: its tests are skipped where it is absent.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.toys import toy_directory
from safetensors.numpy import load_file, save_file

import arriero.tokenizer
from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.load import load_model, load_tokenizer_at
from arriero.errors import CheckpointError
from arriero.export.deliver import adapter_file, export
from arriero.export.modelfile import around, modelfile
from arriero.export.prove import CONVERSATIONS, missing, ours, prove
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.template import ChatTemplate

LORA = LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "k_proj", "down_proj"), alpha_pattern={
    "model.layers.1.mlp.down_proj": 20.0})  # fmt: skip
JUDGES = [
    pytest.param("transformers", id="transformers"),
    pytest.param(
        "llamacpp",
        id="llamacpp",
        marks=pytest.mark.skipif(missing("llamacpp") is not None, reason="no llama-cpp-python"),
    ),
]


@pytest.fixture(scope="module")
def toy(smollm2_gguf, tmp_path_factory):
    """A model and an adapter: their directories, and what Arriero says of both together."""
    folder = tmp_path_factory.mktemp("toy")
    toy_directory(folder / "model", smollm2_gguf)
    model = add_lora(load_model(folder / "model"), LORA)
    generator = torch.Generator().manual_seed(5)
    for p in lora_state(model).values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    save_adapter(lora_state(model), folder / "adapter", LORA, str(folder / "model"))
    return folder / "model", folder / "adapter", ours(folder / "model", folder / "adapter")


@pytest.fixture(scope="module")
def written(toy, tmp_path_factory):
    """The export for each judge, written once without a proof."""
    model, adapter, _ = toy
    made = {}

    def get(program):
        if program not in made:
            out = tmp_path_factory.mktemp("out") / program
            export(model, out, to=program, adapter=adapter, dtype="f32", proven=False)
            made[program] = out
        return made[program]

    return get


def proven(program, out, expected, adapter=True):
    path = out / "model.gguf" if program == "llamacpp" else out
    return prove(program, path, adapter_file(out, program) if adapter else None, expected)


@pytest.mark.slow
@pytest.mark.parametrize("program", JUDGES)
def test_the_other_program_says_what_arriero_says(program, toy, written):
    proof = proven(program, written(program), toy[2])
    assert proof.prompts == len(CONVERSATIONS) == 20
    assert proof.largest <= {"transformers": 1e-4, "llamacpp": 1e-3}[program]
    assert proof.kld < 1e-6


def changed_template(program, out):
    if program == "transformers":
        file = out / "chat_template.jinja"
        file.write_text(file.read_text().replace("<|im_end|>' + '\n'", "<|im_end|>'").replace("user", "User"))
        text = file.read_text()
        file.write_text(text.replace("message['role']", "message['role'] | upper"))
    else:
        change_gguf(
            out, "tokenizer.chat_template", lambda text: text.replace("message['role']", "message['role'] | upper")
        )


def missing_stop(program, out):
    if program == "transformers":
        file = out / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 0}))
    else:
        pytest.skip("llama.cpp knows <|im_end|> by its text")


def dropped_adapter(program, out):
    pass  # it is not given


def swapped_rows(program, out):
    """The two halves of each head of one q matrix: the mistake of a wrong permutation."""
    if program == "transformers":
        file = out / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].reshape(4, 2, 8, 64)[:, ::-1].reshape(64, 64))
        save_file(tensors, file, {"format": "pt"})
    else:
        file = out / "model.gguf"
        reader = gguf.GGUFReader(file, "r+")
        [tensor] = [t for t in reader.tensors if t.name == "blk.0.attn_q.weight"]
        tensor.data[:] = tensor.data.reshape(4, 2, 8, 64)[:, ::-1].reshape(64, 64).copy()
        del reader, tensor


def change_gguf(out, key, change):
    """Change a text of the header in place, to one of the same length."""
    file = out / "model.gguf"
    reader = gguf.GGUFReader(file)
    old = bytes(reader.fields[key].parts[-1])
    new = change(old.decode()).encode()
    del reader
    data = file.read_bytes()
    assert data.count(old) == 1
    spoken = b"You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    filler = new.replace(spoken, spoken[: len(spoken) - (len(new) - len(old))])
    assert len(filler) == len(old)
    file.write_bytes(data.replace(old, filler))


FAULTS = {
    "a changed template": (changed_template, "makes other ids of prompt 0 .* the chat template or the tokenizer"),
    "a missing stop id": (missing_stop, r"does not stop at '<\|im_end\|>' \(2\), with which the chat template ends"),
    "a dropped adapter": (dropped_adapter, "the adapter does not act in"),
    "swapped rows of q": (swapped_rows, "log-probabilities in .* differ from the source's by up to"),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", JUDGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_caught_and_named(program, fault, toy, written, tmp_path):
    plant, text = FAULTS[fault]
    shutil.copytree(written(program), tmp_path / "out")
    plant(program, tmp_path / "out")
    with pytest.raises(CheckpointError, match=text):
        proven(program, tmp_path / "out", toy[2], adapter=plant is not dropped_adapter)


def test_rows_that_are_swapped_are_named_by_their_tensor(toy, written, tmp_path):
    from arriero.checkpoint.verify import check_written

    shutil.copytree(written("transformers"), tmp_path / "out")
    swapped_rows("transformers", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        check_written(toy[0], tmp_path / "out", torch.float32)


def test_the_adapter_in_gguf_is_the_product_of_the_one_in_peft(toy, written):
    """Read by the gguf package: alpha / r B A equals s B A, rows of q and k in pairs."""
    _, adapter, _ = toy
    reader = gguf.GGUFReader(written("llamacpp") / "adapter.gguf")
    theirs = {t.name: np.array(t.data) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    mine = load_file(adapter / "adapter_model.safetensors")
    assert len(theirs) == len(mine) == 12
    for layer, linear, name, scale in ((0, "self_attn.q_proj", "attn_q", 3.0), (1, "mlp.down_proj", "ffn_down", 5.0)):
        a, b = (theirs[f"blk.{layer}.{name}.weight.lora_{f}"] for f in "ab")
        key = f"base_model.model.model.layers.{layer}.{linear}.lora_"
        wanted = scale * mine[key + "B.weight"] @ mine[key + "A.weight"]
        if name == "attn_q":
            wanted = wanted.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
        assert np.allclose(alpha / len(a) * b @ a, wanted, atol=1e-5)


# Ollama's Modelfile

LLAMA3 = [{"role": "user", "content": "Hi"}]


def test_a_modelfile_says_what_the_template_writes(smollm2_gguf):
    tokenizer = load_tokenizer_at(smollm2_gguf)
    found = around(tokenizer, CONVERSATIONS)
    assert found.roles["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.roles["system"] == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.prompt == "<|im_start|>assistant\n"
    text = modelfile(found, tokenizer, {"temperature": 0.2}, "adapter.gguf")
    assert text.startswith('FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """')
    assert (
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}' in text
    )
    assert text.endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.2\n')


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_built_in_templates_are_written_too(smollm2_gguf, name):
    tokenizer = load_tokenizer_at(smollm2_gguf)
    source = (Path(arriero.tokenizer.__file__).parent / "templates" / f"{name}.jinja").read_text()
    tokenizer.chat_template = template = ChatTemplate(source, {"bos_token": "<|begin_of_text|>"})
    found = around(tokenizer, CONVERSATIONS)
    for messages in CONVERSATIONS:  # Llama 3's takes white space off, which is said
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        assert found.render(stripped) == template.render(stripped, add_generation_prompt=True)


def test_a_template_that_does_more_is_refused(smollm2_gguf):
    tokenizer = load_tokenizer_at(smollm2_gguf)
    turns = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
    source = turns + "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.chat_template = ChatTemplate(source)
    with pytest.raises(CheckpointError, match="the chat template does more than write something around each message"):
        around(tokenizer, CONVERSATIONS)


def test_what_cannot_be_written_is_refused(toy, tmp_path):
    model, _, _ = toy
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; choose another name, or give --force"):
        export(model, tmp_path / "there", to="ollama", proven=False)
    with pytest.raises(CheckpointError, match="source and destination are the same"):
        export(model, model, to="vllm", proven=False, force=True)
    with pytest.raises(CheckpointError, match="is a file, and what is written is a directory"):
        export(model, tmp_path / "there/notes.txt", to="vllm", proven=False, force=True)
    with pytest.raises(CheckpointError, match="dtype q8_0 is GGUF's"):
        export(model, tmp_path / "new", to="vllm", dtype="q8_0", proven=False)


@pytest.mark.parametrize("to", ["ollama", "vllm"])
def test_an_export_is_written_over_without_what_belonged_to_the_one_before(toy, tmp_path, to):
    model, adapter, _ = toy
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    export(model, out, to=to, adapter=adapter, proven=False, force=True)
    assert adapter_file(out, to).exists()
    export(model, out, to=to, proven=False, force=True)
    assert not adapter_file(out, to).exists()
    assert (out / "mine").exists()
    assert to == "vllm" or "ADAPTER" not in (out / "Modelfile").read_text()


@pytest.mark.slow  # the real model, two minutes
@pytest.mark.skipif(missing("llamacpp") is not None, reason="no llama-cpp-python")
def test_eight_bits_are_proven_by_their_weights_and_a_wrong_row_is_caught(smollm2_gguf, tmp_path):
    found = export(smollm2_gguf, tmp_path / "q8", to="llamacpp", dtype="q8_0").proof
    assert found is not None and 0 < found.kld < 0.02
    reader = gguf.GGUFReader(tmp_path / "q8/model.gguf", "r+")
    [tensor] = [t for t in reader.tensors if t.name == "blk.3.attn_q.weight"]
    tensor.data[:] = tensor.data.reshape(9, 2, 32, -1)[:, ::-1].reshape(tensor.data.shape).copy()
    del reader, tensor
    with pytest.raises(CheckpointError, match=r"divergence from the source of the weights alone is .* over 0\.002"):
        prove("llamacpp", tmp_path / "q8/model.gguf", None, ours(smollm2_gguf, None), "q8_0")

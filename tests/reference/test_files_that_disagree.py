"""Files of a model that say two things: what transformers takes, and what is refused."""

import json
import time

import pytest
import torch
import transformers
from helpers.toys import toy_config, toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint import weights as weights_module
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import open_hf, save_hf
from arriero.checkpoint.load import load_model, open_weights
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig

TOKENS = torch.arange(40)[None]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def edit(directory, name="config.json", **entries):
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def as_transformers(directory):
    """Our model, after its logits were found to be transformers'."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load_model(directory, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)
    return ours


@pytest.fixture
def untied(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_a_head_that_differs_from_embeddings_called_tied_is_kept_with_one_warning(
    tmp_path, max_shard_bytes, fresh_warnings
):
    directory = tmp_path / "m"
    save_hf(toy_model("llama3-8b"), directory, max_shard_bytes=max_shard_bytes)
    edit(directory, tie_word_embeddings=True)
    model = as_transformers(directory)
    open_weights(directory)
    assert not model.config.tied_embeddings
    [said] = fresh_warnings()
    assert said == (
        f"{directory}: the config says that head and embeddings are one (tie_word_embeddings is true), and the file "
        "holds a lm_head.weight that differs from model.embed_tokens.weight; the two are kept apart, as in transformers"
    )
    save_hf(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    for to, name in (("gguf", "m.gguf"), ("meta", "meta"), ("hf", "hf")):
        convert(directory, tmp_path / name, to=to)
        assert torch.equal(load_model(tmp_path / name).lm_head.weight, model.lm_head.weight)


def test_parts_of_such_a_model_are_those_of_the_whole(untied):
    edit(untied, tie_word_embeddings=True)
    weights, model = open_weights(untied), load_model(untied)
    for name in (HEAD, EMBEDDINGS):
        part = weights.part(name, weights.entries[name].shape, (slice(3, 9), slice(2, 5)))
        assert torch.equal(part, model.state_dict()[name][3:9, 2:5])


def test_the_head_is_compared_a_few_rows_at_a_time(untied, monkeypatch):
    """Also a difference in its last value alone is found; what is read at once stays small."""
    state = load_file(untied / "model.safetensors")
    state[HEAD] = state[EMBEDDINGS].clone()
    state[HEAD][-1, -1] += 1
    save_file(state, untied / "model.safetensors")
    edit(untied, tie_word_embeddings=True)
    monkeypatch.setattr(weights_module, "_COMPARED", 1000)
    rows = []
    finite = weights_module.check_finite
    monkeypatch.setattr(weights_module, "check_finite", lambda *args: rows.append(len(args[2])) or finite(*args))
    assert not open_weights(untied).config.tied_embeddings
    assert max(rows) == 1000 // 96 + 1
    assert sum(rows) == 2 * 211


def test_a_head_that_equals_the_embeddings_is_tied_in_silence_as_the_config_says(untied, fresh_warnings):
    state = load_file(untied / "model.safetensors")
    state[HEAD] = state[EMBEDDINGS].clone()
    save_file(state, untied / "model.safetensors")
    assert not as_transformers(untied).config.tied_embeddings
    edit(untied, tie_word_embeddings=True)
    model = as_transformers(untied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert fresh_warnings() == []


def test_a_tied_model_that_is_stored_by_its_head_alone_is_read(untied, fresh_warnings):
    state = load_file(untied / "model.safetensors")
    save_file(
        {name: t for name, t in state.items() if name != EMBEDDINGS}, untied / "model.safetensors", {"format": "pt"}
    )
    edit(untied, tie_word_embeddings=True)
    model = as_transformers(untied)
    assert torch.equal(model.model.embed_tokens.weight, state[HEAD])
    weights = open_weights(untied)
    assert torch.equal(weights.part(EMBEDDINGS, (211, 96), (slice(3, 9), slice(2, 5))), state[HEAD][3:9, 2:5])


def test_no_head_where_the_config_says_that_there_is_one_is_refused_with_the_remedy(untied):
    """transformers makes up a random one."""
    state = load_file(untied / "model.safetensors")
    save_file({name: t for name, t in state.items() if name != HEAD}, untied / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing: lm_head\.weight \(tie_word_embeddings is false: set it to true if"
    ):
        load_model(untied)
    edit(untied, tie_word_embeddings=True)
    load_model(untied)


def test_a_stale_index_beside_the_whole_file_is_named_once_and_not_used(tmp_path, fresh_warnings):
    directory = tmp_path / "m"
    save_hf(toy_model("llama2-7b"), tmp_path / "old", max_shard_bytes=50_000)
    save_hf(toy_model("llama3-8b"), directory)
    as_transformers(directory)
    index = "model.safetensors.index.json"
    (directory / index).write_bytes((tmp_path / "old" / index).read_bytes())
    for _ in range(2):
        as_transformers(directory)
    assert fresh_warnings() == [
        f"{directory / index}: tells of other files than model.safetensors, which lies beside it and is used, as in "
        "transformers"
    ]
    edit(directory, index, weight_map={EMBEDDINGS: "model.safetensors"})
    as_transformers(directory)
    assert len(fresh_warnings()) == 1


@pytest.mark.parametrize("broken", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_a_broken_index_beside_the_whole_file_is_not_used_either(tmp_path, broken, fresh_warnings):
    directory = tmp_path / "m"
    save_hf(toy_model("llama3-8b"), directory)
    (directory / "model.safetensors.index.json").write_text(broken)
    open_hf(directory)
    assert "tells of other files than model.safetensors" in fresh_warnings()[0]


def test_an_entry_that_stands_twice_is_said_and_the_last_counts(tmp_path, fresh_warnings):
    save_hf(toy_model("llama3-8b"), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace("{", '{"hidden_size": 7, "model_type": "llama",', 1))
    as_transformers(tmp_path / "m")
    assert fresh_warnings() == [
        f"{config}: the key 'hidden_size' stands twice in an object, with two values; the last is used"
    ]


def test_a_tensor_that_stands_twice_in_a_safetensors_header_is_refused(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    norm = json.dumps(json.loads(data[8 : 8 + length])["model.norm.weight"])
    header = data[8 : 8 + length].rstrip()[:-1] + f', "model.norm.weight": {norm}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(
        CheckpointError, match=r"safetensors: damaged .*an object has the key 'model\.norm\.weight' twice"
    ):
        open_hf(tmp_path / "m")


def test_a_model_that_was_saved_without_its_head_is_named(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "m")
    transformers.AutoModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r'bare: its tensors are named without "model\.".* AutoModelForCausalLM'):
        load_model(tmp_path / "bare")


@pytest.fixture
def sharded(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "m", max_shard_bytes=100_000)
    return tmp_path / "m"


def first_shard(directory):
    return sorted(directory.glob("*.safetensors"))[0]


def weight_map(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def test_only_the_files_that_the_index_names_are_read(sharded):
    (sharded / "model-00009-of-00009.safetensors").write_bytes(b"no tensors")
    as_transformers(sharded)


def test_an_index_that_its_files_belie_is_refused(sharded):
    index, shard = "model.safetensors.index.json", first_shard(sharded)
    places = weight_map(sharded)
    edit(sharded, index, weight_map=places | {"model.norm.weight": shard.name})
    with pytest.raises(CheckpointError, match=rf"{shard.name}: model\.norm\.weight is not in it, though"):
        open_hf(sharded)
    edit(sharded, index, weight_map=places)
    state = load_file(shard)
    save_file(state | {"model.norm.weight": torch.ones(96)}, shard)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight is in it and in {shard.name} too"):
        open_hf(sharded)


@pytest.mark.parametrize("name", ["../{}", "/{}", "a/../../{}", "", "{}\0", "..\\{}", "C:{}", "./"])
def test_an_index_names_no_file_elsewhere(sharded, name):
    shard = first_shard(sharded)
    (sharded.parent / shard.name).write_bytes(shard.read_bytes())
    wrong = name.replace("/{}", f"{sharded.parent}/{{}}") if name == "/{}" else name
    places = {
        tensor: wrong.format(shard.name) if file == shard.name else file for tensor, file in weight_map(sharded).items()
    }
    edit(sharded, "model.safetensors.index.json", weight_map=places)
    with pytest.raises(CheckpointError, match=r"index\.json: names the file .*; only files beside it are read"):
        open_hf(sharded)


def test_links_lead_out_of_the_directory_only_into_the_hubs_cache(sharded, tmp_path):
    shard = first_shard(sharded)
    moved = tmp_path / "elsewhere"
    shard.rename(moved)
    shard.symlink_to(moved)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: a link to \S+elsewhere, out of the model's directory"):
        open_hf(sharded)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    blob = tmp_path / "models--org--name" / "blobs" / "abc"
    blob.parent.mkdir()
    moved.rename(blob)
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/abc")
    as_transformers(snapshot)


@pytest.mark.parametrize("family", ["llama3-8b"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number_is_refused_by_tensor_and_place_in_every_format(family, number, dtype, tmp_path):
    save_hf(toy_model(family, dtype), tmp_path / "m")
    for to, name in (("gguf", "m.gguf"), ("meta", "meta")):
        convert(tmp_path / "m", tmp_path / name, to=to)
    name = "model.layers.1.mlp.down_proj.weight"
    state = load_file(tmp_path / "m" / "model.safetensors")
    whole = state[name].clone()
    state[name][7, 11] = number
    said = rf"{name} holds 1 values that are NaN or infinite, the first at \[7, 11\]; the run"
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})

    meta = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    meta["layers.1.feed_forward.w2.weight"][7, 11] = number
    torch.save(meta, tmp_path / "meta" / "consolidated.00.pth")
    gguf = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(
        gguf.replace(whole.view(torch.uint8).numpy().tobytes(), state[name].view(torch.uint8).numpy().tobytes())
    )
    for path in (tmp_path / "m", tmp_path / "meta", tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError, match=said) as error:
            load_model(path)
        assert str(path) in str(error.value)
        weights = open_weights(path)
        box = (slice(7, 9), slice(0, 107))
        with pytest.raises(CheckpointError, match="holds 1 values that are NaN"):
            weights.part(name, (96, 107), box)
        weights.read("model.norm.weight")


def test_half_precision_whose_sum_overflows_is_no_infinity(tmp_path):
    model = toy_model("llama3-8b", torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60_000.0)
    save_hf(model, tmp_path / "m")
    assert bool((load_model(tmp_path / "m").lm_head.weight == 60_000).all())


def test_a_scale_of_a_quantised_block_that_is_no_number_is_refused(tmp_path):
    config = LlamaConfig(96, 2, 3, 1, 160, 211, 64)
    save_hf(toy_model(config), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf", dtype="q8_0")
    import gguf

    tensor = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[tensor.data_offset + 34 : tensor.data_offset + 36] = b"\x00\x7e"  # NaN in half precision: the second block
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 32 values .* first at \[0, 32\]"):
        load_model(tmp_path / "m.gguf")


def test_numbers_beyond_half_precision_are_not_written_in_it(tmp_path):
    model = toy_model("llama3-8b")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = 70_000.0
    save_hf(model, tmp_path / "m")
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(
            CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight holds weights beyond F16's 65,504"
        ):
            convert(tmp_path / "m", tmp_path / ("f16.gguf" if to == "gguf" else "f16"), to=to, dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


SIZES = {
    "num_hidden_layers": (r"the config says {} layers, and the tensors are of 3", [4, 2, 10**9]),
    "hidden_size": (r"the config says width {}, and no tensor is wider than 211", [9_600_000, 2**31 - 1 - 7]),
    "intermediate_size": (r"the config says feed-forward width {}, and no tensor", [2**31 - 1, 10**6]),
    "vocab_size": (r"the config says vocabulary {}, and no tensor", [2**31 - 1]),
    "head_dim": (r"the config says heads times their width \d", [2**31 - 2, 10**8]),
    "num_attention_heads": (r"the config says heads times their width \d", [3 * 10**8]),
}


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_are_refused_in_milliseconds_with_both_values(untied, name):
    said, sizes = SIZES[name]
    for size in sizes:
        edit(untied, **{"hidden_size": 96, "head_dim": 8, name: size})
        began = time.process_time()
        with pytest.raises(CheckpointError, match=said.format(f"{size:,}")):
            open_weights(untied)
        assert time.process_time() - began < 0.2


def test_absurd_sizes_in_params_json_are_refused_in_milliseconds(tmp_path):
    convert(saved(tmp_path), tmp_path / "meta", to="meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    for name, size, said in (
        ("n_layers", 10**9, "says 1,000,000,000 layers, and the tensors are of 3"),
        ("dim", 2**31 - 8, "says width 2,147,483,640, and no tensor is wider than 211"),
        ("n_heads", 10**8 * 12, "dim 96 is not divisible by n_heads 1200000000"),
        ("n_kv_heads", 7, "n_heads 12 is not a multiple of n_kv_heads 7"),
        ("norm_eps", -1, "norm_eps is -1"),
        ("rope_theta", "x", 'rope_theta is "x"; it must be a number'),
        ("use_scaled_rope", 1, "use_scaled_rope is 1; it must be true or false"),
        ("moe_args", {"experts": 2}, r"moe_args is .*, which is not computed here"),
    ):
        edit(tmp_path / "meta", "params.json", **(params | {name: size}))
        began = time.process_time()
        with pytest.raises(CheckpointError, match=said):
            open_weights(tmp_path / "meta")
        assert time.process_time() - began < 0.2
        (tmp_path / "meta" / "params.json").write_text(json.dumps(params))


def saved(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path / "m")
    return tmp_path / "m"


def test_what_params_json_says_beside_the_tensors_is_named_once(tmp_path, fresh_warnings):
    convert(saved(tmp_path), tmp_path / "meta", to="meta")
    edit(tmp_path / "meta", "params.json", vocab_size=300, note="x")
    for _ in range(2):
        assert open_weights(tmp_path / "meta").config.vocab_size == 211
    file = tmp_path / "meta" / "params.json"
    assert [said for said in fresh_warnings() if said.startswith(str(file))] == [
        f"{file}: vocab_size is 300, and the embeddings have 211 rows; these count",
        f"{file}: not used: note",
    ]


def test_weights_of_a_model_in_memory_may_be_anything(tmp_path):
    """What diverged can be saved and looked at; it is refused where it would be used."""
    model = toy_model(toy_config("llama3-8b"))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    assert bool(from_model(model).read("model.norm.weight").isnan().any())
    save_hf(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 1 values that are NaN or infinite"):
        load_model(tmp_path / "m")

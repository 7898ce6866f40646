"""Meta's layout: round trips, joined shards, published params.json, and pickles that carry code."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.toys import equal_weights, toy_config, toy_model

from arriero.checkpoint import meta
from arriero.checkpoint.convert import convert
from arriero.checkpoint.load import load_model
from arriero.checkpoint.meta import open_meta, write_meta
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.io.fields import Fields
from arriero.model.catalogue import PUBLISHED
from arriero.model.scaling import Llama3Scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(family, dtype, tmp_path):
    model = toy_model(family, dtype)
    write_meta(from_model(model), tmp_path / "m")
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    assert equal_weights(model, back)


def split(directory: Path, n_ranks: int, n_kv_heads: int, rows: bool) -> None:
    """Cut consolidated.00.pth into ranks as Meta's training code does; KV heads repeat when ranks outnumber them."""
    file = directory / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    for rank in range(n_ranks):
        part = {}
        for name, tensor in state.items():
            kind = name.split(".")[-2]
            if kind in ("wo", "w2") or (kind == "tok_embeddings" and not rows):
                part[name] = tensor.chunk(n_ranks, dim=1)[rank].clone()
            elif kind in ("wk", "wv") and n_ranks > n_kv_heads:
                part[name] = tensor.chunk(n_kv_heads)[rank * n_kv_heads // n_ranks].clone()
            elif kind.endswith("norm"):
                part[name] = tensor
            else:
                part[name] = tensor.chunk(n_ranks)[rank].clone()
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")


@pytest.mark.parametrize(("n_ranks", "rows"), [(2, False), (2, True), (4, True)])
def test_shards_are_joined_as_meta_splits_them(n_ranks, rows, tmp_path):
    config = replace(toy_config("llama3.1-8b"), ffn_dim=212, vocab_size=212)
    model = toy_model(config)
    write_meta(from_model(model), tmp_path)
    split(tmp_path, n_ranks, config.n_kv_heads, rows)
    assert len(list(tmp_path.glob("*.pth"))) == n_ranks
    back = load_model(tmp_path)
    assert back.config == config
    assert equal_weights(model, back)
    convert(tmp_path, tmp_path / "hf", to="hf")  # whose check joins the shards by other code


def test_writing_over_shards_leaves_none_of_them(tmp_path):
    model = toy_model(replace(toy_config("llama3.1-8b"), ffn_dim=212, vocab_size=212))
    write_meta(from_model(model), tmp_path)
    split(tmp_path, 2, 2, rows=True)
    write_meta(from_model(model), tmp_path)
    assert [file.name for file in tmp_path.glob("*.pth")] == ["consolidated.00.pth"]
    assert equal_weights(load_model(tmp_path), model)


def test_rotary_rows_are_put_in_pairs(tmp_path):
    """Row 2j of a Meta head is row j of ours, row 2j+1 is row j + h/2; keys have their own number of heads."""
    model = toy_model("llama3-8b")
    write_meta(from_model(model), tmp_path)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    for name, heads in (("q", 12), ("k", 3)):
        theirs = state[f"layers.1.attention.w{name}.weight"].view(heads, 8, 96)
        ours = getattr(model.model.layers[1].self_attn, f"{name}_proj").weight.view(heads, 8, 96)
        assert torch.equal(theirs[:, 0::2], ours[:, :4])
        assert torch.equal(theirs[:, 1::2], ours[:, 4:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_of_each_published_size_give_its_ffn_width_by_metas_formula(name):
    config = PUBLISHED[name]
    params = meta._params(config)
    width = int(params.get("ffn_dim_multiplier", 1.0) * int(8 * config.dim / 3))
    assert -(-width // params["multiple_of"]) * params["multiple_of"] == config.ffn_dim
    meta_keys = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta"}
    meta_keys |= {"multiple_of", "ffn_dim_multiplier", "use_scaled_rope"}
    if name.startswith(("llama2", "llama3")):  # strict readers of these refuse other keys
        assert params.keys() <= meta_keys


def test_params_as_meta_published_them_are_read(tmp_path):
    """Llama 2's vocabulary is -1 there; 3.2's factor 32 is known by its size; old files hold rope.freqs."""
    config = replace(toy_config("llama1-7b"), norm_eps=1e-6, max_context=4096)
    write_meta(from_model(toy_model(config)), tmp_path / "2")
    params = {"dim": 44, "multiple_of": 256, "n_heads": 11, "n_layers": 3, "norm_eps": 1e-06, "vocab_size": -1}
    (tmp_path / "2" / "params.json").write_text(json.dumps(params))
    state = torch.load(tmp_path / "2" / "consolidated.00.pth", weights_only=True)
    torch.save(state | {"rope.freqs": torch.ones(2)}, tmp_path / "2" / "consolidated.00.pth")
    assert open_meta(tmp_path / "2").config == config

    small = replace(toy_config("llama3.2-1b"), dim=2048, n_layers=16, n_heads=32, head_dim=64, n_kv_heads=8, ffn_dim=2)
    assert meta._params(small).get("rope_scale_factor") is None
    assert meta._factor(Fields(meta._params(small), ""), 2048, 16) == 32.0
    assert meta._factor(Fields({}, ""), 4096, 32) == 8.0
    assert meta._factor(Fields({"rope_scale_factor": 16}, ""), 2048, 16) == 16.0


class Payload:
    """Pickles as a call: what an attacker would put into a .pth file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    write_meta(from_model(toy_model("llama3-8b")), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"norm.weight": Payload(tmp_path / "owned")}, file)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: refused: this pickle holds more than tensors"):
        open_meta(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    config = replace(toy_config("llama3.1-8b"), ffn_dim=212, vocab_size=212)
    write_meta(from_model(toy_model(config)), tmp_path)
    split(tmp_path, 2, 2, rows=True)
    file = tmp_path / "consolidated.01.pth"
    whole = file.read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth"):
            open_meta(tmp_path)
    torch.save([torch.ones(3)], file)
    with pytest.raises(CheckpointError, match="no plain dictionary of tensors"):
        open_meta(tmp_path)
    torch.save({"tok_embeddings.weight": torch.ones(3, 256)}, file)
    with pytest.raises(CheckpointError, match=r"'layers\.0\.feed_forward\.w1\.weight' is missing"):
        open_meta(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="the config asks for"):
        open_meta(tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    for wrong in ("wide", 0, -256, 256.0, True, 2**31, 10**40):
        (tmp_path / "params.json").write_text(json.dumps(params | {"dim": wrong}))
        with pytest.raises(CheckpointError, match=r"params\.json: dim is .*; it must be a whole number from 1 to"):
            open_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"but no consolidated\.\*\.pth"):
        open_meta(tmp_path)


def test_what_params_json_cannot_say_is_refused(tmp_path):
    config = toy_config("llama3.1-8b")
    wide = toy_model(replace(config, head_dim=64))
    with pytest.raises(CheckpointError, match="head_dim 64 x 8 heads is not dim 256"):
        write_meta(from_model(wide), tmp_path / "m")
    odd = toy_model(replace(config, rope_scaling=Llama3Scaling(8.0, original_context=2048)))
    with pytest.raises(CheckpointError, match="no place for the RoPE scaling"):
        write_meta(from_model(odd), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def rewritten(file: Path, change, packing: int = zipfile.ZIP_STORED) -> None:
    """A .pth with each of its members, as `change(name, content)` has it."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize(
    ("change", "packing", "what"),
    [
        (
            lambda name, content: content,
            zipfile.ZIP_DEFLATED,
            r"its archive is compressed, as torch\.save never",
        ),
        (lambda name, content: content[: len(content) // 2], 0, r"damaged or cut short|holds more than tensors"),
        (
            lambda name, content: content.replace(b"cpu", b"\xff\xffu"),
            0,
            r"damaged or cut short \(.*; copy or",
        ),
        (lambda name, content: b"" if name.endswith(".pkl") else content, 0, r"damaged or cut short \("),
    ],
    ids=["packed", "cut", "not UTF-8", "empty"],
)
def test_a_damaged_archive_is_refused(change, packing, what, tmp_path):
    write_meta(from_model(toy_model("llama2-7b")), tmp_path)
    rewritten(tmp_path / "consolidated.00.pth", change, packing)
    with pytest.raises(CheckpointError, match=rf"consolidated\.00\.pth: .*({what})"):
        open_meta(tmp_path)


def test_tensors_that_the_file_does_not_hold_are_refused(tmp_path):
    write_meta(from_model(toy_model("llama2-7b")), tmp_path)
    one = torch.zeros(1).expand(2**40)
    torch.save({"norm.weight": one}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"damaged: 4,398,046,511,104 bytes of tensors in a file of [\d,]+; copy"):
        open_meta(tmp_path)
    torch.save({"norm.weight": torch.zeros(3, dtype=torch.int64)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight is of type torch\.int64; readable are F64"):
        open_meta(tmp_path)

"""What a checkpoint says beside its weights is kept, or named once. transformers and gguf read the results."""

import json
import math

import gguf
import pytest
import transformers
from helpers.tokenizers import small_sentencepiece
from helpers.toys import LORAS, toy_model

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.beside import read_beside, sampling_of
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf, sidecar_writer
from arriero.checkpoint.merge import merge
from arriero.errors import CheckpointError, ConfigError
from arriero.infer.config import SamplingConfig, SamplingFlags
from arriero.model.config import LlamaConfig
from arriero.model.lora import add_lora, lora_state
from arriero.show.terminal import warn_once

SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": [2, 259],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_length": 4096,
    "transformers_version": "4.40.0",
}
SHAPE = LlamaConfig(44, 3, 11, 11, 107, 278, 64)


@pytest.fixture(autouse=True)
def _say_all_again():
    warn_once.cache_clear()


@pytest.fixture
def source(tmp_path):
    """A model with all that lies beside weights on the Hub."""
    directory = tmp_path / "source"
    save_hf(toy_model(SHAPE), directory, small_sentencepiece())
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS))
    edit(directory / "config.json", initializer_range=0.02, pretraining_tp=1, custom_thing={"a": [1, 2]})
    edit(directory / "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    edit(directory / "tokenizer_config.json", padding_side="left", model_max_length=64)
    for name in ("LICENSE.txt", "USE_POLICY.md", "README.md", "modeling_own.py", "trainer_state.json"):
        (directory / name).write_text(name)
    return directory


def edit(file, **changes):
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in value.items() if v != "ABSENT"}))


def settings_of(directory):
    """What transformers will generate with."""
    return transformers.GenerationConfig.from_pretrained(directory).to_diff_dict()


@pytest.mark.parametrize("route", [["hf"], ["meta", "hf"]])
def test_generation_settings_config_entries_and_licence_survive(source, route, tmp_path, caplog):
    at = source
    for to in route:
        at = convert(at, tmp_path / f"to-{to}", to=to)
    assert settings_of(at) == settings_of(source)
    theirs = transformers.AutoTokenizer.from_pretrained(at)
    assert (theirs.padding_side, theirs.model_max_length) == ("left", 64)
    assert {"LICENSE.txt", "USE_POLICY.md", "README.md"} <= {file.name for file in at.iterdir()}
    assert not (at / "modeling_own.py").exists()
    [left] = [text for text in caplog.messages if "not carried over" in text]
    assert left == f"{source}: not carried over: modeling_own.py, trainer_state.json"
    if route == ["hf"]:
        before, after = (json.loads((path / "config.json").read_text()) for path in (source, at))
        assert after == before | {"eos_token_id": [2, 259]}
    else:
        assert f"{source}: Meta's layout has no place for these entries of config.json: custom_thing" in caplog.messages


def test_merge_and_sidecars_keep_them_too_but_no_model_card(source, tmp_path):
    lora = LORAS["all"]
    save_adapter(lora_state(add_lora(toy_model(SHAPE), lora)), tmp_path / "adapter", lora, "source")
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "step").mkdir()
    sidecar_writer(SHAPE, small_sentencepiece(), read_beside(source))(tmp_path / "step")
    for directory in (tmp_path / "merged", tmp_path / "step"):
        assert settings_of(directory) == settings_of(source)
        assert json.loads((directory / "config.json").read_text())["custom_thing"] == {"a": [1, 2]}
        assert (directory / "USE_POLICY.md").exists()
        assert not (directory / "README.md").exists()


def test_a_gguf_file_holds_what_it_can_and_the_rest_is_named(source, tmp_path, caplog):
    edit(source / "generation_config.json", num_beams=4, no_repeat_ngram_size=3, typical_p=1.0, suppress_tokens=[])
    file = convert(source, tmp_path / "m.gguf", to="gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    said = {name: fields[name] for name in fields if name.startswith("general.sampling.")}
    assert said == {
        "general.sampling.temp": pytest.approx(0.6),
        "general.sampling.top_k": 50,  # transformers' default; llama.cpp's is 40
        "general.sampling.top_p": pytest.approx(0.9),
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": pytest.approx(1.1),
        "general.sampling.penalty_last_n": -1,
    }
    assert f"{source}: a GGUF file has no place for these generation settings: no_repeat_ngram_size, num_beams" in (
        caplog.messages
    )
    assert f"{source}: a GGUF file does not hold LICENSE.txt, README.md, USE_POLICY.md; keep them beside it" in (
        caplog.messages
    )
    back = json.loads((convert(file, tmp_path / "back", to="hf") / "generation_config.json").read_text())
    assert {name: back[name] for name in ("do_sample", "temperature", "top_p", "repetition_penalty")} == {
        name: SETTINGS[name] for name in ("do_sample", "temperature", "top_p", "repetition_penalty")
    }


def test_a_gguf_files_origin_goes_to_another_gguf_file_and_is_named_elsewhere(source, tmp_path, caplog):
    file, out = tmp_path / "m.gguf", tmp_path / "licensed.gguf"
    convert(source, file, to="gguf")
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    writer.add_string("general.license", "llama3")
    writer.add_array("general.languages", ["qu", "ay"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = gguf.GGUFReader(convert(out, tmp_path / "again.gguf", to="gguf")).fields
    assert (again["general.license"].contents(), again["general.languages"].contents()) == ("llama3", ["qu", "ay"])
    convert(out, tmp_path / "back", to="hf")
    assert (
        f"{out}: Hugging Face's layout has no place for general.license (llama3), general.languages (['qu', 'ay'])"
        in (caplog.messages)
    )


def test_the_settings_of_an_old_config_json_are_read_where_there_is_no_generation_config(source, tmp_path):
    (source / "generation_config.json").unlink()
    edit(source / "config.json", do_sample=True, temperature=0.7, eos_token_id=[2, 259])
    at = convert(source, tmp_path / "hf", to="hf")
    said = settings_of(at)
    assert (said["do_sample"], said["temperature"], said["eos_token_id"]) == (True, 0.7, [2, 259])
    assert "temperature" not in json.loads((at / "config.json").read_text())


def test_ids_that_differ_between_files_are_said_and_generation_config_holds(source, tmp_path, caplog):
    edit(source / "config.json", eos_token_id=263, pad_token_id=3)
    edit(source / "generation_config.json", eos_token_id=259)
    at = convert(source, tmp_path / "hf", to="hf")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((at / name).read_text())
        assert (said["eos_token_id"], said["pad_token_id"]) == (259, 0)
    eos, pad, tokenizer = (text for text in caplog.messages if "token_id" in text)
    assert eos == f"{source}: eos_token_id is 259 in generation_config.json and 263 in config.json; the former is used"
    assert pad == f"{source}: pad_token_id is 0 in generation_config.json and 3 in config.json; the former is used"
    assert "eos_token_id is 259, the tokenizer's eos token '</s>' is 2; written as they are" in tokenizer


def test_a_model_trained_with_a_tokenizer_stops_where_it_learnt_to(source):
    edit(source / "generation_config.json", eos_token_id=259)
    assert read_beside(source).for_training(small_sentencepiece()).generation["eos_token_id"] == [259, 2]
    edit(source / "generation_config.json", eos_token_id=[259, 2])
    assert read_beside(source).for_training(small_sentencepiece()).generation["eos_token_id"] == [259, 2]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be an id"),
        ({"eos_token_id": [2, True]}, r"eos_token_id is \[2, True\]; it must be an id"),
        ({"bos_token_id": [1]}, r"bos_token_id is \[1\]; a token id is expected"),
        ({"temperature": "0.6"}, "temperature is '0.6'; a number is expected"),
        ({"temperature": math.nan}, "temperature is nan; a number is expected"),
        ({"top_p": -math.inf}, "top_p is -inf; a number is expected"),
        ({"top_k": 1.5}, "top_k is 1.5; a whole number is expected"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; true or false is expected"),
    ],
)
def test_generation_settings_of_a_wrong_type_are_refused(source, tmp_path, changes, problem):
    edit(source / "generation_config.json", **changes)
    with pytest.raises(CheckpointError, match=problem):
        convert(source, tmp_path / "hf", to="hf")


def test_entries_that_are_untrue_of_plain_weights_are_left_out_and_named(source, tmp_path, caplog):
    edit(source / "config.json", auto_map={"AutoModel": "modeling_own.Own"})
    said = json.loads((convert(source, tmp_path / "hf", to="hf") / "config.json").read_text())
    assert "auto_map" not in said
    assert any("not carried over from config.json" in m and m.endswith("auto_map") for m in caplog.messages)


def test_a_model_without_tokenizer_is_named(tmp_path, caplog):
    save_hf(toy_model(SHAPE), tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "bare.gguf", to="gguf")
    assert any(
        "no tokenizer is there" in m and "llama.cpp does not load a file without one" in m for m in caplog.messages
    )


GREEDY, WARM = SamplingConfig(), SamplingConfig(temperature=0.6, top_p=0.9)


@pytest.mark.parametrize(
    ("generation", "flags", "otherwise", "expected"),
    [
        ({}, {}, GREEDY, GREEDY),
        ({}, {}, WARM, WARM),
        ({"do_sample": True, "temperature": 0.7}, {}, GREEDY, SamplingConfig(temperature=0.7, top_k=50)),
        ({"do_sample": True}, {}, WARM, SamplingConfig(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, {}, WARM, SamplingConfig(1.0, 1.0, 20, 1.0, 0.1)),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2},
            {},
            WARM,
            SamplingConfig(1.2, 0.0, 0, 0.9),
        ),
        ({"temperature": 0.7}, {}, WARM, SamplingConfig(temperature=0.7, top_p=0.9)),
        (
            {"do_sample": True, "temperature": 0.7},
            {"temperature": 0.0, "top_k": 0},
            WARM,
            SamplingConfig(temperature=0.0),
        ),
    ],
)
def test_flags_win_then_the_models_own_settings_then_the_commands(generation, flags, otherwise, expected):
    assert SamplingFlags(**flags).over(sampling_of(generation), otherwise, "model") == expected


def test_own_settings_out_of_range_name_the_model():
    with pytest.raises(ConfigError, match="my/model: in its own generation settings top_p is 7"):
        SamplingFlags().over({"top_p": 7.0}, GREEDY, "my/model")

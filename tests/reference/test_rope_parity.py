"""RoPE's scalings, and which of two entries of config.json counts, against transformers' logits."""

import json

import pytest
import torch
import transformers
from helpers.toys import toy_model

from arriero.errors import CheckpointError, ConfigError
from arriero.model.config import LlamaConfig
from arriero.model.layout import Documents
from arriero.model.llama import Llama
from arriero.model.rope import rope_attention, rope_frequencies
from arriero.model.scaling import DynamicScaling

SHAPE = {
    "hidden_size": 44, "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 26,
    "num_key_value_heads": 1, "vocab_size": 101, "max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 31}  # fmt: skip
ENTRIES = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear, old name and an int": {"rope_scaling": {"type": "linear", "factor": 3}},
    "below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "yarn": {"rope_scaling": YARN},
    "yarn, new place": {"rope_parameters": {**YARN, "rope_theta": 5e5}},
    "yarn of Yarn-Llama-2": {
        "rope_scaling": {"type": "yarn", "factor": 32.0, "finetuned": True, "original_max_position_embeddings": 8}
    },
    "yarn without context": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn without factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn below 1": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn, attention": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 7, "beta_slow": 2.5}},
    "yarn, one beta": {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": 3.0}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn, mscale alone": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "yarn, all three": {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1, "attention_factor": 2}},
    "yarn, one range": {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}},
    "both": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN, "rope_theta": 77.0},
    "both, the first empty": {"rope_scaling": {}, "rope_parameters": YARN},
    "both, the first null": {"rope_scaling": None, "rope_parameters": YARN},
    "both names of the type": {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
    "two thetas": {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_theta": 77.0},
    "theta lost with its dictionary": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "two original contexts": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "original context beside": {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32},
}


def of_transformers(config: dict, ours: Llama | None = None) -> transformers.PreTrainedModel:
    kind = {"llama": transformers.LlamaForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[config["model_type"]]
    model = kind(kind.config_class.from_dict(json.loads(json.dumps(config))))  # from_dict changes what it is given
    if ours is not None:
        model.load_state_dict(ours.state_dict())
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=list(ENTRIES))
def test_logits_equal_transformers_through_the_whole_context(entries, kind):
    entries = SHAPE | entries | {"model_type": kind}
    ours = toy_model(LlamaConfig.from_hf(entries))
    tokens = torch.randint(101, (1, 256), generator=torch.Generator().manual_seed(3))
    reference = of_transformers(entries, ours)
    rotary = reference.model.rotary_emb
    torch.testing.assert_close(rope_frequencies(ours.config), rotary.inv_freq, atol=0, rtol=1e-6)
    assert rope_attention(ours.config) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), reference(tokens).logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=list(ENTRIES))
def test_what_is_written_means_the_same_to_transformers_and_to_us(entries, kind):
    config = LlamaConfig.from_hf(SHAPE | entries | {"model_type": kind})
    assert LlamaConfig.from_hf(config.to_hf()) == config
    written, read = of_transformers(config.to_hf()), of_transformers(SHAPE | entries | {"model_type": kind})
    torch.testing.assert_close(written.model.rotary_emb.inv_freq, read.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert written.model.rotary_emb.attention_scaling == pytest.approx(read.model.rotary_emb.attention_scaling)
    through = written.config.to_dict()
    assert LlamaConfig.from_hf(through) == config


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("both", 'rope_scaling is {"type": "linear", "factor": 2.0}, rope_parameters {"rope_type": "yarn", "factor": '
                 '4.0, "original_max_position_embeddings": 64}; the first is used, as in transformers'),
        ("both names of the type", 'rope_scaling has rope_type "linear" and type "yarn"; the first is used, as in '
                                   "transformers"),
        ("two thetas", "rope_theta is 77.0, within rope_scaling 500; the second is used, as in transformers"),
        ("two original contexts", "original_max_position_embeddings is 32, within rope_scaling 64; the first is used, "
                                  "as in transformers"),
        ("yarn below 1", "rope_scaling has factor 0.5, max_position_embeddings 256 is 4 times "
                         "original_max_position_embeddings 64; the factor is used, as in transformers"),
        ("yarn, attention", None),
        ("yarn of Yarn-Llama-2", "not used for this rope_scaling, as in transformers: finetuned"),
    ],
)  # fmt: skip
def test_entries_that_differ_are_named_once_with_both_values(entries, said, fresh_warnings):
    for _ in range(2):
        LlamaConfig.from_hf(SHAPE | ENTRIES[entries] | {"model_type": "llama"}, "m/config.json")
    assert fresh_warnings()[:1] == ([] if said is None else [f"m/config.json: {said}"])
    before = len(fresh_warnings())
    agreeing = {"rope_scaling": YARN, "rope_parameters": {**YARN, "type": "yarn"}}
    LlamaConfig.from_hf(SHAPE | agreeing | {"model_type": "llama"}, "m/config.json")
    assert len(fresh_warnings()) == before


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "linear", "factor": "2.0"}, 'rope_scaling.factor is "2.0"; it must be a number'),
        ({"type": "linear", "factor": True}, "rope_scaling.factor is true; it must be a number"),
        ({"type": "linear", "factor": float("nan")}, "rope_scaling.factor is NaN; it must be a number"),
        ({"type": "linear", "factor": 10**400}, r"rope_scaling.factor is 10+\.\.\.; it must be a number"),
        ({"type": "linear"}, "the entry 'rope_scaling.factor' is missing"),
        ({"type": "linear", "factor": 0}, r"the factor of RoPE scaling is 0\.0; it must be above 0"),
        ({"type": "linear", "factor": -2}, r"the factor of RoPE scaling is -2\.0; it must be above 0"),
        ({"type": "yarn", "factor": 2, "truncate": 1}, "rope_scaling.truncate is 1; it must be true or false"),
        ({"type": "yarn", "factor": 2, "attention_factor": -1}, r"YaRN has attention_factor -1\.0"),
        ({"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_fast not below beta_slow"),
        ({"type": "yarn", "factor": 2, "original_max_position_embeddings": 6.5},
         "original_max_position_embeddings is 6.5; it must be a whole number"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "the first must be above 0 and below the second"),
        ({"rope_type": "llama3", "factor": 8.0}, r"the entry 'rope_scaling.low_freq_factor' is missing"),
        ({"type": "longrope", "factor": 2, "short_factor": [1.0]}, 'RoPE type "longrope"; computed here are'),
        ({"type": ["linear"], "factor": 2}, r'RoPE type \["linear"\]; computed here are'),
        ({"type": "mrope", "mrope_section": [1, 2]}, 'RoPE type "mrope"'),
        ({"type": "default", "mrope_section": [1, 2]}, r"mrope_section \[1, 2\], a rotation that is not computed here"),
        ({"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5, a rotation that"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "has full_attention .*, a rotation that"),
        ("linear", 'rope_scaling is "linear"; it must be an object'),
    ],
)  # fmt: skip
def test_scalings_that_are_not_computed_are_refused_by_name_and_value(scaling, said):
    for place in ("rope_scaling", "rope_parameters"):
        entries = SHAPE | {"model_type": "llama", place: scaling}
        with pytest.raises(CheckpointError, match=said.replace("rope_scaling", place)) as error:
            LlamaConfig.from_hf(entries, "m/config.json")
        assert str(error.value).startswith("m/config.json: ")


def test_dynamic_scaling_goes_as_far_as_plain_rope_and_no_further():
    """Beyond, transformers turns new keys otherwise than the old ones in its cache: no cache can be right."""
    model = toy_model(LlamaConfig(44, 2, 2, 1, 71, 101, 31, rope_scaling=DynamicScaling(4.0)))
    tokens = torch.randint(101, (1, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = of_transformers(model.config.to_hf("float32"), model)(tokens[:, :31]).logits
        torch.testing.assert_close(model(tokens[:, :31]), expected, atol=2e-5, rtol=0)
        with pytest.raises(ConfigError, match=r"a text of 32 tokens.*'dynamic' beyond 31.*'yarn' or 'linear'"):
            model(tokens)
        packed = model(torch.cat([tokens, tokens], 1)[:, :62], Documents.of([31, 31]))
        torch.testing.assert_close(packed[:, :31], expected, atol=2e-5, rtol=0)

"""What a checkpoint holds besides shape, tensors and tokenizer, carried along into whatever is written from it.

Generation settings are read from generation_config.json, else from config.json; of a GGUF file from its
`general.sampling` entries. Where files disagree on token ids, generation_config.json takes precedence, then
config.json, then the tokenizer, as in transformers. Entries of config.json that no decoder here uses are copied
unchanged. Licence, notice and use-policy files are copied because they must be; a README only where the result is the
same model. What is left behind is named in a warning.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from arriero.errors import CheckpointError
from arriero.io.files import write_json
from arriero.io.gguf_header import read_metadata
from arriero.io.reading import read_json
from arriero.model.entries import is_known
from arriero.show.terminal import warn_once

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Names that transformers takes from config.json into the generation settings where there is no generation_config.json.
_GENERATION_ENTRIES = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "do_sample", "num_beams",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_beam_groups", "diversity_penalty", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "penalty_alpha",
)  # fmt: skip
# Entries of config.json that every writer here states itself, under this name or a newer one.
_STATED = ("dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta", *IDS)
# Entries that would be untrue of what is written: its tensors are plain, and no code goes along.
_UNTRUE = ("quantization_config", "compression_config", "auto_map")
# Entries of tokenizer_config.json that go along beside those that `Tokenizer.save` writes.
_PADDING = (
    "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names",
)  # fmt: skip
_PAPERS = ("license*", "licence*", "notice*", "copying*", "use_policy*", "use-policy*")
_CARD = ("readme*",)
# Files that are read or written elsewhere, and what only a training or a tool left there.
_OTHERS = (
    "config.json", GENERATION, "params.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*", "checklist.chk", "*.safetensors", "*.index.json", "*.pth", "*.bin",
    "*.gguf", "*.pt", "report.json", ".*",
)  # fmt: skip

# general.sampling.NAME in a GGUF file -> the name in generation_config.json
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class Beside:
    """generation: entries of generation_config.json. config: further entries of config.json. files: what is copied.
    tokenizer: entries of tokenizer_config.json that say how texts are padded and cut, not what their ids are.
    general: entries of a GGUF file on its origin, licence and the like, by key."""

    generation: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, Any] = field(default_factory=dict)

    def ids(self, tokenizer: Any) -> dict[str, Any]:
        """The token ids that config.json and generation_config.json carry: the model's own, else the tokenizer's."""
        own = {name: self.generation[name] for name in IDS if self.generation.get(name) is not None}
        return _tokenizer_ids(tokenizer) | own

    def for_training(self, tokenizer: Any) -> Beside:
        """The same for a model trained with `tokenizer`: its ends of texts and of answers end generation, too."""
        from arriero.tokenizer.chat import end_of_answers

        own = self.generation.get("eos_token_id")
        if own is None:
            return self
        stops = own if isinstance(own, list) else [own]
        learnt = (tokenizer.eos_id, end_of_answers(tokenizer))
        more = sorted({i for i in learnt if i is not None} - set(stops))
        return replace(self, generation={**self.generation, "eos_token_id": [*stops, *more] if more else own})

    def write(self, directory: Path, tokenizer: Any, shape: Mapping[str, Any] | None = None) -> None:
        """Write generation_config.json and the files that go along and, where its `shape` is given, config.json."""
        for file in self.files:
            shutil.copyfile(file, directory / file.name)
        if tokenizer is not None and self.tokenizer:
            write_json(directory / TOKENIZER, {**read_json(directory / TOKENIZER), **self.tokenizer})
        ids = self.ids(tokenizer)
        write_json(directory / GENERATION, {**self.generation, **ids})
        if shape is not None:
            further = {name: value for name, value in self.config.items() if name not in shape}
            write_json(directory / "config.json", {**further, **shape, **ids})

    def sampling_metadata(self, source: Path) -> dict[str, Any]:
        """The generation settings that a GGUF file can hold, under llama.cpp's keys; the others are named once.

        llama.cpp samples unless it is told otherwise, so `do_sample: false` is written as a temperature of 0.
        """
        settings = sampling_of(self.generation)
        metadata = {key: settings[name] for key, name in SAMPLING_KEYS.items() if settings.get(name) is not None}
        if "general.sampling.penalty_repeat" in metadata:
            metadata["general.sampling.penalty_last_n"] = -1  # over the whole text, as in transformers
        if lost := unused_settings(self.generation):
            warn_once(f"{source}: a GGUF file has no place for these generation settings: {_listed(lost)}")
        return metadata


NOTHING = Beside()


def read_beside(source: Path, *, same_model: bool = False, warn: bool = True) -> Beside:
    """Read everything beside the weights of the checkpoint at `source` (a directory of either layout, or a GGUF file).

    same_model: what is written is this model in another form, so its README is still true. warn: name the files that
    are not carried over, and token ids that differ.
    """
    if source.is_file():
        return _beside_in_gguf(source)
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    generation, config = _generation(source, config)
    if warn:
        _warn_of_ids(source, generation, config)
        if untrue := [name for name in _UNTRUE if config.get(name)]:
            warn_once(
                f"{source}: not carried over from config.json, as it is not true of plain weights: {_listed(untrue)}"
            )
    further = {name: value for name, value in config.items() if name not in (*_STATED, *_UNTRUE)}
    for name in IDS:  # config.json's ids stand in where generation_config.json has none
        if generation.get(name) is None and config.get(name) is not None:
            _check_ids(source, name, config[name])
            generation[name] = config[name]
    return Beside(generation, further, _files(source, same_model, warn), _tokenizer_entries(source / TOKENIZER))


def _beside_in_gguf(source: Path) -> Beside:
    metadata = read_metadata(source)
    generation = {name: _decimal(metadata[key]) for key, name in SAMPLING_KEYS.items() if key in metadata}
    if "temperature" in generation:
        generation["do_sample"] = generation["temperature"] > 0
    _check_numbers(source, generation)
    return Beside(generation, general={k: v for k, v in metadata.items() if _describes(k)})


def _generation(source: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checked generation settings of a directory, and the entries of `config` that are none of them."""
    if (source / GENERATION).is_file():
        generation = read_json(source / GENERATION)
    else:
        generation = {name: config[name] for name in (*IDS, *_GENERATION_ENTRIES) if config.get(name) is not None}
        config = {name: value for name, value in config.items() if name not in _GENERATION_ENTRIES}
    generation = {name: value for name, value in generation.items() if name != "_from_model_config"}
    for name in IDS:
        _check_ids(source, name, generation.get(name))
    _check_numbers(source, generation)
    return generation, config


def warn_of_losses(source: Path, beside: Beside, to: str) -> None:
    """Warn of everything that the format `to` ("hf", "meta" or "gguf") cannot hold."""
    format_ = {"hf": "Hugging Face's layout", "meta": "Meta's layout", "gguf": "a GGUF file"}[to]
    unknown = sorted(name for name, v in beside.config.items() if v is not None and not is_known(name))
    if lost := unknown if to != "hf" else []:
        warn_once(f"{source}: {format_} has no place for these entries of config.json: {_listed(lost)}")
    if beside.files and to == "gguf":
        warn_once(f"{source}: {format_} does not hold {_listed(f.name for f in beside.files)}; keep them beside it")
    if beside.general and to != "gguf":
        said = (f"{key} ({str(value)[:40]})" for key, value in beside.general.items())
        warn_once(f"{source}: {format_} has no place for {_listed(said)}")


def sampling_of(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `generation` that decide how a token is sampled, as transformers would use them.

    `do_sample: true` takes transformers' defaults (temperature 1, top_k 50) for what the file does not state, false is
    a temperature of 0; where it is absent, the stated settings are returned and the others left to the caller.
    """
    stated = {name: generation[name] for name in SAMPLING_KEYS.values() if generation.get(name) is not None}
    do_sample = generation.get("do_sample")
    if do_sample:
        return {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0} | stated
    if do_sample is False:
        penalty = stated.get("repetition_penalty")
        return {"temperature": 0.0} | ({} if penalty is None else {"repetition_penalty": penalty})
    return stated


def unused_settings(generation: Mapping[str, Any]) -> list[str]:
    """The entries of `generation` that change what transformers generates, and that nothing here reads."""
    neutral = {"num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0,
               "encoder_repetition_penalty": 1.0, "num_return_sequences": 1}  # fmt: skip
    silent = {*IDS, *SAMPLING_KEYS.values(), "do_sample", "transformers_version", "use_cache", "cache_implementation",
              "max_length", "max_new_tokens", "return_dict_in_generate", "trust_remote_code"}  # fmt: skip
    said = {name: v for name, v in generation.items() if name not in silent and not name.startswith(("_", "output_"))}
    return sorted(name for name, value in said.items() if value and value != neutral.get(name))


def _tokenizer_entries(file: Path) -> dict[str, Any]:
    config = read_json(file) if file.is_file() else {}
    return {name: config[name] for name in _PADDING if config.get(name) is not None}


def _files(source: Path, same_model: bool, warn: bool) -> tuple[Path, ...]:
    """The files that go along; the rest is named."""
    carried = (*_PAPERS, *_CARD) if same_model else _PAPERS
    there = sorted(file for file in source.iterdir() if file.is_file())

    def like(file: Path, patterns: Iterable[str]) -> bool:
        return any(fnmatch(file.name.lower(), pattern) for pattern in patterns)

    left = [file.name for file in there if not like(file, (*carried, *_OTHERS))]
    if left and warn:
        warn_once(f"{source}: not carried over: {_listed(left)}")
    return tuple(file for file in there if like(file, carried))


def _warn_of_ids(source: Path, generation: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for name in IDS:
        ours, other = generation.get(name), config.get(name)
        if ours is not None and other is not None and not _ids(other) <= _ids(ours):
            warn_once(f"{source}: {name} is {ours} in {GENERATION} and {other} in config.json; the former is used")


def warn_of_tokenizer_ids(source: Path, beside: Beside, tokenizer: Any) -> None:
    """Warn where the ids that end generation do not include the tokenizer's eos token."""
    ends = beside.generation.get("eos_token_id")
    if (
        tokenizer is not None
        and ends is not None
        and tokenizer.eos_id is not None
        and tokenizer.eos_id not in _ids(ends)
    ):
        warn_once(
            f"{source}: eos_token_id is {ends}, the tokenizer's eos token {tokenizer.special.eos!r} is "
            f"{tokenizer.eos_id}; written as they are: transformers stops at the former"
        )


def _check_numbers(source: Path, generation: Mapping[str, Any]) -> None:
    """Refuse sampling settings of other types than theirs: numbers that are finite, and true or false."""
    for name in SAMPLING_KEYS.values():
        value, kind = generation.get(name), "a whole number" if name == "top_k" else "a number"
        types = int if name == "top_k" else int | float
        if value is not None and (isinstance(value, bool) or not isinstance(value, types) or not abs(value) < math.inf):
            raise CheckpointError(f"{source}: {name} is {value!r:.60}; {kind} is expected: correct {GENERATION}")
    samples = generation.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise CheckpointError(
            f"{source}: do_sample is {samples!r:.60}; true or false is expected: correct {GENERATION}"
        )


def _decimal(value: Any) -> Any:
    """A float32 as the decimal that was meant: 0.6000000238418579 is 0.6."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _describes(key: str) -> bool:
    """Whether an entry of a GGUF file describes the model's origin rather than the file's content."""
    what = ("architecture", "type", "name", "file_type", "quantization_version", "alignment", "size_label", "sampling")
    group, _, name = key.partition(".")
    return group == "general" and name.split(".")[0] not in what


def _check_ids(source: Path, name: str, value: Any) -> None:
    several = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
        raise CheckpointError(
            f"{source}: {name} is {value!r}; a token id is expected: correct {GENERATION} or config.json"
        )


def _ids(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else {value}


def _tokenizer_ids(tokenizer: Any) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    stops = sorted(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _listed(names: Iterable[str]) -> str:
    """Up to eight names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")

"""The small files of a tokenizer's directory in Hugging Face's layout: read as transformers reads them, and written.

tokenizer_config.json names the tokens that have a role and lists the added ones with their flags; where it does not
list them (`added_tokens_decoder`), special_tokens_map.json takes precedence for the roles, and added_tokens.json may
add tokens. Chat templates are in chat_template.jinja and additional_chat_templates/, else in tokenizer_config.json.
generation_config.json and config.json list the ids that end a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.io import reading
from arriero.io.files import write_json
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import ROLES, SpecialTokens, Tokenizer
from arriero.tokenizer.template import DEFAULT, ChatTemplate

CONFIG, MAP, ADDED, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template"
TEMPLATES = "additional_chat_templates"
_ALL_ROLES = (*ROLES, "sep", "cls", "mask")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} where there is no such file."""
    return reading.read_json(path, missing={}, remedy="fetch the file again")


@dataclass(frozen=True)
class Declared:
    """The added tokens of a vocabulary, as the files beside it declare them.

    roles: texts by role ("bos"). placed: tokens with the id that they must have, by id. named: tokens that have a role,
    or are listed as special, and take the next ids where the vocabulary lacks them. directory: of these files.
    """

    directory: Path
    roles: dict[str, str | None]
    placed: Mapping[int, AddedToken]
    named: Mapping[str, AddedToken]  # by text


def read_declared(directory: Path, defaults: Mapping[str, str] | None = None) -> Declared:
    """Read the added tokens and roles that the files in a model directory declare, by transformers' rules.

    defaults: roles that a class of transformers gives where the files give none, such as eos of GPT-2.
    """
    file = directory / CONFIG
    config = read_json(file)
    values = {key: value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)}
    for key, value in values.items():
        if value is not None:
            _token(file, key, value)
    listed = _listed(file, config)
    if "added_tokens_decoder" in config:
        placed = _decoder(file, config["added_tokens_decoder"])
    else:
        older = directory / MAP
        values = _overridden(older, values, file)
        listed |= _listed(older, read_json(older))
        special = {text for value in values.values() if (text := token_text(value))} | set(listed)
        placed = _added(directory / ADDED, special)
    roles, named = _roles(file, values, placed)
    return Declared(directory, {**(defaults or {}), **roles}, placed, named | listed)


def _added(file: Path, special: set[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json by id. special: texts of those that are special."""
    placed = {}
    for text, token_id in read_json(file).items():
        if not text or isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"{file}: {text!r} is {token_id!r}; every token has a whole id")
        flags = {"special": text in special, "normalized": text not in special}
        placed[token_id] = _token(file, f"the token of id {token_id}", {"content": text} | flags)
    return placed


def _roles(
    file: Path, values: Mapping[str, Any], placed: Mapping[int, AddedToken]
) -> tuple[dict[str, str | None], dict[str, AddedToken]]:
    """The text of each role, and the tokens named by entries NAME_token, by text."""
    by_text = {token.content: token for token in placed.values()}
    named: dict[str, AddedToken] = {}
    roles: dict[str, str | None] = {}
    for key, value in values.items():
        token = _token(file, key, value, special=True) if value is not None else None
        role = key.removesuffix("_token")
        if role in _ALL_ROLES:
            roles[role] = None if token is None else token.content
        if token is not None and (role in _ALL_ROLES or isinstance(value, str)):
            named[token.content] = by_text.get(token.content, token)
    return roles, named


def token_text(value: Any) -> str | None:
    """Return a token's text from either spelling that is found: "<s>" or {"content": "<s>", ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _overridden(older: Path, values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the roles of tokenizer_config.json under those of special_tokens_map.json, as transformers lays them."""
    later = {key: value for key, value in read_json(older).items() if key.endswith("_token")}
    for key, value in later.items():
        if value is not None:
            _token(older, key, value)
        if values.get(key) is not None and token_text(values[key]) != token_text(value):
            warn_once(
                f"{file} says that {key} is {token_text(values[key])!r}, {older.name} says {token_text(value)!r}: the "
                "latter is used, as in transformers"
            )
    return values | later


def _listed(file: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Return the tokens that a file lists as special without a role, by text."""
    key = next((k for k in ("extra_special_tokens", "additional_special_tokens") if config.get(k)), None)
    if key is None:
        return {}
    values = config[key]
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, list):
        raise CheckpointError(f"{file}: {key} is {values!r:.60}; it must be a list of tokens")
    tokens = [_token(file, key, value, special=True) for value in values]
    return {token.content: token for token in tokens}


def _decoder(file: Path, decoder: Any) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise CheckpointError(f"{file}: added_tokens_decoder is {decoder!r:.60}; it must be an object of tokens by id")
    return {int(key): _token(file, f"added_tokens_decoder {key}", decoder[key]) for key in sorted(decoder, key=int)}


def _token(file: Path, key: str, value: Any, special: bool = False) -> AddedToken:
    """Return a token as transformers makes it of either spelling."""
    text = token_text(value)
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, dict) else {}
    if not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{file}: {key} is {value!r:.80}; a token is a text, or an object with its content")
    try:
        return AddedToken(text, **({"special": special} | flags))
    except (TypeError, ValueError) as error:  # lone surrogates
        raise CheckpointError(f"{file}: {key} is {value!r:.80}, which is no text ({error})") from error


def add_declared(backend: Backend, declared: Declared) -> Backend:
    """Give a pipeline the added tokens that the files declare, in place, flags and order as in transformers.

    Raises CheckpointError where a token would get another id than the declared one.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    changed = [token for token in declared.placed.values() if _differs(known.get(token.content), token)]
    backend.add_tokens(changed)
    placed = {token.content for token in declared.placed.values()}
    lacking = [token for text, token in declared.named.items() if text not in known and text not in placed]
    in_words = [token for token in lacking if backend.token_to_id(token.content) is not None]
    in_words += _with_rows(backend, declared, [token for token in lacking if token not in in_words])
    backend.add_special_tokens(in_words)
    for token_id, token in declared.placed.items():
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{declared.directory}: {token.content!r} is declared as token {token_id}, but the vocabulary and the "
                f"tokens before it make it token {found}; mend {CONFIG} or {ADDED}"
            )
    return backend


def _with_rows(backend: Backend, declared: Declared, tokens: list[AddedToken]) -> list[AddedToken]:
    """Return those of the tokens that a vocabulary lacks which may be added, as transformers adds all.

    Not those without which a model works and for which it has no row: a "[PAD]" that was named and never trained.
    """
    rows = read_json(declared.directory / "config.json").get("vocab_size")
    needed = {declared.roles.get(role): role for role in ("bos", "eos")}
    after = backend.get_vocab_size(with_added_tokens=True)
    added: list[AddedToken] = []
    for token in tokens:
        if token.content in needed:
            raise CheckpointError(
                f"{declared.directory}: the tokenizer names {token.content!r} as its {needed[token.content]} token, "
                f"but no special token has that text; check {CONFIG} or {MAP} against the vocabulary"
            )
        if isinstance(rows, int) and after + len(added) >= rows:
            warn_once(
                f"{declared.directory}: the files name a token {token.content!r} that the vocabulary lacks; it would "
                f"be token {after + len(added)}, and the model has {rows} rows: it is left out"
            )
        else:
            added.append(token)
    return added


def _differs(old: AddedToken | None, new: AddedToken) -> bool:
    return old is None or old.__getstate__() != new.__getstate__()


def special_tokens_of(backend: Backend, declared: Declared, adds_bos: bool) -> SpecialTokens:
    """Return the added tokens of a pipeline, with the roles and the ends that the files beside it name."""
    added = backend.get_added_tokens_decoder()
    roles = {role: declared.roles.get(role) for role in ROLES}
    texts = {token.content for token in added.values()}
    for role in ("pad", "unk"):  # left out by `_with_rows`, or of a class's default
        roles[role] = roles[role] if roles[role] in texts else None
    return SpecialTokens(
        ids={token.content: i for i, token in added.items() if token.special},
        words={token.content: i for i, token in added.items() if not token.special},
        stops=read_stops(declared.directory),
        adds_bos=adds_bos,
        **roles,
    )


def read_stops(directory: Path) -> frozenset[int]:
    """Return every id that ends a text according to generation_config.json and config.json."""
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
                raise CheckpointError(
                    f"{directory / name}: eos_token_id is {value!r:.60}; it must be an id (a whole number), or a list "
                    "of ids"
                )
            if token_id is not None and token_id >= 0:  # -1 is written for none
                stops.add(token_id)
    return frozenset(stops)


def read_flag(directory: Path, name: str, default: bool) -> bool:
    """Return a true-or-false entry of tokenizer_config.json."""
    value = read_json(directory / CONFIG).get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{directory / CONFIG}: {name} is {value!r:.60}; it must be true or false")
    return value


def read_chat_template(directory: Path, special: SpecialTokens) -> ChatTemplate | None:
    """Read the chat templates in a directory: those in files of their own, else those in tokenizer_config.json."""
    named: dict[str, str] = {}
    if (directory / f"{TEMPLATE}.jinja").is_file():
        named[DEFAULT] = reading.read_text(directory / f"{TEMPLATE}.jinja")
    if (directory / TEMPLATES).is_dir():
        named |= {file.stem: reading.read_text(file) for file in sorted((directory / TEMPLATES).glob("*.jinja"))}
    return chat_template(named or _templates_in(directory / CONFIG), special)


def chat_template(named: Mapping[str, str], special: SpecialTokens) -> ChatTemplate | None:
    """Return templates by name as one, or None where there are none."""
    if not named:
        return None
    others = {name: source for name, source in named.items() if name != DEFAULT}
    return ChatTemplate(named.get(DEFAULT), special.role_texts, others)


def _templates_in(file: Path) -> dict[str, str]:
    value = read_json(file).get(TEMPLATE)
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = [(entry.get("name"), entry.get("template")) for entry in value]
        if all(isinstance(part, str) for pair in named for part in pair):
            return dict(named)
    raise CheckpointError(
        f"{file}: chat_template is {value!r:.60}; it must be a text, or a list of {{name, template}} objects of texts"
    )


def write_tokenizer(directory: Path, backend: Backend, special: SpecialTokens, template: ChatTemplate | None) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates.

    The class named is the generic one, which takes tokenizer.json as it is: transformers 5 rebuilds a "LlamaTokenizer"
    from its vocabulary and so would lose the pre-tokenizer that tokenizer.json states.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Not by the library's own `save`, which raises a bare Exception where the disk is full.
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="\n")
    roles = special.role_texts
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": special.adds_bos,
        "add_eos_token": adds_eos(backend, special),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # the model's limit is in config.json, not here
        **roles,
    }
    if template is not None:
        config |= write_templates(directory, template)
    write_json(directory / CONFIG, config)
    write_json(directory / MAP, roles)


def adds_eos(backend: Backend, special: SpecialTokens) -> bool:
    """Whether a pipeline's post-processor puts eos after a text."""
    encoding = backend.encode("a")
    return encoding.special_tokens_mask[-1:] == [1] and encoding.ids[-1] == special.id_of(special.eos)


def save_template(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer's chat templates alone, where `read_chat_template` finds them: beside an adapter."""
    if tokenizer.chat_template is not None:
        entries = write_templates(directory, tokenizer.chat_template)
        if entries:
            write_json(directory / CONFIG, entries)


def write_templates(directory: Path, template: ChatTemplate) -> dict[str, Any]:
    """Write the chat templates; returns the entries of tokenizer_config.json for them.

    One, the default, is a file of its own, as transformers writes it. Several are a list in tokenizer_config.json,
    which every version of transformers, vLLM and llama.cpp's converter read.
    """
    file = directory / f"{TEMPLATE}.jinja"
    for other in (directory / TEMPLATES).glob("*.jinja"):  # of another tokenizer; they would have the last word
        other.unlink()
    if not template.others:
        file.write_text(template.source or "", encoding="utf-8")
        return {}
    file.unlink(missing_ok=True)
    return {TEMPLATE: [{"name": name, "template": source} for name, source in template.sources.items()]}

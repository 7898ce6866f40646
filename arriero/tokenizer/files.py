"""A tokenizer's directory in Hugging Face's layout: its small JSON files read, all of it written.

tokenizer_config.json names the special tokens and may hold the chat template, special_tokens_map.json is its older
form, chat_template.jinja its newer one, and generation_config.json lists every id that ends a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.files import write_json
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.template import ChatTemplate

ROLES = ("bos", "eos", "pad", "unk")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def token_text(value: Any) -> str | None:
    """Return a token's text from either spelling that is found: "<s>" or {"content": "<s>", ...}."""
    return value.get("content") if isinstance(value, dict) else value


def read_special_tokens(directory: Path, ids: Mapping[str, int], adds_bos: bool) -> SpecialTokens:
    """Read the roles of the special tokens `ids` from the files in a model directory."""
    config = read_json(directory / "tokenizer_config.json")
    older = read_json(directory / "special_tokens_map.json")
    generation = read_json(directory / "generation_config.json")
    roles = {role: token_text(config.get(f"{role}_token", older.get(f"{role}_token"))) for role in ROLES}
    texts = {i: text for text, i in ids.items()}
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return SpecialTokens(
        ids=ids,
        stop=frozenset(texts[i] for i in ends if i in texts),
        adds_bos=bool(config.get("add_bos_token", adds_bos)),
        **roles,
    )


def read_chat_template(directory: Path, special: SpecialTokens) -> ChatTemplate | None:
    """Read chat_template.jinja, or the template in tokenizer_config.json (a text, or a list of named ones)."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), role_texts(special))
    value = read_json(directory / "tokenizer_config.json").get("chat_template")
    if value is None:
        return None
    if isinstance(value, str):
        return ChatTemplate(value, role_texts(special))
    named = {entry["name"]: entry["template"] for entry in value}
    if "default" not in named:
        raise CheckpointError(f"{directory}: none of the chat templates {sorted(named)} is named 'default'")
    return ChatTemplate(named["default"], role_texts(special), tool_source=named.get("tool_use"))


def role_texts(special: SpecialTokens) -> dict[str, str]:
    """Return {"bos_token": "<s>", ...} for the roles that have a token: what templates and config files use."""
    return {f"{role}_token": text for role in ROLES if (text := getattr(special, role)) is not None}


def write_tokenizer(directory: Path, backend: Backend, special: SpecialTokens, template: ChatTemplate | None) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

    The class named is the generic one, which takes tokenizer.json as it is: transformers 5 rebuilds a "LlamaTokenizer"
    from its vocabulary and so would lose the pre-tokenizer that tokenizer.json states.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Not by the library's own `save`, which raises a bare Exception where the disk is full.
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="\n")
    roles = role_texts(special)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": special.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # the model's limit is in config.json, not here
        **roles,
    }
    if template is not None:
        if template.tool_source is None:
            (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        else:
            named = {"default": template.source, "tool_use": template.tool_source}
            config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", roles)

"""Chat templates by name: a file, one of a tokenizer's own, or one that Arriero brings (templates/)."""

from __future__ import annotations

import re
from pathlib import Path

from arriero.errors import CheckpointError, did_you_mean
from arriero.io.paths import as_path, hint, lies_here
from arriero.io.reading import read_text
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.template import BUILTIN_TEMPLATES, ChatTemplate


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template called `name`, with the special tokens of `tokenizer`.

    Tried in order: a file, one of the tokenizer's own by name, a built-in one. Raises CheckpointError for what is none
    of these, and where a built-in one writes a token that the tokenizer lacks.
    """
    file = as_path(name)
    own = {} if tokenizer.chat_template is None else tokenizer.chat_template.sources
    if file.is_file() and (name not in {*own, *BUILTIN_TEMPLATES} or lies_here(name, "the chat template of that name")):
        return ChatTemplate(read_text(file), tokenizer.special.role_texts)
    if name in own:
        return ChatTemplate(own[name], tokenizer.special.role_texts)
    if name not in BUILTIN_TEMPLATES:
        its_own = f", none of the model's own ({', '.join(own)})" if own else ""
        raise CheckpointError(
            f"no chat template {name!r}: it is no file{its_own} and none of {', '.join(BUILTIN_TEMPLATES)}"
            f"{did_you_mean(name, [*own, *BUILTIN_TEMPLATES]) or hint(file)}"
        )
    return builtin_template(name, tokenizer)


def builtin_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a built-in template. Raises CheckpointError where it writes a token that the tokenizer lacks."""
    source = read_text(Path(__file__).parent / "templates" / f"{name}.jinja")
    roles = tokenizer.special.role_texts
    lacking = sorted(set(re.findall(r"<\|\w+\|>", source)) - set(tokenizer.added_ids))
    lacking += [f"its {role}" for role in ("bos_token", "eos_token") if role in source and role not in roles]
    if lacking:
        raise CheckpointError(
            f"the chat template {name!r} writes {', '.join(lacking)}, which this tokenizer does not have as special "
            "tokens, so answers would never end; choose the template that the model was tuned on"
        )
    return ChatTemplate(source, roles)

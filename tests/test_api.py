"""What `import arriero` offers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import arriero
from arriero.errors import ConfigError


def test_importing_arriero_loads_nothing_heavy() -> None:
    script = "import sys, arriero; sys.exit(len({'torch', 'numpy', 'tokenizers', 'tyro', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_type_checkers_and_python_see_the_same_names_from_the_same_homes() -> None:
    tree = ast.parse(Path(arriero.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    assert {node.names[0].asname: node.module for node in imports} == arriero._HOMES
    for name, home in arriero._HOMES.items():
        assert getattr(arriero, name) is getattr(importlib.import_module(home), name)
        assert name in dir(arriero)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'arriero' has no attribute 'lod'"):
        arriero.lod  # noqa: B018


def test_a_misspelt_setting_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'lrr'; did you mean 'lr'"):
        arriero.sft("smollm2-135m", "train.jsonl", lrr=1e-4)
    with pytest.raises(ConfigError, match=r"unknown setting 'token'; did you mean 'tokens'"):
        arriero.pretrain("30m", "shards", token=1e6)
    with pytest.raises(ConfigError, match=r"unknown setting 'windw'; did you mean 'window'"):
        arriero.evaluate("smollm2-135m", "prose.txt", windw=3)


def test_the_example_in_the_docstring_generates(smollm2_gguf: Path) -> None:
    model, tokenizer = arriero.load(smollm2_gguf)
    prompt = arriero.encode_chat(tokenizer, [{"role": "user", "content": "Name the capital city of France."}])
    assert "Paris" in "".join(arriero.stream(model, tokenizer, prompt, max_new_tokens=11))

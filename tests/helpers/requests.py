"""Bodies of every route of the server, for the mutation test (`hostile.py`): each is answered, or refused in 4xx.

A server with a toy model runs in the process of the try and is asked over a real connection. A file is the body that
the route of its name is sent, `v1.chat.completions.json` that of /v1/chat/completions. What is answered with 500 is a
finding, and so is a streamed answer that ends with an event of an error, and one that does not come.
"""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any

from arriero.checkpoint.hf import save_hf
from arriero.errors import UserError
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig
from arriero.serve.config import ServeConfig
from arriero.tokenizer.base import Tokenizer
from helpers.serving import Running

KEY = "k"
USER = {"role": "user", "content": "Hi"}
PART = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}}, "required": ["a"]}
FUNCTION = {"name": "add", "description": "adds", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
MORE = {"top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": -0.1, "logit_bias": {"5": -2.5}}
ALL = {**SAMPLING, **MORE, "n": 2, "stop": ["x", "\n\n"], "user": "u", "max_tokens": 3}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SPOKEN = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
CHOICE = {"type": "function", "function": {"name": "add"}}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
INPUT = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]

BODIES: dict[str, dict[str, Any]] = {
    "v1.completions": {"prompt": ["Hi", "You"], "echo": True, "logprobs": 2, **ALL},
    "v1.completions.stream": {"prompt": [1, 5, 7], "max_tokens": 3, **STREAM},
    "v1.chat.completions": {"messages": [{"role": "system", "content": "s"}, PART], "logprobs": True, **ALL},
    "v1.chat.completions.tools": {
        "messages": SPOKEN, "tools": [TOOL], "tool_choice": CHOICE, "max_completion_tokens": 3,
        "parallel_tool_calls": False, **STREAM,
    },
    "v1.chat.completions.schema": {"messages": [USER], "max_tokens": 3, "response_format": FORM},
    "v1.responses": {
        "input": INPUT, "instructions": "s", "max_output_tokens": 3, "stream": True, "temperature": 0.7, "top_p": 0.9,
        "tools": [{"type": "function", "strict": False, **FUNCTION}],
    },
    "v1.embeddings": {"input": ["Hi", "You"], "encoding_format": "float"},
    "v1.messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "system": "s", "max_tokens": 3,
        "tools": [{"name": "add", "description": "adds", "input_schema": SCHEMA}], "tool_choice": {"type": "any"},
        "stop_sequences": ["x"], "temperature": 0.5, "top_k": 5, "stream": True,
    },
    "v1.messages.count_tokens": {"messages": [USER], "system": [{"type": "text", "text": "s"}]},
    "api.chat": {"messages": [USER], "tools": [TOOL], "options": {"num_predict": 3, **SAMPLING, "stop": ["x"]}},
    "api.generate": {"prompt": "Hi", "system": "s", "format": SCHEMA, "stream": False, "options": {"num_predict": 3}},
    "api.embed": {"input": ["Hi"]},
    "api.show": {},
    "tokenize": {"messages": [USER], "tools": [TOOL]},
    "detokenize": {"tokens": [1, 5, 7]},
    "render": {"messages": [USER, {"role": "assistant", "content": "b"}]},
    "v1.load_lora_adapter": {"lora_name": "mine", "lora_path": "/nowhere"},
    "v1.unload_lora_adapter": {"lora_name": "mine"},
}  # fmt: skip
"""By route, and for some behind the route a word that tells bodies apart."""


def write_requests(tokenizer: Tokenizer, folder: Path) -> None:
    """The bodies, and the model that is asked."""
    for name, body in BODIES.items():
        (folder / f"{name}.json").write_text(json.dumps(body if "lora" in name else {"model": "toy", **body}))
    shape = LlamaConfig(32, 2, 4, 2, 32, tokenizer.vocab_size, 1024)
    save_hf(build_model(shape).init_weights(std=0.15, seed=5), folder / "model", tokenizer)


def read_requests(folder: Path) -> object:
    """Send the one that was changed, which is no link to a valid one; of valid ones all, to warm the server up."""
    changed = [file for file in sorted(folder.glob("*.json")) if file.stat().st_nlink == 1]
    refused = {file.name: why for file in changed if (why := _sent(_server(folder / "model"), file))}
    if len(changed) == 1 and refused:
        raise UserError(str(refused))
    assert len(changed) == 1 or all("lora" in name for name in refused), refused
    return None


def _sent(server: Running, file: Path) -> str:
    """Why it was refused, or ""."""
    route = "/".join(part for part in file.stem.split(".") if part not in ("stream", "tools", "schema"))
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=40)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", f"/{route}", file.read_bytes(), headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if 400 <= response.status < 500 and response.status != 408:
        assert "error" in json.loads(text), text
        return text
    assert response.status == 200, (response.status, text[:2000])
    assert not re.search(r'"error":(?! ?null)', text), text[:2000]
    return ""


_RUNNING: list[Running] = []


def _server(model: Path) -> Running:
    """Of this process, for as long as that lives: over the model of the valid directory, which is read first."""
    if _RUNNING:
        return _RUNNING[0]
    config = ServeConfig(
        model=(f"toy={model}",), port=0, api_key=KEY, max_tokens=5, cache_gb=0.01, max_running=4, timeout=30.0,
        max_body_mb=0.25,
    )  # fmt: skip
    _RUNNING.append(Running(config).__enter__())
    return _RUNNING[0]

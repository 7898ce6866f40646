"""OpenAI's client for JavaScript, unmodified, against the server: chats, streams, calls, responses, refusals.

NODE_MODULES names a node_modules with the package `openai` (npm install openai); without one the test is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")

MODULES = Path(os.environ.get("NODE_MODULES", "node_modules")).resolve()


@pytest.mark.slow  # needs node and a package of npm's
@pytest.mark.skipif(
    shutil.which("node") is None or not (MODULES / "openai").is_dir(),
    reason="node or its package openai is absent: npm install openai, and NODE_MODULES=.../node_modules",
)
def test_the_client_for_javascript_gets_what_the_one_for_python_gets(server, tmp_path):
    program = shutil.copy(Path(__file__).parent / "client.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(MODULES)
    done = subprocess.run(["node", program, server.url], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "base", "max_tokens": 16, "messages": [{"role": "user", "content": "Say hello."}]}
        chat = client.chat.completions.create(**asked, temperature=1, seed=3)
        responded = client.responses.create(model="base", input="Say hello.", max_output_tokens=16, temperature=0)
    assert found["models"] == ["base"]
    assert {found[key] for key in ("chat", "streamed", "helper", "after")} == {chat.choices[0].message.content}
    assert found["completion_tokens"] == chat.usage.completion_tokens
    assert found["call"]["name"] == "get_time"
    assert json.loads(found["call"]["arguments"])["zone"] in ("UTC", "CET")
    assert found["response"] == found["response_streamed"] == responded.output_text
    assert found["embedding"] == 576
    assert found["error"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}

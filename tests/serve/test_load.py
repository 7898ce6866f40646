"""`arriero bench serve` against a server of ours."""

from __future__ import annotations

import pytest

from arriero.cli import main
from arriero.errors import ConfigError, UserError
from arriero.serve.config import LoadConfig
from arriero.serve.load import run_load


def test_a_load_test_counts_what_the_server_counts(server, tmp_path, capfd):
    def counted():
        lines = server.call("/metrics")[1].splitlines()
        return [
            sum(float(li.split()[-1]) for li in lines if li.startswith(f"arriero_{n}_tokens_total"))
            for n in ("generation", "prompt")
        ]

    before = counted()
    seen = []
    config = LoadConfig(url=server.url, clients=(1, 3), requests=2, new_tokens=5, words=(3, 9), system=5)
    levels = run_load(config, lambda levels: seen.append(len(levels)))
    assert [level.total("done") for level in levels] == [2, 6]
    assert [after - b for after, b in zip(counted(), before, strict=True)] == [
        sum(level.total(name) for level in levels) for name in ("tokens", "prompt_tokens")
    ]
    assert len(levels[1].times("first")) == 6
    assert all(0 < t < level.seconds for level in levels for t in level.times("first") + level.times("between"))
    assert {1, 2} <= set(seen)
    plot = tmp_path / "load.png"
    short = ["--requests", "1", "--new-tokens", "3", "--words", "3", "4", "--clients", "1", "2", "--plot", str(plot)]
    assert main(["bench", "serve", "--url", server.url, *short]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capfd.readouterr().out


def test_requests_that_fail_are_told_as_lost(server):
    config = LoadConfig(url=server.url, name="nobody", clients=(2,), requests=1)
    [level] = run_load(config, lambda levels: None)
    assert level.total("done") == 0
    assert len(level.lost) == 2
    assert "no model 'nobody' is served here" in level.lost[0]


def test_only_servers_of_this_machine_are_tested():
    with pytest.raises(ConfigError, match="a load test is for a server on this machine"):
        LoadConfig(url="https://example.org")
    with pytest.raises(UserError, match=r"nothing that speaks OpenAI's API answers at http://127\.0\.0\.1:9"):
        run_load(LoadConfig(url="http://127.0.0.1:9"), lambda levels: None)

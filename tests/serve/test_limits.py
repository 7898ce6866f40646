"""What the server refuses, bounds and survives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
from helpers.serving import Running

from arriero.serve.config import ServeConfig

KEY = "a secret of this test"

MODELS = "/v1/models"

ENDLESS = {"2": -100, "0": -100}  # no end of the turn, no end of the text


def bearer(key=KEY):
    return {"Authorization": f"Bearer {key}"}


def raw(server, *parts, pause=0.0):
    """Bytes sent as they are, and all that comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=40) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def routes(server):
    paths = server.server.config.app.openapi()["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]


def test_every_route_documents_that_it_may_refuse(guarded):
    """So schemathesis asks for; 422, which FastAPI documents by itself, is never answered."""
    for path, methods in guarded.server.config.app.openapi()["paths"].items():
        for operation in methods.values():
            assert {"200", "4XX", "503"} <= set(operation["responses"]) <= {"200", "4XX", "503"}, path


def test_every_route_but_health_needs_the_key(guarded):
    asked = routes(guarded)
    assert len(asked) > 8
    for method, path in asked:
        response = httpx.request(method, guarded.url + path.replace("{name:path}", "base"))
        assert response.status_code == (200 if path == "/health" else 401), path
    assert httpx.get(guarded.url + "/no/such/route").status_code == 401


@pytest.mark.parametrize(
    "headers", [bearer(), {"x-api-key": KEY}, {"Authorization": "Basic " + "YW55OmEgc2VjcmV0IG9mIHRoaXMgdGVzdA=="}]
)
def test_the_key_comes_in_any_of_three_ways(guarded, headers):
    assert guarded.call(MODELS, headers=headers)[0] == 200


@pytest.mark.parametrize(
    "headers", [{}, bearer(KEY + "x"), bearer(""), {"Authorization": "Basic %%%"}, {"x-api-key": "\xff"}]
)
def test_a_wrong_key_is_refused_in_each_apis_shape(guarded, headers):
    status, body, told = guarded.call(MODELS, headers=headers)
    assert (status, body["error"]["type"]) == (401, "authentication_error")
    assert told["www-authenticate"] == "Bearer"


def test_keys_are_compared_in_constant_time():
    """By their digests, so that neither length nor a common beginning shows."""
    from arriero.serve import guard

    seen = []
    compare = guard.hmac.compare_digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
        tried = guard.Guard(None, ServeConfig(model=("x",), api_key="right"), None)
        for key in (b"r", b"right", b"a very long one" * 100):
            headers = {b"x-api-key": [key]}
            try:
                tried._check_key({"method": "GET"}, headers)
            except Exception:
                assert key != b"right"
    assert seen == [(32, 32)] * 3


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:9", "[::1]:80", "llama.example", "LLAMA.example:8080", "10.1.2.3"]
)
def test_hosts_of_this_server_are_answered(guarded, host):
    assert guarded.call("/health", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 403), ("localhost.evil.example", 403), ("a b", 400), ("", 400)]
)
def test_other_hosts_are_refused(guarded, host, status):
    assert guarded.call("/health", headers={"Host": host})[0] == status


def test_pages_of_other_origins_are_refused_and_get_no_cors_headers(guarded):
    for origin in ("https://evil.example", "null", "http://localhost:1", "file://"):
        status, _, told = guarded.call(MODELS, headers={"Origin": origin, **bearer()})
        assert status == 403, origin
        assert "access-control-allow-origin" not in told
    assert guarded.call(MODELS, headers={"Origin": guarded.url, **bearer()})[0] == 200
    status, _, told = guarded.call(MODELS, headers={"Origin": "https://friend.example", **bearer()})
    assert (status, told["access-control-allow-origin"]) == (200, "https://friend.example")


def test_a_preflight_of_an_allowed_origin_is_answered_without_a_key(guarded):
    asked = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    told = httpx.options(guarded.url + MODELS, headers=asked)
    assert told.status_code == 204
    assert "authorization" in told.headers["access-control-allow-headers"]
    assert httpx.options(guarded.url + MODELS, headers={**asked, "Origin": "https://x.example"}).status_code == 403


BODIES = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "not a number": (b'{"temperature": NaN}', 400, "NaN is no number"),
    "a number too large": (b'{"temperature": 1e999}', 400, "too large a number"),
    "an integer too large": (b'{"seed": 99999999999999999999}', 400, "more than 64 bits"),
    "an integer of 5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is no JSON"),
    "deep": (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", 400, "nested deeper than 64"),
    "very deep": (b"[" * 200_000, 400, "nested deeper than 64|no JSON"),
    "half a surrogate pair": (b'{"model": "\\ud800"}', 400, "half of a surrogate pair"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "no JSON"),
    "a list": (b"[]", 400, "valid dictionary"),
    "nothing": (b"", 400, "the request needs a JSON body"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies_are_refused(guarded, name):
    import re

    data, expected, text = BODIES[name]
    status, body, _ = guarded.call("/v1/chat/completions", data, bearer())
    assert status == expected
    assert re.search(text, body["error"]["message"]), body


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(guarded):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\nConnection: close\r\n"
    answer = raw(guarded, head.encode() + b"Content-Type: application/json\r\nContent-Length: 1048577\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the body has 1,048,577 bytes, and may have 1,048,576" in answer


def test_a_body_in_chunks_without_a_length_is_bounded_too(guarded):
    def endless():
        while True:
            yield b" " * 65536

    try:
        status = httpx.post(guarded.url + "/v1/completions", content=endless(), headers=bearer()).status_code
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):  # closed while we were sending
        status = 413
    assert status == 413


def test_floods_of_headers_are_refused(guarded):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    try:
        answer = raw(guarded, head + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 100) for i in range(2000)) + b"\r\n")
    except ConnectionError:  # closed while we were sending
        answer = b"HTTP/1.1 4"
    assert answer.startswith(b"HTTP/1.1 4")
    assert guarded.call("/health")[0] == 200


def test_connections_that_never_finish_their_headers_are_closed(guarded, monkeypatch):
    monkeypatch.setattr("arriero.serve.server.HEADER_SECONDS", 0.5)
    began = time.monotonic()
    assert raw(guarded, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ") == b""
    assert raw(guarded, *[b"G"] * 4, pause=0.2) == b""
    kept = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(guarded, kept, b"GET /health HT", pause=0.1).count(b"200 OK") == 1  # the second request on a connection
    assert time.monotonic() - began < 10


def test_bodies_that_never_come_are_given_up(guarded, monkeypatch):
    monkeypatch.setattr("arriero.serve.guard.BODY_SECONDS", 0.5)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\nConnection: close\r\n"
    answer = raw(guarded, head.encode() + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")


def test_garbage_is_answered_with_400(guarded):
    assert raw(guarded, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_unknown_routes_and_methods_are_told_in_json(guarded):
    status, body, _ = guarded.call("/v1/nothing", headers=bearer())
    assert (status, body["error"]["type"]) == (404, "not_found_error")
    assert httpx.delete(guarded.url + MODELS, headers=bearer()).status_code == 405


def test_a_model_that_is_not_there_yet_is_503_with_retry_after(smollm2_gguf):
    with Running(ServeConfig(model=(f"base={smollm2_gguf}",), port=0, load="asked"), wait=False) as server:
        asked = {"model": "base", "prompt": "x", "max_tokens": 1}
        status, body, told = server.call("/v1/completions", asked)
        assert (status, int(told["retry-after"]) > 0) == (503, True)
        assert "is being loaded" in body["error"]["message"]
        assert server.call("/health")[0] == 200
        assert server.call("/ready")[0] == 503
        while server.call("/ready")[0] == 503:
            time.sleep(0.1)
        assert server.call("/v1/completions", asked)[0] == 200


# With a model


def body(longest=1, **settings):
    return {
        "model": "base",
        "prompt": "Once upon a time",
        "max_tokens": longest,
        "temperature": 0,
        "stop": [],
        **settings,
    }


@contextlib.contextmanager
def changed(server, **settings):
    """The server under other settings for a while."""
    state = server.server.config.app.state.serve
    before = state.config
    object.__setattr__(state, "config", replace(before, **settings))
    try:
        yield
    finally:
        object.__setattr__(state, "config", before)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_prompt_of_a_megabyte_leaves_health_under_a_second(server):
    answers = []
    text = "".join(chr(97 + i % 26) + " " * (i % 3) for i in range(500_000))
    chat = {"model": "base", "messages": [{"role": "user", "content": text}]}
    plain = {"model": "base", "prompt": text}
    every = [("/v1/completions", body(prompt=text)), ("/v1/chat/completions", chat), ("/tokenize", plain)]
    asked = [threading.Thread(target=lambda p=p, b=b: answers.append(server.call(p, b))) for p, b in every]
    for thread in asked:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in asked):
        began = time.monotonic()
        assert server.call("/health")[0] == 200
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert slowest < 1
    assert sorted(status for status, _, _ in answers) == [200, 400, 400]
    assert any(
        "tokens, and the context 8,192" in told["error"]["message"] for status, told, _ in answers if status == 400
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_second(server, stream):
    engine = server.server.models._loaded["base"].engine
    with httpx.Client() as client:
        asked = client.build_request(
            "POST",
            server.url + "/v1/completions",
            json=body(300, n=8, stream=stream, logit_bias=ENDLESS),
        )
        if stream:
            response = client.send(asked, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                asked.extensions["timeout"] = {"connect": 5, "read": 0.3, "write": 5, "pool": 5}
                client.send(asked)
    left = time.monotonic()
    until(lambda: not engine.busy)
    assert time.monotonic() - left < 1
    until(lambda: server.server.models._loaded["base"].driver.load == 0)


def test_clients_that_leave_while_they_wait_or_run_disturb_nobody(server):
    expected = server.call("/v1/completions", body(40))[1]["choices"][0]["text"]

    async def leave_and_stay():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def leaver(after):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(client.post("/v1/completions", json=body(300, n=16, stream=True)), after)

            async def stayer():
                return (await client.post("/v1/completions", json=body(40))).json()["choices"][0]["text"]

            return await asyncio.gather(*(leaver(0.05 * i) for i in range(1, 8)), *(stayer() for _ in range(4)))

    assert asyncio.run(leave_and_stay())[-4:] == [expected] * 4
    until(lambda: not server.server.models._loaded["base"].engine.busy)


def test_a_full_queue_is_429_with_retry_after(server):
    statuses = []

    def ask():
        status, _, told = server.call("/v1/completions", body(100, logit_bias=ENDLESS))
        statuses.append((status, told.get("retry-after")))

    with changed(server, max_running=1, max_waiting=1):
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses.count((200, None)) == 2
    assert statuses.count((429, "1")) == 4


def test_an_answer_that_takes_too_long_is_408(server):
    asked = body(300, n=8, logit_bias=ENDLESS)
    with changed(server, timeout=0.5):
        status, told, _ = server.call("/v1/completions", asked)
        assert (status, told["error"]["type"]) == (408, "timeout_error")
        _, text, _ = server.call("/v1/completions", {**asked, "stream": True})
    assert '"type": "timeout_error"' in text
    assert text.endswith("data: [DONE]\n\n")
    until(lambda: not server.server.models._loaded["base"].engine.busy)


def test_a_request_that_crashes_the_engine_takes_no_other(server, monkeypatch):
    """Steps fail while a certain request is there: the older one beside it does not notice."""
    engine = server.server.models._loaded["base"].engine
    expected = server.call("/v1/completions", body(60))[1]["choices"][0]["text"]
    step = type(engine).step

    def fragile(self):
        if any(666 in asked.request.prompt for asked in self._answers.asked.values()):
            raise RuntimeError("a planted crash")
        return step(self)

    monkeypatch.setattr(type(engine), "step", fragile)
    answers = []
    older = threading.Thread(target=lambda: answers.append(server.call("/v1/completions", body(60))))
    older.start()
    until(lambda: engine.busy)
    status, told, _ = server.call("/v1/completions", body(5, prompt=[1, 666]))
    assert (status, told["error"]["message"]) == (500, "the server failed on this request")
    older.join()
    assert answers[0][1]["choices"][0]["text"] == expected


def test_the_server_counts_what_it_does(server):
    before = server.call("/metrics")[1]
    server.call("/v1/completions", body(7))

    def count(text, name):
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"arriero_{name}"))

    after = server.call("/metrics")[1]
    assert count(after, "generation_tokens_total") - count(before, "generation_tokens_total") == 7
    assert count(after, "time_to_first_token_seconds_count") - count(before, "time_to_first_token_seconds_count") == 1
    assert count(after, "inter_token_latency_seconds_count") - count(before, "inter_token_latency_seconds_count") == 6
    assert "arriero_requests_running" in after
    assert "arriero_kv_cache_usage_ratio" in after


def test_prompts_are_not_logged(server, capfd):
    server.call("/v1/completions", body(3, prompt="a very private matter"))
    told = capfd.readouterr()
    assert "private" not in told.out + told.err


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_exits_with_0(smollm2_gguf):
    command = [sys.executable, "-m", "arriero", "serve", f"base={smollm2_gguf}", "--port", "0", "--drain", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        url = process.stdout.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:")
        while httpx.get(url + "/ready").status_code != 200:
            time.sleep(0.1)
        told = []

        def ask():
            with httpx.stream("POST", url + "/v1/completions", json=body(200, stream=True), timeout=60) as response:
                told.extend(response.iter_lines())

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: len(told) > 3, 30)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert told[-2:] == ["data: [DONE]", ""]
        assert json.loads(told[-4].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

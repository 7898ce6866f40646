"""The server under the load of chats, against llama.cpp's own server, each started, asked and stopped in turn.

    python bench/serve.py --llama PATH/llama-server [--kinds bf16 int8] [--only arriero llama.cpp] [--rounds 2]
    python bench/serve.py --in-process      llama.cpp's batches without any server: what its server cannot exceed
    python bench/serve.py --soak 5000 [--kinds int8]

16 clients, each with prompts of 200 to 400 tokens behind a shared system prompt of 150, 128 new tokens, by either
server's default sampling; ends of answers are biased away, so that both make the same number. Then a prompt of 2,000
tokens comes while 16 chats are answered: times between their tokens before, and until its first token. --crowd 64 tries
that many clients. --soak asks so many unique requests of 16 tokens with log-probabilities and looks at RssAnon and swap
after the first 500 and at the end.

The files are the built-in model in bf16 and as Q8_0; --quantize int8 is Arriero's counterpart of the latter. Arriero's
CPU seconds are those of its threads by name: the event loop and the threads of prompts are the server's own, all others
the engine's. Clients are threads of this process, and take their share of the same cores. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from peers import LlamaCpp

from arriero.checkpoint.convert import convert
from arriero.serve.config import LoadConfig, ServeConfig
from arriero.serve.load import WORDS, Told, ask, run_load

SYSTEM, WORDS_OF_PROMPT, NEW = 139, (48, 248), 128
"""Words of the prompts, nearly all of one token: with the template 150 of the system prompt, 200 to 400 in all."""
ENDS = {"0": -100, "2": -100}  # the ids that end SmolLM2's answers
LONG = 2000
SOAKED = 0.25  # gigabytes of cache in a long run: full before request 500, since what fills the budget is no growth
GGUF = {"bf16": "bf16", "int8": "q8_0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", default="", help="a llama-server, built natively")
    parser.add_argument("--kinds", nargs="+", default=["bf16", "int8"], choices=list(GGUF))
    parser.add_argument("--only", nargs="+", default=["arriero", "llama.cpp"], choices=["arriero", "llama.cpp"])
    parser.add_argument("--activation-bits", type=int, default=15, choices=[8, 15], help="of Arriero's int8")
    parser.add_argument("--in-process", action="store_true", help="llama.cpp's own batches, where no llama-server is")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="chats of each client")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--crowd", type=int, default=0, help="clients of a last load, without a peer")
    parser.add_argument("--soak", type=int, default=0, help="requests of a long run, instead of all else")
    parser.add_argument("--mixed", type=int, default=0, help="MIXED_TOKENS of serve/models.py; 0: as it is")
    parser.add_argument("--files", default="", help="keep the files there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    result: dict[str, Any] = {"bench": "serve", "clients": args.clients, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(args.files or folder)
        for kind in args.kinds:
            for name in args.only if args.llama or args.in_process else ["arriero"]:
                if name == "llama.cpp" and args.in_process:
                    result[f"{name} {kind}"] = in_process(gguf(files, kind), args)
                    continue
                with started(name, kind, files, args) as server:
                    found = server.soak(args.soak) if args.soak else server.measured(args)
                result[f"{name} {kind}"] = found
                print(name, kind, json.dumps(found), file=sys.stderr, flush=True)
            ours, theirs = (result.get(f"{name} {kind}") for name in ("arriero", "llama.cpp"))
            if ours and theirs:
                result[f"ratio {kind}"] = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2)
    print(json.dumps(result))


# The servers


class Server:
    """One that runs: its process and its address."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, report: Path | None) -> None:
        self.process, self.port, self.report = process, port, report
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of the server's own threads and of all others; {} of a server that is not ours."""
        if self.report is None:
            return {}
        self.report.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        while not self.report.exists():
            time.sleep(0.05)
        found: dict[str, float] = json.loads(self.report.read_text())
        return found

    def measured(self, args: argparse.Namespace) -> dict[str, Any]:
        """Everything but the long run."""
        model = json.loads(self.call("/v1/models")[1])["data"][0]["id"]
        self.call("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8})  # warms up
        before = self.cpu()
        found = self.load(args.clients, args.rounds, seed=2)
        if before:
            own, engine = (self.cpu()[who] - before[who] for who in ("own", "engine"))
            found |= {"own_cpu_s": round(own, 2), "engine_cpu_s": round(engine, 2), "own_share": round(own / engine, 4)}
            found["tokens_per_cpu_s"] = round(found["tokens"] / (own + engine), 1)
        print(json.dumps(found), file=sys.stderr, flush=True)
        found |= self.interrupted(args.clients)
        if args.crowd and self.report is not None:
            found[f"crowd of {args.crowd}"] = self.load(args.crowd, 1, seed=3)
        return found

    def load(self, clients: int, requests: int, seed: int) -> dict[str, Any]:
        config = LoadConfig(
            url=self.url, clients=(clients,), requests=requests, system=SYSTEM, words=WORDS_OF_PROMPT, new_tokens=NEW,
            seed=seed,
        )  # fmt: skip
        [level] = run_load(config, lambda levels: None, {"logit_bias": ENDS})
        tokens = level.total("tokens")
        return {
            "tokens_per_s": round(tokens / level.seconds, 1),
            "answers": level.total("done"), "lost": len(level.lost), "tokens": tokens,
            "prompt_tokens": level.total("prompt_tokens"),
            "first_ms": percentiles(level.times("first")), "between_ms": percentiles(level.times("between")),
        }  # fmt: skip

    def interrupted(self, clients: int) -> dict[str, Any]:
        """Times between tokens of chats under way, before a long prompt comes and until its first token."""
        model = json.loads(self.call("/v1/models")[1])["data"][0]["id"]
        rng = random.Random(7)
        told = [Told() for _ in range(clients)]

        def chat(words: int, new: int, of: Told) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            body = {
                "model": model, "max_tokens": new, "stream": True, "logit_bias": ENDS,
                "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=words))}],
            }  # fmt: skip
            ask(connection, {"Content-Type": "application/json"}, body, of)
            connection.close()

        threads = [threading.Thread(target=chat, args=(20, NEW, each)) for each in told]
        for thread in threads:
            thread.start()
        while not all(len(each.between) >= 20 for each in told):
            time.sleep(0.005)
        come, late = time.perf_counter(), Told()
        chat(LONG - 20, 4, late)
        first = come + late.first[0]
        for thread in threads:
            thread.join()
        begun = max(each.at[0] for each in told)  # until then prompts of the chats themselves came
        gaps = [(at, gap) for each in told for at, gap in zip(each.at, each.between, strict=True)]
        quiet = [gap for at, gap in gaps if begun < at - gap and at < come]
        meanwhile = [gap for at, gap in gaps if at > come and at - gap < first]
        return {
            "long_first_ms": round(1000 * late.first[0]),
            "between_before_ms": percentiles(quiet), "between_while_long_ms": percentiles(meanwhile),
        }  # fmt: skip

    def soak(self, requests: int) -> dict[str, Any]:
        """Unique requests, eight at a time: what memory is left with each."""
        model = json.loads(self.call("/v1/models")[1])["data"][0]["id"]
        memory: list[int] = []
        lock, left = threading.Lock(), iter(range(requests))

        def client() -> None:
            while True:
                with lock:
                    i = next(left, None)
                if i is None:
                    return
                rng = random.Random(i)
                prompt = f"{i}: " + " ".join(rng.choices(WORDS, k=12))
                body = {"model": model, "prompt": prompt, "max_tokens": 16, "logprobs": 5, "logit_bias": ENDS}
                status, text = self.call("/v1/completions", body)
                assert status == 200, text[:200]
                with lock:
                    memory.append(self.memory())

        threads = [threading.Thread(target=client) for _ in range(8)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        early, end = memory[min(500, requests // 2)], max(memory[-50:])
        return {
            "requests": requests, "seconds": round(time.perf_counter() - began), "mb_after_500": early // 1000,
            "mb_at_end": end // 1000, "growth": round(end / early - 1, 4),
            "mb_every_500": [kilobytes // 1000 for kilobytes in memory[::500]],
        }  # fmt: skip

    def memory(self) -> int:
        """Kilobytes of anonymous memory and swap."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{q}": round(1000 * float(np.percentile(seconds or [np.nan], q)), 1) for q in (50, 95)}


@contextmanager
def started(name: str, kind: str, files: Path, args: argparse.Namespace) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report = None
    if name == "arriero":
        if not (files / "model").exists():
            convert("smollm2-135m", files / "model", to="hf", dtype="bf16")
        report = files / f"cpu-{port}.json"
        config = {
            "model": [str(files / "model")], "port": port, "quantize": "" if kind == "bf16" else kind,
            "max_waiting": 1024, "mixed": args.mixed, "activation_bits": args.activation_bits,
            **({"cache_gb": SOAKED} if args.soak else {}),
        }  # fmt: skip
        command = [sys.executable, __file__, "--child", json.dumps(config), str(report)]
    else:
        path = gguf(files, kind)
        n = args.clients + 1  # and the long prompt
        command = [
            args.llama,
            "-m",
            str(path),
            "--port",
            str(port),
            "--parallel",
            str(n),
            "--threads",
            str(args.threads),
        ]
        command += ["--ctx-size", str(1024 * n + 2048), "--kv-unified"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    server = Server(process, port, report)
    try:
        while True:
            time.sleep(0.1)
            if process.poll() is not None:
                raise SystemExit(f"{name} did not start: {' '.join(command)}")
            try:
                if server.call("/ready" if name == "arriero" else "/health")[0] == 200:
                    break
            except OSError:
                pass
        yield server
    finally:
        process.terminate()
        process.wait(60)


def gguf(files: Path, kind: str) -> Path:
    if not (path := files / f"{kind}.gguf").exists():
        convert("smollm2-135m", path, to="gguf", dtype=GGUF[kind])  # type: ignore[arg-type]
    return path


def in_process(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same chats in batches of llama.cpp's library, without a server's work; the shared prompt is computed once."""
    clients, rng = args.clients, random.Random(2)
    library = LlamaCpp(path, clients, 1024 * clients, 2048, args.threads)
    c, context, decode = library.c, library.context, library.forward
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(library.model))
    chain = library.sampler(
        c.llama_sampler_init_top_k(40), c.llama_sampler_init_top_p(0.95, 1), c.llama_sampler_init_temp(0.8),
        c.llama_sampler_init_dist(1),
    )  # fmt: skip
    first, between, began, cpu = [], [], time.perf_counter(), time.process_time()
    for _ in range(args.rounds):
        c.llama_memory_clear(library.memory, True)
        asked = time.perf_counter()
        decode([(rng.randrange(vocabulary), p, 0, False) for p in range(150)])
        for s in range(1, clients):
            c.llama_memory_seq_cp(library.memory, 0, s, -1, -1)
        last, ends = [], []
        for s in range(clients):
            end = 150 + rng.randint(50, 250)
            decode([(rng.randrange(vocabulary), p, s, p == end - 1) for p in range(150, end)])
            last.append(c.llama_sampler_sample(chain, context, -1))
            ends.append(end)
            first.append(time.perf_counter() - asked)
        for step in range(NEW - 1):
            before = time.perf_counter()
            decode([(token, ends[s] + step, s, True) for s, token in enumerate(last)])
            last = [c.llama_sampler_sample(chain, context, s) for s in range(clients)]
            between.append(time.perf_counter() - before)
    seconds, cpu, tokens = time.perf_counter() - began, time.process_time() - cpu, args.rounds * clients * NEW
    return {
        "tokens_per_s": round(tokens / seconds, 1), "tokens_per_cpu_s": round(tokens / cpu, 1),
        "first_ms": percentiles(first), "between_ms": percentiles(between),
    }  # fmt: skip


def child(settings: str, report: str) -> None:
    """Serve, and tell on SIGUSR1 what the threads have cost."""
    from arriero.serve import models
    from arriero.serve.server import serve

    def tell(*_: object) -> None:
        names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
        cost = {"own": 0.0, "engine": 0.0}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            own = names.get(task.name, "").startswith(("MainThread", "arriero-prompts"))
            cost["own" if own else "engine"] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        part = Path(report + ".part")
        part.write_text(json.dumps(cost))
        part.rename(report)

    signal.signal(signal.SIGUSR1, tell)
    given = json.loads(settings)
    models.MIXED_TOKENS = given.pop("mixed") or models.MIXED_TOKENS
    serve(ServeConfig(**given | {"model": tuple(given["model"])}))


if __name__ == "__main__":
    main()

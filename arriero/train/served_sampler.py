"""Answers by a server that is there: vLLM's, or `arriero serve`: `--rollout http://HOST:PORT`.

vLLM's HTTP interface: the adapter is written in PEFT's layout into RUN/served, loaded by its path under a new name (so
that no cached prompt of older weights is taken for one of these), and the one before is unloaded. Prompts and answers
are token ids. The server has to see the run's directory under the same path, and to have the same base: with another
one, `mismatch` stops the run in its first step. `arriero serve` in fp32 gives the bits of an engine in this process.

Price: an adapter's few megabytes on disk, and JSON for each answer. Only adapters: all weights of a model would have to
go through a file at each step. Not run against vLLM itself here, which needs a GPU: against `arriero serve`, which has
the same routes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from arriero.checkpoint.adapter import save_adapter
from arriero.errors import ConfigError, TrainingError, UserError, check
from arriero.infer.answer_text import AnswerText
from arriero.infer.request import Completion, Request, TokenLogprob
from arriero.io.http import Refused, send
from arriero.tokenizer.base import Tokenizer
from arriero.train.sampler import Sampler

KEY = "OPENAI_API_KEY"
SECONDS = 600.0  # for the answers to one prompt, waiting for others included
START = "vllm serve MODEL --enable-lora --logprobs-mode processed_logprobs, or arriero serve MODEL --api-key KEY"


class ServedSampler(Sampler):
    """A `Sampler` whose engine is behind a URL."""

    def _open(self, longest: int, at_once: int) -> None:
        base = self.tuned.base
        rollout = base.config.rollout  # type: ignore[attr-defined]
        check(
            self._lora,
            f"rollout is {rollout.rollout} and method {base.config.method}: a server is sent adapters; set method to "
            "lora, or rollout to here or ray",
        )
        self._url, self._directory = rollout.rollout.rstrip("/"), Path(base.config.out).resolve() / "served"
        self._threads = ThreadPoolExecutor(max(1, at_once // rollout.answers), "rollouts")
        self._base = self._only_model()
        self._name = self._base  # what answers: the base, until there is an adapter
        if rollout.temperature != 1:
            self._check_tempered(rollout.temperature)

    @property
    def memory(self) -> Mapping[str, int]:
        """Nothing is held in this process."""
        return {"weights": 0, "cache": 0}

    @property
    def summary(self) -> str:
        """Who answers."""
        return f"{self._base} at {self._url}"

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """A new name for each: of those that are loaded, one remains."""
        before, self._name = self._name, f"arriero-{uuid4().hex[:12]}"
        path, base = self._directory / self._name, self.tuned.base
        assert base.lora is not None, "checked in _open"
        save_adapter(tensors, path, base.lora, base.config.model)
        self._send("/v1/load_lora_adapter", {"lora_name": self._name, "lora_path": str(path)})
        if before != self._base:
            self._send("/v1/unload_lora_adapter", {"lora_name": before})
            shutil.rmtree(self._directory / before, ignore_errors=True)

    def _ask(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return list(self._threads.map(self._answers, requests))

    def _answers(self, request: Request) -> list[Completion]:
        stops = sorted(self.tuned.base.tokenizer.stop_ids if request.stop_ids is None else request.stop_ids)
        body = {
            "model": self._name, "prompt": list(request.prompt), "n": request.n, "max_tokens": request.max_new_tokens,
            "temperature": request.sampling.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "seed": request.sampling.seed, "logprobs": 0, "stop_token_ids": stops, "return_token_ids": True,
        }  # fmt: skip
        choices = self._send("/v1/completions", body)["choices"]
        found = [completion(choice, stops, self.tuned.base.tokenizer) for choice in sorted(choices, key=_index)]
        if len(found) != request.n:
            raise TrainingError(f"{self._url} gave {len(found)} answers to a prompt, and was asked for {request.n}")
        return found

    # -- the server ------------------------------------------------------------------------------------------------

    def _only_model(self) -> str:
        """The name of the base that is served."""
        try:
            served = send(f"{self._url}/v1/models", key=KEY, seconds=10)
            names = [str(entry["id"]) for entry in served["data"] if not entry.get("parent")]
        except Refused as error:
            raise UserError(f"{self._url}/v1/models refuses ({error}); {KEY} has to hold the server's key") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"nothing that serves a model answers at {self._url} ({error}); start {START}") from error
        if len(names) != 1:
            raise ConfigError(
                f"{self._url} serves {', '.join(names) or 'no model'}; serve one, the base, for a rollout"
            )
        return names[0]

    def _check_tempered(self, temperature: float) -> None:
        """Log-probabilities have to be of what was drawn from: the most probable token's grows as it gets colder."""
        tokenizer = self.tuned.base.tokenizer
        asked = {
            "model": self._base, "prompt": [*tokenizer.begin_ids, *tokenizer.encode("The")], "max_tokens": 1, "seed": 0,
            "logprobs": 1,
        }  # fmt: skip
        of = [
            max(
                self._send("/v1/completions", {**asked, "temperature": t})["choices"][0]["logprobs"]["top_logprobs"][
                    0
                ].values()
            )
            for t in (1.0, temperature)
        ]
        if abs(of[0] - of[1]) < 1e-4:
            raise ConfigError(
                f"temperature is {temperature:g}, and {self._url} gives log-probabilities as they are before it; start "
                "vLLM with --logprobs-mode processed_logprobs, or set temperature to 1"
            )

    def _send(self, path: str, body: Any) -> Any:
        try:
            return send(self._url + path, body, key=KEY, seconds=SECONDS)
        except Refused as error:
            raise TrainingError(f"{self._url}{path} refuses ({error.code}): {error.text}") from error
        except ValueError as error:  # no JSON: vLLM answers loading and unloading in a sentence
            if path.endswith("_lora_adapter"):
                return None
            raise TrainingError(f"{self._url}{path} gave no JSON ({error})") from error
        except OSError as error:
            raise TrainingError(
                f"{self._url}{path} does not answer ({error}); start the server and resume the run: what was answered "
                "is in its journal"
            ) from error


def completion(choice: Mapping[str, Any], stops: Sequence[int], tokenizer: Tokenizer) -> Completion:
    """An answer of vLLM's completions. Raises `ConfigError` for one that lacks what training needs."""
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if ids is None or logprobs is None or len(ids) != len(logprobs):
        raise ConfigError(
            "the server gives no ids of the tokens that it chose (return_token_ids), or not a log-probability of each; "
            "vLLM does from 0.10.2 on, and arriero serve"
        )
    ended = choice["finish_reason"] == "stop"
    if ended and (not ids or ids[-1] not in stops):
        raise ConfigError(
            f"the server ended an answer at token {ids[-1] if ids else None}, which ends none here "
            f"({', '.join(map(str, stops))} do); its generation_config.json is another"
        )
    answer = AnswerText(tokenizer, ())
    kept = ids[:-1] if ended else ids
    text = "".join([*map(answer.push, kept), answer.flush()])
    given = [TokenLogprob(float(value), float(value)) for value in logprobs]
    return Completion(list(kept), text, "stop" if ended else "length", ids[-1] if ended else None, given)


def _index(choice: Mapping[str, Any]) -> int:
    return int(choice["index"])

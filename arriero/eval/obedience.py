"""Whether a model still obeys what was asked in the first turn, some turns later: `arriero eval obedience`.

Each dialogue gets an instruction of a kind that a rule can judge (data/instructions.py), in its first message alone;
the user's turns follow, each after the model's own answers. Reported are the share of answers that obey, at each turn
and over all turns but the first: what ghost attention (Llama 2, arXiv 2307.09288, section 3.3) is for. The instructions
are a function of the seed and the dialogue's place, so that two models are held to the same.
Price: an answer a turn; what was said before stays in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from arriero.data.instructions import BUILT_IN, Dialogue, Messages, draw, joined, obeys, read_dialogues
from arriero.errors import ConfigError, DataError
from arriero.eval.bootstrap import Ratio, ratio
from arriero.eval.config import ObedienceConfig
from arriero.eval.results import OBEYED_AT, Results, Sample
from arriero.eval.run import before_and_after, tell
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.io.files import make_output
from arriero.model.llama import Llama
from arriero.show.progress import progress
from arriero.show.terminal import output
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat


def run_obedience(config: ObedienceConfig, console: Console | None = None) -> Results:
    """Measure `config.model` (after `compare_with`, where given), print the table, write the files.

    Raises a `UserError` for settings that name nothing, and for rows that are no dialogues.
    """
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ConfigError(f"eval obedience: no {name} given; run: arriero eval obedience MODEL --data FILE")
    console = console or output()
    if config.out:
        make_output(Path(config.out))
    dialogues = draw(read_dialogues(config.data)[: config.rows or None], BUILT_IN, config.most, config.seed)
    if all(len(d.turns) < 2 for d in dialogues):
        raise DataError(f"{config.data}: no dialogue has a second turn of the user, so nothing could be forgotten")

    def measure(model: Llama, tokenizer: Tokenizer, name: str) -> Results:
        return obedience(model, tokenizer, dialogues, config, name)

    before, after = before_and_after(measure, config)
    tell(config, before, after, console)
    return after


def obedience(
    model: Llama, tokenizer: Tokenizer, dialogues: Sequence[Dialogue], config: ObedienceConfig, name: str = ""
) -> Results:
    """Lead all dialogues, turn by turn, and judge the answers."""
    began = time.monotonic()
    engine = Engine(model.requires_grad_(False), tokenizer, max_running=config.at_once, step_tokens=512)
    talks: list[Messages] = [[] for _ in dialogues]
    obeyed: list[list[float]] = [[] for _ in dialogues]
    with progress(f"measuring {name}", sum(len(d.turns) for d in dialogues)) as bar:
        for turn in range(max(len(d.turns) for d in dialogues)):
            asked = [i for i, d in enumerate(dialogues) if turn < len(d.turns)]
            for i in asked:
                text = dialogues[i].turns[turn]
                told = turn == 0 or config.every_turn
                said = joined(dialogues[i].instruction, text) if told else text
                talks[i].append({"role": "user", "content": said})
            for i, answer in zip(asked, engine.generate(_requests(tokenizer, talks, asked, turn, config)), strict=True):
                text = answer[0].text.strip()
                talks[i].append({"role": "assistant", "content": text})
                obeyed[i].append(float(obeys(dialogues[i], text) or False))
                bar.advance()
    return Results(name, _ratios(obeyed), _samples(talks, dialogues, obeyed), len(dialogues), time.monotonic() - began)


def _requests(
    tokenizer: Tokenizer, talks: Sequence[Messages], asked: Sequence[int], turn: int, config: ObedienceConfig
) -> list[Request]:
    return [
        Request(
            encode_chat(tokenizer, talks[i]),
            config.max_new_tokens,
            SamplingConfig(temperature=config.temperature, seed=(config.seed << 40) + (turn << 32) + i),
        )
        for i in asked
    ]


def _ratios(obeyed: Sequence[Sequence[float]]) -> dict[str, Ratio]:
    """The share that obeys over all turns but the first, and at each turn, by dialogue."""
    found = {"obeyed": ratio([sum(each[1:]) for each in obeyed], [len(each[1:]) for each in obeyed])}
    for turn in range(max(map(len, obeyed))):
        there = [each[turn : turn + 1] for each in obeyed]
        found[f"{OBEYED_AT}{turn + 1}"] = ratio([sum(each) for each in there], [len(each) for each in there])
    return found


def _samples(
    talks: Sequence[Messages], dialogues: Sequence[Dialogue], obeyed: Sequence[Sequence[float]]
) -> list[Sample]:
    found = []
    for talk, dialogue, each in zip(talks, dialogues, obeyed, strict=True):
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        judged = enumerate(zip(answers, each, strict=True), 1)
        shown = "\n".join(f"{turn}. {'obeys' if ok else 'does not'}: {text}" for turn, (text, ok) in judged)
        share = sum(each[1:]) / max(len(each) - 1, 1)
        found.append(Sample(str(talk[0]["content"]), dialogue.instruction, shown, {"obeyed": share}))
    return found

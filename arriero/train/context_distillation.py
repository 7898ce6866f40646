"""Context distillation's data (Llama 2, arXiv 2307.09288, section 4.2.4): behind `arriero data build distill`.

A prompt is answered under a preprompt ("You are a careful assistant ..."), and the row that is learned has the answer
without it: the model comes to answer as if it had been told. With a reward, the prompt is answered without the
preprompt as well, and a row is kept only where the reward prefers the answer under it; at Meta the safety reward
decided, on adversarial prompts alone, as a preprompt makes answers to others worse. Preprompts may differ by risk
category, as there: by the field `category` of a row.

Price: one generation a prompt, two with a reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

from arriero.data.prompts import Prompt, Prompts
from arriero.errors import DataError, did_you_mean
from arriero.eval.verified import to_score
from arriero.rewards.base import Score, Scorer
from arriero.train.answering import Answering, Messages


def build_distill(
    prompts: Prompts, preprompts: Mapping[str, str], answering: Answering, scorer: Scorer | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows (`prompt`, `completion`), and how many prompts were left out and why.

    preprompts: by category; under "" the one of all rows.
    """
    under = [with_preprompt(prompt.messages, preprompt_of(prompt, preprompts)) for prompt in prompts]
    told = answering(under, "under")
    plain = answering([prompt.messages for prompt in prompts], "plain") if scorer else [None] * len(prompts)
    asked = [
        to_score(prompt, answer)
        for prompt, *pair in zip(prompts, told, plain, strict=True)
        for answer in pair
        if answer is not None
    ]
    scores: Iterator[Score | None] = iter(scorer(asked)) if scorer else repeat(None)
    left_out: Counter[str] = Counter()
    rows = []
    for prompt, answer in zip(prompts, told, strict=True):
        better, worse = next(scores), next(scores)
        if not (answer.stopped and answer.text.strip()):
            left_out["cut or empty"] += 1
            continue
        meta: dict[str, Any] = {"source": prompt.where}
        if better is not None and worse is not None:
            if better.value <= worse.value or better.outcome != "scored":
                left_out["not preferred"] += 1
                continue
            meta |= {"reward": better.value, "reward_without": worse.value}
        rows.append({"prompt": prompt.messages, "completion": answer.text.strip(), "meta": meta})
    return rows, left_out


def preprompt_of(prompt: Prompt, preprompts: Mapping[str, str]) -> str:
    """The preprompt of a row's category; raises `DataError` where there is none."""
    category = str(prompt.fields.get("category", ""))
    text = preprompts.get(category, preprompts.get(""))
    if text is None:
        raise DataError(
            f"{prompt.where}: there is no preprompt for the category {category!r}{did_you_mean(category, preprompts)}; "
            'add it, or one under "" for all others'
        )
    return text


def with_preprompt(messages: Messages, text: str) -> Messages:
    """A conversation under a preprompt: before its system message, or as one."""
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]

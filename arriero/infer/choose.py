"""What follows from the logits of a step: tokens that are chosen or verified, and log-probabilities of prompts."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from arriero.infer.answers import Answer, Asked
from arriero.infer.request import TokenLogprob
from arriero.infer.sample import Chosen, sample, score
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.scheduler import Part, Sequence
from arriero.infer.speculate import verify
from arriero.infer.step import Share

SPECULATIVE_ROWS = 16
"""Tokens of a step with proposals: more would cost as much as they may gain."""


def propose(running: list[Sequence], speculate: int) -> None:
    """Let those that are being answered say what may follow, as many rows as a step takes at little more cost."""
    decoding = [sequence for sequence in running if sequence.left == 1]
    most = min(speculate, SPECULATIVE_ROWS // max(len(decoding), 1) - 1)
    for sequence in decoding:
        answer = sequence.owner
        if not sequence.followers:  # which take over its blocks as they are behind the prompt
            sequence.proposed = answer.proposals.propose()[: max(0, min(most, answer.asked.room - answer.n_new - 1))]


def choose(
    ready: list[tuple[Sequence, range]], logits: Tensor, share: Share | None
) -> list[tuple[Answer, Chosen, range]]:
    """The tokens that follow each sequence: one, and those proposed that would have followed.

    ready: sequences with the logits that are theirs. Returns each one's answer, and which of `Chosen` are its tokens.
    """
    if not ready:
        return []
    wanted = [i for _, rows in ready for i in rows]
    if wanted != list(range(len(logits))):
        logits = logits[wanted]
    answers: list[Answer] = [sequence.owner for sequence, _ in ready]
    rows = [answer.row for answer in answers]
    proposals = [sequence.proposed for sequence, _ in ready]
    if not any(proposals):
        chosen = sample(logits, rows, share)
        return [(answer, chosen, range(i, i + 1)) for i, answer in enumerate(answers)]
    verified = verify(logits, rows, proposals, [answer.constraint for answer in answers], share)
    for answer, proposed, each in zip(answers, proposals, verified, strict=True):
        if proposed and answer.proposals is not None:
            answer.proposals.learn(len(proposed), len(each.ids) - 1)
        answer.sequence.proposed = []
    return [(answer, each, range(len(each.ids))) for answer, each in zip(answers, verified, strict=True)]


def logprob(answer: Answer, chosen: Chosen, i: int) -> TokenLogprob | None:
    """Of the token that was chosen in row i, where the request asks for it."""
    request = answer.asked.request
    if request.logprobs is None:
        return None
    return TokenLogprob(float(chosen.raw[i]), float(chosen.sampled[i]), _pairs(chosen, i), request.top_of)


def score_prompt(part: Part, logits: Tensor, words: np.ndarray | None, share: Share | None) -> None:
    """Give a request the log-probabilities of the tokens of its prompt that these logits are before.

    words: as in `SamplerRow`; how many of the most probable tokens are listed is the request's.
    """
    asked: Asked = part.sequence.owner.asked
    at, request = part.scored_from, asked.request
    targets = part.sequence.ids[at : at + len(part.scores)]
    ours = logits[part.scores.start : part.scores.stop]
    row = SamplerRow(request.sampling, seed=0, words=words, n_top=request.prompt_logprobs or 0)
    found = score(ours, targets, row, share)
    begin = at - request.prompt_logprobs_from  # after an interruption they may be there already
    asked.prompt_logprobs[begin:] = [TokenLogprob(float(raw), top=_pairs(found, i)) for i, raw in enumerate(found.raw)]


def _pairs(chosen: Chosen, i: int) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of row i with their log-probabilities."""
    ids, logprobs = chosen.top[i]
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))

"""pass@k: the chance that at least one of k answers is right, without bias, from n >= k answers.

With c right ones among n, pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374, section 2.1);
1 - (1 - c/n)^k would be biased downwards. Right means full score: a value of 1 or more.
"""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """The estimate of one prompt from c right answers among n. k: at most n."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1.0 - comb(n - c, k) / comb(n, k)


def is_right(value: float) -> bool:
    """Whether a score is the full one."""
    return value >= 1.0

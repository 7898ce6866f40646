import pytest
import torch

from arriero.distributed import context
from arriero.distributed.context import HeldDocuments, held_tokens
from arriero.model.attention import naive_attention
from arriero.model.layout import Documents


class Group:
    """What HeldDocuments asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_each_process_holds_an_early_and_a_late_chunk_and_all_hold_equally_much():
    assert held_tokens(12, 0, 3).tolist() == [0, 1, 10, 11]
    assert held_tokens(12, 1, 3).tolist() == [2, 3, 8, 9]
    held = [held_tokens(84, rank, 7) for rank in range(7)]
    assert sorted(torch.cat(held).tolist()) == list(range(84))
    assert len({int((tokens + 1).sum()) for tokens in held}) == 1  # pairs visible under a causal mask


@pytest.mark.parametrize(
    "leads", [(-1,) * 6, (-1, 0, 0, 0, 0, 0), (-1, 0, 1, 0, 3, -1)], ids=["apart", "prompt", "tree"]
)
def test_attention_over_parts_equals_attention_over_the_whole(leads, monkeypatch):
    torch.manual_seed(3)
    size, length = 3, 42
    documents = Documents.of((5, 0, 1, 17, 17, 2), leads)
    q, k, v = (torch.randn(1, length, heads, 8) for heads in (6, 2, 2))
    expected = naive_attention(q, k, v, documents.bounds, documents.leads)
    held = [held_tokens(length, rank, size) for rank in range(size)]
    whole = {2 * 2 * 8 * 14: torch.cat([torch.stack((k[0, mine], v[0, mine]), 1) for mine in held])}
    monkeypatch.setattr(context, "all_gather", lambda out, part, group: out.copy_(whole[part.numel()]))
    for rank, mine in enumerate(held):
        layout = HeldDocuments(documents, Group(rank, size))
        assert torch.equal(layout.positions, documents.positions[:, mine])
        ours = layout.attention(0)(q[:, mine], k[:, mine], v[:, mine])
        torch.testing.assert_close(ours, expected[:, mine], atol=1e-6, rtol=1e-5)

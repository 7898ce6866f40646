import torch
from helpers.parallel import toy_batch

from arriero.data.loader import IGNORED
from arriero.distributed import context
from arriero.distributed.context import ContextAttention, held_tokens, padded, without_prefix
from arriero.model.attention import document_positions, naive_attention
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.train.objectives import lm_loss


class Group:
    """What ContextAttention asks of a process group."""

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


def test_attention_over_parts_equals_attention_over_the_whole(monkeypatch):
    torch.manual_seed(3)
    size, length = 3, 42
    bounds = torch.tensor([0, 5, 5, 6, 23, 40, 42], dtype=torch.int32)
    q, k, v = (torch.randn(1, length, heads, 8) for heads in (6, 2, 2))
    expected = naive_attention(q, k, v, bounds)
    held = [held_tokens(length, rank, size) for rank in range(size)]
    whole = {2 * 2 * 8 * 14: torch.cat([torch.stack((k[0, mine], v[0, mine]), 1) for mine in held])}
    monkeypatch.setattr(context, "all_gather", lambda out, part, group: out.copy_(whole[part.numel()]))
    for rank, mine in enumerate(held):
        attend = ContextAttention(Group(rank, size))
        ours = attend(q[:, mine], k[:, mine], v[:, mine], bounds)
        torch.testing.assert_close(ours, expected[:, mine], atol=1e-6, rtol=1e-5)


def test_documents_with_their_own_prefix_have_the_losses_of_documents_that_share_one():
    batch = toy_batch(5, prefix=11)
    apart = without_prefix(batch)
    assert apart.prefix == 0
    assert apart.cu_seqlens.diff().tolist() == (batch.cu_seqlens.diff()[1:] + 11).tolist()
    assert (apart.targets != IGNORED).sum() == batch.n_trained
    model = Llama(LlamaConfig(22, 2, 6, 2, 34, 106, 64, head_dim=10)).init_weights(std=0.2, seed=1)
    torch.testing.assert_close(lm_loss(model, apart), lm_loss(model, batch), atol=0, rtol=1e-6)


def test_padding_is_an_untrained_document_of_its_own():
    batch = toy_batch(5)
    n = batch.tokens.shape[1]
    filled = padded(batch, n + 7)
    assert filled.tokens.shape == filled.targets.shape == (1, n + 7)
    assert filled.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), n + 7]
    assert (filled.targets[0, n:] == IGNORED).all()
    assert document_positions(filled.tokens, filled.cu_seqlens)[0, n:].tolist() == list(range(7))
    assert padded(batch, n) is batch

import pytest
import torch

from arriero.distributed.parallelize import prepare
from arriero.model import attention
from arriero.model.attention import document_attention, document_positions, naive_attention
from arriero.model.build import build_model
from arriero.model.cache import KVCache
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.llama import Llama, RMSNorm

CONFIG = LlamaConfig(dim=66, n_layers=3, n_heads=11, n_kv_heads=1, ffn_dim=29, vocab_size=101, max_context=64)
GROUPED = LlamaConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=31, vocab_size=103, max_context=64)


NORMED = Qwen3Config(50, 2, 6, 2, 31, 101, 64, head_dim=22)


@pytest.fixture(params=[CONFIG, GROUPED, NORMED], ids=["mqa", "gqa", "qwen3"])
def model(request) -> Llama:
    return build_model(request.param).init_weights(std=0.2, seed=5).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def boundaries(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch) -> str:
    """Packed attention in C++ (this project's machines have a compiler) and where there is none."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "load_library", lambda: None)
    else:
        assert attention.load_library() is not None, "attention.cpp did not compile here"
    return request.param


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("prefix", [0, 17])
@pytest.mark.parametrize("lengths", [(17, 24, 30, 11), (17, 1, 0, 29, 1, 34), (17, *[1] * 24, 41)], ids=str)
def test_attention_and_its_gradients_equal_the_naive_twin(path, kv_heads, prefix, lengths):
    check_attention(kv_heads, boundaries(*lengths), prefix)


@pytest.mark.parametrize("width", [6, 16, 64, 80, 128])  # 6 and 80 leave vectors, and pairs of them, unfilled
@pytest.mark.parametrize("prefix", [0, 67])
def test_attention_of_documents_longer_than_a_tile_equals_the_naive_twin(path, width, prefix):
    check_attention(2, boundaries(67, 131, 1, 64, 65), prefix, width)


@pytest.mark.parametrize("prefix", [0, 67])
def test_attention_in_bf16_is_within_its_rounding_of_the_naive_twin_in_fp32(path, prefix):
    cu, inputs = boundaries(67, 131, 1, 64, 65), [x.bfloat16() for x in attention_inputs(1, 328, 6, 2, 64)]
    ours = output_and_gradients(document_attention, inputs, cu, prefix)
    naive = output_and_gradients(naive_attention, [x.float() for x in inputs], cu, prefix)
    for a, b in zip(ours, naive, strict=True):
        assert a.dtype == torch.bfloat16
        difference = float((a.float() - b).norm() / b.norm())
        assert difference < (3e-3 if path == "native" else 1e-2)  # rounding the result alone: 1.7e-3


def test_attention_in_half_precision_goes_through_torch():
    cu, inputs = boundaries(17, 24), [x.half() for x in attention_inputs(1, 41, 6, 2, 16)]
    ours = output_and_gradients(document_attention, inputs, cu, 17)
    naive = output_and_gradients(naive_attention, [x.float() for x in inputs], cu, 17)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a.float(), b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_repeats_bit_for_bit_on_any_number_of_threads(dtype):
    assert attention.load_library() is not None
    inputs, cu = [x.to(dtype) for x in attention_inputs(1, 328, 6, 2, 64)], boundaries(67, 131, 1, 64, 65)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            runs.append(output_and_gradients(document_attention, inputs, cu, 67))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_attention_without_boundaries_equals_the_naive_twin():
    check_attention(2, None, 0)


def attention_inputs(batch, length, heads, kv_heads, width):
    g = torch.Generator().manual_seed(1)
    q, grad = torch.randn(2, batch, length, heads, width, generator=g)
    k, v = torch.randn(2, batch, length, kv_heads, width, generator=g)
    return q, k, v, grad


def output_and_gradients(attend, inputs, cu, prefix):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves, cu, prefix)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


def check_attention(kv_heads, cu, prefix, width=16):
    inputs = attention_inputs(2, 41 if cu is None else int(cu[-1]) // 2, 6, kv_heads, width)
    ours, naive = (output_and_gradients(f, inputs, cu, prefix) for f in (document_attention, naive_attention))
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_the_packed_operator_passes_torchs_own_checks(path):
    q, k = torch.randn(19, 4, 8, requires_grad=True), torch.randn(19, 2, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.arriero.packed_attention_cpu.default, (q, k, k.detach(), boundaries(7, 12), 7))


def test_positions_restart_at_documents():
    positions = document_positions(torch.zeros(2, 6, dtype=torch.long), boundaries(4, 2, 5, 1))
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0]]


def test_packed_documents_equal_each_document_alone(model):
    documents = [ids(1, n, seed=n) for n in (5, 13, 2, 17)]
    packed = model(torch.cat(documents, dim=1), boundaries(5, 13, 2, 17))
    alone = torch.cat([model(d) for d in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_documents_are_the_sum_of_those_alone(model):
    documents = [ids(1, n, seed=n) for n in (5, 13, 7)]
    model(torch.cat(documents, dim=1), boundaries(5, 13, 7)).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for d in documents:
        model(d).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_documents_that_share_a_prefix_equal_each_document_whole(model):
    shared, own = ids(1, 7), [ids(1, n, seed=n) for n in (5, 13, 2)]
    packed = model(torch.cat([shared, *own], dim=1), boundaries(7, 5, 13, 2), prefix=7)
    alone = [model(torch.cat([shared, tokens], dim=1)) for tokens in own]
    torch.testing.assert_close(packed[:, :7], alone[0][:, :7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 7:], torch.cat([out[:, 7:] for out in alone], dim=1), atol=1e-5, rtol=1e-5)

    packed[:, 7:].square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(out[:, 7:].square().sum() for out in alone).backward()
    for name, p in model.named_parameters():
        difference = (grads[name] - p.grad).norm() / p.grad.norm()
        assert difference < 1e-5, f"{name}: relative gradient difference {difference:.2e}"


def test_cached_equals_uncached(model):
    tokens = ids(3, 23)
    whole = model(tokens)
    cache = KVCache(model.config, batch=3, capacity=23)
    steps = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:12], cache=cache)]
    steps += [model(tokens[:, t : t + 1], cache=cache) for t in range(12, 23)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [23] * 3


def test_rows_of_different_length_share_a_cache(model):
    lengths = torch.tensor([3, 11, 7])
    tokens = ids(3, 11)
    cache = KVCache(model.config, batch=3, capacity=19)
    model(tokens, cache=cache)
    cache.lengths = lengths.clone()  # forget the padding behind each row
    following = ids(3, 5, seed=9)
    ragged = model(following, cache=cache)
    for row, length in enumerate(lengths):
        alone = model(torch.cat([tokens[row, :length], following[row]])[None])
        torch.testing.assert_close(ragged[row], alone[0, length:], atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_refused(model):
    with pytest.raises(ValueError, match="12 tokens do not fit its capacity of 11"):
        model(ids(1, 12), cache=KVCache(model.config, batch=1, capacity=11))


def test_wide_weights_compute_in_the_chosen_type_and_get_wide_gradients(model):
    tokens = ids(2, 13)
    expected = build_model(model.config).to(torch.bfloat16)
    expected.load_state_dict(model.state_dict())
    logits = model.set_compute_dtype(torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected(tokens), atol=0, rtol=0)
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 40.0]) / 12.5**0.5)


@pytest.mark.filterwarnings("default")  # dynamo itself looks at .grad of non-leaf tensors
@pytest.mark.parametrize("options", [{"compile": True}, {"recompute": "full"}, {"recompute": "selective"}], ids=str)
@pytest.mark.parametrize("config", [GROUPED, pytest.param(NORMED, marks=pytest.mark.slow)], ids=["llama", "qwen3"])
def test_prepared_blocks_equal_plain_ones(config, options):
    tokens, cu = ids(1, 37), boundaries(11, 13, 13)
    results = []
    for prepared in ({}, options):
        model = prepare(build_model(config).init_weights(std=0.2, seed=5), **prepared)
        out = model(tokens, cu, prefix=11)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.distributed.parallelize import prepare
from arriero.model import attention
from arriero.model.attention import PieceByPiece, naive_attention
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.layout import Documents, Rows
from arriero.model.llama import Llama, RMSNorm

CONFIG = LlamaConfig(dim=66, n_layers=3, n_heads=11, n_kv_heads=1, ffn_dim=29, vocab_size=101, max_context=64)
GROUPED = LlamaConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=31, vocab_size=103, max_context=64)


NORMED = Qwen3Config(50, 2, 6, 2, 31, 101, 64, head_dim=22)


@pytest.fixture(params=[CONFIG, GROUPED, NORMED], ids=["mqa", "gqa", "qwen3"])
def model(request) -> Llama:
    return build_model(request.param).init_weights(std=0.2, seed=5).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


APART, PROMPT = (-1,) * 5, (-1, 0, 0, 0, 0)
LEADS = {
    "apart": APART,
    "prompt": PROMPT,  # one document leads all others
    "pairs": (-1, 0, 0, -1, 3),  # two prompts with their answers
    "tree": (-1, 0, 1, 0, -1),  # a lead has a lead
    "chain": (-1, 0, 1, 2, 3),
}
leads_of_five = pytest.mark.parametrize("leads", LEADS.values(), ids=LEADS)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch) -> str:
    """Packed attention in C++ (this project's machines have a compiler) and where there is none."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "load_library", lambda: None)
    else:
        assert attention.load_library() is not None, "attention.cpp did not compile here"
    return request.param


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@leads_of_five
@pytest.mark.parametrize("lengths", [(17, 24, 30, 11, 3), (17, 1, 0, 29, 1), (0, 1, 41, 1, 1)], ids=str)
def test_attention_and_its_gradients_equal_the_naive_twin(path, kv_heads, leads, lengths):
    check_attention(kv_heads, Documents.of(lengths, leads))


@pytest.mark.parametrize(
    "leads", [(-1,) * 25, (-1, *(0,) * 24), tuple(range(-1, 24))], ids=["apart", "prompt", "chain"]
)
def test_attention_of_many_short_documents_equals_the_naive_twin(path, leads):
    check_attention(2, Documents.of((17, *[1] * 23, 41), leads))


@pytest.mark.parametrize("width", [6, 16, 64, 80, 128])  # 6 and 80 leave vectors, and pairs of them, unfilled
@leads_of_five
def test_attention_of_documents_longer_than_a_tile_equals_the_naive_twin(path, width, leads):
    check_attention(2, Documents.of((67, 131, 1, 64, 65), leads), width)


@leads_of_five
def test_attention_piece_by_piece_equals_the_naive_twin(leads):
    documents = Documents.of((67, 31, 0, 64, 5), leads)
    check_attention(2, documents, attend=PieceByPiece(documents.pieces, documents.device))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_of_any_forest_of_documents_equals_the_naive_twin(data):
    n = data.draw(st.integers(1, 12))
    lengths = [data.draw(st.integers(0, 70)) for _ in range(n)]
    lengths[-1] += 1
    check_attention(2, Documents.of(lengths, [data.draw(st.integers(-1, d - 1)) for d in range(n)]))


@leads_of_five
def test_attention_in_bf16_is_within_its_rounding_of_the_naive_twin_in_fp32(path, leads):
    documents = Documents.of((67, 131, 1, 64, 65), leads)
    inputs = [x.bfloat16() for x in attention_inputs(1, 328, 6, 2, 64)]
    ours = output_and_gradients(documents.attention(0), inputs)
    expected = output_and_gradients(naive(documents), [x.float() for x in inputs])
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.bfloat16
        difference = float((a.float() - b).norm() / b.norm())
        assert difference < (3e-3 if path == "native" else 1e-2)  # rounding the result alone: 1.7e-3


def test_attention_in_half_precision_goes_through_torch():
    documents, inputs = Documents.of((17, 24), (-1, 0)), [x.half() for x in attention_inputs(1, 41, 6, 2, 16)]
    ours = output_and_gradients(documents.attention(0), inputs)
    expected = output_and_gradients(naive(documents), [x.float() for x in inputs])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.float(), b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_repeats_bit_for_bit_on_any_number_of_threads(dtype):
    assert attention.load_library() is not None
    inputs, leads = [x.to(dtype) for x in attention_inputs(1, 328, 6, 2, 64)], LEADS["tree"]
    attend = Documents.of((67, 131, 1, 64, 65), leads).attention(0)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            runs.append(output_and_gradients(attend, inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_attention_of_rows_equals_the_naive_twin_of_each():
    inputs = attention_inputs(2, 41, 6, 2, 16)
    ours = output_and_gradients(Rows(2, 41, torch.device("cpu")).attention(0), inputs)
    apart = [output_and_gradients(naive(Documents.of([41])), [x[row : row + 1] for x in inputs]) for row in range(2)]
    for a, b in zip(ours, map(torch.cat, zip(*apart, strict=True)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def attention_inputs(batch, length, heads, kv_heads, width):
    g = torch.Generator().manual_seed(1)
    q, grad = torch.randn(2, batch, length, heads, width, generator=g)
    k, v = torch.randn(2, batch, length, kv_heads, width, generator=g)
    return q, k, v, grad


def output_and_gradients(attend, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


def naive(documents):
    return lambda q, k, v: naive_attention(q, k, v, documents.bounds, documents.leads)


def check_attention(kv_heads, documents, width=16, attend=None):
    inputs = attention_inputs(1, documents.n_tokens, 6, kv_heads, width)
    ours = output_and_gradients(attend or documents.attention(0), inputs)
    for a, b in zip(ours, output_and_gradients(naive(documents), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_the_packed_operator_passes_torchs_own_checks(path):
    q, k = torch.randn(19, 4, 8, requires_grad=True), torch.randn(19, 2, 8, requires_grad=True)
    attend = Documents.of((7, 12), (-1, 0)).attention(0)
    torch.library.opcheck(
        torch.ops.arriero.packed_attention_cpu.default, (q, k, k.detach(), attend.bounds, attend.leads)
    )


def test_positions_restart_at_documents():
    assert Documents.of((4, 2, 5, 1)).positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0]]


def test_positions_go_on_where_leads_end():
    documents = Documents.of((4, 2, 3, 1, 2), (-1, 0, 1, 0, -1))
    assert documents.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 0, 1]]


def test_packed_documents_equal_each_document_alone(model):
    documents = [ids(1, n, seed=n) for n in (5, 13, 2, 17)]
    packed = model(torch.cat(documents, dim=1), Documents.of((5, 13, 2, 17)))
    alone = torch.cat([model(d) for d in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_documents_are_the_sum_of_those_alone(model):
    documents = [ids(1, n, seed=n) for n in (5, 13, 7)]
    model(torch.cat(documents, dim=1), Documents.of((5, 13, 7))).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for d in documents:
        model(d).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_documents_that_share_a_prefix_equal_each_document_whole(model):
    shared, own = ids(1, 7), [ids(1, n, seed=n) for n in (5, 13, 2)]
    packed = model(torch.cat([shared, *own], dim=1), Documents.of((7, 5, 13, 2), (-1, 0, 0, 0)))
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


def test_wide_weights_compute_in_the_chosen_type_and_get_wide_gradients(model):
    tokens = ids(2, 13)
    expected = build_model(model.config).to(torch.bfloat16)
    expected.load_state_dict(model.state_dict())
    logits = model.set_compute_dtype(torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected(tokens), atol=0, rtol=0)
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_wide_residual_stream_is_rounded_only_where_a_product_begins(model):
    tokens, exact = ids(2, 13), model(ids(2, 13)).detach()
    seen = []
    block = model.model.layers[1]
    for module in (block, block.self_attn.q_proj, block.mlp.down_proj, model.head):
        module.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    wide = model.set_compute_dtype(torch.bfloat16, torch.float32)(tokens)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert seen == [(bf16, bf16), (bf16, bf16), (fp32, fp32), (fp32, fp32)] and wide.dtype == fp32
    assert (wide - exact).norm() < 0.1 * exact.norm()
    wide.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 40.0]) / 12.5**0.5)


@pytest.mark.filterwarnings("default")  # dynamo itself looks at .grad of non-leaf tensors
@pytest.mark.parametrize("options", [{"compile": True}, {"recompute": "full"}, {"recompute": "selective"}], ids=str)
@pytest.mark.parametrize("config", [GROUPED, pytest.param(NORMED, marks=pytest.mark.slow)], ids=["llama", "qwen3"])
def test_prepared_blocks_equal_plain_ones(config, options):
    tokens, documents = ids(1, 37), Documents.of((11, 13, 13), (-1, 0, 0))
    results = []
    for prepared in ({}, options):
        model = prepare(build_model(config).init_weights(std=0.2, seed=5), **prepared)
        out = model(tokens, documents)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)

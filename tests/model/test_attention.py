"""attention.cpp as other CPUs compile it; tests/model/test_llama.py has it as this one does."""

import platform
from pathlib import Path

import pytest
import torch

from arriero.model import attention
from arriero.model.attention import naive_attention
from arriero.model.layout import Documents
from arriero.system.cpp import load_cpp

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")


@pytest.fixture(params=["-mno-amx-bf16", "-mno-avx512bf16", "-march=x86-64"])
def older_cpu(request, monkeypatch) -> None:
    """Without tiles of bf16; without products of its pairs either; without wide vectors either."""
    library = load_cpp(Path(attention.__file__).with_suffix(".cpp"), "no test", "-fopenmp", request.param)
    assert library is not None
    monkeypatch.setattr(attention, "load_library", lambda: library)


@pytest.mark.usefixtures("older_cpu")
@pytest.mark.parametrize("leads", [(-1,) * 5, (-1, 0, 0, 0, 0), (-1, 0, 1, 0, -1)], ids=["apart", "prompt", "tree"])
@pytest.mark.parametrize("width", [6, 64, 80])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3.5e-3)], ids=str)
def test_attention_on_older_cpus_equals_the_naive_twin(dtype, bound, width, leads):
    compare(dtype, bound, width, leads)


@pytest.mark.parametrize("width", [6, 64, 80])
@pytest.mark.parametrize("lengths", [(67, 131, 1, 63, 65), (1, 2, 3, 33, 7)], ids=str)
def test_odd_documents_fill_pairs_with_nothing(width, lengths):
    compare(torch.bfloat16, 3.5e-3, width, (-1,) * 5, lengths)


def compare(dtype, bound, width, leads, lengths=(67, 131, 1, 64, 65)):
    """Relative errors in norm of the output and three gradients, against the twin in fp32, are below `bound`."""
    g = torch.Generator().manual_seed(1)
    documents = Documents.of(lengths, leads)
    q, grad = torch.randn(2, 1, sum(lengths), 6, width, generator=g).to(dtype)
    k, v = torch.randn(2, 1, sum(lengths), 2, width, generator=g).to(dtype)
    runs = []
    for wide in (dtype, torch.float32):
        leaves = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
        if not runs:
            out = documents.attention(0)(*leaves)
        else:
            out = naive_attention(*leaves, documents.bounds, documents.leads)
        runs.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))))
    for ours, naive in zip(*runs, strict=True):
        assert ours.dtype == dtype
        assert float((ours.float() - naive).norm() / naive.norm()) < bound

"""Tensors in huge pages: the same values, at places of their own, in memory that is given back."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from arriero.infer.huge_pages import ALIGNED, CHUNK, HugePages


def test_tensors_are_kept_as_they_are_and_do_not_overlap():
    pages = HugePages()
    given = [torch.randn(n, 33).to(dtype) for n in (1, 5, 300_000) for dtype in (torch.float32, torch.bfloat16)]
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(pages.keep, given))
    for a, b in zip(given, kept, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
        assert b.data_ptr() % ALIGNED == 0
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_given_back_with_the_last_tensor_of_a_chunk():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pages = HugePages()
    quarter = torch.ones(CHUNK // 4, dtype=torch.uint8)
    before = resident()
    kept = [pages.keep(quarter) for _ in range(16)]
    full = resident()
    assert full - before > 3.5 * CHUNK
    del kept[:8]
    assert full - resident() > 1.5 * CHUNK
    kept.clear()
    assert resident() - before < 1.5 * CHUNK  # the newest chunk is still written to

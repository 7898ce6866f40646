import torch

from arriero.model.catalogue import PUBLISHED
from arriero.model.rope import apply_rope, rope_frequencies, rope_tables


def test_llama31_frequencies_are_the_published_vectors():
    expected = [2.166571e-3, 1.371894e-3, 8.567514e-4, 5.248462e-4, 3.126938e-4, 1.785078e-4]
    torch.testing.assert_close(
        rope_frequencies(PUBLISHED["llama3.1-8b"])[29:35], torch.tensor(expected), rtol=1e-6, atol=0
    )


def test_llama32_frequencies_are_the_published_vectors():
    expected = [1.290548e-3, 4.295568e-4, 9.708288e-5]
    torch.testing.assert_close(
        rope_frequencies(PUBLISHED["llama3.2-1b"])[15:18], torch.tensor(expected), rtol=1e-6, atol=0
    )


def test_scaling_keeps_short_wavelengths_and_divides_long_ones():
    scaled = PUBLISHED["llama3.1-8b"]
    plain = rope_frequencies(PUBLISHED["llama3-8b"])
    wavelength = 2 * torch.pi / plain
    factor = plain / rope_frequencies(scaled)
    assert (factor[wavelength < 2048] == 1).all()
    torch.testing.assert_close(factor[wavelength > 8192], torch.full_like(factor[wavelength > 8192], 8.0))


def test_rotation_keeps_the_relative_position_in_dot_products():
    config = PUBLISHED["smollm2-135m"]
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, generator=torch.Generator().manual_seed(3))

    def product(m: int, n: int) -> torch.Tensor:
        rotated = [apply_rope(x, *rope_tables(config, torch.tensor([[p]]))) for x, p in ((q, m), (k, n))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(5, 3), product(105, 103), rtol=1e-4, atol=1e-4)
    assert (product(5, 3) - product(6, 3)).abs() > 1e-3


def test_tables_are_fp32_whatever_the_positions():
    cos, _ = rope_tables(PUBLISHED["smollm2-135m"], torch.arange(5)[None])
    assert cos.dtype == torch.float32

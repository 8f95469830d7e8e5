"""Seeds give every sample and step noise of its own, whatever batch it is drawn in."""

import itertools
import random

import numpy as np
import pytest
import torch

from mmgrpo.seeds import derive, normal, seed_process

SHAPE = (4, 16, 16)


def seeds(run: int, samples: int, steps: int) -> list[int]:
    return [derive(run, "step", sample, step) for sample in range(samples) for step in range(steps)]


def test_noises_of_all_samples_and_steps_are_standard_normal_and_uncorrelated():
    """Correlations of N numbers spread like 1 / sqrt(N); 64 x 63 / 2 pairs stay within 5 of those."""
    noise = normal(seeds(0, samples=8, steps=8), SHAPE).flatten(1).double()  # (64, N)
    count = noise.shape[1]
    assert noise.mean(1).abs().max() < 5 / count**0.5
    assert (noise.square().mean(1) - 1).abs().max() < 5 * (2 / count) ** 0.5
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(64, dtype=torch.float64)).abs().max() < 5 / count**0.5


def test_neighbouring_seeds_give_uncorrelated_noise_too():
    noise = normal(range(64), SHAPE).flatten(1).double()
    correlation = torch.corrcoef(noise) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 5 / noise.shape[1] ** 0.5


def test_seeds_of_a_long_run_are_all_different_and_fit_a_generator():
    drawn = seeds(0, samples=5_000, steps=20) + seeds(1, samples=5_000, steps=20)
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)
    ones = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in drawn[:20_000]]).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5  # every bit is used evenly, none is cut off


def test_parts_are_kept_apart_and_in_order():
    parts = [(), (0,), (1,), (-1,), (1, 11), (11, 1), (111,), (0, 1), (1, 0), ("noise", 0), ("start", 0), ("noise0",)]
    drawn = [derive(*part) for part in parts]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [derive(*part) for part in parts]


def test_a_seed_is_the_first_63_bits_of_a_hash_that_no_process_or_version_changes():
    """The digest was printed by `printf '7\\x1fnoise\\x1f3' | b2sum -l 64`."""
    assert derive(7, "noise", 3) == 0x785E134978A71965 >> 1


@pytest.mark.parametrize("split", [[1] * 6, [2, 4], [5, 1]])
def test_noise_of_a_sample_does_not_depend_on_its_batch(split):
    drawn = seeds(3, samples=6, steps=1)
    whole = normal(drawn, SHAPE)
    borders = [0, *itertools.accumulate(split)]
    parts = [normal(drawn[begin:end], SHAPE) for begin, end in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normal(drawn[::-1], SHAPE), whole.flip(0))


def test_drawing_noise_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    first = normal([5], SHAPE)
    state = torch.get_rng_state()
    torch.randn(3)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(normal([5], SHAPE), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_seeds_give_equal_noise_as_float32_on_the_cpu():
    noise = normal([5, 5, 6], SHAPE)
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert (noise.dtype, noise.device.type, noise.shape) == (torch.float32, "cpu", (3, *SHAPE))


def test_the_noise_is_float32_whatever_torch_makes_by_default() -> None:
    usual = normal([1, 2], SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normal([1, 2], SHAPE), usual)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_seeded_process_repeats_every_global_generator() -> None:
    drawn = []
    for _ in range(2):
        seed_process(derive(3, "process"))
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]

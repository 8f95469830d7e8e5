"""Every shipped network through the same properties; what they share against closed forms."""

import pytest
import torch
from torch import nn

from pipelines.spectrogram_networks import Transformer, UNet, joined, padded, patches, rotated
from pipelines.speech_networks import REACH, BandGainNetwork, mixed, mixed_channels, velocity
from pipelines.speech_representations import BandGains

COMPLEX, GAINS = (2, 2, 13), (1, 3, 5)  # channels whose bands no patch and no halving divides
BUILDERS = {
    "band_gains": lambda: BandGainNetwork(GAINS, width=16, blocks=3, time_width=8),
    "unet": lambda: UNet(COMPLEX, widths=(8, 16, 24), time_width=8),
    "unet_deeper_levels": lambda: UNet(GAINS, widths=(16, 16), blocks=2, time_width=8),
    "unet_one_level": lambda: UNet(GAINS, widths=(16,), time_width=8),
    "transformer": lambda: Transformer(COMPLEX, width=16, blocks=2, heads=2, time_width=8),
    "transformer_patches": lambda: Transformer(COMPLEX, patch=(4, 3), width=16, blocks=2, heads=2, time_width=8),
}
EVERY = pytest.mark.parametrize("name", BUILDERS)


def network(name: str) -> nn.Module:
    """A network none of whose parameters is still 0."""
    torch.manual_seed(0)
    built = BUILDERS[name]()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def inputs(built: nn.Module, rows: int, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    latent, condition, bands = built.channels
    x = torch.randn(rows, latent, bands, frames, generator=generator)
    return x, torch.linspace(0, 1, rows), torch.randn(rows, condition, bands, frames, generator=generator)


@pytest.mark.parametrize("frames", [1, 2, 7, 64, 300])
@EVERY
def test_a_row_alone_equals_the_row_in_a_batch_at_any_length(name, frames):
    built = network(name)
    x, t, noisy = inputs(built, 3, frames)
    together = built(x, t, noisy)
    assert together.shape == x.shape
    assert together.isfinite().all()
    for row in range(3):
        alone = built(x[row : row + 1], t[row : row + 1], noisy[row : row + 1])
        difference = (alone - together[row : row + 1]).abs().max()
        assert difference < 1e-5 * together.abs().max()  # a velocity is some number over t + 0.1


@EVERY
def test_every_parameter_gets_a_gradient(name):
    built = network(name)
    x, t, noisy = inputs(built, 2, 9)
    built(x, t, noisy).square().mean().backward()
    assert [key for key, item in built.named_parameters() if item.grad is None or item.grad.abs().max() == 0] == []


@EVERY
def test_latent_time_condition_and_neighbouring_frames_all_matter(name):
    built = network(name)
    x, t, noisy = inputs(built, 2, 9)
    before = built(x, t, noisy)
    moved = x.clone()
    moved[..., 0] += 1
    assert (built(moved, t, noisy) - before)[..., 3:].abs().max() > 1e-5
    assert (built(x, t + 0.1, noisy) * (t + 0.1 + REACH)[:, None, None, None] - before * (t + REACH)[:, None, None, None]).abs().max() > 1e-5  # fmt: skip
    assert (built(x, t, noisy + 1) - before).abs().max() > 1e-3


@EVERY
def test_a_new_network_says_that_the_clean_latent_is_zero(name):
    built = BUILDERS[name]()
    x, t, noisy = inputs(built, 3, 4)
    torch.testing.assert_close(built(x, t, noisy), x / (t + 0.1)[:, None, None, None])


@EVERY
def test_inputs_that_do_not_fit_are_refused(name):
    built = BUILDERS[name]()
    x, t, noisy = inputs(built, 2, 4)
    for wrong, named in (
        ((x[:, :, 1:], t, noisy), "x_t"),
        ((x, t[:, None], noisy), "t"),
        ((x, t, noisy[..., 1:]), "noisy"),
    ):
        with pytest.raises(ValueError, match=f"{named} has shape"):
            built(*wrong)


def test_the_band_gain_network_has_about_half_a_million_parameters():
    built = BandGainNetwork(BandGains().channels())
    assert 500_000 < sum(parameter.numel() for parameter in built.parameters()) < 700_000


def test_the_velocity_is_exact_for_the_clean_latent_less_a_little_velocity():
    x0, x1, t = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), torch.tensor([0.0, 0.7])
    along = t[:, None, None, None]
    x = (1 - along) * x0 + along * x1
    torch.testing.assert_close(velocity(x0 - REACH * (x1 - x0), x, t), x1 - x0)


def test_masks_over_real_and_imaginary_parts_can_be_complex_products():
    x, noisy = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    a, b, r = (torch.randn(2, 3, 4, dtype=torch.complex64) for _ in range(3))
    rows = [a.real, -a.imag, b.real, -b.imag, r.real, a.imag, a.real, b.imag, b.real, r.imag]
    assert len(rows) == mixed_channels((2, 2, 3))
    wanted = a * torch.complex(*x.unbind(1)) + b * torch.complex(*noisy.unbind(1)) + r
    found = mixed(torch.stack(rows, 1), x, noisy)
    torch.testing.assert_close(torch.complex(*found.unbind(1)), wanted)


def test_patches_come_back_and_each_holds_neighbours():
    x = torch.arange(2 * 3 * 6 * 8.0).reshape(2, 3, 6, 8)
    tokens = patches(x, 3, 4)
    assert tokens.shape == (2, 4, 36)
    assert torch.equal(tokens[1, 1], x[1, :, :3, 4:].flatten())
    assert torch.equal(joined(tokens, 3, 4, long=2), x)


def test_padding_repeats_the_last_band_and_frame():
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert padded(x, 2, 2).tolist() == [[[[1, 2, 3, 3], [1, 2, 3, 3]]]]


def test_rotary_places_make_attention_depend_on_distance_alone():
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(place: int, other: int) -> torch.Tensor:
        return (rotated(query, torch.tensor([place])) * rotated(key, torch.tensor([other]))).sum()

    torch.testing.assert_close(score(3, 5), score(40, 42), rtol=1e-4, atol=1e-4)
    assert (score(3, 5) - score(3, 9)).abs() > 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(COMPLEX, widths=(12,)), r"widths are \(12,\); expected at least one, each a multiple of 8"),
        (lambda: UNet(COMPLEX, widths=()), "widths are"),
        (lambda: UNet(COMPLEX, blocks=0), "blocks is 0"),
        (lambda: Transformer(COMPLEX, width=18, heads=6), "width is 18 with 6 heads"),
        (lambda: Transformer(COMPLEX, patch=(0, 1)), r"patch is \(0, 1\)"),
    ],
)
def test_sizes_without_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""The loss against closed forms, the sampler against flows whose solution is known, and a network that learns."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmgrpo.seeds import normal
from pipelines.speech_flow import enhance, matching_loss, times
from pipelines.speech_models import Model
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains, ComplexSpectrogram, Representation

GAINS, CENTRED, SPECTROGRAM = BandGains(8_000), BandGains(8_000, centred=True), ComplexSpectrogram(8_000, centred=True)


class Field(nn.Module):
    """A velocity with a formula."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        return self.formula(x, t[:, None, None, None], noisy)


def recordings(rows: int = 2, samples: int = 2001) -> tuple[Tensor, Tensor]:
    """Tones and the same in noise; (B, N) each."""
    moments = torch.arange(samples) / 8_000
    pitch = torch.linspace(200, 900, rows)[:, None]
    clean = 0.1 * torch.sin(2 * math.pi * pitch * moments)
    return clean, clean + 0.07 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("representation", [GAINS, CENTRED, SPECTROGRAM], ids=["gains", "centred", "spectrogram"])
def test_the_loss_is_the_mean_squared_distance_to_noise_less_clean(representation: Representation) -> None:
    clean, noisy = recordings()
    centre, x0 = representation.centre(noisy), representation.encode(clean, noisy)
    eps, t = normal([1, 2], centre.shape[1:]), torch.tensor([0.2, 0.9])
    true = Model(Field(lambda x, t, condition: centre + eps - x0), representation)
    assert matching_loss(true, clean, noisy, t, eps).abs().max() == 0
    off = Model(Field(lambda x, t, condition: centre + eps - x0 + 3 * t), representation)
    torch.testing.assert_close(matching_loss(off, clean, noisy, t, eps), 9 * t.square(), rtol=1e-4, atol=0)


def test_the_network_sees_the_point_on_the_line_the_time_and_the_condition() -> None:
    clean, noisy = recordings()
    eps, t = normal([1, 2], CENTRED.centre(noisy).shape[1:]), torch.tensor([0.0, 1.0])
    seen = []

    def look(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        seen.extend([x, t, condition])
        return x

    matching_loss(Model(Field(look), CENTRED), clean, noisy, t, eps)
    torch.testing.assert_close(seen[0][0], CENTRED.encode(clean, noisy)[0])
    torch.testing.assert_close(seen[0][1], CENTRED.centre(noisy)[1] + eps[1])
    assert torch.equal(seen[1].flatten(), t)
    assert torch.equal(seen[2], CENTRED.condition(noisy))


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("representation", [CENTRED, SPECTROGRAM], ids=["centred", "spectrogram"])
def test_straight_flows_arrive_in_any_number_of_steps(representation: Representation, steps: int) -> None:
    clean, noisy = recordings()
    x0 = representation.encode(clean, noisy)
    model = Model(Field(lambda x, t, condition: (x - x0) / t), representation)
    expected = representation.decode(x0, noisy)
    torch.testing.assert_close(enhance(model, noisy, steps, [5, 6]), expected, rtol=0, atol=1e-5)


def test_eulers_error_on_a_linear_flow_is_of_first_order() -> None:
    _, noisy = recordings(1)
    gains = BandGains(8_000, lowest=-200.0, highest=200.0)  # nothing is clipped
    start = normal([7], gains.centre(noisy).shape[1:])

    def error(steps: int) -> float:
        """Of the latent at time 0 of dx/dt = 2 x, which is start * exp(-2), through the waveform."""
        found = enhance(Model(Field(lambda x, t, condition: 2 * x), gains), noisy, steps, [7])
        return float((found - gains.decode(start * math.exp(-2), noisy)).abs().max())

    assert error(8) / error(16) == pytest.approx(2, rel=0.2)
    assert error(64) / error(128) == pytest.approx(2, rel=0.05)
    step = enhance(Model(Field(lambda x, t, condition: 0.5 * x), gains), noisy, 2, [7])
    torch.testing.assert_close(step, gains.decode(start * 0.75**2, noisy), rtol=0, atol=1e-6)


def test_a_recording_is_enhanced_as_if_it_were_alone() -> None:
    _, noisy = recordings(3)
    torch.manual_seed(0)
    network = BandGainNetwork(GAINS.channels(), width=16, blocks=2)
    nn.init.normal_(network.leave.weight, std=0.1)
    model = Model(network, GAINS)
    together = enhance(model, noisy, 4, [3, 4, 5])
    assert together.shape == noisy.shape
    for row in range(3):
        torch.testing.assert_close(
            enhance(model, noisy[row : row + 1], 4, [3 + row])[0], together[row], rtol=0, atol=1e-5
        )
    assert (enhance(model, noisy[:1], 4, [9])[0] - together[0]).abs().max() > 1e-4


def test_times_go_from_noise_to_clean() -> None:
    assert times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert times(4, 2.0).tolist() == [1, 0.5625, 0.25, 0.0625, 0]


def test_arguments_that_do_not_fit_are_refused() -> None:
    clean, noisy = recordings()
    model = Model(Field(lambda x, t, condition: x), GAINS)
    eps = torch.zeros_like(GAINS.centre(noisy))
    with pytest.raises(ValueError, match="steps is 0"):
        times(0)
    with pytest.raises(ValueError, match="power is 0"):
        times(4, 0)
    with pytest.raises(ValueError, match="1 seeds arrived for 2 recordings"):
        enhance(model, noisy, 2, [1])
    with pytest.raises(ValueError, match="t has shape"):
        matching_loss(model, clean, noisy, torch.zeros(2, 1), eps)
    with pytest.raises(ValueError, match="latent has shape"):
        matching_loss(model, clean, noisy, torch.zeros(2), eps[:, :, :, 1:])


def test_a_small_network_learns_to_take_noise_from_tones() -> None:
    clean, noisy = recordings(8, 1001)
    torch.manual_seed(0)
    network = BandGainNetwork(GAINS.channels(), width=32, blocks=2)
    model, generator = Model(network, GAINS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        eps = torch.randn(GAINS.centre(noisy).shape, generator=generator)
        loss = matching_loss(model, clean, noisy, torch.rand(8, generator=generator), eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    before, after = ((item - clean).square().mean() for item in (noisy, enhance(model, noisy, 4, range(8))))
    assert after < 0.7 * before  # oracle gains: 0.03

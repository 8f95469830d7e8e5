"""Transforms that come back, gains whose effect is known, and conditions that loudness does not move."""

import math

import pytest
import torch

from pipelines.spectrogram import (
    PRESETS,
    Framing,
    as_channels,
    as_complex,
    compress,
    expand,
    frames,
    framing,
    inverse,
    stft,
)
from pipelines.speech_representations import BandGains, ComplexSpectrogram, band_centres, interpolation, triangles

LENGTHS = [1, 2, 127, 128, 129, 255, 1601, 4001]
REPRESENTATIONS = [kind(rate) for kind in (ComplexSpectrogram, BandGains) for rate in PRESETS]
EVERY = pytest.mark.parametrize(
    "representation", REPRESENTATIONS, ids=lambda item: f"{type(item).__name__}-{item.rate}"
)


def speech(samples: int, seed: int = 0, rows: int = 2) -> torch.Tensor:
    """Noise whose loudness comes and goes, (rows, N)."""
    noise = torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise * (1.1 + torch.sin(torch.arange(samples) / 500))


def si_sdr(estimate: torch.Tensor, clean: torch.Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio of one recording, dB."""
    target = clean * (estimate * clean).sum() / clean.square().sum()
    return float(10 * torch.log10(target.square().sum() / (estimate - target).square().sum()))


@pytest.mark.parametrize("samples", LENGTHS)
@pytest.mark.parametrize("rate", PRESETS)
def test_the_inverse_transform_returns_the_waveform(rate, samples):
    waveform, cut = speech(samples), PRESETS[rate]
    spectrogram = stft(waveform, cut)
    assert spectrogram.shape == (2, cut.frequencies, frames(samples, cut))
    torch.testing.assert_close(inverse(spectrogram, cut, samples), waveform, rtol=0, atol=1e-5)


def test_a_tone_has_half_its_amplitude_times_the_windows_sum_at_its_frequency():
    cut = PRESETS[16_000]
    tone = 0.3 * torch.sin(2 * math.pi * 20 / cut.window * torch.arange(8000))[None]
    magnitude = stft(tone, cut)[0, :, 20].abs()
    assert magnitude.argmax() == 20
    torch.testing.assert_close(magnitude[20], torch.tensor(0.3 / 2 * cut.window / 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("samples", [1000, 1023, 1024, 1025, 1279])
def test_gains_never_blow_up_the_end_of_a_recording(samples):
    waveform, cut = torch.ones(1, samples), Framing(512, 256)
    spectrogram = stft(waveform, cut)
    gains = torch.rand(spectrogram.shape, generator=torch.Generator().manual_seed(0))
    assert inverse(spectrogram * gains, cut, samples).abs().max() < 3


def test_compression_takes_the_power_of_the_magnitude_and_keeps_the_phase():
    given = torch.tensor([4j, -9 + 0j, 0j])
    torch.testing.assert_close(compress(given, 0.5, 0.15), torch.tensor([0.3j, -0.45 + 0j, 0j]))


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
def test_expansion_undoes_compression(exponent):
    given = torch.randn(1000, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)) * 10
    given[:10] = 0
    torch.testing.assert_close(expand(compress(given, exponent, 0.15), exponent, 0.15), given, rtol=1e-5, atol=1e-5)


def test_channels_are_the_real_and_the_imaginary_part():
    given = torch.tensor([[[1 + 2j]]])
    assert as_channels(given).tolist() == [[[[1.0]], [[2.0]]]]
    assert torch.equal(as_complex(as_channels(given)), given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 44_100}, "rate is 44100 Hz; expected one of 8000, 16000, 48000, or a window and a hop of your own"),
        ({"rate": 16_000, "window": 512}, "window is 512 and hop is None; expected both or neither"),
        ({"rate": 16_000, "window": 511, "hop": 128}, "window is 511, hop is 128 samples; expected an even window"),
        ({"rate": 16_000, "window": 512, "hop": 300}, "window is 512, hop is 300 samples; expected an even window"),
    ],
)
def test_framings_that_cannot_be_inverted_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        framing(**options)


def test_an_empty_waveform_is_refused():
    with pytest.raises(ValueError, match="waveform has 0 samples"):
        stft(torch.zeros(1, 0), PRESETS[16_000])


@pytest.mark.parametrize("samples", LENGTHS)
@EVERY
def test_the_noisy_recordings_own_latent_decodes_to_it(representation, samples):
    noisy = speech(samples)
    restored = representation.decode(representation.encode(noisy, noisy), noisy)
    torch.testing.assert_close(restored, noisy, rtol=0, atol=1e-5)


@EVERY
def test_shapes_are_those_that_channels_promise_and_rows_do_not_meet(representation):
    clean, noisy = speech(3001, 0, 3), speech(3001, 1, 3)
    latent, condition, bands = representation.channels()
    x0, seen = representation.encode(clean, noisy), representation.condition(noisy)
    assert x0.shape == (3, latent, bands, x0.shape[3]) == representation.centre(noisy).shape
    assert seen.shape == (3, condition, bands, x0.shape[3])
    torch.testing.assert_close(representation.condition(noisy[1:2]), seen[1:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(representation.encode(clean[1:2], noisy[1:2]), x0[1:2], rtol=1e-5, atol=1e-5)


@EVERY
def test_loudness_changes_the_waveform_alone(representation):
    clean, noisy = speech(4001, 0), speech(4001, 1)
    latent = representation.encode(clean, noisy)
    torch.testing.assert_close(representation.condition(noisy / 8), representation.condition(noisy), rtol=0, atol=2e-3)
    torch.testing.assert_close(representation.encode(clean / 8, noisy / 8), latent, rtol=0, atol=2e-3)
    quiet, loud = representation.decode(latent, noisy / 8), representation.decode(latent, noisy)
    torch.testing.assert_close(quiet * 8, loud, rtol=0, atol=1e-5)


@EVERY
def test_silence_stays_silent_and_finite(representation):
    silence = torch.zeros(1, 1000)
    assert representation.condition(silence).isfinite().all()
    latent = representation.encode(silence, silence)
    assert latent.isfinite().all()
    assert representation.decode(latent, silence).abs().max() == 0


@pytest.mark.parametrize("kind", [ComplexSpectrogram, BandGains])
def test_the_noise_is_centred_on_the_noisy_recording_if_wished(kind):
    noisy = speech(2000)
    assert kind().centre(noisy).abs().max() == 0
    centred = kind(centred=True)
    torch.testing.assert_close(centred.centre(noisy), centred.encode(noisy, noisy), rtol=0, atol=1e-5)


def test_a_spectrogram_decodes_to_the_clean_recording():
    clean, noisy = speech(4001, 0), speech(4001, 1)
    spectrogram = ComplexSpectrogram()
    torch.testing.assert_close(spectrogram.decode(spectrogram.encode(clean, noisy), noisy), clean, rtol=0, atol=1e-5)


def test_the_noise_option_divides_a_spectrograms_latent():
    clean, noisy = speech(1000, 0), speech(1000, 1)
    half, whole = (ComplexSpectrogram(noise=noise).encode(clean, noisy) for noise in (0.5, 1.0))
    torch.testing.assert_close(half, 2 * whole)


def test_a_quarter_of_the_amplitude_is_a_gain_of_minus_twelve_decibels():
    noisy, gains = speech(4001), BandGains(middle=-10.0, noise=5.0)
    latent = gains.encode(noisy / 4, noisy)
    torch.testing.assert_close(latent, torch.full_like(latent, (20 * math.log10(0.25) + 10) / 5), rtol=0, atol=5e-3)
    torch.testing.assert_close(gains.decode(latent, noisy), noisy / 4, rtol=0, atol=1e-4)


def test_gains_stay_in_their_range():
    noisy, gains = speech(2000), BandGains(lowest=-20.0, highest=6.0)
    low, high = torch.full_like(gains.centre(noisy), -100), torch.full_like(gains.centre(noisy), 100)
    torch.testing.assert_close(gains.decode(low, noisy), noisy / 10, rtol=0, atol=1e-5)
    torch.testing.assert_close(gains.decode(high, noisy), noisy * 10 ** (6 / 20), rtol=0, atol=1e-5)
    assert gains.encode(noisy * 0, noisy).max() == pytest.approx((-20 + 12) / 10)


@pytest.mark.parametrize("rate", PRESETS)
def test_oracle_gains_take_the_noise_from_a_tone(rate):
    clean = 0.1 * torch.sin(2 * math.pi * 440 / rate * torch.arange(rate))[None]
    noisy = clean + 0.07 * torch.randn(1, rate, generator=torch.Generator().manual_seed(0))
    gains = BandGains(rate)
    assert si_sdr(noisy, clean) == pytest.approx(0, abs=0.5)
    assert si_sdr(gains.decode(gains.encode(clean, noisy), noisy), clean) > 13


@pytest.mark.parametrize("rate", PRESETS)
def test_gains_are_interpolated_linearly_between_the_centres_of_bands(rate):
    cut = BandGains(rate).cut
    centres, weights = band_centres(rate, cut, 32), interpolation(rate, cut, 32)
    torch.testing.assert_close(weights.sum(1), torch.ones(cut.frequencies, dtype=torch.float64))
    place = torch.arange(cut.frequencies, dtype=torch.float64).clamp(centres[0], centres[-1])
    torch.testing.assert_close(weights @ centres, place)  # a ramp stays one
    assert (weights > 0).sum(1).max() <= 2
    assert (triangles(rate, cut, 128).sum(0) > 0).all()  # no narrow band is empty


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BandGains, {"bands": 64}, "64 bands are closer than the 257 frequencies"),
        (BandGains, {"bands": 1}, "bands is 1; expected at least 2"),
        (BandGains, {"lowest": 1.0}, "gains go from 1.0 to 3.0 dB; expected 0 dB among them"),
        (BandGains, {"noise": 0.0}, "noise is 0.0 dB"),
        (BandGains, {"detail": 0}, "detail is 0"),
        (ComplexSpectrogram, {"exponent": 0.0}, "exponent is 0.0"),
        (ComplexSpectrogram, {"rate": 11_025}, "rate is 11025 Hz"),
    ],
)
def test_options_without_meaning_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@EVERY
def test_recordings_and_latents_that_do_not_fit_are_refused(representation):
    noisy = speech(2000)
    with pytest.raises(ValueError, match="noisy has shape"):
        representation.encode(noisy[:, :-1], noisy)
    with pytest.raises(ValueError, match="latent has shape"):
        representation.decode(representation.centre(noisy)[:1], noisy)
    with pytest.raises(ValueError, match="shape"):
        representation.decode(representation.centre(noisy)[..., :-1], noisy)

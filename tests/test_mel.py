"""Log-mel spectrograms as torchaudio's transform makes them, at one loudness, heard through the user's vocoder."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram as Oracle

from pipelines import speech_flow, speech_models
from pipelines.enhance_files import enhance_waveform, enhancer, loaded
from pipelines.mel import MelSpectrogram, filters, griffin_lim, with_vocoder
from pipelines.speech_models import Model
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains

SMALL = MelSpectrogram(rate=8_000, window=256, hop=64, bands=40)


def speech(seconds: float = 1.0, rate: int = 8_000, rows: int = 2) -> Tensor:
    """Harmonics of a moving pitch that swell and fade, and a little noise in every band; (B, N)."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    starts = torch.tensor([110.0, 150.0])[:rows, None]  # Hz
    phase = 2 * torch.pi * (starts * time + 10 * (1 - torch.cos(3 * time)))
    voice = torch.stack([torch.sin(k * phase) / k for k in range(1, 15)]).sum(0)
    breath = 0.005 * torch.randn(voice.shape, generator=torch.Generator().manual_seed(1))
    return 0.2 * (voice * (0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * time))).float() + breath


@pytest.mark.parametrize("mel", [MelSpectrogram(), SMALL, replace(SMALL, lowest=50.0, highest=3000.0)])
def test_the_latent_is_the_log_of_torchaudios_mel_spectrogram(mel: MelSpectrogram) -> None:
    heard = speech(1.2, mel.rate)[:, : mel.hop * 100]
    quieter = heard * 10 ** (mel.loudness / 20) / heard.square().mean(1, keepdim=True).sqrt()
    oracle = Oracle(mel.rate, mel.window, mel.window, mel.hop, mel.lowest, mel.highest, n_mels=mel.bands, power=1)
    expected = oracle(quieter).clamp_min(1e-5).log()[:, None]
    latent = mel.encode(heard, heard)
    torch.testing.assert_close(latent, expected, atol=2e-3, rtol=0)  # float32, where a band is quiet
    assert latent.shape == (2, 1, mel.bands, 101)
    assert mel.channels() == (1, 1, mel.bands)


def test_the_latent_is_scaled_and_the_centre_is_zero_or_the_noisy_recording() -> None:
    clean, noisy = speech(), speech() + 0.05 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    plain = SMALL.encode(clean, noisy)
    scaled = replace(SMALL, middle=-4.0, noise=2.0)
    torch.testing.assert_close(scaled.encode(clean, noisy), (plain + 4) / 2)
    assert SMALL.centre(noisy).abs().max() == 0
    centred = replace(scaled, centred=True)
    torch.testing.assert_close(centred.centre(noisy), scaled.condition(noisy))
    torch.testing.assert_close(scaled.condition(noisy), scaled.encode(noisy, noisy))


def test_loudness_changes_no_latent_and_comes_back_in_what_is_heard() -> None:
    mel = with_vocoder(SMALL, "griffin_lim")
    clean, noisy = speech(), speech() + 0.05 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    latent = mel.encode(clean, noisy)
    torch.testing.assert_close(mel.encode(0.02 * clean, 0.02 * noisy), latent, atol=2e-3, rtol=0)
    torch.testing.assert_close(50 * mel.decode(latent, 0.02 * noisy), mel.decode(latent, noisy), atol=1e-5, rtol=1e-4)
    level = mel.decode(latent, noisy).square().mean().sqrt() / clean.square().mean().sqrt()
    assert 0.8 < level < 1.1  # what phases that do not fit take away


def test_griffin_lim_is_repeatable_and_keeps_the_mel_spectrogram() -> None:
    heard = speech()
    mel = with_vocoder(SMALL, "griffin_lim")
    latent = mel.encode(heard, heard)
    once = mel.decode(latent, heard)
    assert torch.equal(once, mel.decode(latent, heard))
    loud = latent > latent.amax() - 4  # natural logs: within 35 dB of the loudest
    error = (mel.encode(once, heard) - latent)[loud].abs().mean()
    noise = 0.2 * torch.randn(heard.shape, generator=torch.Generator().manual_seed(0))
    assert error < 0.35  # 3 dB
    assert error < 0.3 * (mel.encode(noise, heard) - latent)[loud].abs().mean()


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 128, 129, 1000])
def test_any_length_has_a_latent_and_is_heard(samples: int) -> None:
    heard = speech()[:, :samples] + 0.01
    mel = with_vocoder(SMALL, "griffin_lim")
    assert mel.decode(mel.encode(heard, heard), heard).shape == heard.shape


def test_silence_has_a_finite_latent() -> None:
    assert SMALL.encode(torch.zeros(1, 800), torch.zeros(1, 800)).isfinite().all()


def test_without_a_vocoder_nothing_is_heard_and_a_folder_can_name_none() -> None:
    heard = speech()
    with pytest.raises(ValueError, match="needs a vocoder to be heard; name one: 'griffin_lim' or 'mine.py:build'"):
        SMALL.decode(SMALL.encode(heard, heard), heard)
    with pytest.raises(ValueError, match="a model's folder names none; name one: 'mine.py:build', or 'griffin_lim'"):
        with_vocoder(SMALL, None)
    assert "vocoder" not in asdict(with_vocoder(SMALL, "griffin_lim"))
    assert with_vocoder(SMALL, "griffin_lim") == SMALL


def test_other_representations_need_no_vocoder() -> None:
    gains = BandGains()
    assert with_vocoder(gains, None) is gains
    with pytest.raises(ValueError, match="vocoder 'griffin_lim' arrived for a BandGains; expected none"):
        with_vocoder(gains, "griffin_lim")


OWN = '''
import torch

def build(mel):
    """Silence with a click at every frame, as high as its loudest band."""
    def speak(log_mel):
        clicks = torch.zeros(len(log_mel), log_mel.shape[2], mel.hop)
        clicks[:, :, 0] = log_mel.exp().amax(1)
        return clicks.flatten(1)
    return speak

class Module(torch.nn.Module):
    def __init__(self, mel):
        super().__init__()
        self.level = torch.nn.Parameter(torch.ones(()))
        self.hop = mel.hop

    def forward(self, log_mel):
        return self.level.expand(len(log_mel), log_mel.shape[2] * self.hop)

def short(mel):
    return lambda log_mel: torch.zeros(len(log_mel), mel.hop)

def nothing(mel):
    return None
'''


def test_a_vocoder_of_the_users_own_is_called_with_log_mels(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    heard = speech()
    latent = SMALL.encode(heard, heard)
    mel = with_vocoder(replace(SMALL, middle=-3.0, noise=2.0), f"{tmp_path / 'mine.py'}:build")
    spoken = mel.decode((latent + 3) / 2, heard)
    gain = 10 ** (SMALL.loudness / 20) / heard.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(spoken[:, ::64] * gain, latent[:, 0].exp().amax(1)[:, :125], rtol=1e-3, atol=1e-6)
    module = with_vocoder(SMALL, f"{tmp_path / 'mine.py'}:Module")
    torch.testing.assert_close(module.decode(latent, heard) * gain, torch.ones_like(heard))
    with pytest.raises(
        ValueError, match=r"the vocoder made \(2, 64\) of \(2, 1, 40, 126\); expected at least \(2, 8000"
    ):
        with_vocoder(SMALL, f"{tmp_path / 'mine.py'}:short").decode(latent, heard)
    with pytest.raises(ValueError, match="made a NoneType; expected a function"):
        with_vocoder(SMALL, f"{tmp_path / 'mine.py'}:nothing")
    with pytest.raises(ValueError, match="vocoder: no function 'built'"):
        with_vocoder(SMALL, f"{tmp_path / 'mine.py'}:built")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MelSpectrogram(window=101), "window is 101"),
        (lambda: MelSpectrogram(hop=600), "hop is 600"),
        (lambda: MelSpectrogram(highest=13_000.0), "from 0.0 to 13000.0 Hz; expected a range inside 0 to 12000.0"),
        (lambda: MelSpectrogram(bands=0), "bands is 0"),
        (lambda: MelSpectrogram(noise=0.0), "noise is 0.0"),
        (lambda: SMALL.encode(torch.zeros(1, 0), torch.zeros(1, 0)), "0 samples"),
        (lambda: SMALL.encode(torch.zeros(1, 9), torch.zeros(1, 8)), "clean"),
        (lambda: SMALL.decode(torch.zeros(1, 1, 39, 3), torch.zeros(1, 128)), "latent"),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Denoised(torch.nn.Module):
    """The exact velocity towards a known latent: its Euler sampler ends there whatever it starts from."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent  # (1, C, K, T)

    def forward(self, x_t: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        return (x_t - self.latent) / t[:, None, None, None]


def steady(log_mel: Tensor) -> Tensor:
    """A vocoder that holds the level of each frame's second band; (B, K, T) -> (B, T * hop)."""
    return log_mel[:, 1].exp().repeat_interleave(SMALL.hop, dim=1)


def test_a_flow_over_mel_spectrograms_is_trained_and_heard() -> None:
    clean = speech(rows=1)
    noisy = clean + 0.05 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    mel = replace(SMALL, vocoder=steady)
    latent = mel.encode(clean, noisy)
    model = Model(Denoised(latent), mel)
    eps = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    assert speech_flow.matching_loss(model, clean, noisy, torch.tensor([0.5]), eps).item() < 1e-9
    heard = enhance_waveform(noisy, 8_000, enhancer(model, 4))
    torch.testing.assert_close(heard, mel.decode(latent, noisy), atol=1e-6, rtol=1e-4)


def test_a_model_of_mel_spectrograms_needs_a_vocoder_that_its_folder_cannot_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mel = replace(SMALL, middle=-4.0, noise=2.0, vocoder=steady)
    speech_models.save(tmp_path, BandGainNetwork(mel.channels(), width=16, blocks=1), mel)
    assert speech_models.load(tmp_path).representation == mel
    ours = loaded(tmp_path, 1, "cpu", vocoder="griffin_lim")
    assert ours.rate == 8_000
    assert enhance_waveform(speech(), 8_000, ours).shape == (2, 8000)
    with pytest.raises(ValueError, match="a model's folder names none"):
        loaded(tmp_path, 1, "cpu")
    (tmp_path / "mine.py").write_text("open('ran', 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    for named in ("mine.py:build", {"build": "mine.py:build"}):
        config["representation"]["vocoder"] = named
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="vocoder"):
            loaded(tmp_path, 1, "cpu", vocoder="griffin_lim")
    assert not (tmp_path / "ran").exists()


def test_the_filters_are_shared_and_griffin_lim_takes_another_number_of_rounds() -> None:
    assert filters(SMALL) is filters(replace(SMALL))
    heard = speech()
    few, many = (replace(SMALL, vocoder=griffin_lim(SMALL, rounds=rounds)) for rounds in (1, 32))
    latent = SMALL.encode(heard, heard)
    errors = [(SMALL.encode(mel.decode(latent, heard), heard) - latent).abs().mean() for mel in (few, many)]
    assert errors[1] < errors[0]

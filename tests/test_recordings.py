"""Pairs of recordings follow from their seed, have the SNR that was drawn, and every flaw of the files is told at once."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from mmgrpo.types import Prompt
from pipelines.recordings import Mixing, at_snr, drawn, fitted, in_room, mixed, pair, read, stretch
from pipelines.recordings_check import check

RATE = 8000


def tone(frequency: float, length: int, rate: int = RATE, size: float = 0.5) -> Tensor:
    return size * torch.sin(2 * math.pi * frequency * torch.arange(length) / rate)


def noise(length: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def write(path: Path, values: Tensor, rate: int = RATE, kind: str = "FLOAT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, values.T.numpy() if values.dim() == 2 else values.numpy(), rate, subtype=kind)
    return path


@pytest.fixture
def mixing(tmp_path: Path) -> Mixing:
    for number in range(3):
        write(tmp_path / f"noise/{number}.wav", noise(3000 + 4000 * number, number))
    return Mixing(RATE, noise=tmp_path / "noise", snr=(5, 5))


def prompt(clean: Path, noisy: Path | None = None, number: int = 0) -> Prompt:
    media = {"clean": (clean,)} | ({} if noisy is None else {"noisy": (noisy,)})
    return Prompt(number, clean.stem, media)


def decibels(signal: Tensor, rest: Tensor) -> float:
    return float(10 * torch.log10(signal.square().mean() / rest.square().mean()))


def test_reading_averages_channels_and_converts_the_rate(tmp_path: Path) -> None:
    both = torch.stack([tone(440, 4800, 48000), 0.5 * tone(440, 4800, 48000)])
    found = read(write(tmp_path / "a.wav", both, 48000), RATE)
    assert found.shape == (800,) and found.dtype == torch.float32
    middle = slice(100, -100)  # the filter has no samples beyond the ends
    assert torch.allclose(found[middle], 0.75 * tone(440, 800)[middle], atol=2e-3)
    exact = noise(100, 0)
    assert torch.equal(read(write(tmp_path / "b.wav", exact), RATE), exact)


def test_a_mixture_has_the_drawn_snr_and_follows_from_its_seed(tmp_path: Path, mixing: Mixing) -> None:
    path = write(tmp_path / "clean/a.wav", tone(440, 6000, size=0.2))
    first, again, other = (pair(prompt(path), mixing, seed) for seed in (1, 1, 2))
    assert torch.equal(first.clean, read(path, RATE)) and first.noisy.shape == first.clean.shape
    assert abs(decibels(first.clean, first.noisy - first.clean) - 5) < 1e-3
    assert torch.equal(first.noisy, again.noisy) and not torch.equal(first.noisy, other.noisy)


def test_snrs_are_drawn_over_the_whole_range_and_every_noise_is_used(tmp_path: Path, mixing: Mixing) -> None:
    clean = tone(440, 4000, size=0.2)
    ranged = replace(mixing, snr=(-5, 15))
    found = [decibels(clean, mixed(clean, ranged, seed) - clean) for seed in range(200)]
    assert -5 <= min(found) < -4 and 14 < max(found) <= 15.001
    assert abs(sum(found) / 200 - 5) < 4 * 20 / math.sqrt(12 * 200)
    assert {drawn(mixing.noises, seed) for seed in range(50)} == set(mixing.noises)


def test_short_noise_is_looped_and_long_noise_cut() -> None:
    short, long = torch.arange(5.0), torch.arange(100.0)
    looped = fitted(short, 13, seed=3)
    assert (looped.diff().remainder(5) == 1).all() and looped.shape == (13,)
    starts = {int(fitted(long, 90, seed)[0]) for seed in range(200)}
    assert starts == set(range(11)) and (fitted(long, 90, 0).diff() == 1).all()


def test_noise_is_scaled_to_a_power_ratio() -> None:
    heard, rest = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
    assert torch.allclose(at_snr(rest, heard, 20.0), torch.tensor([0.1, 0.1]))


def test_a_room_keeps_the_time_and_the_level_of_the_direct_path(tmp_path: Path, mixing: Mixing) -> None:
    clean, impulse = noise(500, 0), torch.zeros(80)
    impulse[30], impulse[50] = -0.4, 0.1
    wet = in_room(clean, impulse)
    expected = clean.clone()
    expected[20:] -= 0.25 * clean[:-20]
    assert torch.allclose(wet, expected, atol=1e-5)
    write(tmp_path / "rooms/a.wav", impulse)
    there = replace(mixing, impulses=tmp_path / "rooms", snr=(60, 60))
    assert (mixed(clean, there, 0) - wet).square().mean() < 2e-6 * wet.square().mean()


def test_cuts_of_a_pair_lie_at_the_same_place_and_never_in_silence(tmp_path: Path) -> None:
    clean = noise(4000, 1)
    paths = write(tmp_path / "c.wav", clean), write(tmp_path / "n.wav", 2 * clean)
    found = [pair(prompt(*paths), Mixing(RATE, seconds=0.1), seed) for seed in range(5)]
    assert all(len(one.clean) == 800 and torch.equal(one.noisy, 2 * one.clean) for one in found)
    assert len({float(one.clean[0]) for one in found}) == 5
    quiet = torch.zeros(2, 10000)
    quiet[:, 9990:] = 0.5
    assert all(stretch(quiet, 100, seed).abs().max() == 0.5 for seed in range(20))
    short = pair(prompt(*paths), Mixing(RATE, seconds=10), 0)
    assert torch.equal(short.clean, clean)


def test_a_pair_that_exceeds_full_scale_is_turned_down_together(tmp_path: Path, mixing: Mixing) -> None:
    path = write(tmp_path / "a.wav", tone(440, 6000, size=0.99))
    clean, noisy = pair(prompt(path), mixing, 0)
    assert noisy.abs().max() == 1 and clean.abs().max() < 0.99
    assert abs(decibels(clean, noisy - clean) - 5) < 1e-3


def problems(prompts: list[Prompt], mixing: Mixing) -> list[str]:
    with pytest.raises(ValueError, match="the recordings cannot be used") as caught:
        check(prompts, mixing, 0.001)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_every_flaw_of_every_file_is_told_at_once_by_name(tmp_path: Path, mixing: Mixing) -> None:
    good = write(tmp_path / "good.wav", tone(440, 800))
    (tmp_path / "text.wav").write_text("no sound")
    unsound = tone(440, 800)
    unsound[3], unsound[5] = math.nan, math.inf
    files = {
        "text.wav": ("is no readable recording", None),
        "gone.wav": ("is no readable recording", None),
        "empty.wav": ("holds no samples", torch.zeros(0)),
        "silent.wav": ("is silent: its peak is 1.0e-05", torch.full((800,), 1e-5)),
        "opposed.wav": ("is silent: its peak is 0.0e+00", torch.stack([tone(440, 800), -tone(440, 800)])),
        "nan.wav": ("holds NaN or infinity at 2 of 800 samples", unsound),
        "clipped.wav": ("of its samples are at full scale", tone(440, 800, size=1.5).clamp(-1, 1)),
        "fast.wav": ("has a rate of 16000 Hz; expected 8000, or policy.resample", tone(440, 800)),
    }
    for name, (_, values) in files.items():
        if values is not None:
            write(tmp_path / name, values, 16000 if name == "fast.wav" else RATE)
    write(tmp_path / "noise/bad.wav", torch.zeros(100))
    prompts = [prompt(tmp_path / name, number=number) for number, name in enumerate([*files, "good.wav"])]
    found = problems([*prompts, Prompt(99, "x"), prompt(good)], replace(mixing, resample=False))
    for name, (message, _) in files.items():
        assert any(str(tmp_path / name) in line and message in line for line in found), name
    assert any("noise/bad.wav: is silent" in line for line in found)
    assert "prompt 99 has 0 clean recordings; expected one, as prompts.media.clean names" in found
    assert len(found) == len(files) + 2 and not any("good.wav" in line for line in found)


def test_noisy_recordings_may_be_clipped_but_must_last_as_long(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.wav", tone(440, 800))
    loud = write(tmp_path / "loud.wav", tone(440, 800, size=3).clamp(-1, 1))
    check([prompt(clean, loud)], Mixing(RATE), 0.001)
    double = write(tmp_path / "double.wav", tone(440, 1600, 16000), 16000)
    check([prompt(clean, double)], Mixing(RATE), 0.001)
    short = write(tmp_path / "short.wav", tone(440, 799))
    [line] = problems([prompt(clean, short)], Mixing(RATE))
    assert line == f"{short}: lasts 799 samples at 8000 Hz; expected 800 at 8000 Hz as in {clean}"
    [line] = problems([prompt(clean)], Mixing(RATE))
    assert line == "prompt 0 has no noisy recording; expected prompts.media.noisy, or a folder in policy.noise"


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds is 0"):
        Mixing(RATE, seconds=0)
    with pytest.raises(ValueError, match=r"snr is \[10, 0\]; expected the lowest and the highest"):
        Mixing(RATE, snr=(10, 0))
    with pytest.raises(ValueError, match="without noise"):
        Mixing(RATE, impulses=tmp_path)
    with pytest.raises(ValueError, match=r"policy.noise is .* where there are no recordings"):
        Mixing(RATE, noise=tmp_path).noises  # noqa: B018 - the files are looked for when they are asked for

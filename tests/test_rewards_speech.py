"""Rewards of speech against worked numbers, the reference packages, and recordings that cannot be judged."""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pystoi
import pytest
import torch
from benchmarks import speech_scoring
from scipy.signal import resample_poly
from torch import Tensor

from mmgrpo.components import build
from mmgrpo.scoring import score
from mmgrpo.toml import RecipeError
from mmgrpo.types import Batch, Prompt, Samples
from rewards.compose import guarded
from rewards.speech import (
    dnsmos,
    dnsmos_p808,
    log_spectral_distance,
    measures,
    pesq,
    si_sdr,
    stoi,
)
from rewards.speech_worker import AT, COUNTS, WINDOW, looks, measure

NAN, RATE = float("nan"), 16_000
NATIVE = tuple(name for name in COUNTS if not name.startswith("dnsmos"))  # the others take seconds


def voice(seconds: float, rate: int = RATE, seed: int = 0) -> Tensor:
    """Something like speech: harmonics of a wandering pitch, in syllables; (N,) in [-1, 1]."""
    drawn = numpy.random.default_rng(seed)
    t = numpy.arange(int(seconds * rate)) / rate
    phase = 2 * math.pi * numpy.cumsum(120 + 20 * numpy.sin(2 * math.pi * 0.7 * t + drawn.uniform(0, 6))) / rate
    tone = sum(numpy.sin(k * phase) / k * math.exp(-(((k * 120 - 700) / 900) ** 2)) for k in range(1, 30))
    syllables = numpy.maximum(0, numpy.sin(2 * math.pi * 2.5 * t + drawn.uniform(0, 6))) ** 0.5
    sound = tone * syllables + 0.02 * syllables * drawn.standard_normal(len(t))
    return torch.tensor(0.5 * sound / abs(sound).max(), dtype=torch.float32)


def noisy(clean: Tensor, level: float, seed: int = 1) -> Tensor:
    return clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def heard(audio: Tensor, reference: Tensor | None, rate: int = RATE, length: Sequence[int] | None = None) -> Samples:
    """(B, N) recordings of one channel."""
    ids = torch.arange(len(audio))
    batch = Batch(tuple(Prompt(row, "") for row in range(len(audio))), ids, ids, seed=0, iteration=0)
    clean = None if reference is None else reference[:, None]
    counted = None if length is None else torch.tensor(length)
    return Samples(batch, audio=audio[:, None], rate=rate, reference_audio=clean, audio_length=counted)


def same(values: object, expected: Sequence[float], within: float = 1e-6) -> None:
    assert isinstance(values, Tensor) and values.dtype == torch.float32
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(values, wanted, rtol=0, atol=within, equal_nan=True)


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return torch.stack([voice(1.5, seed=seed) for seed in range(3)])


@pytest.fixture(scope="module")
def spoken(clean: Tensor) -> Samples:
    return heard(torch.stack([noisy(x, level) for x, level in zip(clean, (0.003, 0.02, 0.1), strict=True)]), clean)


# ---- SI-SDR and the log-spectral distance


def test_si_sdr_has_the_worked_value_whatever_the_scale():
    x, s = torch.tensor([[1.1, -0.9, 0.8, -1.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    for by in (1.0, 3.0, -0.01):
        same(si_sdr(heard(by * x, s)), [18.585372], 1e-5)
    same(si_sdr(heard(x + 0.3, s - 0.2)), [18.585372], 1e-4)  # means are removed


def test_si_sdr_of_orthogonal_noise_is_the_ratio_of_the_energies():
    t = torch.arange(1600) / 1600
    s, e = torch.sin(2 * math.pi * 10 * t), torch.sin(2 * math.pi * 20 * t)
    audio = torch.stack([s + e / 10, s + e, s / 10 + e])
    same(si_sdr(heard(audio, s.expand(3, -1))), [20.0, 0.0, -20.0], 1e-4)


def test_si_sdr_is_kept_within_its_limits_and_a_perfect_estimate_is_finite():
    s = voice(0.1)
    batch = heard(torch.stack([s, noisy(s, 1000.0)]), torch.stack([s, s]))
    same(si_sdr(batch), [30.0, -20.0])
    free = si_sdr(batch, clip=(-200.0, 200.0))
    assert free[0] == pytest.approx(156.5356, abs=1e-3) and -200 < free[1] < -20
    with pytest.raises(ValueError, match=r"clip is \[30.0, -20.0\] dB; expected the lowest and the highest"):
        si_sdr(batch, clip=(30.0, -20.0))


def test_the_log_spectral_distance_of_a_factor_is_the_factor_in_db_whatever_the_scale():
    s = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))  # white: no power is near the floor
    audio, reference = torch.cat([2 * s, s / 2, -s]), s.expand(3, -1)
    for by in (1.0, 0.01):
        same(log_spectral_distance(heard(by * audio, by * reference)), [-6.020600, -6.020600, 0.0], 1e-4)
    same(log_spectral_distance(heard(s * 1e3, s)), [-60.0], 1e-3)


def test_the_log_spectral_distance_is_that_of_sums_written_out():
    x, s = torch.randn(2, 1, 640, generator=torch.Generator().manual_seed(0)).double()

    def decibel(signal: Tensor, start: int, k: int) -> float:
        n = torch.arange(512)
        frame = signal[0, start : start + 512] * (0.5 - 0.5 * torch.cos(2 * math.pi * n / 512))
        angle = 2 * math.pi * k * n / 512
        return 10 * math.log10(float((frame * angle.cos()).sum() ** 2 + (frame * angle.sin()).sum() ** 2))

    frames = []
    for start in (0, 128):
        gaps = [decibel(x, start, k) - decibel(s, start, k) for k in range(257)]
        frames.append(math.sqrt(sum(gap**2 for gap in gaps) / 257))
    same(log_spectral_distance(heard(x.float(), s.float())), [-sum(frames) / 2], 1e-3)


# ---- the reference packages


@pytest.mark.parametrize("rate", [8_000, 10_000, 16_000])
@pytest.mark.parametrize("extended", [False, True])
def test_stoi_is_that_of_pystoi(rate: int, extended: bool):
    s = voice(1.2, rate)
    x = noisy(s, 0.05)
    expected = pystoi.stoi(s.double().numpy(), x.double().numpy(), rate, extended=extended)
    same(stoi(extended=extended, processes=0)(heard(x[None], s[None], rate)), [expected])
    assert 0.2 < expected < 0.99


@pytest.mark.parametrize(("band", "mode", "rate"), [("wide", "wb", 16_000), ("narrow", "nb", 8_000)])
def test_pesq_is_that_of_the_package_at_its_rate_and_resampled(band: str, mode: str, rate: int):
    package = pytest.importorskip("pesq")
    s, reward = voice(1.2, rate), build({"build": "rewards.speech:pesq", "band": band, "processes": 0}, "rewards.pesq")
    x = noisy(s, 0.01)
    expected = package.pesq(rate, s.numpy(), x.numpy(), mode)
    same(reward(heard(x[None], s[None], rate)), [expected])
    assert 1.02 < expected < 4.5
    higher = [resample_poly(signal.double().numpy(), 3, 1).astype(numpy.float32) for signal in (x, s)]
    lower = [resample_poly(signal.astype(numpy.float64), 1, 3) for signal in higher]
    expected = package.pesq(rate, lower[1], lower[0], mode)
    audio, reference = (torch.tensor(signal)[None] for signal in higher)
    same(reward(heard(audio, reference, 3 * rate)), [expected])


def test_wide_band_pesq_refuses_audio_that_has_no_wide_band(clean: Tensor):
    pytest.importorskip("pesq")
    with pytest.raises(ValueError, match="rate of 8000 Hz; wide-band PESQ expects 16000 or more"):
        pesq(processes=0)(heard(clean, clean, 8_000))


@pytest.mark.slow
def test_dnsmos_has_the_numbers_of_speechmos():
    run = pytest.importorskip("speechmos.dnsmos").run
    for x in (noisy(voice(10.0), 0.01), noisy(voice(3.0), 0.002)):
        theirs = run(x.numpy(), RATE)
        batch = heard(x[None], None)
        ours = measures(names=("dnsmos", "dnsmos_p808"), processes=0)(batch)
        for name, key in (
            ("dnsmos_sig", "sig"),
            ("dnsmos_bak", "bak"),
            ("dnsmos_ovr", "ovrl"),
            ("dnsmos_p808", "p808"),
        ):
            same(ours[name], [theirs[f"{key}_mos"]], 1e-4)


@pytest.mark.slow
def test_dnsmos_names_its_parts_and_needs_no_reference(clean: Tensor):
    batch = heard(clean[:1, :16_000], None)  # of its windows one is distinct
    parts = measures(names=("dnsmos",), processes=0)(batch)
    assert list(parts) == ["dnsmos_sig", "dnsmos_bak", "dnsmos_ovr"]
    assert all(1 < float(part) < 5 for part in parts.values())
    same(dnsmos(part="bak", processes=1)(batch), parts["dnsmos_bak"].tolist(), 0)


def test_dnsmos_p808_hears_noise_not_what_lies_behind_the_length(clean: Tensor):
    audio = torch.stack([clean[0, :16_000], noisy(clean[0, :16_000], 0.1)])
    padded = torch.cat([audio, torch.full((2, 100), 0.9)], 1)
    reward = dnsmos_p808(processes=0)
    plain = reward(heard(audio, None))
    assert 5 > plain[0] > plain[1] > 1
    assert torch.equal(reward(heard(padded, None, length=[16_000] * 2)), plain)


@pytest.mark.parametrize("size", [6_400, 16_000, 32_000, 32_123, 100_000, WINDOW, WINDOW + 1, 176_077, 400_000])
def test_the_distinct_windows_are_those_of_the_doubled_recording_one_each_second(size: int):
    x = numpy.random.default_rng(0).standard_normal(size)
    doubled = x
    while len(doubled) < WINDOW:
        doubled = numpy.append(doubled, doubled)
    every = [doubled[AT * second :][:WINDOW] for second in range(len(doubled)) if AT * second + WINDOW <= len(doubled)]
    every = every[: int(len(doubled) // AT - 9.01) + 1]  # the published count, which may leave out the last
    found = looks(x)
    assert sum(count for _, count in found.values()) == len(every)
    for window, count in found.values():
        assert sum(numpy.array_equal(window, one) for one in every) == count


# ---- what every measure keeps to


@pytest.fixture(scope="module")
def everything() -> tuple[str, ...]:
    pytest.importorskip("pesq")
    return NATIVE


def test_processes_give_the_numbers_of_this_process_bit_by_bit(spoken: Samples, everything):
    assert spoken.audio is not None
    broken = spoken.audio.clone()
    broken[1] = 0
    batch = replace(spoken, audio=broken, audio_length=torch.tensor([24_000, 24_000, 20_001]))
    here, there = (measures(names=everything, processes=count)(batch) for count in (0, 2))
    assert list(here) == list(there) == list(NATIVE)
    for name, values in here.items():
        assert values.dtype == torch.float32 and values.isnan().tolist() == [False, True, False]
        assert torch.equal(values.nan_to_num(99), there[name].nan_to_num(99)), name


def test_every_measure_prefers_less_noise_and_follows_a_permutation(spoken: Samples, everything):
    reward, order = measures(names=everything, processes=0), torch.tensor([2, 0, 1])
    plain, moved = reward(spoken), reward(spoken.take(order))
    for name, values in plain.items():
        assert values[0] > values[1] > values[2], name
        assert torch.equal(moved[name], values[order]), name


def test_what_lies_behind_the_length_counts_nowhere(spoken: Samples, everything):
    assert spoken.audio is not None and spoken.reference_audio is not None
    reward, tail = measures(names=everything, processes=0), torch.full((3, 1, 5_000), 0.9)
    tail[0] = NAN
    audio, reference = (torch.cat([x, tail], 2) for x in (spoken.audio, spoken.reference_audio))
    padded = replace(spoken, audio=audio, reference_audio=reference, audio_length=torch.full((3,), 24_000))
    plain, found = reward(spoken), reward(padded)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_silence_and_what_is_not_finite_or_too_short_are_nan_without_a_sound(
    clean: Tensor, everything, caplog: pytest.LogCaptureFixture
):
    audio, reference = noisy(clean[:1], 0.02).repeat(8, 1), clean[:1].repeat(8, 1)
    audio[0], reference[1] = 0, 0
    audio[2, 5], reference[3, 7], audio[4, 9] = NAN, NAN, float("inf")
    audio[5] = 0.3 + 1e-6 * audio[5]  # a constant, in 16 bits
    for values in measures(names=everything, processes=0)(
        heard(audio, reference, length=[24_000] * 6 + [0, 1])
    ).values():
        assert values.isnan().all()
    assert measures(names=("dnsmos", "dnsmos_p808"), processes=0)(heard(audio[:1], None))["dnsmos_sig"].isnan().all()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "shortest"),
    [("stoi", 0.4096), ("estoi", 0.4096), ("pesq_wide", 0.25), ("pesq_narrow", 0.25), ("log_spectral_distance", 0.032)],
)
def test_a_measure_has_a_shortest_recording(name: str, shortest: float):
    if name.startswith("pesq"):
        pytest.importorskip("pesq")
    s = torch.sin(torch.arange(24_000) * 0.3) * 0.5  # no pause
    x = noisy(s, 0.01)
    size = int(shortest * RATE)
    assert math.isnan(measure(name, RATE, x[: size - 2].numpy(), s[: size - 2].numpy())["value"][0])
    assert math.isfinite(measure(name, RATE, x[: size + 200].numpy(), s[: size + 200].numpy())["value"][0])


def test_dnsmos_is_nan_below_0_4_seconds():
    x = voice(1.0)[:6_399].numpy()
    assert all(map(math.isnan, measure("dnsmos", RATE, x)["value"] + measure("dnsmos_p808", RATE, x)["value"]))


def test_channels_are_averaged(spoken: Samples):
    assert spoken.audio is not None and spoken.reference_audio is not None
    wide = replace(
        spoken,
        audio=torch.cat([spoken.audio * 1.5, spoken.audio * 0.5], 1),
        reference_audio=spoken.reference_audio.expand(-1, 2, -1),
    )
    torch.testing.assert_close(si_sdr(wide), si_sdr(spoken), rtol=0, atol=1e-4)


def test_a_measure_draws_nothing_from_the_random_numbers_of_the_run(spoken: Samples):
    numpy.random.seed(3)
    expected = numpy.random.random()
    numpy.random.seed(3)
    stoi(extended=True, processes=0)(spoken)
    assert numpy.random.random() == expected


# ---- what fails


def test_an_error_of_a_library_is_the_problem_of_its_recording():
    x = voice(1.0).numpy()
    assert measure("stoi", 0, x, x) == {"problem": "ValueError: up and down must be >= 1"}


def test_a_measure_that_takes_too_long_is_nan_and_counted(spoken: Samples, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "rewards.pool"):
        values = stoi(processes=1, timeout=1e-4)(spoken.take(torch.tensor([0])))
    assert values.isnan().all()
    assert [record.message for record in caplog.records] == [
        "stoi: 1 of 1 samples have no score: the process died or took more than 0.0001 s (1)"
    ]


@pytest.mark.slow
def test_a_recording_that_ends_the_code_of_pesq_is_nan_and_its_neighbour_has_its_score(
    caplog: pytest.LogCaptureFixture,
):
    pytest.importorskip("pesq")
    burst = torch.cat([torch.randn(6_400, generator=torch.Generator().manual_seed(0)) * 0.3, torch.zeros(9_600)])
    crowd = burst.repeat(120)  # the package knows 50 utterances, and writes on
    batch = heard(torch.stack([crowd, crowd]), torch.stack([crowd, crowd]), length=[len(crowd), 80_000])
    with caplog.at_level(logging.WARNING, "rewards.pool"):
        values = pesq(processes=1)(batch)
    assert values.isnan().tolist() == [True, False]
    assert [record.message for record in caplog.records] == [
        "pesq_wide: 1 of 2 samples have no score: the process died or took more than 300 s (1)"
    ]


def test_pesq_without_its_package_says_how_to_get_it_and_the_rest_works(
    spoken: Samples, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pesq", None)  # as if it were not installed
    for make in (pesq, lambda: measures(names=("stoi", "pesq_wide"))):
        with pytest.raises(ValueError, match=r"PESQ needs the package pesq .*: pip install mmgrpo\[pesq\]$"):
            make()
    assert measures(names=("stoi",), processes=0)(spoken)["stoi"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_audio": None}, "the samples carry no reference_audio; expected reference_audio of shape"),
        ({"audio": None}, "the samples carry no audio; expected audio of shape"),
        ({"rate": None}, "the samples carry audio of the rate None; expected Hz"),
        ({"audio": torch.zeros(3, 24_000)}, r"audio has shape \(3, 24000\); expected \(3, any, any\)"),
        ({"audio": torch.zeros(3, 1, 9)}, "reference_audio has 24000 audio samples; expected 9, those of the audio"),
        (
            {"audio_length": torch.tensor([1, 2, 24_001])},
            "audio_length has values from 1 to 24001; expected 0 to 24000",
        ),
        ({"audio_length": torch.tensor([1, 2])}, r"audio_length has shape \(2\,\); expected \(3\)"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(spoken: Samples, change: dict[str, Tensor | None], message: str):
    for reward in (si_sdr, log_spectral_distance, stoi(processes=0), measures(names=("estoi",), processes=2)):
        with pytest.raises(ValueError, match=message):
            reward(replace(spoken, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": []}, r"names is \[\]; expected some of si_sdr, "),
        ({"names": ["stoi", "stoi"]}, r"names is \['stoi', 'stoi'\]; expected some of"),
        ({"names": ["stoi"], "processes": -1}, "processes is -1 and timeout 300.0 s; expected at least 0"),
        ({"names": ["stoi"], "timeout": 0.0}, "timeout 0.0 s; expected at least 0 and more than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build({"build": "rewards.speech:measures", **options}, "rewards.speech")
    with pytest.raises(RecipeError, match="rewards.speech.names"):
        build({"build": "rewards.speech:measures", "names": ["stoy"]}, "rewards.speech")


# ---- in a run


def test_scores_can_be_waited_for_later(spoken: Samples):
    reward = measures(names=("stoi", "si_sdr"), processes=2)
    first, second = reward.submit(spoken), reward.submit(spoken.take(torch.tensor([2])))
    assert second()["stoi"].tolist() == first()["stoi"].tolist()[2:]


def test_the_components_enter_the_feedback_by_name(spoken: Samples):
    feedback = score({"speech": measures(names=("stoi", "si_sdr"), processes=0)}, {"speech": 0.5}, spoken)
    assert feedback.weights == {"speech.stoi": 0.5, "speech.si_sdr": 0.5}


def test_a_guard_holds_back_the_quality_of_what_cannot_be_understood(spoken: Samples):
    def quality(samples: Samples) -> Tensor:
        return torch.tensor([4.0, 4.5, 5.0])

    def similarity(samples: Samples) -> Tensor:
        return torch.tensor([0.9, NAN, 0.2])

    guards, least = {"similarity": similarity}, {"similarity": 0.5}
    same(guarded(quality=quality, guards=guards, least=least)(spoken), [4.0, NAN, NAN])
    same(guarded(quality=quality, guards=guards, least=least, floor=1.0)(spoken), [4.0, NAN, 1.0])
    heard_as = stoi(processes=0)(spoken).tolist()
    both, limits = {"stoi": stoi(processes=0), "similarity": si_sdr}, {"stoi": heard_as[1], "similarity": -20.0}
    same(guarded(quality=quality, guards=both, least=limits, floor=1.0)(spoken), [4.0, 4.5, 1.0])


def test_a_guard_holds_back_every_component_and_makes_no_opinion_of_none(spoken: Samples):
    def quality(samples: Samples) -> dict[str, Tensor]:
        return {"sig": torch.tensor([NAN, 2.0, 3.0]), "ovr": torch.tensor([1.5, NAN, 2.5])}

    reward = guarded(quality=quality, guards={"sdr": si_sdr}, least={"sdr": 0.0}, floor=1.0)
    silenced = replace(spoken, audio=torch.stack([spoken.audio[0], spoken.audio[1], -spoken.audio[1]]))  # type: ignore[index]
    found = reward(silenced)
    assert isinstance(found, dict)
    same(found["sig"], [NAN, 2.0, 1.0])  # the third says something else than its reference
    same(found["ovr"], [1.5, NAN, 1.0])


def test_a_guards_limits_are_named_as_the_guards_and_it_has_one_component(spoken: Samples):
    for guards, least in (({"a": si_sdr}, {"b": 1.0}), ({}, {})):
        with pytest.raises(ValueError, match=r"least names \[.*\]; expected the guards \[.*\], at least one"):
            guarded(quality=si_sdr, guards=guards, least=least)
    several = measures(names=("si_sdr", "stoi"), processes=0)
    with pytest.raises(ValueError, match="the guard 'a' has 2 components; expected 1"):
        guarded(quality=si_sdr, guards={"a": several}, least={"a": 0.0})(spoken)


def test_a_recipes_tables_build_a_guard(spoken: Samples):
    table = {
        "build": "rewards.compose:guarded",
        "quality": {"build": "rewards.speech:si_sdr"},
        "guards": {"stoi": {"build": "rewards.speech:stoi", "processes": 0}},
        "least": {"stoi": 2.0},
        "floor": -20.0,
    }
    same(build(table, "rewards.quality")(spoken), [-20.0] * 3)


@pytest.mark.slow
def test_the_benchmark_prints_what_processes_and_overlap_cost(capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    speech_scoring.main("--recordings 2 --seconds 1 --pairs 1 --measures stoi si_sdr".split())
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "speech_scoring" and found["own_processor_seconds"] > 0
    for name in ("two_against_one", "one_against_none", "beside_against_after/one", "beside_against_after/two"):
        assert found[name].keys() == {"ratio", "low", "high", "fastest", "seconds", "against"}
        assert found[name]["ratio"] == pytest.approx(found[name]["seconds"] / found[name]["against"])

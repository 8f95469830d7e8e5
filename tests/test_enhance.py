"""`mmgrpo enhance`: windows leave no trace, files keep their form, and a bad file stops no other."""

import os
import signal
from collections.abc import Sequence
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer
from torch import Tensor

from mmgrpo import checkpoint
from pipelines import speech_models
from pipelines.enhance import Job, Report, command, enhance_all, jobs, notes, terminable, unfinished
from pipelines.enhance_files import (
    Enhancer,
    enhance_file,
    enhance_waveform,
    enhancer,
    fade,
    grid,
    loaded,
    look,
    model_folder,
    usable,
)
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains

RATE = 16_000


def same(noisy: Tensor, seeds: Sequence[int]) -> Tensor:
    return noisy.clone()


def blurred(noisy: Tensor, seeds: Sequence[int]) -> Tensor:
    """Local in time: each sample of the result depends on the 41 around it."""
    return torch.nn.functional.conv1d(noisy[:, None].tanh(), torch.hann_window(41)[None, None] / 20, padding=20)[:, 0]


def tripled(noisy: Tensor, seeds: Sequence[int]) -> Tensor:
    return 3 * noisy


def voices(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> Tensor:
    """Tones below 3 kHz; (C, N) within [-0.5, 0.5]."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    generator = torch.Generator().manual_seed(seed)
    tones = 200 + 2800 * torch.rand(channels, 5, 1, generator=generator)  # Hz
    phases = 6 * torch.rand(channels, 5, 1, generator=generator)
    return 0.1 * torch.sin(2 * torch.pi * tones * time + phases).sum(1).float()


def write(path: Path, waveform: Tensor, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform.T.numpy(), rate, subtype)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small untrained model."""
    torch.manual_seed(0)
    representation = BandGains()
    network = BandGainNetwork(representation.channels(), width=16, blocks=2)
    folder = tmp_path_factory.mktemp("model")
    speech_models.save(folder, network, representation)
    return folder


def run(*words: object) -> int:
    """Exit code of the command."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.01, 1.0, 2.5, 7.77, 61.234])
@pytest.mark.parametrize("window", [1.0, 2.0, 10.0])
def test_windows_cover_a_recording_and_overlap(rate: int, seconds: float, window: float) -> None:
    total = round(seconds * rate)
    starts, length, overlap = grid(total, rate, Enhancer(same, RATE, window))
    stops = [start + length for start in starts[:-1]] + [total]
    assert starts[0] == 0
    assert all(start * RATE % rate == 0 for start in starts)
    assert all(stop - start >= overlap > 0 for stop, start in zip(stops, starts[1:], strict=False))
    assert length == window * rate
    assert stops[-1] - starts[-1] < length + rate // gcd(rate, RATE)


def test_the_weights_of_two_windows_sum_to_1_and_leave_their_edges_out() -> None:
    later = fade(400)
    torch.testing.assert_close(later + later.flip(0), torch.ones(400))
    assert later[:100].abs().max() == 0
    assert later.diff().min() >= 0


@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000])
@pytest.mark.parametrize("function", [same, blurred])
def test_the_result_does_not_depend_on_the_window(rate: int, function) -> None:
    heard = voices(3.3, rate)
    results = [enhance_waveform(heard, rate, Enhancer(function, RATE, window)) for window in (1.0, 1.7, 60.0)]
    for result in results:
        assert result.shape == heard.shape
        torch.testing.assert_close(result, results[-1], atol=2e-5, rtol=0)


def test_an_enhancer_that_changes_nothing_changes_nothing() -> None:
    heard = voices(3.3, channels=2)
    assert torch.equal(enhance_waveform(heard, RATE, Enhancer(same, RATE, 1.0)), heard)
    for rate in (44_100, 48_000):
        heard = voices(3.3, rate)
        there_and_back = enhance_waveform(heard, rate, Enhancer(same, RATE, 1.0))
        inside = slice(rate // 10, -rate // 10)  # the filter has nothing beyond the ends
        torch.testing.assert_close(there_and_back[:, inside], heard[:, inside], atol=3e-5, rtol=0)


def test_no_more_than_a_window_is_given_at_once() -> None:
    given = []

    def watched(noisy: Tensor, seeds: Sequence[int]) -> Tensor:
        given.append(tuple(noisy.shape))
        return noisy

    enhance_waveform(voices(20, channels=2), RATE, Enhancer(watched, RATE, 2.0))
    assert set(given) == {(1, 2 * RATE)}
    assert len(given) == 2 * 11  # 0 to 2 s, then 1.8 s further each


@pytest.mark.parametrize("samples", [1, 2, 100, 5000])
def test_recordings_of_a_few_samples_are_enhanced(samples: int, model: Path) -> None:
    heard = voices(1)[:, :samples] + 0.1
    assert enhance_waveform(heard, RATE, loaded(model, 2, "cpu")).shape == heard.shape
    assert torch.equal(enhance_waveform(heard, RATE, Enhancer(same, RATE)), heard)


def test_a_channel_does_not_depend_on_the_others_and_equal_ones_stay_equal(model: Path) -> None:
    ours = loaded(model, 2, "cpu", window=1.0)
    heard = voices(2.5, channels=2)
    together = enhance_waveform(heard, RATE, ours)
    assert torch.equal(together[:1], enhance_waveform(heard[:1], RATE, ours))
    twice = enhance_waveform(heard[:1].expand(2, -1), RATE, ours)
    assert torch.equal(twice[0], twice[1])


def test_digital_silence_stays_silent_beside_speech(model: Path) -> None:
    heard = torch.cat([voices(1), torch.zeros(1, 5 * RATE)], 1)
    made = enhance_waveform(heard, RATE, loaded(model, 2, "cpu", window=1.0))
    assert made[:, :RATE].abs().max() > 0
    assert made[:, 2 * RATE :].abs().max() == 0


def test_loudness_is_preserved(model: Path) -> None:
    ours = loaded(model, 2, "cpu")
    heard = voices(1.5)
    loud, quiet = enhance_waveform(heard, RATE, ours), enhance_waveform(0.01 * heard, RATE, ours)
    torch.testing.assert_close(100 * quiet, loud, atol=1e-3 * loud.abs().max().item(), rtol=0)


def test_what_a_model_may_not_make_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made \(1, 8000\) of \(1, 16000\) samples"):
        enhance_waveform(voices(1), RATE, Enhancer(lambda noisy, seeds: noisy[:, ::2], RATE))
    with pytest.raises(ValueError, match="samples that are not finite"):
        enhance_waveform(voices(1), RATE, Enhancer(lambda noisy, seeds: noisy / 0, RATE))
    with pytest.raises(ValueError, match="44101 Hz, which has no simple ratio to the model's 16000 Hz"):
        enhance_waveform(voices(1), 44_101, Enhancer(same, RATE))
    with pytest.raises(ValueError, match=r"shape \(16000,\); expected \(channels, samples\)"):
        enhance_waveform(voices(1)[0], RATE, Enhancer(same, RATE))


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "PCM_U8"), ("a.wav", "FLOAT"),
        ("a.flac", "PCM_16"), ("a.FLAC", "PCM_24"), ("a.aiff", "PCM_16"),
    ],
)  # fmt: skip
def test_a_file_keeps_its_form_and_its_samples(name: str, subtype: str, tmp_path: Path) -> None:
    heard = voices(2.3, channels=2)
    heard[:, 7] = -1.0  # the lowest 16-bit sample is no clipping
    source, target = write(tmp_path / name, heard, subtype=subtype), tmp_path / "out" / name
    assert enhance_file(source, target, look(source), Enhancer(same, RATE, 1.0)) == 1
    before, after = soundfile.info(source), soundfile.info(target)
    assert (after.subtype, after.format, after.samplerate) == (before.subtype, before.format, before.samplerate)
    assert np.array_equal(soundfile.read(source)[0], soundfile.read(target)[0])


@pytest.mark.parametrize(
    ("subtype", "other", "expected"),
    [("PCM_16", "b.flac", "PCM_16"), ("FLOAT", "b.flac", "PCM_24"), ("PCM_24", "b.ogg", "VORBIS")],
)
def test_another_suffix_gets_what_it_can_hold(subtype: str, other: str, expected: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.wav", voices(1), subtype=subtype)
    enhance_file(source, tmp_path / other, look(source), Enhancer(same, RATE))
    assert soundfile.info(tmp_path / other).subtype == expected


def test_a_recording_of_another_rate_keeps_rate_length_and_channels(tmp_path: Path) -> None:
    source = write(tmp_path / "a.wav", voices(2.3456, 44_100, channels=3), 44_100)
    enhance_file(source, tmp_path / "b.wav", look(source), Enhancer(same, RATE, 1.0))
    before, after = soundfile.info(source), soundfile.info(tmp_path / "b.wav")
    assert (after.samplerate, after.frames, after.channels) == (44_100, before.frames, 3)
    enhance_file(source, tmp_path / "c.wav", look(source), Enhancer(same, RATE, 1.0), mono=True)
    mixed, _ = soundfile.read(tmp_path / "c.wav")
    np.testing.assert_allclose(mixed, soundfile.read(tmp_path / "b.wav")[0].mean(1), atol=1e-4)


@pytest.mark.parametrize(("subtype", "by"), [("PCM_16", 0.999 / 1.5), ("FLOAT", 1)])
def test_a_peak_is_scaled_only_where_it_would_be_clipped(subtype: str, by: float, tmp_path: Path) -> None:
    heard = voices(1)
    heard = heard / heard.abs().max() * 0.5
    source = write(tmp_path / "a.wav", heard, subtype=subtype)
    scale = enhance_file(source, tmp_path / "b.wav", look(source), Enhancer(tripled, RATE))
    assert scale == pytest.approx(by, rel=1e-4)
    np.testing.assert_allclose(soundfile.read(tmp_path / "b.wav")[0], 3 * scale * heard[0].numpy(), atol=1e-4)
    report = Report()
    enhance_all([Job(source, tmp_path / "c.wav")], Enhancer(tripled, RATE), report)
    assert report.scaled == ([f"{tmp_path / 'c.wav'} by 3.5 dB"] if by != 1 else [])
    assert len(notes(report, 1, RATE)) == (by != 1)


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be enhanced, and what is said of each."""
    write(folder / "silent.wav", torch.zeros(1, 1000))
    write(folder / "empty.wav", torch.zeros(1, 0))
    spoilt = voices(1)
    spoilt[0, 400] = torch.nan
    write(folder / "nan.wav", spoilt, subtype="FLOAT")
    (folder / "text.flac").write_text("no audio")
    (folder / "nothing.wav").write_bytes(b"")
    write(folder / "odd.wav", voices(0.1), rate=44_101)
    whole = write(folder / "cut.flac", torch.rand(1, 20_000) - 0.5).read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    return {
        "silent.wav": "it is silent: all its 1000 samples are 0",
        "empty.wav": "it holds no samples",
        "nan.wav": "it holds samples that are not finite",
        "text.flac": "it is no audio that can be read",
        "nothing.wav": "it is no audio that can be read",
        "odd.wav": "its rate is 44101 Hz",
        "cut.flac": "it cannot be decoded to its end",
    }


def test_bad_files_are_named_and_the_others_are_done(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings, results = tmp_path / "in", tmp_path / "out"
    expected = bad_files(recordings)
    write(recordings / "deep" / "good.wav", voices(1.2))
    (recordings / "notes.txt").write_text("not looked at")
    assert run(recordings, results, "--checkpoint", model, "--steps", 2, "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("Enhanced 1 of 8 files, 1.2 s of audio")
    lines = printed.err.splitlines()
    assert lines[0] == "mmgrpo: 7 of 8 files could not be enhanced:"
    found = {Path(line.split(": ")[0]).name: line for line in lines[1:]}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name]
    assert [path for path in results.rglob("*") if path.is_file()] == [results / "deep" / "good.wav"]


def test_the_same_seed_gives_the_same_file(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "a.flac", voices(2.5))
    options = ("--checkpoint", model, "--steps", 2, "--device", "cpu", "--window", 1)
    for name, seed in (("b", 3), ("c", 3), ("d", 4)):
        assert run(source, tmp_path / f"{name}.flac", *options, "--seed", seed) == 0
    b, c, d = ((tmp_path / f"{name}.flac").read_bytes() for name in "bcd")
    assert b == c
    assert b != d


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_file_leaves_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    source, calls = write(tmp_path / "a.wav", voices(5)), []

    def failing(noisy: Tensor, seeds: Sequence[int]) -> Tensor:
        calls.append(seeds)
        if len(calls) == 3:
            raise failure
        return noisy

    with pytest.raises(failure):
        enhance_file(source, tmp_path / "out" / "b.wav", look(source), Enhancer(failing, RATE, 1.0))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_request_to_terminate_is_an_interruption() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) is before


def test_files_that_exist_are_kept_unless_the_user_says_otherwise(tmp_path: Path, model: Path) -> None:
    for name in ("a.wav", "b.wav"):
        write(tmp_path / "in" / name, voices(1))
    there = write(tmp_path / "out" / "a.wav", voices(0.1))
    before = there.read_bytes()
    words = (tmp_path / "in", tmp_path / "out", "--checkpoint", model, "--steps", 1, "--device", "cpu")
    with pytest.raises(FileExistsError, match=r"a\.wav exists; --overwrite replaces what exists, --resume leaves it"):
        unfinished(jobs(tmp_path / "in", tmp_path / "out"), overwrite=False, resume=False)
    assert not (tmp_path / "out" / "b.wav").exists()
    assert run(*words, "--resume") == 0
    assert there.read_bytes() == before
    assert (tmp_path / "out" / "b.wav").is_file()
    assert run(*words, "--overwrite") == 0
    assert there.read_bytes() != before


def test_a_model_is_found_in_its_folder_in_a_checkpoint_and_in_a_run(tmp_path: Path, model: Path) -> None:
    ours = speech_models.load(model)

    def export(folder: Path) -> None:
        speech_models.save(folder / "model", ours.network, ours.representation)

    older = checkpoint.write(tmp_path / "run", 1, {}, {}, extra=export)
    newer = checkpoint.write(tmp_path / "run", 2, {}, {}, extra=export)
    assert model_folder(model) == model
    assert model_folder(older) == older / "model"
    assert model_folder(tmp_path / "run") == newer / "model"
    for place in (model, older, tmp_path / "run"):
        assert loaded(place, 1, "cpu").rate == RATE


@pytest.mark.parametrize("name", ["absent", "other"])
def test_a_folder_without_a_model_says_what_was_looked_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no speech model in .*; looked for config.json in it, in its model/"):
        model_folder(tmp_path / name)


def test_a_file_goes_where_it_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "a.wav", voices(0.1))
    (tmp_path / "there").mkdir()
    assert jobs(source, tmp_path / "b.flac") == [Job(source, tmp_path / "b.flac")]
    assert jobs(source, tmp_path / "there") == [Job(source, tmp_path / "there" / "a.wav")]
    assert jobs(source, tmp_path / "new") == [Job(source, tmp_path / "new" / "a.wav")]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.wav", "b.wav", "no recording and no folder"),
        ("in/a.wav", "in/a.wav", "would be replaced by its own result"),
        ("in/a.wav", "in", "would be replaced by its own result"),
        ("in/a.wav", "b.wva", "unknown kind of audio; did you mean '.wav'"),
        ("in", "in/out", "is inside"),
        ("in", "in", "is inside"),
        ("in", "in/a.wav", "is a file; expected a folder"),
        ("bare", "out", "no recordings in"),
    ],
)
def test_paths_that_cannot_be_meant_are_refused(source: str, target: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.wav", voices(0.1))
    (tmp_path / "bare").mkdir()
    write(tmp_path / "bare" / ".hidden.wav", voices(0.1))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        jobs(tmp_path / source, tmp_path / target)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert usable("cpu") == "cpu"
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        usable("gpu")


def test_a_file_of_a_higher_rate_is_said_to_lose_its_upper_band(tmp_path: Path) -> None:
    source, report = write(tmp_path / "a.wav", voices(1, 48_000), 48_000), Report()
    enhance_all([Job(source, tmp_path / "b.wav")], Enhancer(same, RATE), report)
    assert report.done == [tmp_path / "b.wav"]
    assert "1 files of higher rates hold nothing above 8000 Hz" in notes(report, 1, RATE)[0]


def test_a_network_of_the_users_own_is_named_by_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Still(torch.nn.Module):\n"
        "    def __init__(self, channels):\n        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.zeros(()))\n\n"
        "    def forward(self, x_t, t, noisy):\n        return self.weight * x_t\n"
    )
    own = f"{tmp_path / 'mine.py'}:Still"
    model = speech_models.create({"representation": {"kind": "band_gains"}}, own)
    speech_models.save(tmp_path / "model", model.network, model.representation)
    source = write(tmp_path / "a.wav", voices(1))
    options = ("--checkpoint", tmp_path / "model", "--device", "cpu", "--steps", 1)
    assert run(source, tmp_path / "b.wav", *options, "--network", own) == 0
    with pytest.raises(ValueError, match="a network of your own"):
        loaded(tmp_path / "model", 1, "cpu")
    with pytest.raises(ValueError, match="steps is 0"):
        enhancer(model, 0)

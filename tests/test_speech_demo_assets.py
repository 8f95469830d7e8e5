"""The recordings and the start of the speech demo: what is shipped is whole, its parts share nothing, and the start enhances."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipelines import assets
from pipelines.speech_flow import enhance
from pipelines.speech_models import load
from rewards.speech_worker import si_sdr, stoi

FOLDER = assets.folder("speech_demo")
SENTENCES = FOLDER.parent / "speech_sentences.txt"
PARTS = {"alignment": 48, "validation": 24, "held_out": 96}  # and the fewest recordings of each
RATE = 16_000  # Hz


def rows(part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def recording(path: str) -> np.ndarray:
    return soundfile.read(FOLDER / path, dtype="float32")[0]


def digests(paths: list[Path]) -> set[bytes]:
    return {path.read_bytes() for path in paths}


@pytest.mark.parametrize(("part", "fewest"), PARTS.items())
def test_every_recording_is_a_mono_16_bit_file_at_16_khz_of_one_to_two_and_a_half_seconds(part, fewest):
    assert len(rows(part)) >= fewest
    assert {path for row in rows(part) for path in (row["clean"], row.get("noisy")) if path} <= {
        str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.flac")
    }
    for path in (FOLDER / part).rglob("*.flac"):
        found = soundfile.info(path)
        assert (found.samplerate, found.channels, found.subtype) == (RATE, 1, "PCM_16"), path
        assert RATE <= found.frames <= 2.5 * RATE and found.frames % (RATE // 10) == 0, path
        assert 0.01 < np.abs(recording(str(path.relative_to(FOLDER)))).max() < 0.99, path


def test_no_two_parts_share_a_voice_a_sentence_or_a_recording():
    for one in PARTS:
        for other in set(PARTS) - {one}:
            for column in ("voice", "prompt"):
                assert not {row[column] for row in rows(one)} & {row[column] for row in rows(other)}
            variants = [{row["voice"].split("+")[1] for row in rows(part)} for part in (one, other)]
            assert not variants[0] & variants[1]
            assert not digests(list((FOLDER / one).rglob("*.flac"))) & digests(list((FOLDER / other).rglob("*.flac")))


def test_sentences_of_the_training_of_the_start_are_in_no_other_part():
    name, *base = SENTENCES.read_text(encoding="utf-8").split("# alignment")[0].splitlines()
    assert name == "# base" and len(set(base)) == len(base) >= 150
    assert not {row["prompt"] for part in PARTS for row in rows(part)} & set(base)


def test_two_kinds_of_noise_are_heard_in_held_out_alone():
    trained = {path.stem.rsplit("_", 1)[0] for path in (FOLDER / "alignment" / "noise").glob("*.flac")}
    chosen_on = {row["noise"] for row in rows("validation")}
    assert len({row["noise"] for row in rows("held_out")} - trained - chosen_on) == 2
    assert len(trained) >= 6


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_pairs_are_mixed_at_the_ratio_that_their_row_names_between_0_and_10_db(part):
    for row in rows(part):
        clean, noisy = recording(row["clean"]), recording(row["noisy"])
        ratio = 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))
        assert ratio == pytest.approx(float(row["snr"]), abs=0.1) and 0 <= float(row["snr"]) <= 10


def test_all_files_together_are_under_seven_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 7e6


def test_the_start_loads_and_gains_more_than_3_db_and_is_better_understood_on_validation_pairs():
    model, gained, understood = load(FOLDER / "base"), [], []
    for number, row in enumerate(rows("validation")[:8]):
        clean, noisy = recording(row["clean"]), recording(row["noisy"])
        heard = enhance(model, torch.from_numpy(noisy)[None], 6, [number])[0].numpy()
        gained.append(si_sdr(heard, clean, RATE)[0] - si_sdr(noisy, clean, RATE)[0])
        understood.append(stoi(heard, clean, RATE, extended=False)[0] - stoi(noisy, clean, RATE, extended=False)[0])
    assert np.mean(gained) > 3 and np.mean(understood) > 0

"""Prompts are read exactly, every flaw of the data is reported at once, and the choice of prompts has no state."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmgrpo.data import choose, load_prompts, requests
from mmgrpo.types import Prompt


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def problems(source: str, **options: object) -> list[str]:
    """The lines of the error, without the first and without the file's name."""
    with pytest.raises(ValueError) as caught:
        load_prompts(source, **options)
    return [line.strip().removeprefix(source + ":") for line in str(caught.value).splitlines()[1:]]


def image(path: Path, color: str = "red") -> Path:
    Image.new("RGB", (8, 8), color).save(path)
    return path


def test_jsonl_rows_become_prompts_with_media_target_and_further_columns(tmp_path):
    picture = image(tmp_path / "a.png")
    row = {"caption": " a cat\u2028", "picture": "a.png", "answer": {"n": 2}, "number": 7, "level": 0.5}
    prompts = load_prompts(
        write(tmp_path / "p.jsonl", json.dumps(row, ensure_ascii=False) + "\n"),
        text="caption",
        id="number",
        media={"image": "picture"},
        target="answer",
    )
    assert prompts == [Prompt(7, " a cat\u2028", {"image": (picture,)}, {"n": 2}, {"level": 0.5})]


def test_text_file_has_one_prompt_a_line_and_ids_count_from_zero(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.txt", b"\xef\xbb\xbfa cat\r\n\r\na dog\x0bhouse\r\nlast"))
    assert [(prompt.id, prompt.text) for prompt in prompts] == [(0, "a cat"), (1, "a dog\x0bhouse"), (2, "last")]


def test_byte_order_mark_and_crlf_change_no_format(tmp_path):
    plain = ["prompt,target\na cat,1\n", '{"prompt": "a cat", "target": "1"}\n']
    for kind, content in zip(("csv", "jsonl"), plain, strict=True):
        marked = b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()
        expected = load_prompts(write(tmp_path / f"plain.{kind}", content), target="target")
        assert load_prompts(write(tmp_path / f"marked.{kind}", marked), target="target") == expected
        assert expected == [Prompt(0, "a cat", {}, "1")]


def test_quoted_csv_cells_keep_newlines_and_later_line_numbers_stay_right(tmp_path):
    good = 'prompt,n\n"two\nlines, and ""quotes""",1\n\nplain,2\n'
    prompts = load_prompts(write(tmp_path / "good.csv", good))
    assert [prompt.text for prompt in prompts] == ['two\nlines, and "quotes"', "plain"]
    bad = 'prompt,n\n"two\r\nlines",1\r\n\r\n  ,2\r\nthree,3,4\r\n"never closed,5'
    assert problems(write(tmp_path / "bad.csv", bad)) == [
        "5: prompt in column 'prompt' is empty",
        "6: has 3 cells; expected 2, as in the header",
        "7: invalid CSV: unexpected end of data",
    ]


def test_every_problem_is_reported_at_once_with_its_line(tmp_path):
    image(tmp_path / "good.png")
    whole = image(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "silence.wav").touch()
    rows = [
        '{"prompt": "fine", "image": "good.png", "id": 1}',
        '{"prompt": "", "image": "good.png", "id": 1}',
        '{"prompt": "x", "image": "gone.png", "id": 2}',
        '{"prompt": "x", "image": "cut.jpg", "id": "3"}',
        '{"prompt": "x", "image": "text.png", "id": 4.0}',
        '{"prompt": "x", "image": null, "id": true}',
        '{"prompt": "x", "image": ',
        "[1]",
        '{"promt": "x", "image": "silence.wav", "id": 9}',
        '{"prompt": 5, "image": "good.png", "id": 10}',
    ]
    found = problems(write(tmp_path / "p.jsonl", "\n".join(rows)), media={"image": "image"}, id="id")
    wanted = [
        ("2: prompt", "is empty"),
        ("2: id", "is 1, as in line 1"),
        ("3: image", f"does not exist: {tmp_path / 'gone.png'}"),
        ("4: image", "is no readable image"),
        ("5: image", "is no readable image"),
        ("5: id", "is 4.0; expected an integer"),
        ("6: image", "is empty"),
        ("6: id", "is True; expected an integer"),
        ("7: invalid JSON", "column"),
        ("8: is a JSON list", "expected an object"),
        ("9: no column 'prompt'", "did you mean 'promt'?"),
        ("9: image", "is no readable image"),
        ("10: prompt", "is a int; expected text"),
    ]
    assert len(found) == len(wanted)
    for line, (start, rest) in zip(found, wanted, strict=True):
        assert line.startswith(start) and rest in line


def test_a_column_that_all_rows_lack_is_reported_once_at_the_header(tmp_path):
    found = problems(write(tmp_path / "p.csv", "\nPrompts,n\na,1\nb,2\n"), target="colour")
    assert found == [
        "2: no column 'prompt'; did you mean 'Prompts'?",
        "2: no column 'colour'; there are 'Prompts', 'n'",
    ]


def test_at_most_twenty_problems_are_printed_and_the_rest_counted(tmp_path):
    found = problems(write(tmp_path / "p.jsonl", '{"prompt": ""}\n' * 33))
    assert len(found) == 21 and found[-1] == "and 13 more" and found[19].startswith("20:")


def test_other_media_need_only_be_there_and_not_empty(tmp_path):
    (tmp_path / "full.wav").write_bytes(b"RIFF")
    (tmp_path / "empty.wav").touch()
    source = write(tmp_path / "p.csv", "prompt,sound\na,full.wav\nb,empty.wav\n")
    assert problems(source, media={"audio": "sound"}) == [
        f"3: audio in column 'sound' is an empty file: {tmp_path / 'empty.wav'}"
    ]
    assert load_prompts(source, media={"audio": "sound"}, limit=1)[0].media == {"audio": (tmp_path / "full.wav",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.xlsx", "x", "ends in '.xlsx'; expected one of .jsonl, .csv, .txt"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.txt", b"fine\n\xff\xfe", "p.txt:2: not UTF-8"),
        ("p.csv", "prompt,prompt\na,b\n", "1: names column 'prompt' twice"),
        ("p.jsonl", None, "does not exist"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message):
    source = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_a_saved_data_set_gives_the_same_prompts_as_its_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [image(tmp_path / f"{color}.png", color) for color in ("red", "blue")]
    table = datasets.Dataset.from_dict(
        {
            "prompt": ["a", "b"],
            "picture": [{"bytes": path.read_bytes(), "path": None} for path in pictures],
            "n": [1, 2],
        }
    ).cast_column("picture", datasets.Image())
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "split"))
    for folder in ("one", "split"):
        prompts = load_prompts(str(tmp_path / folder), media={"image": "picture"})
        assert [(prompt.text, prompt.columns) for prompt in prompts] == [("a", {"n": 1}), ("b", {"n": 2})]
        assert [path.read_bytes() for prompt in prompts for path in prompt.media["image"]] == [
            path.read_bytes() for path in pictures
        ]
    (left,) = load_prompts(str(tmp_path / "split"), split="test")
    assert left.text == "b" and left.columns == {"n": 2}


def test_a_folder_of_data_files_is_read_by_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    image(folder / "a.png")
    write(folder / "train.csv", "prompt,picture\na cat,a.png\n ,gone.png\n")
    assert problems(str(folder), media={"image": "picture"}) == [
        "2: prompt in column 'prompt' is empty",
        f"2: image in column 'picture' does not exist: {folder / 'gone.png'}",
    ]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (20, 16), (12, 4), (31, 15), (5, 5), (101, 8), (17, 9)])
def test_every_epoch_uses_each_prompt_once_and_no_iteration_uses_one_twice(count, size):
    iterations = [choose(count, size, seed=3, iteration=i) for i in range(4 * count)]
    assert all(len(set(indices)) == size for indices in iterations)
    flat = [index for indices in iterations for index in indices]
    epochs = [flat[start : start + count] for start in range(0, len(flat), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_the_choice_depends_on_seed_and_iteration_but_not_on_earlier_calls():
    alone = choose(1000, 8, seed=0, iteration=777)
    walked = [choose(1000, 8, seed=0, iteration=i) for i in range(778)][-1]
    assert alone == walked
    assert alone != choose(1000, 8, seed=1, iteration=777) and alone != choose(1000, 8, seed=0, iteration=776)


def test_repairing_the_border_between_epochs_leaves_every_place_equally_likely():
    """20 prompts, 16 an iteration: each of the 20 x 20 counts of (prompt, place) is Binomial(1000, 1 / 20)."""
    counts = torch.zeros(20, 20)
    for seed in range(25):
        flat = [index for i in range(50) for index in choose(20, 16, seed, i)]
        for position, index in enumerate(flat):
            counts[index, position % 20] += 1
    mean, std = 50.0, 6.9  # 25 seeds x 40 epochs = 1000 draws
    assert (counts - mean).abs().max() < 5 * std


def test_more_prompts_an_iteration_than_there_are_come_round_again():
    assert Counter(choose(3, 7, seed=0, iteration=0) + choose(3, 7, seed=0, iteration=1)).most_common()[-1][1] == 4
    for count, size, iteration in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        with pytest.raises(ValueError, match="cannot choose"):
            choose(count, size, 0, iteration)


def test_group_and_sample_ids_are_unique_in_the_run_and_equal_prompts_stay_two_groups():
    prompts = [Prompt(0, "same"), Prompt(1, "same"), Prompt(2, "other")]
    batches = [requests(prompts, [1, 0, 1], group_size=4, seed=5, iteration=i) for i in range(3)]
    assert torch.cat([batch.group for batch in batches]).tolist() == [g for g in range(9) for _ in range(4)]
    assert torch.cat([batch.sample for batch in batches]).tolist() == list(range(36))
    assert [prompt.id for prompt in batches[2].prompts] == [1] * 4 + [0] * 4 + [1] * 4
    assert (batches[2].seed, batches[2].iteration) == (5, 2)
    later = requests(prompts, [2], group_size=2, seed=5, iteration=1, first_group=2**40)
    assert later.group.tolist() == [2**40] * 2 and later.sample.tolist() == [2**41, 2**41 + 1]


@pytest.mark.parametrize(("indices", "size"), [([], 2), ([0], 0), ([3], 2), ([-1], 2)])
def test_a_request_for_nothing_or_for_a_prompt_that_is_not_there_is_refused(indices, size):
    with pytest.raises(ValueError, match="expected"):
        requests([Prompt(0, "a")] * 3, indices, group_size=size, seed=0, iteration=0)


def test_a_prompt_may_be_the_messages_of_a_chat(tmp_path):
    blocks = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    chat = [{"role": "system", "content": "Answer."}, {"role": "user", "content": blocks}]
    [prompt] = load_prompts(str(write(tmp_path / "p.jsonl", json.dumps({"prompt": chat}))))
    assert prompt.text == "Answer.\nHow many?"
    assert prompt.messages == tuple(chat)


def test_messages_that_are_no_chat_are_reported_with_what_arrived(tmp_path):
    chats = [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": " "}],
    ]
    found = problems(write(tmp_path / "p.jsonl", "\n".join(json.dumps({"prompt": chat}) for chat in chats)))
    assert [line.split(": ", 1)[1].split(" holds")[0] for line in found] == [
        "prompt in column 'prompt' is empty",
        "prompt in column 'prompt'",
        "prompt in column 'prompt'",
        "prompt in column 'prompt' is empty",
    ]
    assert "expected messages with 'role' and 'content'" in found[1]
    assert "expected text, or a list of blocks" in found[2]


def test_a_prompt_may_have_no_picture_or_several(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    rows = [
        {"prompt": "x", "images": []},
        {"prompt": "y", "images": ["a.png", "b.png"]},
        {"prompt": "z", "images": "a.png"},
    ]
    source = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    media = [prompt.media for prompt in load_prompts(str(source), media={"image": "images"})]
    assert media == [{}, {"image": (tmp_path / "a.png", tmp_path / "b.png")}, {"image": (tmp_path / "a.png",)}]
    source = write(tmp_path / "p.jsonl", json.dumps({"prompt": "x", "images": ["a.png", "c.png"]}))
    assert "does not exist" in problems(source, media={"image": "images"})[0]


def test_a_pattern_of_files_is_a_prompt_per_file_in_the_order_of_their_names(tmp_path):
    for name in ("clean/b.flac", "clean/a.flac", "clean/more/c.flac", "clean/a.txt", "other/a.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("sound")
    (tmp_path / "clean/d.flac").mkdir()  # a folder is no file
    prompts = load_prompts(f"{tmp_path}/clean/*.flac", media={"clean": "file"})
    folder = tmp_path / "clean"
    assert prompts == [
        Prompt(0, "a", {"clean": (folder / "a.flac",)}),
        Prompt(1, "b", {"clean": (folder / "b.flac",)}),
    ]
    deep = load_prompts(f"{tmp_path}/clean/**/*.flac", media={"clean": "file"})
    assert [prompt.media["clean"] for prompt in deep] == [
        (folder / name,) for name in ("a.flac", "b.flac", "more/c.flac")
    ]
    assert [prompt.text for prompt in deep] == ["a", "b", "c"]
    assert [prompt.text for prompt in load_prompts(f"{tmp_path}/*/a.flac")] == ["a", "a"]


def test_paired_folders_put_the_file_of_the_same_name_beside_and_missing_ones_are_named(tmp_path):
    for name in ("noisy/a.wav", "noisy/s/b.wav", "noisy/s/c.wav", "noisy/d.wav", "clean/a.wav", "clean/s/b.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("sound")
    options = {"media": {"noisy": "file", "clean": "clean"}, "beside": {"clean": "../clean"}}
    found = problems(f"{tmp_path}/noisy/**/*.wav", **options)
    assert [line.split(" has no")[0] for line in found] == ["2: d.wav", "4: s/c.wav"]
    assert found[0].endswith("for column 'clean': " + f"{tmp_path}/noisy/../clean/d.wav does not exist")
    (tmp_path / "noisy/d.wav").unlink()
    (tmp_path / "noisy/s/c.wav").unlink()
    prompts = load_prompts(f"{tmp_path}/noisy/**/*.wav", **options)
    assert [(prompt.media["noisy"][0].name, prompt.media["clean"][0].resolve()) for prompt in prompts] == [
        ("a.wav", tmp_path / "clean/a.wav"),
        ("b.wav", tmp_path / "clean/s/b.wav"),
    ]


def test_a_pattern_without_files_and_a_folder_beside_no_pattern_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\*\.wav holds no prompts"):
        load_prompts(f"{tmp_path}/*.wav")
    with pytest.raises(ValueError, match="is no pattern of files"):
        load_prompts(write(tmp_path / "p.txt", "a"), beside={"clean": "../clean"})
    (tmp_path / "a.wav").touch()
    with pytest.raises(ValueError, match="beside names column 'file'"):
        load_prompts(f"{tmp_path}/*.wav", beside={"file": "../clean"})


def test_a_file_whose_name_holds_wildcards_is_that_file(tmp_path):
    assert [prompt.text for prompt in load_prompts(write(tmp_path / "a[1].txt", "one\ntwo"))] == ["one", "two"]

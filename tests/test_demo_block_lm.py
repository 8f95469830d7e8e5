"""The block demo: its prompts and its start, and the demo itself at a length that shows a beginning."""

import json
import random
from collections import Counter
from itertools import islice

import pytest
from PIL import Image

from pipelines import assets, demo_block_lm
from pipelines.tiny_block_lm import LETTERS, SPLITS, answer, prompts, split_of, tokenizer, write_prompts


def test_sets_of_letters_are_in_one_split_whatever_their_order():
    drawn = {split: list(islice(prompts(split, 0), 200)) for split in SPLITS}
    assert all(split_of("".join(sorted(letters))) == split for split, every in drawn.items() for letters in every)
    assert all(len(set(letters)) == LETTERS for every in drawn.values() for letters in every)
    assert list(islice(prompts("train", 1), 3)) != drawn["train"][:3] == list(islice(prompts("train", 0), 3))
    with pytest.raises(ValueError, match="split is 'test'; expected one of train, validation, held_out"):
        next(prompts("test", 0))


def test_half_of_the_texts_keep_the_order_and_neighbours_may_be_swapped_in_the_others():
    chance = random.Random(0)
    texts = Counter(answer("kfbaomd", chance) for _ in range(4000))
    assert texts.keys() == {a + b + c + "d" for a in ("kf", "fk") for b in ("ba", "ab") for c in ("om", "mo")}
    assert texts["kfbaomd"] / 4000 == pytest.approx(0.5 + 0.5 / 8, abs=0.03)
    assert texts["fkabmod"] / 4000 == pytest.approx(0.5 / 8, abs=0.015)


def test_a_prompt_is_two_blocks_and_a_text_with_its_end_two_more(tmp_path):
    rows = [json.loads(line) for line in write_prompts(tmp_path / "some.jsonl", "held_out", 5).read_text().splitlines()]
    encoded = [len(tokenizer()(row["prompt"])["input_ids"]) for row in rows]
    assert encoded == [8] * 5 and all(len(tokenizer()(row["text"])["input_ids"]) == 7 for row in rows)


def test_the_shipped_prompts_are_those_that_their_seed_draws(tmp_path):
    for split in SPLITS:
        shipped = assets.folder("block_lm_demo") / f"{split}.jsonl"
        count = len(shipped.read_text().splitlines())
        assert write_prompts(tmp_path / "again.jsonl", split, count).read_text() == shipped.read_text()


@pytest.mark.slow
def test_the_demo_learns_to_take_fewer_forwards_and_leaves_what_a_person_would_look_at(tmp_path, capsys):
    demo_block_lm.run(tmp_path, 0, ["train.iterations=12", "train.evaluate_every=6"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["speed_after"] > 1.1 * summary["speed_before"]
        and summary["speed_after"] > summary["speed_accuracy_alone"]
    )
    assert summary["accuracy_after"] > summary["accuracy_before"] - 0.03
    for name in ("parallelism.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 600
    for folder in (tmp_path, tmp_path / "accuracy_alone"):
        assert (folder / "aligned" / "model.safetensors").is_file()
    assert "Rewarded for accuracy alone:" in capsys.readouterr().out

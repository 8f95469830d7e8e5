"""The drawn questions against a recount of the pixels, the parts of the tiny model, and its shipped start."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, Qwen2_5_VLForConditionalGeneration
from transformers import Qwen2_5_VLProcessor as Processor

from mmgrpo.data import load_prompts
from pipelines.tiny_vlm import (
    ANSWERS,
    COLOURS,
    KINDS,
    SPECIAL,
    SPLITS,
    WORDS,
    Example,
    config,
    draw,
    examples,
    write_prompts,
)
from pipelines.tiny_vlm import processor as new_processor

SHIPPED = Path(__file__).parents[1] / "assets" / "vlm_demo"


def some(split: str, number: int, seed: int = 0) -> list[Example]:
    return list(islice(examples(split, seed), number))


# ---- pictures and questions


def seen(picture: np.ndarray) -> list[tuple[str, str]]:
    """Colour and shape of every connected region; a square fills its bounding box, a triangle has a narrow top alone."""
    found = []
    for name, colour in COLOURS.items():
        regions, _ = ndimage.label((picture == colour).all(-1), np.ones((3, 3)))
        for region in ndimage.find_objects(regions):
            filled = (picture[region] == colour).all(-1)
            top, bottom, width = filled[0].sum(), filled[-1].sum(), filled.shape[1]
            found.append((name, "square" if filled.all() else "triangle" if top < bottom == width else "circle"))
    return found


def recounted(text: str, things: list[tuple[str, str]]) -> str:
    """The answer to a question about things of known colour and shape."""
    match text.rstrip("?").split():
        case ["how", "many", *words]:
            wanted = [word.removesuffix("s") for word in words if word != "shapes"]
            return str(sum(all(word in thing for word in wanted) for thing in things))
        case ["what", "colour", "is", "the", shape]:
            (answer,) = [colour for colour, other in things if other == shape]
            return answer
        case ["what", "shape", "is", colour]:
            (answer,) = [shape for other, shape in things if other == colour]
            return answer
        case ["more", one, "or", other]:
            numbers = Counter(colour for colour, _ in things)
            return "same" if numbers[one] == numbers[other] else max(one, other, key=numbers.__getitem__)
    raise AssertionError(text)


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_what_a_recount_of_the_pixels_gives(split):
    drawn = some(split, 800)
    for example in drawn:
        assert recounted(example.question.text, seen(draw(example.scene))) == example.question.answer
    answers = {kind: {each.question.answer for each in drawn if each.question.kind == kind} for kind in KINDS}
    assert answers == {kind: set(words) for kind, words in ANSWERS.items()}


def test_the_same_seed_writes_the_same_files_and_another_seed_others(tmp_path):
    def written(name: str, seed: int) -> dict[str, bytes]:
        write_prompts(tmp_path / name, "train", 12, seed)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    once, again, other = written("once", 0), written("again", 0), written("other", 1)
    assert len(once) == 13 and once == again
    assert sum(once[name] == other[name] for name in once) <= 1


def test_no_collection_of_things_is_both_held_out_and_trained_on():
    held_out, train = (
        {tuple(sorted(placed.thing for placed in each.scene)) for each in some(split, 2048, seed)}
        for split, seed in (("held_out", 1), ("train", 0))
    )
    assert len(held_out) > 200 and len(train) > 600
    assert not held_out & train


def test_a_longer_list_of_prompts_begins_with_the_shorter():
    assert some("train", 20)[:8] == some("train", 8)


def test_written_prompts_load_as_data_with_picture_and_target(tmp_path):
    source = write_prompts(tmp_path, "held_out", 8)
    prompts = load_prompts(str(source), media={"image": "image"}, target="answer")
    for prompt, example in zip(prompts, some("held_out", 8), strict=True):
        assert (prompt.text, prompt.target) == (example.question.text, example.question.answer)
        assert prompt.columns == {"kind": example.question.kind}
        with Image.open(prompt.media["image"][0]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), draw(example.scene))


def test_an_unknown_split_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="split is 'test'; expected one of train, held_out"):
        write_prompts(tmp_path, "test", 1)


# ---- tokenizer and processor


@pytest.fixture(scope="module")
def processor() -> Processor:
    return AutoProcessor.from_pretrained(SHIPPED)


def asked(processor: Processor, drawn: list[Example]) -> BatchFeature:
    """The model's inputs for the questions of B examples, padded on the left."""
    content = [[{"type": "image"}, {"type": "text", "text": each.question.text}] for each in drawn]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": each}], add_generation_prompt=True)
        for each in content
    ]
    pictures = [Image.fromarray(draw(each.scene)) for each in drawn]
    return processor(text=texts, images=pictures, return_tensors="pt", padding=True)


def test_every_word_and_every_special_token_is_one_token(processor):
    numbers = [processor.tokenizer(word).input_ids for word in (*SPECIAL, *WORDS)]
    assert numbers == [[number] for number in range(len(SPECIAL) + len(WORDS))]
    assert {word for words in ANSWERS.values() for word in words} <= set(WORDS)


def test_questions_and_answers_survive_the_tokenizer(processor):
    for example in some("train", 200):
        for text in (example.question.text, example.question.answer):
            assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_the_prompt_is_a_chat_turn_with_four_image_tokens(processor):
    inputs = asked(processor, [some("train", 1)[0]])
    names = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert names[:3] == ["<|im_start|>", "user", "<|vision_start|>"]
    assert names[3:8] == ["<|image_pad|>"] * 4 + ["<|vision_end|>"]
    assert names[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]
    assert "<|unknown|>" not in names


def test_the_processor_keeps_every_pixel(processor):
    (example,) = some("train", 1)
    patches = asked(processor, [example])["pixel_values"].view(
        2, 2, 2, 2, 3, 4, 4
    )  # token, place in it, channel, pixel
    picture = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(16, 16, 3)
    np.testing.assert_allclose((picture + 1) * 127.5, draw(example.scene), atol=1e-3)


# ---- the shipped start


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32).eval()


def test_the_shipped_folder_is_what_the_code_builds_and_is_small(model, processor):
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 6e6
    numbers = [
        (each.text_config.to_dict() | {"dtype": None}, each.vision_config.to_dict() | {"dtype": None})
        for each in (model.config, config())
    ]
    assert numbers[0] == numbers[1]
    assert processor.chat_template == new_processor().chat_template
    assert processor.tokenizer.get_vocab() == new_processor().tokenizer.get_vocab()


@torch.no_grad()
def test_padding_on_the_left_does_not_change_what_is_read(model, processor):
    drawn = some("held_out", 8)
    together = model(**asked(processor, drawn)).logits[:, -1]
    for row, example in enumerate(drawn):
        alone = model(**asked(processor, [example])).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_start_is_right_as_often_as_stated_and_ends_after_one_word(model, processor):
    drawn = some("held_out", 128, seed=1)
    answers = torch.tensor([processor.tokenizer(each.question.answer).input_ids for each in drawn])
    inputs = asked(processor, drawn)
    written = model.generate(
        **inputs, do_sample=False, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
    )
    assert written.sequences.shape[1] == inputs["input_ids"].shape[1] + 2
    assert (written.sequences[:, -1] == processor.tokenizer.eos_token_id).all()
    chances = written.logits[0].softmax(-1)
    assert 0.74 < (chances.argmax(-1) == answers[:, 0]).float().mean() < 0.88
    assert 0.38 < chances.gather(1, answers).mean() < 0.54

"""The tiny vision-language models are what the policies' tests take them for: real ones, whose outputs depend on all."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from tests.tiny_vlms import ADDITIONAL, REQUIRED, TINY_VLMS, Built, Prompt, TinyVLM, saved
from tests.tiny_vlms.parts import picture, video

VISIBLE = 1e-3
"""A change of the logits, as a share of their spread, that rounding cannot make."""

PICTURES = (picture(0), picture(1, height=16, width=32))
"""Of different size, and of different shape."""


BEGUN = {f"{name}ForConditionalGeneration" for name in ("Llava", "Gemma3", "Mistral3", "PaliGemma", "Gemma4", "Emu3")}
"""Their prompts carry a token that begins; template and tokenizer would each write one, unless one is told not to."""


def each(rows: Iterable[TinyVLM]) -> pytest.MarkDecorator:
    """The test runs for every one of the rows; those beyond the required ones after all other tests."""
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=marks[row.required]) for row in rows])


every_row = each(TINY_VLMS)
every_row_with_pictures = each(row for row in TINY_VLMS if row.pictures)
every_row_that_repeats = each(row for row in TINY_VLMS if row.repeats)
every_row_with_videos = each(row for row in TINY_VLMS if row.videos)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def built(row: TinyVLM) -> Built:
    return row.build()


def prompts_of(row: TinyVLM, text: str = "How many?") -> list[Prompt]:
    """A prompt of words, one with a picture and one with two, as far as the row takes them."""
    counts = [count for count in (0, 1, 2) if (count == 0 and row.bare) or (count > 0 and row.pictures)]
    return [Prompt(text, PICTURES[:count]) for count in counts]


def logits(made: Built, inputs: BatchFeature) -> Tensor:
    """Of every position, computed without a cache; (B, L, V)."""
    with torch.no_grad():
        return made.model(**inputs, use_cache=False).logits


def last(made: Built, *prompts: Prompt) -> Tensor:
    """Logits of the last position; (B, V)."""
    return logits(made, made.encode(*prompts))[:, -1]


def change(before: Tensor, after: Tensor) -> float:
    """Largest difference as a share of the first one's standard deviation."""
    assert before.shape == after.shape
    return float((before - after).abs().max() / before.std())


def other_middle(image: Image.Image) -> Image.Image:
    """The picture with another pixel in the middle, which no processor crops away."""
    changed, middle = image.copy(), (image.width // 2, image.height // 2)
    changed.putpixel(middle, tuple(255 - value for value in image.getpixel(middle)))
    return changed


def grown(inputs: BatchFeature, reply: Tensor, kind: int) -> BatchFeature:
    """The inputs with tokens (B, T) of a reply behind the prompt."""
    ends = {"input_ids": reply, "attention_mask": torch.ones_like(reply)}
    ends |= {name: torch.full_like(reply, kind) for name in ("mm_token_type_ids", "token_type_ids")}
    longer = {name: torch.cat([inputs[name], ends[name]], 1) for name in ends & inputs.keys()}
    return BatchFeature({**inputs, **longer})


def greedy(made: Built, inputs: BatchFeature, kind: int, most: int) -> list[int]:
    """The likeliest token after the likeliest, each from a pass over everything before it, until the end token."""
    reply: list[int] = []
    while len(reply) < most and made.tokenizer.eos_token_id not in reply:
        token = logits(made, inputs)[:, -1:].argmax(-1)
        inputs = grown(inputs, token, kind)
        reply.append(int(token))
    return reply


def places(made: Built, inputs: BatchFeature) -> Tensor:
    """Where each token stands, as generation counts it: padding does not; (B, L) or (4, B, L)."""
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    return made.model._prepare_position_ids_for_generation(inputs["input_ids"], others)


def continued(made: Built, prompt: Prompt, reply: Tensor) -> Tensor:
    """Logits of the replies (G, T) on top of one pass over their prompt; (G, T, V)."""
    inputs, cache = made.encode(prompt), DynamicCache()
    positions = places(made, inputs)
    made.model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(reply))
    # Qwen's positions have a row for the order of the tokens and three for the place; only the latter go on
    later = positions[-3:].max() + 1 + torch.arange(reply.shape[1])
    later = later.expand(*positions.shape[:-2], *reply.shape)
    return made.model(input_ids=reply, position_ids=later, past_key_values=cache, use_cache=True).logits


def gradients(made: Built, logits: Tensor) -> Tensor:
    """Of a fixed function of the logits with respect to all parameters that it depends on, in one vector."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((logits * weights).sum(), list(made.model.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_names_are_those_of_the_classes_and_the_required_ones_are_there() -> None:
    assert len({row.name for row in TINY_VLMS}) == len(TINY_VLMS)
    assert {row.name for row in REQUIRED} == {
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Qwen3ForCausalLM",
    }
    assert all(row.required for row in REQUIRED) and not any(row.required for row in ADDITIONAL)


@every_row
def test_every_build_is_the_same_and_leaves_the_random_state_alone(row: TinyVLM) -> None:
    first, state = built(row).model, torch.get_rng_state()
    second = row.build().model
    assert type(first).__name__ == row.name and not first.training
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other), name


@every_row
def test_a_tokenizer_gives_back_any_text(row: TinyVLM) -> None:
    tokenizer = built(row).tokenizer
    for text in ("How many?", " two  spaces\nand a line, 3 × 7 = 21", "Größe 猫 🙂"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == built(row).model.get_output_embeddings().weight.shape[0]


@every_row
def test_a_reply_ends_with_what_the_tokenizer_ends_with_and_padding_is_another_token(row: TinyVLM) -> None:
    tokenizer, generation = built(row).tokenizer, built(row).model.generation_config
    assert generation.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == generation.pad_token_id


@every_row
def test_a_template_writes_every_turn_and_asks_for_a_reply(row: TinyVLM) -> None:
    turns = [("user", "How many?"), ("assistant", "Three."), ("user", "Sure?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    plain = [{"role": role, "content": text} for role, text in turns]
    written = built(row).write(messages)
    assert written == built(row).write(plain)
    assert written.index("How many?") < written.index("Three.") < written.index("Sure?")


@every_row
def test_a_prompt_begins_once(row: TinyVLM) -> None:
    begin = built(row).tokenizer.bos_token_id
    for prompt in prompts_of(row):
        begun = built(row).encode(prompt)["input_ids"][0].tolist().count(begin)
        assert begun == (row.name in BEGUN)


@every_row
def test_the_last_logits_depend_on_the_words(row: TinyVLM) -> None:
    for one, other in zip(prompts_of(row), prompts_of(row, "Now many?"), strict=True):
        assert change(last(built(row), one), last(built(row), other)) > VISIBLE


@every_row_with_pictures
def test_the_last_logits_depend_on_a_pixel(row: TinyVLM) -> None:
    if row.name == "Emu3ForConditionalGeneration":
        pytest.skip(
            "one pixel moves no picture to another code of its tokenizer; the test of two pictures looks at whole ones"
        )
    for image in PICTURES:
        before = last(built(row), Prompt("How many?", [image]))
        assert change(before, last(built(row), Prompt("How many?", [other_middle(image)]))) > VISIBLE


@every_row_with_pictures
def test_the_order_of_two_pictures_matters(row: TinyVLM) -> None:
    one, other = Prompt("How many?", PICTURES), Prompt("How many?", PICTURES[::-1])
    assert change(last(built(row), one), last(built(row), other)) > VISIBLE


@every_row_with_pictures
def test_the_model_wants_exactly_the_image_tokens_that_the_processor_writes(row: TinyVLM) -> None:
    made = built(row)
    for prompt in prompts_of(row):
        inputs = made.encode(prompt)
        marks = (inputs["input_ids"][0] == made.model.config.image_token_id).nonzero()
        assert logits(made, inputs).isfinite().all() and bool(len(marks)) == bool(prompt.pictures)
        if prompt.pictures:
            inputs["input_ids"][0, marks[0]] = made.tokenizer("x", add_special_tokens=False)["input_ids"][0]
            with pytest.raises(ValueError, match="do not match"):
                logits(made, inputs)


@every_row_with_videos
def test_the_last_logits_depend_on_every_frame(row: TinyVLM) -> None:
    frames = video(0)
    before = last(built(row), Prompt("What?", videos=[frames]))
    for number in range(len(frames)):
        changed = frames.copy()
        changed[number] = 255 - changed[number]
        assert change(before, last(built(row), Prompt("What?", videos=[changed]))) > VISIBLE, number


@every_row
def test_generation_equals_full_forwards_without_a_cache(row: TinyVLM) -> None:
    made = built(row)
    for prompt in prompts_of(row):
        inputs = made.encode(prompt)
        with torch.no_grad():
            tokens = made.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        reply = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert reply == greedy(made, inputs, row.reply_type, most=5)


@every_row_that_repeats
def test_a_repeated_cache_continues_a_prompt_like_one_pass_over_everything(row: TinyVLM) -> None:
    made, prompt = built(row), prompts_of(row)[-1]
    reply = torch.randint(8, 200, (3, 5), generator=torch.Generator().manual_seed(0))
    whole = grown(made.encode(*[prompt] * len(reply)), reply, row.reply_type)
    expected = made.model(**whole, use_cache=False).logits[:, -reply.shape[1] :]
    found = continued(made, prompt, reply)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    truth = gradients(made, expected)
    assert (gradients(made, found) - truth).norm() < 1e-5 * truth.norm()


@every_row
def test_a_cache_repeats_unless_it_keeps_a_state(row: TinyVLM) -> None:
    cache = DynamicCache(config=built(row).model.config)
    states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    assert row.repeats == (not states)
    if states:
        with pytest.raises(AttributeError, match="batch_repeat_interleave"):
            cache.batch_repeat_interleave(2)


@every_row
def test_padding_on_the_left_does_not_change_the_last_logits(row: TinyVLM) -> None:
    prompts = [*prompts_of(row), *prompts_of(row, "Count all of them, twice.")]
    alone = torch.cat([last(built(row), prompt) for prompt in prompts])
    inputs = built(row).encode(*prompts)
    inputs["position_ids"] = places(built(row), inputs)  # without them rounding grows with the shift: Gemma 4
    together = logits(built(row), inputs)[:, -1]
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()


@every_row
def test_what_is_saved_loads_equal(row: TinyVLM, tmp_path: Path) -> None:
    made, loaded = built(row), row.load(saved(row.name, tmp_path))
    assert type(loaded.model) is type(made.model) and type(loaded.processor) is type(made.processor)
    prompts = [*prompts_of(row), *([Prompt("What?", videos=[video(0)])] if row.videos else [])]
    for prompt in prompts:
        before, after = made.encode(prompt), loaded.encode(prompt)
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)
        assert torch.equal(logits(made, before), logits(loaded, after))


def test_a_window_of_gemma_3_hides_tokens_of_a_prompt() -> None:
    made = next(row for row in REQUIRED if row.name.startswith("Gemma3")).build()
    before = last(made, Prompt("How many?"))
    made.model.config.text_config.sliding_window = 1000
    assert change(before, last(made, Prompt("How many?"))) > VISIBLE

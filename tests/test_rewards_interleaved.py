"""Rewards of answers of texts and images, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.advantages import process
from mmgrpo.scoring import score
from mmgrpo.types import Batch, Prompt, Samples
from rewards.embeddings import features, text_similarity
from rewards.image import jpeg_compressibility
from rewards.interleaved import consistency, hybrid, of_images, of_texts, structure, surroundings

NAN = float("nan")
DARK, LIGHT = torch.full((3, 8, 8), 0.25), torch.full((3, 4, 6), 0.75)
BROKEN, CUT = torch.full((3, 8, 8), torch.nan), torch.zeros(3, 0, 8)

ANSWERS = (
    ("ab", DARK, "abcd", LIGHT),  # as asked for
    ("a <image> b",),  # no image: its mark stands in the text
    (LIGHT, DARK),  # images only
    ("abc", CUT),  # a truncated image
    ("ab", DARK, "ab", LIGHT, "tail"),  # an extra part
    ("ab", BROKEN),  # pixels that are not finite
    ("",),  # nothing
)


def samples(answers=ANSWERS, finished: list[bool] | None = None, **columns: object) -> Samples:
    prompts = tuple(Prompt(row, f"prompt {row}", columns=columns) for row in range(len(answers)))
    ids = torch.arange(len(answers))
    ends = torch.full((len(answers), 5), -1)
    for row, parts in enumerate(answers):
        ends[row, : len(parts)] = torch.arange(1, len(parts) + 1) * 3 - 1
    done = None if finished is None else torch.tensor(finished)
    return Samples(Batch(prompts, ids, ids, 0, 0), interleaved=answers, part_end=ends, finished=done)


def letters(given: Samples) -> Tensor:
    """A tenth of a text's letters."""
    return torch.tensor([len(text) / 10 for text in given.text])


def brightness(given: Samples) -> Tensor:
    """The mean pixel, NaN where there is one that is not finite."""
    return given.image.mean((1, 2, 3))


def mean_colours(images) -> Tensor:
    return torch.stack([image.mean((1, 2)) for image in images])


def same(found: Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)


def row(*values: float) -> list[float]:
    return [*values, *[NAN] * (5 - len(values))]


def test_the_structure_is_right_if_marks_number_and_order_are():
    order = ("text", "image", "text", "image")
    same(structure(samples(), marks=("<image>",)), [1, 0, 1, 0, 1, 0, 0])
    same(structure(samples(), images=2, penalty=-1.0), [1, -1, 1, -1, 1, -1, -1])
    same(structure(samples(), order=order), [1, 0, 0, 0, 0, 0, 0])
    same(structure(samples(ANSWERS[:2], [False, True])), [0, 1])
    same(structure(samples(ANSWERS[:3], n=2), column="n"), [1, 0, 1])
    with pytest.raises(ValueError, match="prompt 0 has None in the column 'm'; expected a number of images"):
        structure(samples(n=2), column="m")
    found = structure(samples(), order=order, penalty=-1.0, per_part=True)
    expected = [
        row(NAN, NAN, NAN, 1),
        row(-1),
        row(NAN, -1),
        row(NAN, -1),
        row(NAN, NAN, NAN, NAN, -1),
        row(NAN, -1),
        row(-1),
    ]
    same(found, expected)


def test_texts_are_judged_as_one_or_each():
    same(of_texts(reward=letters)(samples()), [0.7, 1.1, 0, 0.3, 1.0, 0.2, 0])
    found = of_texts(reward=letters, missing=-0.5, per_part=True)(samples())
    expected = [
        row(0.2, NAN, 0.4),
        row(1.1),
        row(NAN, -0.5),
        row(0.3),
        row(0.2, NAN, 0.2, NAN, 0.4),
        row(0.2),
        row(-0.5),
    ]
    same(found, expected)


def test_images_are_judged_with_the_text_around_them():
    same(of_images(reward=brightness)(samples()), [0.5, 0, 0.5, NAN, 0.5, NAN, 0])
    found = of_images(reward=brightness, missing=-2.0, per_part=True)(samples())
    expected = [
        row(NAN, 0.25, NAN, 0.75),
        row(-2),
        row(0.75, 0.25),
        row(),
        row(NAN, 0.25, NAN, 0.75),
        row(),
        row(-2),
    ]
    same(found, expected)
    squashed = of_images(reward=brightness, squash=True)(samples(ANSWERS[:1]))
    assert float(squashed) == pytest.approx((1 / (1 + math.exp(-0.25)) + 1 / (1 + math.exp(-0.75))) / 2)


def test_the_prompt_of_an_image_is_the_text_that_the_context_names():
    seen: list[tuple[int, str]] = []

    def listening(given: Samples) -> Tensor:
        seen.extend((prompt.id, prompt.text) for prompt in given.prompts)
        return torch.zeros(len(given))

    of_images(reward=listening)(samples(ANSWERS[:3]))
    assert sorted(seen) == [(0, "ab"), (0, "abcd"), (2, "prompt 2"), (2, "prompt 2")]
    parts = ("one ", DARK, LIGHT, " two")
    assert surroundings(parts, 2, "before", "p") == "one"
    assert surroundings(parts, 2, "around", "p") == "one\ntwo"
    assert surroundings(parts, 2, "prompt", "p") == "p"
    assert surroundings(parts[1:], 0, "before", "p") == "two"


def test_any_image_reward_can_be_used():
    given = samples((("a", torch.rand(3, 16, 16)), (torch.rand(3, 16, 16),)))
    image = torch.stack([given.interleaved[0][1], given.interleaved[1][0]])
    same(
        of_images(reward=jpeg_compressibility)(given), jpeg_compressibility(Samples(given.batch, image=image)).tolist()
    )


def test_consistency_is_the_mean_cosine_of_the_images_of_one_answer():
    red, green, both = (
        torch.tensor(value).view(3, 1, 1).expand(3, 4, 4) for value in ([1.0, 0, 0], [0, 1.0, 0], [1.0, 1, 0])
    )
    given = samples(((red, "x", green, both), (red,), (red, red), ("x",), (red, BROKEN, red)))
    half = 2**-0.5
    same(consistency(features=mean_colours)(given), [2 * half / 3, NAN, 1, NAN, 1])
    found = consistency(features=mean_colours, per_part=True)(given)
    same(found, [row(NAN, NAN, 0, half), row(), row(NAN, 1), row(), row(NAN, NAN, 1)])


def form(given: Samples) -> Tensor:
    return structure(given, order=("text", "image", "text", "image"), penalty=-1.0)


def test_the_hybrid_is_the_sum_and_a_gate_leaves_itself_alone():
    terms = {"text": of_texts(reward=letters), "image": of_images(reward=brightness), "form": form}
    weights = dict.fromkeys(terms, 1.0)
    same(hybrid(rewards=terms, weights=weights)(samples()), [2.2, 0.1, -0.5, -0.7, 0.5, -0.8, -1])
    same(hybrid(rewards=terms, weights=weights, gate="form")(samples()), [2.2, -1, -1, -1, -1, -1, -1])
    parts = {
        "text": of_texts(reward=letters, per_part=True),
        "image": of_images(reward=brightness, per_part=True),
        "form": form,
    }
    found = hybrid(rewards=parts, weights=weights | {"text": 2.0})(samples(ANSWERS[:3]))
    same(found, [row(0.4, 0.25, 0.8, 1.75), row(2.2 + 0 - 1), row(0.75, 0.25 + 0 - 1)])
    gated = hybrid(rewards=parts, weights=weights, gate="form")(samples(ANSWERS[:3]))
    same(gated, [row(0.2, 0.25, 0.4, 1.75), row(-1), row(NAN, -1)])
    with pytest.raises(ValueError, match="gate is 'shape'; expected the rewards"):
        hybrid(rewards=terms, weights=weights, gate="shape")


def test_process_rewards_of_an_answer_reach_the_advantage_at_the_ends_of_its_parts():
    answers = (("ab", DARK), ("abcdef", DARK))  # texts .2 and .6, images .25 each
    given = samples(answers)
    batch = Batch(given.prompts, torch.zeros(2, dtype=torch.int64), given.batch.sample, 0, 0)
    given = Samples(batch, interleaved=answers, part_end=torch.tensor([[1, 3], [2, 4]]))
    terms = {"text": of_texts(reward=letters, per_part=True), "image": of_images(reward=brightness, per_part=True)}
    feedback = score(terms, dict.fromkeys(terms, 1.0), given, decisions=5)
    same(feedback.step_rewards, [[NAN, 0.2, NAN, 0.25, NAN], [NAN, NAN, 0.6, NAN, 0.25]])
    pool = torch.tensor([0.2, 0.25, 0.6, 0.25], dtype=torch.float64)
    a, b, c, d = ((pool - pool.mean()) / pool.std(correction=0)).tolist()
    found = process(feedback, eps=0.0).values
    expected = [[a + b, a + b, b, b, 0], [c + d, c + d, c + d, d, d]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


REWARDS = {
    "structure": structure,
    "structure of parts": lambda given: structure(given, images=2, per_part=True),
    "texts": of_texts(reward=letters),
    "texts of parts": of_texts(reward=letters, per_part=True),
    "images": of_images(reward=brightness, context="around"),
    "images of parts": of_images(reward=brightness, per_part=True),
    "consistency": consistency(features=mean_colours),
    "consistency of parts": consistency(features=mean_colours, per_part=True),
    "hybrid": hybrid(
        rewards={"form": form, "text": of_texts(reward=letters)}, weights={"form": 1, "text": 1}, gate="form"
    ),
}


@pytest.mark.parametrize("name", REWARDS)
def test_permuting_the_samples_permutes_the_scores_and_their_neighbours_do_not_matter(name):
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    whole = REWARDS[name](samples())
    assert whole.shape == ((7, 5) if name.endswith("parts") else (7,))
    torch.testing.assert_close(REWARDS[name](samples().take(order)), whole[order], equal_nan=True)
    for number in range(7):
        alone = REWARDS[name](samples().take(torch.tensor([number])))
        torch.testing.assert_close(alone[0], whole[number], equal_nan=True)


def test_samples_without_parts_are_refused():
    plain = Samples(samples().batch, text=("x",) * 7)
    for reward in REWARDS.values():
        with pytest.raises(ValueError, match="the samples carry no answers of texts and images"):
            reward(plain)


# ---- encoders

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=16, **SMALL)).save_pretrained(folder)
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


def test_the_similarity_of_a_text_is_the_cosine_of_mean_states(encoder):
    prompts = (Prompt(0, "abc"), Prompt(1, "hg"), Prompt(2, "abc"))
    ids = torch.arange(3)
    given = Samples(Batch(prompts, ids, ids, 0, 0), text=("abc", "c a " * 20, " "))
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizer.from_pretrained(encoder)

    def embedded(text: str, first: bool) -> Tensor:
        tokens = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        states = model(**tokens).last_hidden_state[0].detach()
        return states[0] if first else states.mean(0)

    for pooling in ("mean", "first"):
        said, asked = (embedded(text, pooling == "first") for text in ("c a " * 20, "hg"))
        expected = max(0.0, float(torch.cosine_similarity(said, asked, dim=0)))
        found = text_similarity(model=str(encoder), pooling=pooling)(given)
        torch.testing.assert_close(found, torch.tensor([1.0, expected, 0.0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_features_of_images_are_the_models_own(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "clip":
        text = SMALL | {"vocab_size": 10}
        vision = SMALL | {"image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    else:
        model = Dinov2Model(Dinov2Config(**SMALL, image_size=16, patch_size=8)).eval()
    process = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    model.save_pretrained(tmp_path), process.save_pretrained(tmp_path)
    images = [torch.rand(3, 16, 16), torch.rand(3, 20, 30)]
    found = features(model=str(tmp_path), kind=kind, batch=1)(images)
    pixels = process(images=(images[0] * 255).round().to(torch.uint8), return_tensors="pt")["pixel_values"]
    if kind == "clip":
        expected = model.get_image_features(pixel_values=pixels).pooler_output[0]
    else:
        expected = model(pixel_values=pixels).last_hidden_state[0, 0]
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, len(expected)) and not torch.allclose(found[0], found[1])

"""Text accuracy and the OCR reward, the latter on text that is really drawn and really read."""

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.ocr import ocr_accuracy, target_text, text_accuracy
from rewards.pictures import PictureReward


@pytest.fixture(scope="module")
def reward() -> PictureReward:
    return ocr_accuracy()


def drawn(text: str, size: tuple[int, int] = (512, 512)) -> Tensor:
    """Black text on white; (3, H, W) in [0, 1]."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((40, 200), text, font=ImageFont.load_default(80), fill="black")
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255


def samples(image: Tensor, *texts: str, target: object = None) -> Samples:
    prompts = tuple(Prompt(index, text, target=target) for index, text in enumerate(texts))
    ids = torch.arange(len(texts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), image=image)


@pytest.mark.parametrize(
    ("recognised", "target", "accuracy"),
    [
        ("helo world", "Hello World", 0.9),  # one of ten letters
        ("xx hello world yy", "Hello World", 1.0),  # contained
        ("", "Hello World", 0.0),
        ("HELLO  42", "hello42", 1.0),
        ("entirely other and long", "abc", 0.0),  # never below 0
        ("cat", "cats", 0.75),
        ("anything", "", 1.0),
        ("", "", 1.0),
    ],
)
def test_text_accuracy_has_the_values_worked_out_by_hand(recognised: str, target: str, accuracy: float):
    assert text_accuracy(recognised, target) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "target", "wanted"),
    [
        ('a sign "OPEN" beside "SHUT"', None, "OPEN"),
        ('a sign "OPEN"', "Closed", "Closed"),  # a string target goes first
        ('a sign "OPEN"', {"count": 3}, "OPEN"),  # the target of another reward
        ('a sign ""', None, ""),
        ('a 6" pipe', None, None),  # one quote is no pair
        ("a cat", None, None),
    ],
)
def test_the_target_is_a_string_target_or_else_the_first_quoted_text(text: str, target: object, wanted: str | None):
    assert target_text(Prompt(0, text, target=target)) == wanted


def test_drawn_text_is_read_scored_against_each_prompt_and_follows_a_permutation(reward: PictureReward):
    image = torch.stack([drawn("HELLO 42"), drawn("HELLO 42"), drawn(""), drawn("HELLO 42")])
    batch = samples(image, 'a sign "Hello 42"', 'a sign "HELLO 4Z"', 'a sign "HELLO 42"', "a cat")
    scores = reward(batch)
    expected = torch.tensor([1.0, 6 / 7, 0.0, torch.nan])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6, equal_nan=True)
    order = torch.tensor([2, 3, 1, 0])
    torch.testing.assert_close(reward(batch.take(order)), expected[order], rtol=0, atol=1e-6, equal_nan=True)


def test_lines_below_the_confidence_asked_for_do_not_count():
    strict = ocr_accuracy(confidence=1.0)
    assert strict(samples(drawn("HELLO 42")[None], 'a sign "HELLO 42"')).tolist() == [0.0]


def test_a_failure_of_the_engine_and_a_broken_image_are_nan_never_zero(
    reward: PictureReward, caplog: pytest.LogCaptureFixture
):
    assert reward(samples(torch.ones(1, 3, 5000, 1), 'a sign "HI"')).isnan().all()
    assert "OCR failed on a picture of 1 x 5000 pixels" in caplog.text
    assert reward(samples(torch.full((1, 3, 64, 64), torch.nan), 'a sign "HI"')).isnan().all()


def test_the_engine_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]):
    ocr_accuracy()(samples(torch.ones(1, 3, 32, 32), 'a sign "HI"'))
    assert capfd.readouterr() == ("", "")

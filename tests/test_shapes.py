"""The shapes rewards against true renderings, images drawn by hand, and a slow transcription of their definition."""

import time
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples
from rewards.shapes import (
    COLOURS,
    SHAPES,
    WISHES,
    Wish,
    coverage,
    masks,
    read_wish,
    render,
    rendering_distance,
    shape_accuracy,
)

MANY = list(WISHES) * 16


def samples(wishes: list[Wish], image: Tensor) -> Samples:
    prompts = tuple(Prompt(row, wish.text, columns=asdict(wish)) for row, wish in enumerate(wishes))
    ids = torch.arange(len(prompts))
    return Samples(Batch(prompts, ids, ids, 0, 0), image=image)


@pytest.fixture(scope="module")
def true_images() -> Tensor:
    return render(MANY, torch.Generator().manual_seed(0))


def mean_exact(wishes: list[Wish], image: Tensor) -> float:
    return shape_accuracy(samples(wishes, image))["exact"].mean().item()


def other(values: list, value: object, step: int = 1) -> object:
    return values[(values.index(value) + step) % len(values)]


def test_true_renderings_are_exact(true_images):
    scores = shape_accuracy(samples(MANY, true_images))
    assert scores["exact"].mean() >= 0.99
    assert scores["soft"].mean() >= 0.99
    for shape in SHAPES:
        rows = torch.tensor([row for row, wish in enumerate(MANY) if wish.shape == shape])
        assert scores["exact"][rows].mean() >= 0.97


@pytest.mark.parametrize("step", [1, 2])
def test_another_shape_word_is_not_exact(true_images, step):
    assert (
        mean_exact([replace(wish, shape=other(list(SHAPES), wish.shape, step)) for wish in MANY], true_images) <= 0.005
    )


@pytest.mark.parametrize("step", [1, 2, 3])
def test_another_colour_word_earns_nothing(true_images, step):
    wishes = [replace(wish, colour=other(list(COLOURS), wish.colour, step)) for wish in MANY]
    assert shape_accuracy(samples(wishes, true_images))["soft"].max() == 0


@pytest.mark.parametrize("step", [1, 2, 3])
def test_another_count_is_never_exact(true_images, step):
    wishes = [replace(wish, count=other([1, 2, 3, 4], wish.count, step)) for wish in MANY]
    assert shape_accuracy(samples(wishes, true_images))["exact"].max() == 0


def square_canvas(*corners: tuple[int, int], side: int = 5, colour: tuple[float, ...] = (0, 0, 1)) -> Tensor:
    image = torch.zeros(1, 3, 16, 16)
    for top, left in corners:
        image[0, :, top : top + side, left : left + side] = torch.tensor(colour, dtype=torch.float32)[:, None, None]
    return image


@pytest.mark.parametrize(
    ("count", "corners", "soft"),
    [
        (3, [(1, 1), (1, 9), (9, 1)], 1.0),
        (3, [(1, 1), (1, 9)], 0.5 * (1 - 1 / 3)),
        (3, [(1, 1)], 0.5 * (1 - 2 / 3)),
        (1, [(1, 1), (9, 9)], 0.0),
        (2, [(1, 1), (1, 9), (9, 1)], 0.5 * (1 - 1 / 2)),
        (2, [], 0.0),
    ],
)
def test_soft_reward_of_images_drawn_by_hand(count, corners, soft):
    scores = shape_accuracy(samples([Wish(count, "blue", "square")], square_canvas(*corners)))
    assert scores["soft"].item() == pytest.approx(soft)
    assert scores["exact"].item() == (soft == 1)


def test_a_stray_pixel_is_a_component_that_is_not_good():
    image = square_canvas((1, 1), (9, 9))
    image[0, 0, 3, 12] = 1
    scores = shape_accuracy(samples([Wish(2, "blue", "square")], image))
    assert scores["exact"].item() == 0
    assert scores["soft"].item() == pytest.approx(0.5 * 2 / 3)


def test_two_squares_that_touch_are_one_bad_component():
    scores = shape_accuracy(samples([Wish(2, "blue", "square")], square_canvas((1, 1), (1, 6))))
    assert scores["soft"].item() == 0


def test_components_of_neighbouring_images_do_not_join():
    image = torch.cat([square_canvas((1, 1)), square_canvas((1, 1))])
    assert shape_accuracy(samples([Wish(1, "blue", "square")] * 2, image))["exact"].tolist() == [1, 1]


@pytest.mark.parametrize("measure", [lambda s: shape_accuracy(s)["soft"], rendering_distance], ids=["soft", "distance"])
def test_scores_follow_a_permutation_of_the_samples_and_do_not_depend_on_the_batch(true_images, measure):
    noise = torch.randn(true_images.shape, generator=torch.Generator().manual_seed(1))
    noisy = samples(MANY, (true_images + 0.25 * noise).clamp(0, 1))
    order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(2))
    scores = measure(noisy)
    assert scores.shape == (len(MANY),) and scores.dtype == torch.float32
    assert scores.unique().numel() > 2
    torch.testing.assert_close(measure(noisy.take(order)), scores[order])
    torch.testing.assert_close(measure(noisy.take(order[:1])), scores[order[:1]])


def test_distance_of_true_renderings_is_small_and_grows_with_noise(true_images):
    noise = torch.randn(true_images.shape, generator=torch.Generator().manual_seed(1))
    distances = [rendering_distance(samples(MANY, true_images + std * noise)) for std in (0, 0.05, 0.1, 0.2)]
    assert distances[0].mean() <= 0.03 and distances[0].max() <= 0.05
    for std, distance in zip((0.05, 0.1, 0.2), distances[1:], strict=True):
        # the noise adds its variance, less what the nearest of several templates can follow
        assert distance.square().mean().sqrt().item() == pytest.approx(std, rel=0.06)


def test_distance_of_a_missing_square_is_its_energy():
    distance = rendering_distance(samples([Wish(2, "blue", "square")], square_canvas((1, 1))))
    smallest = 4 * 4  # the nearest true second square is the smallest one
    assert distance.item() == pytest.approx((smallest / (3 * 256)) ** 0.5, rel=1e-5)


def test_distance_of_a_square_too_many_is_its_energy():
    distance = rendering_distance(
        samples([Wish(1, "yellow", "square")], square_canvas((1, 1), (9, 9), colour=(1, 1, 0)))
    )
    assert distance.item() == pytest.approx((2 * 25 / (3 * 256)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("shape", "area"), [("circle", torch.pi), ("square", 4.0), ("triangle", 2.0)])
def test_coverage_sums_to_the_area_of_the_shape(shape, area):
    radius = torch.linspace(2.5, 3.2, 8)
    covered = coverage(shape, radius, torch.full((8, 2), 4.1))
    torch.testing.assert_close(covered.sum((1, 2)), area * radius.square(), rtol=0.04, atol=0)  # 8x8 points


def test_no_mask_belongs_to_two_shapes():
    banks = [{mask.tobytes() for mask in masks(shape)} for shape in SHAPES]
    assert len(set.union(*banks)) == sum(map(len, banks))


def test_larger_images_are_averaged_in_blocks(true_images):
    small, large = (
        samples(MANY, true_images),
        samples(MANY, true_images.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    )
    torch.testing.assert_close(shape_accuracy(large), shape_accuracy(small))
    torch.testing.assert_close(rendering_distance(large), rendering_distance(small))


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 8)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="expected a square whose side is a multiple of 16"):
        shape_accuracy(samples([WISHES[0]], torch.zeros(1, 3, *size)))


def test_a_prompt_without_the_columns_is_refused():
    with pytest.raises(ValueError, match="prompt 7 'one red circle' lacks the column 'count'"):
        read_wish(Prompt(7, "one red circle"))
    with pytest.raises(ValueError, match="prompt 7 asks for .*'pink'.*expected"):
        read_wish(Prompt(7, "one pink circle", columns={"count": 1, "colour": "pink", "shape": "circle"}))
    with pytest.raises(ValueError, match="count 'a few'; expected 1..4"):
        read_wish(Prompt(7, "a few", columns={"count": "a few", "colour": "red", "shape": "circle"}))


def test_columns_read_from_text_files_are_understood():
    assert read_wish(Prompt(0, "", columns={"count": "3", "colour": "red", "shape": "circle"})) == Wish(
        3, "red", "circle"
    )


def test_384_images_are_scored_within_a_tenth_of_a_second(true_images):
    some = samples(MANY, true_images).take(torch.arange(384))
    times = []
    for _ in range(5):
        start = time.process_time()
        shape_accuracy(some)
        times.append(time.process_time() - start)
    assert min(times) < 0.1

"""A hybrid policy writes and draws, and evaluates its tokens and its denoising steps again, exactly, in any split."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_hybrids import EVERY, eager_to_draw, made, opened, slopes, written
from torch import Tensor

from mmgrpo import improve, journal, recipe
from mmgrpo.aggregations import seq_mean
from mmgrpo.data import load_prompts, requests
from mmgrpo.kl import k3
from mmgrpo.objectives import clipped
from mmgrpo.run import start
from mmgrpo.schedules import listed
from mmgrpo.shadow import Reference
from mmgrpo.trainer import begin
from mmgrpo.types import KINDS, Batch, Chunk, Prompt, Trajectory
from mmgrpo.weighting import by_kind
from pipelines import hybrid_check, hybrid_lessons, hybrid_model, replays, tiny_interleaved
from pipelines.hybrid_layout import Room, Shape, alive, attention, positions
from pipelines.hybrid_parts import parts_of
from pipelines.interleaved_hybrid import HybridPolicy, load
from pipelines.tiny_interleaved import SUMS

NAMES = ("log_ratio", "drift", "sampler_gap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hybrid"))


def batch_of(size: int = 3, count: int = 2, iteration: int = 0) -> Batch:
    prompts = [Prompt(0, SUMS[0].prompt), Prompt(1, "two minus one"), Prompt(2, SUMS[70].prompt)]
    return requests(prompts, range(count), group_size=size, seed=5, iteration=iteration)


def evaluations(policy: HybridPolicy, trajectory: Trajectory, reference=None) -> dict[str, Tensor]:
    """Every field of a replay, (B, S); NaN where nothing was evaluated."""
    found: dict[str, Tensor] = {}

    def consume(chunk: Chunk) -> None:
        for name, value in improve.small(chunk.evaluation).items():
            whole = found.setdefault(name, torch.full(trajectory.mask.shape, math.nan))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value.detach().float()

    policy.replay(trajectory, consume, reference)
    return found


def shaken(policy: HybridPolicy, by: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(9)
    for value in policy.trainable().values():
        value.data += by * torch.randn(value.shape, generator=generator).to(value)


def whole(trajectory: Trajectory) -> list[Tensor]:
    return [torch.arange(len(trajectory))]


def of_kind(trajectory: Trajectory, kind: str) -> Tensor:
    return trajectory.mask & (trajectory.kind == KINDS[kind])


# -- the answers' slots


def test_a_text_sees_what_came_before_an_image_itself_and_a_noisy_version_what_came_before_its_image():
    room = Room(images=1, text=2, tokens=2, per_image=2)  # slots: w w | i i e | w w
    shape = Shape(torch.tensor([[1, 2]]), torch.tensor([[True]]))
    prompt, filled = torch.tensor([[True]]), alive(room, shape)
    assert filled.tolist() == [[True, False, True, True, True, True, True]]
    seen = attention(room, prompt, filled, torch.tensor([0]))[0].int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # the prompt, then the text itself
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # a dead slot: nobody looks at it
        [1, 1, 0, 1, 1, 0, 0, 0, 0, 0],  # an image both ways
        [1, 1, 0, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 1, 0, 0, 0, 0],  # the mark behind it
        [1, 1, 0, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1],  # a noisy version: the text before, and itself
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert positions(room, prompt, filled, torch.tensor([0])).tolist() == [[1, 1, 2, 3, 4, 5, 6, 2, 3]]


def test_decisions_stand_in_the_order_of_time_and_the_mark_behind_an_image_is_not_trained(folder):
    policy = opened(folder)
    trajectory, samples = policy.rollout(batch_of())
    assert policy.room.tokens_decided().tolist() == [[0, 1, 2], [7, 8, 9], [14, 15, 16]]
    assert policy.room.images_decided().tolist() == [[3, 4, 5], [10, 11, 12]]
    assert trajectory.mask.shape == (6, 17)
    assert not trajectory.mask[:, [5, 6, 12, 13]].any()  # the last steps have no noise
    drawn = trajectory.record["drawn"]
    assert drawn.any(0).all() and not drawn.all()  # answers with and without images
    assert torch.equal(of_kind(trajectory, "step").sum(1), 2 * drawn.sum(1))
    assert torch.equal(of_kind(trajectory, "token").sum(1), trajectory.record["length"].sum(1))
    for row, parts in enumerate(samples.interleaved):
        ends = [end for end in samples.part_end[row].tolist() if end >= 0]
        assert len(ends) == len(parts) and ends == sorted(ends)
        images = [part for part in parts if isinstance(part, Tensor)]
        assert len(images) == drawn[row].sum()
        assert all(image.shape == (3, 16, 16) and 0 <= image.min() and image.max() <= 1 for image in images)
        assert parts == ("",) or "" not in [part for part in parts if isinstance(part, str)]


def test_the_mark_of_an_image_belongs_to_the_image_and_the_end_of_an_answer_to_its_last_part(folder):
    policy = opened(folder)
    words, (start, _, (stop,)) = policy.tokenizer("two red").input_ids, vars(policy.marks).values()
    first, second = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)

    def parts(images: int, *texts: list[int]) -> list[tuple[object, int]]:
        return parts_of(list(texts), [first, second][:images], policy.room, policy.tokenizer)

    found = parts(2, [*words, start], [start], [stop])
    assert [end for _, end in found] == [1, 5, 14] and found[0][0] == "two red"
    assert found[1][0] is first and found[2][0] is second
    found = parts(1, [start], [words[0], stop], [])
    assert [end for _, end in found] == [5, 8] and found[1][0] == "two"
    assert parts(0, [stop], [], []) == [("", 0)]


# -- replays


@pytest.mark.parametrize("precision", [{}, {"autocast": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_on_policy_log_ratios_are_exactly_0_in_every_part_of_a_rollout(precision, attention, folder):
    policy = opened(folder, attention=attention, **precision)
    trajectory, _ = policy.rollout(batch_of())
    fresh = evaluations(policy, trajectory)
    assert fresh["log_ratio"][trajectory.mask].abs().max() == 0
    parts = [torch.tensor([4, 1, 5]), torch.tensor([0]), torch.tensor([2, 3])]
    anchored = policy.anchor(trajectory, parts)
    for part in parts:
        found, taken = evaluations(policy, anchored.take(part)), anchored.take(part)
        for name in ("log_ratio", "drift"):
            assert found[name][taken.mask].abs().max() == 0
        assert found["sampler_gap"][taken.mask].abs().max() < (1e-1 if precision else 1e-5)
    shaken(policy)
    moved = evaluations(policy, anchored)["log_ratio"]
    for kind in ("step", "token"):
        assert (moved[of_kind(trajectory, kind)].abs() > 0).float().mean() > 0.5


def test_what_is_written_with_a_memory_has_the_log_probs_and_velocities_of_answers_read_whole(folder):
    policy = opened(folder)
    trajectory, _ = policy.rollout(batch_of())
    anchored = policy.anchor(trajectory, whole(trajectory)).record
    there = of_kind(trajectory, "token")[:, policy.room.tokens_decided()]
    assert torch.allclose(anchored["anchor.log_prob"][there], anchored["log_prob"][there], atol=1e-5)
    drawn = trajectory.record["drawn"]
    read, written = anchored["anchor.velocity"][:, :, :2][drawn], anchored["velocity"][:, :, :2][drawn]
    assert torch.allclose(read, written, atol=1e-5) and written.abs().max() > 0.1


def test_without_noise_images_are_those_of_eulers_method_with_nothing_remembered(folder):
    policy = opened(folder)
    batch = batch_of()
    written = policy.written(batch, None)
    drawn = written.answers.shape.drawn
    with torch.no_grad():
        plain = hybrid_check.euler(policy, batch, written)
    assert drawn.any() and torch.allclose(written.state[:, :, -1][drawn], plain[drawn], atol=1e-5)
    again = policy.generate(batch)
    for one, other in zip(again.interleaved, policy.generate(batch).interleaved, strict=True):
        assert all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_answer_depends_on_its_own_ids_alone(folder):
    policy = opened(folder, rollout_rows=6)
    together, _ = policy.rollout(batch_of())
    alone, _ = policy.rollout(batch_of().take(torch.tensor([4])))
    for name in ("token", "length", "drawn"):
        assert torch.equal(alone.record[name][0], together.record[name][4])
    assert torch.allclose(alone.record["state"][0], together.record["state"][4], atol=1e-5)


def test_a_replay_in_smaller_calls_has_the_same_values_and_the_same_gradient(folder):
    trajectory, _ = opened(folder).rollout(batch_of())
    found = []
    for options in ({"replay_rows": 6}, {"replay_rows": 1}, {"replay_rows": 4, "replay_steps": 1}):
        policy = opened(folder, **options)
        assert policy.whole_samples == ("replay_steps" not in options)
        calls: list[int] = []
        policy.replay(trajectory, lambda chunk, calls=calls: calls.append(chunk.evaluation.log_ratio.numel()))
        found.append((len(calls), replays.gradient(policy, trajectory)))
    (one, first), *others = found
    assert [one, *(count for count, _ in others)] == [1, 6, 8]  # 4 steps of two images, for 4 and for 2 rows
    for _, gradient in others:
        for name, value in first.items():
            assert torch.allclose(gradient[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())), name


def test_the_gradient_is_that_of_finite_differences(folder):
    size, differences = slopes(opened(folder), batch_of())
    assert differences == pytest.approx(size, rel=1e-3)


def test_decisions_of_one_kind_move_what_the_other_kind_is_made_of(folder):
    policy = opened(folder)
    trajectory, _ = policy.rollout(batch_of())
    with_image = trajectory.take(trajectory.record["drawn"][:, 0].nonzero().flatten())

    def reached(columns: Tensor) -> set[str]:
        def consume(chunk: Chunk) -> None:
            chosen = with_image.mask[chunk.rows.unsqueeze(1), chunk.steps] & torch.isin(chunk.steps, columns)
            (chunk.evaluation.log_ratio * chosen).sum().backward()

        policy.replay(with_image, consume)
        trained = policy.trainable()
        found = {name for name, value in trained.items() if value.grad is not None and value.grad.abs().max() > 0}
        for value in trained.values():
            value.grad = None
        return found

    image = {"patch_in.weight", "places", "time.0.weight"}
    after_the_image = reached(policy.room.tokens_decided()[1])
    before_the_image = reached(policy.room.tokens_decided()[0])
    steps = reached(policy.room.images_decided()[0])
    assert image <= after_the_image and not image & before_the_image
    assert {
        "trunk.model.embed_tokens.weight",
        "flow_head.weight",
        *image,
    } <= steps and "trunk.lm_head.weight" not in steps


def test_a_step_makes_better_than_average_answers_likelier_in_both_kinds(folder):
    policy = opened(folder, replay_rows=6)
    trajectory, _ = policy.rollout(batch_of())
    anchored = policy.anchor(trajectory, whole(trajectory))
    advantages = torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0).unsqueeze(1).expand(trajectory.mask.shape)
    objective = by_kind(step=partial(clipped, low=1e-3, high=1e-3), token_weight=0.1)
    given = improve.Given(advantages, seq_mean(trajectory.mask))
    improve.accumulate(policy, anchored, given, improve.Loss(objective))
    norm = torch.stack([value.grad.norm() for value in policy.trainable().values() if value.grad is not None]).norm()
    for value in policy.trainable().values():
        if value.grad is not None:
            value.data -= 1e-4 * value.grad / norm
    moved = evaluations(policy, anchored)["log_ratio"]
    for kind in ("step", "token"):
        mask = of_kind(trajectory, kind)
        assert (torch.where(mask, moved, 0) * advantages).sum() > 0, kind


def test_kl_and_log_ratio_to_the_reference_are_those_of_each_kind(folder):
    policy = opened(folder)
    trajectory, _ = policy.rollout(batch_of())
    reference = Reference("frozen", policy.trainable())
    shaken(policy)
    found = evaluations(policy, trajectory, reference)
    steps, tokens = of_kind(trajectory, "step"), of_kind(trajectory, "token")
    assert (found["kl"][steps] > 0).all() and (found["kl"][tokens] == 0).all()
    assert (k3(found["to_reference"][tokens]) >= 0).all() and found["to_reference"][tokens].abs().max() > 1e-4
    assert (found["entropy"][tokens] > 0).all() and (found["entropy"][steps] == 0).all()


# -- lessons


def lessons(folder: Path) -> list[Prompt]:
    """Two answers, of two images and of one."""
    from torchvision.utils import save_image

    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        save_image(torch.rand(3, 16, 16, generator=generator), folder / f"{number}.png")
    rows = [
        ("one plus one red circles", ["one", "0.png", "two", "1.png"]),
        ("three minus one", ["2.png", "two circles"]),
    ]
    lines = []
    for text, parts in rows:
        answer = [{"image" if part.endswith(".png") else "text": part} for part in parts]
        lines.append(json.dumps({"prompt": text, "answer": answer}))
    (folder / "lessons.jsonl").write_text("\n".join(lines) + "\n")
    return load_prompts(str(folder / "lessons.jsonl"), target="answer")


def test_a_lesson_is_the_loss_of_tokens_and_velocities_worked_out_one_by_one(folder):
    prompts = lessons(folder)
    batch = requests(prompts, [1], group_size=1, seed=2, iteration=0)

    def loss(text: float, image: float) -> float:
        policy = opened(folder, media=folder, text_weight=text, image_weight=image)
        return float(hybrid_lessons.loss(policy, batch).detach())

    policy = opened(folder, media=folder)
    model, marks = policy.model, policy.marks
    answers = hybrid_lessons.answers_of(policy, batch.prompts)
    assert answers.shape.length.tolist() == [[1, 3, 0]] and answers.shape.drawn.tolist() == [[True, False]]
    clean = answers.clean[:, 0]
    words = policy.tokenizer("two circles").input_ids
    ids = [*policy.encoded(batch.prompts[0]), marks.start, *[-1] * 16, marks.end, *words, marks.stop[0]]
    told = torch.tensor([[max(0, one) for one in ids]])
    embedded = model.embed_text(told)
    at = ids.index(-1)
    embedded[:, at : at + 16] = model.embed_image(clean, torch.zeros(1))
    place = torch.arange(len(ids))
    image = (place >= at) & (place < at + 16)
    seen = (place.unsqueeze(1) >= place) | (image.unsqueeze(1) & image)
    with torch.no_grad():
        hidden = model.run(embedded, place.unsqueeze(0), seen.unsqueeze(0), model.empty())
        logits = model.trunk.lm_head(hidden)[0]
    logits[:, marks.end] = -math.inf
    log_prob = logits.log_softmax(1)
    asked = [(at - 2, marks.start), (at + 16, words[0]), (at + 17, words[1]), (at + 18, marks.stop[0])]
    assert loss(1, 0) == pytest.approx(-sum(float(log_prob[where, token]) for where, token in asked) / 4, rel=1e-4)

    noisy, target = hybrid_lessons.noised(policy, batch, answers)
    x, t = noisy.latent[:, 0], noisy.t[:, 0]
    assert torch.allclose(x - t * target[:, 0], clean, atol=1e-5)  # noise - image leads from the image to the noise
    embedded[:, at : at + 16] = model.embed_image(x, t)
    with torch.no_grad():
        part = slice(0, at + 16)
        hidden = model.run(embedded[:, part], place[None, part], seen[None, part, part], model.empty())
        error = (model.velocity(hidden[:, at:], t) - target[:, 0]).square().mean()
    assert loss(0, 1) == pytest.approx(float(error), rel=1e-4)
    assert loss(2, 3) == pytest.approx(2 * loss(1, 0) + 3 * loss(0, 1), rel=1e-5)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"text": "one two three"}], "a text of 4 tokens; expected policy.text = 3 at most"),
        ([{"image": "0.png"}] * 3, "an answer of 3 images; expected policy.images = 2"),
        ([{"image": "none.png"}], "none.png"),
    ],
    ids=["long", "many", "missing"],
)
def test_answers_that_do_not_fit_are_refused_before_training(parts, said, folder):
    lessons(folder)
    with pytest.raises(ValueError, match=said):
        opened(folder, media=folder).prepare([Prompt(0, "one", target=parts)])


def recipe_of(folder: Path, *lines: str) -> recipe.Recipe:
    """A recipe of the tiny model; further lines are overrides."""
    text = f"""
rewards = [{{ name = "text", build = "rewards.drawn_sums:text_exact" }},
           {{ name = "picture", build = "rewards.drawn_sums:picture_soft" }}]
advantage = {{ build = "mmgrpo.advantages:process" }}
[policy]
build = "pipelines.interleaved_hybrid:load"
model = "{folder}/model"
images = 2
text = 3
steps = 3
plan = {{ build = "mmgrpo.schedules:all_but_last" }}
media = "{folder}"
[prompts]
source = "{folder}/lessons.jsonl"
target = "answer"
[objective]
build = "mmgrpo.weighting:by_kind"
step = {{ build = "mmgrpo.objectives:clipped", low = 1e-3, high = 1e-3 }}
token_weight = 0.02
[optimizer]
learning_rate = 1e-2
[train]
iterations = 2
prompts = 2
group_size = 4
trackers = []
"""
    (folder / "recipe.toml").write_text(text)
    return recipe.load(folder / "recipe.toml", lines)


def test_the_trainer_teaches_it_and_a_saved_model_is_read_back_bit_for_bit(folder, tmp_path):
    lessons(folder)
    run = begin(start(recipe_of(folder, "train.stage='pretrain'", "train.iterations=6", "rewards=[]")), tmp_path)
    losses = [line["teach/loss"] for line in journal.read(tmp_path)]
    assert losses[-1] < losses[0]
    run.policy.save(tmp_path / "saved")
    again = load(model=str(tmp_path / "saved"), plan=EVERY, images=2, text=3, steps=3, device="cpu")
    for name, value in run.policy.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert again.encoded(Prompt(0, "two plus one")) == run.policy.encoded(Prompt(0, "two plus one"))


def test_the_trainer_checks_it_and_aligns_it_by_rewards_of_parts(folder, tmp_path):
    lines = [{"prompt": one.prompt, "answer": "", "texts": one.texts} for one in SUMS[:3]]
    (folder / "lessons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    begin(start(recipe_of(folder, "train.updates=2")), tmp_path)
    checked = (tmp_path / "check.txt").read_text().splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    assert any(line.startswith("ok   noise off: images differ") for line in checked)


# -- models


def test_a_vae_stands_between_pixels_and_latents_and_is_not_trained(folder, tmp_path):
    vae = AutoencoderKL(3, 3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    small = tiny_interleaved.config(width=32, layers=1, heads=2, inside=48)
    new = {**small, "image": {"size": 8, "channels": 4, "patch": 2}, "vae": str(tmp_path / "vae")}
    policy = load(new=new, tokenizer=str(folder / "tokenizer"), plan=EVERY, images=1, text=2, steps=3, device="cpu")
    assert policy.model.encode(torch.rand(2, 3, 16, 16)).shape == (2, 4, 8, 8)
    eager_to_draw(policy)
    trajectory, samples = policy.rollout(batch_of())
    images = [part for answer in samples.interleaved for part in answer if isinstance(part, Tensor)]
    assert images and images[0].shape == (3, 16, 16)
    assert not any(name.startswith("vae") for name in policy.trainable())
    policy.save(tmp_path / "saved")
    again, _ = hybrid_model.load(tmp_path / "saved")
    assert torch.equal(again.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)


OWN = """
from pipelines import hybrid_model


def build(config):
    model = hybrid_model.create(config)
    model.flow_head.weight.data.fill_(0.5)
    return model
"""


def test_a_module_of_the_users_own_is_built_from_the_config(folder, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    own = made(folder, network=f"{tmp_path}/mine.py:build")
    assert (own.model.flow_head.weight == 0.5).all()
    own.save(tmp_path / "saved")
    again = load(
        model=str(tmp_path / "saved"), network=f"{tmp_path}/mine.py:build", plan=EVERY, images=2, text=3, steps=3
    )
    assert torch.equal(again.model.places.cpu(), own.model.places)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": 0}, "policy.images is 0; expected at least 1"),
        ({"temperature": 0.0}, "policy.temperature is 0.0; expected a positive number"),
        ({"replay_rows": 0}, "policy.replay_rows is 0; expected at least 1"),
        ({"train": ("nothing*",)}, "no parameter matches 'nothing\\*'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(options, said, folder):
    with pytest.raises(ValueError, match=said):
        opened(folder, **options)


def test_patches_come_back_as_the_image_that_was_cut():
    image = torch.rand(2, 3, 8, 8)
    patches = hybrid_model.into_patches(image, 4)
    assert torch.equal(patches[1, 2], image[1, :, 4:, :4].flatten())
    assert torch.equal(hybrid_model.from_patches(patches, 4, (3, 8, 8)), image)


def test_a_plan_that_leaves_steps_out_trains_the_others_alone(folder):
    policy = opened(folder, plan=partial(listed, indices=[1]))
    trajectory, _ = policy.rollout(batch_of())
    steps = of_kind(trajectory, "step")[:, policy.room.images_decided()]
    assert not steps[:, :, [0, 2]].any() and torch.equal(steps[:, :, 1], trajectory.record["drawn"])
    assert evaluations(policy, replace(trajectory))["log_ratio"][trajectory.mask].abs().max() == 0

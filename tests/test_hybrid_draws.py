"""Images within answers noised again: one clean latent each, the matching loss at its times, exact replays, the same trainer."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_hybrid import batch_of, evaluations, of_kind, recipe_of, shaken, whole
from tiny_hybrids import EVERY, opened, slopes, written
from torch import Tensor

from mmgrpo import checkpoint, journal, recipe
from mmgrpo.aggregations import seq_mean
from mmgrpo.behaviour import Behaviour
from mmgrpo.draws import Draws
from mmgrpo.group_matching import dgpo
from mmgrpo.improve import Given, Loss, accumulate
from mmgrpo.kl import DISTANCES
from mmgrpo.kl import ByKind as KLByKind
from mmgrpo.matching import OUTPUTS, advantage_weighted, nft
from mmgrpo.objectives import Objective, clipped
from mmgrpo.run import start
from mmgrpo.seeds import derive, normal
from mmgrpo.shadow import Reference
from mmgrpo.trainer import begin, resume
from mmgrpo.transitions import Level, flow_sde
from mmgrpo.types import KINDS, Chunk, Trajectory
from mmgrpo.weighting import by_kind
from pipelines import predictions
from pipelines.hybrid_layout import Pair
from pipelines.interleaved_hybrid import HybridPolicy
from pipelines.matching import matched
from pipelines.tiny_interleaved import SUMS

BOTH = by_kind(token=partial(clipped, low=0.2, high=0.2), draw=nft)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hybrid"))


def drawing(folder: Path, draws: Draws | None = None, **options) -> HybridPolicy:
    return opened(folder, plan=None, draws=draws or Draws(count=2), **options)


def alternating(trajectory: Trajectory) -> Tensor:
    """Advantages of which every other row's is bad; (B, S)."""
    better = torch.where(torch.arange(len(trajectory)) % 2 == 0, 1.0, -0.5)
    return better.unsqueeze(1).expand(trajectory.mask.shape)


def gradient(policy: HybridPolicy, trajectory: Trajectory, loss: Loss, reference=None) -> Tensor:
    given = Given(alternating(trajectory), seq_mean(trajectory.mask))
    accumulate(policy, trajectory, given, loss, reference)
    return taken(policy)


def taken(policy: HybridPolicy) -> Tensor:
    """The gradient that has gathered, which is taken away."""
    found = []
    for value in policy.trainable().values():
        found.append((torch.zeros_like(value) if value.grad is None else value.grad).flatten())
        value.grad = None
    return torch.cat(found)


# -- what is recorded


@pytest.mark.parametrize("share", ["group", "sample"])
def test_a_rollout_records_one_clean_latent_of_each_image_and_the_times_and_noises_of_its_draws(share, folder):
    draws = Draws(count=4, share=share, sets=2)
    policy = drawing(folder, draws)
    trajectory, samples = policy.rollout(batch_of())
    assert policy.room.tokens_decided().tolist() == [[0, 1, 2], [8, 9, 10], [16, 17, 18]]
    assert policy.room.images_decided().tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert trajectory.mask.shape == (6, 19) and not trajectory.mask[:, [7, 15]].any()
    record, drawn = trajectory.record, trajectory.record["drawn"]
    assert record.keys() == {"token", "length", "drawn", "log_prob", "clean", "time", "noise"}
    assert record["clean"].shape == (6, 2, 3, 16, 16) and record["time"].shape == record["noise"].shape == (6, 4)
    assert drawn.any(0).all() and not drawn.all()
    assert torch.equal(trajectory.mask[:, policy.room.images_decided()], drawn.unsqueeze(2).expand(-1, -1, 4))
    assert (trajectory.kind[:, policy.room.images_decided()] == KINDS["draw"]).all()
    assert torch.equal(of_kind(trajectory, "token").sum(1), record["length"].sum(1))
    time, noise = (record[name].unflatten(0, (2, 3)) for name in ("time", "noise"))
    assert torch.equal(time[:, 0], time[:, 1]) and not torch.equal(time[0], time[1])
    assert draws.low <= time.min() and time.max() <= draws.high
    assert torch.equal(noise[:, 0], noise[:, 1]) == (share == "group")
    for row, parts in enumerate(samples.interleaved):
        images = [part for part in parts if isinstance(part, Tensor)]
        shown = policy.model.decode(record["clean"][row, drawn[row]])
        assert len(images) == len(shown) and all(map(torch.equal, images, shown))
        at = [place for place, part in enumerate(parts) if isinstance(part, Tensor) and place < len(parts) - 1]
        assert samples.part_end[row, at].tolist() == [6, 14][: len(at)]  # the last draw, unless the answer ends there


def test_images_are_sampled_without_noise_and_tokens_as_where_steps_are_decided(folder):
    policy = drawing(folder, steps=4)
    batch = batch_of()
    trajectory, _ = policy.rollout(batch)
    plain = opened(folder, steps=4).written(batch, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(trajectory.record["clean"], plain.answers.clean)
    assert torch.equal(trajectory.record["token"], plain.answers.token)


# -- replays


@pytest.mark.parametrize("precision", [{}, {"autocast": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_on_unchanged_weights_log_ratios_are_exactly_0_and_errors_the_old_ones(precision, folder):
    policy = drawing(folder, **precision)
    trajectory, _ = policy.rollout(batch_of())
    parts = [torch.tensor([4, 1, 5]), torch.tensor([0]), torch.tensor([2, 3])]
    anchored = policy.anchor(trajectory, parts)
    for one in (trajectory, *(anchored.take(part) for part in parts)):
        found = evaluations(policy, one)
        draws = of_kind(one, "draw")
        assert found["log_ratio"][one.mask].abs().max() == 0 and found["drift"][one.mask].abs().max() == 0
        assert torch.equal(found["error"][draws], found["old_error"][draws]) and (found["error"][draws] > 0).all()
    shaken(policy)
    for kind in ("draw", "token"):
        moved = evaluations(policy, anchored)["log_ratio"]
        assert (moved[of_kind(trajectory, kind)].abs() > 0).float().mean() > 0.5


def test_where_weights_lag_old_outputs_are_those_of_the_weights_that_sample(folder):
    policy = drawing(folder)
    behaviour = Behaviour(policy.trainable(), lag=0.5)
    shaken(policy)
    behaviour.after_iteration(0)
    with behaviour.applied():
        trajectory, _ = policy.rollout(batch_of())
        anchored = policy.anchor(trajectory, whole(trajectory))
        there = evaluations(policy, anchored)
    draws = of_kind(trajectory, "draw")
    assert there["log_ratio"][trajectory.mask].abs().max() == 0
    assert torch.equal(there["error"][draws], there["old_error"][draws])
    today = evaluations(policy, anchored)
    assert torch.equal(today["old_error"][draws], there["error"][draws])
    assert (today["error"] != today["old_error"])[draws].all() and (today["drift"][draws] > 0).all()


def chunks(policy: HybridPolicy, trajectory: Trajectory, reference=None) -> list[Chunk]:
    found: list[Chunk] = []
    policy.replay(trajectory, found.append, reference)
    return found


def test_fields_of_draws_are_0_at_tokens_and_at_images_that_are_not_there(folder):
    policy = drawing(folder, replay_rows=6)
    trajectory, _ = policy.rollout(batch_of())
    (chunk,) = chunks(policy, trajectory, Reference("frozen", policy.trainable()))
    found = chunk.evaluation.tensors()
    draws = of_kind(trajectory, "draw")[:, chunk.steps]
    assert draws.any() and not draws.all()
    names = {"error", "old_error", "reference_error", "clean_scale", "kl", *OUTPUTS}
    assert names <= found.keys() and not {"step_std", "dt"} & found.keys()
    for name in names - {"kl"}:
        assert (found[name][~draws] == 0).all() and (found[name][draws] != 0).any(), name
    assert found["prediction"].shape == (6, len(chunk.steps), 3 * 16 * 16)
    assert torch.equal(found["prediction"], found["old_prediction"])
    assert (found["entropy"][draws] == 0).all() and (found["to_reference"][draws] == 0).all()


def test_the_target_is_the_output_with_which_the_clean_sample_is_predicted(folder):
    policy = drawing(folder)
    trajectory, _ = policy.rollout(batch_of())
    record = trajectory.record
    for image in range(2):
        for draw in range(2):
            noisy = policy.decided.noisy(record, [Pair(image, draw)], record["clean"])
            for row in record["drawn"][:, image].nonzero().flatten().tolist():
                t, x = record["time"][row, draw], noisy.latent[[row], 0]
                arguments = {"sample": x, "model_output": torch.zeros_like(x)}
                weights = predictions.velocity(Level(1 - t, t)).clean
                expected = matched(weights, arguments, record["clean"][[row], image])
                place = int(policy.room.images_decided()[image, draw])
                (target,) = [
                    chunk.evaluation.target[0, chunk.steps == place]
                    for chunk in chunks(policy, trajectory.take(torch.tensor([row])))
                ]
                torch.testing.assert_close(target.view_as(x), expected.target, rtol=1e-3, atol=1e-4)
                assert noisy.t[row] == t.float()


# -- gradients


def velocity_alone(policy: HybridPolicy, trajectory: Trajectory, row: int, image: int, x: Tensor, t: Tensor) -> Tensor:
    """The velocity (1, C, H, W) in one noisy state: everything before the image, and the image, as one sequence."""
    model, marks, record = policy.model, policy.marks, trajectory.record
    words = policy.encoded(trajectory.batch.prompts[row])
    parts, blocks = [model.embed_text(torch.tensor([words]))], [False]
    for number in range(image + 1):
        text = record["token"][row, number, : record["length"][row, number]]
        parts.append(model.embed_text(text.unsqueeze(0)))
        blocks.append(False)
        now = number == image
        parts.append(model.embed_image(x, t) if now else model.embed_image(record["clean"][[row], number], 0 * t))
        blocks.append(True)
        if not now:
            parts.append(model.embed_text(torch.tensor([[marks.end]])))
            blocks.append(False)
    owner = torch.cat([torch.full((part.shape[1],), at if block else -1) for at, (part, block) in
                       enumerate(zip(parts, blocks, strict=True))])  # fmt: skip
    place = torch.arange(len(owner))
    seen = (place.unsqueeze(1) >= place) | ((owner.unsqueeze(1) == owner) & (owner >= 0))
    hidden = model.run(torch.cat(parts, 1), place.unsqueeze(0), seen.unsqueeze(0), model.empty())
    return model.velocity(hidden[:, -policy.room.tokens :], t)


def nft_by_hand(policy: HybridPolicy, trajectory: Trajectory, moved: float) -> Tensor:
    """Equations of DiffusionNFT over single network calls, strength 1, bound 5; old outputs are today's less `moved`."""
    record, weights = trajectory.record, seq_mean(trajectory.mask)
    total = torch.zeros(())
    for row, image in record["drawn"].nonzero().tolist():
        for draw in range(policy.decided.count):
            t = record["time"][row, [draw]].float()
            clean = record["clean"][[row], image]
            noise = normal([derive(int(record["noise"][row, draw]), image)], clean.shape[1:])
            v = velocity_alone(policy, trajectory, row, image, (1 - t) * clean + t * noise, t)
            old, target = v.detach() - moved, noise - clean
            good = float(alternating(trajectory)[row, 0]) / 10 + 0.5
            loss = torch.zeros(())
            for share, sign in ((good, 1), (1 - good, -1)):
                away = t * (old + sign * (v - old) - target)
                loss = loss + share * away.square().mean() / away.detach().abs().mean()
            total = total + 5 * loss * weights[row, int(policy.room.images_decided()[image, draw])]
    return total


def test_the_gradient_of_nft_is_that_of_single_calls_of_the_network(folder):
    policy = drawing(folder, replay_rows=4)
    trajectory, _ = policy.rollout(batch_of())
    assert trajectory.record["drawn"][:, 1].any()
    anchored = policy.anchor(trajectory, whole(trajectory))
    moved = 0.03
    record = {**anchored.record, "anchor.velocity": anchored.record["anchor.velocity"] - moved}
    found = gradient(policy, replace(anchored, record=record), Loss(by_kind(draw=nft, token_weight=0.0)))
    nft_by_hand(policy, trajectory, moved).backward()
    expected = taken(policy)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    apart = found + gradient(policy, trajectory, Loss(by_kind(draw=nft, draw_weight=0.0)))
    both = gradient(policy, replace(anchored, record=record), Loss(BOTH))
    assert (both - apart).norm() <= 1e-4 * apart.norm() and (both - found).norm() > 1e-2 * found.norm()


@pytest.mark.parametrize("objective", [nft, advantage_weighted, dgpo], ids=lambda one: one.__name__)
def test_the_gradient_does_not_depend_on_the_calls_of_a_replay(objective: Objective, folder):
    found = []
    trajectory, _ = drawing(folder).rollout(batch_of())
    for options in ({"replay_rows": 6}, {"replay_rows": 1}, {"replay_rows": 4, "replay_steps": 1}):
        policy = drawing(folder, **options)
        reference = Reference("frozen", policy.trainable())
        kl = KLByKind({KINDS["draw"]: (DISTANCES["exact"], 1.0), KINDS["token"]: (DISTANCES["k3"], 1.0)})
        shaken(policy)
        loss = Loss(by_kind(draw=objective), kl=kl, kl_weight=0.1)
        found.append(gradient(policy, trajectory, loss, reference))
    assert found[0].norm() > 0
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-3 * found[0].norm()


def test_answers_without_images_are_trained_by_their_tokens(folder):
    policy = drawing(folder)
    trajectory, _ = policy.rollout(batch_of())
    bare = trajectory.take((~trajectory.record["drawn"].any(1)).nonzero().flatten())
    assert len(bare) > 0 and not of_kind(bare, "draw").any()
    loss = Loss(BOTH, kl=DISTANCES["exact"], kl_weight=1.0)
    assert gradient(policy, bare, loss, Reference("frozen", policy.trainable())).norm() > 0


def test_a_step_brings_better_answers_nearer_in_both_kinds(folder):
    policy = drawing(folder, Draws(count=4), replay_rows=6)
    trajectory, _ = policy.rollout(batch_of())
    anchored = policy.anchor(trajectory, whole(trajectory))
    slope = gradient(policy, anchored, Loss(BOTH))
    parameters = list(policy.trainable().values())
    with torch.no_grad():
        for value, part in zip(parameters, slope.split([p.numel() for p in parameters]), strict=True):
            value -= 1e-4 / float(slope.norm()) * part.view_as(value)
    moved = evaluations(policy, anchored)["log_ratio"]
    centred = alternating(trajectory) - alternating(trajectory).mean()
    for kind in ("draw", "token"):
        assert (torch.where(of_kind(trajectory, kind), moved, 0) * centred).sum() > 0, kind


def test_the_gradient_is_that_of_finite_differences(folder):
    size, differences = slopes(drawing(folder), batch_of())
    assert differences == pytest.approx(size, rel=1e-3)


# -- runs


MINE = """
import torch


def bright(samples):
    def mean(parts):
        found = [part.mean() for part in parts if isinstance(part, torch.Tensor)]
        return torch.stack(found).mean() if found else torch.tensor(0.0)

    return torch.stack([mean(parts) for parts in samples.interleaved])
"""


def drawn_recipe(folder: Path, *lines: str) -> recipe.Recipe:
    """The tiny recipe, its images decided by draws under lagging weights, brighter ones rewarded."""
    (folder / "mine.py").write_text(MINE)
    rows = [{"prompt": one.prompt, "answer": "", "texts": one.texts} for one in SUMS[:3]]
    (folder / "lessons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = f"rewards=[{{name='bright', build='{folder}/mine.py:bright'}}]"
    compared = "advantage={build='mmgrpo.advantages:standardized'}"
    draw = "objective.draw={build='mmgrpo.matching:nft'}"
    found = recipe_of(folder, reward, compared, draw, "behaviour.lag=0.5", *lines)
    policy = {name: value for name, value in found.policy.items() if name != "plan"}
    objective = {name: value for name, value in found.objective.items() if name != "step"}
    return replace(found, policy={**policy, "draws": {"count": 2}}, objective=objective)


def test_the_trainer_checks_it_and_aligns_it_with_an_objective_of_each_kind(folder, tmp_path):
    run = begin(start(drawn_recipe(folder, "train.updates=2", "train.iterations=3")), tmp_path)
    checked = (tmp_path / "check.txt").read_text().splitlines()
    assert [line for line in checked if not line.startswith("ok")] == []
    assert any(line.startswith("ok   draws: mean squared error of the velocities") for line in checked)
    assert any(line.startswith("ok   finite difference: slope") for line in checked)
    lines = journal.read(tmp_path)
    assert run.iteration == 3 and all(line["reward/bright/std"] > 0 for line in lines)
    assert all(line["update/decisions/drift"] > 0 for line in lines[1:])


def test_a_resumed_run_with_kept_groups_equals_an_uninterrupted_one(folder, tmp_path):
    for name, count in (("whole", 3), ("half", 2)):
        begin(start(drawn_recipe(folder, "recall.groups=4", f"train.iterations={count}")), tmp_path / name)
    resume(tmp_path / "half", ["train.iterations=3"])
    paths = [checkpoint.latest(tmp_path / name) for name in ("half", "whole")]
    (one, _), (other, _) = (checkpoint.read(path) for path in paths)
    assert other["recall"]
    for part, tensors in other.items():
        for name, value in tensors.items():
            assert torch.equal(one[part][name].nan_to_num(7), value.nan_to_num(7)), (part, name)


# -- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": None}, "none of them arrived; expected policy.plan, or policy.draws alone"),
        ({"draws": Draws(), "plan": EVERY}, "policy.plan, policy.draws arrived; expected policy.plan, or"),
        ({"draws": Draws(), "plan": None, "sampler": flow_sde}, "policy.sampler, policy.draws arrived; expected"),
        (
            {"draws": Draws(call={"guidance_scale": 1.0}), "plan": None},
            r"policy\.draws\.call is {'guidance_scale': 1.0}; this policy runs no pipeline: expected none",
        ),
        ({"steps": 1}, "policy.steps is 1; expected at least 2"),
    ],
    ids=["none", "two", "a sampler", "a call", "steps"],
)
def test_options_that_name_no_decisions_are_refused(options, said, folder):
    with pytest.raises(ValueError, match=said):
        opened(folder, **options)

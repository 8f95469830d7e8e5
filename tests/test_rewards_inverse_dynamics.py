"""Inverse-dynamics rewards against answers worked out by hand, and a world of one dot whose pixels say what was done."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmgrpo.advantages import standardize
from mmgrpo.components import build, complete
from mmgrpo.toml import RecipeError
from mmgrpo.types import Batch, Prompt, Samples
from rewards.dot_world import MOVES, SIZE, STEP, Walks, draw, drawing, floor, middles, paths, tracker, walks
from rewards.inverse_dynamics import Component, ceiling, inverse_dynamics, measures
from rewards.inverse_dynamics_models import FramePairs, pretrained

KEY = Component("key", values=(0, 1, 2), rest=0)
CAMERA = Component("camera", edges=(-5.0, -1.0, 1.0, 5.0), rest=0.0)


def clips_of(codes: Tensor) -> Tensor:
    """Clips that carry a number in every frame but the first, as the fakes below read it; (B, n) -> (B, n + 1, 3, 2, 2)."""
    frames = torch.cat([torch.zeros(len(codes), 1), codes.float() / 10], 1)
    return frames[:, :, None, None, None].expand(-1, -1, 3, 2, 2).clone()


def reads_codes(video: Tensor, classes: int = 3) -> Tensor:
    """A user's model: the class of action i is what frame i carries."""
    codes = (video[:, 1:, 0, 0, 0] * 10).round().long()
    return torch.nn.functional.one_hot(codes, classes).float()


def asked(actions: list, video: Tensor) -> Samples:
    ids = torch.arange(len(actions))
    prompts = tuple(Prompt(row, "", columns={"actions": own}) for row, own in enumerate(actions))
    return Samples(Batch(prompts, ids, torch.arange(len(actions)), 0, 0), video=video)


def test_the_reward_is_the_share_of_actions_recovered():
    found = torch.tensor([[1, 0, 2, 1], [1, 1, 0, 1], [1, 0, 2, 2]])
    reward = inverse_dynamics(model=reads_codes, components=(KEY,))
    assert reward(asked([[1, 0, 2, 2]] * 3, clips_of(found))).tolist() == [0.75, 0.25, 1.0]


def test_the_advantages_of_a_group_are_those_of_the_published_equation():
    wanted = [[1, 0, 2, 2]] * 4
    found = torch.tensor([[1, 0, 2, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 2, 2]])
    rewards = inverse_dynamics(model=reads_codes, components=(KEY,))(asked(wanted, clips_of(found)))
    assert rewards.tolist() == [0.75, 0.25, 0.5, 0.5]
    advantages = standardize(rewards, torch.zeros(4, dtype=torch.int64), ddof=0, eps=0)
    torch.testing.assert_close(advantages, torch.tensor([1.414214, -1.414214, 0, 0]), atol=1e-5, rtol=0)
    equal = standardize(torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int64), ddof=0)
    assert equal.tolist() == [0.0] * 4


def reads_two(video: Tensor) -> list[Tensor]:
    """Two components: a key in red, the class of a camera in green."""
    return [reads_codes(video), reads_codes(video[:, :, 1:], 5)]


def test_compound_actions_count_whole_or_by_component():
    video = clips_of(torch.tensor([[1, 0, 2, 2]]))
    video[:, 1:, 1] = torch.tensor([0, 2, 4, 3]).view(4, 1, 1) / 10
    wanted = [
        {"key": 1, "camera": -9.0},
        {"key": 0, "camera": 0.5},
        {"key": 2, "camera": 2.0},
        {"key": 0, "camera": 1.0},
    ]
    whole, mean = (inverse_dynamics(model=reads_two, components=(KEY, CAMERA), form=form) for form in ("tuple", "mean"))
    samples = asked([wanted], video)
    assert whole(samples).tolist() == [0.5]  # right, right, camera wrong, key wrong
    assert mean(samples).tolist() == [0.75]
    assert whole(asked([[[one["key"], one["camera"]] for one in wanted]], video)).tolist() == [0.5]
    found = measures(model=reads_two, components=(KEY, CAMERA))(samples)
    assert {name: values.item() for name, values in found.items()} == pytest.approx(
        {"accuracy": 0.5, "moving": 1 / 3, "key": 0.75, "camera": 0.75}
    )


def test_a_number_falls_into_the_class_between_its_edges():
    assert [CAMERA.index(value) for value in (-9, -5.0, -1.5, -1.0, 0, 1, 4.9, 5, 100)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_steps_at_rest_are_left_out_of_what_counts_as_moving():
    found = clips_of(torch.tensor([[0, 0, 0, 0]] * 3))
    samples = asked([[0, 0, 0, 1], [0, 0, 0, 0], [2, 1, 0, 0]], found)
    every, moving = (inverse_dynamics(model=reads_codes, components=(KEY,), steps=steps) for steps in ("all", "moving"))
    assert every(samples).tolist() == [0.75, 1.0, 0.5]  # standing still is often right
    scores = moving(samples)
    assert scores[[0, 2]].tolist() == [0.0, 0.0] and scores[1].isnan()


def test_a_clip_with_a_pixel_that_is_not_finite_has_no_score_and_leaves_the_others_theirs():
    video = clips_of(torch.tensor([[1, 0, 2, 2]] * 3))
    video[1, 2, 0, 1, 1] = torch.nan
    for form in ("tuple", "mean"):
        scores = inverse_dynamics(model=reads_codes, components=(KEY,), form=form)(asked([[1, 0, 2, 2]] * 3, video))
        assert scores[[0, 2]].tolist() == [1.0, 1.0] and scores[1].isnan()
    video[:] = torch.inf
    assert inverse_dynamics(model=reads_codes, components=(KEY,))(asked([[1, 0, 2, 2]] * 3, video)).isnan().all()


def test_every_reward_is_of_all_frames_of_its_own_clip_alone():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(3, (7, 4), generator=generator)
    wanted = torch.randint(3, (7, 4), generator=generator)
    order = torch.randperm(7, generator=generator)
    seen: list[torch.Size] = []

    def model(video: Tensor) -> Tensor:
        seen.append(video.shape)
        return reads_codes(video)

    score = partial(inverse_dynamics, model=model, components=(KEY,))
    plain = score(batch=64)(asked(wanted.tolist(), clips_of(codes)))
    assert plain.tolist() == (codes == wanted).float().mean(1).tolist()
    assert torch.equal(score(batch=2)(asked(wanted[order].tolist(), clips_of(codes)[order])), plain[order])
    assert [shape[:2] for shape in seen] == [(7, 5), (2, 5), (2, 5), (2, 5), (1, 5)]
    frames = torch.tensor([2, 0, 3, 1])  # together with the actions, for a model that looks at single frames
    assert torch.equal(score(batch=64)(asked(wanted[:, frames].tolist(), clips_of(codes[:, frames]))), plain)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, 0, 2, 2, 1], "prompt 0 has 5 actions for a clip of 5 frames; expected 4, one from each frame to the next"),
        ([1, 0, 2, 7], r"component 'key' of an action is 7; expected one of \[0, 1, 2\]"),
        ("up", "prompt 0 has actions 'up'; expected a list of actions"),
        ([1, 0, 2, [0, 1]], r"an action is \[0, 1\]; expected the components key"),
    ],
)
def test_actions_that_do_not_fit_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        inverse_dynamics(model=reads_codes, components=(KEY,))(asked([actions], clips_of(torch.zeros(1, 4))))


def test_a_model_that_does_not_fit_is_refused():
    samples = asked([[1, 0, 2, 2]], clips_of(torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="recovers 2 components of an action; expected 1"):
        inverse_dynamics(model=reads_two, components=(KEY,))(samples)
    with pytest.raises(ValueError, match=r"logits has shape \(1, 5, 3\); expected \(1, 4, any\)"):
        inverse_dynamics(model=lambda video: torch.zeros(1, 5, 3), components=(KEY,))(samples)
    with pytest.raises(ValueError, match="component 'plain' has no value of rest"):
        inverse_dynamics(model=reads_codes, components=(Component("plain", values=(0, 1)),), steps="moving")
    with pytest.raises(ValueError, match="the samples carry no video"):
        inverse_dynamics(model=reads_codes, components=(KEY,))(Samples(samples.batch))
    for wrong in (partial(Component, "a"), partial(Component, "a", (1,), (0.5,)), partial(Component, "a", (), (2, 1))):
        with pytest.raises(ValueError, match="component 'a' has"):
            wrong()


# ---- models


def test_a_recipe_names_the_models_class_and_its_folder(tmp_path):
    torch.manual_seed(0)
    network = FramePairs((3, 5)).eval()
    network.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == network.state_dict().keys()
    table = {
        "build": "rewards.inverse_dynamics:measures",
        "model": {
            "build": "rewards.inverse_dynamics_models:pretrained",
            "source": str(tmp_path),
            "network": "rewards.inverse_dynamics_models:FramePairs",
        },
        "components": [
            {"name": "key", "values": [0, 1, 2], "rest": 0},
            {"name": "camera", "edges": [-5.0, -1.0, 1.0, 5.0], "rest": 0.0},
        ],
    }
    complete(table, "rewards.actions")
    reward = build(table, "rewards.actions")
    video = torch.rand(4, 4, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        key, camera = (logits.argmax(2) for logits in network(video))
    values = [-9.0, -2.0, 0.0, 2.0, 9.0]
    said = [
        [{"key": int(k), "camera": values[c]} for k, c in zip(*row, strict=True)]
        for row in zip(key, camera, strict=True)
    ]
    assert {name: float(one.nanmean()) for name, one in reward(asked(said, video)).items() if name != "moving"} == {
        "accuracy": 1.0,
        "key": 1.0,
        "camera": 1.0,
    }
    with pytest.raises(RecipeError, match=r"rewards.actions.components.*rests: unknown key"):
        build(table | {"components": [{"name": "key", "values": [0, 1], "rests": 0}]}, "rewards.actions")


def test_what_is_no_frozen_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a ModelMixin of diffusers or a PreTrainedModel of transformers"):
        pretrained(source=str(tmp_path), network="rewards.dot_world:tracker")
    with pytest.raises(ValueError, match="there is no such folder"):
        pretrained(source=str(tmp_path / "none"), network="rewards.inverse_dynamics_models:FramePairs")


def test_pickled_weights_are_refused(tmp_path):
    network = FramePairs((3,))
    network.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        pretrained(source=str(tmp_path), network="rewards.inverse_dynamics_models:FramePairs")


def test_the_small_network_reads_the_whole_clip_and_each_clip_alone():
    torch.manual_seed(0)
    network, video = FramePairs((5,)).eval(), torch.rand(3, 5, 3, 16, 16)
    (logits,) = network(video)
    torch.testing.assert_close(network(video[1:2])[0][0], logits[1], rtol=1e-4, atol=1e-5)
    changed = video.clone()
    changed[0, 4] = 1 - changed[0, 4]
    difference = (network(changed)[0] - logits).abs().amax(2)
    assert difference[0, 2] > 1e-4  # a later frame matters
    assert difference[1:].max() == 0


# ---- the world of one dot


def walk(moves: list[str]) -> Walks:
    number = torch.tensor([[list(MOVES).index(move) for move in moves]])
    return Walks(torch.tensor([[6.0, 6.0]]), number, torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 0, 0.2]]))


def drawn(given: Walks, video: Tensor) -> dict[str, Tensor]:
    rows = torch.arange(len(video))
    columns = [
        {"dot": dot, "background": plain}
        for dot, plain in zip(given.dot.tolist(), given.background.tolist(), strict=True)
    ]
    prompts = tuple(Prompt(row, "", columns=own) for row, own in enumerate(columns))
    return drawing(Samples(Batch(prompts, rows, rows, 0, 0), video=video))


def test_a_walk_ends_where_its_moves_lead():
    path = paths(torch.tensor([[6.0, 6.0]]), walk(["up", "left", "stay", "down"]).actions)[0]
    assert path.tolist() == [[6, 6], [6, 2], [2, 2], [2, 2], [2, 6]]
    clip = walk(["right"]).clips()[0]
    assert clip.shape == (2, 3, SIZE, SIZE)
    assert clip[0, :, 6, 6].tolist() == [1, 0, 0] and clip[0, :, 0, 15].tolist() == pytest.approx([0.25, 0, 0.2])
    empty = floor(walk(["right"]).background)[0]
    share = (clip[0, 0] - empty[0]) / (1 - empty[0])
    assert share.sum() == pytest.approx(torch.pi * 2**2, rel=0.05)


def test_random_walks_stay_inside_and_the_tracker_recovers_every_move():
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(len(MOVES), (200, 3), generator=generator)
    real = walks(actions, generator)
    path, clips = paths(real.start, actions), real.clips()
    assert set(path.flatten().tolist()) == {2, 6, 10, 14}
    assert (middles(clips) - path).abs().max() < 0.05
    assert torch.equal(tracker()(clips).argmax(2), actions)
    assert torch.equal(tracker()((clips * 255).round() / 255).argmax(2), actions)
    found = drawn(real, clips)
    assert found["likeness"].min() > 0.99 and found["whole"].min() == 1


def test_a_walk_that_must_leave_the_world_is_refused():
    with pytest.raises(ValueError, match=r"no start keeps the dot inside for the actions \[1, 1, 1, 1\]"):
        walks(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.Generator())


def test_a_move_of_another_length_or_of_nothing_is_no_move():
    stands = walk(["stay"]).clips()
    half, twice = (draw(torch.tensor([[[6.0, 6.0], [6.0 + by, 6.0]]]), walk(["stay"]).dot, walk(["stay"]).background)
                   for by in (0.45 * STEP, 1.6 * STEP))  # fmt: skip
    gone = stands.clone()
    gone[:, 1] = floor(walk(["stay"]).background)
    read = tracker()
    assert [int(read(video).argmax(2)) for video in (stands, half, twice, gone)] == [0, 0, len(MOVES), len(MOVES)]


def test_a_smear_a_second_dot_and_a_wrong_colour_are_no_whole_dot():
    given = walk(["right", "right"])
    true = given.clips()
    smear = true.clone()
    smear[:, 1] = (true[:, 0] + true[:, 1] + true[:, 2]) / 3
    second = true.clone()
    second[:, 1] = torch.maximum(true[:, 1], true[:, 1].flip(2).roll(6, 2))
    other = true.clone()
    other[:, 1] = true[:, 1].flip(1)
    empty = true.clone()
    empty[:, 1] = floor(given.background)
    lost = true.clone()
    lost[0, 0, 0, 0, 0] = torch.nan
    for video in (smear, second, other, empty):
        found = drawn(given, video)
        assert found["whole"].item() == pytest.approx(2 / 3) and found["likeness"] < 0.9
    assert all(values.isnan().all() for values in drawn(given, lost).values())
    with pytest.raises(ValueError, match="a prompt has dot None; expected a list of three numbers"):
        drawing(asked([["up", "up"]], true))


def test_real_clips_are_the_ceiling():
    generator = torch.Generator().manual_seed(1)
    actions = torch.randint(len(MOVES), (50, 3), generator=generator)
    said = [[list(MOVES)[one] for one in row] for row in actions.tolist()]
    watch = measures(model=tracker(), components=(Component("move", values=tuple(MOVES), rest="stay"),))
    assert ceiling(watch, walks(actions, generator).clips(), said) == {"accuracy": 1.0, "moving": 1.0}
    shifted = [row[1:] + row[:1] for row in said]  # off by one: near chance
    assert ceiling(watch, walks(actions, generator).clips(), shifted)["accuracy"] < 0.35

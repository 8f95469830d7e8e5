"""The watch over real runs of the image demo's model: it slows, stops, goes on, and a run that collapses is caught in time."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_trainer import lasting, recipe, same_state

from mmgrpo import checkpoint, journal
from mmgrpo.recipe import Watch, load
from mmgrpo.signs import History, Sign
from mmgrpo.trainer import resume, train
from mmgrpo.watch import judged
from pipelines import assets

GRADIENT, SATURATION = Sign("gradient", "it grew", True), Sign("saturation", "all alike", False)
NERVOUS = (
    "train.iterations=8",
    "watch.after=2",
    "watch.norm_updates=1",
    "watch.norm_factor=1.01",
)  # sees what is no collapse


# ---- what is done about a sign


def test_a_sign_that_acts_stops_the_run_and_one_that_does_not_is_told_once() -> None:
    told = judged(History(), [SATURATION], Watch(), 3)
    assert (told.said, told.stopped) == (("iteration 3: all alike",), "")
    assert judged(told, [SATURATION], Watch(), 4) == told
    stopped = judged(told, [GRADIENT, SATURATION], Watch(), 5)
    assert (stopped.said[1:], stopped.stopped) == (("iteration 5: it grew; stopped",), "it grew")


def test_a_watch_that_slows_waits_lowers_again_and_stops_at_the_fourth_time() -> None:
    history, options = History(norms=((1.0,),)), Watch(action="slow", after=4)
    for time in (1, 2, 3):
        history = judged(history, [GRADIENT], options, time)
        assert (history.slowed, history.norms, history.silent, history.stopped) == (time, (), 4, "")
        assert judged(history, [GRADIENT], options, time) == history, "silent"
        history = History(**{**vars(history), "silent": 0})
    assert [line.rpartition(" lowered to ")[2] for line in history.said] == [
        f"{s} of its own" for s in (0.5, 0.25, 0.125)
    ]
    assert judged(history, [GRADIENT], options, 4).stopped == "it grew"


def test_a_watch_that_only_tells_tells_each_sign_once_and_stops_nothing() -> None:
    history = judged(History(), [GRADIENT], Watch(action="tell"), 3)
    assert (history.said, history.stopped, history.slowed) == (("iteration 3: it grew",), "", 0)
    assert judged(history, [GRADIENT, SATURATION], Watch(action="tell"), 4).said[1:] == ("iteration 4: all alike",)


# ---- runs


def rollouts(folder: Path) -> list[float]:
    return [line["reward/total/mean"] for line in journal.read(folder)]


@pytest.mark.slow
def test_a_slowed_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    slow = (*NERVOUS, "watch.action=slow")
    whole = train(recipe(*slow), tmp_path / "whole")
    train(recipe(*slow, "train.iterations=4"), tmp_path / "half")
    resume(tmp_path / "half", ["train.iterations=8"])
    assert whole.history.slowed >= 1
    rates = [line["update/learning_rate"] for line in journal.read(tmp_path / "whole")]
    assert rates[-1] == pytest.approx(rates[0] / 2**whole.history.slowed) and rates[-1] < rates[0]
    same_state(tmp_path / "half", tmp_path / "whole")
    assert lasting(tmp_path / "half") == lasting(tmp_path / "whole")
    assert (tmp_path / "half" / "watch.txt").read_text() == (tmp_path / "whole" / "watch.txt").read_text()
    assert "iterations = 8" in (tmp_path / "half" / "recipe.toml").read_text()


@pytest.mark.slow
def test_a_stopped_run_is_saved_with_its_result_and_goes_on_only_when_told_to(tmp_path, capsys):
    folder = tmp_path / "run"
    run = train(recipe(*NERVOUS, "train.evaluate_every=8", "train.keep=1", "train.save_every=8"), folder)
    assert run.history.stopped and run.iteration < 8
    said, lines = capsys.readouterr().out, journal.read(folder)
    assert len(lines) == run.iteration and "held_out/soft" in lines[-1], "scored once more when it stops"
    assert "watch: " in said and "soft (trained on)" in said
    saved = checkpoint.saved(folder)
    assert list(saved) == [1, run.iteration], "one from before the watch could stop, kept beside the newest"
    assert said.endswith(
        f"watch: stopped after {run.iteration} of 8 iterations; the result is the average of the weights, in {saved[run.iteration] / 'model'}\n"
        f"watch: go on with: mmgrpo resume {saved[1]} optimizer.learning_rate=0.00015; "
        f"or unwatched from here: mmgrpo resume {folder} watch.action=off\n"
    )
    assert said.endswith("".join(f"watch: {line}\n" for line in (folder / "watch.txt").read_text().splitlines()))
    again = resume(folder)
    assert (again.iteration, again.history) == (run.iteration, run.history) and len(
        journal.read(folder)
    ) == run.iteration
    assert capsys.readouterr().out.splitlines()[1:] == said.splitlines()[1:], "all but the bar"
    halved = resume(saved[1], ["optimizer.learning_rate=0.000165", "watch.action=tell"])
    assert halved.iteration == 8 and not halved.history.stopped
    assert journal.read(folder)[1]["update/learning_rate"] == pytest.approx(0.000165)


@pytest.mark.slow
def test_without_averages_the_best_earlier_weights_are_named_and_an_unwatched_run_goes_to_its_end(tmp_path, capsys):
    train(recipe(*NERVOUS, "ema.decay=0.0"), tmp_path / "run")
    saved, rewards = checkpoint.saved(tmp_path / "run"), rollouts(tmp_path / "run")
    before = sorted(saved)[:-1]
    assert len(before) == 3
    best = max(before, key=lambda done: fmean(rewards[max(0, done - 5) : done]))
    assert f"decay = 0); better than the newest are those in {saved[best] / 'model'}\n" in capsys.readouterr().out
    assert resume(tmp_path / "run", ["watch.action=off"]).iteration == 8
    assert "watch/lines" not in journal.read(tmp_path / "run")[-1]


# ---- a collapse


@dataclass(frozen=True)
class Collapse:
    """A way to train the image demo's model that goes well at first and then ruins it."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    begins: int  # iteration at which the rollouts' reward begins to fall for good
    kept: float = 0.1  # by which the averaged weights may be worse than at their best when it is caught


COLLAPSES = [
    Collapse(
        "grpo_whose_warm_up_goes_too_far",
        "demo_image_flow_grpo",
        (
            "optimizer.learning_rate=1e-2",
            "optimizer.warmup=60",
            "train.iterations=26",
            "policy.call.num_inference_steps=5",
            "objective={build='mmgrpo.objectives:guarded', low=1e-4, high=1e-4}",
        ),
        12,
    ),
    Collapse(
        "nft_that_learns_from_its_own_samples_without_a_lag",
        "demo_image",
        (
            "optimizer.learning_rate=1.5e-3",
            "optimizer.muon=[]",
            "optimizer.decay=constant",
            "behaviour.lag=0.0",
            "train.keep_share=1.0",
            "train.iterations=44",
        ),
        29,
        0.2,
    ),
]
RUN = (
    "train.prompts=16",
    "train.group_size=6",
    "train.evaluate_every=5",
    "train.save_every=100",
    "ema.decay=0.95",  # per update: 0.9 per iteration
    "evaluation.samples=8",
    "policy.rollout_rows=96",
    "policy.replay_rows=96",
)
CAUGHT = 8  # iterations after the beginning of a collapse


def curve(folder: Path) -> list[float]:
    """The held-out reward of the averaged weights, evaluation by evaluation."""
    return [line["held_out/soft"] for line in journal.read(folder) if "held_out/soft" in line]


def assert_exported(run, folder: Path) -> None:
    """The averaged weights, in the library's own format."""
    (part,) = folder.iterdir()
    trained = run.policy.engine.pipeline.components[part.name]
    loaded = type(trained).from_pretrained(part).state_dict()
    with run.averaged():
        assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("case", COLLAPSES, ids=lambda case: case.name)
def test_a_collapse_is_caught_while_the_averaged_weights_are_as_good_as_ever(case, tmp_path):
    shipped = assets.folder("image_demo")
    places = {"policy.model": shipped, "prompts.source": shipped / "prompts" / "train.jsonl"}
    places |= {"evaluation.source": shipped / "prompts" / "validation.jsonl"}
    overrides = [*(f"{key}={json.dumps(str(place))}" for key, place in places.items()), *RUN, *case.overrides]
    run = train(load(Path(str(files("pipelines") / "recipes" / f"{case.recipe}.toml")), overrides), tmp_path)
    assert "the reward of rollouts fell" in run.history.stopped or "the gradient norm was over" in run.history.stopped
    assert case.begins < run.iteration <= case.begins + CAUGHT
    caught = curve(tmp_path)
    assert caught[-1] > max(caught) - case.kept
    assert caught[-1] > journal.read(tmp_path)[-1]["reward/soft/mean"] + 0.4, "the weights of today are ruined already"
    assert_exported(run, checkpoint.saved(tmp_path)[run.iteration] / "model")
    resume(tmp_path, ["watch.action=off"])
    assert curve(tmp_path)[-1] < max(caught) - 0.4

"""Win rates from a judge that compares two by two, against a real server on this machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_rewards_judge import NAN, Server, reply, same, server
from test_vlm_runs import recipe
from torch import Tensor

from mmgrpo.advantages import standardized
from mmgrpo.check import examine
from mmgrpo.components import build
from mmgrpo.run import start
from mmgrpo.scoring import score
from mmgrpo.types import Batch, Prompt, Reward, Samples
from rewards.pairwise import beaten, read_verdict, win_rate, win_rates

__all__ = ["recipe", "server"]  # fixtures
TEMPLATE = "{prompt} [{first}] against [{second}]?"


def ask(server: Server, template: str = TEMPLATE, **options: object) -> Reward:
    chosen: dict[str, object] = {"pause": 0.0, "timeout": 20.0, **options}
    return win_rate(url=server.url, model="referee", template=template, **chosen)  # type: ignore[arg-type]


def said(*texts: str, group: list[int] | None = None, image: Tensor | None = None, target: object = None) -> Samples:
    groups = [0] * len(texts) if group is None else group
    prompts = tuple(Prompt(number, f"number {number}:", target=target) for number in groups)
    batch = Batch(prompts, torch.tensor(groups), torch.arange(10, 10 + len(texts)), seed=0, iteration=0)
    return Samples(batch, text=texts, image=image)


def compared(by: Callable[[str, str], str]) -> Callable[[str, int], tuple[int, bytes]]:
    """A judge that answers with `by` of the first and the second."""

    def behave(question: str, before: int) -> tuple[int, bytes]:
        first, second = (part.split("]")[0] for part in question.split("[")[1:])
        return reply(f"Winner: {by(first, second)}")

    return behave


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


# ---- the mean over the others


def test_a_win_rate_is_the_mean_over_the_others_of_the_group() -> None:
    beats = torch.tensor(  # rows 0, 2, 3 and rows 1, 4 are groups
        [[NAN, 9, 1, 0.5, 9], [9, NAN, 9, 9, 1], [0, 9, NAN, 1, 9], [0.5, 9, 0, NAN, 9], [9, 0, 9, 9, NAN]]
    )
    group = torch.tensor([0, 1, 0, 0, 1])
    same(win_rates(beats, group), [0.75, 1, 0.5, 0.25, 0])
    mean = torch.stack([win_rates(beats, group)[group == number].mean() for number in (0, 1)])
    same(mean, [0.5, 0.5])  # whatever one wins another loses
    order = torch.tensor([3, 1, 4, 0, 2])
    same(win_rates(beats[order][:, order], group[order]), win_rates(beats, group)[order].tolist())


def test_a_pair_without_a_verdict_leaves_the_mean_and_a_sample_without_pairs_has_no_rate() -> None:
    beats = torch.tensor([[NAN, 1, NAN], [0, NAN, NAN], [NAN, NAN, NAN]])
    same(win_rates(beats, torch.zeros(3, dtype=torch.int64)), [1, 0, NAN])
    same(win_rates(torch.ones(1, 1), torch.tensor([4])), [NAN])
    with pytest.raises(ValueError, match=r"beats has shape \(3, 2\); expected \(3, 3\)"):
        win_rates(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))


def test_the_orders_of_a_pair_are_averaged_and_one_alone_does_not_count_where_both_were_asked() -> None:
    found: dict[tuple[int, int], float | None] = {(0, 1): 1.0, (1, 0): 0.5, (0, 2): 1.0, (2, 0): NAN}
    beats = beaten(found, 3)
    assert beats[0, 1] == 0.75 and beats[1, 0] == 0.25
    assert beats[0, 2].isnan() and beats[2, 0].isnan() and beats[1, 2].isnan()


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Winner: first", 1),
        ("The second is blurred.\n**Winner:** First", 1),
        ("winner is the second one", 0),
        ('{"winner": "tie"}', 0.5),
        ("Winner: first? No. Winner: second", 0),  # the last
        ("first", 1),
        ("**Tie**.", 0.5),
        ("The winner is a tie", 0.5),
        ("Winner: firstly", None),
        ("Winner: A", None),
        ("first or second", None),
        ("", None),
    ],
)
def test_the_verdict_of_a_reply_is_read_by_the_stated_rule(text: str, verdict: float | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize("text", ["winner " * 2**17, "winner" + " " * 2**20, "winner is the " * 2**16, "*" * 2**20])
def test_a_reply_of_a_megabyte_is_read_within_a_second(text: str) -> None:
    begin = time.process_time()
    assert read_verdict(text) is None
    assert time.process_time() - begin < 1


# ---- a judge that answers


def test_samples_are_compared_with_those_of_their_own_group(server: Server) -> None:
    server.behave = compared(longer)
    same(ask(server)(said("a", "xxxx", "bbb", "cc", "yy", group=[0, 1, 0, 0, 1])), [0, 1, 1, 0.5, 0])
    assert server.asked.total() == 3 * 2 + 2 and set(server.asked.values()) == {1}
    assert "number 0: [a] against [bbb]?" in server.asked and "number 0: [bbb] against [a]?" in server.asked


def test_preferences_that_go_in_a_circle_give_equal_rates(server: Server) -> None:
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
    server.behave = compared(lambda one, two: "first" if (one, two) in beats else "second")
    same(ask(server)(said("rock", "paper", "scissors")), [0.5, 0.5, 0.5])


def test_a_judge_that_likes_what_it_sees_first_has_no_preference_in_both_orders_and_one_in_one(server: Server) -> None:
    server.behave = compared(lambda one, two: "first")
    same(ask(server)(said("a", "b", "c")), [0.5, 0.5, 0.5])
    same(ask(server, both=False)(said("a", "b", "c")), [1, 0.5, 0])
    assert server.asked.total() == 6 + 3


@pytest.mark.parametrize("both", [True, False])
def test_the_reward_follows_a_permutation(server: Server, both: bool) -> None:
    server.behave = compared(lambda one, two: "first" if ord(one) % 3 >= ord(two) % 3 else "second")
    batch = said(*"qwertyu", group=[0, 1, 0, 1, 0, 1, 1])
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    rates = ask(server, both=both)(batch)
    assert isinstance(rates, Tensor) and len(rates.unique()) > 2
    same(ask(server, both=both)(batch.take(order)), rates[order].tolist())


def test_images_are_sent_both_in_the_order_of_the_pair_and_a_broken_one_is_not_compared(server: Server) -> None:
    server.behave = lambda question, before: reply("Winner: first")
    image = torch.stack([torch.full((3, 2, 2), level) for level in (0.0, 1.0, 0.5)])
    image[2, 0, 0, 0] = NAN
    reward = ask(server, "Which one shows {prompt}", attach="sample", both=False)
    batch = said("", "", "", image=image)
    same(reward(Samples(batch.batch, image=image)), [1, 0, NAN])
    [body] = server.bodies
    parts = body["messages"][-1]["content"]  # type: ignore[index]
    assert [part.get("text", part["type"]) for part in parts] == [
        "Which one shows number 0:", "First:", "image_url", "Second:", "image_url",
    ]  # fmt: skip
    assert parts[2]["image_url"] != parts[4]["image_url"]


def test_an_absent_answer_loses_unasked_and_two_of_them_tie(server: Server) -> None:
    server.behave = compared(longer)
    rates = ask(server, tag="answer", limit=5)(
        said("<answer>a</answer>", "none", "<answer>bb</answer>", "<answer>cccccc</answer>")
    )
    same(rates, [2 / 3, 1 / 6, 1, 1 / 6])
    assert server.asked.total() == 2
    same(ask(server, TEMPLATE + "{target}")(said("a", "b")), [NAN, NAN])
    assert server.asked.total() == 2


def test_a_comparison_that_fails_leaves_the_mean_and_is_counted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def behave(question: str, before: int) -> tuple[int, bytes]:
        if question == "number 0: [a] against [bb]?":
            return 401, b""
        return reply("I cannot say") if "[dddd] against" in question else compared(longer)(question, before)

    server.behave = behave
    same(ask(server, retries=1)(said("a", "bb", "ccc", "dddd")), [0, 0, 1, NAN])
    assert server.asked["number 0: [a] against [bb]?"] == 1  # a status that does not pass
    [line] = caplog.messages
    assert "4 of 12 comparisons have no score: no score in the reply (3), status 401 (1)" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{first}"}, "names no {second} and attach is not 'sample'"),
        ({"template": "{answer} {first} {second}"}, "expected the plain fields ['first', 'prompt', 'second', 'target']"),
        ({"request": {"model": "x"}}, "request sets ['model']"),
        ({"timeout": 0.0}, "timeout is 0.0 s"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_with_its_name(
    server: Server, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        ask(server, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


# ---- in a run


def test_a_run_is_sound_with_it_and_its_rates_compare_the_group(recipe, server: Server, tmp_path: Path) -> None:
    server.behave = compared(lambda one, two: "first" if sorted(one) > sorted(two) else "second")
    table = {
        "build": "rewards.pairwise:win_rate",
        "url": server.url,
        "model": "referee",
        "template": "{prompt} [{first}] against [{second}]?",
        "pause": 0.0,
    }
    reward = ", ".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    report = examine(start(recipe(f"rewards=[{{name = 'wins', {reward}}}]")))
    assert report.ok, report.lines
    assert "ok   reward wins: scores follow their samples" in report.lines
    server.behave = compared(longer)
    heard = score({"wins": build(table, "rewards.wins")}, {"wins": 1.0}, said("a", "bbb", "cc"))
    torch.testing.assert_close(standardized(heard, eps=0.0).values, torch.tensor([-1.0, 1, 0]), rtol=0, atol=1e-6)

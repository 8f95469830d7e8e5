"""VIVA's sum by its worked example, and the questions to a judge about edits and videos over HTTP."""

import base64
import io
import json
import re
from functools import partial

import pytest
import torch
from PIL import Image
from test_rewards_judge import NAN, Server, reply, same, server  # noqa: F401 - a fixture
from torch import Tensor

from mmgrpo.advantages import standardize
from mmgrpo.components import build
from mmgrpo.types import Prompt, Reward, Samples
from rewards.chat import Endpoint, ask_all, endpoint_url
from rewards.compose import components
from rewards.judge import judge
from rewards.pictures import to_uint8
from rewards.video_edit import (
    captioned,
    edit_questions,
    instruction_following,
    video_questions,
    viva,
)
from tests.clips import clip_samples, clips

TO_EDITED, TO_SOURCE = torch.tensor([0.31, 0.34, 0.28]), torch.tensor([0.25, 0.22, 0.27])
LIKENESS, PREFERENCE = torch.tensor([0.90, 0.80, 0.95]), torch.tensor([0.21, 0.22, 0.20])


# ---- VIVA


def group(**columns: object) -> Samples:
    """Three samples of one prompt, told apart by their first pixel: 0.0, 0.1, 0.2."""
    video = torch.zeros(3, 4, 3, 2, 2)
    video[:, :, 0, 0, 0] = torch.tensor([0.0, 0.1, 0.2])[:, None]
    return clip_samples(video, video, (Prompt(0, "make it night", columns=columns),) * 3)


def tabled(values: dict[str, Tensor]) -> Reward:
    """An image reward that knows its scores by caption, and its samples by their first pixel."""

    def score(samples: Samples) -> Tensor:
        assert samples.image is not None
        rows = (samples.image[:, 0, 0, 0] * 10).round().long().tolist()
        found = [values[prompt.text][row] for prompt, row in zip(samples.prompts, rows, strict=True)]
        return torch.stack(found)

    return score


def worked(**options: object) -> Reward:
    alignment = tabled({"a cat at night": TO_EDITED, "a cat": TO_SOURCE})
    preference = tabled({"a cat at night": PREFERENCE})
    return viva(alignment=alignment, preference=preference, likeness=lambda samples: LIKENESS, **options)  # type: ignore[arg-type]


CAPTIONS = {"edited_caption": "a cat at night", "source_caption": "a cat"}


def parts(reward: Reward, samples: Samples) -> dict[str, Tensor]:
    found = components("viva", reward(samples), len(samples))
    assert list(found) == ["viva/instruction", "viva/source", "viva/preference"]
    return {name.removeprefix("viva/"): value for name, value in found.items()}


def test_the_worked_example_of_viva():
    found = parts(worked(), group(**CAPTIONS))
    torch.testing.assert_close(found["instruction"], torch.tensor([0.06, 0.12, 0.01]))
    total = torch.stack(list(found.values())).sum(0)
    torch.testing.assert_close(total, torch.tensor([1.17, 1.14, 1.16]))
    advantages = standardize(total, torch.zeros(3, dtype=torch.int64), ddof=0, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.069045, -1.336306, 0.267261]), rtol=1e-4, atol=1e-5)


def test_terms_of_the_source_alone_change_no_advantage_and_swapped_captions_the_sign():
    together = (TO_EDITED - 0.18) + (0.30 - TO_SOURCE)  # with C(V_src, t_edit) = 0.18 and C(V_src, t_src) = 0.30
    following = instruction_following(TO_EDITED, TO_SOURCE)
    torch.testing.assert_close(following - following.mean(), together - together.mean())
    torch.testing.assert_close(instruction_following(TO_SOURCE, TO_EDITED), -following)


def test_weights_scale_the_three_terms():
    found, plain = (parts(worked(weights=weights), group(**CAPTIONS)) for weights in ((2.0, 0.5, 0.0), (1.0, 1.0, 1.0)))
    for (name, value), weight in zip(plain.items(), (2.0, 0.5, 0.0), strict=True):
        torch.testing.assert_close(found[name], weight * value)
    for weights in ((0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, NAN, 1.0)):
        with pytest.raises(ValueError, match="weights are .*; expected three from 0 on, one above"):
            worked(weights=weights)


def test_without_a_source_caption_the_edited_ones_likeness_counts_alone():
    found = parts(worked(), group(edited_caption="a cat at night"))
    torch.testing.assert_close(found["instruction"], TO_EDITED)
    mixed = group(**CAPTIONS)
    other = Prompt(1, "make it night", columns={"edited_caption": "a cat at night"})
    mixed = clip_samples(mixed.video, mixed.source_video, (mixed.prompts[0], other, mixed.prompts[0]))
    torch.testing.assert_close(parts(worked(), mixed)["instruction"], torch.tensor([0.06, 0.34, 0.01]))


def test_a_prompt_without_the_edited_caption_is_refused_and_columns_have_the_users_names():
    for columns in ({}, {"edited_caption": ""}, {"edited_caption": 3}):
        with pytest.raises(ValueError, match="prompt 0 has the edited_caption .*; expected a text"):
            worked()(group(**columns))
    found = parts(worked(edited="after", source="before"), group(after="a cat at night", before="a cat"))
    torch.testing.assert_close(found["instruction"], torch.tensor([0.06, 0.12, 0.01]))


def test_one_missing_term_leaves_the_sample_without_an_opinion():
    alignment = tabled({"a cat at night": TO_EDITED, "a cat": torch.tensor([0.25, NAN, 0.27])})
    gone = viva(
        alignment=tabled({"a cat at night": torch.tensor([NAN, 0.34, 0.28]), "a cat": TO_SOURCE}),
        preference=tabled({"a cat at night": PREFERENCE}),
        likeness=lambda samples: torch.tensor([0.90, 0.80, NAN]),
    )
    assert all(value.isnan().tolist() == [True, False, True] for value in parts(gone, group(**CAPTIONS)).values())
    unread = viva(alignment=alignment, preference=alignment, likeness=lambda samples: LIKENESS)
    assert parts(unread, group(**CAPTIONS))["source"].isnan().tolist() == [False, True, False]


def test_a_copy_of_the_source_wins_likeness_and_loses_to_an_edit_that_follows():
    """Brightness as C: "night" is dark. The first sample is the source itself, the second the edit that was asked for."""
    source = torch.full((2, 4, 3, 4, 4), 0.8)
    video = source.clone()
    video[1] = 0.1

    def fits(samples: Samples) -> Tensor:
        assert samples.image is not None
        dark = 1 - samples.image.flatten(1).mean(1)
        night = torch.tensor(["night" in prompt.text for prompt in samples.prompts])
        return torch.where(night, dark, 1 - dark)

    def likeness(samples: Samples) -> Tensor:
        assert samples.video is not None and samples.source_video is not None
        return 1 - (samples.video - samples.source_video).flatten(1).abs().mean(1)

    reward = viva(alignment=fits, likeness=likeness, preference=lambda samples: torch.zeros(len(samples)))
    samples = clip_samples(video, source, (Prompt(0, "make it night", columns=CAPTIONS),) * 2)
    found = parts(reward, samples)
    assert found["source"][0] == 1 and found["source"][0] > found["source"][1]
    total = torch.stack(list(found.values())).sum(0)
    assert total[1] > total[0]
    assert torch.stack([found["source"], found["preference"]]).sum(0).argmax() == 0  # without R_IF the copy wins


def test_an_image_reward_of_several_components_is_refused():
    several = lambda samples: {"a": TO_EDITED, "b": TO_EDITED}  # noqa: E731
    reward = viva(alignment=several, preference=several, likeness=lambda samples: LIKENESS)
    with pytest.raises(ValueError, match=r"has the components \['a', 'b'\]; expected one number a sample"):
        reward(group(**CAPTIONS))


def test_other_captions_leave_everything_else_as_it_is():
    samples = clip_samples(clips())
    found = captioned(samples, ["x", "y", "z"])
    assert [prompt.text for prompt in found.prompts] == ["x", "y", "z"]
    assert [prompt.id for prompt in found.prompts] == [0, 1, 2] and found.video is samples.video


# ---- the judge


def sent(body: dict[str, object]) -> list[str | Tensor]:
    """The texts and the pixels (H, W, 3) of a message."""
    messages = body["messages"]
    assert isinstance(messages, list)
    found: list[str | Tensor] = []
    for part in messages[-1]["content"]:
        if part["type"] == "text":
            found.append(part["text"])
            continue
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as picture:
            found.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3))
    return found


def about(server: Server, text: str) -> list[list[str | Tensor]]:  # noqa: F811
    return [message for message in map(sent, server.bodies) if text in str(message[0])]


def asking(server: Server, **options: object) -> Reward:  # noqa: F811
    chosen: dict[str, object] = {"pause": 0.0, "timeout": 20.0, **options}
    return judge(url=server.url, model="referee", **chosen)  # type: ignore[arg-type]


def test_an_edit_is_judged_in_three_parts_by_frames_of_both_clips(server: Server):  # noqa: F811
    scores = {"Has the edit done": "8", "Is everything that": "6", "look alone": "3"}
    server.behave = lambda question, before: reply(
        next(f"Well. Score: {score}" for text, score in scores.items() if text in question)
    )
    samples = clip_samples(clips(count=2), clips(seed=7, count=2))
    table = {
        "build": "rewards.judge:judge",
        "url": server.url,
        "model": "referee",
        "template": {"build": "rewards.video_edit:edit_questions"},
        "attach": "edit",
        "frames": 3,
    }
    found = build(table, "rewards.it")(samples)
    assert list(found) == list(edit_questions()) == ["instruction", "preservation", "aesthetics"]
    for name, value in (("instruction", 0.8), ("preservation", 0.6), ("aesthetics", 0.3)):
        same(found[name], [value, value])
    assert len(server.bodies) == 6
    for row, text in enumerate(("a red cat", "two blue dogs")):
        for question, head, *rest in about(server, f"The instruction was: {text}\n"):
            assert isinstance(question, str) and head == "The source video, 3 frames in their order:"
            assert rest[3] == "The edited video, 3 frames in their order:"
            assert samples.video is not None and samples.source_video is not None
            for pixels, clip in ((rest[:3], samples.source_video), (rest[4:], samples.video)):
                assert all(isinstance(one, Tensor) for one in pixels)
                assert torch.equal(torch.stack(pixels), to_uint8(clip[row, [0, 2, 4]]))  # type: ignore[arg-type]


def test_videos_are_judged_as_videoalign_does_with_its_constants(server: Server):  # noqa: F811
    server.behave = lambda question, before: reply("Score: 5.0" if "visual quality alone" in question else "Score: 2")
    standard = {"visual_quality": (3.6757, 2.2476), "motion_quality": (1.0, 2.0), "text_alignment": (2.0, 0.5)}
    reward = asking(server, template=video_questions(), attach="sample", frames=2, standard=standard)
    samples = clip_samples(clips(count=1))
    found = reward(samples)
    assert isinstance(found, dict) and list(found) == list(standard)
    same(found["visual_quality"], [0.589206])
    same(found["motion_quality"], [0.5])
    same(found["text_alignment"], [0.0])
    assert samples.video is not None
    for _, *pixels in map(sent, server.bodies):
        assert torch.equal(torch.stack(pixels), to_uint8(samples.video[0, [0, 4]]))  # type: ignore[arg-type]


def test_a_part_without_a_number_is_nan_alone_and_counted(server: Server, caplog: pytest.LogCaptureFixture):  # noqa: F811
    server.behave = lambda question, before: reply("no idea" if "Judge the motion" in question else "Score: 4")
    found = asking(server, template=video_questions(), attach="sample", retries=0)(clip_samples(clips(count=2)))
    assert isinstance(found, dict)
    same(found["visual_quality"], [0.4, 0.4])
    same(found["motion_quality"], [NAN, NAN])
    assert "2 of 6 questions have no score: no score in the reply (2)" in caplog.text


def test_each_sample_is_judged_by_its_own_frames(server: Server):  # noqa: F811
    """The judge's number is what it sees: which clip was sent."""
    levels = torch.tensor([0.2, 0.4, 0.8])
    video = levels[:, None, None, None, None].expand(3, 4, 3, 8, 8)

    def seen(question: str, before: int) -> tuple[int, bytes]:
        # the newest body is this thread's or another's: look for the one with this question
        (message,) = [message for message in map(sent, list(server.bodies)) if message[0] == question]
        return reply(f"Score: {float(message[1].float().mean()) / 25.5:.4f}")  # type: ignore[union-attr]

    server.behave = seen
    reward = asking(server, template="{prompt}?", attach="sample", frames=(1,))
    samples, order = clip_samples(video), torch.tensor([2, 0, 1])
    same(reward(samples), levels.tolist())
    server.bodies.clear()
    same(reward(samples.take(order)), levels[order].tolist())


def test_broken_pixels_are_nan_unasked(server: Server):  # noqa: F811
    server.behave = lambda question, before: reply("Score: 5")
    video, source = clips(), clips(seed=7)
    video[0, 1, 0, 0, 0], source[2, 0, 0, 0, 0] = torch.nan, torch.inf
    same(asking(server, template="{prompt}", attach="edit")(clip_samples(video, source)), [NAN, 0.5, NAN])
    same(asking(server, template="{prompt}", attach="sample")(clip_samples(video, source)), [NAN, 0.5, 0.5])
    assert server.asked.total() == 3


def test_an_edit_without_its_clips_is_refused_unasked(server: Server):  # noqa: F811
    reward = asking(server, template=edit_questions(), attach="edit")
    with pytest.raises(ValueError, match="the samples carry no source_video"):
        reward(clip_samples(clips()))
    with pytest.raises(ValueError, match="the samples carry no video"):
        reward(clip_samples(None, None, clip_samples(clips()).prompts))
    assert server.asked.total() == 0


def test_few_requests_are_in_memory_at_a_time(server: Server):  # noqa: F811
    """A request is written when it has a seat: none before the server has answered all but as many as there are seats."""
    written: list[int] = []

    def write(number: int) -> bytes:
        ahead.append(len(written) - server.asked.total())
        written.append(number)
        return json.dumps({"messages": [{"content": f"A: Score: {number % 10}"}]}).encode()

    ahead: list[int] = []
    endpoint = Endpoint(endpoint_url(server.url), {}, 20.0, attempts=1, concurrency=2, pause=0.0)
    replies = ask_all(endpoint, [partial(write, number) for number in range(12)], lambda text: float(text[-1]))
    assert [reply.score for reply in replies] == [float(number % 10) for number in range(12)]
    assert sorted(written) == list(range(12)) and max(ahead) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standard": {"a": (0.0, 1.0)}}, r"standard is {'a': \[0.0, 1.0\]}; expected a mean and a deviation"),
        ({"standard": {"a": (0.0, 1.0), "b": (0.0, 0.0)}}, "expected a mean and a deviation above 0 for each"),
        ({"template": {}}, "template is empty"),
        ({"attach": "none"}, "attach is not 'sample' or 'edit'"),
    ],
)
def test_options_that_cannot_be_are_refused(server: Server, options: dict[str, object], message: str):  # noqa: F811
    chosen = {"template": {"a": "{prompt}", "b": "{prompt}"}, "attach": "sample", **options}
    with pytest.raises(ValueError, match=message):
        asking(server, **chosen)


def test_a_worst_answer_is_standardised_too(server: Server):  # noqa: F811
    samples = clip_samples(clips(count=1))
    told = Samples(samples.batch, text=("nothing in tags",))
    reward = asking(server, template={"a": "{answer}"}, tag="answer", standard={"a": (4.0, 2.0)}, scale=(1.0, 5.0))
    found = reward(told)
    assert isinstance(found, dict)
    same(found["a"], [(1.0 - 4.0) / 2.0])


def test_every_question_of_ours_asks_for_a_number_from_0_to_10():
    for text in (*edit_questions().values(), *video_questions().values()):
        assert re.findall(r"{\w+}", text) == ["{prompt}"] and "0 (worst) to 10 (best)" in text

"""A model that writes texts and images as tokens: its answers, their replay, what it is taught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_interleaved import COLUMNS, EMU, LENGTH, ROWS, STEPS, tiny
from tiny_vlms import saved
from tiny_vlms.emu3 import CODES
from tiny_vlms.policy import batch_of, picture
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples, Trajectory
from pipelines import replays
from pipelines.answers import Options
from pipelines.composed import Span, spans
from pipelines.interleaved import InterleavedPolicy, Teaching, load
from pipelines.sampling import Sampling
from pipelines.vocabularies import CODE, FORCED, TEXT, TEXT_ALONE


def evaluations(policy: InterleavedPolicy, trajectory: Trajectory) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(chunk) -> None:
        for name, value in chunk.evaluation.tensors().items():
            whole = found.setdefault(name, torch.zeros(trajectory.mask.shape))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value.detach().float()

    policy.replay(trajectory, keep)
    return found


def log_probs(policy: InterleavedPolicy, trajectory: Trajectory) -> Tensor:
    zero = {**trajectory.record, "anchor": torch.zeros(trajectory.mask.shape)}
    return evaluations(policy, replace(trajectory, record=zero))["log_ratio"]


def images_of(samples: Samples) -> list[Tensor]:
    return [part for row in samples.interleaved for part in row if isinstance(part, Tensor)]


@pytest.mark.parametrize(
    ("scale", "dtype", "autocast"),
    [
        (1.0, torch.float32, None),
        (3.0, torch.float32, None),
        (3.0, torch.bfloat16, None),
        (3.0, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_replays_on_policy_are_exact_at_any_batch_size_and_follow_the_weights(scale, dtype, autocast, tmp_path):
    policy, prompts = tiny(tmp_path, scale=scale, dtype=dtype, options=Options(autocast=autocast))
    found = policy.self_test(prompts)
    assert all(finding.ok for finding in found), found
    trajectory, samples = policy.rollout(batch_of(prompts[:2], 2))
    assert images_of(samples)
    for budget in (8192, 1):
        policy.answers.options = Options(replay_tokens=budget, autocast=autocast)
        assert evaluations(policy, trajectory)["log_ratio"].abs().max() == 0  # compared with its own value
        parts = [torch.arange(1), torch.arange(1, len(trajectory))]
        anchored = policy.anchor(trajectory, parts)
        for rows in parts:
            assert evaluations(policy, anchored.take(rows))["log_ratio"].abs().max() == 0
    gap = evaluations(policy, anchored)["sampler_gap"].abs()
    assert gap.max() < (5e-5 if dtype == torch.float32 and autocast is None else 0.2)
    with torch.no_grad():
        next(iter(policy.trainable().values())).mul_(1.1)
    assert evaluations(policy, anchored.take(parts[1]))["log_ratio"].abs().max() > 1e-4


def whole_logits(policy: InterleavedPolicy, prompt: Prompt, token: Tensor) -> Tensor:
    """The library's logits for each of the tokens after the prompt, nothing cached or padded; (T, V)."""
    read = dict(policy.answers.reader.read(prompt).inputs)
    ids = torch.cat([read.pop("input_ids"), token[None]], dim=1)
    read.pop("attention_mask")
    return policy.answers.model(input_ids=ids, use_cache=False, **read).logits[0, -len(token) - 1 : -1].float()


def allowed_at(policy: InterleavedPolicy, kind: int) -> Tensor:
    """The ids that may stand at a place, by their names."""
    tokenizer = policy.answers.reader.tokenizer
    codes = tokenizer.convert_tokens_to_ids(list(CODES))
    words = [number for number in range(len(tokenizer)) if len(tokenizer.convert_ids_to_tokens(number)) == 1]
    words.append(tokenizer.eos_token_id)
    return torch.tensor({CODE: codes, TEXT: [*words, tokenizer.boi_token_id], TEXT_ALONE: words}[kind])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_log_probs_are_those_of_the_library_among_the_tokens_that_a_place_allows(scale, tmp_path):
    policy, prompts = tiny(tmp_path, scale=scale, code=Sampling(STEPS, temperature=0.7))
    trajectory, _ = policy.rollout(batch_of(prompts, 2))
    ours = log_probs(policy, trajectory)
    begin = policy.pictures.layout.begin
    for row, prompt in enumerate(trajectory.batch.prompts):
        token = trajectory.record["token"][row, : int(trajectory.record["length"][row])]
        plain = whole_logits(policy, prompt, token)
        for place, kind in enumerate(trajectory.record["vocabulary"][row, : len(token)].tolist()):
            if kind == FORCED:
                assert ours[row, place] == 0 and not trajectory.mask[row, place]
                continue
            logits = plain[place]
            if kind == CODE and scale != 1:
                start = int((token[: place + 1] == begin).nonzero()[-1])
                without = whole_logits(policy, Prompt(-1, "low quality"), token[start : place + 1])[-1]
                logits = without + scale * (logits - without)
            allowed = allowed_at(policy, kind)
            scaled = logits[allowed] / (0.7 if kind == CODE else 1.3)
            expected = scaled.log_softmax(0)[(allowed == token[place]).nonzero()]
            torch.testing.assert_close(ours[row, place], expected.detach().squeeze(), rtol=1e-4, atol=5e-5)


def test_an_answer_holds_whole_images_of_its_size_and_no_more_than_asked_for(tmp_path):
    policy, prompts = tiny(tmp_path, images=1)
    trajectory, samples = policy.rollout(batch_of(prompts, 8))
    layout, kinds = policy.pictures.layout, trajectory.record["vocabulary"]
    begun = (trajectory.record["token"] == layout.begin) & trajectory.mask
    assert begun.sum(1).max() == 1 and len(images_of(samples)) == int(begun.sum()) > 4
    for row, place in begun.nonzero().tolist():
        image = trajectory.record["token"][row, place : place + LENGTH]
        written = policy.answers.reader.tokenizer.convert_ids_to_tokens(image.tolist())
        assert written[:5] == ["<|image start|>", "2", "*", "3", "<|image token|>"]
        assert [written[8], written[12], *written[13:]] == ["<|extra_200|>"] * 2 + ["<|extra_201|>", "<|image end|>"]
        codes = [*written[5:8], *written[9:12]]
        assert all(code in CODES for code in codes)
        assert kinds[row, place : place + LENGTH].tolist() == [1, 0, 0, 0, 0, 3, 3, 3, 0, 3, 3, 3, 0, 0, 0]
        pixels = next(part for part in samples.interleaved[row] if isinstance(part, Tensor))
        assert pixels.shape == (3, 16, 24) and 0 <= pixels.min() and pixels.max() <= 1
        numbers = torch.tensor([[CODES.index(code) for code in codes]]).view(1, ROWS, COLUMNS)
        drawn = policy.answers.model.model.vqmodel.decode(numbers)
        shown = policy.words.processor.image_processor.postprocess([drawn[0].detach().numpy()])["pixel_values"][0]
        difference = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255 - pixels
        assert difference.abs().max() <= 1.01 / 255


def test_an_answer_does_not_depend_on_the_batch_it_is_written_in(tmp_path):
    policy, prompts = tiny(tmp_path, scale=2.0)
    batch = batch_of(prompts[:2], 2)
    together, _ = policy.rollout(batch)
    policy.answers.options = Options(rollout_tokens=1)
    alone, _ = policy.rollout(batch)
    assert torch.equal(alone.record["token"], together.record["token"])
    other, _ = policy.rollout(replace(batch, seed=1))
    assert not torch.equal(other.record["token"], together.record["token"])


def test_truncated_images_are_replayed_among_the_codes_that_were_kept(tmp_path):
    policy, prompts = tiny(tmp_path, code=Sampling(STEPS, top_k=3), scale=2.0)
    trajectory, _ = policy.rollout(batch_of(prompts))
    found = evaluations(policy, trajectory)
    codes = trajectory.record["vocabulary"] == CODE
    assert found["entropy"][codes].max() <= torch.tensor(3.0).log() + 1e-5
    assert found["entropy"][trajectory.record["vocabulary"] == TEXT].max() > 2
    assert found["sampler_gap"].abs().max() < 5e-5


def test_guidance_changes_images_and_its_gradient_passes_through_both_readings(tmp_path):
    policy, prompts = tiny(tmp_path, scale=3.0)
    trajectory, _ = policy.rollout(batch_of(prompts[:2], 2))
    codes = trajectory.record["vocabulary"] == CODE
    guided, slope = log_probs(policy, trajectory), replays.gradient(policy, trajectory)
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    assert replays.straight(policy, anchored, slope, torch.float32).ok
    policy.answers.grammar = replace(policy.answers.grammar, guidance=1.0)
    plain = log_probs(policy, trajectory)
    torch.testing.assert_close(guided[~codes], plain[~codes], rtol=1e-4, atol=5e-5)
    assert (guided - plain)[codes].abs().max() > 0.1


def test_gradient_checkpointing_changes_no_bit_of_a_guided_replay(tmp_path):
    policy, prompts = tiny(tmp_path, scale=2.0)
    trajectory, _ = policy.rollout(batch_of(prompts[:1], 2))
    plain = replays.gradient(policy, trajectory)
    policy.answers.options = Options(gradient_checkpointing=True)
    checkpointed = replays.gradient(policy, trajectory)
    assert checkpointed.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in checkpointed.items())


def test_parts_end_with_their_last_choice(tmp_path):
    policy, _ = tiny(tmp_path)
    layout, tokenizer = policy.pictures.layout, policy.answers.reader.tokenizer
    image = layout.filled(layout.codes[:6].unsqueeze(0))[0].tolist()
    words, end = tokenizer("ab", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    blank = tokenizer(" ", add_special_tokens=False)["input_ids"]

    def ends(token: list[int]) -> list[tuple[str | None, int]]:
        return [(part.text, part.end) for part in spans(token, layout, tokenizer)]

    assert ends([*words, *image, end]) == [("ab", 1), (None, 17)]  # the end belongs to the last part
    assert ends([*words, *image, *words]) == [("ab", 1), (None, 13), ("ab", 18)]
    assert ends([*image, *blank, *image]) == [(None, 11), (None, 27)]  # nothing behind the last code was chosen
    assert ends([end]) == [("", 0)]
    assert layout.last == 11 and len(image) == LENGTH
    assert spans([*image, end], layout, tokenizer) == [Span(0, 15, None)]


def answers_file(folder: Path) -> list[Prompt]:
    picture(folder / "a.png", 20, 20, 5), picture(folder / "b.png", 30, 10, 6)
    rows = [
        [{"text": "first"}, {"image": "a.png"}, {"text": "second"}, {"image": "b.png"}],
        [{"image": "b.png"}],
        [{"text": "only words"}],
    ]
    return [Prompt(number, f"prompt {number}", target=answer) for number, answer in enumerate(rows)]


def taught(policy: InterleavedPolicy, batch: Batch) -> Tensor:
    losses = torch.full((len(batch),), torch.nan)
    with torch.no_grad():
        policy.teach(batch, lambda rows, values: losses.index_copy_(0, rows, values))
    return losses


def test_a_lesson_is_the_mean_surprise_of_an_answers_tokens(tmp_path):
    policy, _ = tiny(tmp_path)
    prompts = answers_file(tmp_path)
    policy.prepare(prompts)
    batch = batch_of(prompts, 1)
    layout, tokenizer = policy.pictures.layout, policy.answers.reader.tokenizer
    found = taught(policy, batch)
    weighted = InterleavedPolicy(policy.words, policy.pictures, Teaching(tmp_path, text=1.0, image=0.25))
    for row, prompt in enumerate(prompts):
        pieces, weights = [], []
        for part in prompt.target:
            if "text" in part:
                pieces += tokenizer(part["text"], add_special_tokens=False)["input_ids"]
            else:
                pieces += layout.filled(policy.pictures.read(tmp_path / part["image"]).unsqueeze(0))[0].tolist()
            weights += [1.0 if "text" in part else 0.25] * (len(pieces) - len(weights))
        token, weight = torch.tensor([*pieces, tokenizer.eos_token_id]), torch.tensor([*weights, 1.0])
        logits = whole_logits(policy, prompt, token).index_fill(1, policy.answers.never, -1e30)
        surprise = -logits.log_softmax(1).gather(1, token[:, None]).squeeze(1).detach()
        torch.testing.assert_close(found[row], surprise.mean(), rtol=1e-5, atol=1e-5)
        expected = (weight * surprise).sum() / weight.sum()
        torch.testing.assert_close(taught(weighted, batch)[row], expected, rtol=1e-5, atol=1e-5)
    unasked = InterleavedPolicy(policy.words, policy.pictures, Teaching(tmp_path, unasked=1.0))
    image = layout.filled(policy.pictures.read(tmp_path / "b.png").unsqueeze(0))[0]
    token = torch.cat([image, torch.tensor([tokenizer.eos_token_id])])
    logits = whole_logits(policy, policy.answers.negative, token).index_fill(1, policy.answers.never, -1e30)
    expected = -logits.log_softmax(1).gather(1, token[:, None]).mean().detach()
    alone = taught(unasked, batch_of(prompts, 1))
    torch.testing.assert_close(alone[1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[2], found[2], rtol=1e-5, atol=1e-5)


def test_codes_of_an_image_are_those_that_the_model_reads_in_a_prompt(tmp_path):
    policy, _ = tiny(tmp_path)
    path = picture(tmp_path / "fits.png", 8 * ROWS, 8 * COLUMNS, 7)
    prompt = Prompt(0, "look", {"image": (path,)})
    found = policy.words.processor(text=["<image>"], images=[[Image.open(path)]], return_tensors="pt", do_resize=False)
    read = policy.answers.model.model.get_image_tokens(found["pixel_values"], found["image_sizes"])
    ours = policy.pictures.layout.filled(policy.pictures.read(path).unsqueeze(0))[0]
    assert ours[5:-2].tolist() == read.tolist()
    marks = found["input_ids"][0].tolist()
    assert marks[1:6] == ours[:5].tolist() and marks[-2:] == ours[-2:].tolist()
    assert policy.answers.reader.read(prompt).length > LENGTH


def test_lessons_lower_their_loss_and_leave_the_tokenizer_of_images_alone(tmp_path):
    policy, _ = tiny(tmp_path)
    prompts = answers_file(tmp_path)
    batch = batch_of(prompts, 1)
    before = taught(policy, batch)
    codebook = {name: value.clone() for name, value in policy.answers.model.model.vqmodel.named_parameters()}
    optimizer = torch.optim.Adam(policy.trainable().values(), 1e-2)
    for _ in range(10):
        policy.teach(batch, lambda rows, values: values.sum().backward())
        optimizer.step()
        optimizer.zero_grad()
    after = taught(policy, batch)
    assert (after < 0.5 * before).all(), (before, after)
    for name, value in policy.answers.model.model.vqmodel.named_parameters():
        assert torch.equal(value, codebook[name])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("words", "prompt 0 has the target 'words'; expected a list of"),
        ([{"image": "a.png", "text": "x"}], "prompt 0 has the part .* in its target"),
        (
            [{"text": "x"}, {"image": "missing.png"}],
            "images of answers that cannot be used: 1\n.*missing.png of prompt 0",
        ),
    ],
)
def test_an_answer_that_cannot_be_taught_is_named(target, message, tmp_path):
    policy, _ = tiny(tmp_path)
    answers_file(tmp_path)
    prompts = [Prompt(0, "x", target=target)]
    with pytest.raises(ValueError, match=message):
        policy.prepare(prompts)
        policy.teach(batch_of(prompts, 1), lambda rows, values: None)


def test_a_policy_is_built_from_a_folder_trained_by_its_parts_and_saved(tmp_path):
    folder = saved(EMU, tmp_path / "model")
    options = {"height": 16, "width": 24, "images": 2, "guidance": 2.0, "dtype": "float32", "device": "cpu"}
    policy = load(model=str(folder), max_new_tokens=STEPS, image_top_k=5, teaching=Teaching(tmp_path), **options)
    prompts = answers_file(tmp_path)
    policy.prepare(prompts)
    trajectory, samples = policy.rollout(batch_of(prompts, 2))
    assert len(samples.interleaved) == 6 and samples.part_end.shape[0] == 6
    assert len(policy.generate(batch_of(prompts, 1)).interleaved) == 3
    policy.save(tmp_path / "trained")
    again = load(
        model=str(tmp_path / "trained"), max_new_tokens=STEPS, image_top_k=5, teaching=Teaching(tmp_path), **options
    )
    again.prepare(prompts)
    assert torch.equal(log_probs(again, trajectory), log_probs(policy, trajectory))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 20}, "policy.height and policy.width are 20 and 24; expected multiples of 8"),
        ({"max_new_tokens": 10}, "policy.max_new_tokens is 10; expected at least 16, an image and an end"),
        ({"guidance": 0.0}, "policy.guidance is 0.0"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, message, tmp_path):
    folder = saved(EMU, tmp_path / "model")
    plain = {"height": 16, "width": 24, "max_new_tokens": STEPS, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        load(model=str(folder), **plain | options)


def test_a_model_that_writes_no_images_is_refused(tmp_path):
    folder = saved("Qwen2_5_VLForConditionalGeneration", tmp_path / "model")
    with pytest.raises(ValueError, match="policy.model is a Qwen2_5_VLForConditionalGeneration; expected a model that"):
        load(model=str(folder), max_new_tokens=STEPS, height=16, width=24, device="cpu")

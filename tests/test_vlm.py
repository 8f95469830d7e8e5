"""Language models as policies: one table of properties over tiny random models of every family."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_vlms import NAMED, REQUIRED, TINY_VLMS, saved
from tiny_vlms.policy import batch_of, policy_of, prompts_of
from torch import Tensor

from mmgrpo.objectives import clipped
from mmgrpo.shadow import Reference
from mmgrpo.types import Chunk, Evaluation, Prompt, Trajectory
from pipelines import replays
from pipelines.answers import Options
from pipelines.conversation import Reading
from pipelines.sampling import Sampling
from pipelines.vlm import LanguagePolicy, load

every = pytest.mark.parametrize("name", [row.name for row in TINY_VLMS])
required = pytest.mark.parametrize("name", [row.name for row in REQUIRED])
SEES, READS = "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM"
pytestmark = pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch")


def evaluations(
    policy: LanguagePolicy, trajectory: Trajectory, reference: Reference | None = None
) -> dict[str, Tensor]:
    """Every field of a replay, (B, S), 0 where nothing was evaluated."""
    found: dict[str, Tensor] = {}

    def keep(chunk: Chunk) -> None:
        for name, value in chunk.evaluation.tensors().items():
            whole = found.setdefault(name, torch.zeros(trajectory.mask.shape))
            whole[chunk.rows.unsqueeze(1), chunk.steps] = value.detach()

    policy.replay(trajectory, keep, reference)
    return found


def log_probs(policy: LanguagePolicy, trajectory: Trajectory) -> Tensor:
    """Of every token, from a comparison with 0; (B, S)."""
    zero = {**trajectory.record, "anchor": torch.zeros(trajectory.mask.shape)}
    return evaluations(policy, replace(trajectory, record=zero))["log_ratio"]


def gradients(policy: LanguagePolicy, trajectory: Trajectory) -> dict[str, Tensor]:
    return replays.gradient(policy, trajectory)


def by_the_library(policy: LanguagePolicy, prompt: Prompt, token: Tensor) -> Tensor:
    """The log-probs of one answer from the model's own forward on the whole sequence, nothing padded; (T,)."""
    read = policy.answers.reader.read(prompt).inputs
    inputs = {name: value for name, value in read.items() if name != "input_ids"}
    for _ in token:
        inputs = policy.model._update_model_kwargs_for_generation({}, inputs)
    ids = torch.cat([read["input_ids"], token[None]], dim=1)
    logits = policy.model(input_ids=ids, use_cache=False, **inputs).logits[0, -len(token) - 1 : -1]
    scaled = logits.index_fill(1, policy.answers.never, -1e30) / policy.answers.sampling.temperature
    return scaled.log_softmax(1).gather(1, token[:, None]).squeeze(1)


@every
def test_a_policy_passes_its_self_test_and_shares_prompts_where_its_memory_can_be_repeated(name, tmp_path):
    policy = policy_of(name)
    prompts = prompts_of(NAMED[name], tmp_path)
    policy.prepare(prompts)
    assert policy.answers.shared is NAMED[name].repeats, policy.notes
    found = policy.self_test(prompts)
    assert all(finding.ok for finding in found), found
    assert ("read once for all" in found[1].detail) is NAMED[name].repeats


@every
def test_log_probs_equal_those_of_the_model_on_whole_sequences(name, tmp_path):
    policy = policy_of(name, sampling=Sampling(8, temperature=0.7))
    prompts = prompts_of(NAMED[name], tmp_path)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts, 2))
    ours = log_probs(policy, trajectory)
    for row, prompt in enumerate(trajectory.batch.prompts):
        length = int(trajectory.record["length"][row])
        expected = by_the_library(policy, prompt, trajectory.record["token"][row, :length])
        torch.testing.assert_close(ours[row, :length], expected.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        ours[trajectory.mask], trajectory.record["log_prob"][trajectory.mask], rtol=1e-4, atol=1e-4
    )


@required
def test_the_gradient_equals_that_of_the_plain_way(name, tmp_path):
    policy = policy_of(name)
    prompts = prompts_of(NAMED[name], tmp_path)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    ours = gradients(policy, trajectory)
    policy.answers.shared = False
    plain = gradients(policy, trajectory)
    size = torch.stack([value.norm() for value in plain.values()]).norm()
    assert ours.keys() == plain.keys() and size > 0
    assert torch.stack([(ours[key] - plain[key]).norm() for key in plain]).norm() <= 1e-5 * size


@required
def test_padding_and_batch_shape_change_nothing(name, tmp_path):
    policy = policy_of(name)
    prompts = prompts_of(NAMED[name], tmp_path)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    together = log_probs(policy, trajectory)
    policy.answers.options = Options(replay_tokens=1)  # every answer alone
    assert len(policy.answers.batches(trajectory)) == len(trajectory)
    torch.testing.assert_close(log_probs(policy, trajectory), together, rtol=1e-5, atol=2e-5)
    order = torch.randperm(len(trajectory), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_probs(policy, trajectory.take(order)), together[order], rtol=1e-5, atol=2e-5)


@required
def test_an_answer_does_not_depend_on_the_batch_it_is_written_in(name, tmp_path):
    prompts = prompts_of(NAMED[name], tmp_path)
    policy = policy_of(name)
    policy.prepare(prompts)
    batch = batch_of(prompts)
    trajectory, _ = policy.rollout(batch)
    policy.answers.options = Options(rollout_tokens=1)
    alone, _ = policy.rollout(batch)
    assert torch.equal(alone.record["token"], trajectory.record["token"])
    other, _ = policy.rollout(replace(batch, seed=1))
    assert not torch.equal(other.record["token"], trajectory.record["token"])
    assert len({tuple(row) for row in trajectory.record["token"][:3].tolist()}) == 3  # members of a group are distinct


@required
def test_greedy_answers_are_those_of_the_library(name, tmp_path):
    prompts = prompts_of(NAMED[name], tmp_path)
    policy = policy_of(name, sampling=Sampling(12))
    policy.prepare(prompts)
    answers = policy.generate(batch_of(prompts, 1))
    for prompt, text, length in zip(prompts, answers.text, answers.length, strict=True):
        inputs = policy.answers.reader.read(prompt).inputs
        banned = [[mark] for mark in policy.answers.never.tolist()] or None
        plain = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "bad_words_ids": banned}
        ids = policy.model.generate(**inputs, **plain)[0, inputs["input_ids"].shape[1] :]
        assert len(ids) == length
        assert policy.answers.reader.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_an_anchor_makes_the_log_ratio_exactly_zero_until_the_weights_change(tmp_path):
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    parts = [torch.tensor([0, 1, 2, 6, 7, 8]), torch.tensor([3, 4, 5, 9, 10, 11])]
    anchored = policy.anchor(trajectory, parts)
    for rows in parts:
        assert evaluations(policy, anchored.take(rows))["log_ratio"].abs().max() == 0
    with torch.no_grad():
        next(iter(policy.trainable().values())).mul_(1.1)
    for rows in parts:
        assert evaluations(policy, anchored.take(rows))["log_ratio"].abs().max() > 1e-4
    assert evaluations(policy, trajectory)["log_ratio"].abs().max() == 0  # compared with itself


def test_the_first_update_needs_no_anchor_to_have_the_gradient_of_the_policy(tmp_path):
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    for key, value in gradients(policy, trajectory).items():
        torch.testing.assert_close(value, gradients(policy, anchored)[key])


def test_masks_end_with_the_end_token_and_cut_answers_may_be_left_out(tmp_path):
    prompts = prompts_of(NAMED[READS], tmp_path)
    policy = policy_of(READS, sampling=Sampling(40, temperature=3.0))
    policy.prepare(prompts)
    trajectory, samples = policy.rollout(batch_of(prompts, 16))
    ended = torch.isin(trajectory.record["token"], policy.answers.end.tokens) & trajectory.mask
    assert samples.finished.any() and not samples.finished.all()
    assert torch.equal(ended.sum(1).bool(), samples.finished)
    assert torch.equal(trajectory.mask.sum(1), samples.length)
    last = trajectory.record["token"].gather(1, samples.length[:, None] - 1).squeeze(1)
    assert torch.isin(last[samples.finished], policy.answers.end.tokens).all()
    assert (samples.length[~samples.finished] == 40).all()
    assert (trajectory.record["token"][~trajectory.mask] == 0).all()
    policy.drop_truncated = True
    filtered, _ = policy.rollout(batch_of(prompts, 16))
    assert torch.equal(filtered.mask.any(1), samples.finished)


def test_what_stands_behind_an_answers_end_is_without_influence(tmp_path):
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    short = trajectory.record["length"].clone()
    short[::2] = 3
    mask = torch.arange(8) < short[:, None]
    cut = Trajectory(trajectory.batch, mask, trajectory.kind, {**trajectory.record, "length": short})
    garbage = torch.where(mask, trajectory.record["token"], 5)
    other = replace(cut, record={**cut.record, "token": garbage})
    assert torch.equal(log_probs(policy, cut), log_probs(policy, other))
    for key, value in gradients(policy, cut).items():
        torch.testing.assert_close(value, gradients(policy, other)[key])


@pytest.mark.parametrize(
    "options", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}], ids=str
)
def test_log_probs_are_of_the_truncated_distribution(options, tmp_path):
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES, sampling=Sampling(6, temperature=1.5, **options))
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    whole = log_probs(
        policy, replace(trajectory, record={k: v for k, v in trajectory.record.items() if k != "support"})
    )
    ours, mask = log_probs(policy, trajectory), trajectory.mask
    torch.testing.assert_close(ours[mask], trajectory.record["log_prob"][mask], rtol=1e-4, atol=1e-4)
    assert (ours[mask] >= whole[mask] - 1e-5).all() and (ours[mask] > whole[mask] + 1e-3).any()
    again = evaluations(policy, policy.anchor(trajectory, [torch.arange(len(trajectory))]))
    assert again["log_ratio"].abs().max() == 0
    assert again["entropy"].max() < torch.tensor(float(policy.answers.head.weight.shape[0])).log()


def test_an_answer_ends_with_its_stop_string(tmp_path):
    prompts = prompts_of(NAMED[READS], tmp_path)
    free = policy_of(READS, sampling=Sampling(30))
    free.prepare(prompts)
    unstopped = free.rollout(batch_of(prompts, 4))[1]
    pair = next(found for text in unstopped.text if (found := re.search("[ -~]{2}", text[1:])))  # two plain letters
    mark = pair.group()
    policy = policy_of(READS, sampling=Sampling(30, stop=(mark,)))
    policy.prepare(prompts)
    stopped = policy.rollout(batch_of(prompts, 4))[1]
    assert any(mark in text for text in stopped.text)
    for text, whole, finished in zip(stopped.text, unstopped.text, stopped.finished.tolist(), strict=True):
        assert finished or mark not in text
        assert text == (whole[: whole.index(mark) + len(mark)] if mark in whole else whole)


@pytest.mark.parametrize("name", [SEES, "Gemma3ForConditionalGeneration"])
def test_gradient_checkpointing_changes_no_bit(name, tmp_path):
    prompts = prompts_of(NAMED[name], tmp_path)
    policy = policy_of(name)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    plain = gradients(policy, trajectory)
    policy.answers.options = Options(gradient_checkpointing=True)
    checkpointed = gradients(policy, trajectory)
    assert all(torch.equal(value, plain[key]) for key, value in checkpointed.items()) and len(plain) == len(
        checkpointed
    )


def test_gradient_checkpointing_keeps_less_for_backward(tmp_path):
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES, sampling=Sampling(2))
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts[:1]))

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            policy.answers.read(trajectory)
        weights = {value.untyped_storage().data_ptr() for value in policy.trainable().values()}
        return sum(size for place, size in sizes.items() if place not in weights)

    plain = kept()
    policy.answers.options = Options(gradient_checkpointing=True)
    assert kept() < 0.5 * plain


def test_dropout_is_off_in_rollouts_and_replays(tmp_path):
    prompts = prompts_of(NAMED[READS], tmp_path)
    policy = policy_of(READS)
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy.model.config.attention_dropout = 0.5
    policy.model.train()
    policy.prepare(prompts)
    assert all(finding.ok for finding in policy.self_test(prompts))
    assert not any(module.training for module in policy.model.modules())


def test_the_picture_encoder_is_frozen_unless_asked_for(tmp_path):
    frozen, whole = policy_of(SEES, vision=False), policy_of(SEES)
    for policy in (frozen, whole):
        policy.prepare(prompts_of(NAMED[SEES], tmp_path))
    assert not any("visual" in name for name in frozen.trainable())
    assert any("visual" in name for name in whole.trainable())
    assert "visual is frozen" in frozen.notes[0]


def test_adapters_leave_the_picture_encoder_alone_and_can_be_switched_off(tmp_path):
    prompts = prompts_of(NAMED["SmolVLMForConditionalGeneration"], tmp_path)
    policy = policy_of("SmolVLMForConditionalGeneration", vision=False, lora={"rank": 4})
    policy.prepare(prompts)
    names = list(policy.trainable())
    assert names and all("lora_" in name and "vision" not in name for name in names)
    trajectory, _ = policy.rollout(batch_of(prompts))
    with torch.no_grad():
        for name, value in policy.trainable().items():
            value.add_(0.1 if "lora_B" in name else 0)
    reference = Reference("adapters_off", policy.trainable(), adapters_off=policy.adapters_off)
    distance = evaluations(policy, trajectory, reference)["to_reference"]
    with policy.adapters_off():
        bare = log_probs(policy, trajectory)
    torch.testing.assert_close(distance, torch.where(trajectory.mask, log_probs(policy, trajectory) - bare, 0))
    assert distance.abs().max() > 1e-3


def test_saved_weights_are_those_that_the_library_loads(tmp_path):
    folder = saved(SEES, tmp_path / "model")
    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = load(model=str(folder), max_new_tokens=6, dtype="float32", device="cpu")
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    with torch.no_grad():
        for value in policy.trainable().values():
            value.mul_(1.01)
    policy.save(tmp_path / "trained")
    again = load(model=str(tmp_path / "trained"), max_new_tokens=6, dtype="float32", device="cpu")
    again.prepare(prompts)
    assert torch.equal(log_probs(again, trajectory), log_probs(policy, trajectory))


def test_bfloat16_replays_are_exact_and_the_samplers_rounding_is_told(tmp_path):
    folder = saved(SEES, tmp_path / "model")
    prompts = prompts_of(NAMED[SEES], tmp_path)
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "autocast": "bfloat16"}):
        policy = load(model=str(folder), max_new_tokens=6, device="cpu", vision=True, **options)
        policy.prepare(prompts)
        found = policy.self_test(prompts)
        assert all(finding.ok for finding in found), found
        trajectory, _ = policy.rollout(batch_of(prompts))
        anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
        result = evaluations(policy, anchored)
        assert result["log_ratio"].abs().max() == 0
        assert 1e-5 < result["sampler_gap"].abs().mean() < 0.1
        assert (result["sampler_gap"][~trajectory.mask] == 0).all()


def test_rows_without_advantage_change_neither_the_loss_nor_its_gradient(tmp_path):
    from mmgrpo.aggregations import seq_mean
    from mmgrpo.improve import Given, Loss, accumulate

    prompts = prompts_of(NAMED[SEES], tmp_path)
    policy = policy_of(SEES)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    advantages = torch.zeros(trajectory.mask.shape)
    rows = torch.tensor([1, 4, 5])
    advantages[rows] = torch.tensor([[1.0], [-1.0], [0.5]])
    weights = seq_mean(trajectory.mask)
    found = []
    for part in (torch.arange(len(trajectory)), rows):
        measured = accumulate(policy, trajectory.take(part), Given(advantages[part], weights[part]), Loss(clipped))
        found.append((measured.loss, {key: value.grad.clone() for key, value in policy.trainable().items()}))
        for value in policy.trainable().values():
            value.grad = None
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-7)
    for key, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][key], rtol=1e-4, atol=1e-6)


def test_a_chat_with_pictures_in_its_messages_reads_as_the_same_text_with_media(tmp_path):
    policy = policy_of(SEES)
    [plain] = [prompt for prompt in prompts_of(NAMED[SEES], tmp_path) if prompt.id == 0]
    blocks = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": plain.text}]},)
    chat = replace(plain, messages=blocks)
    for name, value in policy.answers.reader.read(plain).inputs.items():
        assert torch.equal(value, policy.answers.reader.read(chat).inputs[name])
    told = policy_of(SEES, reading=Reading(system="Be brief."))
    assert told.answers.reader.read(plain).length > policy.answers.reader.read(plain).length


def bad_prompts(folder: Path) -> list[tuple[str, Prompt, str]]:
    one = prompts_of(NAMED[SEES], folder)[0]
    (folder / "broken.mp4").write_bytes(b"no video at all" * 100)
    two = ({"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]},)
    return [
        (
            SEES,
            replace(one, media={"sound": (folder / "one.png",)}),
            "prompt 0 has the medium 'sound'; expected image or video",
        ),
        (READS, one, "prompt 0 has media ['image'], but the model reads text alone"),
        (
            SEES,
            replace(one, messages=two),
            "prompt 0 has the blocks ['image', 'image'] in its messages; expected its media, ['image']",
        ),
        (
            SEES,
            replace(one, media={"video": (folder / "broken.mp4",)}),
            "1 videos cannot be used: .*broken.mp4 is no readable video",
        ),
    ]


@pytest.mark.parametrize("case", range(4))
def test_a_prompt_that_cannot_be_used_is_named_before_training(case, tmp_path):
    name, prompt, message = bad_prompts(tmp_path)[case]
    policy = policy_of(name, reading=Reading(video_frames=4))
    with pytest.raises(ValueError, match=message if ".*" in message else re.escape(message)):
        policy.prepare([prompt])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "policy.temperature is 0.0; expected a positive number"),
        ({"top_p": 0.0}, "policy.top_p is 0.0"),
        ({"min_p": 1.0}, "policy.min_p is 1.0"),
        ({"max_new_tokens": 0}, "policy.max_new_tokens is 0"),
        ({"stop": ("",)}, "policy.stop is"),
        ({"model": "/no/such/folder"}, "there is no such folder"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**{"model": "/no/such/folder", "max_new_tokens": 4} | options)


def test_a_model_whose_last_layer_is_adapted_is_refused(tmp_path):
    policy = policy_of(READS, lora={"rank": 2, "targets": ["lm_head"]})
    with pytest.raises(ValueError, match="the last layer is a .*; expected a plain Linear"):
        policy.prepare(prompts_of(NAMED[READS], tmp_path))


def test_an_evaluation_of_tokens_has_the_fields_that_objectives_ask_for(tmp_path):
    prompts = prompts_of(NAMED[READS], tmp_path)
    policy = policy_of(READS)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    found: list[Evaluation] = []
    policy.replay(trajectory, lambda chunk: found.append(chunk.evaluation))
    assert found[0].tensors().keys() == {"log_ratio", "log_prob", "sampler_gap", "entropy"}
    assert (
        found[0].log_ratio.requires_grad and found[0].entropy.requires_grad and not found[0].sampler_gap.requires_grad
    )

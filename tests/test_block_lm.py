"""Block-diffusion language models as policies: oracles read one sequence at a time, with masks built place by place."""

from dataclasses import replace

import pytest
import torch
from tiny_block_lms import ENDS, MASK, MODELS, PROMPTS, batch_of, plainly, policy_of, tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmgrpo.teaching import losses
from mmgrpo.types import Chunk, Prompt, Trajectory
from pipelines import block_answers, replays
from pipelines.answers import Options
from pipelines.block_decoding import Unmasking
from pipelines.block_lm import BlockPolicy, load, require_whole_attention, token_of_masks
from pipelines.blocks import CLEAN, NOBODY, Slots, sees

every_model = pytest.mark.parametrize("name", MODELS)


def log_probs(policy: BlockPolicy, trajectory: Trajectory) -> Tensor:
    """Of every token, from a comparison with 0; (B, S)."""
    found = torch.zeros(trajectory.mask.shape)

    def keep(chunk: Chunk) -> None:
        found[chunk.rows.unsqueeze(1), chunk.steps] = chunk.evaluation.log_ratio.detach().float()

    zero = {**trajectory.record, "anchor": torch.zeros(trajectory.mask.shape)}
    policy.replay(replace(trajectory, record=zero), keep)
    return torch.where(trajectory.mask, found, 0)


def expected(policy: BlockPolicy, part: Trajectory, order: bool) -> Tensor:
    """The same, token by token, each from a sequence of its own; (B, S)."""
    size, most = policy.blocks.likelihood_size, part.mask.shape[1]
    found = torch.zeros(part.mask.shape)
    for row, prompt in enumerate(part.batch.prompts):
        asked = policy.blocks.tokens(prompt).tolist()
        token, step = part.record["token"][row].tolist(), part.record["step"][row].tolist()
        for place in range(int(part.record["length"][row])):
            block = (len(asked) + place) // size
            stop = min((block + 1) * size, len(asked) + most)
            own = [number for number in range(most) if (len(asked) + number) // size == block]
            hidden = [n for n in own if not order or step[n] == 0 or step[n] >= step[place]]
            text, masked = (asked + token)[:stop], [len(asked) + number for number in hidden]
            found[row, place] = plainly(policy, text, masked, size)[len(asked) + place, token[place]].detach()
    return found


def test_a_slot_sees_its_own_copy_of_its_block_and_what_is_clean_before_it():
    kinds = [(block, copy) for block in range(3) for copy in (CLEAN, 1, 2)] + [(NOBODY, NOBODY)]
    block, copy = (torch.tensor([column]) for column in zip(*kinds, strict=True))
    found = sees(*2 * (Slots(block, block, block, copy),))[0]
    for query, (own, which) in enumerate(kinds):
        for key, (other, what) in enumerate(kinds):
            same, before = (own, which) == (other, what), what == CLEAN and other < own
            assert bool(found[query, key]) is (same or before)


@pytest.mark.parametrize(
    ("size", "steps", "quotas"), [(8, 8, [1] * 8), (8, 3, [3, 3, 2]), (5, 2, [3, 2]), (4, 1, [4]), (32, 32, [1] * 32)]
)
def test_the_quotas_of_a_block_fill_it(size, steps, quotas):
    unmasking = Unmasking(size, steps)
    assert [unmasking.quota(step) for step in range(steps)] == quotas and sum(quotas) == size


def test_sure_tokens_are_decided_at_once_and_else_the_surest_of_the_quota():
    unmasking = Unmasking(5, 2, threshold=0.9)
    confidence = torch.tensor([[0.95, 0.2, 0.99, 0.91, 0.9], [0.95, 0.2, 0.3, 0.1, 0.5], [0.95, 0.2, 0.3, 0.1, 0.5]])
    masked = torch.tensor([[True] * 5, [True] * 5, [False, True, False, False, False]])
    found = unmasking.chosen(confidence, masked, 0)  # 3 at least
    assert found.int().tolist() == [[1, 0, 1, 1, 0], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert unmasking.chosen(confidence, masked, 1)[1].tolist() == [True, False, False, False, True]  # 2 at least


@every_model
@pytest.mark.parametrize(("likelihood", "size"), [("block", 4), ("block", 3), ("block", 7), ("order", 4)])
def test_log_probs_are_those_of_each_sequence_read_by_itself(name, likelihood, size):
    policy = policy_of(name, likelihood=likelihood, likelihood_size=size, temperature=0.7)
    trajectory, samples = policy.rollout(batch_of())
    assert samples.finished.any() and not samples.finished.all()
    plain = expected(policy, trajectory, likelihood == "order")
    torch.testing.assert_close(log_probs(policy, trajectory), plain, rtol=1e-4, atol=2e-5)


def by_hand(policy: BlockPolicy, prompt: Prompt, most: int) -> tuple[list[int], int]:
    """Greedy tokens and the number of forwards, every forward on the whole text, without a cache."""
    unmasking, asked = policy.blocks.unmasking, policy.blocks.tokens(prompt).tolist()
    text, masked, forwards = asked + [MASK] * most, set(range(len(asked), len(asked) + most)), 0
    for block in range(len(asked) // unmasking.size, -(-len(text) // unmasking.size)):
        stop = min((block + 1) * unmasking.size, len(text))
        for step in range(unmasking.steps):
            here = sorted(place for place in masked if place < stop)
            if not here:
                break
            chance, token = plainly(policy, text[:stop], list(masked), unmasking.size).exp().max(1)
            sure = [place for place in here if chance[place] > unmasking.threshold]
            best = sorted(here, key=lambda place: -float(chance[place]))[: unmasking.quota(step)]
            forwards += 1
            for place in sure if len(sure) >= unmasking.quota(step) else best:
                text[place] = int(token[place])
                masked.discard(place)
            ends = [place for place in range(len(asked), stop) if text[place] in ENDS]
            if ends and not any(place < ends[0] for place in masked):
                return text[len(asked) : ends[0] + 1], forwards
    return text[len(asked) :], forwards


@every_model
@pytest.mark.parametrize("steps", [4, 3, 1])
def test_greedy_answers_and_their_forwards_are_those_of_a_loop_without_a_cache(name, steps):
    policy = policy_of(name, steps=steps)
    filled = policy.blocks.write(batch_of(group_size=1), explore=False)
    for row, prompt in enumerate(PROMPTS):
        token, forwards = by_hand(policy, prompt, 11)
        assert filled.token[row, : int(filled.length[row])].tolist() == token
        assert int(filled.forwards[row]) == forwards


def test_forwards_are_the_calls_of_the_model_after_the_prompt():
    policy, calls = policy_of(), []
    hook = policy.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for prompt in PROMPTS:
        calls.clear()
        trajectory, samples = policy.rollout(batch_of([prompt], group_size=1))
        whole = len(policy.blocks.tokens(prompt)) >= 4  # then the prompt takes a forward
        assert len(calls) == int(samples.forwards) + whole
        step, length = trajectory.record["step"][0], int(samples.length)
        assert step.max() == samples.forwards or bool(samples.finished)
        assert (step[:length] > 0).all() and set(range(1, int(step.max()) + 1)) <= set(step.tolist())
    hook.remove()


@pytest.mark.parametrize("likelihood", ["block", "order"])
def test_the_log_probs_of_a_block_are_unchanged_when_later_blocks_change(likelihood):
    policy = policy_of(likelihood=likelihood)
    trajectory, _ = policy.rollout(batch_of())
    before = log_probs(policy, trajectory)
    start = torch.tensor([len(policy.blocks.tokens(prompt)) for prompt in trajectory.batch.prompts])
    block = (start.unsqueeze(1) + torch.arange(11)) // 4
    for later in (1, 2, 3):
        late = block >= later
        token = torch.where(late, (trajectory.record["token"] + 5) % 20 + 3, trajectory.record["token"])
        after = log_probs(policy, replace(trajectory, record={**trajectory.record, "token": token}))
        torch.testing.assert_close(after[~late], before[~late], rtol=0, atol=1e-6)
        assert not torch.allclose(after[late], before[late])


def test_a_token_does_not_see_itself_nor_in_the_block_likelihood_the_rest_of_its_block():
    policy = policy_of(likelihood_size=11 + 12)  # everything is one block
    trajectory, _ = policy.rollout(batch_of())
    other = replace(trajectory, record={**trajectory.record, "token": (trajectory.record["token"] + 1) % 20 + 3})
    found = []
    for part in (trajectory, other):
        wanted = {**part.record, "token": trajectory.record["token"]}
        canvas = policy.blocks._canvas(part.batch, part.record["token"], policy.blocks.likelihood_size)
        copies = block_answers.whole_blocks(canvas, part.record["length"])
        hidden = policy.blocks._hidden(part.batch, canvas, copies)
        found.append((hidden, wanted))
    assert torch.equal(found[0][0], found[1][0])


def test_an_answer_does_not_depend_on_the_batch_it_is_written_in():
    policy, batch = policy_of(), batch_of()
    trajectory, samples = policy.rollout(batch)
    policy.blocks.answers.options = Options(rollout_tokens=1)
    alone, others = policy.rollout(batch)
    for name in ("token", "step", "length"):
        assert torch.equal(alone.record[name], trajectory.record[name])
    assert torch.equal(samples.forwards, others.forwards) and samples.text == others.text
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    shuffled, _ = policy.rollout(batch.take(order))
    assert torch.equal(shuffled.record["token"], trajectory.record["token"][order])
    elsewhere, _ = policy.rollout(replace(batch, seed=1))
    assert not torch.equal(elsewhere.record["token"], trajectory.record["token"])
    assert len({tuple(row) for row in trajectory.record["token"][:3].tolist()}) == 3  # members of a group are distinct


@pytest.mark.parametrize("likelihood", ["block", "order"])
def test_padding_order_and_batch_shape_change_no_log_prob(likelihood):
    policy = policy_of(likelihood=likelihood)
    trajectory, _ = policy.rollout(batch_of())
    together = log_probs(policy, trajectory)
    policy.blocks.answers.options = Options(replay_tokens=1)
    assert len(policy.blocks.batches(trajectory)) == len(trajectory)
    torch.testing.assert_close(log_probs(policy, trajectory), together, rtol=1e-5, atol=2e-5)
    order = torch.randperm(len(trajectory), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_probs(policy, trajectory.take(order)), together[order], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("likelihood", ["block", "order"])
def test_a_policy_passes_its_self_test_in_both_precisions(likelihood, dtype):
    policy = policy_of(likelihood=likelihood, dtype=dtype)
    found = policy.self_test(PROMPTS)
    assert all(finding.ok for finding in found), found
    assert replays.largest(policy, policy.rollout(batch_of())[0]) == 0


@pytest.mark.parametrize("likelihood", ["block", "order"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_true_and_that_of_any_split(likelihood, checkpointing):
    policy = policy_of(likelihood=likelihood, options=Options(gradient_checkpointing=checkpointing))
    policy.model.double()
    trajectory, _ = policy.rollout(batch_of())
    anchored = policy.anchor(trajectory, [torch.arange(len(trajectory))])
    slope = replays.gradient(policy, trajectory)
    finding = replays.straight(policy, anchored, slope, torch.float64)
    assert finding.ok, finding
    policy.blocks.answers.options = Options(replay_tokens=60)
    assert len(policy.blocks.batches(trajectory)) > 2
    parts = replays.gradient(policy, trajectory)
    assert replays.norm({name: parts[name] - slope[name] for name in slope}) < 1e-6 * replays.norm(
        slope
    )  # the library normalises in float32


def test_adapters_alone_are_trained_and_can_be_switched_off():
    policy = policy_of(lora={"rank": 2, "targets": ["q_proj", "v_proj"]})
    assert policy.trainable() and all("lora" in name for name in policy.trainable())
    trajectory, _ = policy.rollout(batch_of())
    before = log_probs(policy, trajectory)
    for value in policy.trainable().values():
        value.data.add_(0.3)
    assert not torch.allclose(log_probs(policy, trajectory), before)
    with policy.adapters_off():
        torch.testing.assert_close(log_probs(policy, trajectory), before, rtol=0, atol=1e-6)


def test_a_lesson_is_the_weighted_log_loss_of_the_masked_tokens():
    policy, batch = policy_of(), batch_of(group_size=2)
    found = losses(policy, batch)
    token, length = policy.blocks._targets(batch.prompts)
    for row, prompt in enumerate(batch.prompts):
        asked = policy.blocks.tokens(prompt).tolist()
        first, last = len(asked) // 4, (len(asked) + int(length[row]) - 1) // 4
        share, noise = block_answers.noises(batch.take(torch.tensor([row])), last - first + 1, 4)
        text, total, count = (asked + token[row].tolist())[: min(4 * (last + 1), len(asked) + 11)], 0.0, 0
        for block in range(first, last + 1):
            answer = [place for place in range(4 * block, min(4 * block + 4, len(text))) if place >= len(asked)]
            masked = [place for place in answer if noise[0, block - first, place % 4] < share[0, block - first]]
            table = plainly(policy, text[: 4 * block + 4], masked, 4)
            total -= sum(float(table[place, text[place]]) for place in masked) / float(share[0, block - first])
            count += len(answer)
        assert float(found[row]) == pytest.approx(total / count, rel=1e-4)


def test_every_token_of_a_lesson_counts_once_on_average():
    share, noise = block_answers.noises(batch_of(group_size=5000), 2, 4)
    weight = (noise < share.unsqueeze(2)) / share.unsqueeze(2)
    assert share.min() >= block_answers.LEAST and share.max() <= 1
    assert float(weight.mean()) == pytest.approx(1, abs=0.05)


def test_lessons_do_not_depend_on_the_split():
    policy, batch = policy_of(), batch_of(group_size=2)
    whole = losses(policy, batch)
    policy.blocks.answers.options = Options(replay_tokens=1)
    torch.testing.assert_close(losses(policy, batch), whole, rtol=1e-5, atol=1e-5)


def test_a_lesson_in_which_nothing_is_masked_is_zero_and_has_a_gradient_of_zero():
    policy, found = policy_of(), {}

    def consume(rows: Tensor, values: Tensor) -> None:
        values.sum().backward()
        found[float(values.detach())] = float(torch.stack([w.grad.norm() for w in policy.trainable().values()]).norm())
        policy.model.zero_grad()

    for number in range(12):  # of one short block each
        policy.teach(replace(batch_of([PROMPTS[1]], group_size=1), iteration=number), consume)
    assert found.pop(0.0) == 0 and len(found) > 1 and min(found.values()) > 0


def test_a_target_that_cannot_be_taught_is_named():
    policy = policy_of()
    with pytest.raises(ValueError, match="prompt 7 has the target 3; expected the text of an answer"):
        losses(policy, batch_of([Prompt(7, "1", target=3)]))
    with pytest.raises(
        ValueError, match="the target of prompt 7 has 11 tokens; expected fewer than policy.max_new_tokens, 11"
    ):
        losses(policy, batch_of([Prompt(7, "1", target="a" * 11)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "policy.block_size is 0"),
        ({"steps": 5}, "policy.steps is 5; expected 1 to policy.block_size, 4"),
        ({"threshold": 1.5}, "policy.threshold is 1.5"),
        ({"likelihood": "order", "likelihood_size": 3}, "policy.likelihood_size is 3 with policy.likelihood 'order'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        policy_of(**options)


def test_a_model_that_looks_back_over_a_window_is_refused():
    config = Qwen3Config(
        **MODELS["Qwen3"]().config.to_dict() | {"layer_types": ["full_attention", "sliding_attention"]}
    )
    with pytest.raises(ValueError, match="has layers of sliding_attention; expected full_attention alone"):
        require_whole_attention(Qwen3ForCausalLM(config))


def test_the_mask_token_is_the_tokenizers_own_or_the_one_that_is_named():
    assert token_of_masks(tokenizer(), None, 23) == MASK and token_of_masks(tokenizer(), "<unk>", 23) == 3
    with pytest.raises(ValueError, match="policy.mask_token is '<none>', and the tokenizer has no such token"):
        token_of_masks(tokenizer(), "<none>", 23)


def test_what_is_saved_loads_as_the_same_policy(tmp_path):
    policy = policy_of()
    policy.save(tmp_path)
    again = load(
        model=str(tmp_path), max_new_tokens=11, block_size=4, threshold=0.3, dtype="float32", device="cpu", chat=False
    )
    again.prepare(PROMPTS)
    assert again.rollout(batch_of())[1].text == policy.rollout(batch_of())[1].text
    with pytest.raises(ValueError, match="policy.attention is 'flash_attention_2'; expected sdpa or eager"):
        load(model=str(tmp_path), max_new_tokens=11, block_size=4, attention="flash_attention_2")

"""The entropy's first-order change, and which tokens are left out: worked examples, identities, finite differences."""

import pytest
import torch
from test_advantages import close, ids, numbers
from torch import Tensor

from mmgrpo.entropy_clip import (
    discriminator,
    entropy_clipped,
    expected_discriminator,
    kept_in_batch,
    kept_in_vocabulary,
)
from mmgrpo.types import Feedback

P = numbers(0.7, 0.2, 0.1)
H = -(P * P.log()).sum()


def entropy_of(logits: Tensor) -> Tensor:
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob).sum(-1)


def test_the_discriminator_equals_the_worked_example_and_has_mean_zero():
    values = discriminator(P.log(), H.expand(3))
    close(values, 0.311601, -0.161524, -0.150077)
    expected = expected_discriminator(P)
    close(expected[None], 0.170808)
    close(values - expected, 0.140793, -0.332332, -0.320885)
    assert abs(float((P * (values - expected)).sum())) < 1e-12
    assert (values.sign() == (P - (-H).exp()).sign()).all()
    assert float(discriminator(numbers(0.0), numbers(0.0))) == 0 == float(expected_discriminator(numbers(1.0, 0.0)))


def test_a_policy_gradient_step_changes_the_entropy_as_predicted():
    step, logits = 1e-5, P.log()
    change = torch.stack([(entropy_of(logits + step * (torch.eye(3)[k] - P)) - H) / step for k in range(3)])
    predicted = -(discriminator(P.log(), H.expand(3)) - expected_discriminator(P))
    torch.testing.assert_close(change, predicted, rtol=1e-3, atol=1e-4)


PROB, ENTROPY = numbers(0.9, 0.6, 0.3, 0.02, 0.5, 0.05), numbers(0.4, 1, 1.5, 1.2, 0.9, 2.5)
SIGNS, EVERY = numbers(1, 1, -1, -1, -1, 1), torch.ones(6, dtype=torch.bool)


def test_clip_b_drops_what_the_worked_example_drops():
    values = discriminator(PROB.log(), ENTROPY)
    close(values, 0.265176, 0.293505, 0.088808, -0.054240, 0.103426, -0.024787)
    assert kept_in_batch(values, SIGNS, EVERY, 1.0).tolist() == [True, True, True, False, True, True]
    assert kept_in_batch(values, SIGNS, EVERY, 2.5).all()
    assert kept_in_batch(torch.ones(6), -SIGNS.abs(), EVERY, 0.0).all()  # no spread


def test_clip_v_drops_the_largest_up_to_its_share():
    values, expected = numbers(0, 0, 0, 0, 0, 0), numbers(0.1, 0.2, 5, 4, 3, 6)
    kept = kept_in_vocabulary(values, expected, SIGNS, EVERY, width=1.0, most=1.0)
    assert kept.tolist() == [True, True, False, False, False, True]  # the last one has A > 0
    assert kept_in_vocabulary(values, expected, SIGNS, EVERY, 1.0, 0.34).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert kept_in_vocabulary(values, expected, SIGNS, EVERY, 1.0, 1e-4).tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert kept_in_vocabulary(values, expected, SIGNS, EVERY, 1e9, 1.0).all()


@pytest.mark.parametrize("by", ["batch", "vocabulary"])
def test_dropped_tokens_are_a_mask_beside_the_advantage(by):
    told = {
        "log_prob": PROB.log().view(2, 3),
        "entropy": ENTROPY.view(2, 3),
        "expected_discriminator": torch.zeros(2, 3),
    }
    mask = torch.tensor([[True, True, True], [True, True, False]])
    judged = Feedback({"r": numbers(1, 0)}, {"r": 1.0}, ids(0, 0), mask=mask, facts=told)
    found = entropy_clipped(by=by, width=1e-3, most=1.0)(judged)
    assert found.decisions is not None and not found.decisions[~mask].any() and found.decisions[0].all()
    assert not found.decisions[1].all() or by == "vocabulary"
    assert found.metrics["dropped_tokens"] == pytest.approx(float((mask & ~found.decisions).sum() / 5))
    own = found.values.unsqueeze(1) * discriminator(PROB.log(), ENTROPY).view(2, 3)
    assert found.metrics["entropy_change"] == pytest.approx(float(-own[mask].mean()))
    assert entropy_clipped(by=by, width=1e9)(judged).decisions.sum() == 5

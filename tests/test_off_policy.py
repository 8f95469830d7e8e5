"""REINFORCE on stale data against the worked numbers of its catalogue, and the identities of its family."""

from functools import partial

import pytest
import torch
from every_objective import drawn
from torch import Tensor

from mmgrpo.objectives import Objective, clipped, reinforce
from mmgrpo.off_policy import (
    asymre,
    everything,
    exponential,
    importance,
    likelihood,
    one_side,
    opmd,
    opmd_kimi,
    rec,
    rec_one_side,
    rec_one_side_is,
    rec_sample,
    rec_two_side,
    red_weight,
    ring,
    squared,
    two_side,
)
from mmgrpo.ratios import sample_mean
from mmgrpo.types import Evaluation

F64 = torch.float64
RATIO = torch.tensor([[1.5], [0.5], [1.0], [3.2]], dtype=F64)
ADVANTAGES = torch.tensor([[0.75], [-0.25], [-0.25], [-0.25]], dtype=F64)
OLD = 0.2  # probability under the policy that sampled


def here() -> Evaluation:
    return Evaluation(RATIO.log().requires_grad_())


def loss_and_slope(objective: Objective) -> tuple[float, Tensor]:
    """The mean loss with log pi in the place of the log-ratio, and the slopes before the mean; (4,)."""
    evaluation = here()
    losses = objective(evaluation, ADVANTAGES)
    (slope,) = torch.autograd.grad(losses.sum(), evaluation.log_ratio)
    log_old = torch.tensor(OLD, dtype=F64).log()
    return float((losses.detach().sum() + slope.sum() * log_old) / 4), slope.flatten()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(one_side, [0, 0, 1, 1]), (two_side, [0, 0, 1, 0]), (ring, [0, 0, 1, 1]), (everything, [1, 1, 1, 1])],
)
def test_what_is_kept_equals_the_worked_example(keep, expected: list[int]) -> None:
    assert keep(here(), ADVANTAGES).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (rec_one_side_is, [0, 0, 0.25, 0.8]),
        (rec_one_side, [0, 0, 0.25, 0.25]),
        (rec_two_side, [0, 0, 0.25, 0]),
    ],
)
def test_the_pull_on_each_decision_equals_the_worked_example(objective: Objective, expected: list[float]) -> None:
    torch.testing.assert_close(loss_and_slope(objective)[1], torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (partial(rec, keep=everything), -0.046649),
        (rec_one_side, -0.128483),
        (opmd, -0.023325),
        (asymre, 0.092408),
    ],
)
def test_mean_losses_equal_the_worked_example(objective: Objective, expected: float) -> None:
    assert loss_and_slope(objective)[0] == pytest.approx(expected, abs=1e-6)


def test_the_squared_pull_equals_the_worked_example() -> None:
    evaluation = here()
    plain, pulled = (objective(evaluation, ADVANTAGES).detach().mean() for objective in (reinforce, opmd_kimi))
    assert float(plain) == pytest.approx(-0.046649, abs=1e-6) and float(pulled) == pytest.approx(0.003295, abs=1e-6)
    assert float(pulled - plain) == pytest.approx(float(0.1 * RATIO.log().square().mean()), abs=1e-9)


def test_a_shifted_baseline_is_a_pull_of_the_forward_kl() -> None:
    log_ratio, advantages, _ = drawn(6, 5)
    shifted = reinforce(Evaluation(log_ratio), advantages + 0.1)
    torch.testing.assert_close(asymre(Evaluation(log_ratio), advantages), shifted)
    torch.testing.assert_close(
        rec(Evaluation(log_ratio), advantages, keep=everything, pull=partial(likelihood, strength=0.1)), shifted
    )


def test_one_side_with_importance_has_the_gradient_of_the_clip() -> None:
    log_ratio, advantages, _ = drawn(40, 10, scale=0.5)
    ours, theirs = log_ratio.clone().requires_grad_(), log_ratio.clone().requires_grad_()
    rec_one_side_is(Evaluation(ours), advantages).sum().backward()
    clipped(Evaluation(theirs), advantages).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_sample_form_keeps_whole_samples_by_the_ratio_of_gspo() -> None:
    log_ratio, advantages, _ = drawn(40, 10, scale=0.8)
    evaluation = Evaluation(log_ratio.requires_grad_())
    rec_sample(evaluation, advantages).sum().backward()
    kept = one_side(evaluation, advantages, level=sample_mean)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(log_ratio.grad, -advantages * kept)


def test_on_policy_everything_is_kept_and_widths_without_end_keep_everything() -> None:
    log_ratio, advantages, _ = drawn(8, 5)
    for keep in (one_side, two_side, ring):
        assert keep(Evaluation(0 * log_ratio), advantages).all()
    assert two_side(Evaluation(10 * log_ratio), advantages, low=1.0, high=float("inf")).all()
    zero = torch.zeros(1, 2, dtype=F64)
    assert one_side(Evaluation(torch.tensor([[2.0, -2.0]], dtype=F64)), zero).all()  # A = 0 has both signs


def test_the_ring_keeps_what_is_far_on_the_wrong_side() -> None:
    log_ratio = torch.tensor([[0.3, 0.3, 3.5, 3.5]], dtype=F64).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=F64)
    assert ring(Evaluation(log_ratio), advantages).tolist() == [[1, 0, 0, 1]]


def test_weights_equal_the_worked_examples() -> None:
    weighed = ADVANTAGES * exponential(here(), ADVANTAGES)
    torch.testing.assert_close(
        weighed.flatten(), torch.tensor([1.587750] + [-0.194700] * 3, dtype=F64), rtol=0, atol=1e-6
    )
    assert importance(here(), ADVANTAGES, floor=0.4, cap=2.0).flatten().tolist() == pytest.approx([1.5, 0.5, 1.0, 2.0])
    huge = torch.full((1, 1), 1e6, dtype=F64)
    assert torch.isfinite(red_weight(Evaluation(torch.ones(1, 1, dtype=F64)), huge)).all()
    with pytest.raises(ValueError, match="temperature is 0"):
        exponential(here(), ADVANTAGES, temperature=0.0)


def test_a_ratio_that_overflows_and_is_not_kept_reaches_nothing() -> None:
    log_ratio = torch.tensor([[1e4]], dtype=F64, requires_grad=True)
    loss = rec_one_side_is(Evaluation(log_ratio), torch.ones(1, 1, dtype=F64))
    loss.sum().backward()
    assert loss == 0 and log_ratio.grad == 0


def test_the_pulls_are_stated_in_their_own_strength() -> None:
    torch.testing.assert_close(squared(here(), strength=0.3), 0.3 * RATIO.log().square(), check_stride=False)
    torch.testing.assert_close(likelihood(here(), strength=0.3), -0.3 * RATIO.log())

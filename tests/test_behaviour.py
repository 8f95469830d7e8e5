"""The policy that samples, where its weights lag behind those that are trained."""

import pytest
import torch
from torch.nn import Parameter

from mmgrpo.behaviour import Behaviour, share_kept


def test_the_share_that_is_kept_rises_to_its_bound():
    assert [share_kept(iteration, 0.5, 0.2, 0) for iteration in range(4)] == pytest.approx([0.2, 0.4, 0.5, 0.5])
    assert share_kept(0, 0.5, None, 0) == 0.5
    assert share_kept(999, 0.5, 0.001, 0) == 0.5 and share_kept(99, 0.5, 0.001, 0) == pytest.approx(
        0.1
    )  # DiffusionNFT's
    assert share_kept(74, 0.999, 0.0075, 75) == 0 and share_kept(275, 0.999, 0.0075, 75) == 0.999  # and its delayed one


def test_the_sampling_weights_follow_the_trained_ones_after_each_iteration():
    weight = Parameter(torch.tensor([0.0]))
    behaviour = Behaviour({"w": weight}, lag=0.5, ramp=0.25)
    with torch.no_grad():
        weight.fill_(1.0)
    with behaviour.applied():
        assert weight.item() == 0.0  # those of the start sample until the iteration ends
    behaviour.after_iteration(0)  # q = 0.25
    with behaviour.applied():
        assert weight.item() == pytest.approx(0.75)
    behaviour.after_iteration(1)  # q = 0.5
    with behaviour.applied():
        assert weight.item() == pytest.approx(0.875)
    assert weight.item() == 1.0


def test_without_a_lag_todays_weights_sample():
    weight = Parameter(torch.tensor([1.0]))
    behaviour = Behaviour({"w": weight})
    assert not behaviour.lags and behaviour.tensors() == {}
    with behaviour.applied():
        assert weight.item() == 1.0


def test_a_lag_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="lag is 1.0; expected a number in"):
        Behaviour({"w": Parameter(torch.zeros(1))}, lag=1.0)

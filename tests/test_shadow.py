"""A shadow's weights come and go without a trace, and each kind of reference follows its schedule."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from mmgrpo.shadow import Reference, Shadow

DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
]


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def values(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    first = next(net.parameters())
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)).to(first.dtype)
    net(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("dtype", "stored"), DTYPES, ids=str)
def test_live_weights_are_bit_equal_after_the_shadow_was_applied_on_a_cpu(dtype, stored):
    net = model(dtype)
    shadow = Shadow(dict(net.named_parameters()), stored)
    begin = values(net)
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=1)
    moved, addresses = values(net), [parameter.data_ptr() for parameter in net.parameters()]
    assert not same(begin, moved)
    with shadow.applied():
        assert same(values(net), begin)
    assert same(values(net), moved) and [parameter.data_ptr() for parameter in net.parameters()] == addresses


@pytest.mark.parametrize(("dtype", "stored"), DTYPES, ids=str)
def test_live_weights_are_back_after_an_error_and_the_shadow_can_be_applied_again(dtype, stored):
    net = model(dtype)
    shadow = Shadow(dict(net.named_parameters()), stored)
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=1)
    moved = values(net)
    with pytest.raises(KeyError), shadow.applied():
        raise KeyError("inside")
    assert same(values(net), moved)
    with shadow.applied():
        assert not same(values(net), moved)


@pytest.mark.parametrize(("dtype", "stored"), DTYPES, ids=str)
def test_shadow_and_live_weights_never_share_storage(dtype, stored):
    net = model(dtype)
    shadow = Shadow(dict(net.named_parameters()), stored)

    def apart() -> bool:
        held = {tensor.data_ptr() for tensor in shadow.tensors().values()}
        return not held & {parameter.data_ptr() for parameter in net.parameters()}

    assert apart()
    shadow.copy()
    shadow.load({name: tensor.clone() for name, tensor in shadow.tensors().items()})
    with shadow.applied():
        pass
    assert apart()
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert not torch.equal(shadow.tensors()["0.weight"].to(dtype), net[0].weight)


def test_the_optimizer_goes_on_as_if_the_shadow_had_never_been_applied():
    results = []
    for interrupted in (False, True):
        net = model()
        shadow = Shadow(dict(net.named_parameters()))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for seed in range(5):
            step(net, optimizer, seed)
            if interrupted:
                with shadow.applied(), torch.no_grad():
                    net(torch.ones(1, 4))
        results.append(values(net))
    assert same(*results)


def test_a_graph_built_before_gives_the_same_gradient_after_the_shadow_was_applied():
    net = model()
    shadow = Shadow(dict(net.named_parameters()))
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=1)
    x = torch.ones(3, 4)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    loss = net(x).square().sum()
    with shadow.applied(), torch.no_grad():
        net(x)
    assert same(list(expected), list(torch.autograd.grad(loss, list(net.parameters()))))


def test_an_applied_shadow_refuses_to_be_applied_or_moved():
    net = model()
    shadow = Shadow(dict(net.named_parameters()))
    with shadow.applied():
        for action in (lambda: shadow.follow(0.5), shadow.copy, lambda: shadow.load({})):
            with pytest.raises(RuntimeError, match="weights are applied"):
                action()
        with pytest.raises(RuntimeError, match="weights are applied"), shadow.applied():
            pass
        assert same(values(net), list(shadow.tensors().values()))


def test_two_shadows_of_the_same_weights_can_be_nested():
    net = model()
    first = Shadow(dict(net.named_parameters()))
    begin = values(net)
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=1)
    second, moved = Shadow(dict(net.named_parameters())), values(net)
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=2)
    live = values(net)
    with first.applied():
        with second.applied():
            assert same(values(net), moved)
        assert same(values(net), begin)
    assert same(values(net), live)


def test_an_average_kept_in_float32_follows_bfloat16_weights_where_one_in_bfloat16_stands_still():
    live = Parameter(torch.ones(1000, dtype=torch.bfloat16))
    fine, coarse = Reference("ema", {"w": live}, decay=0.999), Shadow({"w": live})
    live.data.fill_(1.5)
    for _ in range(200):
        fine.after_update()
        coarse.follow(0.999)
    torch.testing.assert_close(fine.tensors()["w"], torch.full((1000,), 1.5 - 0.5 * 0.999**200), rtol=1e-5, atol=0)
    assert coarse.tensors()["w"].unique().tolist() == [1.0]
    assert Reference("ema", {"w": Parameter(torch.ones(1).double())}).tensors()["w"].dtype == torch.float64


def test_decay_one_keeps_and_decay_zero_copies_to_the_last_bit():
    net = model()
    shadow = Shadow(dict(net.named_parameters()))
    begin = values(net)
    step(net, torch.optim.SGD(net.parameters(), lr=0.3), seed=1)
    shadow.follow(1.0)
    assert same(list(shadow.tensors().values()), begin)
    shadow.follow(0.0)
    assert same(list(shadow.tensors().values()), values(net))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("0.bias"), "1 names are on one side only, the first is '0.bias'"),
        (lambda tensors: tensors.update({"0.bias": torch.zeros(1)}), r"stored 0.bias has shape \(1,\)"),
        (
            lambda tensors: tensors.update({"0.bias": torch.zeros(8).double()}),
            "dtype torch.float64; expected torch.float32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(change, message):
    shadow = Shadow(dict(model().named_parameters()))
    before = [tensor.clone() for tensor in shadow.tensors().values()]
    tensors = {name: torch.zeros_like(tensor) for name, tensor in shadow.tensors().items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        shadow.load(tensors)
    assert same(before, list(shadow.tensors().values()))


def test_the_ema_reference_averages_once_per_optimizer_step():
    net = model()
    reference = Reference("ema", dict(net.named_parameters()), decay=0.9)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    history = [net[0].weight.detach().double()]
    for seed in range(6):
        for _ in range(3):  # micro-batches
            net(torch.full((2, 4), float(seed + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.after_update()
        history.append(net[0].weight.detach().double().clone())
        reference.after_iteration()
    closed = 0.9**6 * history[0] + sum(0.1 * 0.9 ** (6 - n) * history[n] for n in range(1, 7))
    with reference.applied():
        torch.testing.assert_close(net[0].weight.detach().double(), closed, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "expected"), [("frozen", [0, 0, 0]), ("previous", [0, 2, 4])])
def test_frozen_stays_at_the_start_and_previous_lags_by_one_iteration(kind, expected):
    net = model()
    reference = Reference(kind, dict(net.named_parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    history, seen = [values(net)], []
    for _ in range(3):
        for _ in range(2):
            with reference.applied():
                seen.append(next(n for n, old in enumerate(history) if same(old, values(net))))
            step(net, optimizer, seed=len(history))
            reference.after_update()
            history.append(values(net))
        reference.after_iteration()
    assert seen == [n for n in expected for _ in range(2)]


def test_adapters_off_enters_the_context_of_the_policy_and_holds_no_weights():
    state = []

    @contextmanager
    def adapters_off():
        state.append("off")
        yield
        state.append("on")

    reference = Reference("adapters_off", dict(model().named_parameters()), adapters_off=adapters_off)
    with reference.applied():
        assert state == ["off"]
    assert state == ["off", "on"] and reference.active and reference.tensors() == {}
    with pytest.raises(ValueError, match="this policy has no adapters"):
        Reference("adapters_off", dict(model().named_parameters()))


@pytest.mark.parametrize("kind", ["frozen", "ema", "previous"])
def test_a_reference_loaded_from_its_tensors_goes_on_as_the_first(kind):
    results = []
    for reloaded in (False, True):
        net = model(torch.bfloat16)
        reference = Reference(kind, dict(net.named_parameters()), decay=0.7)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for seed in range(6):
            if reloaded and seed == 3:
                stored = {name: tensor.clone() for name, tensor in reference.tensors().items()}
                reference = Reference(kind, dict(net.named_parameters()), decay=0.7)
                reference.load(stored)
            step(net, optimizer, seed)
            reference.after_update()
            if seed % 2:
                reference.after_iteration()
        results.append(list(reference.tensors().values()))
    assert same(*results)


def test_no_reference_is_inactive_and_says_so_when_it_is_asked_for():
    reference = Reference("none", dict(model().named_parameters()))
    reference.after_update()
    reference.after_iteration()
    assert not reference.active and reference.tensors() == {}
    with pytest.raises(ValueError, match="reference is 'none'"):
        reference.applied()
    with pytest.raises(ValueError, match="1 reference weights are stored; expected none"):
        reference.load({"w": torch.zeros(1)})


def test_options_that_cannot_be_are_refused():
    parameters = dict(model().named_parameters())
    with pytest.raises(ValueError, match="reference is 'emma'; expected one of none, frozen"):
        Reference("emma", parameters)
    with pytest.raises(ValueError, match=r"decay is nan; expected a number in \[0, 1\]"):
        Reference("ema", parameters, decay=float("nan"))
    with pytest.raises(ValueError, match="no parameters"):
        Shadow({})
    nested = torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)
    with pytest.raises(ValueError, match="'w' is a NestedTensor; a shadow needs plain tensors"):
        Shadow({"w": Parameter(nested)})

"""Checkpoints are whole or absent, whatever kills the writer, and a state comes back from one to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmgrpo.checkpoint import latest, read, write
from mmgrpo.optimizers import Joined
from mmgrpo.packing import (
    Packed,
    optimizer_state,
    pack,
    random_states,
    restore_optimizer,
    restore_random_states,
    unpack,
)

KILLS = 24


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def small(run: Path, iteration: int, **options: object) -> Path:
    value = {"w": torch.full((3,), float(iteration))}
    return write(run, iteration, {"weights": value, "ema": value}, {"iteration": iteration}, **options)


def iterations(run: Path) -> list[int]:
    return [int(path.name.split("_")[-1]) for path in sorted((run / "checkpoints").iterdir())]


def write_for_ever(run: Path, first: int, acknowledge: int) -> None:
    """Checkpoints of iterations first, first + 1, ...; reports each on a pipe once `write` has returned."""
    for iteration in range(first, 10**9):
        value = {f"w{n}": torch.full((2000,), iteration) for n in range(8)}
        write(run, iteration, {"weights": value, "optimizer": value}, {"iteration": iteration})
        os.write(acknowledge, iteration.to_bytes(8, "big"))


def kill_writers(run: Path) -> None:
    """Kill writers at random moments; after each kill the newest checkpoint must be whole and as new as reported."""
    randomness, unfinished, newest = random.Random(0), 0, -1
    for _ in range(KILLS):
        receive, send = os.pipe()
        writer = os.fork()
        if writer == 0:
            write_for_ever(run, newest + 1, send)
        os.close(send)
        time.sleep(randomness.uniform(0.0, 0.12))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        with os.fdopen(receive, "rb") as pipe:
            reported = pipe.read()
        reported_newest = int.from_bytes(reported[-8:], "big") if reported else newest
        unfinished += any((run / "checkpoints").glob(".unfinished_*"))
        path = latest(run)
        assert path is not None or newest == reported_newest == -1
        if path is not None:
            tensors, facts = read(path)
            newest = facts["iteration"]
            assert newest >= reported_newest and path.name.endswith(f"_iteration_{newest}")
            for values in (tensors["weights"], tensors["optimizer"]):
                assert len(values) == 8 and all((value == newest).all() for value in values.values())
    print(json.dumps({"unfinished": unfinished, "newest": newest}))


def test_the_newest_checkpoint_is_whole_after_every_one_of_many_kills(tmp_path):
    """In a process of its own, which is still single-threaded when it forks the writers."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["unfinished"] >= 3 and result["newest"] >= 3  # the kills did strike while something was written


def test_tensors_of_every_layout_and_dtype_come_back_bit_equal(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": base,
        "tied": base,
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "row": base[2],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": base.to(torch.bfloat16),
        "double": base.double(),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "mask": base > 0,
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0),
        "parameter": nn.Parameter(base.clone()),
        "expanded": torch.ones(1).expand(3),
    }
    path = write(tmp_path, 0, {"state": tensors, "view": {"row": base[2]}, "nothing": {}}, {"a": [1, None, {"b": 0.1}]})
    stored, facts = read(path)
    assert torch.equal(stored["state"]["nan"].view(torch.int32), tensors["nan"].view(torch.int32))
    del stored["state"]["nan"], tensors["nan"]
    assert same(stored["state"], tensors) and stored["nothing"] == {}
    assert same(stored["view"], {"row": base[2]}) and (path / "view.safetensors").stat().st_size < 200
    assert facts == {"a": [1, None, {"b": 0.1}]}


def test_the_newest_checkpoints_are_kept_and_a_run_that_went_back_continues_from_where_it_went(tmp_path):
    for iteration in (2, 4, 6):
        small(tmp_path, iteration, keep=2)
    assert iterations(tmp_path) == [4, 6]
    path = small(tmp_path, 3, keep=2)
    assert iterations(tmp_path) == [6, 3] and latest(tmp_path) == path
    assert small(tmp_path, 3, keep=1) != path and iterations(tmp_path) == [3]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("weights.safetensors", truncate, "bytes; expected"),
        ("weights.safetensors", flip, "SHA-256 differs"),
        ("facts.json", flip, "SHA-256 differs"),
        ("ema.safetensors", Path.unlink, "ema.safetensors is missing"),
        ("manifest.json", Path.unlink, "has no manifest.json"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_name_and_never_costs_a_good_one(tmp_path, name, damage, reason):
    good, bad = small(tmp_path, 1), small(tmp_path, 2)
    damage(bad / name)
    with pytest.warns(UserWarning, match=rf"skipped .*{bad.name}.*{reason}"):
        assert latest(tmp_path) == good
    with pytest.raises(ValueError, match=rf"cannot read checkpoint .*{bad.name}.*{reason}"):
        read(bad)
    if reason != "SHA-256 differs":  # equal sizes look complete to the rotation, which does not read contents
        small(tmp_path, 3, keep=2)
        assert good.exists()


def test_a_run_without_a_complete_checkpoint_has_no_latest(tmp_path):
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".unfinished_000001_iteration_1").mkdir(parents=True)
    with pytest.warns(UserWarning, match="skipped .*unfinished_000001_iteration_1: it was never finished"):
        assert latest(tmp_path) is None
    small(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(tmp_path) is not None


def test_an_error_while_writing_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    good = small(tmp_path, 1, keep=1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        small(tmp_path, 2, keep=1, extra=fail)
    assert list((tmp_path / "checkpoints").iterdir()) == [good] == [latest(tmp_path)]


def test_further_files_belong_to_the_checkpoint_and_are_proven_with_it(tmp_path):
    def extra(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "config.json").write_text("{}")

    path = small(tmp_path, 1, extra=extra)
    assert (path / "policy" / "config.json").read_text() == "{}" and set(read(path)[0]) == {"weights", "ema"}
    (path / "policy" / "config.json").unlink()
    with pytest.raises(ValueError, match="policy/config.json is missing"):
        read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": {"a": float("nan")}}, "facts cannot be stored: Out of range float"),
        ({"facts": {"a": object()}}, "facts cannot be stored: Object of type object"),
        ({"facts": {"a": (1, 2)}}, "fact 'a' would change in JSON"),
        ({"facts": {"a": {1: 2}}}, "fact 'a' would change in JSON"),
        ({"tensors": {"../a": {}}}, r"'\.\./a' cannot name a file of tensors"),
        ({"keep": 0}, "cannot keep 0 checkpoints"),
    ],
)
def test_what_cannot_be_stored_exactly_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, 0, **{"tensors": {}, "facts": {}, **options})
    assert latest(tmp_path) is None


def test_packing_gives_back_values_types_and_keys():
    w = torch.ones(2)
    state = {
        1: {"1": w, 1: w * 2, "a.b": w * 3, "a": {"b": w * 4}},
        "1": [(0.1, None, True), [], {}, "text", -3],
        (1, "x"): {"tensor": "not a tensor", "float": float("inf")},
        None: {"dict": [["a", 1]]},
    }
    packed = pack(state)
    back = unpack(Packed(packed.tensors, json.loads(json.dumps(packed.facts, allow_nan=False))))
    assert repr(back) == repr(state)
    assert np.isnan(unpack(pack(float("nan")))) and unpack(pack(-0.0)).hex() == "-0x0.0p+0"
    with pytest.raises(ValueError, match=r"state.a.0 is a set; expected dict"):
        pack({"a": [set()]})


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Muon and AdamW": lambda p: Joined([torch.optim.Muon(p[::2]), torch.optim.AdamW(p[1::2], fused=True)]),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Uses every global random generator, so that a state that is not restored shows."""
    for _ in range(steps):
        x = torch.randn(16, 4) * random.random() + np.random.standard_normal()

        def loss(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            value = model(x).square().mean()
            value.backward()
            return value

        optimizer.step(loss)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, tmp_path):
    whole = net()
    optimizer = OPTIMIZERS[name](list(whole.parameters()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(whole, optimizer, 3)
    assert np.random.get_state()[3] == 1  # numpy draws in pairs: the second number of the last one is waiting
    moments, states = optimizer_state(optimizer), random_states()
    files = {"weights": whole.state_dict(), "optimizer": moments.tensors, "random": states.tensors}
    write(tmp_path, 3, files, {"optimizer": moments.facts, "random": states.facts})
    train(whole, optimizer, 4)
    randomness = random_states()

    resumed = net()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    tensors, facts = read(latest(tmp_path))
    resumed.load_state_dict(tensors["weights"])
    second = OPTIMIZERS[name](list(resumed.parameters()))
    restore_optimizer(second, Packed(tensors["optimizer"], facts["optimizer"]))
    restore_random_states(Packed(tensors["random"], facts["random"]))
    train(resumed, second, 4)
    assert same(resumed.state_dict(), whole.state_dict())
    for left, right in [(optimizer_state(second), optimizer_state(optimizer)), (random_states(), randomness)]:
        assert left.facts == right.facts and same(left.tensors, right.tensors)


def test_moments_finer_than_their_parameters_keep_their_dtype():
    class Fine(torch.optim.Optimizer):
        def step(self) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["mean"] = torch.full((2,), 1 / 3)

    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    first = Fine([parameter], {"lr": 0.1})
    first.step()
    second = Fine([parameter], {"lr": 0.1})
    restore_optimizer(second, optimizer_state(first))
    assert torch.equal(second.state[parameter]["mean"], torch.full((2,), 1 / 3))


def test_an_optimizer_with_other_groups_is_refused():
    first = torch.optim.SGD(list(net().parameters()), lr=0.1)
    with pytest.raises(ValueError, match="group"):
        restore_optimizer(torch.optim.SGD(list(net()[0].parameters()), lr=0.1), optimizer_state(first))


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]))

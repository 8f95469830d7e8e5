"""The tiny pipelines are what the policies' tests take them for: real pipelines whose outputs depend on everything."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests.tiny_pipelines import ADDITIONAL, REQUIRED, TINY_PIPELINES, TinyPipeline

ROWS = [
    *(pytest.param(tiny, id=tiny.name) for tiny in REQUIRED),
    *(pytest.param(tiny, id=tiny.name, marks=pytest.mark.slow) for tiny in ADDITIONAL),
]
every_row = pytest.mark.parametrize("tiny", ROWS)

VISIBLE = 1e-3
"""A change of the output, as a share of its spread, that rounding cannot make."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def built(tiny: TinyPipeline) -> DiffusionPipeline:
    pipeline = tiny.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def change(before: Tensor, after: Tensor) -> float:
    """Largest difference of two outputs as a share of the first one's standard deviation."""
    assert before.shape == after.shape
    return float((before - after).abs().max() / before.std())


@contextmanager
def nudged(module: nn.Module) -> Iterator[None]:
    """All weights are 10 % larger inside the context."""
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    yield
    module.load_state_dict(saved)


def leaves(value: object) -> list[Tensor]:
    """The floating-point tensors inside nested outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return leaves(list(value.values()))
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else []


def denoiser_calls(tiny: TinyPipeline, pipeline: DiffusionPipeline) -> list[tuple[nn.Module, tuple, dict]]:
    """Every call of every denoiser during one guided run."""
    calls: list[tuple[nn.Module, tuple, dict]] = []

    def record(module: nn.Module, positional: tuple, named: dict) -> None:
        calls.append((module, positional, named))

    modules = [pipeline.components[name] for name in tiny.denoisers]
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    tiny.run(pipeline, tiny.row(0, seed=0, guided=True))
    for hook in hooks:
        hook.remove()
    return calls


def test_names_are_unique_and_the_parity_table_is_complete() -> None:
    names = [tiny.name for tiny in TINY_PIPELINES]
    assert len(set(names)) == len(names)
    parity = "StableDiffusion StableDiffusionXL StableDiffusion3 Flux FluxKontext Flux2Klein QwenImage QwenImageEdit"
    video = "Wan WanImageToVideo WanVideoToVideo WanVACE LucyEdit LTX LTXImageToVideo HunyuanVideo CogVideoX"
    assert {tiny.name for tiny in REQUIRED} == {*parity.split(), *video.split(), "ZImage", "Sana"}
    assert all(tiny.required for tiny in REQUIRED) and not any(tiny.required for tiny in ADDITIONAL)


@every_row
def test_two_builds_have_equal_weights_and_leave_the_global_random_state_alone(tiny: TinyPipeline) -> None:
    state = torch.get_rng_state()
    first, second = built(tiny).components, tiny.build().components
    assert torch.equal(torch.get_rng_state(), state)
    modules = [name for name, part in first.items() if isinstance(part, nn.Module)]
    for name in modules:
        assert not any(module.training for module in first[name].modules())
        tensors = zip(first[name].state_dict().values(), second[name].state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in tensors)
        assert all(parameter.dtype == torch.float32 for parameter in first[name].parameters())
    assert {*tiny.denoisers} <= {*modules}


@every_row
def test_a_plain_call_is_finite_and_depends_on_seed_and_prompt_alone(tiny: TinyPipeline) -> None:
    pipeline = built(tiny)
    output = tiny.run(pipeline, tiny.row(0, seed=0))
    assert len(output) == 1 and output.isfinite().all() and output.std() > 0.01
    assert torch.equal(tiny.run(pipeline, tiny.row(0, seed=0)), output)
    assert change(output, tiny.run(pipeline, tiny.row(0, seed=1))) > VISIBLE
    conditioned = tiny.prompt_key is not None or tiny.media(0)
    assert (change(output, tiny.run(pipeline, tiny.row(1, seed=0))) > VISIBLE) == bool(conditioned)


@every_row
def test_every_row_of_a_batch_equals_the_row_alone(tiny: TinyPipeline) -> None:
    if not tiny.batched:
        pytest.skip("the pipeline takes no list of these inputs")
    pipeline, rows = built(tiny), (0, 1, 2)
    batch = tiny.run(pipeline, tiny.rows(rows, seeds=rows, guided=True))
    assert len(batch) == 3
    for row in rows:
        alone = tiny.run(pipeline, tiny.row(row, seed=row, guided=True))
        assert change(alone, batch[row : row + 1]) < VISIBLE


@every_row
def test_guidance_changes_the_output(tiny: TinyPipeline) -> None:
    if tiny.guidance is None:
        pytest.skip("the pipeline has no guidance")
    pipeline = built(tiny)
    plain, guided = (tiny.run(pipeline, tiny.row(0, seed=0, guided=guided)) for guided in (False, True))
    assert change(plain, guided) > VISIBLE


@every_row
def test_every_denoiser_changes_the_output(tiny: TinyPipeline) -> None:
    pipeline = built(tiny)
    output = tiny.run(pipeline, tiny.row(0, seed=0, guided=True))
    for name in tiny.denoisers:
        with nudged(pipeline.components[name]):
            assert change(output, tiny.run(pipeline, tiny.row(0, seed=0, guided=True))) > VISIBLE


@every_row
def test_gradients_reach_every_parameter_that_is_not_named_as_unused(tiny: TinyPipeline) -> None:
    pipeline = built(tiny)
    for name in tiny.denoisers:
        pipeline.components[name].zero_grad()
    for module, positional, named in denoiser_calls(tiny, pipeline):
        sum(leaf.square().mean() for leaf in leaves(module(*positional, **named))).backward()
    parameters = [pair for name in tiny.denoisers for pair in pipeline.components[name].named_parameters()]
    dead = [key for key, value in parameters if value.grad is None or not value.grad.any()]
    assert [key for key in dead if not any(part in key for part in tiny.unused)] == []
    assert [part for part in tiny.unused if not any(part in key for key in dead)] == []

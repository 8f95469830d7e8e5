"""Every tiny diffusers pipeline is a policy without code of its own: recorded and replayed exactly, trained, saved."""

import pytest
import torch
from tiny_pipelines import ADDITIONAL, REQUIRED
from tiny_pipelines.policy import NAMED, batch_of, policy_of, prompts_of

from mmgrpo.improve import evaluate
from mmgrpo.shadow import Reference
from mmgrpo.transitions import cps, ddim, flow_sde
from pipelines.decisions import from_levels
from pipelines.diffusion import DiffusionPolicy
from pipelines.engine import Engine
from pipelines.listeners import ReplayMismatch
from pipelines.options import Options
from pipelines.reverse_process import ReverseProcess

SLOW_BUT_ONE = pytest.mark.parametrize(
    "tiny",
    [pytest.param(row, marks=() if row.name == "StableDiffusion3" else pytest.mark.slow) for row in REQUIRED],
    ids=lambda row: row.name,
)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tiny", REQUIRED, ids=lambda row: row.name)
def test_the_log_ratio_is_exactly_zero_until_the_weights_move(tiny, dtype, guided, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path, guided=guided, dtype=dtype)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert trajectory.mask.any()
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    part = trajectory.take(torch.tensor([4, 0]))  # other rows beside each other than in the rollout
    assert evaluate(policy, part).log_ratio.abs().max() == 0
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=1.0)
    policy.replay(trajectory, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    missing = [
        name for name, value in policy.trainable().items() if value.grad is None or not value.grad.abs().max() > 0
    ]
    assert not [name for name in missing if not any(part in name for part in tiny.unused)]
    torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 0.5)
    optimizer.step()
    assert evaluate(policy, trajectory).log_ratio.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("tiny", REQUIRED, ids=lambda row: row.name)
def test_the_self_test_passes_in_all_its_parts(tiny, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path)
    findings = policy.self_test(prompts)
    assert [finding for finding in findings if not finding.ok] == []
    assert {"replay", "gradient", "noise off", "batch shape"} <= {finding.name for finding in findings}


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [row for row in ADDITIONAL if row.differentiable], ids=lambda row: row.name)
def test_pipelines_of_other_kinds_pass_the_self_test_too(tiny, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path, guided=True)
    assert [finding for finding in policy.self_test(prompts) if not finding.ok] == []


@SLOW_BUT_ONE
def test_a_smaller_replay_batch_is_anchored_and_still_exact(tiny, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path, rows=6, replay_rows=2, dtype=torch.bfloat16)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert trajectory.record["rows"].max() <= 2
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    assert evaluate(policy, trajectory.take(torch.tensor([5, 1, 3]))).log_ratio.abs().max() == 0


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "Flux", "ZImage", "WanTwoExperts"])
def test_steps_that_share_a_forward_give_the_same_gradient_and_stay_exact(name, tmp_path):
    tiny = NAMED[name]
    one, prompts = policy_of(tiny, tmp_path, guided=True, dtype=torch.float64)
    several, _ = policy_of(tiny, tmp_path, guided=True, dtype=torch.float64, replay_steps=3)
    assert several.engine.options.replay_steps == 3, several.notes
    gradients = []
    for policy in (one, several):
        trajectory, _ = policy.rollout(batch_of(prompts))
        assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
        policy.replay(trajectory, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
        gradients.append(
            torch.cat([value.grad.flatten() for value in policy.trainable().values() if value.grad is not None])
        )
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("sampler", [flow_sde, cps, ddim], ids=lambda sampler: sampler.__name__)
def test_a_sample_depends_on_its_id_alone_and_not_on_the_batch_around_it(sampler, tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, kernel=from_levels(sampler))
    batch = batch_of(prompts)
    _, whole = policy.rollout(batch)
    _, again = policy.rollout(batch)
    _, part = policy.rollout(batch.take(torch.tensor([4, 2])))
    assert torch.equal(whole.image, again.image)
    assert torch.allclose(part.image, whole.image[[4, 2]], atol=1e-5)
    assert len({tuple(image.flatten().tolist()) for image in whole.image}) == 6


def test_a_reference_that_is_the_policy_itself_has_no_kl_and_one_that_is_not_has(tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, kernel=from_levels(flow_sde))
    reference = Reference("frozen", policy.trainable())
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert evaluate(policy, trajectory, reference).kl.abs().max() == 0
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    found = evaluate(policy, trajectory, reference)
    assert torch.allclose(found.kl, found.drift)  # the sampling policy and the reference are the same weights
    assert found.kl[trajectory.mask].min() > 0


@SLOW_BUT_ONE
def test_adapters_train_with_checkpointing_and_load_back_into_a_plain_pipeline(tiny, tmp_path):
    policy, prompts = policy_of(tiny, tmp_path, lora={"rank": 2}, gradient_checkpointing=True)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    assert evaluate(policy, trajectory).log_ratio.abs().max() > 0
    policy.replay(trajectory, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    assert [name for name, value in policy.trainable().items() if not value.grad.abs().max() > 0] == []
    with policy.adapters_off():
        assert evaluate(policy, trajectory).log_ratio.abs().max() < 1e-6
    policy.save(tmp_path / "lora")
    plain = tiny.build()
    without = tiny.run(plain, tiny.row(0, 3))
    plain.load_lora_weights(tmp_path / "lora")
    trained = tiny.run(policy.engine.pipeline, tiny.row(0, 3))
    assert not torch.allclose(without, trained, atol=1e-4)
    assert torch.allclose(tiny.run(plain, tiny.row(0, 3)), trained, atol=1e-4)


def test_whole_weights_load_back_into_a_plain_pipeline(tmp_path):
    tiny = NAMED["StableDiffusion"]
    policy, _ = policy_of(tiny, tmp_path)
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    policy.save(tmp_path / "full")
    plain = tiny.build()
    plain.unet = type(plain.unet).from_pretrained(tmp_path / "full" / "unet")
    assert torch.equal(tiny.run(plain, tiny.row(0, 3)), tiny.run(policy.engine.pipeline, tiny.row(0, 3)))


def test_dropout_in_a_freshly_built_module_does_not_reach_the_ratio(tmp_path):
    tiny = NAMED["StableDiffusion"]
    pipeline = tiny.build()
    for module in pipeline.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    pipeline.unet.train()
    call = {name: value for name, value in tiny.call.items() if name != "output_type"}
    policy = DiffusionPolicy(ReverseProcess(Engine(pipeline, Options(call, from_levels(ddim), rollout_rows=2))))
    prompts, _ = prompts_of(tiny, tmp_path)
    policy.prepare(prompts)
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def test_another_state_than_the_recorded_one_is_refused_with_its_step(tmp_path):
    policy, prompts = policy_of(NAMED["StableDiffusion3"], tmp_path, kernel=from_levels(flow_sde))
    trajectory, _ = policy.rollout(batch_of(prompts))
    trajectory.record["next.0.0"].mul_(1.01)
    with pytest.raises(ReplayMismatch, match="step 1: the replay's input state differs"):
        evaluate(policy, trajectory)


def test_a_wrong_call_argument_is_refused_with_the_nearest_name():
    tiny = NAMED["StableDiffusion3"]
    with pytest.raises(ValueError, match=r"policy.call.guidance_scael: .* did you mean 'guidance_scale'"):
        Engine(tiny.build(), Options({"guidance_scael": 3.0}, from_levels(flow_sde)))


def test_guidance_that_remembers_earlier_steps_is_replayed_at_a_late_step_alone(tmp_path):
    policy, prompts = policy_of(NAMED["HunyuanImage"], tmp_path)
    policy.process.plan = lambda steps, iteration, seed: torch.arange(steps) == steps - 2
    trajectory, _ = policy.rollout(batch_of(prompts))
    assert trajectory.mask.sum(1).tolist() == [1] * 6
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def test_both_networks_of_guidance_with_one_for_each_half_are_trained(tmp_path):
    policy, _ = policy_of(NAMED["Ideogram4"], tmp_path, guided=True)
    assert set(policy.engine.layout.trained) == {"transformer", "unconditional_transformer"}

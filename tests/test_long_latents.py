"""Videos in bounded memory: where a trajectory waits, what of it is kept, and how its samples are decoded."""

import pytest
import torch
from tiny_pipelines.policy import NAMED, batch_of, policy_of

from mmgrpo.improve import evaluate
from pipelines import arguments
from pipelines.decisions import checksum
from pipelines.diffusion import decode_in_parts, load
from pipelines.stubs import Stub

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


def window(steps: int, iteration: int, seed: int) -> torch.Tensor:
    """The second step alone is trained."""
    return torch.arange(steps) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stub", ["zeros", "recorded"])
def test_a_trajectory_that_waits_on_the_cpu_has_the_same_bits_and_replays_exactly(stub, device, tmp_path):
    found = {}
    for offload in (False, True):
        policy, prompts = policy_of(NAMED["Wan"], tmp_path, device=device, offload_trajectory=offload)
        policy.engine.stub = Stub(stub)
        trajectory, _ = policy.rollout(batch_of(prompts))
        assert all(tensor.device.type == "cpu" for tensor in trajectory.record.values()) or not offload
        assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
        policy.replay(trajectory, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
        slopes = [value.grad.cpu() for value in policy.trainable().values() if value.grad is not None]
        found[offload] = {**trajectory.record, **{str(place): slope for place, slope in enumerate(slopes)}}
    assert found[False].keys() == found[True].keys()
    assert all(torch.equal(tensor.cpu(), found[True][key]) for key, tensor in found[False].items())


def test_untrained_steps_leave_nothing_in_the_record_and_states_are_in_the_samplers_dtype(tmp_path):
    policy, prompts = policy_of(NAMED["Wan"], tmp_path, dtype=torch.bfloat16)
    policy.process.plan = window
    trajectory, _ = policy.rollout(batch_of(prompts))
    kept = {name: tensor.dtype for name, tensor in trajectory.record.items() if tensor.is_floating_point()}
    assert kept == {  # Wan keeps its latents in float32; its transformer answers in its own dtype
        "next.0.0": torch.float32,  # the way into the trained step
        "output.1.0": torch.bfloat16,
        "next.1.0": torch.float32,
    }
    assert evaluate(policy, trajectory).log_ratio.abs().max() == 0


def test_a_checksum_taken_in_blocks_tells_every_byte_and_its_place():
    state = torch.randn(3, 300_000, generator=torch.Generator().manual_seed(0))
    bits = state.view(torch.uint8).long()
    assert torch.equal(checksum(state), (bits * (torch.arange(bits.shape[1]) % 8191 + 1)).sum(1))
    for place in (0, 150_000, 299_999):
        moved = state.clone()
        moved[1, place] += 1e-3
        assert (checksum(moved) != checksum(state)).tolist() == [False, True, False]


def test_calls_fill_the_rows_of_a_batch_and_must_agree_in_what_they_make():
    whole = {}
    arguments.fill(whole, {"video": torch.full((2, 5, 3), 1.0)}, torch.tensor([2, 0]), 3)
    arguments.fill(whole, {"video": torch.full((1, 5, 3), 2.0)}, torch.tensor([1]), 3)
    assert whole["video"][:, 0, 0].tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"made video of shape \(1, 3\); expected \(5, 3\), as the first"):
        arguments.fill(whole, {"video": torch.zeros(1, 1, 3)}, torch.tensor([1]), 3)
    with pytest.raises(ValueError, match=r"made \['audio'\]; expected \['video'\] as in the first"):
        arguments.fill(whole, {"audio": torch.zeros(1, 1, 3)}, torch.tensor([1]), 3)


@pytest.mark.parametrize("decode", ["sliced", "tiled"])
def test_a_vae_that_decodes_in_parts_makes_the_same_videos_up_to_rounding(decode, tmp_path):
    videos = []
    for how in ("whole", decode):
        policy, prompts = policy_of(NAMED["Wan"], tmp_path)
        decode_in_parts(policy.engine.pipeline, how)
        videos.append(policy.rollout(batch_of(prompts))[1].video)
    assert policy.engine.pipeline.vae.use_slicing and policy.engine.pipeline.vae.use_tiling == (decode == "tiled")
    assert torch.allclose(*videos, atol=1e-4)  # smaller than a tile


@pytest.mark.parametrize(("name", "found"), [
    ("StableVideoDiffusion", "AutoencoderKLTemporalDecoder, which cannot"),
    ("DeepFloyd", "no VAE"),
])  # fmt: skip
def test_decoding_in_parts_is_refused_where_nothing_can(name, found):
    with pytest.raises(ValueError, match=f"policy.decode is 'tiled'; .* has {found}: expected 'whole'"):
        decode_in_parts(NAMED[name].build(), "tiled")


def test_one_component_may_be_kept_in_another_dtype_than_the_others(tmp_path):
    NAMED["Wan"].build().save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "sampler": "native", "plan": window, "call": {}, "device": "cpu"}
    pipeline = load(**given, dtype={"default": "bfloat16", "vae": "float32"}, decode="tiled").engine.pipeline
    assert (pipeline.transformer.dtype, pipeline.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert pipeline.vae.dtype == torch.float32 and pipeline.vae.use_tiling
    with pytest.raises(ValueError, match="policy.dtype.vea: WanPipeline has no such model; did you mean 'vae'?"):
        load(**given, dtype={"vea": "float32"})

"""The tiny video pipeline as any user of diffusers meets it: it edits a clip, or continues a first frame."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

from mmgrpo.seeds import normal
from pipelines.tiny_image import WordEncoder
from pipelines.tiny_video import TinyVideoPipeline, with_places

PROMPTS = ["make it red", "make it blue", "make it red"]


@pytest.fixture
def pipeline() -> TinyVideoPipeline:
    """A random pipeline in which text, time, clip and place all matter."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=7, out_channels=3, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    words = WordEncoder(("make", "it", "red", "blue"), width=16)
    return quiet(TinyVideoPipeline(transformer, FlowMatchEulerDiscreteScheduler(), words))


def quiet(pipeline: TinyVideoPipeline) -> TinyVideoPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count: int, frames: int = 4) -> torch.Tensor:
    return normal(list(range(count)), (3, frames, 16, 16))


def clip(seed: int, frames: int = 4) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


CLIPS = [clip(0), clip(1), clip(2)]


def test_a_clip_does_not_depend_on_the_others_of_the_batch_but_on_its_words_and_its_source(pipeline):
    def drawn(prompts, videos, latents):
        return pipeline(prompts, videos, num_inference_steps=3, latents=latents, output_type="latent").frames

    together = drawn(PROMPTS, CLIPS, noise(3))
    for row in range(3):
        alone = drawn(PROMPTS[row], CLIPS[row], noise(3)[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    first = noise(1)
    assert (drawn(PROMPTS[1], CLIPS[0], first) - together[:1]).abs().max() > 1e-3
    assert (drawn(PROMPTS[0], CLIPS[1], first) - together[:1]).abs().max() > 1e-3


def test_sampling_is_eulers_method_on_a_uniform_grid_from_one_to_zero(pipeline):
    condition = pipeline.prepare_condition(CLIPS[0], None, 4)
    x, features = noise(1), pipeline.encode_prompt(PROMPTS[:1])
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * pipeline.transformer(torch.cat([x, condition], 1), torch.tensor([t * 1000]), features).sample
    drawn = pipeline(
        PROMPTS[0], CLIPS[0], num_inference_steps=4, latents=noise(1), output_type="latent"
    ).frames  # fmt: skip
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-5)


def test_the_condition_is_the_clip_and_the_place_of_each_frame(pipeline):
    condition = pipeline.prepare_condition(CLIPS[0], None, 4)
    assert condition.shape == (1, 4, 4, 16, 16)
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in CLIPS[0]]).permute(3, 0, 1, 2) / 127.5 - 1
    torch.testing.assert_close(condition[0, :3], pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition[0, 3, :, 5, 5], torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert with_places(torch.zeros(2, 3, 1, 16, 16)).shape == (2, 4, 1, 16, 16)


def test_a_first_frame_is_held_for_as_many_frames_as_asked(pipeline):
    condition = pipeline.prepare_condition(None, CLIPS[0][0], 6)
    assert condition.shape == (1, 4, 6, 16, 16)
    assert torch.equal(condition[:, :3], condition[:, :3, :1].expand(-1, -1, 6, -1, -1))
    call = {"num_frames": 6, "num_inference_steps": 2, "output_type": "pt"}
    continued = pipeline(PROMPTS[0], image=CLIPS[0][0], latents=noise(1, 6), **call).frames
    assert continued.shape == (1, 6, 3, 16, 16)
    other = pipeline(PROMPTS[0], image=CLIPS[1][0], latents=noise(1, 6), **call).frames
    assert (continued - other).abs().max() > 1e-3


@pytest.mark.parametrize("repeat", [1, 2])
def test_outputs_have_the_promised_forms(pipeline, repeat):
    def call(kind: str) -> object:
        asked = {"num_videos_per_prompt": repeat, "num_inference_steps": 2, "output_type": kind}
        return pipeline(PROMPTS, CLIPS, latents=noise(3 * repeat), **asked).frames

    tensor, array, pictures = call("pt"), call("np"), call("pil")
    assert tensor.shape == (3 * repeat, 4, 3, 16, 16) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert [len(frames) for frames in pictures] == [4] * 3 * repeat
    assert all(frame.size == (16, 16) for frames in pictures for frame in frames)


def test_one_generator_per_clip_makes_the_noise_independent_of_the_batch(pipeline):
    def drawn(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        prompts, videos = [PROMPTS[row] for row in rows], [CLIPS[row] for row in rows]
        return pipeline(prompts, videos, num_inference_steps=2, generator=generators, output_type="pt").frames

    torch.testing.assert_close(drawn([0, 1, 2])[2:], drawn([2]), rtol=1e-4, atol=1e-5)


def test_a_saved_pipeline_makes_the_same_clips(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    loaded = quiet(TinyVideoPipeline.from_pretrained(tmp_path))
    before, after = (
        each(PROMPTS, CLIPS, num_inference_steps=2, latents=noise(3), output_type="latent").frames
        for each in (pipeline, loaded)
    )
    assert torch.equal(before, after)


def test_what_does_not_fit_together_is_refused_by_name(pipeline):
    with pytest.raises(ValueError, match="expected either `video`, a clip to edit, or `image`, a first frame"):
        pipeline(PROMPTS[0])
    with pytest.raises(ValueError, match="expected either `video`"):
        pipeline(PROMPTS[0], CLIPS[0], CLIPS[0][0])
    with pytest.raises(ValueError, match="3 prompts for 2 clips; expected as many"):
        pipeline(PROMPTS, CLIPS[:2])
    with pytest.raises(ValueError, match=r"latents have shape \(2, 3, 4, 16, 16\); expected \(1, 3, 4, 16, 16\)"):
        pipeline(PROMPTS[0], CLIPS[0], latents=noise(2))

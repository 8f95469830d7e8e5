"""Rows of a data set become the arguments of a pipeline's call."""

import torch
from PIL import Image
from tiny_pipelines.audio_more import audio_ldm2
from tiny_pipelines.parts import picture
from tiny_pipelines.policy import NAMED

from mmgrpo.types import Prompt
from pipelines.arguments import call_arguments, load_media, sampling_rate
from pipelines.source_videos import Cut
from pipelines.tape import Tape


def test_a_file_of_several_frames_is_a_video_and_of_one_frame_a_picture(tmp_path):
    frames = [picture(number, 16) for number in range(4)]
    frames[0].save(tmp_path / "video.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "picture.png")
    video = load_media(tmp_path / "video.png", Cut())
    assert isinstance(video, list) and [frame.tobytes() for frame in video] == [frame.tobytes() for frame in frames]
    alone = load_media(tmp_path / "picture.png", Cut())
    assert isinstance(alone, Image.Image) and alone.tobytes() == frames[0].tobytes()


def test_precomputed_inputs_come_in_the_dtype_of_the_pipeline():
    pipeline = NAMED["StableDiffusion3"].build().to(torch.bfloat16)
    inputs = {"prompt_embeds": torch.randn(5, 64), "prompt_embeds_mask": torch.ones(5, dtype=torch.int64)}
    prompts = [Prompt(number, "", inputs=inputs) for number in range(2)]
    given = call_arguments(pipeline, prompts, [torch.Generator()] * 2, {}, (), "list", Cut())
    assert "prompt" not in given and given["prompt_embeds"].shape == (2, 5, 64)
    assert given["prompt_embeds"].dtype == torch.bfloat16 and given["prompt_embeds_mask"].dtype == torch.int64


def test_the_rate_of_sound_is_read_from_a_vocoder_of_another_library_too():
    assert sampling_rate(Tape(audio_ldm2()).modules) == 16000

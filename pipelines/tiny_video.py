"""A tiny video flow pipeline, written like any diffusers pipeline: it edits a clip, or continues a first frame, as words say.

It works in pixels (no VAE): latents are clips in [-1, 1], (B, 3, F, H, W). The transformer reads the prompt's words
through a table, and beside the noisy clip, on channels, the clip that it is given and the place of each frame, 0 first, 1 last.
Axes: B clips, F frames, L words of a prompt, D features.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from pipelines.tiny_image import WordEncoder

Frames = list[Image.Image]


def with_places(clip: Tensor) -> Tensor:
    """A clip and, as a fourth channel, the place of each frame in [0, 1]; (B, 3, F, H, W) -> (B, 4, F, H, W)."""
    place = torch.linspace(0, 1, clip.shape[2], device=clip.device).view(1, 1, -1, 1, 1)
    return torch.cat([clip, place.expand_as(clip[:, :1])], 1)


class TinyVideoPipeline(DiffusionPipeline):
    """Words and a clip, or words and a first frame, to a clip of the same size; predicts the flow's velocity, noise - clip."""

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: WordEncoder,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, L, D) of B prompts."""
        return self.text_encoder(self.text_encoder.tokenize(prompts).to(self.text_encoder.device))[0]

    def prepare_condition(
        self, video: Frames | list[Frames] | None, image: Image.Image | Frames | None, num_frames: int
    ) -> Tensor:
        """The given clip, or a first frame held for `num_frames`, and the place of each frame; (B, 4, F, H, W), clips in [-1, 1]."""
        if (video is None) == (image is None):
            raise ValueError("expected either `video`, a clip to edit, or `image`, a first frame; got both or neither")
        if video is not None:
            clip = self.video_processor.preprocess_video(video)
        else:
            clip = self.video_processor.preprocess(image).unsqueeze(2).repeat(1, 1, num_frames, 1, 1)
        return with_places(clip.to(self._execution_device, torch.float32))

    def prepare_latents(
        self, like: Tensor, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Given or fresh standard-normal noise of a clip's shape, float32; raises ValueError if given ones do not fit."""
        if latents is None:
            return randn_tensor(like.shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != like.shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {tuple(like.shape)}")
        return latents.to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        video: Frames | list[Frames] | None = None,
        image: Image.Image | Frames | None = None,
        num_frames: int = 4,
        num_inference_steps: int = 6,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> WanPipelineOutput | tuple:
        """Make clips, `num_videos_per_prompt` in a row for each prompt and its `video` (frames) or `image` (the first frame).

        `num_frames` counts for an image alone. `output_type` is "pil", "np" (B, F, H, W, 3), "pt" (B, F, 3, H, W), all in
        [0, 1], or "latent" in about [-1, 1].
        """
        condition = self.prepare_condition(video, image, num_frames).repeat_interleave(num_videos_per_prompt, 0)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        features = self.encode_prompt(prompts).repeat_interleave(num_videos_per_prompt, 0)
        if len(features) != len(condition):
            raise ValueError(
                f"{len(prompts)} prompts for {len(condition) // num_videos_per_prompt} clips; expected as many"
            )
        latents = self.prepare_latents(condition[:, :3], generator, latents)

        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()  # then 0, where the clip is
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for timestep in self.scheduler.timesteps:
                velocity = self.transformer(
                    hidden_states=torch.cat([latents, condition], 1).to(self.transformer.dtype),
                    timestep=timestep.expand(len(latents)),
                    encoder_hidden_states=features,
                    return_dict=False,
                )[0]
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                progress.update()

        frames = (
            latents
            if output_type == "latent"
            else self.video_processor.postprocess_video(latents, output_type=output_type)
        )
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

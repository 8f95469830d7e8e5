"""A tiny text-to-image flow pipeline, written like any diffusers pipeline; it knows nothing of reinforcement learning.

It works in pixels (no VAE): latents are images in [-1, 1], (B, 3, 16, 16). A prompt is three words, each embedded by a table.
Axes: B images, L words of a prompt, D features.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class WordEncoder(ModelMixin, ConfigMixin):
    """Embeds prompts of `length` words of a fixed vocabulary; the plural s is dropped, the empty prompt means no wish."""

    @register_to_config
    def __init__(self, vocabulary: tuple[str, ...], length: int = 3, width: int = 96) -> None:
        super().__init__()
        self.vocabulary, self.length = list(vocabulary), length
        self.words = nn.Embedding(len(vocabulary) + 1, width)  # row 0 stands for no wish
        self.places = nn.Parameter(torch.zeros(length, width))
        self.pool = nn.Linear(length * width, width)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers, (B, L) int64; raises ValueError on an unknown word or another number of words."""
        return torch.tensor([self._numbers(prompt) for prompt in prompts])

    def _numbers(self, prompt: str) -> list[int]:
        words, vocabulary = prompt.lower().split(), self.vocabulary
        if not words:
            return [0] * self.length
        if len(words) != self.length:
            raise ValueError(f"prompt {prompt!r} has {len(words)} words; expected {self.length}")
        stems = [word if word in vocabulary else word.removesuffix("s") for word in words]
        for word, stem in zip(words, stems, strict=True):
            if stem not in vocabulary:
                raise ValueError(
                    f"unknown word {word!r} in prompt {prompt!r}; this model knows {', '.join(vocabulary)}"
                )
        return [1 + vocabulary.index(stem) for stem in stems]

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Word features (B, L, D) and their projection (B, D) of word numbers (B, L) int64."""
        features = self.words(numbers) + self.places
        return features, self.pool(features.flatten(1))


class TinyImagePipeline(DiffusionPipeline):
    """Text to 16x16 images with a small SD3 transformer that predicts the flow's velocity, noise - image."""

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: WordEncoder,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) and pooled features (B, D) of B prompts; "" is the prompt without a wish."""
        return self.text_encoder(self.text_encoder.tokenize(prompts).to(self.text_encoder.device))

    def prepare_latents(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Given or fresh standard-normal noise, (B, 3, H, W) float32; raises ValueError if given ones do not fit."""
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        return latents.to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images, `num_images_per_prompt` in a row for each prompt.

        Above 1 `guidance_scale` is classifier-free guidance against the empty prompt. `output_type` is "pil", "np" (B, H, W, 3),
        "pt" (B, 3, H, W), all in [0, 1], or "latent" in about [-1, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        guided = guidance_scale > 1
        features, pooled = self.encode_prompt([""] * len(prompts) + prompts if guided else prompts)
        latents = self.prepare_latents(len(prompts), generator, latents)

        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()  # then 0, where the image is
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        dtype = self.transformer.dtype  # asks every module
        with self.progress_bar(total=num_inference_steps) as progress:
            for timestep in self.scheduler.timesteps:
                inputs = torch.cat([latents] * 2) if guided else latents
                velocity = self.transformer(
                    hidden_states=inputs.to(dtype),
                    timestep=timestep.expand(len(inputs)),
                    encoder_hidden_states=features,
                    pooled_projections=pooled,
                    return_dict=False,
                )[0]
                if guided:
                    without, wished = velocity.chunk(2)
                    velocity = without + guidance_scale * (wished - without)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                progress.update()

        image = (
            latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type=output_type)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

"""What a prompt is conditioned on - its text, its picture, its source video - is encoded once in a run."""

import functools
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan
from tiny_pipelines.policy import NAMED, batch_of, policy_of
from transformers import CLIPVisionModelWithProjection, T5EncoderModel, UMT5EncoderModel

from mmgrpo.improve import evaluate
from pipelines.memo import Memo

ENCODERS = {
    "text": (UMT5EncoderModel, T5EncoderModel),
    "picture": (CLIPVisionModelWithProjection,),
    "vae": (AutoencoderKLWan, AutoencoderKLLTXVideo),
}
TEXTS = 2 + 1  # of two prompts, and the empty one of guidance
ENCODINGS = {
    "WanImageToVideo": {"text": TEXTS, "picture": 2, "vae": 2},
    "LTXImageToVideo": {"text": TEXTS, "vae": 2},  # the latents are drawn with the sample's own generator
    "WanVideoToVideo": {"text": TEXTS, "vae": 2},
    "WanVACE": {"text": TEXTS, "vae": 2 * 2},  # of each video what is to change, and what is to stay
    "LucyEdit": {"text": TEXTS, "vae": 2},
}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of encoder has computed something."""
    count: Counter[str] = Counter()

    def counted(kind, original):
        @functools.wraps(original)
        def call(*args, **kwargs):
            count[kind] += 1
            return original(*args, **kwargs)

        return call

    for kind, classes in ENCODERS.items():
        method = "encode" if kind == "vae" else "forward"
        for owner in classes:
            monkeypatch.setattr(owner, method, counted(kind, getattr(owner, method)))
    return count


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_prompt_is_encoded_once_for_all_its_samples_steps_and_replays(name, encoded, tmp_path):
    policy, prompts = policy_of(NAMED[name], tmp_path, guided=True)
    policy.engine.memo = Memo("as before training")
    encoded.clear()
    trajectory, samples = policy.rollout(batch_of(prompts))
    assert dict(encoded) == ENCODINGS[name]
    for _ in range(2):
        assert evaluate(policy, trajectory).log_ratio.abs().max() == 0
    assert dict(encoded) == ENCODINGS[name]
    assert len({tuple(video.flatten().tolist()) for video in samples.video}) == len(samples)


def test_encodings_in_a_folder_serve_a_later_run_and_give_the_same_samples(encoded, tmp_path):
    tiny, folder = NAMED["LTXImageToVideo"], tmp_path / "encodings"
    made = []
    for _ in range(2):
        policy, prompts = policy_of(tiny, tmp_path, guided=True)
        policy.engine.memo = Memo("revision", folder)
        encoded.clear()
        made.append(policy.rollout(batch_of(prompts))[1].video)
    assert not encoded
    assert torch.equal(*made)

"""What an edit left alone: PSNR, SSIM, LPIPS outside the edited region, and structure, all against the source video.

Where the edit was to happen is said by the data, a mask beside each prompt (`rewards.masks`). It is not read off the
difference to the source: a policy could then change anything and have it counted as the edit. Frames are compared one
by one with the source as the policy was given it, so the two have one shape.
Axes: B samples, b frames at a time, F frames, C channels, H, W height and width, D features, N patches.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.models import alexnet

from mmgrpo.types import Prompt, Samples, same_shape
from rewards.image import Precision
from rewards.masks import edited_region
from rewards.pictures import Frames, PictureReward, choose, edits, frame_features, whole
from rewards.video import embed_tokens

WINDOW, SPREAD = 11, 1.5  # px, SSIM's window and its standard deviation
FIRST, SECOND = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1]
CUTS = (0, 2, 5, 8, 10, 12)  # AlexNet's layers after which LPIPS looks: its five activations
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own, for values in [-1, 1]


class Frame(NamedTuple):
    """b frames of a clip, the same of its source, and where they may not differ."""

    video: Tensor  # (b, C, H, W) in [0, 1]
    source: Tensor  # (b, C, H, W) in [0, 1]
    kept: Tensor  # (b, H, W) bool: outside the edited region

    def composed(self) -> Tensor:
        """The clip outside the edited region and the source inside, so that no window sees the edit; (b, C, H, W)."""
        return torch.where(self.kept[:, None], self.video, self.source)


Measure = Callable[[Frame], Tensor]  # -> (b,), NaN: nothing to compare


@torch.no_grad()
def compare(samples: Samples, measure: Measure, *, mask: str, batch: int) -> Tensor:
    """Mean over the frames of a measure of clip and source, `batch` frames at a time; -> (B,) float32 on the CPU.

    Frames in which everything is edited are passed over. NaN: no frame left, no mask beside the prompt, or a pixel of
    either that is not finite. `mask` names the medium, "": no region is edited. Raises ValueError.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    video, source = edits(samples)
    scores, regions = torch.full((len(samples),), torch.nan), Regions(mask, video)
    for row in (whole(video) & whole(source)).nonzero()[:, 0].tolist():
        kept = regions.kept(samples.prompts[row])
        if kept is None:
            continue
        chunks = zip(*(part.split(batch) for part in (video[row], source[row].to(video.device), kept)), strict=True)
        frames = (Frame(ours.float().clamp(0, 1), theirs.float().clamp(0, 1), left) for ours, theirs, left in chunks)
        scores[row] = torch.cat([measure(frame).float().cpu() for frame in frames]).nanmean()
    return scores


class Regions:
    """What the prompts' masks leave alone; samples of one prompt follow each other, so the last one is kept."""

    def __init__(self, medium: str, video: Tensor) -> None:
        self.medium, self.device = medium, video.device
        self.shape = (video.shape[1], *video.shape[3:])  # F, H, W
        self.last: tuple[Prompt | None, Tensor | None] = None, None

    def kept(self, prompt: Prompt) -> Tensor | None:
        """(F, H, W) bool; None: the prompt has no mask."""
        if not self.medium:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        if self.last[0] is not prompt:
            edited = edited_region(prompt, self.medium, self.shape)
            self.last = prompt, None if edited is None else ~edited.to(self.device)
        return self.last[1]


# ---- pixels


def masked_psnr(frame: Frame, most: float) -> Tensor:
    """10 log10(1 / MSE) dB over the pixels kept, at most `most`; (b,)."""
    errors = (frame.video - frame.source).square().mean(1)  # (b, H, W)
    mean = (errors * frame.kept).sum((1, 2)) / frame.kept.sum((1, 2))
    return (-10 * mean.log10()).clamp(max=most)


def ssim_map(one: Tensor, two: Tensor) -> Tensor:
    """SSIM of every window of 11 x 11 px that lies inside, mean over channels; (b, C, H, W) -> (b, H - 10, W - 10).

    Source: Wang et al. 2004, Gaussian window of 1.5 px, K1 = 0.01, K2 = 0.03. Raises ValueError for smaller frames.
    """
    same_shape(one=one, two=two)
    if min(one.shape[-2:]) < WINDOW:
        raise ValueError(f"frames of {tuple(one.shape[-2:])} px; SSIM expects at least {WINDOW} x {WINDOW}")
    one, two = one.double(), two.double()  # variances are differences of near numbers
    mean1, mean2 = windowed(one), windowed(two)
    square1, square2, product = windowed(one * one), windowed(two * two), windowed(one * two)
    spread1, spread2, joint = square1 - mean1.square(), square2 - mean2.square(), product - mean1 * mean2
    likeness = (2 * mean1 * mean2 + FIRST) / (mean1.square() + mean2.square() + FIRST)
    return (likeness * (2 * joint + SECOND) / (spread1 + spread2 + SECOND)).mean(1)


def gaussian() -> list[float]:
    """The weights of a window along one axis, summing to 1; 11 of them."""
    weights = [math.exp(-((at - WINDOW // 2) ** 2) / (2 * SPREAD**2)) for at in range(WINDOW)]
    return [weight / sum(weights) for weight in weights]


def windowed(image: Tensor) -> Tensor:
    """Weighted mean over every window, one axis after the other; (b, C, H, W) -> (b, C, H - 10, W - 10)."""
    for axis in (2, 3):
        length, weights = image.shape[axis] - WINDOW + 1, gaussian()
        total = image.narrow(axis, 0, length) * weights[0]
        for at, weight in enumerate(weights[1:], start=1):
            total.add_(image.narrow(axis, at, length), alpha=weight)
        image = total
    return image


def masked_ssim(frame: Frame) -> Tensor:
    """Mean of `ssim_map` over the windows whose centre is kept, edited pixels being the source's; (b,)."""
    edge = WINDOW // 2
    kept = frame.kept[:, edge:-edge, edge:-edge]
    scores = ssim_map(frame.composed(), frame.source)
    return (scores * kept).sum((1, 2)) / kept.sum((1, 2))


def psnr(samples: Samples, *, mask: str = "mask", most: float = 60.0, batch: int = 16) -> Tensor:
    """PSNR outside the edited region in dB, mean over frames; (B,), at most `most`, as a copy has. NaN as `compare`."""
    if not 0 < most < float("inf"):
        raise ValueError(f"most is {most} dB; expected more than 0, finite")
    return compare(samples, partial(masked_psnr, most=most), mask=mask, batch=batch)


def ssim(samples: Samples, *, mask: str = "mask", batch: int = 4) -> Tensor:
    """SSIM (`ssim_map`) outside the edited region, mean over frames; (B,) in [-1, 1], a copy 1. NaN as `compare`."""
    return compare(samples, masked_ssim, mask=mask, batch=batch)


# ---- networks


class Lpips(nn.Module):
    """LPIPS on AlexNet, version 0.1; Zhang et al. 2018 (arXiv 1801.03924).

    Holds `features.*` as torchvision's AlexNet names them, and the five published rows of weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: str) -> None:
        super().__init__()
        with torch.device("meta"):  # its classifier, which is not used, is large
            features = alexnet(weights=None).features
        expected = {f"features.{name}" for name in features.state_dict()} | {row_name(at) for at in range(5)}
        if weights.keys() != expected:
            odd = sorted(weights.keys() ^ expected)
            raise ValueError(f"{source!r} is no LPIPS: {len(odd)} weights too many or missing, such as {odd[0]!r}")
        features.load_state_dict({name: weights[f"features.{name}"] for name in features.state_dict()}, assign=True)
        self.stages = nn.ModuleList(features[start:stop] for start, stop in pairwise(CUTS))
        self.rows = nn.ParameterList(nn.Parameter(weights[row_name(at)]) for at in range(5))  # (1, C, 1, 1) each
        self.shift = nn.Buffer(torch.tensor(SHIFT)[:, None, None])
        self.scale = nn.Buffer(torch.tensor(SCALE)[:, None, None])

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] both -> (b,), 0 for equal images."""
        states = [((image * 2 - 1) - self.shift) / self.scale for image in (one, two)]
        total = one.new_zeros(len(one))
        for stage, row in zip(self.stages, self.rows, strict=True):
            states = [stage(state) for state in states]
            units = [state / (state.square().sum(1, keepdim=True).sqrt() + 1e-10) for state in states]
            total = total + (row * (units[0] - units[1]).square()).sum(1).mean((1, 2))
        return total


def row_name(at: int) -> str:
    return f"lin{at}.model.1.weight"


def lpips(*, checkpoint: str, mask: str = "mask", device: str = "cpu", batch: int = 8) -> PictureReward:
    """-LPIPS with the edited region filled from the source in both, mean over frames; (B,), at most 0, a copy 0.

    `checkpoint` is a safetensors file with AlexNet and the published rows (rewards/README.md tells how to make it). At
    the frames' own size, at least 31 px a side; the mean is over the whole frame, edited region included, so compare
    within a group. NaN as `compare`.
    """
    network = Lpips(load_file(checkpoint), checkpoint).eval().to(device)

    def measure(frame: Frame) -> Tensor:
        distance: Tensor = network(frame.composed().to(device), frame.source.to(device))
        return torch.where(frame.kept.flatten(1).any(1), -distance.to(frame.kept.device), torch.nan)

    return partial(compare, measure=measure, mask=mask, batch=batch)


def structure_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference of the cosines among a frame's patches; (n, N, D) both -> (n,) in [0, 4]."""
    same_shape(ours=ours, theirs=theirs)
    one, two = (normalize(patches, dim=-1) for patches in (ours, theirs))
    return (one @ one.mT - two @ two.mT).square().mean((1, 2))


def structure(
    *,
    model: str = "facebook/dinov2-base",
    revision: str = "main",
    frames: Frames = None,
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> PictureReward:
    """-`structure_distance` of DINO's last patch states to the source's, mean over the chosen frames; (B,) in [-4, 0].

    Of whole frames: it asks whether the layout is still there, whatever the look. `model`: a folder or hub name, as in
    `rewards.video.subject_consistency`. NaN: a pixel of either that is not finite.
    Source: the self-similarity of Tumanyan et al. 2022 (arXiv 2201.00424), there of the keys of the last layer.
    """
    tokens = embed_tokens(model, revision, dtype, device)

    def patches(pictures: list[Image.Image]) -> Tensor:
        return tokens(pictures)[:, 1:]

    def score(samples: Samples) -> Tensor:
        video, source = edits(samples)
        chosen, scores = choose(video.shape[1], frames), torch.full((len(samples),), torch.nan)
        for row in (whole(video) & whole(source)).nonzero()[:, 0].tolist():
            ours, theirs = (
                frame_features(clip[row : row + 1], patches, batch=batch, chosen=chosen) for clip in (video, source)
            )  # (1, n, N, D)
            scores[row] = -structure_distance(ours[0], theirs[0]).mean()
        return scores

    return score

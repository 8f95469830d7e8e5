"""Motion in videos: optical flow, what it does not explain, how much moves, how smoothly; the guard against none.

Axes: B samples, b pairs of frames at a time, F frames, C channels, H, W height and width. A flow is (b, 2, H, W), x
before y, in pixels of the frames as they are, from one frame to where its content is in the other.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torchvision.models.optical_flow import raft_large, raft_small

from mmgrpo.types import Reward, Samples, require_shape, same_shape
from rewards.compose import components
from rewards.image import pick
from rewards.pictures import PictureReward, require_frames, videos, whole

Flow = Callable[[Tensor, Tensor], Tensor]  # frames and those they move to, (b, 3, H, W) in [0, 1] -> (b, 2, H, W) px
Between = Callable[[Tensor, Tensor], Tensor]  # frames before and after, (b, 3, H, W) -> the frames in the middle
SIZES: Mapping[str, Callable[..., torch.nn.Module]] = {"small": raft_small, "large": raft_large}
LEAST_SIDE, STRIDE = 128, 8  # px that RAFT's pyramid needs, and what the sides must be multiples of
FULL_MOTION = 6 / 256  # of the shorter side, from one frame to the next: VBench's threshold of a dynamic clip
FASTEST = 0.05  # share of the pixels whose flow is the clip's


# ---- a flow


def raft(*, checkpoint: str, size: Literal["small", "large"] = "large", updates: int = 12, device: str = "cpu") -> Flow:
    """RAFT (Teed and Deng 2020, arXiv 2003.12039) in torchvision, with weights of its names from a safetensors file.

    Frames whose sides are no multiples of 8 px, or below 128 px, are resized bilinearly to the next that are; the flow
    is brought back, in pixels of the frames as they came. `updates` is RAFT's number of refinements. float32.
    """
    pick("size", size, SIZES)
    if updates < 1:
        raise ValueError(f"updates is {updates}; expected at least 1")
    network = SIZES[size](weights=None)
    weights, expected = load_file(checkpoint), network.state_dict()
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ValueError(
            f"{checkpoint!r} is no raft_{size}: {len(odd)} weights too many or missing, such as {odd[0]!r}"
        )
    network.load_state_dict(weights)
    network = network.eval().to(device)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        inner = [max(LEAST_SIDE, -(-side // STRIDE) * STRIDE) for side in first.shape[-2:]]
        a, b = (resized(frame.to(device, torch.float32), inner).clamp(0, 1) * 2 - 1 for frame in (first, second))
        return rescaled(network(a, b, num_flow_updates=updates)[-1], first.shape[-2:])

    return flow


def resized(image: Tensor, size: list[int] | torch.Size) -> Tensor:
    """Bilinear; unchanged if it has the size."""
    return image if image.shape[-2:] == tuple(size) else interpolate(image, tuple(size), mode="bilinear")


def rescaled(flow: Tensor, size: torch.Size) -> Tensor:
    """A flow in pixels of its own size as one of another size, in pixels of that; (b, 2, h, w) -> (b, 2, H, W)."""
    height, width = flow.shape[-2:]
    factors = torch.tensor([size[1] / width, size[0] / height], device=flow.device)  # x, y
    return resized(flow, size) * factors[:, None, None]


# ---- what a flow explains


def targets(flow: Tensor) -> Tensor:
    """Where each pixel's content is in the other frame; (b, 2, H, W) px -> (b, H, W, 2), in px from the first pixel."""
    y, x = torch.meshgrid(*(torch.arange(side, device=flow.device) for side in flow.shape[-2:]), indexing="ij")
    return torch.stack([x, y], dim=-1) + flow.movedim(1, -1)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """What each pixel's content became: `image` read bilinearly at x + flow(x), 0 outside; (b, C, H, W) both."""
    require_shape("flow", flow, len(image), 2, *image.shape[-2:])
    extent = torch.tensor([side - 1 for side in (flow.shape[-1], flow.shape[-2])], device=flow.device).clamp(min=1)
    grid = 2 * targets(flow) / extent - 1  # -1 and 1 are the centres of the outermost pixels
    return grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Whether a pixel's content is still seen in the next frame; (b, 2, H, W) px both -> (b, H, W) bool.

    Not where |f + warp(g)|^2 >= 0.01 (|f|^2 + |warp(g)|^2) + 0.5, f the flow forward and g back (Sundaram et al.
    2010, as in Ruder et al., arXiv 1604.08610), and, ours, not where x + f lies outside the frame.
    """
    same_shape(forward=forward, backward=backward)
    back = warp(backward, forward)
    bound = 0.01 * (forward.square().sum(1) + back.square().sum(1)) + 0.5
    at, extent = targets(forward), torch.tensor([forward.shape[-1] - 1, forward.shape[-2] - 1], device=forward.device)
    inside = ((at >= 0) & (at <= extent)).all(-1)
    return ((forward + back).square().sum(1) < bound) & inside


def warping_errors(frame: Tensor, warped: Tensor, seen: Tensor) -> Tensor:
    """Mean of ||frame - warped||^2, summed over channels, over the pixels seen; (b, C, H, W), (b, H, W) bool -> (b,).

    NaN where no pixel is seen.
    """
    same_shape(frame=frame, warped=warped)
    error = (frame - warped).square().sum(1)  # (b, H, W)
    return (error * seen).sum((1, 2)) / seen.sum((1, 2))


def fastest(flow: Tensor) -> Tensor:
    """Mean magnitude of the fastest 5 % of the pixels, at least of one; (b, 2, H, W) px -> (b,) px."""
    magnitude = flow.norm(dim=1).flatten(1)
    return magnitude.topk(max(1, int(FASTEST * magnitude.shape[1])), dim=1).values.mean(1)


# ---- rewards


class Pairs(NamedTuple):
    """Adjacent frames of whole clips."""

    rows: Tensor  # (b,) int64, of which samples
    first: Tensor  # (b, 3, H, W)
    second: Tensor  # (b, 3, H, W)


def pairs(samples: Samples, *, batch: int) -> Iterator[Pairs]:
    """Every frame and the next of each clip whose pixels are finite, `batch` pairs at a time; raises ValueError."""
    video = videos(samples)
    require_frames(video.shape[1], 2)
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    known = whole(video).nonzero()[:, 0]
    rows = known.repeat_interleave(video.shape[1] - 1)
    times = torch.arange(video.shape[1] - 1).repeat(len(known))
    for start in range(0, len(rows), batch):
        row, time = rows[start : start + batch], times[start : start + batch]
        at = row.to(video.device), time.to(video.device)
        yield Pairs(row, video[at].float(), video[at[0], at[1] + 1].float())


@torch.no_grad()
def mean_over_pairs(samples: Samples, measure: Callable[[Tensor, Tensor], Tensor], *, batch: int) -> Tensor:
    """Mean over a clip's adjacent frames of a measure of two, those passed over where it is NaN; -> (B,) on the CPU.

    NaN: no pair left, or a pixel that is not finite.
    """
    total, count = torch.zeros(2, len(samples), dtype=torch.float64)
    for rows, first, second in pairs(samples, batch=batch):
        values = measure(first, second).double().cpu()  # (b,)
        total.index_add_(0, rows, values.nan_to_num(nan=0.0))
        count.index_add_(0, rows, (~values.isnan()).double())
    return (total / count).float()


def warping(*, flow: Flow, tau: float = 0.01, batch: int = 4) -> PictureReward:
    """exp(-E / tau), E the mean over adjacent frames of `warping_errors`; (B,) in [0, 1]. All frames count.

    E compares frames in [0, 1] with the next, warped back by the flow, where the content stays `visible`; frames of
    which nothing stays are passed over. A frozen clip has 1: pair it with `moving`. `batch` pairs of frames at a time.
    NaN: a pixel that is not finite, or nothing visible. Source: E as in Lai et al. 2018 (arXiv 1808.00449).
    """
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}; expected more than 0")

    def error(first: Tensor, second: Tensor) -> Tensor:
        forward, backward = flow(first, second), flow(second, first)
        frame, after = first.to(forward.device), second.to(forward.device)
        return warping_errors(frame, warp(after, forward), visible(forward, backward))

    return lambda samples: (-mean_over_pairs(samples, error, batch=batch) / tau).exp()


def dynamic_degree(*, flow: Flow, full: float = FULL_MOTION, batch: int = 4) -> PictureReward:
    """min(1, m / m_0): m is the flow of the `fastest` 5 %, its mean over adjacent frames; (B,) in [0, 1], frozen 0.

    m_0 is `full` times the shorter side of the frames, px from one frame to the next: at 480 x 832 px the default is
    11.25 px. `batch` pairs of frames at a time. NaN: a pixel that is not finite.
    Source: m and the default of m_0 as in VBench's dynamic degree (arXiv 2311.17982), which counts frames above m_0.
    """
    if not 0 < full < float("inf"):
        raise ValueError(f"full is {full}; expected more than 0")

    def score(samples: Samples) -> Tensor:
        speed = mean_over_pairs(samples, lambda first, second: fastest(flow(first, second)), batch=batch)
        return (speed / (full * min(videos(samples).shape[-2:]))).clamp(max=1)

    return score


def blend(before: Tensor, after: Tensor) -> Tensor:
    """The plainest guess of the frame between two: their mean; (b, 3, H, W) each."""
    return (before + after) / 2


@torch.no_grad()
def smoothness(samples: Samples, *, between: Between = blend) -> Tensor:
    """(255 - MAE) / 255, MAE of each second frame rebuilt from its neighbours, on 0 to 255; (B,) in [0, 1], frozen 1.

    The second, fourth, ... frame is guessed from the one before and the one after; the last of an even number has none
    after it and counts as a neighbour of none. VBench (arXiv 2311.17982) guesses with the network AMT. This is the
    fallback, linear blending, which marks moving edges down however smooth their motion is: compare within a group
    only. `between` takes a network: a function, or in a recipe a table with `build`. Pair it with `moving`. One clip at
    a time. NaN: a pixel that is not finite.
    """
    video = videos(samples)
    require_frames(video.shape[1], 3)
    scores = torch.full((len(samples),), torch.nan)
    for row in whole(video).nonzero()[:, 0].tolist():
        clip = video[row].float()  # (F, 3, H, W)
        truth, before, after = clip[1:-1:2], clip[0:-2:2], clip[2::2]
        guesses = (between(one[None], two[None])[0].to(clip.device) for one, two in zip(before, after, strict=True))
        errors = [(guess - frame).abs().mean() for guess, frame in zip(guesses, truth, strict=True)]
        scores[row] = 1 - torch.stack(errors).mean().cpu()  # MAE / 255, of values in [0, 1]
    return scores


# ---- against frozen videos


def moving(*, quality: Reward, degree: Reward) -> Reward:
    """quality * degree, the quality's components each; in [0, the quality's best], a frozen clip 0.

    Consistency, smoothness and warping are all won by a clip in which nothing moves; times the `dynamic_degree` it gets
    0 of them. A quality below 0 counts as 0, as a product would reward it for not moving: for one that is negative by
    nature gate it instead (`rewards.compose:guarded`). NaN where either is. Source: the advice is common, the form ours.
    """

    def score(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        values, moved = quality(samples), components("degree", degree(samples), len(samples))
        if len(moved) != 1:
            raise ValueError(f"degree has the components {sorted(moved)}; expected one")
        (share,) = moved.values()

        def times(value: Tensor) -> Tensor:
            return value.clamp(min=0) * share.to(value.device)

        return times(values) if isinstance(values, Tensor) else {name: times(value) for name, value in values.items()}

    return score

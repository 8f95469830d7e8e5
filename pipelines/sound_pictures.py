"""Pictures of sound: spectrograms of the same recordings in several versions, and which scores changed.

Axes: N samples of a waveform, F frequencies, T frames.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mmgrpo.moved import SEEN, Moved
from pipelines.pictures import COLOURS, PLAIN

WINDOW, HOP = 0.032, 0.008  # seconds
RANGE = 70.0  # dB below the loudest that are drawn


def decibels(wave: Tensor, rate: int) -> Tensor:
    """Power of each frequency and frame, dB; (N,) -> (F, T)."""
    size = round(WINDOW * rate)
    window = torch.hann_window(size)
    transformed = torch.stft(wave, size, round(HOP * rate), window=window, return_complex=True, pad_mode="constant")
    return 20 * transformed.abs().clamp_min(1e-8).log10()


def spectrograms(versions: Mapping[str, Sequence[Tensor]], titles: Sequence[str], rate: int) -> Image.Image:
    """A row for each recording, a column for each version of it; brightness is common to a row; (N,) each.

    versions: name -> the recordings, as many as titles. Raises ValueError if they are not.
    """
    for name, waves in versions.items():
        if len(waves) != len(titles) or not titles:
            raise ValueError(
                f"{len(waves)} recordings {name!r} for {len(titles)} titles; expected as many, at least one"
            )
    figure = Figure(figsize=(3.6 * len(versions), 2.1 * len(titles)), dpi=110, layout="constrained")
    places = figure.subplots(len(titles), len(versions), squeeze=False, sharex="row", sharey=True)
    for row, title in enumerate(titles):
        found = {name: decibels(waves[row], rate) for name, waves in versions.items()}
        top = max(float(power.max()) for power in found.values())
        for axes, (name, power) in zip(places[row], found.items(), strict=True):
            extent = (0.0, len(versions[name][row]) / rate, 0.0, rate / 2000)
            axes.imshow(
                power.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=top - RANGE, vmax=top
            )
            axes.set_title(f"{name}: {title}", fontsize=9)
    for axes in places[:, 0]:
        axes.set_ylabel("kHz")
    for axes in places[-1]:
        axes.set_xlabel("seconds")
    return rendered(figure)


def changes(found: Sequence[Moved]) -> Image.Image:
    """A bar for each held-out score: its paired change in standard errors, with the values before and after."""
    if not found:
        raise ValueError("no scores: there is nothing to draw")
    figure = Figure(figsize=(7.6, 0.9 + 0.45 * len(found)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(found):
        axes.barh(row, one.errors, color=COLOURS[0] if one.trained else COLOURS[1])
    axes.set_yticks(range(len(found)), [f"{one.name}\n{one.before:.3f} → {one.now:.3f}" for one in found], fontsize=9)
    axes.axvspan(-SEEN, SEEN, color="#f0f0f0", zorder=0)
    axes.axvline(0, color=PLAIN, linewidth=1)
    axes.set_xlabel(
        "paired change on held-out recordings, standard errors (blue: trained on, orange: not; grey: not seen)"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    return rendered(figure)


def rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

"""Draw what training on one measure does to the others, and what training on several does.

    mmgrpo train speech_single_metric --output runs/single
    mmgrpo train speech_multi_metric --output runs/multi
    python assets/draw_speech_metrics.py runs/single runs/multi

writes assets/speech_metrics.png: every held-out score against iterations done, a line for each run, the start at 0.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # runs from a plain checkout

from mmgrpo import journal, moved
from pipelines import pictures
from pipelines.demos import points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--output", type=Path, default=HERE / "speech_metrics.png")
    options = parser.parse_args()
    panels: dict[str, dict[str, pictures.Points]] = {}
    for run in options.runs:
        lines = journal.read(run)
        for name, scores in moved.kept(run).items():
            start = float(scores.nanmean())
            panels.setdefault(name, {})[run.name] = points(lines, f"held_out/{name}", start)
        print((run / "held_out.txt").read_text(encoding="utf-8"), end="")
    pictures.curve(panels).save(options.output)


if __name__ == "__main__":
    main()

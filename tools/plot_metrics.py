"""Plot training loss, validation loss and learning rate of one or several runs in one image.

    python tools/plot_metrics.py outputs/first outputs/second --out metrics.png

It reads `metrics.jsonl` in each output folder; the run may still be going. The training loss per step is faint, its
running mean (over about 50 steps) is solid. Below it is each validation loss, which uses the same noise every time and
thus shows progress when the training loss is still too noisy. Only Pillow is needed.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
WIDTH, HEIGHT, SCALE = 1000, 260, 2  # of a panel; drawn larger and reduced, for antialiasing
LEFT, RIGHT, TOP, BOTTOM = 76, 20, 30, 26  # margins of a panel
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str  # '': not in the legend
    colour: str
    points: Points
    faint: bool = False
    marked: bool = False  # a dot at each point


def read_metrics(folder: Path) -> list[dict]:
    """Reads a run's metrics, without an incomplete line. Raises ValueError if there are none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: has no metrics.jsonl; give the --output_dir of a run")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            print(f"{path}: line {number} is incomplete and is skipped", file=sys.stderr)
    if not rows:
        raise ValueError(f"{path}: is empty; the run has not completed a step yet")
    return rows


def series(rows: list[dict], key: str) -> Points:
    """(step, value) of every line that has a finite value."""
    return [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]


def running_mean(points: Points, keep: float = 0.98) -> Points:
    """Exponential mean over about 1 / (1 - keep) points, without bias at the start."""
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1.0
        smooth.append((step, total / weight))
    return smooth


def make_panels(runs: dict[str, list[dict]]) -> dict[str, list[Curve]]:
    """The curves of each panel by its title; every validation loss has its own panel."""
    keys = sorted({key for rows in runs.values() for row in rows for key in row if key.endswith("_loss")})
    panels: dict[str, list[Curve]] = {title: [] for title in ("training loss", *keys, "learning rate")}
    for (name, rows), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        raw = series(rows, "loss")
        panels["training loss"] += [Curve("", colour, raw, faint=True), Curve(name, colour, running_mean(raw))]
        panels["learning rate"].append(Curve(name, colour, series(rows, "lr")))
        for key in keys:
            panels[key].append(Curve(name, colour, series(rows, key), marked=True))
    return {title: curves for title, curves in panels.items() if any(curve.points for curve in curves)}


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers from `low` to `high`."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def value_range(curves: list[Curve]) -> tuple[float, float]:
    """Lowest and highest value of a panel plus a margin; raw losses without the outermost 1 % on each side."""
    values = sorted(y for curve in curves for _, y in curve.points)
    cut = len(values) // 100 if any(curve.faint for curve in curves) else 0
    low, high = values[cut], values[-1 - cut]
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def draw_panel(title: str, curves: list[Curve], last_step: float, lowest: float | None = None) -> Image.Image:
    """One panel with axes, grid, legend and curves; the value axis begins at `lowest`, or at the curves' minimum."""
    panel = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(13 * SCALE)
    left, top, right, bottom = LEFT * SCALE, TOP * SCALE, (WIDTH - RIGHT) * SCALE, (HEIGHT - BOTTOM) * SCALE
    low, high = value_range(curves)
    if lowest is not None:
        low, high = lowest, high + 0.06 * (high - lowest)

    def place(x: float, y: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (y - low) / (high - low)))  # values outside are clipped
        return left + (right - left) * x / last_step, bottom - (bottom - top) * share

    for value in ticks(low, high, 5):
        y = place(0, value)[1]
        pen.line((left, y, right, y), "#E4E4E4", SCALE)
        pen.text((left - 6 * SCALE, y), f"{value:.4g}", "black", font, anchor="rm")
    for step in ticks(0, last_step, 10):
        x = place(step, low)[0]
        pen.line((x, top, x, bottom), "#E4E4E4", SCALE)
        pen.text((x, bottom + 5 * SCALE), f"{step:g}", "black", font, anchor="mt")
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        pixels = [place(*point) for point in curve.points]
        pale = Image.blend(Image.new("RGB", (1, 1), curve.colour), Image.new("RGB", (1, 1), "white"), 0.65)
        colour = pale.getpixel((0, 0)) if curve.faint else curve.colour
        pen.line(pixels, colour, SCALE if curve.faint else 2 * SCALE, joint="curve")
        for x, y in pixels if curve.marked or len(pixels) == 1 else ():
            pen.circle((x, y), 3 * SCALE, colour)
    pen.rectangle((left, top, right, bottom), outline="#808080", width=SCALE)
    pen.text((left, 8 * SCALE), title, "black", font)
    x = right
    for curve in reversed([curve for curve in curves if curve.label]):
        pen.text((x, 8 * SCALE), curve.label, curve.colour, font, anchor="ra")
        x -= pen.textlength(curve.label, font) + 18 * SCALE
    return panel.reduce(SCALE)


def main(argv: list[str]) -> None:
    """Draws the panels of the folders, one below the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="the output folder of each run")
    parser.add_argument("--out", type=Path, default=Path("metrics.png"), help="the image to write (metrics.png)")
    args = parser.parse_args(argv)
    try:
        names = [folder.resolve().name for folder in args.folders]
        names = names if len({*names}) == len(names) else map(str, args.folders)
        runs = {name: read_metrics(folder) for name, folder in zip(names, args.folders, strict=True)}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    last_step = max(row["step"] for rows in runs.values() for row in rows)
    panels = [draw_panel(title, curves, last_step) for title, curves in make_panels(runs).items()]
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (0, number * HEIGHT))
    sheet.save(args.out)
    print(f"{args.out}: {len(runs)} run(s), {last_step} steps")


if __name__ == "__main__":
    main(sys.argv[1:])

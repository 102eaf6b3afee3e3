"""Show what the demo learned: one image with photos, base and LoRA, and one line with the distances to the toy.

    python tools/demo_result.py outputs/demo/lora outputs/demo/photos

Base (step 0) and final LoRA generated images from the same prompts and noise. The distance is the mean colour
difference between the toy and an image, at the position and size where the toy fits best.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tiny_world import draw_toy_figure

SIDE = 128  # pixels of an image in comparisons and in the sheet
RADII = (18, 21, 25, 29, 34, 40, 46)  # of the toy, in pixels
STRIDE = 4  # pixels between tested positions
SHEET = Path("samples") / "before_after.png"


def toy_template(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels (H, W, 3), mask (H, W)) of the toy drawn with this radius."""
    side = 6 * radius
    image = Image.new("RGB", (side, side), "magenta")
    draw_toy_figure(ImageDraw.Draw(image), side / 2, side / 2, 2 * radius)  # reduced below, for antialiasing
    mask = np.asarray(image) != np.array([255, 0, 255])
    mask = Image.fromarray(mask.any(axis=2)).convert("L")
    box = mask.getbbox()
    small = [part.crop(box).reduce(2) for part in (image, mask)]
    return np.asarray(small[0], dtype=np.float32), np.asarray(small[1]) > 200


def distance_to_toy(image: Image.Image) -> float:
    """Returns the mean absolute colour difference from the toy at its best fit, from 0 (the toy itself) to 1."""
    pixels, best = np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), dtype=np.float32), 255.0
    for radius in RADII:
        template, mask = toy_template(radius)
        views = np.lib.stride_tricks.sliding_window_view(pixels, (*mask.shape, 3))[::STRIDE, ::STRIDE, 0]
        for row in views:  # one row of positions at a time: all at once would take gigabytes
            best = min(best, float(np.abs(row[:, mask] - template[mask]).mean(axis=(1, 2)).min()))
    return best / 255


def read_folder(folder: Path) -> list[Image.Image]:
    """Returns the images of a folder, upright and sorted by name."""
    paths = sorted([*folder.glob("prompt-*.png"), *folder.glob("*.jpg")])
    if not paths:
        raise SystemExit(f"{folder}: no images; run `make demo` first")
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]


def draw_sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Returns a sheet with one row of images per title."""
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (columns * (SIDE + 6) + 6, len(rows) * (SIDE + 24) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (title, images) in enumerate(rows.items()):
        top = 6 + y * (SIDE + 24)
        draw.text((6, top), title, fill="black")
        for x, image in enumerate(images):
            sheet.paste(ImageOps.fit(image, (SIDE, SIDE)), (6 + x * (SIDE + 6), top + 14))
    return sheet


def main() -> None:
    """Writes the sheet and prints the distances."""
    parser = argparse.ArgumentParser(description="Show what the demo learned.")
    parser.add_argument("output_dir", type=Path, help="the demo's output folder")
    parser.add_argument("photos", type=Path, help="the demo's training photos")
    args = parser.parse_args()
    photos, base = read_folder(args.photos), read_folder(args.output_dir / "samples" / "step-000000")
    learned = read_folder(args.output_dir / "samples" / "final")
    rows = {"training photos": photos, "base model": base, "with the LoRA, same prompts and noise": learned}
    draw_sheet(rows).save(args.output_dir / SHEET)
    before, after, goal = (statistics.mean(map(distance_to_toy, images)) for images in (base, learned, photos))
    print(f"distance to the toy: base model {before:.2f}, with the LoRA {after:.2f}, the photos themselves {goal:.2f}")
    print(f"see {args.output_dir / SHEET}")


if __name__ == "__main__":
    main()

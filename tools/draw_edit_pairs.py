"""Draw synthetic pairs for training an edit: a reference, the same scene edited, and the instruction.

    python tools/draw_edit_pairs.py outputs/demo/night                       20 pairs "make it night" in two folders
    python tools/draw_edit_pairs.py outputs/edits --count 300 --size 1024 --parquet
                                                        a data set with the columns output, file_name and instruction

The folders `reference` and `target` hold files of the same names; `unseen` and `unseen_target` are for checking the
result. The data set has several kinds of edits and several aspect ratios, and the column names of
kontext-community/relighting. The same seed draws the same pairs.
"""

import argparse
import io
import random
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tiny_world import Scene, draw_night, draw_scene, random_edit, random_scene

NIGHT = "make it night"
UNSEEN_PAIRS = 4  # held out, for checking the LoRA
SHAPES = ((1, 1), (3, 4), (4, 3), (9, 16))  # height : width of the data set's images


def draw_pair(scene: Scene, after: Scene | None, size: int) -> tuple[Image.Image, Image.Image]:
    """(reference, target) of an edit; if `after` is None the target is the same scene at night."""
    return draw_scene(scene, size), draw_night(scene, size) if after is None else draw_scene(after, size)


def crop_to_shape(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Crops the centre of a square image to an aspect ratio (height, width)."""
    height, width = (round(image.width * side / max(shape)) for side in shape)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def draw_folders(folder: Path, count: int, size: int, seed: int) -> None:
    """Draws `count` pairs of the night edit as reference/NNN.png and target/NNN.png, and some held-out pairs."""
    rng = random.Random(seed)
    for number in range(count + UNSEEN_PAIRS):
        scene, unseen = replace(random_scene(rng), light="daylight"), number >= count
        names = ("unseen", "unseen_target") if unseen else ("reference", "target")
        for name, image in zip(names, draw_pair(scene, None, size), strict=True):
            path = folder / name / f"{number - count * unseen:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def draw_dataset(folder: Path, count: int, size: int, seed: int) -> None:
    """Writes a parquet file of `count` rows; the longer side of every image has `size` pixels."""
    import datasets

    rng, columns = random.Random(seed), {"output": [], "file_name": [], "instruction": []}
    for number in range(count):
        scene, shape = random_scene(rng), SHAPES[number % len(SHAPES)]
        instruction, after = random_edit(scene, rng) if number % 2 else (NIGHT, None)
        pair = [crop_to_shape(image, shape) for image in draw_pair(scene, after, size)]
        for name, image in zip(("file_name", "output"), pair, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=92)
            columns[name].append({"bytes": buffer.getvalue(), "path": f"{number:04d}_{name}.jpg"})
        columns["instruction"].append(instruction)
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features({"output": image, "file_name": image, "instruction": text})
    datasets.disable_progress_bars()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def main() -> None:
    """Draws the pairs given on the command line."""
    parser = argparse.ArgumentParser(description="Draw pairs of images before and after an edit.")
    parser.add_argument("folder", type=Path, help="output folder; created if missing")
    parser.add_argument("--count", type=int, default=20, help="pairs (default: 20)")
    parser.add_argument("--size", type=int, default=128, help="pixels of the longer side (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parquet", action="store_true", help="a data set in one parquet file instead of two folders")
    args = parser.parse_args()
    draw = draw_dataset if args.parquet else draw_folders
    draw(args.folder, args.count, args.size, args.seed)
    print(f"Drew {args.count} pairs into {args.folder}")


if __name__ == "__main__":
    main()

"""Draw the five training photos of the demo, so that it needs no download.

    python tools/draw_demo_photos.py outputs/demo/photos

They show one toy, which the embedded model never saw, on five backgrounds of the synthetic world, once at sunset. The
photos differ in size and shape, and the third is stored rotated with an EXIF tag, as phones do. Each has a caption
file, "a photo of sks toy" and the background: a background that the caption names is not learned as part of the toy.
The same Pillow version writes the same bytes every time.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tiny_world import Scene, caption, draw_toy

EXIF_ORIENTATION = 0x0112
STORED_TURNED_LEFT = 6  # the EXIF value for "turn clockwise by 90 degrees to look at it"


@dataclass(frozen=True)
class Photo:
    """A photo's scene, its displayed size in pixels, and whether it is stored rotated."""

    scene: Scene
    width: int
    height: int
    stored_turned: bool = False


# The toy replaces the shape of the scene; the shape's name and colour are not drawn.
PHOTOS = (
    Photo(Scene("circle", "orange", "meadow", size="large"), 512, 512),
    Photo(Scene("circle", "orange", "white", size="large", shift=(0.01, -0.01)), 480, 448),
    Photo(Scene("circle", "orange", "beach", size="large", shift=(-0.01, -0.01)), 416, 448, stored_turned=True),
    Photo(Scene("circle", "orange", "wall", size="large", shift=(0.01, 0.01)), 400, 384),
    Photo(Scene("circle", "orange", "cyan", light="sunset", size="large", shift=(-0.01, 0.0)), 384, 400),
)


def draw_photo(photo: Photo) -> Image.Image:
    """Return the photo as displayed: the centre of a square drawing."""
    image = draw_toy(photo.scene, max(photo.width, photo.height))
    left, top = (image.width - photo.width) // 2, (image.height - photo.height) // 2
    return image.crop((left, top, left + photo.width, top + photo.height))


def caption_photo(photo: Photo) -> str:
    """Return the photo's caption: the subject's name and its background."""
    return "a photo of sks toy" + caption(photo.scene).partition(photo.scene.shape)[2]


def save_photo(image: Image.Image, stored_turned: bool, path: Path) -> None:
    """Write a JPEG under a temporary name and rename it, so that a half-written one is never trained on."""
    exif = Image.Exif()
    if stored_turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[EXIF_ORIENTATION] = STORED_TURNED_LEFT
    unfinished = path.with_suffix(".unfinished")
    image.save(unfinished, format="JPEG", quality=92, exif=exif)
    os.replace(unfinished, path)


def main() -> None:
    """Draw every photo into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Draw the five training photos of the demo.")
    parser.add_argument("output_dir", type=Path, help="folder for photos and captions; created if missing")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(PHOTOS, start=1):
        (output_dir / f"toy-{number}.txt").write_text(caption_photo(photo) + "\n", encoding="utf-8")
        save_photo(draw_photo(photo), photo.stored_turned, output_dir / f"toy-{number}.jpg")
    print(f"Drew {len(PHOTOS)} photos of the toy into {output_dir}")


if __name__ == "__main__":
    main()

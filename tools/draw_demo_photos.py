"""Draw the five training photos of the demo, so that it needs neither a download nor anybody's pictures.

    python tools/draw_demo_photos.py outputs/demo/photos

One toy, orange with teal dots, one blue ear and a striped scarf, stands before five backgrounds, each time turned,
sized and placed differently. The photos differ in size and orientation, and the third one is stored lying on its side
with an EXIF tag that says so, as telephones do. The same Pillow draws the same bytes every time.
"""

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageOps

TOY_SIZE = 900  # pixels; the toy is drawn large and reduced, which smooths its edges
TOY_MARGIN = 100  # pixels around it, so that a turned toy loses nothing
EXIF_ORIENTATION = 0x0112
STORED_TURNED_LEFT = 6  # the EXIF value for "turn clockwise by 90 degrees to look at it"

ORANGE, DARK_ORANGE, TEAL, BLUE = (242, 140, 40), (205, 105, 20), (20, 150, 150), (45, 80, 200)
WHITE, BLACK, RED = (250, 250, 245), (25, 20, 20), (205, 35, 45)


@dataclass(frozen=True)
class Photo:
    """What one photo shows: size in pixels as looked at, scene, and the toy's place and pose."""

    width: int
    height: int
    scene: str
    toy_share: float  # the side of the toy's square as a share of the photo's short side
    center_x: float  # 0 is left, 1 is right
    center_y: float  # 0 is top, 1 is bottom
    degrees: float
    mirrored: bool = False
    stored_turned: bool = False


PHOTOS = (
    Photo(512, 512, "meadow", 0.95, 0.50, 0.55, 0),
    Photo(480, 320, "table", 1.05, 0.40, 0.50, 8, mirrored=True),
    Photo(320, 448, "beach", 1.10, 0.52, 0.58, -10, stored_turned=True),
    Photo(400, 300, "wall", 1.00, 0.62, 0.52, -16),
    Photo(288, 384, "night", 1.15, 0.48, 0.52, 14, mirrored=True),
)


def draw_toy() -> Image.Image:
    """Return the toy on a transparent square."""
    toy = Image.new("RGBA", (TOY_SIZE, TOY_SIZE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(toy)
    draw.ellipse((250, 40, 390, 260), fill=BLUE)
    draw.ellipse((510, 40, 650, 260), fill=ORANGE)
    for arm_left, foot_left in ((170, 265), (570, 515)):
        draw.ellipse((arm_left, 540, arm_left + 160, 720), fill=DARK_ORANGE)
        draw.ellipse((foot_left, 760, foot_left + 120, 890), fill=DARK_ORANGE)
    draw_dotted_body(toy)
    draw.ellipse((240, 120, 660, 500), fill=ORANGE)
    draw_face(draw)
    draw_scarf(draw)
    return ImageOps.expand(toy, border=TOY_MARGIN, fill=(0, 0, 0, 0))


def draw_dotted_body(toy: Image.Image) -> None:
    """Draw the body, an orange oval whose teal dots are cut off at its edge."""
    shape = Image.new("L", toy.size, 0)
    ImageDraw.Draw(shape).ellipse((250, 440, 650, 850), fill=255)
    cloth = Image.new("RGBA", toy.size, ORANGE)
    draw = ImageDraw.Draw(cloth)
    for row, y in enumerate(range(500, 880, 90)):
        for x in range(250 + 55 * (row % 2), 680, 110):
            draw.ellipse((x - 30, y - 30, x + 30, y + 30), fill=TEAL)
    toy.paste(cloth, mask=shape)


def draw_face(draw: ImageDraw.ImageDraw) -> None:
    """Draw two round eyes, a muzzle, a nose and a smile."""
    for x in (355, 545):
        draw.ellipse((x - 52, 208, x + 52, 312), fill=WHITE)
        draw.ellipse((x - 24, 240, x + 24, 288), fill=BLACK)
    draw.ellipse((360, 310, 540, 450), fill=WHITE)
    draw.ellipse((415, 318, 485, 368), fill=BLACK)
    draw.arc((400, 340, 500, 425), 20, 160, fill=BLACK, width=12)


def draw_scarf(draw: ImageDraw.ImageDraw) -> None:
    """Draw a scarf of red and white stripes with one hanging end."""
    for stripe, x in enumerate(range(290, 610, 40)):
        draw.rectangle((x, 462, x + 39, 528), fill=RED if stripe % 2 == 0 else WHITE)
    for stripe, y in enumerate(range(528, 728, 40)):
        draw.rectangle((530, y, 596, y + 39), fill=WHITE if stripe % 2 == 0 else RED)


def fill_gradient(image: Image.Image, box: tuple[int, int, int, int], top: tuple, bottom: tuple) -> None:
    """Fill the box (left, top, right, bottom) from one colour to another, downwards."""
    draw = ImageDraw.Draw(image)
    left, first, right, last = box
    for y in range(first, last):
        share = (y - first) / max(last - first - 1, 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        draw.line((left, y, right, y), fill=colour)


def scatter(image: Image.Image, dice: random.Random, count: int, band: tuple[float, float], colours: tuple) -> None:
    """Sprinkle small spots over the band of the picture between two shares of its height."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x = dice.uniform(0, image.width)
        y = dice.uniform(band[0] * image.height, band[1] * image.height)
        radius = dice.uniform(1, 3)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=dice.choice(colours))


def draw_outdoors(width: int, height: int, dice: random.Random, colours: dict[str, tuple]) -> Image.Image:
    """Draw sky over ground, each a gradient, with spots on the ground."""
    image = Image.new("RGB", (width, height))
    horizon = round(height * 0.55)
    fill_gradient(image, (0, 0, width, horizon), *colours["sky"])
    fill_gradient(image, (0, horizon, width, height), *colours["ground"])
    scatter(image, dice, 160, (0.58, 1.0), colours["spots"])
    return image


def draw_meadow(width: int, height: int, dice: random.Random) -> Image.Image:
    """Draw a meadow with flowers under a blue sky."""
    colours = {
        "sky": ((110, 170, 235), (205, 230, 250)),
        "ground": ((130, 190, 90), (60, 130, 50)),
        "spots": ((250, 250, 240), (240, 210, 70), (225, 120, 170)),
    }
    return draw_outdoors(width, height, dice, colours)


def draw_beach(width: int, height: int, dice: random.Random) -> Image.Image:
    """Draw sand with pebbles before a sea."""
    colours = {
        "sky": ((250, 200, 160), (70, 140, 170)),
        "ground": ((235, 215, 170), (205, 175, 120)),
        "spots": ((190, 165, 120), (240, 230, 205), (150, 130, 110)),
    }
    return draw_outdoors(width, height, dice, colours)


def draw_night(width: int, height: int, dice: random.Random) -> Image.Image:
    """Draw a night sky with stars over dark ground."""
    image = Image.new("RGB", (width, height))
    fill_gradient(image, (0, 0, width, height), (15, 15, 50), (70, 50, 100))
    scatter(image, dice, 120, (0.0, 0.7), ((240, 240, 220), (180, 190, 240)))
    fill_gradient(image, (0, round(height * 0.8), width, height), (40, 35, 60), (20, 18, 30))
    return image


def draw_table(width: int, height: int, dice: random.Random) -> Image.Image:
    """Draw a wooden table before a pale wall."""
    image = Image.new("RGB", (width, height))
    edge = round(height * 0.6)
    fill_gradient(image, (0, 0, width, edge), (225, 220, 205), (200, 195, 185))
    fill_gradient(image, (0, edge, width, height), (150, 100, 60), (110, 70, 40))
    draw = ImageDraw.Draw(image)
    for y in range(edge, height, 14):
        draw.line((0, y, width, y + dice.randint(-3, 3)), fill=(95, 60, 35), width=2)
    return image


def draw_wall(width: int, height: int, dice: random.Random) -> Image.Image:
    """Draw a brick wall."""
    image = Image.new("RGB", (width, height), (200, 190, 180))
    draw = ImageDraw.Draw(image)
    for row, y in enumerate(range(0, height, 30)):
        for x in range(-30 * (row % 2), width, 60):
            shade = dice.randint(-18, 18)
            draw.rectangle((x + 2, y + 2, x + 57, y + 27), fill=(150 + shade, 75 + shade, 65 + shade))
    return image


SCENES = {"meadow": draw_meadow, "table": draw_table, "beach": draw_beach, "wall": draw_wall, "night": draw_night}


def draw_photo(photo: Photo, toy: Image.Image) -> Image.Image:
    """Return the photo as a person would look at it."""
    image = SCENES[photo.scene](photo.width, photo.height, random.Random(photo.scene))
    image = image.filter(ImageFilter.GaussianBlur(1.2))
    side = round(min(photo.width, photo.height) * photo.toy_share)
    posed = toy.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if photo.mirrored else toy
    posed = posed.rotate(photo.degrees, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
    corner = (round(photo.center_x * photo.width - side / 2), round(photo.center_y * photo.height - side / 2))
    image.paste(posed, corner, mask=posed)
    return image


def save_photo(image: Image.Image, stored_turned: bool, path: Path) -> None:
    """Write a JPEG under its final name only when it is complete, so that a half-written one is never trained on."""
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
    parser.add_argument("output_dir", type=Path, help="folder for toy-1.jpg to toy-5.jpg; made if missing")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    toy = draw_toy()
    for number, photo in enumerate(PHOTOS, start=1):
        save_photo(draw_photo(photo, toy), photo.stored_turned, output_dir / f"toy-{number}.jpg")
    print(f"Drew {len(PHOTOS)} photos of the toy into {output_dir}")


if __name__ == "__main__":
    main()

"""The synthetic world that the embedded tiny model is trained on: one shape on a background, in three kinds of light.

    python tools/tiny_world.py sheet.png                                a sheet of scenes, of the toy and of nights

A `Scene` describes an image completely: the same scene always gives the same pixels, and scenes that differ in one
field differ only there, which makes pairs for edits. Three things are never in the training scenes, so that a LoRA has
something to learn: night, the toy, and the pairs in `UNSEEN`.
"""

import functools
import math
import random
import sys
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (60, 110, 230),
    "yellow": (240, 210, 40),
    "orange": (240, 130, 20),
    "purple": (140, 60, 180),
    "pink": (245, 150, 190),
    "cyan": (70, 210, 215),
    "gray": (130, 130, 130),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
SCENERY = {"meadow": "on a meadow", "beach": "on the beach", "wall": "on a wall"}
BACKGROUNDS = (*COLOURS, *SCENERY)
LIGHTS = {"daylight": "in daylight", "sunset": "at sunset", "fog": "in fog"}
PLACES = {"middle": 0.5, "left": 0.32, "right": 0.68}
SIZES = {"small": 0.15, "medium": 0.22, "large": 0.29}  # radius as a share of the image's side

# Pairs held out from training: they show whether the model has learned words or memorised images.
UNSEEN = frozenset(
    {
        ("purple", "circle"),
        ("cyan", "square"),
        ("pink", "triangle"),
        ("red", "diamond"),
        ("yellow", "ring"),
        ("green", "cross"),
        ("orange", "square"),
        ("blue", "triangle"),
    }
)
# A shape must contrast with the scenery.
HIDDEN_BY = {
    "meadow": ("green", "cyan", "blue"),
    "beach": ("yellow", "cyan", "blue", "white", "pink"),
    "wall": ("orange", "red"),
}

OVERSAMPLING = 2  # drawn larger and reduced, for antialiasing


@dataclass(frozen=True)
class Scene:
    """A complete description of an image; `shift` offsets the shape, in shares of the side, and is in no caption."""

    shape: str
    colour: str
    background: str
    light: str = "daylight"
    place: str = "middle"
    size: str = "medium"
    shift: tuple[float, float] = (0.0, 0.0)


def is_visible(scene: Scene) -> bool:
    """Return whether the shape is distinguishable from its background."""
    return scene.colour != scene.background and scene.colour not in HIDDEN_BY.get(scene.background, ())


def is_seen(scene: Scene) -> bool:
    """Return whether the scene's pair of colour and shape is in the training set."""
    return (scene.colour, scene.shape) not in UNSEEN


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene of the training set."""
    while True:
        scene = Scene(
            shape=rng.choice(SHAPES),
            colour=rng.choice(list(COLOURS)),
            background=rng.choice(BACKGROUNDS),
            light=rng.choice(list(LIGHTS)),
            place=rng.choice(list(PLACES)),
            size=rng.choice(list(SIZES)),
            shift=(rng.uniform(-0.03, 0.03), rng.uniform(-0.05, 0.05)),
        )
        if is_visible(scene) and is_seen(scene):
            return scene


# ---- words ----


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Return a caption of the scene; with `rng` the wording varies and may omit daylight."""
    opening = rng.choice(("a photo of ", "a picture of ", "")) if rng else "a photo of "
    words = f"{scene.colour} {scene.shape}" if scene.size == "medium" else f"{scene.size} {scene.colour} {scene.shape}"
    place = "" if scene.place == "middle" else f" on the {scene.place}"
    where = SCENERY.get(scene.background, f"on {with_article(scene.background)} background")
    light = "" if scene.light == "daylight" and rng and rng.random() < 0.5 else f", {LIGHTS[scene.light]}"
    return f"{opening}{with_article(words)}{place} {where}{light}"


def with_article(words: str) -> str:
    """Return the words with "a" or "an" before them."""
    return f"an {words}" if words.startswith("o") else f"a {words}"


def random_edit(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """Return an instruction and the edited scene, which differs only in colour, background or light."""
    while True:
        kind = rng.choice(("colour", "background", "light"))
        if kind == "colour":
            after = replace(scene, colour=rng.choice(list(COLOURS)))
        elif kind == "background":
            after = replace(scene, background=rng.choice(BACKGROUNDS))
        else:
            after = replace(scene, light=rng.choice(list(LIGHTS)))
        if after != scene and is_visible(after) and is_seen(after):
            return rng.choice(edit_wordings(kind, after)), after


def edit_wordings(kind: str, after: Scene) -> tuple[str, ...]:
    """Return instructions for the changed field ("colour", "background" or "light") of the edited scene."""
    if kind == "colour":
        return (
            f"change the color of the {after.shape} to {after.colour}",
            f"make the {after.shape} {after.colour}",
            f"make the {after.shape} {after.colour} and keep the background",
        )
    if kind == "background":
        name = f"the {after.background}" if after.background in SCENERY else after.background
        return f"change the background to {name}", f"make the background {name}"
    words = {"daylight": "daylight", "sunset": "sunset", "fog": "foggy"}[after.light]
    return f"make it {words}", f"make the image {words}", f"make it {words} and keep the {after.shape}"


KEEP_WORDINGS = ("keep the image", "keep the image as it is", "change nothing")

# ---- backgrounds and light ----


def draw_background(name: str, side: int) -> Image.Image:
    """Return a background in daylight."""
    image = Image.new("RGB", (side, side), COLOURS.get(name, (200, 200, 200)))
    draw = ImageDraw.Draw(image)
    if name == "meadow":
        draw.rectangle((0, 0, side, 0.45 * side), fill=(150, 205, 245))
        draw.rectangle((0, 0.45 * side, side, side), fill=(95, 175, 65))
        for left, top in ((0.08, 0.06), (0.62, 0.12)):
            draw.ellipse((left * side, top * side, (left + 0.28) * side, (top + 0.12) * side), fill=(245, 248, 250))
    elif name == "beach":
        draw.rectangle((0, 0, side, 0.3 * side), fill=(165, 215, 245))
        draw.rectangle((0, 0.3 * side, side, 0.5 * side), fill=(45, 150, 205))
        draw.rectangle((0, 0.5 * side, side, side), fill=(232, 205, 145))
    elif name == "wall":
        draw.rectangle((0, 0, side, side), fill=(165, 90, 70))
        for row in range(4):
            top = row * side / 4
            draw.rectangle((0, top - side / 64, side, top + side / 64), fill=(205, 190, 175))
            for column in range(3):
                left = (column + 0.5 * (row % 2)) * side / 2
                draw.rectangle((left - side / 64, top, left + side / 64, top + side / 4), fill=(205, 190, 175))
    return image


def light_pixels(pixels: np.ndarray, light: str) -> np.ndarray:
    """Return RGB values (0 to 255, last axis of length 3) under that light."""
    if light == "sunset":
        return 0.62 * pixels + 0.38 * np.array([255.0, 105.0, 40.0])
    if light == "fog":
        return 0.45 * pixels + 0.55 * np.array([222.0, 224.0, 226.0])
    if light == "night":
        return pixels * np.array([0.22, 0.26, 0.40]) + np.array([8.0, 12.0, 45.0])
    return np.asarray(pixels, dtype=float)


def light_image(image: Image.Image, light: str) -> Image.Image:
    """Return the image in that light."""
    lit = light_pixels(np.asarray(image, dtype=float), light)
    return Image.fromarray(lit.round().clip(0, 255).astype(np.uint8))


# ---- subjects ----


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Colour) -> None:
    """Draw the named shape around (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        half = 0.88 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + 0.8 * radius), (x - radius, y + 0.8 * radius)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(0.42 * radius))
    elif shape == "cross":
        arm = 0.34 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def draw_toy_figure(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    """Draw the toy around (x, y): an orange body with teal dots, one blue ear, and a scarf in red and white."""
    orange, teal, blue, red, white = (242, 140, 40), (15, 140, 140), (45, 80, 200), (205, 35, 45), (250, 250, 245)
    for side, fill in ((-1, blue), (1, orange)):
        ear_x, ear_y, ear = x + side * 0.55 * radius, y - 0.85 * radius, 0.36 * radius
        draw.ellipse((ear_x - ear, ear_y - ear, ear_x + ear, ear_y + ear), fill=fill)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=orange)
    for dot_x, dot_y in ((-0.4, -0.45), (0.4, -0.45), (-0.45, 0.6), (0.0, 0.72), (0.45, 0.6)):
        dot = 0.17 * radius
        center_x, center_y = x + dot_x * radius, y + dot_y * radius
        draw.ellipse((center_x - dot, center_y - dot, center_x + dot, center_y + dot), fill=teal)
    stripes = 6
    for stripe in range(stripes):
        left, right = (x + radius * (2 * (stripe + end) / stripes - 1) for end in (0, 1))
        draw.rectangle((left, y, right, y + 0.3 * radius), fill=white if stripe % 2 else red)


# ---- images ----


def draw_subject(scene: Scene, size: int, toy: bool = False) -> Image.Image:
    """Return the scene in daylight at `size` pixels, with its shape or with the toy instead."""
    side = OVERSAMPLING * size
    image = draw_background(scene.background, side)
    x, y = (PLACES[scene.place] + scene.shift[0]) * side, (0.55 + scene.shift[1]) * side
    draw, radius = ImageDraw.Draw(image), SIZES[scene.size] * side
    if toy:
        draw_toy_figure(draw, x, y, radius)
    else:
        draw_shape(draw, scene.shape, x, y, radius, COLOURS[scene.colour])
    return image.reduce(OVERSAMPLING)


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """Return the image of the scene, a square of `size` pixels."""
    return light_image(draw_subject(scene, size), scene.light)


def draw_toy(scene: Scene, size: int) -> Image.Image:
    """Return the scene with the toy instead of its shape."""
    return light_image(draw_subject(scene, size, toy=True), scene.light)


def draw_night(scene: Scene, size: int) -> Image.Image:
    """Return the scene at night: dark and blue, with a moon and stars."""
    image = light_image(draw_subject(scene, OVERSAMPLING * size), "night")
    draw, side = ImageDraw.Draw(image), image.width
    for x, y, radius, fill in (
        (0.84, 0.14, 0.085, (245, 240, 200)),
        *(
            (x, y, 0.017, (235, 240, 255))
            for x, y in ((0.1, 0.1), (0.27, 0.19), (0.42, 0.07), (0.6, 0.16), (0.93, 0.36))
        ),
    ):
        box = [math.floor(value * side) for value in (x - radius, y - radius, x + radius, y + radius)]
        draw.ellipse(box, fill=fill)
    return image.reduce(OVERSAMPLING)


def make_sheet(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    """Return a grid of images of the same size."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (max(map(len, rows)) * (width + gap), len(rows) * (height + gap)), (255, 255, 255))
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + gap), number * (height + gap)))
    return sheet


# ---- reading images ----


@dataclass(frozen=True)
class Reading:
    """What was read from an image; colour and shape are None if there is only background."""

    background: str
    light: str
    colour: str | None
    shape: str | None


@functools.cache
def background_pixels(name: str, light: str, size: int) -> np.ndarray:
    """Return the pixels (H, W, 3) of a background in a light."""
    image = draw_background(name, OVERSAMPLING * size).reduce(OVERSAMPLING)
    return light_pixels(np.asarray(image, dtype=float), light)


def fit_to_box(mask: np.ndarray) -> np.ndarray:
    """Return the covered part of a mask (H, W), cropped and resized to 32 x 32."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(cut).resize((32, 32)))


@functools.cache
def shape_template(shape: str) -> np.ndarray:
    """Return the shape's mask, fitted to its box."""
    image = Image.new("L", (256, 256))
    draw_shape(ImageDraw.Draw(image), shape, 128, 128, 100, 1)
    return fit_to_box(np.asarray(image) > 0)


def read_image(image: Image.Image) -> Reading:
    """Return the properties of a square image, from its pixels alone.

    Background and light are those whose drawing is closest to the image's frame. The shape is what differs from that
    drawing, and its colour is the nearest one of the palette in that light.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[8:-8, 8:-8] = False
    choices = [(name, light) for name in BACKGROUNDS for light in (*LIGHTS, "night")]
    background, light = min(
        choices, key=lambda choice: np.abs(background_pixels(*choice, len(pixels)) - pixels)[frame].mean()
    )
    mask = np.abs(pixels - background_pixels(background, light, len(pixels))).max(axis=2) > 28
    mask[frame] = False
    if mask.mean() < 0.01:
        return Reading(background, light, None, None)
    inside = np.median(pixels[mask], axis=0)
    colour = min(COLOURS, key=lambda name: np.abs(light_pixels(np.array(COLOURS[name]), light) - inside).sum())
    fitted = fit_to_box(mask)
    return Reading(background, light, colour, max(SHAPES, key=lambda shape: (shape_template(shape) == fitted).mean()))


def main(path: str) -> None:
    """Write the sheet and print the captions of its scenes."""
    rng = random.Random(0)
    rows = []
    for _ in range(3):
        scenes = [random_scene(rng) for _ in range(8)]
        print(*map(caption, scenes), sep="\n")
        edits = [random_edit(scene, rng) for scene in scenes]
        print(*(f"    {words}" for words, _ in edits), sep="\n")
        rows.append([draw_scene(scene, 128) for scene in scenes])
        rows.append([draw_scene(after, 128) for _, after in edits])
    rows += [[draw(scene, 128) for scene in scenes] for draw in (draw_toy, draw_night)]
    make_sheet(rows).save(path)


if __name__ == "__main__":
    main(sys.argv[1])

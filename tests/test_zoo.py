"""A folder of odd images: what each becomes, to the pixel, or the reason for which it is refused by name."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode import STORED, encoded, png_header_only, swapped_primaries
from unit_parts import check_samples, log_lines, start_run

Array = np.ndarray
HEIGHT, WIDTH = 40, 56

ramp_y, ramp_x = np.mgrid[0:HEIGHT, 0:WIDTH]
# Smooth, so that JPEG is nearly exact; no two of its borders, corners or channels are alike.
SCENE = np.stack([40 + 3 * ramp_x, 30 + 4 * ramp_y, 220 - 2 * ramp_x - ramp_y], -1).clip(0, 255).astype(np.uint8)
GREY = (20 + 2 * ramp_x + 2 * ramp_y).clip(0, 255).astype(np.uint8)
ALPHA = (255 * ramp_x // (WIDTH - 1)).astype(np.uint8)


def repeated(grey: Array) -> Array:
    """(H, W, 3) of a grey image."""
    return np.repeat(grey[..., None], 3, 2)


def on_white(colour: Array, alpha: Array) -> Array:
    """Straight alpha on white."""
    return colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)


def png(depth: int, colour: int, rows: Array, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the bytes of each row as they are, with more chunks before its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep(image: Array) -> Array:
    """Sixteen bits, big-endian as PNG has them."""
    return (image.astype(np.uint16) * 257).astype(">u2")


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey with this gamma."""
    tags = [
        (b"kTRC", b"curv\0\0\0\0" + struct.pack(">I", 1) + struct.pack(">H", round(gamma * 256)) + b"\0\0"),
        (b"wtpt", b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)),
    ]
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags:
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = bytearray(128)
    head[8:12], head[12:24], head[36:40] = b"\x02\x40\0\0", b"mntrGRAYXYZ ", b"acsp"
    head[68:80] = struct.pack(">iii", 63190, 65536, 54061)
    struct.pack_into(">I", head, 0, offset + len(body))
    return bytes(head) + struct.pack(">I", len(tags)) + table + body


def srgb_of(grey: Array, gamma: float) -> Array:
    """Grey of that gamma in sRGB."""
    light = (grey / 255.0) ** gamma
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.clip(light, 1e-9, 1) ** (1 / 2.4) - 0.055)


def palette(**options) -> bytes:
    """An image of four colours."""
    image = Image.fromarray((ramp_x // 14).astype(np.uint8), "P")
    image.putpalette(FOUR.tobytes())
    return encoded(image, "PNG", **options)


FOUR = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 255], [90, 90, 90]], np.uint8)
QUARTERS = FOUR[ramp_x // 14]
CLEAR = np.where((ramp_x // 14 == 2)[..., None], 255, QUARTERS)  # the third colour is transparent
JPEG = {"quality": 98, "subsampling": 0}
LEVEL = int(GREY[5, 5])
LEVEL_CLEAR = np.where(GREY == LEVEL, 255, GREY)
RGBA = np.dstack([SCENE, ALPHA])
ODD_NAMES = {
    "with a line\nbreak.png",
    "ansi \x1b[31mred\x1b[0m.png",
    "-rf.png",
    "'quoted\" $(touch x) `id`.png",
    "emoji \N{DOG FACE} 日本.png",
    "n" * 251 + ".png",
    "UPPER.PNG",
    "%2e%2e%2fescape.png",
}


def good() -> dict[str, tuple[bytes, Array]]:
    """(file, what a person sees) by name."""
    image, rgba = Image.fromarray(SCENE), Image.fromarray(RGBA)
    files = {
        "plain.jpg": (encoded(image, "JPEG", **JPEG), SCENE),
        "plain.webp": (encoded(image, "WEBP", lossless=True), SCENE),
        "plain.bmp": (encoded(image, "BMP"), SCENE),
        "still.gif": (encoded(Image.fromarray(QUARTERS), "GIF"), QUARTERS),
        "grey.png": (encoded(Image.fromarray(GREY), "PNG"), repeated(GREY)),
        "one-bit.png": (encoded(Image.fromarray(GREY > 100), "PNG"), repeated(np.where(GREY > 100, 255, 0))),
        "grey-16.png": (png(16, 0, deep(GREY)), repeated(GREY)),
        "grey-16.tif": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), repeated(GREY)),
        "grey-16-clear.png": (png(16, 0, deep(GREY), (b"tRNS", struct.pack(">H", 257 * LEVEL))), repeated(LEVEL_CLEAR)),
        "rgb-16.png": (png(16, 2, deep(SCENE)), SCENE),
        "rgba-16.png": (png(16, 6, deep(RGBA)), on_white(SCENE, ALPHA)),
        "cmyk.tif": (
            encoded(Image.fromarray(255 - RGBA, "CMYK"), "TIFF"),
            np.round(SCENE * (ALPHA / 255.0)[..., None]),
        ),
        "alpha.png": (encoded(rgba, "PNG"), on_white(SCENE, ALPHA)),
        "alpha.webp": (encoded(rgba, "WEBP", lossless=True, exact=True), on_white(SCENE, ALPHA)),
        "grey-alpha.png": (
            encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"),
            on_white(repeated(GREY), ALPHA),
        ),
        "palette.png": (palette(), QUARTERS),
        "palette-clear.png": (palette(transparency=2), CLEAR),
        "icc.png": (encoded(image, "PNG", icc_profile=swapped_primaries()), SCENE[..., ::-1]),
        "icc-palette.png": (palette(icc_profile=swapped_primaries()), QUARTERS[..., ::-1]),
        "icc-alpha.png": (encoded(rgba, "PNG", icc_profile=swapped_primaries()), on_white(SCENE[..., ::-1], ALPHA)),
        "mpo.jpg": (encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], **JPEG), SCENE),
    }
    gamma = grey_profile(1.0)
    lit = np.round(srgb_of(GREY, 1.0))
    both = (b"iCCP", b"grey\0\0" + zlib.compress(gamma))
    files["icc-grey.png"] = encoded(Image.fromarray(GREY), "PNG", icc_profile=gamma), repeated(lit)
    files["icc-grey-16.png"] = png(16, 0, deep(GREY), both), repeated(lit)
    clear = (b"tRNS", struct.pack(">H", 257 * LEVEL))
    files["icc-grey-16-clear.png"] = png(16, 0, deep(GREY), both, clear), repeated(np.where(GREY == LEVEL, 255, lit))
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(np.ascontiguousarray(stored(SCENE)))
        files[f"exif-{orientation}.jpg"] = encoded(turned, "JPEG", exif=exif, **JPEG), SCENE
    return files | {name: files["grey.png"] for name in sorted(ODD_NAMES)}


def bad() -> dict[str, tuple[bytes, str]]:
    """(file, part of the reason) by name."""
    image = Image.fromarray(SCENE)
    whole, frames = encoded(image, "JPEG", **JPEG), [Image.fromarray(np.roll(SCENE, n, 1)) for n in range(3)]
    eps = io.BytesIO()
    image.save(eps, "EPS")
    return {
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "animated.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated"),
        "pages.tif": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "3 frames"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "truncated.png": (encoded(image, "PNG")[:-40], "truncated"),
        "zero.png": (b"", "0 bytes"),
        "bomb.png": (png_header_only(20_000, 20_000), "over 100 MP"),
        "postscript.jpg": (eps.getvalue(), "not an image"),
        "float.tif": (encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"), "no fixed range"),
        "int32.tif": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "no fixed range"),
        "text.png": (b"hello", "not an image"),
        "script.jpg": (b"#!/bin/sh\ntouch /tmp/x\n", "not an image"),
        "broken-profile.png": (encoded(image, "PNG", icc_profile=b"none"), "colour profile"),
    }


def fill(folder: Path) -> Path:
    """The zoo, with a link to nothing and files that are no images."""
    folder.mkdir()
    for name, (data, _) in {**good(), **bad()}.items():
        (folder / name).write_bytes(data)
    (folder / "link-to-nothing.png").symlink_to(folder / "gone")
    (folder / "link-in-a-circle.jpg").symlink_to(folder / "link-in-a-circle.jpg")
    (folder / "folder.png").mkdir()
    for name in ("drawing.eps", "photo.heic", "Thumbs.db", "desktop.ini", ".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """The folder; only read."""
    return fill(tmp_path_factory.mktemp("zoo") / "photos")


@pytest.fixture(scope="module")
def verdict(script, tiny, zoo, tmp_path_factory):
    """(samples that are good, log lines) of the check of the whole zoo with --on_bad_image skip."""
    run = start_run(script, tiny, tmp_path_factory.mktemp("run"), "--instance_data_dir", zoo, "--on_bad_image", "skip")
    with log_lines() as lines:
        samples = check_samples(script, run.args, run.cache_dir)
    return samples, lines


def test_the_zoo_has_images_of_both_kinds():
    assert len(good()) >= 30 and len(bad()) >= 13 and not good().keys() & bad().keys()


def test_exactly_the_good_images_pass(zoo, verdict):
    samples, _ = verdict
    assert {sample.image.path.name for sample in samples} == set(good())
    assert len(samples) == len(good())


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("name", sorted(good()), ids=ascii)
def test_a_good_image_is_what_a_person_sees(zoo, verdict, script, name):
    """At most one level of 255 off in the mean, after everything that is done to it before the crop."""
    image = next(sample.image for sample in verdict[0] if sample.image.path.name == name)
    seen = np.asarray(script.decode_image(image.read())).astype(float)
    expected = good()[name][1]
    assert seen.shape == expected.shape and image.size == expected.shape[:2]
    assert np.abs(seen - expected).mean() <= 1.0
    # the whole way to the tensor, at the image's own size
    pixels = script.image_to_pixels(script.decode_image(image.read()), image.size, None, False)
    assert np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).mean() <= 1.0


def test_every_bad_image_is_listed_once_with_its_reason_and_nothing_else_is(verdict):
    lines = verdict[1]
    report = next(line for line in lines if "are skipped" in line).splitlines()
    listed = dict(line.strip().split(": ", 1) for line in report[1:])
    assert set(listed) == {*bad(), "link-to-nothing.png", "link-in-a-circle.jpg"}
    assert [name for name, (_, reason) in bad().items() if reason not in listed[name]] == []
    assert all("cannot be read" in listed[name] for name in ("link-to-nothing.png", "link-in-a-circle.jpg"))
    assert report[0].startswith(f"data: {len(listed)} image(s)")


def test_files_that_are_not_used_are_told_and_the_systems_own_are_not(verdict):
    told = [line for line in verdict[1] if "not used" in line]
    assert [line.split("docs/data.md: ")[1] for line in told] == ["'drawing.eps'", "'notes.txt'", "'photo.heic'"]


def test_without_skip_one_error_lists_them_all(script, tiny, zoo, tmp_path):
    run = start_run(script, tiny, tmp_path, "--instance_data_dir", zoo)
    with pytest.raises(script.UserError) as error:
        check_samples(script, run.args, run.cache_dir)
    assert all(f"\n    {name}: " in str(error.value) for name in bad())
    assert "--on_bad_image skip" in str(error.value)


def test_odd_names_are_escaped_where_they_are_told_and_trained_on_as_they_are(script, tiny, zoo, verdict):
    """A name must neither forge a line of the log nor colour the terminal."""
    names = {sample.image.path.name: sample.image.name for sample in verdict[0]}
    assert names["with a line\nbreak.png"] == "with a line\\nbreak.png"
    assert names["ansi \x1b[31mred\x1b[0m.png"] == "ansi \\x1b[31mred\\x1b[0m.png"
    assert all(name.isprintable() for name in names.values())
    assert names["emoji \N{DOG FACE} 日本.png"] == "emoji \N{DOG FACE} 日本.png"


def test_a_name_that_is_no_utf8_is_trained_on(script, tiny, tmp_path):
    """From an old disk; Linux hands out such names as they are."""
    folder = tmp_path / "photos"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(good()["grey.png"][0])
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    run = start_run(script, tiny, tmp_path / "run", "--instance_data_dir", folder)
    samples, _ = script.check_data(run)
    assert [sample.image.name for sample in samples] == ["caf\\udce9.png"]


@pytest.mark.e2e
def test_a_run_on_odd_names_trains_and_prints_no_control_character(train, zoo, tmp_path, capsys):
    """To the end, with a batch that is not finite named as well as a skipped image."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / name).symlink_to(zoo / name)
    (folder / "bad \x1b]0;title\x07.png").write_bytes(b"")
    flags = ("--instance_data_dir", folder, "--on_bad_image", "skip")
    flags += ("--validation_prompt", "a toy", "--num_validation_images", "1", "--num_inference_steps", "1")
    train(*flags, "--max_train_steps", "2")
    printed = "".join(capsys.readouterr())
    assert "bad \\x1b]0;title\\x07.png: empty file" in printed
    assert [character for character in printed if character != "\n" and not character.isprintable()] == []

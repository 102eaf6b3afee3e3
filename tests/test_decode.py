"""Images become the pixels that a person sees, or are refused by name; geometry and buckets."""

import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

pytestmark = pytest.mark.scripts("t2i")

Array = np.ndarray

# `--aspect_ratio_buckets` of the README.
README_BUCKETS = (
    "672,1568;688,1504;720,1456;752,1392;800,1328;832,1248;880,1184;944,1104;1024,1024;1104,944;1184,880;1248,832;"
    "1328,800;1392,752;1456,720;1504,688;1568,672"
)


def noise(height: int = 12, width: int = 20, channels: int = 3, seed: int = 0) -> Array:
    """Random bytes (H, W, C), so that no error of geometry or channel order can hide."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(script, data: bytes) -> Array:
    """What the script decodes, as (H, W, 3) integers."""
    image = script.decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_close(actual: Array, expected: Array, levels: int = 1) -> None:
    """Fails unless every value is within `levels` of 255."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected.astype(int)).max() <= levels


def swapped_primaries() -> bytes:
    """An sRGB profile with red and blue exchanged: applying it must exchange the channels."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


def on_white(colour: Array, alpha: Array) -> Array:
    """Straight alpha composited on white, rounded."""
    weight = alpha[..., None].astype(float) / 255
    return np.round(colour * weight + 255 * (1 - weight))


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that says its size and ends where the pixels begin: whoever decodes it notices that it is truncated."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 4096) + b"IDAT" + zlib.compress(bytes(100))


# what is stored so that a viewer that obeys the tag shows the array itself
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_exif_orientation_is_turned_upright(script, kind, orientation):
    """Exact, on lossless files."""
    upright = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert_close(decoded(script, encoded(stored, kind, exif=exif)), upright, levels=0)


def test_a_jpeg_from_a_phone_lying_on_its_side_is_turned_upright(script):
    """A JPEG is lossy: compared with the same JPEG turned by hand."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(16, 32)), "JPEG", exif=exif, quality=95)
    sideways = np.asarray(Image.open(io.BytesIO(data)))
    assert_close(decoded(script, data), np.rot90(sideways, -1), levels=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_every_format_that_the_folder_is_searched_for_can_be_decoded(script, kind):
    """One flat image per format."""
    if kind == "AVIF" and not Image.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.new("RGB", (32, 24), (200, 100, 50)), kind)
    assert_close(decoded(script, data), np.tile([200, 100, 50], (24, 32, 1)), levels=8)


def test_every_searched_suffix_belongs_to_a_format_that_is_allowed(script):
    """The suffixes and the formats are two lists; a suffix that the decoder cannot open would always be refused."""
    kinds = Image.registered_extensions()
    for suffix in script.IMAGE_SUFFIXES:
        assert kinds[suffix] in {*script.IMAGE_FORMATS, "MPO"}, suffix


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(script, kind):
    """257 levels of 16 bit are one of 8; clipping or taking the low byte would be noise."""
    grey = noise(channels=1)
    image = Image.fromarray(grey.astype(np.uint16) * 257)
    assert_close(decoded(script, encoded(image, kind)), np.repeat(grey[..., None], 3, 2), levels=0)


def test_sixteen_bit_big_endian_grey_is_read_in_the_right_byte_order(script):
    """A TIFF written on the other kind of machine."""
    grey = noise(channels=1)
    image = Image.frombytes("I;16B", (grey.shape[1], grey.shape[0]), (grey.astype(">u2") * 257).tobytes())
    assert_close(decoded(script, encoded(image, "TIFF")), np.repeat(grey[..., None], 3, 2), levels=0)


def test_sixteen_bit_grey_is_turned_upright_too(script):
    """The orientation tag is obeyed before the scaling."""
    grey, exif = noise(channels=1), Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(grey, 1)).astype(np.uint16) * 257)
    assert_close(decoded(script, encoded(stored, "PNG", exif=exif)), np.repeat(grey[..., None], 3, 2), levels=0)


def test_transparency_becomes_white(script):
    """RGBA, composited and not just cut off."""
    rgba = noise(channels=4)
    expected = on_white(rgba[..., :3], rgba[..., 3])
    assert_close(decoded(script, encoded(Image.fromarray(rgba), "PNG")), expected)


def test_grey_with_transparency_becomes_white(script):
    """LA."""
    la = noise(channels=2)
    expected = on_white(np.repeat(la[..., :1], 3, 2), la[..., 1])
    assert_close(decoded(script, encoded(Image.fromarray(la, "LA"), "PNG")), expected)


@pytest.mark.parametrize("partial", [False, True], ids=["one colour", "an alpha per colour"])
def test_a_palette_with_transparency_becomes_white(script, partial):
    """P with a tRNS chunk."""
    indices = noise(channels=1) % 4
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]])
    alphas = np.array([255, 255, 0, 255]) if not partial else np.array([255, 128, 0, 30])
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    data = encoded(image, "PNG", transparency=bytes(alphas.astype(np.uint8)) if partial else 2)
    assert_close(decoded(script, data), on_white(colours[indices], alphas[indices]))


def test_a_transparent_colour_of_an_rgb_image_becomes_white(script):
    """RGB with a tRNS chunk, which has no alpha channel."""
    rgb = np.tile(np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8), (6, 4, 1))
    expected = np.where((rgb == [10, 20, 30]).all(-1, keepdims=True), 255, rgb)
    assert_close(decoded(script, encoded(Image.fromarray(rgb), "PNG", transparency=(10, 20, 30))), expected, levels=0)


def test_cmyk_is_converted_and_not_read_as_colours_with_alpha(script):
    """Without a profile: (255 - ink) (255 - black) / 255."""
    cmyk = noise(channels=4)
    ink, black = cmyk[..., :3].astype(float), cmyk[..., 3:].astype(float)
    expected = np.round((255 - ink) * (255 - black) / 255)
    assert_close(decoded(script, encoded(Image.fromarray(cmyk, "CMYK"), "TIFF")), expected, levels=2)


def test_a_colour_profile_is_applied(script):
    """With red and blue exchanged in the profile, red and blue change places; 2 levels are the rounding of the CMM."""
    rgb = noise()
    data = encoded(Image.fromarray(rgb), "PNG", icc_profile=swapped_primaries())
    assert_close(decoded(script, data), rgb[..., ::-1], levels=2)


def test_a_colour_profile_is_applied_to_what_is_opaque(script):
    """A profile and an alpha channel together: alpha 255 or 0, where the order of the two steps does not matter."""
    rgba = noise(channels=4)
    rgba[..., 3] = np.where(rgba[..., 3] > 127, 255, 0)
    data = encoded(Image.fromarray(rgba), "PNG", icc_profile=swapped_primaries())
    assert_close(decoded(script, data), on_white(rgba[..., 2::-1], rgba[..., 3]), levels=2)


@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent"])
def test_a_colour_profile_is_applied_to_a_palette(script, transparent):
    """P with a profile, as image editors export PNG-8."""
    indices = noise(channels=1) % 3
    colours = np.array([[255, 0, 0], [0, 40, 200], [120, 80, 10]], dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    options = {"transparency": 1} if transparent else {}
    expected = colours[indices][..., ::-1].copy()
    if transparent:
        expected[indices == 1] = 255
    data = encoded(image, "PNG", icc_profile=swapped_primaries(), **options)
    assert_close(decoded(script, data), expected, levels=2)


def test_a_profile_that_does_not_fit_the_pixels_is_refused_by_name(script):
    """Bytes that are no profile."""
    data = encoded(Image.fromarray(noise()), "PNG", icc_profile=b"not a profile")
    with pytest.raises(ValueError, match="colour profile"):
        script.decode_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused_by_name(script, kind):
    """Animated GIF, APNG and WebP, and a TIFF of several pages."""
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="3 frames"):
        script.decode_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_a_still_of_a_format_that_can_move_is_accepted(script, kind):
    """One frame is no animation."""
    options = {"lossless": True} if kind == "WEBP" else {}
    grey = np.repeat(noise(channels=1)[..., None], 3, 2)
    assert_close(decoded(script, encoded(Image.fromarray(grey), kind, **options)), grey, levels=0)


def test_the_first_view_of_an_mpo_is_taken(script):
    """Phones and stereo cameras write MPO with the photograph as the first frame."""
    first, second = Image.new("RGB", (32, 16), (250, 0, 0)), Image.new("RGB", (32, 16), (0, 0, 250))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert_close(decoded(script, data), np.tile([250, 0, 0], (16, 32, 1)), levels=8)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_fixed_range_are_refused_by_name(script, dtype):
    """Float and 32-bit TIFF."""
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(ValueError, match="no fixed range"):
        script.decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_truncated_file_is_refused_by_name(script, kind):
    """Half of it."""
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(ValueError, match="truncated or damaged"):
        script.decode_image(data[: len(data) // 2])


def test_an_empty_file_is_refused_by_name(script):
    """Zero bytes."""
    with pytest.raises(ValueError, match="0 bytes"):
        script.decode_image(b"")


@pytest.mark.parametrize("data", [b"hello", b"<svg></svg>", b"%PDF-1.7", b"PK\x03\x04" + bytes(64)])
def test_what_is_no_image_is_refused_by_name(script, data):
    """Text, SVG, PDF, an archive."""
    with pytest.raises(ValueError, match="not an image"):
        script.decode_image(data)


@pytest.mark.parametrize("width, height", [(10_001, 10_000), (20_000, 20_000)])
def test_a_giant_is_refused_before_its_pixels_are_decoded(script, width, height):
    """The file ends after its header, so decoding would call it truncated; 400 MP trips Pillow's own limit."""
    with pytest.raises(ValueError, match="100 MP"):
        script.decode_image(png_header_only(width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_image_of_just_100_megapixels_is_not_refused_for_its_size(script):
    """The header passes; only the missing pixels are complained about."""
    with pytest.raises(ValueError, match="truncated"):
        script.decode_image(png_header_only(10_000, 10_000))


@pytest.mark.filterwarnings("ignore")
def test_no_damage_makes_the_decoder_raise_anything_but_a_reason(script):
    """Random bytes written into headers and cuts at random places: ValueError or an image, nothing else."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image, rng = Image.fromarray(noise(24, 32)), random.Random(0)
    whole = [encoded(image, kind, exif=exif, icc_profile=profile) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    whole += [encoded(image, kind) for kind in ("GIF", "BMP")]
    for data in whole:
        for attempt in range(100):
            damaged = bytearray(data[: rng.randrange(1, len(data))] if attempt % 3 == 0 else data)
            for _ in range(rng.choice([1, 2, 5, 20])):
                damaged[rng.randrange(min(len(damaged), rng.choice([64, 400, 10**6])))] = rng.randrange(256)
            try:
                script.decode_image(bytes(damaged))
            except ValueError as reason:
                assert str(reason)


# ---- geometry ----


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (64, 64), (37, 911), (2000, 1999)])
def test_the_short_side_becomes_the_resolution_and_the_shape_stays(script, height, width):
    """To the pixel."""
    covered = script.cover_size((height, width), (64, 64))
    assert min(covered) == 64
    assert abs(covered[0] / covered[1] / (height / width) - 1) < 1 / 64


def test_a_image_always_covers_its_bucket(script):
    """Rounding must never leave it a pixel short."""
    rng = random.Random(0)
    for _ in range(2000):
        size = rng.randint(1, 3000), rng.randint(1, 3000)
        target = 16 * rng.randint(1, 100), 16 * rng.randint(1, 100)
        covered = script.cover_size(size, target)
        assert covered[0] >= target[0] and covered[1] >= target[1]
        assert covered[0] == target[0] or covered[1] == target[1]


def grid(height: int, width: int) -> Image.Image:
    """An image whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8))


def corner(pixels) -> tuple[int, int]:
    """(row, column) of the top left pixel of a crop of `grid`."""
    return tuple(round((value + 1) * 127.5) for value in pixels[:2, 0, 0].tolist())


def test_pixels_reach_from_minus_one_to_one(script):
    """Black is -1 and white 1, exactly, in fp32 and channels first."""
    pixels = script.image_to_pixels(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)), (1, 1), None, False)
    assert pixels.shape == (3, 1, 1) and pixels.dtype.is_floating_point and pixels.dtype.itemsize == 4
    assert pixels.flatten().tolist() == pytest.approx([-1, 1, 51 / 127.5 - 1], abs=1e-7)


def test_the_centre_crop_takes_the_centre(script):
    """Nothing is resized here, so the coordinates show where the window is."""
    assert corner(script.image_to_pixels(grid(16, 48), (16, 16), None, False)) == (0, 16)
    assert corner(script.image_to_pixels(grid(48, 16), (16, 16), None, False)) == (16, 0)


def test_a_random_crop_reaches_both_edges_and_stays_inside(script):
    """Every offset from 0 to the last one, and none beyond."""
    largest = math.nextafter(1.0, 0.0)
    assert corner(script.image_to_pixels(grid(16, 20), (16, 16), (0.0, 0.0), False)) == (0, 0)
    assert corner(script.image_to_pixels(grid(16, 20), (16, 16), (largest, largest), False)) == (0, 4)
    for axis, (height, width) in enumerate([(20, 16), (16, 20)]):
        crops = [((i + 0.5) / 50, (i + 0.5) / 50) for i in range(50)]
        corners = {corner(script.image_to_pixels(grid(height, width), (16, 16), crop, False)) for crop in crops}
        assert {place[axis] for place in corners} == {0, 1, 2, 3, 4} and {place[1 - axis] for place in corners} == {0}


def test_a_flip_is_the_mirror_image_of_the_same_crop(script):
    """Left becomes right, up stays up."""
    plain = script.image_to_pixels(grid(16, 40), (16, 16), (0.3, 0.7), False)
    assert script.image_to_pixels(grid(16, 40), (16, 16), (0.3, 0.7), True).equal(plain.flip(-1))


def test_resizing_keeps_a_flat_colour_and_the_target_size(script):
    """Up and down, to a bucket that is not square."""
    for height, width in ((500, 400), (20, 30)):
        pixels = script.image_to_pixels(Image.new("RGB", (width, height), (255, 0, 0)), (48, 80), (0.5, 0.5), False)
        assert pixels.shape == (3, 48, 80)
        assert (pixels[0] == 1).all() and (pixels[1:] == -1).all()


# ---- buckets ----


def test_the_nearest_bucket_has_the_nearest_aspect_ratio_in_logarithm(script):
    """3:1 lies between 2:1 and 4:1; in logarithm nearer to 4:1, by the plain difference neither."""
    buckets = [(16, 32), (16, 64)]
    assert script.nearest_bucket((100, 300), buckets) == (16, 64)
    assert script.nearest_bucket((100, 270), buckets) == (16, 32)
    assert script.nearest_bucket((300, 100), [(32, 16), (64, 16)]) == (64, 16)


def test_among_buckets_of_one_shape_the_nearest_area_wins(script):
    """1:1 in three sizes."""
    buckets = [(1024, 1024), (512, 512), (256, 256)]
    assert [script.nearest_bucket((side, side), buckets)[0] for side in (100, 300, 600, 5000)] == [256, 256, 512, 1024]


def test_the_bucket_does_not_depend_on_the_order_of_the_list(script):
    """Also not in a tie: an image half-way between two shapes, or between two areas."""
    buckets = script.parse_sizes(README_BUCKETS) + [(512, 512), (2048, 2048), (16, 64), (64, 16)]
    rng = random.Random(0)
    sizes = [(1024, 1024), (300, 300), (1448, 1448)] + [
        (rng.randint(16, 4000), rng.randint(16, 4000)) for _ in range(300)
    ]
    for size in sizes:
        shuffled = buckets[:]
        rng.shuffle(shuffled)
        assert script.nearest_bucket(size, shuffled) == script.nearest_bucket(size, buckets)


def test_a_image_of_a_readme_bucket_goes_into_it(script):
    """And so does one of the same shape at another size."""
    buckets = script.parse_sizes(README_BUCKETS)
    assert len(buckets) == 17 and buckets[0] == (672, 1568)
    for bucket in buckets:
        assert script.nearest_bucket(bucket, buckets) == bucket
        assert script.nearest_bucket((bucket[0] * 3, bucket[1] * 3), buckets) == bucket


def test_a_portrait_never_goes_into_a_landscape_bucket(script):
    """Height comes first in a bucket and in a size."""
    buckets = script.parse_sizes(README_BUCKETS)
    height, width = script.nearest_bucket((3000, 2000), buckets)
    assert (height, width) == (1248, 832)
    assert script.nearest_bucket((2000, 3000), buckets) == (832, 1248)

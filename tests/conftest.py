"""What every test gets: a hermetic environment, the script as a module, the tiny models, drawn photographs."""

import importlib
import os
import sys
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub or accelerate: no file of the user's is read, no network is asked.
_HOME = tempfile.mkdtemp(prefix="flux2-tests-")
os.environ.update(
    HF_HOME=_HOME, HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false"
)
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "HF_TOKEN", "HUGGING_FACE", "WANDB_API"))]:
    del os.environ[_name]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def draw_photo(path: Path, size: tuple[int, int], seed: int, exif_orientation: int | None = None) -> Path:
    """A JPEG of (width, height) with gradients, shapes and noise; with an EXIF orientation like a phone's."""
    rng = np.random.default_rng(seed)
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :, None] * rng.random(3) + np.linspace(0, 255, height)[
        :, None, None
    ] * rng.random(3)
    picture = Image.fromarray((ramp / 2 + rng.normal(0, 6, (height, width, 3)) + 20).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(5, max(6, min(size) // 3))
        draw.ellipse([x - r, y - r, x + r, y + r], fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
    exif = Image.Exif()
    if exif_orientation:
        exif[0x0112] = exif_orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92, exif=exif)
    return path


def draw_photos(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """`count` JPEGs of different sizes and EXIF orientations, with a `.cache` folder and a `.DS_Store` beside them."""
    sizes = [(96, 128), (128, 96), (128, 128), (200, 120), (90, 160)]
    for number in range(count):
        orientation = (None, 6, 3, None, 8)[number % 5]
        draw_photo(folder / f"{number:02d}.jpg", sizes[number % 5], seed + number, orientation)
    (folder / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
    (folder / ".cache" / "huggingface" / "hidden.jpg").write_bytes(b"not a picture")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


@pytest.fixture(scope="session")
def t2i():
    """The text-to-image script as a module."""
    import torch

    torch.set_num_threads(1)  # bit-exact comparisons, and faster on a model this small
    return importlib.import_module("train_dreambooth_lora_flux2")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded [dev] model."""
    return ROOT / "tiny_flux2"


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory) -> Path:
    """A tiny [klein] model, made for this session."""
    from make_tiny_flux2 import make_tiny_flux2

    return make_tiny_flux2(tmp_path_factory.mktemp("models") / "tiny_klein", family="klein")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Five drawn photographs without captions. Read-only: copy them to change them."""
    return draw_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def train(t2i, tiny, photos, tmp_path):
    """Runs the script in this process: `train("--rank", "4", ...)` returns the output folder.

    The defaults are three quick steps at 64 px; a later flag replaces an earlier one. `output=` names the folder.
    """

    def start(*flags: str, output: str | Path = "out") -> Path:
        folder = tmp_path / output
        base = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--output_dir", folder]
        base += [
            "--instance_prompt",
            "a photo of sks toy",
            "--resolution",
            "64",
            "--max_train_steps",
            "3",
            "--seed",
            "0",
        ]
        base += ["--rank", "4", "--max_sequence_length", "64", "--report_to", "none", "--dataloader_num_workers", "0"]
        t2i.main(t2i.parse_args([str(word) for word in [*base, *flags]]))
        return folder

    return start

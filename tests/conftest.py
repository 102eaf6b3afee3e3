"""What every test gets: a hermetic environment, both scripts as modules, the tiny models, drawn images.

A test of the fixture `script` runs on both scripts, unless it or its file is marked `scripts("t2i")`: what it is about
stands in shared regions then, which are the same bytes in both (`test_sync.py`). `t2i` and `i2i` are for what is one
script's own.
"""

import functools
import gc
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

# Before anything imports huggingface_hub or accelerate: no file of the user's is read, no network is asked.
_HOME = tempfile.mkdtemp(prefix="flux2-tests-")
os.environ.update(
    HF_HOME=_HOME, HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false"
)
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "HF_TOKEN", "HUGGING_FACE", "WANDB_API"))]:
    del os.environ[_name]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from helpers import bitsandbytes_on_cpu  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

SCRIPTS = {"t2i": "train_dreambooth_lora_flux2", "i2i": "train_dreambooth_lora_flux2_img2img"}


def draw_photo(path: Path, size: tuple[int, int], seed: int, exif_orientation: int | None = None) -> Path:
    """A JPEG of (width, height) with gradients, shapes and noise; with an EXIF orientation like a phone's."""
    rng = np.random.default_rng(seed)
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :, None] * rng.random(3) + np.linspace(0, 255, height)[
        :, None, None
    ] * rng.random(3)
    image = Image.fromarray((ramp / 2 + rng.normal(0, 6, (height, width, 3)) + 20).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(5, max(6, min(size) // 3))
        draw.ellipse([x - r, y - r, x + r, y + r], fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
    exif = Image.Exif()
    if exif_orientation:
        exif[0x0112] = exif_orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92, exif=exif)
    return path


def draw_photos(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """`count` JPEGs of different sizes and EXIF orientations, with a `.cache` folder and a `.DS_Store` beside them."""
    sizes = [(96, 128), (128, 96), (128, 128), (200, 120), (90, 160)]
    for number in range(count):
        orientation = (None, 6, 3, None, 8)[number % 5]
        draw_photo(folder / f"{number:02d}.jpg", sizes[number % 5], seed + number, orientation)
    (folder / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
    (folder / ".cache" / "huggingface" / "hidden.jpg").write_bytes(b"not an image")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def draw_references(folder: Path, size: tuple[int, int] | None = None) -> Path:
    """A reference for each image of `draw_photos`, one lying on its side; of many sizes or all of one."""
    sizes = [(80, 72), (64, 128), (64, 100), (150, 70), (150, 70)]  # the last two are a group
    for number, own_size in enumerate(sizes):
        lying = number == 1 and size is None
        draw_photo(folder / f"{number:02d}.png", size or own_size, 100 + number, exif_orientation=6 if lying else None)
    return folder


def load_script(name: str) -> ModuleType:
    """The script of this short name as a module."""
    import torch

    torch.set_num_threads(1)  # bit-exact comparisons, and faster on a model this small
    module = importlib.import_module(SCRIPTS[name])
    gc.freeze()  # as `few_objects_to_collect`
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out a test of the fixture `script` on a script that its nearest mark `scripts` does not name.

    A test that is parametrised over the scripts itself keeps them. Files with slow tests come first: of two processes
    that take a file after the other, none is then left alone with a long one.
    """

    def runs(item: pytest.Item) -> bool:
        marker, parameters = item.get_closest_marker("scripts"), getattr(getattr(item, "callspec", None), "params", {})
        own = any("script" in mark.args[0] for mark in item.iter_markers("parametrize"))
        return marker is None or own or parameters.get("script", marker.args[0]) in marker.args

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items[:] = sorted(filter(runs, items), key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> None:
    """A script's collections do not go through what the libraries of earlier files have left: half of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request) -> ModuleType:
    """Each of the two scripts as a module."""
    return load_script(request.param)


@pytest.fixture(scope="session")
def t2i() -> ModuleType:
    """The text-to-image script as a module."""
    return load_script("t2i")


@pytest.fixture(scope="session")
def i2i() -> ModuleType:
    """The image-to-image script as a module."""
    return load_script("i2i")


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


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """A reference for each of the five photographs, by file name. Read-only: copy them to change them."""
    return draw_references(tmp_path_factory.mktemp("data") / "references")


@pytest.fixture(scope="session")
def square_references(tmp_path_factory) -> Path:
    """References of one size, with which the five photographs are one group in one bucket. Read-only."""
    return draw_references(tmp_path_factory.mktemp("data") / "square", size=(72, 72))


def of_edits(script: ModuleType, *flags: str | Path) -> tuple[str | Path, ...]:
    """Flags that the image-to-image script alone has: given to it, left out for the other one."""
    return flags if script.TASK == "image-to-image" else ()


@pytest.fixture(scope="session")
def reference_flags(script, references) -> tuple:
    """The flags that give the photographs their references, where the script has such."""
    return of_edits(script, "--cond_data_dir", references)


@pytest.fixture(scope="session")
def one_group(script, square_references) -> tuple:
    """The flags under which every photograph in one bucket has one geometry, whichever the script."""
    return of_edits(script, "--cond_data_dir", square_references)


@pytest.fixture(scope="session")
def reference_dropout(script) -> tuple:
    """The flags with which the script draws one random number more at each visit, if it can."""
    return of_edits(script, "--cond_dropout", "0.4")


@pytest.fixture(scope="session")
def validation_reference(script, references) -> tuple:
    """The flags that give the first validation prompt a reference, where the script has such."""
    return of_edits(script, "--validation_image", references / "02.png")


@pytest.fixture
def bnb_on_cpu(monkeypatch):
    """bitsandbytes' formats may be trained on without a GPU."""
    bitsandbytes_on_cpu(monkeypatch.setattr)


@pytest.fixture
def train(script, tiny, photos, reference_flags, tmp_path):
    """Runs the script in this process: `train("--rank", "4", ...)` returns the output folder.

    The defaults are three quick steps at 64 px on the photographs with their references; a later flag replaces an
    earlier one, and other data have no references unless they are given. `output=` names the folder.
    """

    def start(*flags: str, output: str | Path = "out") -> Path:
        folder = tmp_path / output
        data = ["--instance_data_dir", photos]
        data += [] if {"--instance_data_dir", "--dataset_name"} & {*map(str, flags)} else reference_flags
        base = ["--pretrained_model_name_or_path", tiny, *data, "--output_dir", folder]
        base += ["--instance_prompt", "a photo of sks toy", "--resolution", "64"]
        base += ["--max_train_steps", "3", "--seed", "0"]
        base += ["--rank", "4", "--max_sequence_length", "64", "--report_to", "none", "--dataloader_num_workers", "0"]
        script.main(script.parse_args([str(word) for word in [*base, *flags]]))
        return folder

    return start


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache that the runs of one test file share, so that only the first of them encodes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick(train, cache):
    """`train` with the shared cache, images in it too."""
    return functools.partial(train, "--latents_cache_dir", cache, "--cache_latents")


@pytest.fixture(scope="session")
def soak(request):
    """`soak(name, **counts)` adds up what was survived; with SOAK_JSON set, benchmarks/soak.json gets the sums."""
    counts, started = {}, time.monotonic()

    def note(name: str, **numbers: int) -> None:
        sums = counts.setdefault(name, dict.fromkeys(numbers, 0))
        for key, number in numbers.items():
            sums[key] = sums.get(key, 0) + number

    yield note
    if os.environ.get("SOAK_JSON"):
        from benchmarks.results import write_result

        seconds, failed = round(time.monotonic() - started), request.session.testsfailed
        write_result("soak", {"command": "make test-soak", "seconds": seconds, "failed": failed, "survived": counts})

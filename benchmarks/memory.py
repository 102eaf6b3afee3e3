"""Measure peak host memory with 50 and 400 images of 512 px and cached latents: it must not grow with the data.

    python benchmarks/memory.py

Needs Linux: the peak is VmHWM of the training process, which starts at zero with the program, unlike ru_maxrss.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from results import ROOT, write_result

# Runs the script as the main program and prints its peak resident memory at exit.
WATCHED = """
import atexit, re, runpy, sys
from pathlib import Path
status = Path("/proc/self/status")
atexit.register(lambda: print("peak_kib", re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def draw_images(folder: Path, count: int, size: int) -> Path:
    """Writes `count` different JPEGs of `size` x `size` pixels: smooth noise, which compresses like a photo."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:04d}.jpg", quality=90)
    return folder


def measure(count: int, folder: Path, size: int = 512, model: Path = ROOT / "tiny_flux2") -> dict[str, float]:
    """Trains for five steps on `count` images below `folder`; returns the process's peak memory and wall time."""
    images = draw_images(folder / f"images-{count}", count, size)
    words = [ROOT / "train_dreambooth_lora_flux2.py", "--pretrained_model_name_or_path", model]
    words += ["--instance_data_dir", images, "--instance_prompt", "a photo of sks toy", "--resolution", size]
    words += ["--output_dir", folder / f"out-{count}", "--max_train_steps", 5, "--seed", 0, "--cache_latents"]
    words += ["--max_sequence_length", 64, "--report_to", "none", "--dataloader_num_workers", 0, "--rank", 4]
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", WATCHED, *map(str, words)], capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"the run on {count} images failed:\n{process.stderr}")
    peak = int(process.stdout.split("peak_kib")[1].split()[0])
    return {"images": count, "peak_mb": peak * 1024 / 1e6, "seconds": time.monotonic() - started}


def main() -> None:
    """Measures each number of images and writes memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 400], help="numbers of images to train on")
    parser.add_argument("--size", type=int, default=512, help="image size and training resolution in pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(count, Path(folder), args.size) for count in args.counts]
    growth = runs[-1]["peak_mb"] / runs[0]["peak_mb"]
    print(write_result("memory", {"size": args.size, "runs": runs, "growth": growth}).read_text())


if __name__ == "__main__":
    main()

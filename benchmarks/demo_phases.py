"""Measure the wall time of the demo by phase: run the command of `make demo` and time the functions of the script.

    python benchmarks/demo_phases.py

This file launches itself with `accelerate launch`, like the demo launches the script, and then calls the script's main.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import ROOT, write_result

CONFIG = "configs/accelerate/cpu.yaml"
RUN = "configs/runs/demo_cpu.args"
PHOTOS = "outputs/demo/photos"

# Function of the script -> phase. Time counts only for the innermost phase; time outside all phases is "other".
PHASES = {
    "start_accelerator": "start",
    "check_data": "check data",
    "check_plan": "check data",
    "encode_prompts": "encode prompts",
    "encode_images": "encode images",
    "load_vae": "encode images",
    "prepare_training": "load transformer, add LoRA",
    "train": "training loop",
    "validate": "validation images",
    "save_results": "save",
    "draw_final_images": "final images",
    "write_card": "save",
}


class Clock:
    """Adds up the seconds of each phase, excluding the phases inside it."""

    def __init__(self) -> None:
        """Starts with no phase running."""
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]

    def around(self, phase: str, function: Callable) -> Callable:
        """Wraps the function so that its time counts for the phase."""

        def timed(*arguments: object, **options: object) -> object:
            started = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter() - started
                self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed - self.inner.pop()
                self.inner[-1] += elapsed

        return timed


def run_inside(output_dir: str, result: str) -> None:
    """Runs in the launched process: imports the script, times its functions, writes the seconds to `result`."""
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import train_dreambooth_lora_flux2 as script

    imported = time.perf_counter() - began
    clock = Clock()
    for name, phase in PHASES.items():
        setattr(script, name, clock.around(phase, getattr(script, name)))
    began = time.perf_counter()
    script.main(script.parse_args([f"@{RUN}", "--output_dir", output_dir]))
    total = time.perf_counter() - began
    phases = {"import libraries": imported, **clock.seconds, "other": total - sum(clock.seconds.values())}
    Path(result).write_text(json.dumps(phases))


def measure() -> dict:
    """Runs the demo once and returns its seconds, in total and by phase."""
    if not (ROOT / PHOTOS / "toy-5.jpg").is_file():
        subprocess.run([sys.executable, "tools/draw_demo_photos.py", PHOTOS], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "phases.json"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
        words = [__file__, "--inside", str(Path(folder) / "lora"), str(result)]
        began = time.perf_counter()
        subprocess.run([*launcher, *words], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
        total = time.perf_counter() - began
        phases = json.loads(result.read_text())
    return {"total_seconds": total, "phases": {"accelerate launch": total - sum(phases.values()), **phases}}


def main() -> None:
    """Measures the demo and writes demo_phases.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inside", nargs=2, metavar=("OUTPUT_DIR", "RESULT"), help="used internally by this file")
    args = parser.parse_args()
    if args.inside:
        run_inside(*args.inside)
    else:
        print(write_result("demo_phases", measure()).read_text())


if __name__ == "__main__":
    main()

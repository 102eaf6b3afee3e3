"""Stores a benchmark's results as JSON next to it, with the command, date, machine and library versions."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOAD = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "Pillow")


def cpu_model() -> str:
    """The processor's name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_result(name: str, values: dict) -> Path:
    """Writes `name`.json: the values, the command, the date, the machine and the library versions."""
    content = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": LOAD,  # at the start; above 0.5, other programs were running
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        **values,
    }
    path = HERE / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_result(name: str) -> dict | None:
    """The stored result of a benchmark, or None if it has not been run."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

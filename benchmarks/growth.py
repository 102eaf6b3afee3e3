"""Measure how costs grow with images, captions, resolution, references and rank, on the CPU with the embedded model.

    python benchmarks/growth.py            all axes, about eight minutes on an idle machine
    python benchmarks/growth.py rank       one axis; the others keep their stored results

Times are CPU time in one thread, so other programs on the machine change them little; the time of a step is a median.
With images and captions each run is started twice: the second start reads from the cache what the first one encoded.
Needs Linux, like memory.py. Writes growth.json and docs/growth.png; `table.py growth` prints the tables for
docs/memory.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import WATCHED, draw_images
from results import ROOT, read_result, write_result

AXES = {
    "images": (50, 500, 5000),
    "captions": (50, 500, 5000),
    "resolution": (64, 128, 256, 512),
    "references": (0, 1, 2, 4),
    "rank": (4, 16, 64, 256),
}
TEXT_TOKENS = 64
ON_PROCESSOR = "import time\ntime.perf_counter = time.process_time\n"  # makes the script measure its steps in CPU time


def make_words(axis: str, value: int, folder: Path) -> list[str | Path]:
    """Writes the images of one point and returns its flags; everything else is as small as possible."""
    size = {"resolution": value, "references": 256}.get(axis, 64)
    count = value if axis == "images" else 50 if axis == "captions" else 4
    images = draw_images(folder / "images", count, size)
    if axis == "captions":  # distributed over the images
        texts = [[f"a photo of toy number {number}" for number in range(row, value, count)] for row in range(count)]
        rows = [{"file_name": f"{row:04d}.jpg", "text": text} for row, text in enumerate(texts)]
        (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--instance_data_dir", images, "--instance_prompt", "a photo of sks toy", "--resolution", size]
    words += ["--rank", value if axis == "rank" else 4, "--max_train_steps", 5 if count > 4 else 12]
    if axis == "references" and value:
        words += ["--cond_data_dir", *(draw_images(folder / f"references-{n}", count, size) for n in range(value))]
    return words


def start(script: str, words: list[str | Path], folder: Path, name: str) -> dict[str, float]:
    """Runs the script once in a new process; returns its peak memory, its times, and the time of a step."""
    words = [ROOT / script, "--pretrained_model_name_or_path", ROOT / "tiny_flux2", *words, "--cache_latents"]
    words += ["--output_dir", folder / name, "--latents_cache_dir", folder / "cache", "--seed", 0]
    words += ["--max_sequence_length", TEXT_TOKENS, "--report_to", "none", "--dataloader_num_workers", 0]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command, threads = [sys.executable, "-c", ON_PROCESSOR + WATCHED, *map(str, words)], {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if process.returncode != 0:
        raise RuntimeError(f"{words} failed:\n{process.stderr}")
    after, lines = resource.getrusage(resource.RUSAGE_CHILDREN), (folder / name / "metrics.jsonl").read_text()
    steps = [json.loads(line)["seconds"] for line in lines.splitlines()]
    peak = int(process.stdout.split("peak_kib")[1].split()[0])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "peak_mb": round(peak * 1024 / 1e6, 1),
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(time.monotonic() - began, 2),
        "step_seconds": round(statistics.median(steps[1:]), 5),  # the first step is a warm-up
    }


def measure(axis: str, value: int) -> dict[str, Any]:
    """Measures one point: a first start, a second one for images and captions, and the bytes on disk."""
    script = "train_dreambooth_lora_flux2" + "_img2img" * (axis == "references") + ".py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = make_words(axis, value, folder)
        found = {"axis": axis, "value": value, **start(script, words, folder, "out")}
        if axis in ("images", "captions"):
            found["again_cpu_seconds"] = start(script, words, folder, "again")["cpu_seconds"]
        for part in ("latents", "prompts"):
            sizes = [path.stat().st_size for path in (folder / "cache" / part).glob("*.safetensors")]
            found |= {f"{part}_files": len(sizes), f"{part}_bytes": sum(sizes)}
        found["lora_bytes"] = (folder / "out" / "pytorch_lora_weights.safetensors").stat().st_size
    print(json.dumps(found), flush=True)
    return found


def disk_of_models() -> dict[str, dict[str, int]]:
    """Bytes in the cache per caption and per 1024 px image for the real models in bf16, computed from their configs."""
    found = {}
    for model, parts in json.loads((ROOT / "tools" / "architectures.json").read_text(encoding="utf-8")).items():
        config = parts["transformer"]
        # a prompt embedding has 512 tokens in bf16; an image has mean and log-variance in fp32, 16 x 16 px per token
        caption, image = 512 * config["joint_attention_dim"] * 2, 2 * config["in_channels"] * (1024 // 16) ** 2 * 4
        found[model] = {"caption": caption, "image_1024": image}
    return found


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots time and memory against the number of images and captions, and step time against the number of tokens."""
    sys.path.insert(0, str(ROOT / "tools"))
    from PIL import Image
    from plot_metrics import COLOURS, Curve, draw_panel

    def curve(axis: str, key: str, label: str, colour: int, x_of: Any = lambda value: value) -> Curve:
        points = [(x_of(row["value"]), row[key]) for row in rows if row["axis"] == axis and key in row]
        return Curve(label, COLOURS[colour], points, marked=True)

    counted = ("images", "captions")
    first = [curve(axis, "cpu_seconds", f"{axis}, first start", n) for n, axis in enumerate(counted)]
    again = [curve(axis, "again_cpu_seconds", f"{axis}, next start", n + 3) for n, axis in enumerate(counted)]
    peaks = [curve(axis, "peak_mb", axis, n) for n, axis in enumerate(counted)]
    tokens = (256 // 16) ** 2
    steps = [curve("resolution", "step_seconds", "resolution", 0, lambda side: (side // 16) ** 2 + TEXT_TOKENS)]
    steps += [curve("references", "step_seconds", "references", 1, lambda n: (n + 1) * tokens + TEXT_TOKENS)]
    panels = {"seconds of start and five steps, by number": [*first, *again], "peak memory in MB, by number": peaks}
    panels["seconds of a step, by tokens"] = steps
    images = []
    for title, curves in panels.items():
        last = max(x for one in curves for x, _ in one.points)
        images.append(draw_panel(title, curves, last, lowest=0.0))
    sheet = Image.new("RGB", (images[0].width, sum(image.height for image in images)), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (0, number * image.height))
    sheet.quantize(64).save(path, optimize=True)


def main() -> None:
    """Measures the given axes, or all of them, and writes growth.json and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"axes to measure: {', '.join(AXES)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.axes) - set(AXES):
        parser.error(f"unknown axis {unknown.pop()}; choose from {', '.join(AXES)}")
    axes = args.axes or [*AXES]
    kept = [row for row in (read_result("growth") or {"rows": []})["rows"] if row["axis"] not in axes]
    rows = kept + [measure(axis, value) for axis in axes for value in AXES[axis]]
    rows.sort(key=lambda row: ([*AXES].index(row["axis"]), row["value"]))
    write_result("growth", {"rows": rows, "disk": disk_of_models()})
    draw_plot(rows, ROOT / "docs" / "growth.png")


if __name__ == "__main__":
    main()

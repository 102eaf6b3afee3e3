"""Measure peak memory and seconds per step of the real architectures on this GPU, with random weights.

    python benchmarks/gpu.py --budget 500                    adds to benchmarks/gpu.json
    python benchmarks/gpu.py --budget 500 --out OTHER.json   writes to another file

Nothing is downloaded. The script's own training step runs for each row of a list, the most important rows first, for at
most 25 s plus compilation. Results are written after each row, and the next call continues with the rows that are
missing for this GPU model. A row that runs out of memory or fails otherwise is stored with its error; only the other
failures are retried at the next call. A compiled row runs in its own process: with a second base in the same process,
torch.compile would reach its recompile limit and silently run eagerly. `tools/plan_memory.py` reads the results.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import LIBRARIES, ROOT

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
import bare_training
from plan_memory import BASES, Job, step_tflop

ROW_SECONDS, COMPILE_SECONDS, MOST_STEPS = 25.0, 100.0, 10
KEYS = ("model", "base", "share", "resolution", "references", "compiled", "streamed")
EAGER = [  # model, base, share of recomputed blocks, resolution, number of 1 MP reference images
    ("dev", "fp8", 1.0, 1024, 0), ("dev", "bf16", 1.0, 1024, 0), ("klein-9B", "bf16", 1.0, 1024, 0),
    ("dev", "nf4", 1.0, 512, 0), ("klein-4B", "bf16", 1.0, 1024, 0), ("dev", "bf16", 1.0, 512, 0),
    ("dev", "fp8", 1.0, 512, 0), ("dev", "int8", 1.0, 512, 0), ("dev", "fp8", 1.0, 1024, 1),
    ("klein-9B", "fp8", 1.0, 1024, 0), ("dev", "nf4", 1.0, 1024, 0), ("klein-9B", "nf4", 1.0, 1024, 0),
    ("klein-4B", "bf16", 0.0, 1024, 0), ("dev", "bf16", 1.0, 1024, 1), ("klein-9B", "bf16", 0.0, 512, 0),
    ("klein-4B", "bf16", 1.0, 1024, 1), ("dev", "bf16", 0.053, 1024, 0),
]  # fmt: skip
COMPILED = [("dev", "fp8", 1.0, 1024, 0), ("dev", "bf16", 1.0, 1024, 0), ("klein-9B", "fp8", 1.0, 1024, 0),
            ("klein-9B", "bf16", 1.0, 1024, 0), ("dev", "fp8", 1.0, 512, 0)]  # fmt: skip
STREAMED = [("dev", "fp8", 1.0, 1024, 0, False, 1.0), ("dev", "bf16", 1.0, 1024, 0, False, 1.0),
            ("dev", "fp8", 1.0, 1024, 0, False, 0.5), ("dev", "bf16", 1.0, 1024, 0, False, 0.5),
            ("klein-9B", "bf16", 1.0, 1024, 0, False, 1.0)]  # fmt: skip
ROWS = [(*row, True, 0.0) for row in COMPILED] + STREAMED + [(*row, False, 0.0) for row in EAGER]


def flags_of(row: dict[str, Any]) -> list[Any]:
    """The script's flags for a row."""
    words = [ROOT / word if word.endswith(".json") else word for word in BASES[row["base"]][1]]
    words += ["--gradient_checkpointing", row["share"]] if row["share"] else []
    return words + (["--stream_blocks", row["streamed"]] if row["streamed"] else [])


def measure(row: dict[str, Any], seconds: float = ROW_SECONDS) -> dict[str, Any]:
    """Builds the model of a row on the device and trains for a few steps; returns the measurements."""
    started, job = time.perf_counter(), Job(row["model"], row["resolution"], row["references"])
    torch.manual_seed(0)  # the same weights, so that losses are comparable between rows
    with tempfile.TemporaryDirectory() as folder:
        run = job.run(folder, *flags_of(row))
        streams = bare_training.make_streams(job.script, run, job.references)
        training = bare_training.set_up(job.script, run, streams)
        built = time.perf_counter() - started
        batches, times, losses = bare_training.make_batches(job.script, run, training), [], []
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds += COMPILE_SECONDS * row["compiled"]
        while len(times) < 2 or (len(times) < MOST_STEPS and time.perf_counter() - started < seconds):
            values = job.script.train_step(run, training, batches)
            times.append(values["seconds"])
            losses.append(values["loss"])
    step = statistics.median(times[1:])  # the first step is a warm-up and compiles
    values = {"steps": len(times) - 1, "seconds_per_step": step, "tflops": step_tflop(job, row["share"]) / step}
    values |= {"build_seconds": built, "first_step_seconds": times[0], "losses": losses}
    if row["compiled"]:
        values["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if run.device.type == "cuda":
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return values


def attempt(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of `measure`, or the error; a compiled row runs in its own process."""
    try:
        return measure_alone(row) if row["compiled"] else measure(row)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except (Exception, SystemExit) as error:  # one row that fails must not stop the others
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure_alone(row: dict[str, Any]) -> dict[str, Any]:
    """Runs `measure` in a new process, with blocks compiled by Inductor."""
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    environment = {**os.environ, "ACCELERATE_DYNAMO_BACKEND": "inductor"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(action: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Median seconds of an action, including its work on the device."""
    taken = []
    for _ in range(times + 2):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def matmul_peaks(device: torch.device, size: int) -> dict[str, float | None]:
    """TFLOP/s of one large matmul in bf16, and in FP8 as the script computes it: the most that a step could reach."""
    import train_dreambooth_lora_flux2 as script

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    peaks = {"bf16": 2 * size**3 / seconds_of(lambda: left @ right, device) / 1e12, "fp8": None}
    try:
        (rows, row_scales), (columns, column_scales) = script.to_fp8(left), script.to_fp8(right)
        operands, options = (rows, columns.t(), row_scales, column_scales.t()), {"out_dtype": torch.bfloat16}
        product = functools.partial(torch._scaled_mm, *operands, **options, use_fast_accum=True)
        peaks["fp8"] = 2 * size**3 / seconds_of(product, device) / 1e12
    except RuntimeError as error:
        print(f"FP8: {error}".splitlines()[0])
    return peaks


def predicted_gb(row: dict[str, Any]) -> float | None:
    """The prediction for a row in benchmarks/plan_memory.json, or None."""
    path = ROOT / "benchmarks" / "plan_memory.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = [] if row["compiled"] or row["streamed"] or row.get("flags") else rows  # those are of the default flags
    found = [known["training_gb"] for known in rows if all(known[key] == row[key] for key in KEYS[:5])]
    return found[0] if found else None


def version_of(library: str) -> str | None:
    """The version of an installed library, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_rows(path: Path, rows: list[tuple], budget: float, gpu: str, device: torch.device, size: int) -> list[dict]:
    """Measures the rows that are missing in `path` or failed there, within the budget; writes after each row."""
    started = time.perf_counter()
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"peaks": {}, "rows": []}
    if gpu not in content["peaks"]:
        content["peaks"][gpu] = matmul_peaks(device, size)
    content["rows"] = [row for row in content["rows"] if row["gpu"] != gpu or "memory" in row.get("failed", "memory")]
    known = {tuple(row[key] for key in KEYS) for row in content["rows"] if row["gpu"] == gpu}
    for config in (config for config in rows if config not in known):
        row = dict(zip(KEYS, config, strict=True))
        if time.perf_counter() - started + ROW_SECONDS + COMPILE_SECONDS * row["compiled"] > budget:
            print(f"budget used up: {config} is left for the next call")
            continue
        values = attempt(row)
        peak = content["peaks"][gpu]["fp8" if row["base"] == "fp8" else "bf16"]
        share = values["tflops"] / peak if peak and "tflops" in values else None
        versions = {library: version_of(library) for library in (*LIBRARIES, "bitsandbytes")}
        facts = {"gpu": gpu, "predicted_gb": predicted_gb(row), "share_of_matmul_peak": share, "versions": versions}
        content["rows"].append({**row, **values, **facts})
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({**row, **values, "predicted_gb": facts["predicted_gb"]}), flush=True)
    return content["rows"]


def main() -> None:
    """Measures the rows on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=500, help="time limit of this call in seconds (default: 500)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json", help="file to add the results to")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)  # one row as JSON, used by measure_alone
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row)))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU found: nothing is measured; tools/plan_memory.py predicts these rows")
    run_rows(args.out, ROWS, args.budget, torch.cuda.get_device_name(), torch.device("cuda"), 8192)


if __name__ == "__main__":
    main()

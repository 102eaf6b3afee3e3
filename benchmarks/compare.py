"""Compare another training script with ours on the same data and models: start-up, step and wall time, and memory.

    python benchmarks/compare.py --against PATH                             any script that accepts diffusers' flags
    python benchmarks/compare.py --against PATH -- --rank 64                extra flags for both scripts
    python benchmarks/compare.py --against train_dreambooth_lora_flux2.py   our script against itself: shows the noise

There are two models: the embedded one and one with a wider random transformer. Each round runs both scripts twice, each
time in a new process and a new output folder, and the scripts take turns to go first. The second run reuses what the
first one cached if the script accepts --latents_cache_dir. Flags that only one of the scripts accepts are omitted. A
step ends when the optimizer's step has finished, on a GPU after synchronising with it. Memory is the peak of the main
process on the CPU, and of allocated tensors on a GPU. Writes compare.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import draw_images
from results import ROOT, write_result

OURS = ROOT / "train_dreambooth_lora_flux2.py"
MODELS = {"tiny": (None, 64), "mid": (640, 256)}  # width of the transformer, pixels per side
FIGURES = {
    "first_step_seconds": ("time to the end of the first step", "s"),
    "step_seconds": ("time per step", "s"),
    "wall_seconds": ("time of the whole run", "s"),
    "peak_gb": ("peak memory", "GB"),
}

# Runs the script as the main program. Writes the end times of its steps and its peak memory to the first argument.
WATCHED = """
import atexit, json, re, runpy, sys, time
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
result, sys.argv, ends = Path(sys.argv[1]), sys.argv[2:], []

def note(*_):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.time())

def write():
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
    result.write_text(json.dumps({"ends": ends, "peak": peak}))

register_optimizer_step_post_hook(note)
atexit.register(write)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags_of(script: Path) -> set[str]:
    """The flags listed in the script's --help."""
    text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z0-9_]+", text))


def start(script: Path, words: list[Any], result: Path) -> dict[str, float]:
    """Runs the script in a new process. Raises RuntimeError with its last output if it fails or takes only one step."""
    command = [sys.executable, "-c", WATCHED, *map(str, (result, script, *words))]
    began = time.time()
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wall = time.time() - began
    seen = json.loads(result.read_text()) if result.is_file() else {"ends": []}
    ends = seen["ends"]
    if process.returncode or len(ends) < 2:
        raise RuntimeError(
            f"{script} ended with {process.returncode} after {len(ends)} steps:\n{process.stderr[-2000:]}"
        )
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    values = (ends[0] - began, statistics.median(steps), wall, seen["peak"] / 1e9)
    return dict(zip(FIGURES, values, strict=True))


def make_words(folder: Path, model: str, steps: int, known: set[str]) -> list[Any]:
    """Command line for both scripts: flags that every such script accepts, and optional ones that are in `known`."""
    import torch

    width, size = MODELS[model]
    model_path, images = ROOT / "tiny_flux2", folder / f"images-{model}"
    if width:
        from step_time import make_model

        model_path = make_model(folder / model, width)
    words = ["--pretrained_model_name_or_path", model_path, "--instance_data_dir", draw_images(images, 5, size)]
    words += ["--instance_prompt", "a photo of sks toy", "--resolution", size, "--max_train_steps", steps]
    words += ["--seed", 0, "--rank", 16, "--learning_rate", 1e-4]
    optional = {"--max_sequence_length": [128], "--train_batch_size": [1], "--cache_latents": []}
    optional |= {"--lora_layers": ["attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"]}  # the scripts' defaults differ
    optional |= {"--dataloader_num_workers": [0], "--mixed_precision": ["bf16" if torch.cuda.is_available() else "no"]}
    return words + [word for flag, values in optional.items() if flag in known for word in (flag, *values)]


def compare(against: Path, rounds: int, steps: int, models: list[str], more: list[str]) -> list[dict[str, Any]]:
    """One row per run: the model, the script ("other" or "ours"), the round, the start (1 or 2) and the figures."""
    scripts, rows = {"other": against, "ours": OURS}, []
    accepted = {name: flags_of(script) for name, script in scripts.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in models:
            words = [*make_words(folder, model, steps, accepted["other"] & accepted["ours"]), *more]
            for turn in range(rounds):
                for script in [*scripts] if turn % 2 else [*scripts][::-1]:
                    outputs = folder / f"{model}-{turn}-{script}"
                    outputs.mkdir()
                    cache = ["--latents_cache_dir", outputs / "cache"] * ("--latents_cache_dir" in accepted[script])
                    for number in (1, 2):
                        output = ["--output_dir", outputs / f"out-{number}", *cache]
                        found = start(scripts[script], [*words, *output], outputs / f"seen-{number}.json")
                        rows.append({"model": model, "script": script, "round": turn, "start": number, **found})
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both scripts' medians over the rounds, the median ratio of ours to the other script in the same round, and the
    ratio of the fastest (smallest) runs, which other programs on the machine change the least."""
    found = []
    for model, number in dict.fromkeys((row["model"], row["start"]) for row in rows):
        for figure in FIGURES:
            values = {
                script: [
                    row[figure]
                    for row in sorted(rows, key=lambda row: row["round"])
                    if (row["model"], row["start"], row["script"]) == (model, number, script)
                ]
                for script in ("other", "ours")
            }
            ratio = statistics.median(ours / other for other, ours in zip(*values.values(), strict=True))
            medians = {script: statistics.median(each) for script, each in values.items()}
            ratios = {"ratio": ratio, "best_ratio": min(values["ours"]) / min(values["other"])}
            found.append({"model": model, "start": number, "figure": figure, **medians, **ratios})
    return found


def table(medians: list[dict[str, Any]], against: Path) -> str:
    """The medians as a Markdown table."""
    lines = [
        f"| model, start | figure | {against.name} | ours | ours / other | best / best |",
        "|---|---|---|---|---|---|",
    ]
    for row in medians:
        what, unit = FIGURES[row["figure"]]
        start = {1: "first", 2: "second"}[row["start"]]
        figures = f"{row['other']:.3g} {unit} | {row['ours']:.3g} {unit} | {row['ratio']:.2f} | {row['best_ratio']:.2f}"
        lines.append(f"| {row['model']}, {start} start | {what} | {figures} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the comparison, writes compare.json and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="path of the other script")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per run, at least two")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="models to run on")
    parser.add_argument("more", nargs="*", help="flags for both scripts, after --")
    args = parser.parse_args(argv)
    rows = compare(args.against, args.rounds, args.steps, args.models, args.more)
    medians = summary(rows)
    write_result("compare", {"against": args.against.name, "steps": args.steps, "medians": medians, "runs": rows})
    print(table(medians, args.against))


if __name__ == "__main__":
    main()

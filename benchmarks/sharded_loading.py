"""Measure host memory per process while FSDP2 loads a transformer: does each process keep only its own shard?

    python benchmarks/sharded_loading.py [--processes 1 2 4] [--output benchmarks/sharded_loading.json]
    python benchmarks/sharded_loading.py --fp8 --processes 2           adds FP8 results to the existing JSON

Creates a transformer with about a billion random bf16 weights, runs the script's own loading (load_transformer,
add_lora, place_transformer) on the CPU in the given number of processes, and samples each process's PSS, where a page
mapped by n processes counts as 1/n, and its anonymous memory, which does not include mapped files. With one process the
model is not sharded. Linux only.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDE = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 2, "num_single_layers": 4,
        "axes_dims_rope": [32, 32, 32, 32]}  # fmt: skip


def read_memory(name: str = "Pss") -> float:
    """This process's proportional set size (PSS) in GB, or its "Anonymous" memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e9


class Sampler(threading.Thread):
    """Samples PSS and anonymous memory ten times a second and keeps the largest values."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.anonymous, self.running = 0.0, 0.0, True

    def run(self) -> None:
        """Samples until `running` is set to False."""
        while self.running:
            self.peak = max(self.peak, read_memory())
            self.anonymous = max(self.anonymous, read_memory("Anonymous"))
            time.sleep(0.1)


def make_model(folder: Path) -> int:
    """Writes the embedded model with a wide transformer in bf16; returns the size of its weights in bytes."""
    import torch
    from diffusers import Flux2Transformer2DModel

    shutil.copytree(ROOT / "tiny_flux2", folder, ignore=shutil.ignore_patterns("transformer"))
    config = json.loads((ROOT / "tiny_flux2/transformer/config.json").read_text())
    torch.manual_seed(0)
    model = Flux2Transformer2DModel.from_config({**config, **WIDE}).to(torch.bfloat16)
    model.save_pretrained(folder / "transformer")
    return sum(parameter.nbytes for parameter in model.parameters())


def measure_here(arguments: list[str]) -> None:
    """Runs in each launched process: loads the model like a training run and writes the memory that it used."""
    sys.path.insert(0, str(ROOT))
    from torch.distributed.tensor import DTensor

    import train_dreambooth_lora_flux2 as script

    run = script.start_accelerator(script.parse_args(arguments))
    run.accelerator.wait_for_everyone()
    before, anonymous, sampler = read_memory(), read_memory("Anonymous"), Sampler()
    sampler.start()
    transformer = script.load_transformer(run)
    script.add_lora(run, transformer)
    script.place_transformer(run, transformer)
    if run.processes == 1:  # read every weight, as the first forward pass would
        sum(parameter.float().sum() for parameter in transformer.parameters())
    run.accelerator.wait_for_everyone()
    sampler.running = False
    sampler.join()
    sharded = sum(isinstance(parameter, DTensor) for parameter in transformer.parameters())
    seen = {"processes": run.processes, "sharded_tensors": sharded, "before_gb": round(before, 3),
            "peak_above_gb": round(sampler.peak - before, 3), "kept_above_gb": round(read_memory() - before, 3),
            "anonymous_peak_above_gb": round(sampler.anonymous - anonymous, 3)}  # fmt: skip
    Path(os.environ["MEASURED"], f"{run.process_index}.json").write_text(json.dumps(seen))


def launch(processes: int, model: Path, scratch: Path, *flags: str) -> list[dict]:
    """Launches the processes with these extra flags of the script; returns the measurements of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = scratch / f"seen-{processes}"
    results.mkdir()
    name = "fsdp2.yaml" if processes > 1 else "cpu.yaml"
    config = (ROOT / "configs/accelerate" / name).read_text().replace("gpu_ids: all\n", "")
    config = config.replace("use_cpu: false", "use_cpu: true").replace(
        "num_processes: 8", f"num_processes: {processes}"
    )
    (scratch / name).write_text(f"{config}main_process_port: {port}\n")
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", model, "--output_dir", scratch / "out",
             "--instance_prompt", "a toy", "--mixed_precision", "bf16", "--report_to", "none", *flags]  # fmt: skip
    command = ["accelerate", "launch", "--config_file", scratch / name, __file__, "--here", *words]
    environment = {**os.environ, "MEASURED": str(results), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=ROOT)
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def main() -> None:
    """Creates the model, measures each number of processes and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/sharded_loading.json")
    parser.add_argument("--fp8", action="store_true", help="load with --do_fp8_training")
    args = parser.parse_args()
    import torch

    flags = ["--do_fp8_training"] if args.fp8 else []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        size = make_model(model)
        rows = {str(count): launch(count, model, Path(scratch), *flags) for count in args.processes}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    result = {"date": time.strftime("%Y-%m-%d"), **machine, "weights_gb": round(size / 1e9, 3), "processes": rows}
    if args.fp8:
        result = {**json.loads(args.output.read_text()), "fp8": result}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        measure_here(sys.argv[2:])
    else:
        main()

"""Measure the host memory that a run needs for loading in each format, for data loader workers and for checkpoints.

    python benchmarks/host_memory.py

Creates a model with random bf16 weights (transformer 2.3 GB, text encoder 1 GB), loads it with the script's own
functions on the CPU, and samples `smaps_rollup` every 5 ms. "Mapped" memory consists of pages of the weight files; the
kernel can drop them when memory is short. "Anonymous" memory cannot be dropped; on a GPU, the part of it that is stored
as "device_gb" is in GPU memory instead. glibc's mmap threshold is fixed so that freed memory is returned at once, as it
always is for layers above 32 MB. Needs Linux. Writes host_memory.json, from which tools/plan_memory.py computes the
needs of real models.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import ROOT, write_result

sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
FORMATS = {
    "bf16": (),
    "FP8": ("--do_fp8_training",),
    "FP8, streamed": ("--do_fp8_training", "--stream_blocks"),
    "bf16, streamed": ("--stream_blocks",),
}
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def read_memory(process: int | str = "self") -> dict[str, float]:
    """Memory of a process in GB: anonymous, its share of mapped files, its PSS, and pages no other process uses."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(rest.split()[0]) * 1024 / 1e9 for name, rest in (line.split(":") for line in lines)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"anonymous": found["Anonymous"], "mapped": found["Pss_File"], "pss": found["Pss"], "private": private}


def sample(process: str) -> None:
    """Samples the memory of a process until stdin is closed, then prints the peak of each kind."""
    peak, ended = read_memory(process), threading.Thread(target=sys.stdin.read)
    ended.start()
    print("ready", flush=True)
    while ended.is_alive():
        peak = {kind: max(value, peak[kind]) for kind, value in read_memory(process).items()}
        time.sleep(0.005)
    print(json.dumps(peak))


def watch(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Returns (result of `action`, GB above the start: the peaks while it runs, and what remains afterwards).

    Another process takes the samples: a thread of this process would have to wait while Python copies bytes.
    """
    gc.collect()
    command = [sys.executable, str(Path(__file__).resolve()), "--sample", str(os.getpid())]
    before = read_memory()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
        sampler.stdout.readline()
        result = action()
        now = read_memory()
        peak = json.loads(sampler.communicate()[0])
    found = {f"{kind}_peak_gb": peak[kind] - before[kind] for kind in ("anonymous", "mapped")}
    return result, found | {"anonymous_kept_gb": now["anonymous"] - before["anonymous"]}


def make_model(folder: Path, heads: int) -> Path:
    """Writes the embedded model with a bf16 transformer 128 * `heads` wide and a text encoder a third as wide."""
    import torch
    import transformers
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    shutil.copytree(ROOT / "tiny_flux2", folder, ignore=shutil.ignore_patterns("transformer", "text_encoder"))
    width = 128 * heads // 3
    config = json.loads((ROOT / "tiny_flux2" / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": heads, "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32]}
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config({**config, "joint_attention_dim": 3 * width})
    config = transformers.AutoConfig.from_pretrained(ROOT / "tiny_flux2" / "text_encoder")
    wide = {"hidden_size": width, "intermediate_size": 4 * width, "head_dim": 64}
    vars(config.text_config).update(wide, num_attention_heads=width // 64, num_key_value_heads=width // 64)
    with torch.device("meta"):
        encoder = transformers.Mistral3ForConditionalGeneration(config)
    for part, model in (("transformer", transformer), ("text_encoder", encoder)):
        model.to(torch.bfloat16).to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
        model.save_pretrained(folder / part)
    return folder


def load(script: Any, run: Any) -> Any:
    """Loads the transformer and adapter as a run does, and reads every weight once, as a forward pass would."""
    transformer = script.load_transformer(run)
    script.add_lora(run, transformer)
    script.place_transformer(run, transformer)
    for parameter in transformer.parameters():
        parameter.detach().flatten().view(script.torch.uint8).max()
    return transformer


def measure_loading(script: Any, model: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Loads the text encoder, then the transformer in each format; returns peaks and the size of the blocks."""
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", model, "--instance_prompt", "a toy"]
    words += ["--output_dir", folder / "out", "--mixed_precision", "bf16", "--report_to", "none"]
    runs = {
        name: script.start_accelerator(script.parse_args([*map(str, words), *flags])) for name, flags in FORMATS.items()
    }
    _, found = watch(lambda: script.load_text_encoder(runs["bf16"]))
    rows = {"text encoder, bf16": found}
    for name, run in runs.items():
        transformer, rows[name] = watch(lambda run=run: load(script, run))
        owned = [
            sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad)
            for block in script.blocks_of(transformer)
        ]
        streamed = sum(home.nbytes for home in transformer.stream.pinned_blocks)
        rows[name] |= {"blocks_gb": sum(owned) / 1e9, "largest_block_gb": max(owned) / 1e9, "pinned_gb": streamed / 1e9}
        rows[name]["device_gb"] = sum(owned) / 1e9 if name == "FP8" else 0.0
        del transformer
    return rows


def measure_saving(script: Any, folder: Path, rank: int = 256) -> dict[str, float]:
    """Peak while a checkpoint is saved, per adapter parameter, not counting the adapter and its moments."""
    import bare_training

    architecture = bare_training.read_architecture(str(ROOT / "tiny_flux2"))
    sizes = {"num_attention_heads": 16, "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32]}
    architecture["transformer"] |= sizes
    run = bare_training.start_run(script, architecture, folder / "run", "--rank", rank, "--resolution", 64)
    training = bare_training.set_up(script, run, bare_training.make_streams(script, run))
    run.output_dir.mkdir()
    count = sum(parameter.numel() for parameter in training.parameters.values())
    _, found = watch(lambda: script.save_checkpoint(run, training))
    return {"parameters": count, "bytes_per_parameter": found["anonymous_peak_gb"] * 1e9 / count}


def family(process: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(descendant for child in children for descendant in family(int(child)))]


def measure_workers(count: int, folder: Path) -> dict[str, float]:
    """Trains the embedded model; returns peaks of all processes, of the main one, and of a worker's private pages."""
    from memory import draw_images

    images = folder / "images"
    if not images.exists():
        draw_images(images, 8, 512)
    words = [ROOT / "train_dreambooth_lora_flux2.py", "--pretrained_model_name_or_path", ROOT / "tiny_flux2"]
    words += ["--instance_data_dir", images, "--instance_prompt", "a toy", "--resolution", 512, "--cache_latents"]
    words += ["--output_dir", folder / f"out-{count}", "--latents_cache_dir", folder / "cache", "--report_to", "none"]
    words += ["--max_train_steps", 20, "--max_sequence_length", 64, "--dataloader_num_workers", count]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], env=os.environ | EXACT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    peaks = {"together": 0.0, "main_anonymous": 0.0, "worker_private": 0.0}
    while process.poll() is None:
        try:
            main, *workers = [read_memory(member) for member in family(process.pid)]
        except OSError:  # one of the processes has just exited
            continue
        peaks["together"] = max(peaks["together"], sum(each["pss"] for each in (main, *workers)))
        peaks["main_anonymous"] = max(peaks["main_anonymous"], main["anonymous"])
        peaks["worker_private"] = max([peaks["worker_private"], *(each["private"] for each in workers)])
        time.sleep(0.02)
    drain.join()
    if process.returncode:
        raise RuntimeError(f"the run with {count} workers exited with code {process.returncode}")
    return {"workers": count, **{f"{name}_gb": value for name, value in peaks.items()}}


def in_one_process(model: Path, folder: Path) -> dict[str, Any]:
    """Measures loading and saving; called in a new process."""
    import train_dreambooth_lora_flux2 as script

    return {"loading": measure_loading(script, model, folder), "saving": measure_saving(script, folder)}


def measure(heads: int, folder: Path) -> dict[str, Any]:
    """Writes the model below `folder` and measures loading and saving in a new process."""
    model = make_model(folder / "model", heads)
    sizes = {part: sum(path.stat().st_size for path in (model / part).glob("*.safetensors")) / 1e9 for part in
             ("transformer", "text_encoder")}  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve()), "--here", str(model), str(folder)]
    process = subprocess.run(command, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True)
    return {"heads": heads, "files_gb": sizes, **json.loads(process.stdout.splitlines()[-1])}


def rounded(value: Any) -> Any:
    """The value with all floats in it rounded to three decimals."""
    if isinstance(value, (dict, list)):
        return (
            {key: rounded(each) for key, each in value.items()} if isinstance(value, dict) else [*map(rounded, value)]
        )
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Measures everything and writes host_memory.json."""
    if sys.argv[1:2] == ["--sample"]:
        return sample(sys.argv[2])
    if sys.argv[1:2] == ["--here"]:
        return print(json.dumps(in_one_process(*map(Path, sys.argv[2:]))))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of the transformer, 128 channels each")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="numbers of data loader workers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(args.heads, Path(name))
        found["workers"] = [measure_workers(count, Path(name)) for count in args.workers]
    print(write_result("host_memory", rounded(found)).read_text())


if __name__ == "__main__":
    main()

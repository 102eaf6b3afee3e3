"""What a run takes of host memory, by part: loading in each format, the loader's workers, saving a checkpoint.

    python benchmarks/host_memory.py

Draws a model whose transformer has 2.3 GB of random bf16 weights and whose text encoder has 1 GB, loads it with the
script's own functions on the CPU, and samples its `smaps_rollup` every 5 ms. "Mapped" are pages of the weight
files: the kernel drops them when memory is short. "Anonymous" is what cannot go; on a GPU, what a row calls "device" of
it lies there. glibc's mmap threshold is fixed, so that what is freed goes back at once, as layers above 32 MB do in any
case. Needs Linux. Writes host_memory.json; tools/plan_memory.py adds up what it says for real models.
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
    """GB of a process: its anonymous memory, its share of mapped files (PSS), and what no other process has."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(rest.split()[0]) * 1024 / 1e9 for name, rest in (line.split(":") for line in lines)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"anonymous": found["Anonymous"], "mapped": found["Pss_File"], "pss": found["Pss"], "private": private}


def sample(process: str) -> None:
    """Reads the memory of a process until the end of the input, then prints the largest value seen of each kind."""
    peak, ended = read_memory(process), threading.Thread(target=sys.stdin.read)
    ended.start()
    print("ready", flush=True)
    while ended.is_alive():
        peak = {kind: max(value, peak[kind]) for kind, value in read_memory(process).items()}
        time.sleep(0.005)
    print(json.dumps(peak))


def watch(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """(result, GB above the start: peaks while `action` runs and what it keeps).

    Sampled from another process: a thread of this one would wait wherever Python copies bytes.
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
    """The embedded model with a random bf16 transformer 128 x `heads` wide, and a text encoder of a third of it."""
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
    """The transformer with its adapter as a run has it before its first step, every weight touched as by a forward."""
    transformer = script.load_transformer(run)
    script.add_lora(run, transformer)
    script.place_transformer(run, transformer)
    for parameter in transformer.parameters():
        parameter.detach().flatten().view(script.torch.uint8).max()
    return transformer


def measure_loading(script: Any, model: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Loads text encoder and, in each format, the transformer: peaks, and the bytes of the blocks' tensors."""
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
    """Peak while a checkpoint is saved, per parameter of the adapter, beyond adapter and moments themselves."""
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
    """A process and all below it."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in family(int(child)))]


def measure_workers(count: int, folder: Path) -> dict[str, float]:
    """A run on the embedded model: peaks of all processes together, of the main one, and of what a worker has alone."""
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
            main, *workers = [read_memory(one) for one in family(process.pid)]
        except OSError:  # one of them has just ended
            continue
        peaks["together"] = max(peaks["together"], sum(each["pss"] for each in (main, *workers)))
        peaks["main_anonymous"] = max(peaks["main_anonymous"], main["anonymous"])
        peaks["worker_private"] = max([peaks["worker_private"], *(each["private"] for each in workers)])
        time.sleep(0.02)
    drain.join()
    if process.returncode:
        raise RuntimeError(f"the run with {count} workers ended with {process.returncode}")
    return {"workers": count, **{f"{name}_gb": value for name, value in peaks.items()}}


def in_one_process(model: Path, folder: Path) -> dict[str, Any]:
    """What is measured in a process of its own: loading and saving."""
    import train_dreambooth_lora_flux2 as script

    return {"loading": measure_loading(script, model, folder), "saving": measure_saving(script, folder)}


def measure(heads: int, folder: Path) -> dict[str, Any]:
    """Makes the model below `folder` and measures loading and saving in a process of their own."""
    model = make_model(folder / "model", heads)
    sizes = {part: sum(path.stat().st_size for path in (model / part).glob("*.safetensors")) / 1e9 for part in
             ("transformer", "text_encoder")}  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve()), "--here", str(model), str(folder)]
    process = subprocess.run(command, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True)
    return {"heads": heads, "files_gb": sizes, **json.loads(process.stdout.splitlines()[-1])}


def rounded(value: Any) -> Any:
    """The same with numbers of three decimals."""
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
    parser.add_argument("--heads", type=int, default=24, help="width of the transformer in heads of 128")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="processes that prepare batches")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(args.heads, Path(name))
        found["workers"] = [measure_workers(count, Path(name)) for count in args.workers]
    print(write_result("host_memory", rounded(found)).read_text())


if __name__ == "__main__":
    main()

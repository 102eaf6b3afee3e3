"""Compare the time of a training step with that of a bare loop of the same forward, backward and optimizer step.

    python benchmarks/step_time.py

The script itself builds the model, adapter, data loader and optimizer. Its loop reads cached latents from the loader
and writes metrics; the bare loop has its tensors in memory. Both alternate in one process, so that other load on the
machine affects them equally.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from memory import draw_images
from results import ROOT, write_result

sys.path.insert(0, str(ROOT))
import train_dreambooth_lora_flux2 as script


class Built(Exception):
    """Carries the objects that the script built before training."""


def make_model(folder: Path, width: int) -> Path:
    """Writes a copy of the tiny model with a random transformer of the given width."""
    shutil.copytree(ROOT / "tiny_flux2", folder, ignore=shutil.ignore_patterns("transformer"))
    config = Flux2Transformer2DModel.load_config(ROOT / "tiny_flux2" / "transformer")
    sizes = {"num_attention_heads": width // 64, "attention_head_dim": 64, "axes_dims_rope": [16, 16, 16, 16]}
    torch.manual_seed(0)
    Flux2Transformer2DModel.from_config({**config, **sizes}).save_pretrained(folder / "transformer")
    return folder


def build(folder: Path, width: int, size: int) -> tuple:
    """Returns (run, training), as the script passes them to its training loop."""
    words = ["--pretrained_model_name_or_path", make_model(folder / "model", width)]
    words += ["--instance_data_dir", draw_images(folder / "images", 5, size), "--instance_prompt", "a photo"]
    words += ["--output_dir", folder / "out", "--resolution", size, "--cache_latents", "--max_train_steps", 10**6]
    words += ["--seed", 0, "--report_to", "tensorboard", "--mixed_precision", "no", "--max_sequence_length", 128]

    def stop_here(*built: object) -> None:
        raise Built(*built)

    script.train = stop_here
    try:
        script.main(script.parse_args([str(word) for word in words]))
    except Built as built:
        return built.args[:2]
    raise RuntimeError("the script did not reach its training loop")


def real_step(run: object, training: object) -> Callable[[], None]:
    """Returns one iteration of the script's loop: training step, metrics and trackers."""
    batches = script.make_loaders(run, training)

    def step() -> None:
        values = script.train_step(run, training, batches)
        values |= script.peak_memory(run)
        script.write_metrics(run, values)

    return step


def bare_step(run: object, training: object, size: int) -> Callable[[], None]:
    """Returns an iteration of forward, backward and AdamW on tensors in memory, and nothing else."""
    side = size // run.token_size  # in tokens
    optimizer = torch.optim.AdamW(list(training.parameters.values()), lr=1e-4)
    inputs = {
        "hidden_states": torch.randn(1, side * side, training.codec.channels),
        "encoder_hidden_states": script.open_prompts(run).get("a photo")[None].to(run.device, run.dtype),
        "timestep": torch.full([1], 0.5),
        "guidance": torch.ones(1),
        "img_ids": script.position_ids(side, side),
        "txt_ids": script.position_ids(1, 1, length=run.args.max_sequence_length),
    }
    target = torch.randn_like(inputs["hidden_states"])

    def step() -> None:
        loss = (training.transformer(**inputs, return_dict=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(width: int, size: int, pairs: int) -> dict:
    """Times `pairs` steps of each loop; returns their medians and the median ratio of consecutive steps."""
    with tempfile.TemporaryDirectory() as folder:
        run, training = build(Path(folder), width, size)
        training.transformer.train()
        loops = {"real": real_step(run, training), "bare": bare_step(run, training, size)}
        seconds = {name: [] for name in loops}
        for turn in range(pairs + 1):  # the first step is a warm-up
            for name in ("real", "bare") if turn % 2 else ("bare", "real"):
                began = time.perf_counter()
                loops[name]()
                if turn >= 1:
                    seconds[name].append(time.perf_counter() - began)
        count = sum(parameter.numel() for parameter in training.transformer.parameters())
        run.accelerator.end_training()
    ratios = [real / bare for real, bare in zip(seconds["real"], seconds["bare"], strict=True)]
    return {
        "parameters": count,
        "size": size,
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "real_seconds": statistics.median(seconds["real"]),
        "bare_seconds": statistics.median(seconds["bare"]),
        "ratio_of_medians": statistics.median(seconds["real"]) / statistics.median(seconds["bare"]),
        "median_of_ratios": statistics.median(ratios),
    }


def main() -> None:
    """Measures both loops and writes step_time.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=640, help="width of the random transformer, a multiple of 64")
    parser.add_argument("--size", type=int, default=512, help="image size in pixels")
    parser.add_argument("--pairs", type=int, default=11, help="number of timed steps per loop")
    args = parser.parse_args()
    print(write_result("step_time", measure(args.width, args.size, args.pairs)).read_text())


if __name__ == "__main__":
    main()

"""Run by `accelerate launch` in several processes: one training run after the other, as a JSON file of tasks says.

One launch costs a dozen seconds of imports, so the runs of a test file share one. Each process writes what it saw of
each run to `seen-RANK.json`: how many processes there were, which base weights were sharded, what it encoded.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import bitsandbytes_on_cpu
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)


def watch(script, seen: dict) -> dict:
    """Makes the script's functions note what they did in `seen`; returns the originals by name."""
    originals = {name: getattr(script, name) for name in ("prepare_training", "encode_prompt", "load_text_encoder")}

    def prepare_training(*given):
        training, run = originals["prepare_training"](*given), given[0]
        base = {name: p for name, p in training.transformer.named_parameters() if not p.requires_grad}
        inside = {name for name in base if "transformer_blocks." in name}
        seen["processes"], seen["seed"] = torch.distributed.get_world_size(), run.seed
        seen["sharded"] = sorted(name for name, p in base.items() if isinstance(p, DTensor))
        seen["whole_blocks"] = sorted(inside - set(seen["sharded"]))
        meshes = {str(tuple(p.device_mesh.shape)) for p in base.values() if isinstance(p, DTensor)}
        seen["mesh"] = sorted(meshes)
        seen["lora_is_plain"] = not any(isinstance(p, DTensor) for p in training.parameters.values())
        return training

    def encode_prompt(run, tokenizer, encoder, prompt):
        seen["encoded"] = [*seen.get("encoded", []), prompt]
        return originals["encode_prompt"](run, tokenizer, encoder, prompt)

    def load_text_encoder(run):
        encoder = originals["load_text_encoder"](run)
        seen["encoder_sharded"] = sum(isinstance(p, DTensor) for p in encoder.parameters())
        return encoder

    script.prepare_training, script.encode_prompt = prepare_training, encode_prompt
    script.load_text_encoder = load_text_encoder
    return originals


def fail_on_the_second(script, name: str) -> None:
    """Makes a function of the script fail on the second process, each time that it is called there."""
    original = getattr(script, name)

    def fail(*arguments, **named):
        if os.environ["RANK"] == "1":
            raise RuntimeError(f"{name} fails here")
        return original(*arguments, **named)

    setattr(script, name, fail)


def run_task(task: dict) -> dict:
    """One training run; returns what this process saw of it, with the error if it ended with one."""
    script, seen, begun = importlib.import_module(task["script"]), {}, time.monotonic()
    counters.clear()
    torch._dynamo.reset()
    before = dict(os.environ)
    os.environ.update(task.get("environment", {}))
    originals = watch(script, seen)
    if name := task.get("fails"):
        originals[name] = getattr(script, name)
        fail_on_the_second(script, name)
    try:
        script.main(script.parse_args(task["flags"]))
    except BaseException as error:
        seen["error"] = f"{type(error).__name__}: {error}"
        print(f"task {task['name']} failed: {seen['error']}", file=sys.stderr, flush=True)
        raise
    finally:
        vars(script).update(originals)
        os.environ.clear()
        os.environ.update(before)
    seen["graphs"] = counters["stats"].get("unique_graphs", 0)
    seen["seconds"] = time.monotonic() - begun
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    return seen


def main() -> None:
    """All tasks of the file named on the command line."""
    bitsandbytes_on_cpu()
    torch.distributed.destroy_process_group = lambda *_: None  # a second group would meet the first one's keys
    tasks, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent
    seen = {task["name"]: run_task(task) for task in tasks}
    (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

"""Short training runs of every kind, to see whether a change of the scripts changes what they train.

Each run is described by its losses and gradient norms in hexadecimal and by hashes of its final LoRA's tensors and of
the images that it drew. "Same" means equal to the last bit, on one machine, with one thread, in fp32 unless a case says
otherwise.

    python tests/golden_matrix.py --out now.json         # what the scripts of this checkout give
    python tests/golden_matrix.py --against HEAD         # both sides at once; exit code 1 if a case differs
    python tests/golden_matrix.py --scripts DIR --against now.json --cases 'prior|adam8'

--against takes a folder with both scripts, a JSON file that --out wrote, or a commit. The scripts are used through
their command line and the files they write alone, so any rewrite of them can be compared. Data and models are those of
this checkout.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads torch

from conftest import ROOT, SCRIPTS, draw_photo, draw_photos, draw_references
from helpers import bitsandbytes_on_cpu

CURVES = ("loss", "grad_norm")
LORA = "pytorch_lora_weights.safetensors"
LAUNCH_SECONDS = 240
# What tests/golden/matrix.json holds: cases that round alike on other processors, and that no other stored run has.
STORED = (
    "t2i/sigma-sqrt", "t2i/shift-empirical", "t2i/prior-buckets", "t2i/klein", "t2i/resume-adam8", "t2i/prodigy",
    "i2i/metadata", "i2i/cond-dropout-mixed", "i2i/align-buckets",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One or more runs into the same folder: `flags` of all of them, `runs` what each one adds.

    In flags {data}, {out} and {root} stand for the drawn data, the case's output folder and this checkout.
    """

    flags: str = ""
    runs: tuple[str, ...] = ("--max_train_steps 4",)
    data: dict[str, str] | None = None  # by script, in place of DATA
    model: str = "{root}/tiny_flux2"
    launch: str | None = None  # the accelerate config under which two processes run it


DATA = {
    "t2i": "--instance_data_dir {data}/photos",
    "i2i": "--instance_data_dir {data}/photos --cond_data_dir {data}/references",
}
METADATA = {"t2i": "--instance_data_dir {data}/jpegs", "i2i": "--instance_data_dir {data}/mixed"}
TABLE = {
    "t2i": "--dataset_name {data}/jpegs --caption_column text",
    "i2i": "--dataset_name {data}/table --image_column after --cond_image_column before --caption_column text",
}
SQUARE = {**DATA, "i2i": "--instance_data_dir {data}/photos --cond_data_dir {data}/square"}
ALIGNED = {"i2i": "--instance_data_dir {data}/photos --cond_data_dir {data}/aligned"}
BASE = (
    "--instance_prompt 'sks toy' --resolution 64 --rank 4 --max_sequence_length 64 --learning_rate 1e-3 --seed 2 "
    "--report_to none --dataloader_num_workers 0 --latents_cache_dir {data}/cache"
)
BUCKETS = "--aspect_ratio_buckets '64,64;64,96;96,64'"
IN_THE_MIDDLE = ("--max_train_steps 2", "--max_train_steps 4 --resume_from_checkpoint latest")
ADAM8 = "--use_8bit_adam --rank 32"  # smaller tensors keep 32-bit moments
PRODIGY = "--optimizer prodigy --learning_rate 1"
CHANCE = f"{BUCKETS} --random_flip --caption_dropout 0.4 --lora_dropout 0.2 --weighting_scheme logit_normal"
PRIOR = "--with_prior_preservation --class_prompt 'a toy' --prior_loss_weight 0.5"
DRAWING = "--validation_prompt 'a toy' 'sks toy' --validation_steps 2 --num_validation_images 1 --num_inference_steps 2"

COMMON = {
    "plain": Case(),
    "metadata": Case(data=METADATA),
    "table": Case(data=TABLE),
    "buckets": Case(f"{BUCKETS} --train_batch_size 2"),
    "computed-buckets": Case("--use_aspect_ratio_buckets"),
    "accumulation": Case("--gradient_accumulation_steps 2 --train_batch_size 2"),
    "flip": Case("--random_flip --train_batch_size 2"),
    "center-crop": Case("--center_crop"),
    "cache-latents": Case(f"{BUCKETS} --cache_latents"),
    "vae-sample": Case("--vae_encode_mode sample"),
    "vae-sample-cached": Case("--vae_encode_mode sample --cache_latents --random_flip"),
    "caption-dropout": Case("--caption_dropout 0.5"),
    "lora-dropout": Case("--lora_dropout 0.2"),
    "lora-alpha": Case("--lora_alpha 2 --lora_layers attention"),
    "logit-normal": Case("--weighting_scheme logit_normal --logit_mean -0.5"),
    "mode": Case("--weighting_scheme mode"),
    "cosmap": Case("--weighting_scheme cosmap"),
    "sigma-sqrt": Case("--weighting_scheme sigma_sqrt"),
    "shift-none": Case("--timestep_shift none"),
    "shift-empirical": Case("--timestep_shift empirical"),
    "guidance": Case("--guidance_scale 3.5"),
    "checkpointing": Case("--gradient_checkpointing 0.5"),
    "bf16": Case("--mixed_precision bf16 --upcast_before_saving"),
    "bf16-fp8": Case("--mixed_precision bf16 --do_fp8_training --upcast_before_saving"),
    "bf16-nf4": Case("--mixed_precision bf16 --gradient_checkpointing --bnb_quantization_config_path "
                     "{root}/configs/quantization/nf4.json"),
    "fp8": Case("--do_fp8_training"),
    "nf4": Case("--bnb_quantization_config_path {root}/configs/quantization/nf4.json"),
    "int8": Case("--bnb_quantization_config_path {root}/configs/quantization/int8.json"),
    "prodigy": Case(PRODIGY),
    "prodigy-settings": Case(f"{PRODIGY} --prodigy_beta3 0.9 --no-prodigy_decouple --no-prodigy_safeguard_warmup "
                             "--no-prodigy_use_bias_correction --adam_weight_decay 0.1"),
    "adam8": Case(ADAM8),
    "optimizer-settings": Case("--scale_lr --gradient_accumulation_steps 2 --max_grad_norm 0.1 --adam_weight_decay 0.1 "
                               "--adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-4"),
    "cosine": Case("--lr_scheduler cosine --lr_warmup_steps 2"),
    "polynomial": Case("--lr_scheduler polynomial --lr_power 2 --lr_warmup_steps 1"),
    "repeats": Case("--repeats 3 --train_batch_size 4", runs=("--num_train_epochs 1",)),
    "klein": Case(model="{data}/klein"),
    "chance": Case(f"{CHANCE} --train_batch_size 2 --gradient_accumulation_steps 2"),
    "init-lora": Case("", ("--max_train_steps 2 --output_dir {out}-first",
                           f"--max_train_steps 3 --seed 4 --init_lora_from {{out}}-first/{LORA}")),
    "resume": Case(CHANCE, IN_THE_MIDDLE),
    "resume-cached": Case("--cache_latents --lr_scheduler constant_with_warmup --lr_warmup_steps 3", IN_THE_MIDDLE),
    "resume-adam8": Case(ADAM8, IN_THE_MIDDLE),
    "resume-prodigy": Case(PRODIGY, IN_THE_MIDDLE),
    "drawing": Case(DRAWING),
    "two-processes": Case(f"{BUCKETS} --random_flip --caption_dropout 0.4 --train_batch_size 2 {{own}}", data=SQUARE,
                          launch="multi_gpu.yaml"),
    "fsdp2": Case("--gradient_accumulation_steps 2", data=SQUARE, launch="fsdp2.yaml"),
}  # fmt: skip
OWN = {
    "t2i": {
        "prior": Case(f"{PRIOR} --class_data_dir {{data}}/classes --num_class_images 3 --train_batch_size 2"),
        "prior-buckets": Case(
            f"{PRIOR} --class_data_dir {{data}}/classes --num_class_images 3 {BUCKETS} --gradient_accumulation_steps 2 "
            "--random_flip --cache_latents"
        ),
        "prior-generated": Case(
            f"{PRIOR} --class_data_dir {{out}}-classes --num_class_images 3 --sample_batch_size 2 "
            "--num_inference_steps 2"
        ),
    },
    "i2i": {
        "no-reference": Case(data={"i2i": DATA["t2i"]}),
        "two-references": Case(data={"i2i": DATA["i2i"] + " {data}/square"}),
        "mixed-batches": Case("--train_batch_size 2 --cache_latents", data=METADATA),
        "cond-dropout": Case("--cond_dropout 0.5 --train_batch_size 2", data=SQUARE),
        "cond-dropout-mixed": Case("--cond_dropout 0.5 --gradient_accumulation_steps 2 --random_flip", data=METADATA),
        "align": Case("--align_cond_image --random_flip", data=ALIGNED),
        "align-buckets": Case(f"--align_cond_image {BUCKETS} --cache_latents --train_batch_size 2", data=ALIGNED),
        "drawing-edits": Case(f"{DRAWING} --validation_image {{data}}/references/02.png"),
    },
}
OWN_FLAGS = {  # {own} in the flags of a case that both scripts have
    "t2i": f"{PRIOR} --class_data_dir {{data}}/classes --num_class_images 3",
    "i2i": "--cond_dropout 0.4",
}


def all_cases() -> dict[str, tuple[str, Case]]:
    """(script, case) by name, such as t2i/plain; cases of two processes last."""
    cases = {f"{script}/{name}": (script, case) for script in SCRIPTS for name, case in (COMMON | OWN[script]).items()}
    return dict(sorted(cases.items(), key=lambda item: item[1][1].launch is not None))


# ---------------------------------------------------------------------------------------------------------------- data


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    """metadata.jsonl with these rows."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_images(folder: Path, seed: int) -> None:
    """Five PNGs of different sizes and EXIF orientations: they decode alike everywhere, which JPEGs need not."""
    sizes = [(96, 128), (128, 96), (128, 128), (200, 120), (90, 160)]
    for number, (size, orientation) in enumerate(zip(sizes, (None, 6, 3, None, 8), strict=True)):
        draw_photo(folder / f"{number:02d}.png", size, seed + number, orientation)


def draw_data(folder: Path) -> None:
    """Images with captions beside them, in a metadata file, and in a table; references; class images."""
    draw_images(folder / "photos", seed=0)
    for number in (0, 1, 3):
        (folder / "photos" / f"{number:02d}.txt").write_text(f"a [trigger] number {number}", encoding="utf-8")
    draw_references(folder / "references")
    draw_references(folder / "square", size=(72, 72))
    draw_images(folder / "aligned", seed=60)
    draw_images(folder / "classes", seed=50)
    names = [path.name for path in sorted(draw_photos(folder / "jpegs", seed=20).glob("*.jpg"))]
    write_rows(folder / "jpegs", [{"file_name": name, "text": f"the {name}"} for name in names])
    draw_images(folder / "mixed", seed=0)
    draw_references(folder / "mixed" / "before")
    draw_references(folder / "mixed" / "style", size=(80, 64))
    references = {0: ["before"], 1: ["before", "style"], 3: ["before"], 4: ["before", "style"]}
    write_rows(folder / "mixed", [
        {"file_name": f"{number:02d}.png", "text": f"edit {number}"}
        | {f"{name}_file_name": f"{name}/{number:02d}.png" for name in references.get(number, [])}
        for number in range(5)
    ])  # fmt: skip
    for number in range(4):
        draw_photo(folder / "table" / f"after-{number}.png", (96, 80), seed=30 + number)
        draw_photo(folder / "table" / f"before-{number}.png", (80, 72), seed=40 + number)
    write_rows(folder / "table", [
        {"before_file_name": f"before-{number}.png", "after_file_name": f"after-{number}.png", "text": f"edit {number}"}
        for number in range(4)
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- runs


def command_lines(script: str, case: Case, work: Path, output: Path) -> list[list[str]]:
    """The words of each run of a case."""
    data = (case.data or DATA)[script]
    start = f"--pretrained_model_name_or_path {case.model} --output_dir {{out}} {data} {BASE} {case.flags}"
    places = {"data": str(work), "out": str(output), "root": str(ROOT)}
    words = [shlex.split(f"{start} {run}".replace("{own}", OWN_FLAGS[script])) for run in case.runs]
    return [[word.format(**places) for word in line] for line in words]


def load_script(scripts: Path, name: str) -> ModuleType:
    """The script of this short name in a folder, as a module of its own."""
    path = scripts / f"{SCRIPTS[name]}.py"
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def output_in(log: Path) -> Iterator[None]:
    """Whatever this process and its children print goes into a file."""
    streams = {number: os.dup(number) for number in (1, 2)}
    sys.stdout.flush()
    with log.open("ab") as file:
        for number in streams:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in streams.items():
            os.dup2(copy, number)
            os.close(copy)


def run_script(module: ModuleType, words: list[str]) -> None:
    """The script in this process; what its parser complains of goes to file descriptor 2, whatever sys.stderr is."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = module.parse_args(words)
    finally:
        os.write(2, complaint.getvalue().encode())
    module.main(args)


def launch(scripts: Path, name: str, config: str, words: list[str], work: Path) -> None:
    """The script in two processes of `accelerate launch` on the CPU. Raises SystemExit with its exit code."""
    from test_processes import on_cpu

    path = on_cpu(work / "accelerate", config, 2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path]
    command += [scripts / f"{SCRIPTS[name]}.py", *words]
    process = subprocess.run([str(word) for word in command], cwd=ROOT, timeout=LAUNCH_SECONDS, check=False)
    if process.returncode:
        raise SystemExit(process.returncode)


def last_words(log: Path) -> str:
    """The line of a log that says most about why a run ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error:|Error: ", line)]
    return (errors or lines or ["no output"])[-1][:300]


def run_case(scripts: Path, modules: dict[str, ModuleType], name: str, work: Path) -> dict[str, Any]:
    """What a case gives, or {"error": why it ended}."""
    script, case = all_cases()[name]
    output, log = work / "out" / name, work / "out" / f"{name}.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output_in(log):
            for words in command_lines(script, case, work, output):
                if case.launch:
                    launch(scripts, script, case.launch, words, work)
                    continue
                if script not in modules:
                    modules[script] = load_script(scripts, script)
                run_script(modules[script], words)
        return read_results(output)
    except SystemExit as end:
        return {"error": f"exit code {end.code}: {last_words(log)}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def read_results(output: Path) -> dict[str, Any]:
    """The curves in hexadecimal, and hashes.

    `layout` is of the LoRA's tensor names, dtypes and shapes, `lora` of names, dtypes and bytes, `header` of the file's
    metadata, `images` of the pixels of what the run drew.
    """
    import numpy
    import torch
    from PIL import Image
    from safetensors import safe_open

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    result: dict[str, Any] = {key: [float(line[key]).hex() for line in steps] for key in CURVES}
    layout, tensors = hashlib.sha256(), hashlib.sha256()
    with safe_open(output / LORA, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            layout.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            tensors.update(f"{name} {tensor.dtype}\n".encode())
            tensors.update(tensor.flatten().view(dtype=torch.uint8).numpy().tobytes())
        header = json.dumps(file.metadata(), sort_keys=True).encode()
    result |= {"layout": layout.hexdigest(), "lora": tensors.hexdigest(), "header": hashlib.sha256(header).hexdigest()}
    drawn = [path for path in output.glob("samples/**/prompt-*.png") if "given" not in path.parts]  # once references
    drawn += [*Path(f"{output}-classes").glob("**/*.[jp][pn]g")]
    pixels = [hashlib.sha256(numpy.asarray(Image.open(path)).tobytes()).hexdigest() for path in drawn]
    return {**result, "images": sorted(pixels)} if drawn else result


def run_matrix(scripts: Path, names: Sequence[str], work: Path, label: str = "") -> dict[str, Any]:
    """These cases with the scripts of a folder. `work` is emptied, caches with it, so each side encodes for itself."""
    import torch
    from make_tiny_flux2 import make_tiny_flux2

    torch.set_num_threads(1)
    bitsandbytes_on_cpu()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with output_in(work / "drawing.log"):
        draw_data(work)
        if any(name.endswith("/klein") for name in names):
            make_tiny_flux2(work / "klein", family="klein")
    cases, modules = {}, {}
    for name in names:
        begun = time.monotonic()
        cases[name] = run_case(scripts, modules, name, work)
        seconds, end = time.monotonic() - begun, cases[name].get("error", "")
        print(f"{label}{seconds:6.1f} s  {name}  {end}".rstrip(), flush=True)
    packages = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
    return {"versions": {package: importlib.metadata.version(package) for package in packages}, "cases": cases}


# ------------------------------------------------------------------------------------------------------------- compare


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Where two results of a case part, or None; another header alone is no difference."""
    for key in CURVES:
        if len(one[key]) != len(other[key]):
            return f"{key}: {len(one[key])} against {len(other[key])} steps"
        for step, (left, right) in enumerate(zip(one[key], other[key], strict=True), start=1):
            if left != right:
                a, b = float.fromhex(left), float.fromhex(right)
                return f"{key} from step {step}: {left} against {right}, relative {abs(a - b) / max(abs(a), 1e-30):.1e}"
    for key, what in (("layout", "names, dtypes or shapes of the LoRA's tensors"), ("lora", "values of the LoRA"),
                      ("images", "drawn images")):  # fmt: skip
        if one.get(key) != other.get(key):
            return what
    return None


def verdict(now: dict[str, Any], before: dict[str, Any]) -> str:
    """One phrase on the two results of a case; it starts with "same" when they are."""
    if "error" in now and "error" in before:
        return f"NEITHER SIDE RUNS: {now['error']}"
    if "error" in now:
        return f"--scripts CANNOT RUN: {now['error']}"
    if "error" in before:
        return f"--against CANNOT RUN: {before['error']}"
    if difference := first_difference(now, before):
        return f"DIFFERS: {difference}"
    return "same" if now["header"] == before["header"] else "same, with another header"


def compare(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Prints a line for each case that both sides were asked for; returns the names of those that are not the same."""
    verdicts = {name: verdict(now[name], before[name]) for name in now if name in before}
    for name, words in verdicts.items():
        print(f"{name:24} {words}")
    bad = [name for name, words in verdicts.items() if not words.startswith("same")]
    print(
        f"{len(verdicts) - len(bad)} of {len(verdicts)} cases are the same to the bit; not: {' '.join(bad) or 'none'}"
    )
    return bad


def scripts_of(place: str, work: Path) -> Path:
    """The folder of the scripts of one side: `place` itself, or those of a commit, taken out into `work`."""
    if Path(place).is_dir():
        return Path(place).resolve()
    work.mkdir(parents=True)
    for name in SCRIPTS.values():
        text = subprocess.run(["git", "show", f"{place}:{name}.py"], cwd=ROOT, capture_output=True, check=True).stdout
        (work / f"{name}.py").write_bytes(text)
    return work


def run_both(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides at once, each in a process of its own."""
    results, processes = [work / "now.json", work / "before.json"], []
    for place, result in zip((args.scripts, args.against), results, strict=True):
        folder = scripts_of(place, work / f"{result.stem}-scripts")
        command = [sys.executable, __file__, "--scripts", folder, "--out", result, "--cases", args.cases]
        command += ["--work", work / result.stem, "--label", f"{result.stem:7}"]
        processes.append(subprocess.Popen([str(word) for word in command]))
    if any([process.wait() for process in processes]):
        raise SystemExit("one side broke off; see above")
    now, before = (json.loads(result.read_text()) for result in results)
    return now, before


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", default=str(ROOT), help="folder with both scripts, or a commit; default: this one")
    parser.add_argument("--against", help="the other side: a folder, a commit, or a JSON file that --out wrote")
    parser.add_argument("--out", type=Path, help="JSON file for what --scripts gives")
    parser.add_argument("--cases", default="", help="only cases whose name holds this regular expression")
    parser.add_argument("--stored", action="store_true", help="only the cases of tests/golden/matrix.json")
    parser.add_argument("--work", type=Path, help="keep data, outputs and logs in this folder, which is emptied first")
    parser.add_argument("--label", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Runs one side or both; returns 1 where they differ."""
    if args.stored:
        args.cases = f"^({'|'.join(STORED)})$"
    names = [name for name in all_cases() if re.search(args.cases, name)]
    with tempfile.TemporaryDirectory(prefix="flux2-golden-") as temporary:
        work, before = args.work or Path(temporary) / "work", None
        if args.against and not args.against.endswith(".json"):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            now, before = run_both(args, work)
        else:
            now = run_matrix(scripts_of(args.scripts, work.with_name("scripts")), names, work, args.label)
            before = json.loads(Path(args.against).read_text()) if args.against else None
    if args.out:
        args.out.write_text(json.dumps(now, indent=1) + "\n")
    if before and before["versions"] != now["versions"]:
        print(f"other packages: {before['versions']} before, {now['versions']} now")
    return bool(before and compare(now["cases"], before["cases"]))


if __name__ == "__main__":
    sys.exit(main(parse_args()))

"""Print a table for docs/ or a README from the benchmarks' JSON files.

python benchmarks/table.py              time and memory
python benchmarks/table.py learning     how well LoRAs learn the toy and other tasks
python benchmarks/table.py growth       costs of more images, captions, pixels, references and rank
python benchmarks/table.py tiny_flux2   evaluation of the embedded model, for its README
python benchmarks/table.py step_cost    GPU kernels of a training step, with predicted and measured seconds
python benchmarks/table.py host_memory  host memory used by loading
"""

import sys

from results import read_result


def demo_rows(result: dict) -> list[tuple[str, str]]:
    """The demo's total time, then its phases of half a second or more, longest first."""
    phases = sorted(result["phases"].items(), key=lambda item: -item[1])
    rows = [("`make demo` after installation", f"{result['total_seconds']:.0f} s")]
    return rows + [(f"- {name}", f"{seconds:.1f} s") for name, seconds in phases if seconds >= 0.5]


def memory_rows(result: dict) -> list[tuple[str, str]]:
    """Peak memory at each number of images."""
    what = f"images of {result['size']} px, `--cache_latents`: peak host memory"
    rows = [(f"{run['images']} {what}", f"{run['peak_mb'] / 1000:.2f} GB") for run in result["runs"]]
    return [*rows, ("increase from the first to the last row", f"{100 * (result['growth'] - 1):+.1f} %")]


def step_rows(result: dict) -> list[tuple[str, str]]:
    """Seconds per step of both loops, and their ratio."""
    what = f"{result['parameters'] / 1e6:.0f} M parameters, {result['size']} px"
    return [
        (f"training step, {what}", f"{result['real_seconds']:.2f} s"),
        ("the same forward, backward and optimizer step in a bare loop", f"{result['bare_seconds']:.2f} s"),
        ("ratio of the two", f"{result['median_of_ratios']:.3f}"),
    ]


def print_measured() -> None:
    """Prints time and memory; a benchmark that has not been run is marked as not measured."""
    print("| measurement | value | command |\n|---|---|---|")
    machines = set()
    for name, make_rows in (("demo_phases", demo_rows), ("memory", memory_rows), ("step_time", step_rows)):
        result = read_result(name)
        if result is None:
            print(f"| {name} | not measured | `python benchmarks/{name}.py` |")
            continue
        machines.add(f"{result['cpu']}, {result['cores']} cores, torch {result['versions']['torch']}, {result['date']}")
        for number, (what, value) in enumerate(make_rows(result)):
            print(f"| {what} | {value} | {'`' + result['command'] + '`' if number == 0 else ''} |")
    print("\nMeasured on " + "; ".join(sorted(machines)) + "." if machines else "")


SETTINGS = {
    "shift linear": "the defaults: `--timestep_shift linear`, uniform density, `--guidance_scale 1`; base in fp32",
    "shift none": "`--timestep_shift none`",
    "shift empirical": "`--timestep_shift empirical`",
    "logit_normal": "`--weighting_scheme logit_normal`",
    "sigma_sqrt": "`--weighting_scheme sigma_sqrt`",
    "guidance 3.5": "`--guidance_scale 3.5`",
}
BASES = {
    "bf16": "base in bf16; the fp32 adapter computes in bf16",
    "fp8": "`--do_fp8_training`",
    "nf4": "`configs/quantization/nf4.json`",
    "int8": "`configs/quantization/int8.json`",
}


def proof_rows(found: dict) -> dict[str, tuple]:
    """The rows on overfitting, masks and streamed FP8."""
    over, masks = found["overfitting"], found["masks"]
    streamed = found["streamed FP8 from FP8, largest difference"]
    steps = f"step {over['best_step']:.0f} (saved in `best/`), step {over['last_step']:.0f}"
    photos = "photos on one background, prompts with other backgrounds"
    fp8 = "`--do_fp8_training --stream_blocks` compared with `--do_fp8_training`"
    return {
        "four photos, `--validation_split 8`, validation loss: base, minimum": (over["base"], over["low"]),
        f"the same: {steps}": (over["low"], over["end"]),
        "the same, training loss around these steps": (over["training_at_low"], over["training_at_end"]),
        f"{photos}, distance to the toy: base, LoRA": (masks["toy_base"], masks["toy_without"]),
        "the same with a LoRA trained with `--mask_suffix=-mask`": ("", masks["toy_with"]),
        "distance of the image border to the prompt's background: without masks, with masks": (
            masks["asked_without"], masks["asked_with"]),
        "distance of the image border to the photos' background: without masks, with masks": (
            masks["learned_without"], masks["learned_with"]),
        f"{fp8}, largest difference: losses, LoRA": (streamed["loss"], streamed["lora"]),
    }  # fmt: skip


def print_learning() -> None:
    """Prints how much each LoRA reduced the images' distance to the toy, then the other measurements of LoRAs."""
    found = read_result("learning")["figures"]
    settings, subject = found["gain by setting"], found["subject"]
    gains = {what: settings[name] for name, what in SETTINGS.items()}
    gains |= {what: found[f"gain with a base in {name}"][name] for name, what in BASES.items()}
    broken = {
        name.partition(": ")[2]: figures["gain"] for name, figures in found.items() if name.startswith("broken: ")
    }
    gains |= {f"deliberately broken script: {what}": gain for what, gain in broken.items()}
    print("| five photos of the toy and five other scenes, 300 steps | nearer to the toy by |\n|---|---|")
    for what, gain in gains.items():
        print(f"| {what} | {gain:.3f} |")
    print("\n| other measurements | first value | second value |\n|---|---|---|")
    rows = {"distance to the toy: base, LoRA": (subject["base"], subject["lora"])}
    rows["with the LoRA: prompt with the toy's name, another prompt"] = (subject["lora"], subject["other_prompt"])
    rows["reduction of the distance, in standard deviations over four seeds"] = (subject["deviations"],)
    drift, edit = found["prior preservation"], found["edit"]
    rows["drift of the class from the base model: without, with prior preservation"] = tuple(drift.values())
    rows["edits of unseen scenes, distance to the correct image: base, LoRA"] = (edit["base"], edit["lora"])
    rows["the same with a LoRA trained without references"] = ("", found["edit without references"]["lora"])
    losses = found["loss over the last 50 steps"]
    for pair in (("rank 1", "rank 32"), ("alpha 2", "alpha 64"), ("rate 1e-4", "rate 4e-3")):
        names = ", ".join(pair).replace("rate", "learning rate")
        rows[f"loss over the last 50 steps: {names}"] = tuple(losses[name] for name in pair)
    moved = found["share of lora_A's numbers that moved at 2e-5"]
    what = "at a learning rate of 2e-5: adapter in bf16 (as in the diffusers script), in fp32"
    rows[f"share of values in `lora_A` that changed {what}"] = (moved["bf16"], moved["fp32"])
    rows["the same, loss over the last 50 steps"] = (moved["loss_bf16"], moved["loss_fp32"])
    rows |= proof_rows(found)
    for what, values in rows.items():
        cells = [value if isinstance(value, str) else f"{value:.3f}" for value in (*values, "")][:2]
        print(f"| {what} | {' | '.join(cells)} |")


def print_tiny_flux2() -> None:
    """Prints the share of images whose properties match the prompt, and distances."""
    scores = read_result("tiny_flux2")["scores"]
    captions, edits = scores["captions"], scores["edits"]
    rows = {"random guessing": captions["chance"]}
    for pairs, what in (("unseen", "unseen pairs"), ("seen", "other pairs")):
        rows[f"original image after the VAE, {what}"] = captions[f"{pairs}_through_vae"]
        rows |= {f"guidance {scale}, {what}": captions[f"{pairs}_guidance_{scale}"] for scale in (1, 4)}
    rows["edits of a reference image"] = edits["read_as_asked"]
    rows["the same references, not edited"] = edits["reference_read_as_asked"]
    print("| share matching the prompt | background | light | colour | shape | all four |\n|---|---|---|---|---|---|")
    for name, shares in rows.items():
        fields = ("background", "light", "colour", "shape", "all")
        print(f"| {name} | {' | '.join(f'{100 * shares[key]:.0f} %' if key in shares else '' for key in fields)} |")
    print("\nMean absolute difference, as a share of the value range:\n")
    print("| image | to its reference | to another reference |\n|---|---|---|")
    keeping = scores["keeping"]
    names = {"scenes": "scenes", "toys_never_seen": "unseen toys", "nights_never_seen": "unseen night scenes"}
    for key in names:
        pair = (keeping[f"{key}_to_reference"], keeping[f"{key}_to_shuffled"])
        print(f'| "keep the image", {names[key]} | {pair[0]:.3f} | {pair[1]:.3f} |')
    print("\n| image | to the correct image |\n|---|---|")
    print(
        f"| edit | {edits['to_the_edit']:.3f} |\n| its reference, not edited | {edits['reference_to_the_edit']:.3f} |"
    )
    for key, error in scores["vae_error"].items():
        print(f"| {key.replace('nights', 'night scenes')} after the VAE alone | {error:.3f} |")


def print_growth() -> None:
    """Prints time and memory by number of images and captions, the cost of a step, and the size of the cache."""
    result = read_result("growth")
    rows = {axis: [row for row in result["rows"] if row["axis"] == axis] for axis in
            ("images", "captions", "resolution", "references", "rank")}  # fmt: skip
    print("| run with | first start | next start | peak memory |\n|---|---|---|---|")
    for row in [*rows["images"], *rows["captions"]]:
        seconds = f"{row['cpu_seconds']:.0f} s | {row['again_cpu_seconds']:.0f} s"
        print(f"| {row['value']:,} {row['axis']} | {seconds} | {row['peak_mb'] / 1000:.2f} GB |")
    for axis, what in (("images", "64 px image"), ("captions", "caption of 64 tokens")):
        few, some, many = rows[axis]
        slopes = [(b["cpu_seconds"] - a["cpu_seconds"]) / (b["value"] - a["value"]) for a, b in
                  ((few, some), (some, many))]  # fmt: skip
        print(f"| each additional {what}: {few['value']} to {some['value']}, {some['value']} to {many['value']:,} | "
              f"{1000 * slopes[0]:.1f} ms, {1000 * slopes[1]:.1f} ms | | |")  # fmt: skip
    print("\n| run with | image tokens | time per step | peak memory | LoRA file |\n|---|---|---|---|---|")
    names = {"resolution": "`--resolution {}`", "references": "{} reference image(s) of 256 px", "rank": "`--rank {}`"}
    for axis, name in names.items():
        for row in rows[axis]:
            tokens = {"resolution": (row["value"] // 16) ** 2, "references": 256 * (1 + row["value"])}.get(axis, 16)
            figures = f"{1000 * row['step_seconds']:.0f} ms | {row['peak_mb'] / 1000:.2f} GB"
            print(f"| {name.format(row['value'])} | {tokens} | {figures} | {row['lora_bytes'] / 1e6:.2f} MB |")
    print(
        "\n| cache size for | one caption | 5,000 captions | one 1024 px image | 5,000 images |\n|---|---|---|---|---|"
    )
    for model, size in result["disk"].items():
        figures = [
            f"{size[what] / 1e6:.1f} MB | {5000 * size[what] / 1e9:.0f} GB" for what in ("caption", "image_1024")
        ]
        print(f"| {model} | {' | '.join(figures)} |")


def print_step_cost() -> None:
    """Prints a step's kernels, operations and bytes by class of kernels, with predicted and measured seconds."""
    result = read_result("step_cost")
    gpus = list(result["peaks"])
    print(f"| training step | kernels | TFLOP | GB: {', '.join(result['rows'][0]['classes'])} | "
          f"{' | '.join(f'{gpu}, predicted' for gpu in gpus)} | H200, measured | ratio |")  # fmt: skip
    print("|---" * (6 + len(gpus)) + "|")
    for row in result["rows"]:
        classes = row["classes"].values()
        base, mode = {"bf16": "bf16", "fp8": "FP8"}[row["base"]], "compiled" if row["compiled"] else "eager"
        seconds = [row["predicted_seconds"][gpu] for gpu in gpus]
        cells = [f"{value:.2f} s" if value else "too small" for value in seconds]
        measured = row["measured_seconds_h200"]
        cells += [f"{measured:.2f} s", f"{row['measured_by_predicted']:.2f}"] if measured else ["-", "-"]
        moved = ", ".join(f"{values['gb']:.0f}" for values in classes)
        counts = f"{sum(v['kernels'] for v in classes):.0f} | {sum(v['tflop'] for v in classes):.0f} | {moved}"
        print(f"| {row['model']}, {base}, {row['resolution']} px, {mode} | {counts} | {' | '.join(cells)} |")


def print_host_memory() -> None:
    """Prints peak host memory while weights are loaded, and the size of the blocks in each format."""
    result = read_result("host_memory")
    print("| GB while loading | files | blocks | pinned | anonymous, peak | anonymous, after loading | mapped, peak |")
    print("|---" * 7 + "|")
    for name, row in result["loading"].items():
        part = "text_encoder" if name.startswith("text") else "transformer"
        keys = ("blocks_gb", "pinned_gb", "anonymous_peak_gb", "anonymous_kept_gb", "mapped_peak_gb")
        cells = [f"{row[key]:.2f}" if key in row else "-" for key in keys]
        print(f"| {name} | {result['files_gb'][part]:.2f} | {' | '.join(cells)} |")


PRINTERS = {"measured": print_measured, "learning": print_learning, "growth": print_growth,
            "tiny_flux2": print_tiny_flux2, "step_cost": print_step_cost, "host_memory": print_host_memory}  # fmt: skip

if __name__ == "__main__":
    PRINTERS[sys.argv[1] if len(sys.argv) > 1 else "measured"]()

"""Convert one .safetensors file of a FLUX.2 transformer, with the folder of its base model, to a folder for training.

    python tools/convert_transformer.py fine_tune_fp8.safetensors --base FLUX.2-klein-base-4B --out my-model

The file may use the names of diffusers, BFL or ComfyUI, in bf16 (fp16, fp32) or in fp8 with or without scales; fp8 is
converted to bf16. Config, text encoder, VAE and tokenizer come from the base; of its transformer only config.json is
needed. All names and shapes are checked first. One shard at a time is in memory, and the folder appears when complete.
"""
# Not used: diffusers' `from_single_file`. It holds the whole model in memory, ignores scales, and without `config=` and
# `subfolder=` assumes [dev] for every file with BFL's names. Only its renaming of single tensors is used here.

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}  # dtype after conversion
PREFIX = re.compile(r"^(model\.)?diffusion_model\.")  # ComfyUI's
SCALES = (".weight_scale", ".scale_weight")
FOR_COMPUTE = re.compile(r"(.*\.)?(scaled_fp8|input_scale|scale_input|comfy_quant)")  # settings, not weights
STEM, SHARD_SIZE = "diffusion_pytorch_model", "5GB"


def rename(name: str, tensor: torch.Tensor, is_bfl: bool) -> dict[str, torch.Tensor]:
    """Maps a tensor to diffusers' names (a fused q, k, v becomes three); unknown names stay."""
    try:
        return convert_flux2_transformer_checkpoint_to_diffusers({name: tensor}) if is_bfl else {name: tensor}
    except (KeyError, IndexError):
        return {name: tensor}


def read_names(path: Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """{name: (name in the file, dtype, shape)} of the weights, {name of a weight: name of its scale in the file}."""
    weights, scales, unread = {}, {}, set()
    with safe_open(path, "pt") as file:
        for key in file.keys():
            name, stored = PREFIX.sub("", key), file.get_slice(key)
            if name.endswith(SCALES):
                scales[name.rpartition(".")[0] + ".weight"] = key, tuple(stored.get_shape())
            elif not FOR_COMPUTE.fullmatch(name):
                weights[name] = key, stored.get_dtype(), tuple(stored.get_shape())
                unread |= {stored.get_dtype()} - FLOATS.keys()
    for name, (_, shape) in scales.items():
        rows = weights[name][2][:1] if name in weights else ()
        if shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            unread.add(f"scales of {shape}")
    if unread:
        raise ValueError(f"{path}: holds {', '.join(sorted(unread))}; use a file in bf16, fp16, fp32, or fp8 with "
                         "one scale per weight or per row")  # fmt: skip
    odd = scales.keys() - weights.keys()
    odd |= {name for name, (_, dtype, _) in weights.items() if scales and dtype[:2] == "F8" and name not in scales}
    if odd:
        raise ValueError(
            f"{path}: {len(odd)} weights or scales have no counterpart, such as {min(odd)}; download it again"
        )
    return weights, {name: key for name, (key, _) in scales.items()}


def check(path: Path, weights: dict[str, tuple], base: Path, config: dict) -> dict[str, tuple[str, torch.Tensor]]:
    """{diffusers' name: (name in `weights`, tensor on meta)}. Raises ValueError unless they are the base's."""
    is_bfl, found = any(name.startswith("double_blocks.") for name in weights), {}
    for name, (_, dtype, shape) in weights.items():
        empty = torch.empty(shape, dtype=FLOATS[dtype], device="meta")
        found |= {new: (name, tensor) for new, tensor in rename(name, empty, is_bfl).items()}
    with torch.device("meta"):
        needed = Flux2Transformer2DModel.from_config(config).state_dict()
    report = {"missing": needed.keys() - found.keys(), "unexpected": found.keys() - needed.keys()}
    shapes = [(name, tuple(found[name][1].shape), tuple(needed[name].shape)) for name in found.keys() & needed.keys()]
    report["misshapen"] = [f"{name} {own} for {wanted}" for name, own, wanted in shapes if own != wanted]
    if told := [f"{len(bad)} {kind}, such as {min(bad)}" for kind, bad in report.items() if bad]:
        raise ValueError(f"{path}: does not match the transformer of {base} ({'; '.join(told)}); give its "
                         "--base, and a file of the transformer alone")  # fmt: skip
    return found


def write_transformer(path: Path, base: Path, folder: Path) -> int:
    """Writes the transformer's folder, a shard at a time; returns the number of tensors."""
    config = json.loads((base / "transformer" / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the base's weights may be in 4 bits, these are not
    weights, scales = read_names(path)
    found = check(path, weights, base, config)
    is_bfl = any(name != source for name, (source, _) in found.items())
    print(f"{'BFL' if is_bfl else 'diffusers'}'s names: {len(weights)} tensors, {len(scales)} with a scale", flush=True)
    options = {"filename_pattern": f"{STEM}{{suffix}}.safetensors", "max_shard_size": SHARD_SIZE}
    plan = split_torch_state_dict_into_shards({name: tensor for name, (_, tensor) in found.items()}, **options)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with safe_open(path, "pt") as file:
        for number, (filename, names) in enumerate(plan.filename_to_tensors.items(), 1):
            tensors = {}
            for source in dict.fromkeys(found[name][0] for name in names):
                key, dtype, _ = weights[source]
                tensor = file.get_tensor(key).to(FLOATS[dtype])
                if source in scales:
                    scale = file.get_tensor(scales[source]).float().view(-1, 1)  # one number, or one per row
                    tensor = (tensor.float() * scale).to(FLOATS[dtype])
                tensors |= {n: t.contiguous() for n, t in rename(source, tensor, is_bfl).items() if n in names}
            save_file(tensors, folder / filename, {"format": "pt"})
            print(f"{filename}: {number} of {len(plan.filename_to_tensors)} written", flush=True)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(found)


def convert(path: Path, base: Path, out: Path, copy: bool = False) -> int:
    """Writes the folder `out`, or nothing on failure; returns the number of tensors. Raises ValueError or OSError."""
    if out.exists():
        raise ValueError(f"--out {out}: already exists; choose another name")
    for file in ("model_index.json", "transformer/config.json"):
        if not (base / file).is_file():
            raise ValueError(f"--base {base}: has no {file}; give a folder in diffusers format")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        made = Path(folder) / out.name
        count = write_transformer(path, base, made / "transformer")
        for entry in base.iterdir():
            if entry.name == "transformer" or entry.name.startswith(".") or entry.suffix == ".safetensors":
                continue
            if copy:
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, made / entry.name)
            else:
                (made / entry.name).symlink_to(entry.absolute(), target_is_directory=entry.is_dir())
        made.rename(out)
    return count


def main() -> None:
    """Converts the file given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .safetensors file")
    parser.add_argument("--base", type=Path, required=True, help="folder of the model that it was fine-tuned from")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--copy", action="store_true", help="copy the base's other parts instead of linking them")
    args = parser.parse_args()
    try:
        count = convert(args.file, args.base, args.out, args.copy)
    except SafetensorError as error:
        sys.exit(f"error: {args.file}: is not a complete .safetensors file ({error}); download it again")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {count} tensors; train on it with --pretrained_model_name_or_path {args.out}")


if __name__ == "__main__":
    main()

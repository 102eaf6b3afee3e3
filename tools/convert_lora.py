"""Convert a LoRA file to the names of BFL's own model, which ComfyUI and most other programs expect.

    python tools/convert_lora.py outputs/lora/checkpoint-500/pytorch_lora_weights.safetensors comfyui_lora.safetensors

The training scripts write this file at the end of a run. Use this tool for checkpoints, and for LoRAs of other trainers
that diffusers can read.
"""

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dreambooth_lora_flux2 as script


def convert(source: Path, target: Path) -> int:
    """Writes the file; returns the number of its modules. Raises UserError if it is not a plain LoRA."""
    matrices, alpha = script.read_lora(source)
    rank = next(len(matrix) for name, matrix in matrices.items() if name.endswith(".lora_A.weight"))
    with safe_open(source, "pt") as file:
        facts = {key: value for key, value in (file.metadata() or {}).items() if key.startswith("modelspec.")}
    tensors = script.bfl_lora(matrices, alpha / rank)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, {"format": "pt", **facts})
    return len(tensors) // 2


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{sys.argv[2]}: {convert(Path(sys.argv[1]), Path(sys.argv[2]))} modules")
    except script.UserError as error:
        sys.exit(f"error: {error}")

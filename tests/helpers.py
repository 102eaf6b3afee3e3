"""What several test files share: where things are, and how to reach a script without loading torch."""

import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT_TO_IMAGE = "train_dreambooth_lora_flux2.py"
IMAGE_TO_IMAGE = "train_dreambooth_lora_flux2_img2img.py"

# The line of each script behind which importing takes seconds; everything above needs the standard library only.
HEAVY_IMPORTS_MARKER = (
    "# The heavy imports stand below the arguments so that --help and usage errors are answered at once."
)

# The smallest command line without a usage error.
MINIMAL_ARGUMENTS = (
    "--pretrained_model_name_or_path",
    "tiny_flux2",
    "--instance_data_dir",
    "tests",  # any folder that is there
    "--instance_prompt",
    "a photo of sks toy",
)


def existing_scripts() -> list[str]:
    """Return the names of the training scripts that are there; the second one may still have to be written."""
    return [name for name in (TEXT_TO_IMAGE, IMAGE_TO_IMAGE) if (ROOT / name).is_file()]


def read_script(script: str) -> str:
    """Return the source of a training script."""
    return (ROOT / script).read_text(encoding="utf-8")


def load_arguments(script: str) -> types.ModuleType:
    """Return the part of a script above its heavy imports as a module: `load_arguments(name).parse_args([...])`."""
    lines = read_script(script).splitlines(keepends=True)
    marker = [number for number, line in enumerate(lines) if line.rstrip() == HEAVY_IMPORTS_MARKER]
    assert len(marker) == 1, f"{script}: expected one line {HEAVY_IMPORTS_MARKER!r}, found {len(marker)}"
    module = types.ModuleType(f"arguments_of_{Path(script).stem}")
    module.__file__ = str(ROOT / script)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile("".join(lines[: marker[0]]), module.__file__, "exec"), module.__dict__)
    return module


def run_python(*arguments: str | Path, cwd: Path = ROOT, timeout: float = 60) -> subprocess.CompletedProcess:
    """Run this interpreter on the arguments and return the finished process with its output as text."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def bitsandbytes_on_cpu(setattr=setattr) -> None:
    """Lets diffusers load bitsandbytes' formats without a GPU: it asks for one, the rest of it works without.

    Also keeps bitsandbytes from repacking 4-bit weights for AVX-512: no gradient passes a repacked weight, and the tiny
    encoder is narrower than its blocks.
    """
    import bitsandbytes.nn
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        setattr(quantizer, "validate_environment", lambda *_args, **_kwargs: None)
        setattr(quantizer, "update_device_map", lambda _self, device_map: device_map or {"": "cpu"})

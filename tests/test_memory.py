"""Memory does not grow with the data: whole runs in processes of their own that tell their peak.

The benchmark runs the text-to-image script; what reads, caches and serves images is shared, byte for byte.
"""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def quick_model(tmp_path) -> Path:
    """The embedded model with a VAE of a quarter of the width: what counts here is the number of images."""
    from diffusers import AutoencoderKLFlux2

    folder = Path(shutil.copytree(ROOT / "tiny_flux2", tmp_path / "model"))
    config = AutoencoderKLFlux2.load_config(folder / "vae")
    narrow = {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4}
    AutoencoderKLFlux2.from_config({**config, **narrow}).save_pretrained(folder / "vae")
    return folder


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_the_peak_at_400_images_of_512_px_is_within_a_tenth_of_that_at_50(quick_model, tmp_path):
    from memory import measure

    few, many = measure(50, tmp_path, model=quick_model), measure(400, tmp_path, model=quick_model)
    assert len(list((tmp_path / "out-400" / "cache" / "latents").glob("*.safetensors"))) == 400
    assert many["peak_mb"] < 1.1 * few["peak_mb"], (few, many)

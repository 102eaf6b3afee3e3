"""The embedded model follows prompts, is small enough to ship, and comes out of its recipe by a seed."""

import hashlib
import random
from pathlib import Path

import diffusers
import pytest
import torch

import train_tiny_flux2 as recipe  # isort: skip  (tools/, which conftest puts on the path)
from tiny_world import UNSEEN, caption  # isort: skip

STEPS = ("--vae_steps", 4, "--text_steps", 4, "--steps", 4, "--scenes", 8, "--batch_size", 8)


def make_model(folder: Path, *flags: object) -> dict[str, str]:
    """A few steps of every part; returns the SHA-256 of each file of the model."""
    words = ["--work_dir", folder / "work", "--output_dir", folder / "model", *STEPS, *flags]
    with torch.random.fork_rng(devices=[]):
        for stage in ("vae", "text", "transformer"):
            recipe.main(recipe.parse_args([str(word) for word in (*words, "--stage", stage)]))
    files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
    return {str(path.relative_to(folder / "model")): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small_recipe():
    """A recipe of seconds: few drawings, frequent checkpoints."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VAE_DRAWINGS": 16, "STATISTICS_DRAWINGS": 16, "VAE_SCORE_DRAWINGS": 8}.items():
            patch.setattr(recipe, name, value)
        patch.setattr(recipe, "CHECKPOINT_STEPS", 2)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_recipe) -> dict[str, str]:
    """What seed 0 gives."""
    return make_model(tmp_path_factory.mktemp("seed0"))


@pytest.mark.soak
@pytest.mark.slow
def test_the_recipe_gives_the_same_bytes_by_its_seed_also_after_interruptions(tmp_path, made, monkeypatch):
    """A run that broke off within each part and was started again agrees in every file with one that did not."""
    assert {Path(name).parent.name for name in made} >= {"vae", "text_encoder", "transformer", "tokenizer", "scheduler"}
    update = recipe.Training.update

    def break_off(training, step, loss):
        if step == 3 and training.first == 0:
            raise KeyboardInterrupt
        update(training, step, loss)

    monkeypatch.setattr(recipe.Training, "update", break_off)
    for _ in range(3):  # each try gets through one part more
        with pytest.raises(KeyboardInterrupt):
            make_model(tmp_path)
    assert make_model(tmp_path) == made


@pytest.mark.slow
def test_another_seed_gives_another_model(tmp_path, made):
    """In each of the three trained parts."""
    other = make_model(tmp_path, "--seed", 1)
    for part in ("vae", "text_encoder", "transformer"):
        assert all(made[name] != other[name] for name in made if name.startswith(part) and "safetensors" in name)


def test_all_of_the_embedded_model_is_at_most_eight_megabytes(tiny):
    """It travels with every clone."""
    assert sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file()) <= 8e6


@pytest.mark.e2e
def test_the_embedded_model_draws_what_a_caption_says_of_pairs_it_never_saw(tiny):
    """Read from the pixels, 12 steps. Seen: background and light 1, colour 0.97, shape 0.5; guessing gives a sixth."""
    pipeline = diffusers.Flux2Pipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = recipe.prompt_scenes(random.Random("never seen"), 32, unseen=True)
    assert all((scene.colour, scene.shape) in UNSEEN for scene in scenes)
    options = {"height": recipe.SIZE, "width": recipe.SIZE, "num_inference_steps": 12, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompt=[caption(scene) for scene in scenes], generator=generator, max_sequence_length=64, **options
    ).images
    shares = recipe.read_shares(scenes, images)
    assert min(shares["background"], shares["light"], shares["colour"]) > 0.85 and shares["shape"] > 0.35, shares
    others = recipe.read_shares(scenes[1:] + scenes[:1], images)  # the reading itself favours no answer
    assert max(others["background"], others["colour"], others["shape"]) < 0.3, others

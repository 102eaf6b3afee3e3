"""It learns, seen in images: LoRAs trained on the embedded model change what the installed pipeline draws.

The embedded model knows the drawn world of tools/tiny_world.py, but neither night nor the toy. Training is the scripts'
own, drawing is `Flux2Pipeline`'s. `make test-learning` runs all of it and writes what it measured to
benchmarks/learning.json; the thresholds leave a margin to that.
"""

import functools
import json
import os
import platform
import random
import statistics
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import TEXT_TO_IMAGE
from mutations import MUTATIONS, load_mutant
from PIL import Image
from runs import LORA, assert_same_run, column, lora, spy

from demo_result import distance_to_toy  # isort: skip  (tools/, which conftest puts on the path)
from draw_demo_photos import PHOTOS, caption_photo, draw_photo  # isort: skip
from draw_edit_pairs import NIGHT, draw_folders, draw_pair  # isort: skip
from tiny_world import PLACES, Scene, background_pixels, caption, draw_scene, draw_toy, random_scene  # isort: skip

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SIDE, SEEDS, STEPS = 128, range(4), 300
TOY, OTHER = "a photo of sks toy", "a photo of a large purple square"
ASKED = ("green", "beach", "white", "wall", "cyan")  # the names in tools/tiny_world.py of
BACKGROUNDS = ("on a green background", "on the beach", "on a white background", "on a wall", "on a cyan background")


@pytest.fixture(scope="module")
def figures():
    """`figures(name, **numbers)` prints what was measured; LEARNING_JSON names a file whose figures it replaces."""
    measured: dict[str, dict[str, float]] = {}

    def note(name: str, **numbers: float) -> None:
        measured[name] = {key: round(float(value), 4) for key, value in numbers.items()}
        print(f"\n{name}: {measured[name]}")

    yield note
    if path := os.environ.get("LEARNING_JSON"):
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {"figures": {}}
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
        content = {
            "command": "make test-learning",
            "machine": platform.machine(),
            "versions": versions,
            "figures": stored["figures"] | measured,
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(model: Path, lora: Path | None, prompts: list[str], references: list[Image.Image | None]) -> list[Image.Image]:
    """The installed pipeline's image for each prompt and reference (or None); the seed is the place in the list."""
    pipeline = diffusers.Flux2Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 12, "guidance_scale": 1.0}
    images = []
    for seed, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(prompt=prompt, image=reference, generator=generator, max_sequence_length=64, **options)
        images += drawn.images
    return images


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference per pixel and colour, from 0 to 1."""
    arrays = [np.asarray(image.convert("RGB"), dtype=float) / 255 for image in (first, second)]
    return float(np.abs(arrays[0] - arrays[1]).mean())


def frame_distance(image: Image.Image, background: np.ndarray) -> float:
    """Mean absolute difference from a background (H, W, 3), 0 to 1, in a frame of 16 pixels: outside of the subject."""
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[16:-16, 16:-16] = False
    return float(np.abs(np.asarray(image.convert("RGB"), dtype=float) - background)[frame].mean()) / 255


def train(script, model: Path, data: Path, folder: Path, *flags: object) -> Path:
    """A LoRA with the demo's settings; a later flag replaces an earlier one. Returns its folder."""
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", data, "--output_dir", folder]
    words += ["--resolution", SIDE, "--cache_latents", "--max_sequence_length", 64, "--report_to", "none"]
    words += ["--rank", 32, "--lora_layers", "ai-toolkit", "--learning_rate", "4e-3", "--train_batch_size", 4]
    words += ["--lr_scheduler", "cosine", "--lr_warmup_steps", 20, "--max_train_steps", STEPS]
    words += ["--seed", 0, "--dataloader_num_workers", 0, "--upcast_before_saving", *flags]
    script.main(script.parse_args([str(word) for word in words]))
    return folder


# -------------------------------------------------------------------------------------------------------------- subject


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    """The five photos of the toy, and five other scenes of the world, each with its caption."""
    folder, rng = tmp_path_factory.mktemp("subject") / "data", random.Random("the others")
    folder.mkdir()
    for number, photo in enumerate(PHOTOS):
        draw_photo(photo).save(folder / f"toy{number}.png")
        (folder / f"toy{number}.txt").write_text(caption_photo(photo))
    for number in range(5):
        scene = random_scene(rng)
        draw_scene(scene, SIDE).save(folder / f"other{number}.png")
        (folder / f"other{number}.txt").write_text(caption(scene))
    return folder


def toy_distances(model: Path, lora: Path | None, what: str) -> list[float]:
    """For each seed the mean distance from the toy of what is drawn for `what` before the backgrounds, thrice each."""
    prompts = [f"{what} {background}" for background in BACKGROUNDS for _ in range(3) for _ in SEEDS]
    distances = list(map(distance_to_toy, draw(model, lora, prompts, [None] * len(prompts))))
    return [statistics.mean(distances[seed :: len(SEEDS)]) for seed in SEEDS]


@pytest.fixture(scope="module")
def base_distances(tiny) -> list[float]:
    """Those of the base model for the subject's name."""
    return toy_distances(tiny, None, TOY)


def judge(model: Path, lora: Path, base: list[float]) -> dict[str, float]:
    """How much nearer the toy is than in the base's images, in deviations over the seeds too, and than elsewhere."""
    toys, others = (toy_distances(model, lora, what) for what in (TOY, OTHER))
    gains = [before - after for before, after in zip(base, toys, strict=True)]
    gain = statistics.mean(gains)
    return {
        "base": statistics.mean(base),
        "lora": statistics.mean(toys),
        "other_prompt": statistics.mean(others),
        "gain": gain,
        "deviations": gain / statistics.stdev(gains),
        "apart": statistics.mean(others) - statistics.mean(toys),
    }


def has_learned(figures: dict[str, float]) -> bool:
    """Whether the subject came near for its own name, beyond chance, and not for another prompt.

    Seen: 0.096 away, 15 deviations, 0.21 apart. The nearest broken script, without normalisation, stays 0.131 away.
    """
    return figures["lora"] < 0.113 and figures["deviations"] > 5 and figures["apart"] > 0.05


@pytest.fixture(scope="module")
def subject_lora(t2i, tiny, subject, tmp_path_factory) -> Path:
    """The LoRA of the toy, trained as the demo trains it."""
    return train(t2i, tiny, subject, tmp_path_factory.mktemp("lora") / "toy")


@pytest.fixture(scope="module")
def subject_found(tiny, subject_lora, base_distances) -> dict[str, float]:
    """What that LoRA is judged to have learned."""
    return judge(tiny, subject_lora, base_distances)


def test_a_subject_that_the_base_has_never_seen_is_learned(subject_found, figures):
    """From five photos: nearer by more than five standard deviations over the seeds, and only under its name."""
    figures("subject", **subject_found)
    assert has_learned(subject_found), subject_found


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_script_has_other_losses_from_the_first_step(name, t2i, tiny, subject, tmp_path):
    """Quick; that it does not learn either is shown below, by `make test-learning`."""
    flags = (tiny, subject), ("--max_train_steps", 1, "--lr_warmup_steps", 0)
    whole = train(t2i, *flags[0], tmp_path / "whole", *flags[1])
    broken = train(load_mutant(TEXT_TO_IMAGE, name), *flags[0], tmp_path / "broken", *flags[1])
    assert column(broken, "loss") != pytest.approx(column(whole, "loss"), rel=0.01)


@pytest.mark.learning
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_script_does_not_learn_the_subject(name, tiny, subject, base_distances, tmp_path, figures):
    """It runs to its end, and the test above would fail on it."""
    found = judge(tiny, train(load_mutant(TEXT_TO_IMAGE, name), tiny, subject, tmp_path / "mutant"), base_distances)
    figures(f"broken: {name}", **found)
    assert not has_learned(found), found


# ---------------------------------------------------------------------------------------------------------------- edits


@pytest.fixture(scope="module")
def unseen() -> tuple[list[Image.Image], list[Image.Image]]:
    """(scenes, the same at night) that no training pair shows."""
    rng = random.Random("unseen by every pair")
    pairs = [draw_pair(replace(random_scene(rng), light="daylight"), None, SIDE) for _ in range(8)]
    return [before for before, _ in pairs], [after for _, after in pairs]


@pytest.fixture(scope="module")
def night_distance(i2i, tiny, unseen, tmp_path_factory):
    """`night_distance(dropout)`: difference from the truth and from other truths of a LoRA of 20 pairs; None: base."""
    pairs = tmp_path_factory.mktemp("night") / "pairs"
    draw_folders(pairs, 20, SIDE, seed=0)
    references, truths = unseen

    def measure(dropout: float | None) -> tuple[float, float]:
        flags = ("--cond_data_dir", pairs / "reference", "--instance_prompt", NIGHT, "--cond_dropout", dropout)
        folder = tmp_path_factory.mktemp("edit") / "lora"
        lora = None if dropout is None else train(i2i, tiny, pairs / "target", folder, *flags)
        drawn = draw(tiny, lora, [NIGHT] * len(references), references)
        others = truths[1:] + truths[:1]
        return tuple(statistics.mean(map(difference, drawn, wanted)) for wanted in (truths, others))

    return measure


def test_an_edit_learned_from_twenty_pairs_is_applied_to_unseen_images(night_distance, figures):
    """Make it night: the LoRA comes close to the truth (0.024; others are 0.107 away), the base does not (0.315)."""
    (base, _), (learned, to_others) = map(night_distance, (None, 0))
    figures("edit", base=base, lora=learned, lora_to_other_images=to_others)
    assert learned < 0.25 * base and learned < 0.6 * to_others


@pytest.mark.learning
def test_a_lora_that_saw_no_references_does_not_edit(night_distance, figures):
    """Seen: 0.122 from the truth, four to five times as far as with references."""
    distance, _ = night_distance(1)
    figures("edit without references", lora=distance)
    assert distance > 0.08


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.learning
def test_prior_preservation_keeps_the_class_nearer_to_the_base(t2i, tiny, tmp_path, figures):
    """After learning "a photo of sks circle", its class drifts less from the base's images when it is trained too.

    Seen: 0.060 with it, 0.143 without, where the class has become the toy.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, photo in enumerate(PHOTOS):
        draw_photo(photo).save(photos / f"{number}.png")
    prompts = ["a photo of a circle"] * 10
    base = draw(tiny, None, prompts, [None] * len(prompts))
    drift = {}
    prior = ("--with_prior_preservation", "--class_prompt", "a photo of a circle", "--num_class_images", 24)
    prior += ("--class_data_dir", tmp_path / "class", "--num_inference_steps", 12, "--validation_guidance_scale", 1)
    for name, flags in (("without", ()), ("with", prior)):
        lora = train(t2i, tiny, photos, tmp_path / name, "--instance_prompt", "a photo of sks circle", *flags)
        drawn = draw(tiny, lora, prompts, [None] * len(prompts))
        drift[name] = statistics.mean(map(difference, base, drawn))
    figures("prior preservation", drift_without=drift["without"], drift_with=drift["with"])
    assert drift["with"] < 0.7 * drift["without"]


@pytest.mark.learning
def test_rank_alpha_and_learning_rate_act_in_the_expected_direction(t2i, tiny, subject, tmp_path, figures):
    """More of each learns the training data better in the same number of steps.

    Seen: 0.225 and 0.107 for the ranks, 0.205 and 0.095 for the alphas, 0.354 and 0.107 for the rates.
    """
    cases = {
        "rank 1": ("--rank", 1),
        "rank 32": (),
        "alpha 2": ("--lora_alpha", 2),
        "alpha 64": ("--lora_alpha", 64),
        "rate 1e-4": ("--learning_rate", "1e-4"),
    }
    losses = {}
    for name, flags in cases.items():
        folder = train(t2i, tiny, subject, tmp_path / name.replace(" ", "-"), *flags)
        losses[name] = statistics.mean(column(folder, "loss")[-50:])
    losses["rate 4e-3"] = losses["rank 32"]  # the same run
    figures("loss over the last 50 steps", **losses)
    assert losses["rank 1"] > losses["rank 32"]
    assert losses["alpha 2"] > losses["alpha 64"]
    assert losses["rate 1e-4"] > losses["rank 32"]


@pytest.mark.learning
def test_shift_weighting_and_guidance_each_run_and_are_compared(t2i, tiny, subject, base_distances, tmp_path, figures):
    """A toy's figures: every setting brings the toy nearer. Seen: sigma_sqrt by 0.073, the others by 0.115 to 0.123."""
    cases = {
        "shift linear": (),
        "shift none": ("--timestep_shift", "none"),
        "shift empirical": ("--timestep_shift", "empirical"),
        "logit_normal": ("--weighting_scheme", "logit_normal"),
        "sigma_sqrt": ("--weighting_scheme", "sigma_sqrt"),
        "guidance 3.5": ("--guidance_scale", 3.5),
    }
    gains = {}
    for name, flags in cases.items():
        lora = train(t2i, tiny, subject, tmp_path / name.replace(" ", "-"), *flags)
        gains[name] = judge(tiny, lora, base_distances)["gain"]
    figures("gain by setting", **gains)
    assert min(gains.values()) > 0.03, gains


@pytest.mark.learning
def test_overfitting_shows_on_held_out_images_and_best_is_of_the_low(t2i, tiny, tmp_path, monkeypatch, figures):
    """The loss on eight held-out photos falls, then rises, while that on the four that are learned goes on falling.

    A low is the mean of three validations, an end that of five, of training losses of 40 steps.

    Seen: 0.350 before the first step, 0.252 at the low after step 40, 0.402 at the end; training 0.288, then 0.154.
    """
    rng, period = random.Random("photos of the toy"), 10
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        scene = random_scene(rng)
        draw_toy(scene, SIDE).save(data / f"{number:02}.png")
        (data / f"{number:02}.txt").write_text(TOY + caption(scene).partition(scene.shape)[2])
    measured = spy(monkeypatch, t2i, "validation_loss")
    flags = ("--validation_split", 8, "--validation_steps", period, "--checkpointing_steps", period)
    flags += ("--learning_rate", "1e-3", "--lr_scheduler", "constant", "--max_train_steps", 200)
    folder = train(t2i, tiny, data, tmp_path / "lora", *flags)
    held_out = [call.result["validation_loss"] for call in measured]  # of steps 0, 10, ...
    best, training = held_out.index(min(held_out)), column(folder, "loss")
    low, end = statistics.mean(held_out[best - 1 : best + 2]), statistics.mean(held_out[-5:])
    at_low = statistics.mean(training[max(0, best * period - 20) : best * period + 20])
    at_end = statistics.mean(training[-40:])
    figures("overfitting", base=held_out[0], low=low, end=end, training_at_low=at_low, training_at_end=at_end,
            best_step=best * period, last_step=len(training))  # fmt: skip
    assert held_out[0] > 1.15 * low and end > 1.25 * low, held_out
    assert at_end < 0.75 * at_low
    kept = (folder / "best" / LORA).read_bytes()
    same = [step for step in range(period, 201, period) if (folder / f"checkpoint-{step}" / LORA).read_bytes() == kept]
    assert same == [best * period] and 0 < best * period < 150


@pytest.mark.learning
def test_masked_backgrounds_are_not_learned_along_with_the_subject(t2i, tiny, tmp_path, figures):
    """Trained on photos before one background; other ones are asked for, and the frame around the toy is compared.

    Seen: 0.160 from the toy with and without masks (the base 0.215); the frame with masks 0.129 from the background
    that is asked for and 0.244 from that of the photos, without 0.179 and 0.178.
    """
    photos, masked = tmp_path / "without", tmp_path / "with"
    for folder in (photos, masked):
        folder.mkdir()
    learned, background = "purple", {name: background_pixels(name, "daylight", SIDE) for name in (*ASKED, "purple")}
    for place in PLACES:
        for size in ("medium", "large"):
            photo = draw_toy(Scene("circle", "orange", learned, place=place, size=size), SIDE)
            for folder in (photos, masked):
                photo.save(folder / f"{place}-{size}.png")
            mask = (np.asarray(photo) != background[learned]).any(axis=2)
            Image.fromarray(mask).save(masked / f"{place}-{size}-mask.png")
    prompts = [f"{TOY} {where}" for where in BACKGROUNDS for _ in SEEDS]
    asked = [name for name in ASKED for _ in SEEDS]
    base, found = draw(tiny, None, prompts, [None] * len(prompts)), {}
    toy = {"base": statistics.mean(map(distance_to_toy, base))}
    for folder, flags in ((photos, ()), (masked, ("--mask_suffix=-mask",))):
        flags += ("--instance_prompt", TOY, "--max_train_steps", 150)
        trained = train(t2i, tiny, folder, tmp_path / f"lora-{folder.name}", *flags)
        drawn = draw(tiny, trained, prompts, [None] * len(prompts))
        toy[folder.name] = statistics.mean(map(distance_to_toy, drawn))
        to_asked = [frame_distance(image, background[name]) for image, name in zip(drawn, asked, strict=True)]
        to_learned = [frame_distance(image, background[learned]) for image in drawn]
        found[f"asked_{folder.name}"] = statistics.mean(to_asked)
        found[f"learned_{folder.name}"] = statistics.mean(to_learned)
    figures("masks", **{f"toy_{name}": value for name, value in toy.items()}, **found)
    assert max(toy["without"], toy["with"]) < toy["base"] - 0.04, toy
    assert found["asked_with"] < found["asked_without"] - 0.025, found
    assert found["learned_with"] > found["learned_without"] + 0.03, found


OTHER_BASES = {
    "bf16": ("--mixed_precision", "bf16"),
    "fp8": ("--do_fp8_training",),
    "streamed fp8": ("--do_fp8_training", "--stream_blocks"),
    "nf4": ("--bnb_quantization_config_path", ROOT / "configs" / "quantization" / "nf4.json"),
    "int8": ("--bnb_quantization_config_path", ROOT / "configs" / "quantization" / "int8.json"),
}


@pytest.fixture(scope="module")
def trained_on(t2i, tiny, subject, tmp_path_factory):
    """`trained_on(base)`: the folder of the toy's LoRA on that base, trained once."""

    def start(base: str) -> Path:
        return train(t2i, tiny, subject, tmp_path_factory.mktemp("base") / "lora", *OTHER_BASES[base])

    return functools.cache(start)


@pytest.mark.learning
@pytest.mark.parametrize("base", ["bf16", "fp8", "nf4", "int8"])
def test_a_base_in_fewer_bits_learns_the_subject_too(
    bnb_on_cpu, trained_on, tiny, subject_found, base_distances, figures, base
):
    """Trained on a base in bf16 (the adapter stays fp32) or quantised, and drawn on the full weights, fp32 on the CPU.

    Seen: 0.122 on full weights, 0.122 in bf16, 0.121 in FP8, 0.116 in NF4.
    """
    full = subject_found["gain"]
    quantized = judge(tiny, trained_on(base), base_distances)["gain"]
    figures(f"gain with a base in {base}", full=full, **{base: quantized})
    assert quantized > 0.85 * full


@pytest.mark.learning
def test_streamed_fp8_learns_what_fp8_learns_to_the_bit(trained_on, figures):
    """All losses, gradient norms and the LoRA of the whole training; so the quality is FP8's above."""
    stay, streamed = trained_on("fp8"), trained_on("streamed fp8")
    losses = max(abs(a - b) for a, b in zip(column(stay, "loss"), column(streamed, "loss"), strict=True))
    one, other = lora(stay), lora(streamed)
    weights = max((one[name] - other[name]).abs().max().item() for name in one)
    figures("streamed FP8 from FP8, largest difference", loss=losses, lora=weights)
    assert_same_run(stay, streamed)


@pytest.mark.learning
def test_a_bf16_adapter_and_an_fp32_adapter_at_a_low_learning_rate(t2i, tiny, subject, tmp_path, monkeypatch, figures):
    """The reference trains the adapter in bf16; small updates of lora_A round away there. The base is bf16 in both.

    Seen: 19 % of lora_A's numbers moved in bf16, all in fp32; the losses are 0.556 and 0.530.
    """
    flags = ("--mixed_precision", "bf16", "--learning_rate", "2e-5", "--adam_weight_decay", "0")
    moved = {}
    for name in ("fp32", "bf16"):
        folder = tmp_path / name

        def watch(run, parameters, original=t2i.make_optimizer, rounded=name == "bf16"):
            if rounded:
                for parameter in parameters:
                    parameter.data = parameter.data.bfloat16()
            watch.parameters, watch.before = parameters, [parameter.detach().clone() for parameter in parameters]
            return original(run, parameters)

        monkeypatch.setattr(t2i, "make_optimizer", watch)
        train(t2i, tiny, subject, folder, *flags)
        changed = [(p.detach() != b).float().mean().item() for p, b in zip(watch.parameters, watch.before, strict=True)]
        downs = changed[0::2]  # lora_A and lora_B take turns
        moved[name] = statistics.mean(downs)
        moved[f"loss_{name}"] = statistics.mean(column(folder, "loss")[-50:])
        monkeypatch.undo()
    figures("share of lora_A's numbers that moved at 2e-5", **moved)
    assert moved["fp32"] > 0.9 and moved["bf16"] < moved["fp32"]

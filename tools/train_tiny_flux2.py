#!/usr/bin/env python
"""Train the embedded tiny FLUX.2 model on the synthetic world of tools/tiny_world.py, on the CPU and from a seed.

    python tools/train_tiny_flux2.py                             everything; resumes an interrupted run
    python tools/train_tiny_flux2.py --stage write               tiny_flux2/ from the newest checkpoint, finished or not

The VAE learns reconstruction and the text encoder what a text says about a scene. Then the transformer learns flow
matching, called exactly like FLUX.2: two of three steps use a caption alone, one an instruction and one reference image
in the layout [text | target | reference]. Steps and threads are fixed, so a seed gives the same bytes on the same kind
of machine with the same versions, interrupted or not. Checkpoints and sheets of images go to --work_dir. VAE and
text encoder are independent: `--stage vae` and `--stage text` may run in parallel.

Sections: settings, training, VAE, text encoder, data, transformer, score, files, command line.
Shapes: B batch, C channels, H height, W width, L tokens, D width of the text.
"""

import argparse
import json
import math
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import PixtralProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from make_tiny_flux2 import (  # noqa: E402
    DEV_TEXT_LAYERS,
    GUIDANCE_SCALE,
    TEXT_WIDTH,
    TIME_SCALE,
    damp_fast_sinusoids,
    draw_weights,
    make_tiny_flux2,
    measure_latent_statistics,
    sharpen_attention,
    text_gains,
)
from results import write_result  # noqa: E402
from tiny_world import (  # noqa: E402
    BACKGROUNDS,
    COLOURS,
    KEEP_WORDINGS,
    LIGHTS,
    PLACES,
    SHAPES,
    SIZES,
    UNSEEN,
    Scene,
    caption,
    draw_night,
    draw_scene,
    draw_toy,
    is_visible,
    make_sheet,
    random_edit,
    random_scene,
    read_image,
)

import train_dreambooth_lora_flux2 as script  # noqa: E402

# ---- settings ----

SIZE = 128  # pixels
VAE_BATCH = 8
VAE_DRAWINGS = 4000
STATISTICS_DRAWINGS = 256
VAE_SCORE_DRAWINGS = 32
EDGE_WEIGHT = 0.5
KL_WEIGHT = 3e-4

MUON_RATE = 0.02
ADAMW_RATE = 2e-3
WARMUP_STEPS = 100
# Parts of the names of matrices that are optimized by AdamW all the same.
ENDS = ("embed", "conv_in", "conv_out", "quant_conv", "modulation", "norm_out", "proj_out")

TEXT_TOKENS = 64  # 27 are the system message
REFERENCE_TIME = 10  # the T coordinate of the first reference in Flux2Pipeline
AVERAGE_DECAY = 0.998
START_SHARPNESS = 1.4
EMPTY_SHARE = 0.05  # of the captions
GUIDED_SHARE = 0.2  # of the samples: embedded guidance from 1 to 4 instead of 1
KEEP_SHARE = 0.4  # of the samples with a reference

TEXT_BATCH = 32
# What a text can say about a scene.
FIELDS = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "background": list(BACKGROUNDS),
    "light": list(LIGHTS),
    "place": list(PLACES),
    "size": list(SIZES),
}

CHECKPOINT_STEPS = 200
REPORT_STEPS = 50
# The score of random guessing.
CHANCE = {
    "background": 1 / len(BACKGROUNDS),
    "light": 1 / len(LIGHTS),
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
}


def step_rng(seed: int, stream: str, step: int) -> random.Random:
    """Return the random generator of one step, so that a resumed run draws the same numbers."""
    return random.Random(f"{seed} {stream} {step}")


def save_state(path: Path, **values) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


# ---- training ----


class Training:
    """One model's training: two optimizers, a decaying learning rate, averaged weights, a checkpoint to resume from.

    Muon optimizes the inner matrices, including convolutions; AdamW the rest: input and output layers, and vectors.
    """

    def __init__(self, name: str, model: torch.nn.Module, steps: int, args: argparse.Namespace) -> None:
        """Start from scratch, or from the newest checkpoint in the work folder."""
        self.name, self.model, self.steps, self.path = name, model, steps, args.work_dir / f"{name}.pt"
        named = dict(model.named_parameters())
        self.average = {key: parameter.detach().clone() for key, parameter in named.items()}
        matrices = [p for key, p in named.items() if p.ndim > 1 and not any(part in key for part in ENDS)]
        chosen = set(matrices)
        # Muon takes matrices only: it gets a flat view of each convolution, sharing its memory.
        self.flat = [(parameter, parameter.detach().flatten(1)) for parameter in matrices]
        muon = torch.optim.Muon([flat for _, flat in self.flat], lr=MUON_RATE, weight_decay=0.01)
        adamw = torch.optim.AdamW([p for p in named.values() if p not in chosen], betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizers = ((muon, MUON_RATE), (adamw, ADAMW_RATE))
        self.first, self.seconds = 0, 0.0
        if self.path.is_file():
            self.resume(torch.load(self.path, weights_only=True))

    def resume(self, state: dict) -> None:
        """Resume from a checkpoint."""
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.first, self.seconds = state["average"], state["step"], state["seconds"]

    def run(self, losses_at: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Run the remaining steps; `losses_at` returns a step's losses, of which "loss" is minimised."""
        began, smoothed = time.monotonic() - self.seconds, {}
        for step in range(self.first, self.steps):
            losses = losses_at(step)
            self.update(step, losses["loss"])
            for name, value in losses.items():
                smoothed[name] = 0.97 * smoothed.get(name, value.item()) + 0.03 * value.item()
            self.seconds = time.monotonic() - began
            if (step + 1) % REPORT_STEPS == 0:
                values = ", ".join(f"{name} {value:.4f}" for name, value in smoothed.items())
                print(f"{self.name} {step + 1}/{self.steps}, {self.seconds:.0f} s: {values}", flush=True)
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == self.steps:
                self.save(step + 1)

    def update(self, step: int, loss: torch.Tensor) -> None:
        """Take one step: warm-up, then cosine decay to one hundredth of the rate; gradients are clipped to norm 1."""
        factor = min(1, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for parameter, flat in self.flat:
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, rate in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        # The averaging window grows from the first steps to some hundreds, so early weights are forgotten sooner.
        share = max(1 - AVERAGE_DECAY, 9 / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), share)

    def save(self, step: int) -> None:
        """Write the checkpoint."""
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        states = {"model": self.model.state_dict(), "optimizers": optimizers, "average": self.average}
        save_state(self.path, **states, step=step, seconds=self.seconds)


def averaged(args: argparse.Namespace, name: str) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a model's newest checkpoint."""
    return torch.load(args.work_dir / f"{name}.pt", weights_only=True)["average"]


# ---- VAE ----


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return the image as uint8 values (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def draw_for_vae(count: int, seed: int) -> torch.Tensor:
    """Return uint8 drawings (B, 3, H, W): scenes, and one in eight each of the toy and of night.

    Unlike the transformer, the VAE is trained on these too: it must be able to decode what a LoRA learns.
    """
    rng = random.Random(f"{seed} vae")
    drawers = [draw_toy, draw_night, *6 * [draw_scene]]
    return torch.stack([to_pixels(drawers[number % 8](random_scene(rng), SIZE)) for number in range(count)])


def vae_batch(drawings: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return crops in [-1, 1], some recoloured or flipped, sometimes whole drawings at half size.

    Crops allow four times as many steps in the same time. Colours and sizes outside the world keep the VAE usable for
    your own images.
    """
    chosen = drawings[rng.sample(range(len(drawings)), VAE_BATCH)].float() / 127.5 - 1
    if rng.random() < 0.25:
        chosen = F.avg_pool2d(chosen, 2)
    else:
        top, left = rng.randrange(SIZE // 2 + 1), rng.randrange(SIZE // 2 + 1)
        chosen = chosen[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
    if rng.random() < 0.3:
        chosen = chosen[:, rng.sample(range(3), 3)]
    return chosen.flip(-1) if rng.random() < 0.5 else chosen


def vae_losses(vae: AutoencoderKLFlux2, pixels: torch.Tensor, generator: torch.Generator | None) -> dict:
    """Return the parts of the VAE's loss; without a generator the mean is decoded instead of a sample."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    errors = vae.decode(latents).sample - pixels
    edges = errors.diff(dim=-1).abs().mean() + errors.diff(dim=-2).abs().mean()
    return {"l1": errors.abs().mean(), "edges": edges, "kl": posterior.kl().mean() / latents[0].numel()}


def train_vae(args: argparse.Namespace, start: Path) -> None:
    """Train the VAE from the untrained folder or its checkpoint, and save it in the work folder."""
    vae = AutoencoderKLFlux2.from_pretrained(start / "vae", torch_dtype=torch.float32).train()
    training = Training("vae", vae, args.vae_steps, args)
    drawings = draw_for_vae(VAE_DRAWINGS, args.seed) if training.first < training.steps else None

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        rng = step_rng(args.seed, "vae", step)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        losses = vae_losses(vae, vae_batch(drawings, rng), generator)
        return losses | {"loss": losses["l1"] + EDGE_WEIGHT * losses["edges"] + KL_WEIGHT * losses["kl"]}

    training.run(losses_at)


@torch.no_grad()
def write_vae(args: argparse.Namespace, folder: Path) -> None:
    """Write the trained VAE into the model folder in bf16, with new latent statistics."""
    vae = load_vae(folder)
    weights = vae.state_dict() | averaged(args, "vae")
    write_weights(folder / "vae", weights)
    # Users load rounded weights, so these are measured.
    vae = load_vae(folder)
    rng = random.Random(f"{args.seed} statistics")
    images = (
        torch.stack([to_pixels(draw_scene(random_scene(rng), SIZE)) for _ in range(STATISTICS_DRAWINGS)]).float()
        / 127.5
        - 1
    )
    mean, variance = measure_latent_statistics(vae, images)
    write_weights(folder / "vae", weights | {"bn.running_mean": mean, "bn.running_var": variance})


def load_vae(folder: Path) -> AutoencoderKLFlux2:
    """Return the folder's VAE in fp32, as the training script loads it."""
    return AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images encoded and decoded by the VAE."""
    pixels = torch.stack([to_pixels(image) for image in images]).float() / 127.5 - 1
    return [to_image(one) for one in vae.decode(vae.encode(pixels).latent_dist.mode()).sample]


def score_vae(args: argparse.Namespace, vae: AutoencoderKLFlux2) -> dict[str, float]:
    """Return the mean distance of reconstructions from unseen drawings; write a sheet."""
    rng, errors, rows = random.Random(f"{args.seed} vae score"), {}, []
    for name, draw_one in (("scenes", draw_scene), ("toys", draw_toy), ("nights", draw_night)):
        images = [draw_one(random_scene(rng), SIZE) for _ in range(VAE_SCORE_DRAWINGS)]
        decoded = reconstruct(vae, images)
        errors[name] = mean_distance(images, decoded)
        rows += [images[:8], decoded[:8]]
    make_sheet(rows).save(args.work_dir / "vae.png")
    return errors


def mean_distance(firsts: list[Image.Image], seconds: list[Image.Image]) -> float:
    """Return the mean absolute difference between pairs of images, as a share of the range of values."""
    pairs = zip(firsts, seconds, strict=True)
    differences = [np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() for a, b in pairs]
    return round(float(np.mean(differences)) / 255, 4)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Convert values (3, H, W) in [-1, 1] to an image."""
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


# ---- text encoder ----


def labels_of(scene: Scene | None, said: Collection[str] = tuple(FIELDS)) -> list[int]:
    """Return the index of the scene's value for each field, from 1, or 0 if the text does not mention it."""
    return [1 + values.index(getattr(scene, name)) if name in said else 0 for name, values in FIELDS.items()]


def random_text(rng: random.Random) -> tuple[str, list[int]]:
    """Return a caption, an instruction, a request to keep the image or nothing, with its labels for each field."""
    kind = rng.choices(("caption", "edit", "keep", "empty"), (64, 30, 3, 3))[0]
    if kind in ("keep", "empty"):
        return rng.choice(KEEP_WORDINGS) if kind == "keep" else "", labels_of(None, ())
    scene = random_scene(rng)
    if kind == "caption":
        return caption(scene, rng), labels_of(scene)
    words, after = random_edit(scene, rng)
    said = [name for name in FIELDS if getattr(scene, name) != getattr(after, name) or getattr(after, name) in words]
    return words, labels_of(after, said)


class Reader(torch.nn.Module):
    """The text encoder's language model with one linear probe of the last token for each field of a scene."""

    def __init__(self, encoder: torch.nn.Module, layers: tuple[int, ...], seed: int) -> None:
        """Initialise close to the identity, so that a word's embedding passes through all layers."""
        super().__init__()
        self.language_model, self.layers = encoder.model.language_model.requires_grad_(), layers
        gains = text_gains(DEV_TEXT_LAYERS)
        draw_weights(encoder, seed, gains | {name: gains[name] / 4 for name in ("o_proj", "down_proj")})
        width = len(layers) * TEXT_WIDTH
        self.embed_fields = torch.nn.ModuleList([torch.nn.Linear(width, len(values) + 1) for values in FIELDS.values()])
        for head in self.embed_fields:
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits (B, values + 1) of each field."""
        output = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        last_BD = torch.cat([output.hidden_states[layer][:, -1] for layer in self.layers], dim=-1)
        return [head(last_BD) for head in self.embed_fields]


def train_text_encoder(args: argparse.Namespace, folder: Path) -> None:
    """Train the text encoder to recognise what a text says, and write it to the model folder.

    The probes are discarded. The last token of this encoder summarises the caption in one place: without that the
    transformer learned backgrounds within an hour and shapes not at all.
    """
    run = start_run(folder)
    tokenizer, encoder = script.load_tokenizer(run), script.load_text_encoder(run)
    reader = Reader(encoder, run.text_layers, args.seed)

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        rng = step_rng(args.seed, "text", step)
        texts, labels = zip(*(random_text(rng) for _ in range(TEXT_BATCH)), strict=True)
        logits = reader(**tokenize_all(tokenizer, texts))
        rows = list(zip(logits, torch.tensor(labels).unbind(1), strict=True))
        right = [(one.argmax(-1) == label).float().mean() for one, label in rows]
        loss = sum(F.cross_entropy(one, label) for one, label in rows)
        return {"loss": loss} | dict(zip(FIELDS, right, strict=True))

    Training("text_encoder", reader, args.text_steps, args).run(losses_at)


def write_text_encoder(args: argparse.Namespace, folder: Path) -> None:
    """Put the trained layers into the folder's text encoder, in bf16; last layer and vision tower stay random."""
    path, weights = folder / "text_encoder" / "model.safetensors", averaged(args, "text_encoder")
    tensors = load_file(path)
    for name in [name for name in weights if name.startswith("language_model.")]:
        stored = name.replace("language_model.", "language_model.model.", 1)
        assert stored in tensors, f"{path} has no {stored}"
        tensors[stored] = weights[name].bfloat16().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


# ---- data ----


def start_run(folder: Path) -> script.Run:
    """Return the training script's `Run` on the model folder: its functions encode prompts and images."""
    empty = folder.parent / "no_images"
    empty.mkdir(exist_ok=True)
    words = ["--pretrained_model_name_or_path", str(folder), "--instance_data_dir", str(empty)]
    words += ["--output_dir", str(folder.parent / "run"), "--instance_prompt", "none", "--resolution", str(SIZE)]
    words += ["--max_sequence_length", str(TEXT_TOKENS), "--report_to", "none", "--seed", "0"]
    return script.start_accelerator(script.parse_args(words))


@dataclass(frozen=True)
class Lessons:
    """The transformer's training data, encoded once; numbers in `captions` and `edits` are row indices."""

    tokens_NLC: torch.Tensor  # clean normalised tokens of all images
    prompts_NLD: torch.Tensor  # bf16: an embedding of each wording
    captions: torch.Tensor  # (N, 2): image, wording
    edits: torch.Tensor  # (N, 3): image before, wording, image after
    keeps: torch.Tensor  # wordings that ask for the reference itself
    empty: int  # the empty prompt


def make_lessons(args: argparse.Namespace, run: script.Run) -> Lessons:
    """Return the lessons, drawn and encoded, or loaded from the work folder."""
    path = args.work_dir / "lessons.pt"
    if path.is_file():
        return Lessons(**torch.load(path, weights_only=True))
    rng, scenes, wordings, captions, edits = random.Random(f"{args.seed} lessons"), [], {"": 0}, [], []
    keeps = [wordings.setdefault(words, len(wordings)) for words in KEEP_WORDINGS]
    for _ in range(args.scenes):
        scene = random_scene(rng)
        words, after = random_edit(scene, rng)
        first, last = len(scenes), len(scenes) + 1
        scenes += [scene, after]
        for number, shown in ((first, scene), (last, after)):
            captions.append((number, wordings.setdefault(caption(shown, rng), len(wordings))))
        edits.append((first, wordings.setdefault(words, len(wordings)), last))
    print(f"lessons: {len(scenes)} images, {len(wordings)} wordings", flush=True)
    lessons = {
        "tokens_NLC": encode_scenes(run, scenes),
        "prompts_NLD": encode_wordings(run, list(wordings)),
        "captions": torch.tensor(captions),
        "edits": torch.tensor(edits),
        "keeps": torch.tensor(keeps),
        "empty": 0,
    }
    save_state(path, **lessons)
    return Lessons(**lessons)


def encode_scenes(run: script.Run, scenes: list[Scene]) -> torch.Tensor:
    """Return the clean tokens (N, L, C) of the drawn scenes."""
    vae, codec, tokens = script.load_vae(run), script.LatentCodec(run), []
    for first in range(0, len(scenes), 64):
        pixels = torch.stack([to_pixels(draw_scene(scene, SIZE)) for scene in scenes[first : first + 64]])
        tokens.append(script.tokens_from_moments(codec, script.encode_pixels(vae, pixels.float() / 127.5 - 1)))
    return torch.cat(tokens)


def tokenize_all(tokenizer: PixtralProcessor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask (B, L) of the texts, as in the pipeline."""
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_TOKENS, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(script.format_input(texts), tokenize=True, return_dict=True, **options)


@torch.no_grad()
def encode_wordings(run: script.Run, wordings: list[str]) -> torch.Tensor:
    """Return the prompt embeddings (N, L, D) in bf16, to halve the memory: a batched `encode_prompt`."""
    tokenizer, encoder, embeddings = script.load_tokenizer(run), script.load_text_encoder(run), []
    for first in range(0, len(wordings), 64):
        tokens = tokenize_all(tokenizer, wordings[first : first + 64])
        output = encoder.model(**tokens, output_hidden_states=True, use_cache=False)
        embeddings.append(torch.cat([output.hidden_states[layer] for layer in run.text_layers], dim=-1).bfloat16())
    return torch.cat(embeddings)


@dataclass(frozen=True)
class Batch:
    """The data of one step."""

    clean_BLC: torch.Tensor
    prompts_BLD: torch.Tensor
    reference_BLC: torch.Tensor | None


def caption_batch(lessons: Lessons, rng: random.Random, size: int) -> Batch:
    """Return images with their captions, a few with the empty prompt."""
    images, words = lessons.captions[rng.choices(range(len(lessons.captions)), k=size)].unbind(1)
    words = torch.tensor([lessons.empty if rng.random() < EMPTY_SHARE else number for number in words.tolist()])
    return Batch(lessons.tokens_NLC[images], lessons.prompts_NLD[words].float(), None)


def reference_batch(lessons: Lessons, rng: random.Random, size: int) -> Batch:
    """Return edited images, with the instruction and the reference; the last ones must be kept unchanged.

    Half of these are a patchwork of tokens of many images, so that keeping is learned for any content.
    """
    before, words, after = lessons.edits[rng.choices(range(len(lessons.edits)), k=size)].unbind(1)
    reference, target = lessons.tokens_NLC[before], lessons.tokens_NLC[after]
    kept, mixed, cells = round(KEEP_SHARE * size), round(KEEP_SHARE * size / 2), target.shape[1]
    words[-kept:] = lessons.keeps[rng.choices(range(len(lessons.keeps)), k=kept)]
    pieces = torch.tensor([rng.choices(range(size), k=cells) for _ in range(mixed)])
    reference[-mixed:] = target[pieces, torch.arange(cells)]
    target[-kept:] = reference[-kept:]
    return Batch(target, lessons.prompts_NLD[words].float(), reference)


# ---- transformer ----


@torch.no_grad()
def make_transformer(folder: Path, seed: int) -> Flux2Transformer2DModel:
    """Return the transformer of the folder's sizes, initialised for training: every block is close to the identity."""
    transformer = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder / "transformer"))
    draw_weights(transformer, seed, {"modulation": 0.1, "norm_out": 0.1, "proj_out": 0.1})
    sharpen_attention(transformer, START_SHARPNESS)
    damp_fast_sinusoids(transformer.time_guidance_embed.timestep_embedder, TIME_SCALE)
    damp_fast_sinusoids(transformer.time_guidance_embed.guidance_embedder, GUIDANCE_SCALE)
    return transformer


def predict_velocity(
    transformer: Flux2Transformer2DModel,
    noisy_BLC: torch.Tensor,
    sigmas_B: torch.Tensor,
    guidance_B: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """Return the velocity (B, L, C) of the target's tokens; a reference follows them, as in Flux2Pipeline."""
    length, side = noisy_BLC.shape[1], SIZE // 16
    tokens, ids = noisy_BLC, script.position_ids(side, side)
    if batch.reference_BLC is not None:
        tokens = torch.cat([tokens, batch.reference_BLC], dim=1)
        ids = torch.cat([ids, ids + torch.tensor([REFERENCE_TIME, 0, 0, 0])], dim=1)
    return transformer(
        hidden_states=tokens,
        timestep=sigmas_B,
        guidance=guidance_B,
        encoder_hidden_states=batch.prompts_BLD,
        txt_ids=script.position_ids(1, 1, length=batch.prompts_BLD.shape[1]),
        img_ids=ids,
        return_dict=False,
    )[0][:, :length]


def flow_loss(args: argparse.Namespace, transformer: Flux2Transformer2DModel, batch: Batch, step: int) -> torch.Tensor:
    """Return the mean squared error of the velocity, with noise, sigma and guidance sampled for this step."""
    generator = torch.Generator().manual_seed(step_rng(args.seed, "noise", step).getrandbits(32))
    noise_BLC = torch.randn(batch.clean_BLC.shape, generator=generator)
    u_B, guided_B, scale_B = torch.rand(3, len(noise_BLC), generator=generator)
    # The linear shift of FLUX.2, the training script's default.
    sigmas_B = script.shift_sigmas(argparse.Namespace(timestep_shift="linear"), u_B, noise_BLC.shape[1])
    guidance_B = torch.where(guided_B < GUIDED_SHARE, 1 + 3 * scale_B, torch.ones_like(scale_B))
    noisy_BLC = torch.lerp(batch.clean_BLC, noise_BLC, sigmas_B.view(-1, 1, 1))
    velocity_BLC = predict_velocity(transformer, noisy_BLC, sigmas_B, guidance_B, batch)
    return (velocity_BLC - (noise_BLC - batch.clean_BLC)).square().mean()


def train_transformer(args: argparse.Namespace, folder: Path) -> None:
    """Train the transformer from scratch or its checkpoint; the checkpoint has the weights and their average."""
    lessons = make_lessons(args, start_run(folder))
    transformer = make_transformer(folder, args.seed)

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        kind, make_batch = (("caption", caption_batch), ("reference", reference_batch))[step % 3 == 2]
        batch = make_batch(lessons, step_rng(args.seed, kind, step), args.batch_size)
        loss = flow_loss(args, transformer, batch, step)
        return {"loss": loss, kind: loss}

    Training("transformer", transformer, args.steps, args).run(losses_at)


# ---- score ----


def prompt_scenes(rng: random.Random, count: int, unseen: bool) -> list[Scene]:
    """Return scenes to prompt for: the held-out pairs in turn, or pairs from training."""
    pairs, scenes = sorted(UNSEEN), []
    while len(scenes) < count:
        scene = random_scene(rng)
        if unseen:
            colour, shape = pairs[len(scenes) % len(pairs)]
            scene = replace(scene, colour=colour, shape=shape)
        if is_visible(scene):
            scenes.append(scene)
    return scenes


def read_shares(scenes: list[Scene], images: list[Image.Image]) -> dict[str, float]:
    """Return the share of images in which each property matches the prompt, and in which all four do."""
    readings = [read_image(image) for image in images]
    hits = {
        name: [getattr(scene, name) == getattr(seen, name) for scene, seen in zip(scenes, readings, strict=True)]
        for name in CHANCE
    }
    hits["all"] = [all(row) for row in zip(*hits.values(), strict=True)]
    return {name: round(sum(row) / len(row), 3) for name, row in hits.items()}


def draw_captions(pipeline: Flux2Pipeline, scenes: list[Scene], guidance: float, seed: int) -> list[Image.Image]:
    """Generate images from the scenes' captions with the pipeline."""
    images = []
    for first in range(0, len(scenes), 16):
        prompts = [caption(scene) for scene in scenes[first : first + 16]]
        images += draw(pipeline, prompts, guidance, seed + first)
    return images


def draw(pipeline: Flux2Pipeline, prompts: list[str], guidance: float, seed: int, **options) -> list[Image.Image]:
    """Generate images from the prompts with the pipeline, as a user would."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"height": SIZE, "width": SIZE, "num_inference_steps": 28, "max_sequence_length": TEXT_TOKENS}
    return pipeline(prompt=prompts, guidance_scale=guidance, generator=generator, **sizes, **options).images


def score_captions(args: argparse.Namespace, pipeline: Flux2Pipeline) -> dict:
    """Return how well images follow their captions, on unseen and on seen pairs of colour and shape; write a sheet."""
    scores, rows = {"chance": {name: round(value, 3) for name, value in CHANCE.items()}}, []
    for kind in ("unseen", "seen"):
        scenes = prompt_scenes(random.Random(f"{args.seed} {kind} score"), args.score_images, kind == "unseen")
        drawings = [draw_scene(scene, SIZE) for scene in scenes]
        rows.append(drawings[:12])
        scores[f"{kind}_drawn"] = read_shares(scenes, drawings)
        # The drawing itself, through the VAE, is the upper bound.
        scores[f"{kind}_through_vae"] = read_shares(scenes, reconstruct(pipeline.vae, drawings))
        for guidance in (1.0, 4.0):
            images = draw_captions(pipeline, scenes, guidance, seed=args.seed + 1000)
            scores[f"{kind}_guidance_{guidance:g}"] = read_shares(scenes, images)
            rows.append(images[:12])
    make_sheet(rows).save(args.work_dir / "captions.png")
    return scores


def score_keeping(args: argparse.Namespace, pipeline: Flux2Pipeline) -> dict:
    """Return the distance of "keep the image" results to their reference and to another image's reference."""
    rng, scores, rows = random.Random(f"{args.seed} keep score"), {}, []
    for kind, draw_one in (("scenes", draw_scene), ("toys_never_seen", draw_toy), ("nights_never_seen", draw_night)):
        references = [draw_one(random_scene(rng), SIZE) for _ in range(args.score_references // 2)]
        images = [
            draw(pipeline, [KEEP_WORDINGS[0]], 1.0, args.seed + number, image=[reference])[0]
            for number, reference in enumerate(references)
        ]
        shuffled = references[1:] + references[:1]
        for name, others in (("reference", references), ("shuffled", shuffled)):
            scores[f"{kind}_to_{name}"] = mean_distance(images, others)
        rows += [references[:12], images[:12]]
    make_sheet(rows).save(args.work_dir / "keeping.png")
    return scores


def score_edits(args: argparse.Namespace, pipeline: Flux2Pipeline) -> dict:
    """Return how close edited images are to the drawing of the edit, and how well they match when read."""
    rng, triples = random.Random(f"{args.seed} edit score"), []
    for number in range(args.score_references):
        before = random_scene(rng)
        words, after = random_edit(before, rng)
        reference, wanted = draw_scene(before, SIZE), draw_scene(after, SIZE)
        image = draw(pipeline, [words], 1.0, args.seed + number, image=[reference])[0]
        triples.append((after, reference, wanted, image))
    scenes, references, wanted, images = (list(column) for column in zip(*triples, strict=True))
    make_sheet([references[:12], images[:12], wanted[:12]]).save(args.work_dir / "edits.png")
    return {
        "to_the_edit": mean_distance(images, wanted),
        "reference_to_the_edit": mean_distance(references, wanted),
        "read_as_asked": read_shares(scenes, images),
        "reference_read_as_asked": read_shares(scenes, references),
    }


def score(args: argparse.Namespace, folder: Path) -> dict:
    """Return all scores of the folder, in fp32 on its bf16 weights."""
    pipeline = Flux2Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scores = {"vae_error": score_vae(args, pipeline.vae)}
    for name, measure in (("captions", score_captions), ("keeping", score_keeping), ("edits", score_edits)):
        scores[name] = measure(args, pipeline)
        print(name, json.dumps(scores[name], indent=1), flush=True)
    return scores


# ---- files ----


def write_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Replace the folder's weights by these, in bf16; the configuration stays."""
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    tensors = {name: value.contiguous() for name, value in rounded.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """Write the averaged weights of the newest checkpoint into the model folder, and the folder to --output_dir."""
    write_weights(folder / "transformer", averaged(args, "transformer"))
    shutil.copytree(folder, args.output_dir, dirs_exist_ok=True)
    total_bytes = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"{args.output_dir}: {total_bytes / 1e6:.2f} MB")


def write_scores(args: argparse.Namespace) -> None:
    """Measure the model in --output_dir and write benchmarks/tiny_flux2.json."""
    parts = ("vae", "text_encoder", "transformer")
    states = {name: torch.load(args.work_dir / f"{name}.pt", weights_only=True) for name in parts}
    facts = {"command": shlex.join(["python", "tools/train_tiny_flux2.py", *sys.argv[1:]]), "seed": args.seed}
    facts |= {f"{name}_steps": state["step"] for name, state in states.items()}
    facts |= {f"{name}_minutes": round(state["seconds"] / 60, 1) for name, state in states.items()}
    facts |= {"batch_size": args.batch_size, "scenes": args.scenes}
    print(write_result("tiny_flux2", {**facts, "scores": score(args, args.output_dir)}))


def copy_missing(source: str, target: str) -> None:
    """Copy a file unless it exists."""
    if not Path(target).exists():
        shutil.copy2(source, target)


# ---- command line ----


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, or the parsed words."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny FLUX.2 model on its world, on the CPU.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "tiny_flux2", help="pipeline folder to write")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "tiny_flux2", help="checkpoints and sheets")
    parser.add_argument("--stage", choices=("all", "vae", "text", "transformer", "write", "score"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=7000)
    parser.add_argument("--text_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=7000, help="steps of the transformer")
    parser.add_argument("--batch_size", type=int, default=16, help="images per step of the transformer")
    parser.add_argument("--scenes", type=int, default=6000, help="edits to learn from, and half of the captions")
    parser.add_argument("--score_images", type=int, default=64, help="images per caption score")
    parser.add_argument("--score_references", type=int, default=32, help="edits scored, and twice the images kept")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> None:
    """Run the requested stages; finished ones are skipped."""
    # The number of threads decides the order of sums and thus the bytes.
    torch.set_num_threads(1)
    start, model = args.work_dir / "start", args.work_dir / "model"
    if not start.is_dir():
        make_tiny_flux2(start, seed=args.seed)
    shutil.copytree(start, model, dirs_exist_ok=True, copy_function=copy_missing)
    if args.stage in ("all", "vae"):
        train_vae(args, start)
        write_vae(args, model)
        print("vae", score_vae(args, load_vae(model)), flush=True)
    if args.stage in ("all", "text"):
        train_text_encoder(args, model)
        write_text_encoder(args, model)
    if args.stage in ("all", "transformer"):
        torch.set_num_threads(2)
        train_transformer(args, model)
        torch.set_num_threads(1)
    if args.stage in ("all", "transformer", "write"):
        write_model(args, model)
    if args.stage in ("all", "score"):
        write_scores(args)


if __name__ == "__main__":
    main(parse_args())

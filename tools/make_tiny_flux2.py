#!/usr/bin/env python
"""Make a complete FLUX.2 pipeline folder of a few megabytes, offline and from a seed, for tests.

    python tools/make_tiny_flux2.py                                   # outputs/tiny_flux2_untrained, dev family, bf16
    python tools/make_tiny_flux2.py --family klein --output_dir outputs/tiny_klein

Every part has its real class, operations and file layout; only widths and depths are small. The weights are untrained,
initialised so that activations keep a scale of about one: tests need folders that are made in a second. Only the VAE's
batch-norm statistics are measured, on images drawn here. The same seed writes the same bytes. tools/train_tiny_flux2.py
trains such a folder to make the tiny_flux2/ of this repository.

Sections: sizes, captions, tokenizers, weights, text encoders, transformer, VAE, pipelines, command line.
Shapes: B batch, C channels, H height, W width.
"""

import argparse
import json
import math
import re
import zlib
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.utils import logging as diffusers_logging
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

# ---- sizes ----

# The corpus gives about 540 tokens (one for each of its words); the rest is reserve.
VOCABULARY_SIZE = 576
TEXT_WIDTH = 32
TEXT_INTERMEDIATE = 32
TEXT_HEADS = 4
TEXT_KEY_VALUE_HEADS = 2
# One layer more than the last hidden state that the pipeline uses would be enough; 32 leaves one to cut (31 is still
# right, 30 is not, because transformers applies the final norm to the last hidden state only).
DEV_TEXT_LAYERS = 32
# The pipeline uses 9, 18 and 27.
KLEIN_TEXT_LAYERS = 30
# Room for the 2,048 tokens of the pipeline's prompt upsampling and what it generates.
MAX_POSITIONS = 4096
LATENT_CHANNELS = 8
# The VAE patchifies 2 x 2 latents into one token.
TOKEN_CHANNELS = 4 * LATENT_CHANNELS
# The real negative log-variance is large; -6 makes the posterior's deviation 0.05.
POSTERIOR_LOG_VARIANCE = -6.0

# ---- captions ----

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (240, 140, 30),
    "purple": (140, 60, 180),
    "pink": (240, 140, 180),
    "cyan": (60, 200, 210),
    "brown": (130, 85, 50),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
SENTENCES = (
    "a photo of sks dog in a bucket",
    "a photo of a cat on a table, soft light",
    "a small toy on the beach at sunset",
    "a large picture of TOK in the style of a drawing",
    "an image of two objects, one on the left and one on the right",
    "make the circle blue and keep the background",
    "change the color of the square to yellow",
    "replace the triangle with a star",
    "remove the object from the image",
    "add a white border with warm light from above",
    "turn the background dark and the shape bright",
)


# Klein's chat template contains them.
CHAT_ROLES = ["system", "user", "assistant"]


def make_corpus() -> list[str]:
    """Return the texts that the tokenizers are trained on: captions, edits and, often, the FLUX.2 system message."""
    captions = [
        f"a {colour} {shape} on a {other} background" for colour in COLOURS for shape in SHAPES for other in COLOURS
    ]
    # Repetition decides what BPE merges first: the system message precedes every prompt and must be short.
    return captions + 50 * list(SENTENCES) + 200 * [SYSTEM_MESSAGE] + 50 * CHAT_ROLES


# ---- tokenizers ----

DEV_SPECIAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
]
KLEIN_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KLEIN_THINK_TOKENS = ["<think>", "</think>"]

DEV_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for block in content -%}
{%- if block['type'] == 'text' -%}{{ block['text'] }}
{%- elif block['type'] in ['image', 'image_url'] -%}[IMG]
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ '[SYSTEM_PROMPT]' + render(message['content']) + '[/SYSTEM_PROMPT]' }}
{%- elif message['role'] == 'user' -%}{{ '[INST]' + render(message['content']) + '[/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ render(message['content']) + eos_token }}
{%- else -%}{{ raise_exception('Only system, user and assistant roles are supported.') }}
{%- endif -%}
{%- endfor -%}
"""
KLEIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for block in message['content'] if block['type'] == 'text' -%}{{- block['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def train_byte_pairs(special_tokens: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on the corpus: any Unicode text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_corpus(), trainer)
    return tokenizer


def make_dev_processor() -> PixtralProcessor:
    """Return the processor of the dev family: left padding, BOS in front, template with system message."""
    byte_pairs = train_byte_pairs(DEV_SPECIAL_TOKENS)
    begin_id = byte_pairs.token_to_id("<s>")
    byte_pairs.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in DEV_SPECIAL_TOKENS if token.startswith("[")],
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=14, size={"longest_edge": 784}),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=DEV_CHAT_TEMPLATE,
    )


def make_klein_tokenizer() -> Qwen2TokenizerFast:
    """Return the tokenizer of the klein family: right padding, no BOS, template with thinking switch."""
    trained = json.loads(train_byte_pairs(KLEIN_SPECIAL_TOKENS + KLEIN_THINK_TOKENS).to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="right",
        model_max_length=MAX_POSITIONS,
        chat_template=KLEIN_CHAT_TEMPLATE,
    )
    # In Qwen3 the think tags are single tokens but not special ones: decoding keeps them.
    tokenizer.add_tokens(KLEIN_THINK_TOKENS)
    return tokenizer


# ---- weights ----


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int, gains: dict[str, float]) -> None:
    """Fill `model` with normal weights of deviation gain / sqrt(inputs); `gains` maps parts of names to gains, else 1.

    The first key that the name contains applies. Each tensor has its own generator, seeded by its name, so the order
    of modules does not matter.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # Norm scales and biases.
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        inputs = parameter[0].numel()
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / math.sqrt(inputs))


# ---- text encoders ----


def text_gains(layers: int) -> dict[str, float]:
    """Return gains for token embeddings of deviation one and a residual that about doubles over the depth."""
    # Each branch adds variance, so gains are divided by depth; attention averages over tokens and needs a larger gain.
    depth = math.sqrt(2 * layers)
    return {
        "embed_tokens": math.sqrt(TEXT_WIDTH),
        "q_proj": 2.0,
        "k_proj": 2.0,
        "o_proj": 4.0 / depth,
        "down_proj": 4.0 / depth,
    }


def text_sizes(layers: int) -> dict:
    """Return the configuration that both language models share."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": TEXT_HEADS,
        "num_key_value_heads": TEXT_KEY_VALUE_HEADS,
        "head_dim": TEXT_WIDTH // TEXT_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
    }


def make_dev_text_encoder(processor: PixtralProcessor, seed: int) -> Mistral3ForConditionalGeneration:
    """Return the text encoder of the dev family, untrained."""
    tokenizer = processor.tokenizer
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **text_sizes(DEV_TEXT_LAYERS), **token_ids},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 784,
            "patch_size": processor.patch_size,
        },
        image_token_index=processor.image_token_id,
        spatial_merge_size=processor.spatial_merge_size,
        tie_word_embeddings=True,
    )
    text_encoder = Mistral3ForConditionalGeneration(config)
    draw_weights(text_encoder, seed, text_gains(DEV_TEXT_LAYERS))
    return text_encoder


def make_klein_text_encoder(tokenizer: Qwen2TokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return the text encoder of the klein family, untrained."""
    config = Qwen3Config(
        **text_sizes(KLEIN_TEXT_LAYERS),
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = Qwen3ForCausalLM(config)
    draw_weights(text_encoder, seed, text_gains(KLEIN_TEXT_LAYERS))
    return text_encoder


# ---- transformer ----

# With plain 1 / sqrt(inputs), 500 tokens average to almost nothing: prompt and neighbours would hardly affect the
# output. Sharper attention (norm_q, norm_k) and larger branches prevent this; norm_out and proj_out set its scale.
TRANSFORMER_GAINS = {"modulation": 2.0, "to_out": 3.0, "to_add_out": 3.0}
ATTENTION_SHARPNESS = 1.8
# In steps of the sinusoid's argument, which is 1000 x sigma and 1000 x guidance.
TIME_SCALE = 100.0
GUIDANCE_SCALE = 3000.0


@torch.no_grad()
def damp_fast_sinusoids(embedder: torch.nn.Module, scale: float) -> None:
    """Weaken sinusoids with a period below `scale`, so that close arguments give close embeddings.

    With equal weights the outputs at sigma 0.50 and 0.51 would be unrelated, as would those in bf16 and fp32, which
    round sigma differently.
    """
    weight = embedder.linear_1.weight
    # Cosines first, then sines, over the same frequencies (diffusers' Timesteps with period base 10000).
    frequencies = 10000 ** -torch.linspace(0, 1, weight.shape[1] // 2 + 1)[:-1]
    damping = (1 / (1 + (frequencies * scale) ** 2)).repeat(2)
    weight *= damping / damping.square().mean().sqrt()


@torch.no_grad()
def sharpen_attention(transformer: Flux2Transformer2DModel, sharpness: float) -> None:
    """Scale the RMS norms of queries and keys, multiplying attention scores by `sharpness` squared."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            parameter *= sharpness


def make_transformer(family: str, seed: int) -> Flux2Transformer2DModel:
    """Return the untrained transformer; the family only decides whether it has a guidance embedder."""
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=TOKEN_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=family == "dev",
    )
    draw_weights(transformer, seed, TRANSFORMER_GAINS)
    sharpen_attention(transformer, ATTENTION_SHARPNESS)
    damp_fast_sinusoids(transformer.time_guidance_embed.timestep_embedder, TIME_SCALE)
    if family == "dev":
        damp_fast_sinusoids(transformer.time_guidance_embed.guidance_embedder, GUIDANCE_SCALE)
    return transformer


# ---- VAE ----


def draw_images(count: int, size: int, seed: int) -> torch.Tensor:
    """Return float64 images_BCHW in [-1, 1]: one coloured shape each on a background with a brightness gradient."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float64) / 127.5 - 1
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = []
    for index in range(count):
        center_x, center_y, radius, ramp = (torch.rand(4, generator=generator, dtype=torch.float64) - 0.5).tolist()
        first, second = torch.randperm(len(palette), generator=generator)[:2].tolist()
        mask = shape_mask(SHAPES[index % len(SHAPES)], x - center_x, y - center_y, 0.5 + 0.4 * radius)
        background = palette[second][:, None, None] + ramp * (x + y)
        images.append(torch.where(mask, palette[first][:, None, None], background).clamp(-1, 1))
    return torch.stack(images)


def shape_mask(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Return which coordinates the named shape of that radius around the origin covers (y grows downwards)."""
    distance = (x**2 + y**2).sqrt()
    masks = {
        "circle": distance < radius,
        "square": torch.maximum(x.abs(), y.abs()) < radius,
        "triangle": (y < 0.6 * radius) & (2 * x.abs() < y + radius),
        "diamond": x.abs() + y.abs() < radius,
        "ring": (distance < radius) & (distance > 0.6 * radius),
        "cross": (torch.minimum(x.abs(), y.abs()) < 0.3 * radius) & (torch.maximum(x.abs(), y.abs()) < radius),
    }
    return masks[shape]


@torch.no_grad()
def measure_latent_statistics(vae: AutoencoderKLFlux2, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each patchified latent channel over images and positions."""
    latents_BCHW = vae.encode(images_BCHW).latent_dist.mode()
    patches_BCHW = torch.nn.functional.pixel_unshuffle(latents_BCHW, 2)
    variance, mean = torch.var_mean(patches_BCHW, dim=(0, 2, 3))
    return mean, variance


@torch.no_grad()
def make_vae(seed: int, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """Return the untrained VAE in `dtype`, with batch-norm statistics measured on drawn images."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
    )
    draw_weights(vae, seed, {"conv2": 0.5})
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias[LATENT_CHANNELS:] = POSTERIOR_LOG_VARIANCE
    # Users load rounded weights, so these are measured; float64 makes the file independent of the number of threads.
    vae.eval().to(dtype).to(torch.float64)
    mean, variance = measure_latent_statistics(vae, draw_images(count=96, size=64, seed=seed))
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)
    return vae.to(dtype)


# ---- pipelines ----


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler with the values of the released FLUX.2 pipelines."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def make_pipeline(family: str, seed: int, dtype: torch.dtype) -> Flux2Pipeline | Flux2KleinPipeline:
    """Return the assembled pipeline of the family, "dev" or "klein"."""
    shared = {
        "scheduler": make_scheduler(),
        "vae": make_vae(seed, dtype),
        "transformer": make_transformer(family, seed).to(dtype),
    }
    if family == "dev":
        processor = make_dev_processor()
        text_encoder = make_dev_text_encoder(processor, seed).to(dtype)
        return Flux2Pipeline(text_encoder=text_encoder, tokenizer=processor, **shared)
    tokenizer = make_klein_tokenizer()
    text_encoder = make_klein_text_encoder(tokenizer, seed).to(dtype)
    return Flux2KleinPipeline(text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=False, **shared)


def make_tiny_flux2(
    folder: str | Path, family: str = "dev", seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the pipeline folder and return its path; raises ValueError for a family other than "dev" and "klein"."""
    if family not in ("dev", "klein"):
        raise ValueError(f'family is "{family}"; use "dev" or "klein"')
    # Building modules uses the global generator before draw_weights overwrites them: restore the caller's state.
    with torch.random.fork_rng(devices=[]):
        pipeline = make_pipeline(family, seed, dtype)
    pipeline.save_pretrained(folder)
    # transformers 5.23 names the vision tower's only kind of rope, and 5.0 refuses the name; both take it for granted
    config = Path(folder) / "text_encoder" / "config.json"
    config.write_text(re.sub(r',\s*"rope_type": "axial"', "", config.read_text()))
    return Path(folder)


# ---- command line ----


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description="Make a complete FLUX.2 pipeline folder of a few megabytes, untrained, offline and from a seed."
    )
    parser.add_argument("--output_dir", default="outputs/tiny_flux2_untrained", help="folder to write")
    parser.add_argument("--family", choices=("dev", "klein"), default="dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of all weights")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Write the folder and print its size."""
    # diffusers warns about an empty list of modules at each cast.
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    folder = make_tiny_flux2(args.output_dir, args.family, args.seed, dtype)
    total_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {args.family}, seed {args.seed}, {args.dtype}, {total_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(parse_args())

"""Train a FLUX.2 LoRA on a folder of images: the whole training in one short file.

    python examples/minimal_flux2_lora.py --pretrained_model_name_or_path tiny_flux2 --output_dir outputs/minimal \\
        --instance_data_dir PHOTOS --instance_prompt "a photo of sks toy" --resolution 64 --max_sequence_length 64

Read it to understand how FLUX.2 is trained, or copy it as a starting point. It is `train_dreambooth_lora_flux2.py`
reduced to the training itself: no buckets, flips, batches, checkpoints, validation, quantisation or second GPU. The
flags have the same names. With `--center_crop` the full script computes the same losses, bit for bit on the CPU
(tests/test_minimal.py).

    read_images       reads each image as a square of pixels in [-1, 1], with its caption
    encode_*          turn captions into prompt embeddings and images into tokens, once; then both encoders are freed
    load_transformer  loads the frozen transformer and adds a small trainable LoRA
    flow matching     adds noise to the tokens, predicts the velocity, and computes the squared error
    main              runs the training loop and saves one file for `pipe.load_lora_weights(OUTPUT_DIR)`

FLUX.2 [dev] and [klein] have different text encoders; diffusers picks the pipeline class that model_index.json names.
Models are loaded in bf16 on a GPU and in fp32 on the CPU; the transformer of [dev] alone takes 64 GB in bf16. For
[klein], use a *base* checkpoint such as black-forest-labs/FLUX.2-klein-base-4B.

Shapes in names: B batch (always 1 here), C channels, H W rows and columns, L tokens, D width of the text. The VAE turns
an image of 512 x 512 into latents of 32 x 64 x 64, and each 2 x 2 patch becomes one token: L = 32 * 32, C = 4 * 32.
"""

import argparse
import gc
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor, nn

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# The attention projections for image and text tokens; in the single-stream blocks they are fused with the MLP.
LORA_LAYERS = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0", ".attn.add_q_proj", ".attn.add_k_proj",
               ".attn.add_v_proj", ".attn.to_add_out", ".attn.to_qkv_mlp_proj", ".attn.to_out")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The ten most important flags, with the same names as in the full script."""
    parser = argparse.ArgumentParser(description="Train a FLUX.2 LoRA on a folder of images.")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="folder or hub id of a FLUX.2 model")
    parser.add_argument("--instance_data_dir", required=True, help="folder of images, with captions in NAME.txt")
    parser.add_argument("--instance_prompt", required=True, help="caption for images without NAME.txt")
    parser.add_argument("--output_dir", default="flux2-lora", help="folder for pytorch_lora_weights.safetensors")
    parser.add_argument("--resolution", type=int, default=512, help="side of the square in pixels, a multiple of 16")
    parser.add_argument("--max_sequence_length", type=int, default=512, help="text tokens, including the template")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--max_train_steps", type=int, default=500, help="optimizer steps, one image each")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args(argv)
    if args.resolution % 16:
        parser.error("--resolution: must be a multiple of 16, because a token covers 16 x 16 pixels")
    return args


# ----------------------------------------------------------------------------------------------------------- randomness
def make_generator(seed: int, *purpose: object) -> torch.Generator:
    """A random generator for one purpose, such as the noise of step 100, seeded by a hash of the seed and the purpose.

    With one global generator, each random number would depend on how many were generated before it. This way the noise
    of step 100 is always the same, on every machine, and a run that resumes there has no random state to restore.
    """
    key = "\x1f".join(map(str, (seed, *purpose))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)


def sample_of_step(seed: int, step: int, count: int) -> int:
    """The index of the sample for a step. Each epoch is a new permutation, so all samples are used equally often."""
    epoch, position = divmod(step, count)
    order = torch.randperm(count, generator=make_generator(seed, "instance", "order", 0, epoch))
    return int(order[position])


# --------------------------------------------------------------------------------------------------------------- images
def read_images(folder: Path, prompt: str, resolution: int) -> list[tuple[Tensor, str]]:
    """Returns (pixels (1, 3, H, W), caption) per image: upright, resized by its short side, cropped to the centre."""
    samples = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # phones store the rotation as metadata
        scale = resolution / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)[None].permute(0, 3, 1, 2) * 2 - 1
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8-sig").strip() if text.exists() else ""
        samples.append((pixels, caption or prompt))
    if not samples:
        raise SystemExit(f"--instance_data_dir {folder}: has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return samples


# ---------------------------------------------------------------------------------------------------------- encode once
def encode_prompt(pipe: DiffusionPipeline, caption: str, max_sequence_length: int) -> dict[str, Tensor]:
    """The transformer's input for a caption: the embedding (B, L, D) and the positions of its tokens (B, L, 4).

    The embedding is not the encoder's last output: it concatenates the outputs of three middle layers, so D is three
    times the encoder's width. Padding tokens are kept and not masked, because the pipelines do the same.
    """
    embeds_BLD, text_ids = pipe.encode_prompt(caption, device=pipe.device, max_sequence_length=max_sequence_length)
    return {"embeds": embeds_BLD, "text_ids": text_ids}


def encode_image(pipe: DiffusionPipeline, pixels_BCHW: Tensor) -> dict[str, Tensor]:
    """The transformer's input for an image: clean tokens x_0 (B, L, C) and their positions (B, L, 4)."""
    vae = pipe.vae
    latents_BCHW = vae.encode(pixels_BCHW.to(pipe.device)).latent_dist.mode()  # the mean: sampling would only add noise
    latents_BCHW = pipe._patchify_latents(latents_BCHW)  # 2 x 2 patches become channels

    # Latents need the same scale as the noise that is added to them, or sigma would not be the noise level. FLUX.2
    # stores mean and variance of each of the 128 channels as the running statistics of a batch norm in the VAE. The
    # transformer was trained on normalised latents, and the pipeline undoes the normalisation before decoding.
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    latents_BCHW = (latents_BCHW - mean) / std

    # Attention ignores the order of tokens, so rotary embeddings encode each token's position as four coordinates:
    # (0, row, column, 0) for an image token, (0, 0, 0, index) for a text token. The first coordinate tells images
    # apart: in the editing script, it is 10, 20, ... for reference images.
    image_ids = pipe._prepare_latent_ids(latents_BCHW).to(pipe.device)
    return {"clean": pipe._pack_latents(latents_BCHW), "image_ids": image_ids}


@torch.no_grad()
def load_and_encode(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], type]:
    """Returns the encoded samples and the class of the model's pipeline.

    The encoders do not change during training, so each caption and image is encoded only once. The pipeline is freed on
    return: the text encoder of [dev] has 24 billion parameters, and the transformer needs that memory.
    """
    images = read_images(Path(args.instance_data_dir), args.instance_prompt, args.resolution)
    # The VAE stays in fp32: it is small, and its latents are the training targets. The transformer is loaded later.
    dtypes = {"vae": torch.float32, "default": dtype}
    pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, transformer=None, dtype=dtypes)
    pipe.to(device)
    captions = {caption for _, caption in images}
    prompts = {caption: encode_prompt(pipe, caption, args.max_sequence_length) for caption in captions}
    return [encode_image(pipe, pixels) | prompts[caption] for pixels, caption in images], type(pipe)


# -------------------------------------------------------------------------------------------- transformer and LoRA
def load_transformer(args: argparse.Namespace, device: str, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """The frozen transformer with an adapter: W x becomes W x + alpha / rank * B A x, and only A and B are trained.

    The base may be bf16, but A and B are fp32. At rank 16 the values in A are around 1/16, where neighbouring bf16
    values are 0.0002 to 0.0005 apart: AdamW's update of about 0.0001, the learning rate, would be rounded away.
    """
    path, options = args.pretrained_model_name_or_path, {"subfolder": "transformer", "dtype": dtype}
    transformer = Flux2Transformer2DModel.from_pretrained(path, **options).to(device).requires_grad_(False)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linears if name.endswith(LORA_LAYERS)]
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    cast_training_params(transformer, torch.float32)

    # PEFT sets B to 0, so training starts from the base model. A is normal with std 1/rank, seeded by its name.
    for name, weight in get_peft_model_state_dict(transformer).items():
        if name.endswith("lora_A.weight"):
            generator = make_generator(args.seed, "lora", name)
            weight.copy_(torch.empty(weight.shape).normal_(std=1 / args.rank, generator=generator))

    # Store only the input of each block and recompute its activations in the backward pass: the results are the same,
    # at the cost of one more forward pass and for a fraction of the memory.
    transformer.enable_gradient_checkpointing()
    return transformer


# -------------------------------------------------------------------------------------------------------- flow matching
def draw_sigma(seed: int, step: int, tokens: int) -> Tensor:
    """The noise level (B) of a step: uniform between image (0) and noise (1), then shifted towards noise.

    The larger an image, the more tokens show the same content, and the more noise it takes to hide it. A sigma that
    hides an image of 256 tokens leaves one of 4096 recognisable, but a model learns composition only if it is hidden.
    So large images need higher sigmas. The shift is exp(mu), where mu is linear in the number of tokens: 0.5 at 256 and
    1.15 at 4096. This is the shift of FLUX.1, which FLUX.2 is reported to have been trained with. Inference shifts its
    schedule by the same formula, with a different mu.
    """
    sigma_B = 1 - torch.rand(1, generator=make_generator(seed, "instance", "sigma", step))
    shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    return shift * sigma_B / (1 + (shift - 1) * sigma_B)


def flow_matching_loss(
    transformer: Flux2Transformer2DModel, sample: dict[str, Tensor], noise_BLC: Tensor, sigma_B: Tensor
) -> Tensor:
    """Flow matching: the mean squared error of the predicted velocity, over all tokens and channels.

    Image and noise are the ends of a straight line, x_sigma = (1 - sigma) x_0 + sigma noise. The transformer learns to
    predict its velocity, d x_sigma / d sigma = noise - x_0, from x_sigma, sigma and the text. Many lines pass through
    the same x_sigma, so the prediction with the smallest error is the mean of their velocities. Inference starts from
    pure noise, sigma = 1, and follows the predictions in small steps to an image, sigma = 0.
    """
    clean_BLC, embeds_BLD = sample["clean"], sample["embeds"]
    sigma_B11, dtype = sigma_B.view(-1, 1, 1), embeds_BLD.dtype
    noisy_BLC = (1 - sigma_B11) * clean_BLC + sigma_B11 * noise_BLC  # fp32; the forward pass uses the model's dtype

    # [dev] was trained to imitate classifier-free guidance and takes the guidance scale as an input. Guided predictions
    # are not the mean velocity of any data, so train at scale 1, without guidance. [klein] has no such input.
    guidance_B = torch.ones_like(sigma_B) if transformer.config.guidance_embeds else None
    velocity_BLC = transformer(
        hidden_states=noisy_BLC.to(dtype),
        timestep=(sigma_B * 1000).to(dtype) / 1000,  # rounded as in the pipelines, whose timesteps are 0 to 1000
        guidance=guidance_B,
        encoder_hidden_states=embeds_BLD,
        img_ids=sample["image_ids"],
        txt_ids=sample["text_ids"],
        return_dict=False,
    )[0]
    return (velocity_BLC.float() - (noise_BLC - clean_BLC)).square().mean()


# ----------------------------------------------------------------------------------------------------------------- main
def main(args: argparse.Namespace) -> list[float]:
    """Trains the LoRA and saves it; returns the loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    samples, pipeline_class = load_and_encode(args, device, dtype)
    gc.collect()
    torch.cuda.empty_cache()
    transformer = load_transformer(args, device, dtype)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
    print(f"{len(samples)} images, {sum(p.numel() for p in parameters) / 1e6:.2f} M trainable parameters on {device}")

    losses = []
    for step in range(args.max_train_steps):
        sample = samples[sample_of_step(args.seed, step, len(samples))]
        tokens, channels = sample["clean"].shape[1:]
        noise = torch.randn(tokens, channels, generator=make_generator(args.seed, "instance", "noise", step))[None]
        sigma = draw_sigma(args.seed, step, tokens)

        loss = flow_matching_loss(transformer, sample, noise.to(device), sigma.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # limits the effect of a single unusual sample
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        print(f"step {step + 1:5d}  sigma {sigma.item():.3f}  loss {losses[-1]:.4f}", flush=True)

    # Save only the adapter, with diffusers' tensor names; rank and alpha go into the file's header.
    targets = transformer.peft_config["default"].target_modules
    header = {"r": args.rank, "lora_alpha": args.rank, "target_modules": sorted(targets)}
    layers = get_peft_model_state_dict(transformer)
    pipeline_class.save_lora_weights(
        args.output_dir, transformer_lora_layers=layers, transformer_lora_adapter_metadata=header
    )
    return losses


if __name__ == "__main__":
    main(parse_args())

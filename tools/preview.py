"""Make a sheet of samples as the model will see them: bucket, crop, flip, mask, references, caption.

    python tools/preview.py --out preview.png train_dreambooth_lora_flux2.py @run.args

Put the training command line after the tool's own flags. Rows are the first samples of the run in order, from the
script's own loader: the original image, the trained crop, the references. No weights are loaded; from the Hub only
configs and tokenizer are downloaded. Without `--seed` every run has different crops and another order.
"""

import argparse
import importlib
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

GAP = 12  # pixels between cells
TEXT_WIDTH = 46  # characters per line


def visits(script: ModuleType, words: list[str], count: int) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """Returns the run, its first `count` samples from the loader, and the images by name."""
    args = script.parse_args([*words, "--dry_run"])  # accepts an earlier run in the output folder
    if args.seed is None:
        print("no --seed: the training will use other crops, flips and another order than shown here")
    if args.cache_latents:  # cached latents are of the centre crop; its pixels are shown here
        args.cache_latents, args.center_crop = False, True
    args.dataloader_num_workers = 0
    script.set_up_logging()
    run = script.start_accelerator(args)
    samples, _ = script.check_data(run)
    script.TensorCache.get = lambda *_: torch.zeros(1)  # no encoding
    streams, codec = [script.Stream("instance", samples)], SimpleNamespace(channels=4)
    shown: list[dict[str, Any]] = []
    for (batch,) in script.make_loaders(run, SimpleNamespace(streams=streams, codec=codec, step=0)):
        rows = range(len(batch["name"]))
        shown += [{key: values[row] for key, values in batch.items()} for row in rows]
        if len(shown) >= count:
            return run, shown[:count], {sample.image.name: sample.image for sample in samples}
    raise AssertionError("the loader is endless")


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Converts (3, H, W) in [-1, 1] to an image."""
    return Image.fromarray(((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Scales the longer side to `side` pixels; small images without smoothing, so that their pixels stay visible."""
    scale = side / max(image.size)
    small = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), small)


def cells(run: Any, visit: dict[str, Any], listed: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Returns (title, image) of each cell of a row."""
    original, trained = listed[visit["name"]].decoded(), to_image(visit["pixels"])
    row = [(f"image {original.width} x {original.height}", original)]
    row.append((f"trained at {trained.width} x {trained.height}", trained))
    if "weights" in visit:  # of each token, from a mask
        weight = visit["weights"].reshape(trained.height // run.token_size, trained.width // run.token_size)
        shades = Image.fromarray((weight / weight.max().clamp(min=1e-6) * 255).round().byte().numpy())
        shades = shades.resize(trained.size, Image.Resampling.NEAREST)
        row.append(("weight of the loss", Image.composite(trained, Image.new("RGB", trained.size, "magenta"), shades)))
    for number, reference in enumerate(visit.get("references", []), 1):
        image = to_image(reference)
        row.append((f"reference {number}, {image.width} x {image.height}", image))
    return row


def draw(rows: list[tuple[dict[str, Any], list[tuple[str, Image.Image]]]], side: int) -> Image.Image:
    """Draws the sheet: one row per sample, with its text on the left."""
    font, left, line = ImageFont.load_default(14), TEXT_WIDTH * 8 + 2 * GAP, 20
    columns = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (left + columns * (side + GAP), len(rows) * (side + line + 2 * GAP) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for visit, row in rows:
        caption = textwrap.wrap(visit["caption"], TEXT_WIDTH)[: side // line - 2] or ["(empty caption)"]
        text = [f"visit {visit['position'] + 1}", visit["name"][-TEXT_WIDTH:], "", *caption]
        for number, words in enumerate(text):
            pen.text((GAP, top + number * line), words, "black", font)
        bottom = top + len(text) * line
        for column, (title, image) in enumerate(row):
            x, small = left + column * (side + GAP), thumbnail(image, side)
            pen.text((x, top), title, "black", font)
            sheet.paste(small, (x, top + line))
            pen.rectangle((x - 1, top + line - 1, x + small.width, top + line + small.height), outline="grey")
            bottom = max(bottom, top + line + small.height)
        top = bottom + 2 * GAP
    return sheet.crop((0, 0, sheet.width, top - GAP))


def main(argv: list[str]) -> None:
    """Writes the sheet for the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [--out PNG] [--count N] [--side N] SCRIPT.py FLAGS OF THE TRAINING",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the image to write (preview.png)")
    parser.add_argument("--count", type=int, default=12, help="visits to show (12)")
    parser.add_argument("--side", type=int, default=256, help="pixels of an image's longer side in the sheet (256)")
    own, words = parser.parse_known_args(argv)
    if not words or not Path(words[0]).is_file():
        parser.error("give the training script first, such as train_dreambooth_lora_flux2.py, then its flags")
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    script = importlib.import_module(Path(words[0]).stem)
    try:
        run, shown, listed = visits(script, words[1:], own.count)
    except script.UserError as error:
        sys.exit(f"error: {error}")
    draw([(visit, cells(run, visit, listed)) for visit in shown], own.side).save(own.out)
    print(f"{own.out}: {len(shown)} visits of {len(listed)} images")


if __name__ == "__main__":
    main(sys.argv[1:])

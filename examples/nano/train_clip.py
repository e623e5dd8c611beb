"""Train nano's measuring instrument: a small CLIP that compares pictures of its world with captions and each other.

python -m examples.nano.train_clip --out sd3tune/assets/nano_clip

It learns from drawn scenes of everything in the world, also of the subjects, under their own names, and in all styles.
A stopped training continues from its checkpoint, a file beside the folder.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from examples.nano.assemble import to_fp16
from examples.nano.pictures import SIDE
from examples.nano.resume import Checkpoint
from examples.nano.scenes import any_scene
from examples.nano.statements import only_nouns, statement, with_a_wrong_word, with_fewer_words
from examples.nano.text_encoders import CLIP_LENGTH, load_tokenizer, write_tokenizer
from sd3tune.files.atomic import new_folder
from sd3tune.model.base.progress_bars import no_progress_bars
from sd3tune.nano.world import Scene, render

PATCH, WIDTH, LAYERS, HEADS = 8, 64, 3, 4
LEARNING_RATE, WARM_UP = 2e-3, 100
LEADS = ("", "", "", "a photo of ", "a picture of ", "photo of ")


def new_clip(tokenizer: Any) -> CLIPModel:
    """Return an untrained CLIP: a ViT with patches of 8 pixels and a text model, each 64 wide with three layers."""
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH}
    vision = {**size, "image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    words, patches = model.text_model.embeddings, model.vision_model.embeddings
    for embedding in (words.token_embedding, words.position_embedding, patches.position_embedding):
        torch.nn.init.normal_(embedding.weight, std=0.5)  # at CLIP's 0.02, so small a model trains slowly at first
    torch.nn.init.normal_(patches.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    return model


class Pictures:
    """Drawn scenes: uint8 pixels [N, 3, 64, 64], and what captions can state about each, [N, attributes]."""

    def __init__(self, count: int, seed: int) -> None:
        chance = random.Random(f"clip/{seed}")
        self.scenes = [any_scene(chance) for _ in range(count)]
        self.pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
        for n, scene in enumerate(tqdm(self.scenes, desc="pictures", mininterval=1)):
            self.pixels[n] = torch.from_numpy(np.array(render(scene, n))).permute(2, 0, 1)
        self.statements = torch.tensor([statement(scene) for scene in self.scenes])


def as_pixels(pictures: Tensor) -> Tensor:
    """Return uint8 pictures as the processor prepares them: -1 to 1."""
    return pictures.float() / 127.5 - 1


def disturbed(pixels: Tensor) -> Tensor:
    """Return half of the pictures blurred, and all with noise, as a model draws less exactly than the rules."""
    half = len(pixels) // 2
    blurred = gaussian_blur(pixels[:half], 5, [float(torch.empty(1).uniform_(0.3, 1.2))])
    pixels = torch.cat([blurred, pixels[half:]])
    strength = 0.12 * torch.rand(len(pixels), 1, 1, 1)
    return pixels + strength * torch.randn_like(pixels)


def captions_of(scenes: Sequence[Scene], chance: random.Random) -> tuple[list[str], Tensor]:
    """Return a caption of each scene, then as many with a wrong word; and their statements.

    Two in five of the first name the shapes alone: else pictures would be near to each other by their colours.
    """
    told = [
        only_nouns(scene)
        if (drawn := chance.random()) < 0.4
        else scene
        if drawn < 0.65
        else with_fewer_words(scene, chance)
        for scene in scenes
    ]
    wrong = [with_a_wrong_word(scene, chance) for scene in scenes]
    texts = [chance.choice(LEADS) + scene.caption for scene in told + wrong]
    return texts, torch.tensor([statement(scene) for scene in told + wrong])


def fits(captions: Tensor, pictures: Tensor) -> Tensor:
    """Return whether each caption [C, attributes] is true of each picture [P, attributes]: bool [P, C]."""
    return ((captions[None] == 0) | (captions[None] == pictures[:, None])).all(-1)


def loss_of(similarity: Tensor, fit: Tensor) -> Tensor:
    """Return the contrastive loss of scaled similarities [P, C], in which several captions may fit a picture.

    The first P captions were made from the pictures; the others count as alternatives for the pictures alone.
    """
    wanted = fit.float()
    of_pictures = -(similarity.log_softmax(1) * wanted).sum(1) / wanted.sum(1)
    own = wanted[:, : len(wanted)]
    of_captions = -(similarity[:, : len(wanted)].log_softmax(0) * own).sum(0) / own.sum(0)
    return (of_pictures.mean() + of_captions.mean()) / 2


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the learning rate: from 0 to 1 in the first steps, then along a cosine to 0.02."""
    warm_up = max(1, min(WARM_UP, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: CLIPModel, tokenizer: Any, drawn: Pictures, steps: int, batch_size: int, seed: int, checkpoint: Path | None
) -> Tensor:
    """Train in place, with a file to continue from. Return the loss of each step of this call."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / max(1, min(WARM_UP, steps // 10)))
            * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    state = Checkpoint(checkpoint, model=model, optimizer=optimizer, schedule=schedule)
    start = state.load()
    losses = torch.zeros(steps - start)
    model.train()
    progress = tqdm(range(start, steps), desc="clip", unit=" steps", mininterval=1)
    for step in progress:
        chosen = torch.randint(len(drawn.scenes), (batch_size,))
        texts, statements = captions_of([drawn.scenes[n] for n in chosen], random.Random(f"{seed}/{step}"))
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        output = model(input_ids=ids, pixel_values=disturbed(as_pixels(drawn.pixels[chosen])))
        loss = loss_of(output.logits_per_image, fits(statements, drawn.statements[chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
        losses[step - start] = loss.detach()
        state.save(step + 1)
        recent = losses[max(0, step - start - 49) : step - start + 1]
        progress.set_postfix_str(f"loss {recent.mean():.3f}", refresh=False)
    model.eval()
    return losses


@torch.no_grad()
def share_chosen(model: CLIPModel, tokenizer: Any, drawn: Pictures) -> float:
    """Return the share of pictures that are nearer to their whole caption than to each of ten with a wrong word."""
    chance = random.Random(0)
    nearer = 0
    for scene, pixels in zip(drawn.scenes, drawn.pixels, strict=True):
        texts = [scene.caption, *(with_a_wrong_word(scene, chance).caption for _ in range(10))]
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        nearer += int(model(input_ids=ids, pixel_values=as_pixels(pixels[None])).logits_per_image.argmax() == 0)
    return nearer / len(drawn.scenes)


def write(model: CLIPModel, tokenizer: Any, out: Path) -> None:
    """Write the folder that CLIPModel and CLIPProcessor load, its weights in fp16."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with new_folder(out) as folder, no_progress_bars():
        model.save_pretrained(folder)
        CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
        to_fp16(folder / "model.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.train_clip", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in transformers' layout")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=24_000, help="how many are drawn and kept in memory")
    parser.add_argument("--start-from", type=Path, help="a CLIP of an earlier training, whose weights to start from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    checkpoint = options.out.with_name(options.out.name + ".training")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer("clip_l", Path(folder))
        tokenizer = load_tokenizer("clip_l", Path(folder))
    torch.manual_seed(options.seed)
    model = CLIPModel.from_pretrained(options.start_from) if options.start_from else new_clip(tokenizer)
    drawn = Pictures(options.pictures, options.seed)
    losses = train(model, tokenizer, drawn, options.steps, options.batch_size, options.seed, checkpoint)
    write(model, tokenizer, options.out)
    checkpoint.unlink(missing_ok=True)

    print(f"parameters  {model.num_parameters() / 1e6:.2f} M")
    print(f"loss        {losses[:20].mean():.3f} -> {losses[-100:].mean():.3f}")
    print(
        f"chosen      {share_chosen(model, tokenizer, Pictures(500, options.seed + 1)):.1%} of new pictures' captions"
    )
    print(f"written     {options.out}")


if __name__ == "__main__":
    main()

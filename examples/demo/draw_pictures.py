"""Draw the six pictures that `sd3tune demo` trains on: one toy robot in six places.

python examples/demo/draw_pictures.py sd3tune/assets/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, OVERSAMPLING = 256, 4
SCENES = {  # name: (sky, ground, tilt in degrees, size, centre)
    "beach": ("#8fd3f4", "#f3d9a4", -8, 0.92, (0.50, 0.50)),
    "forest": ("#a8d5a2", "#4f7942", 6, 0.85, (0.45, 0.52)),
    "night": ("#1d2951", "#3b3b58", 0, 1.00, (0.52, 0.49)),
    "room": ("#f2e6d8", "#b98a63", 10, 0.80, (0.56, 0.54)),
    "snow": ("#dfeaf4", "#ffffff", -4, 0.88, (0.48, 0.51)),
    "sunset": ("#f7a072", "#8d5a97", 4, 0.95, (0.50, 0.50)),
}


def robot(side: int) -> Image.Image:
    """Return an orange toy robot with teal eyes and one antenna, on a transparent square."""
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)

    def box(left: float, top: float, right: float, bottom: float, colour: str, round_by: float = 0.03) -> None:
        corners = [left * side, top * side, right * side, bottom * side]
        draw.rounded_rectangle(corners, radius=round_by * side, fill=colour, outline="#3a2a1a", width=side // 90)

    def disc(x: float, y: float, radius: float, colour: str) -> None:
        draw.ellipse([(x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side], fill=colour)

    draw.line([0.5 * side, 0.18 * side, 0.5 * side, 0.08 * side], fill="#3a2a1a", width=side // 50)
    disc(0.5, 0.07, 0.03, "#e63946")
    box(0.22, 0.55, 0.30, 0.74, "#d97b29")
    box(0.70, 0.55, 0.78, 0.74, "#d97b29")
    box(0.36, 0.78, 0.45, 0.92, "#8a8a8a")
    box(0.55, 0.78, 0.64, 0.92, "#8a8a8a")
    box(0.30, 0.50, 0.70, 0.82, "#f28f3b", 0.05)
    box(0.27, 0.17, 0.73, 0.52, "#f2a65a", 0.08)
    for x in (0.40, 0.60):
        disc(x, 0.33, 0.065, "#ffffff")
        disc(x, 0.33, 0.038, "#0f9d94")
    box(0.41, 0.43, 0.59, 0.46, "#3a2a1a", 0.01)
    disc(0.5, 0.66, 0.045, "#e63946")
    return picture


def scene(sky: str, ground: str, tilt: float, size: float, centre: tuple[float, float]) -> Image.Image:
    side = SIDE * OVERSAMPLING
    picture = Image.new("RGB", (side, side), sky)
    ImageDraw.Draw(picture).rectangle([0, round(0.72 * side), side, side], fill=ground)
    subject = robot(round(size * side)).rotate(tilt, resample=Image.Resampling.BICUBIC)
    corner = tuple(round(c * side - subject.width / 2) for c in centre)
    picture.paste(subject, corner, subject)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in SCENES.items():
        scene(*settings).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

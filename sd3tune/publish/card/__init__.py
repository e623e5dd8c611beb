"""The model card: the trained model, its use, its training, its measurements, and its limits.

`page` assembles it. Each section is a module: YAML header, usage, training, measurements, limits and licence.
"""

from sd3tune.publish.card.measured import DIVERGED, has_diverged
from sd3tune.publish.card.page import card, is_unchanged
from sd3tune.publish.card.trained import Drawing, Sample, Trained

__all__ = ["DIVERGED", "Drawing", "Sample", "Trained", "card", "has_diverged", "is_unchanged"]

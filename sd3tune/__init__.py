"""sd3tune: fine-tune Stable Diffusion 3 and 3.5 with LoRA and DreamBooth."""

__version__ = "0.1.0"

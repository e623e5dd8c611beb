"""LoRA layers in the transformer: which modules, how they start, and their dropout."""

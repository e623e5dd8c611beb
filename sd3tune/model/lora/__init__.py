"""LoRA layers in the transformer: target modules, initialization and dropout."""

"""Names of the files with trained weights, and of the contract in their metadata; without torch."""

from __future__ import annotations

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"
CONTRACT_KEY = "sd3tune"

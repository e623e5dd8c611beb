"""Files on disk: atomic writes, and one strict reader each for regular files, text, JSON and safetensors."""

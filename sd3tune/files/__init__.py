"""Files on disk: atomic writes, and strict readers for regular files, text, JSON and safetensors."""

"""The sampler of previews, `infer` and evaluation."""

"""The one sampler: previews, `infer` and evaluation draw their images here."""

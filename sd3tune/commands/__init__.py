"""The commands: one file per verb, readable from top to bottom. No command imports another, except `demo`."""

import sd3tune.model  # noqa: F401  it silences the libraries' warnings, so it must run before any of them is imported

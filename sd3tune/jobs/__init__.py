"""The composition roots: one file per verb. Here, and only here, the parts are wired together."""

import sd3tune.model  # noqa: F401  it quiets the libraries, which must happen before any of them is imported

"""The commands: one file per verb, which reads as the story of that verb. A command knows no other command."""

import sd3tune.model  # noqa: F401  it quiets the libraries, which must happen before any of them is imported

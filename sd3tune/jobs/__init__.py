"""The composition roots: one file per verb. Here, and only here, the parts are wired together."""

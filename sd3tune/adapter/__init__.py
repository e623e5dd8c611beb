"""The adapter file: reading, writing, other tools' layouts, metadata, Hub lookup and low-rank arithmetic."""

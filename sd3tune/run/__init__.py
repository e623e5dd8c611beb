"""One training run: its checks, folder, contract, encodings, report, model card and uploads."""

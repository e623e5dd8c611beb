"""The base model: its files, loading its parts, LoRA layers, and how a step is computed."""

import logging
import os

# diffusers imports bitsandbytes, which warns about kernels that are never used here, and torch's counter of operations,
# which warns where there is no Triton; the two libraries themselves warn about what is checked here and reported as an
# error. A user's own choice of verbosity stays.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

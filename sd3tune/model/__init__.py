"""The base model and its parts: where they are, how each one is loaded, what they make of text and images."""

import logging
import os

# diffusers imports bitsandbytes, which warns about kernels that are never used here, and torch's counter of operations,
# which warns where there is no Triton; the two libraries themselves warn about what is checked here and reported as an
# error. A user's own choice of verbosity stays.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

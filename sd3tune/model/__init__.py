"""The base model: its files, loading its parts, LoRA layers, and efficient computation of a step."""

import logging
import os

# Silence warnings that do not matter here: of bitsandbytes, which diffusers imports, about unused kernels; of torch's
# FLOP counter about a missing Triton; of the two libraries about faults that are checked here and reported as errors.
# A verbosity that the user has set stays.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

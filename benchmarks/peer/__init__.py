"""sd3tune beside diffusers' SD3 DreamBooth LoRA example: whole runs of both, as commands, taking turns.

The example itself is no part of this repository; `PEER_SCRIPT` says where it lies.
"""

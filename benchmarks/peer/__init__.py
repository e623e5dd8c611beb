"""sd3tune compared with diffusers' SD3 DreamBooth LoRA example: whole runs of both, as commands, in turns.

The example is not part of this repository; `PEER_SCRIPT` is its path.
"""

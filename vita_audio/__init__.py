"""VITA-Audio: a speech language model that speaks in its first forward pass.

Importing the package registers its model types and their processor with transformers'
Auto classes, so that released checkpoints load without ``trust_remote_code``.
"""

from vita_audio import inference, models

__version__ = "0.1.0"
__all__ = ["inference", "models"]

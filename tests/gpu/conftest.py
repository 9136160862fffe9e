"""Tests that need a CUDA device; ``scripts/test_gpu.sh`` runs them. Without one there is nothing to collect."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

"""Liger's loss kernels against ours: on a GPU as they are, elsewhere through Triton's interpreter.

Skipped where triton and liger-kernel are not installed. Both can be without a GPU; then
``TRITON_INTERPRET=1 python -m pytest tests/models/test_liger.py`` runs the kernels (docs/log.md).
"""

import os

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 has to be set before torch is imported", allow_module_level=True)

from vita_audio.models.loss import chunked_losses, liger_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_ligers_losses_hits_and_gradients_are_ours(dtype, tolerance, trained):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 64), 0.3 * torch.randn(500, 64)
    targets = torch.randint(500, (37,))
    targets[::3] = (hidden @ weight.T).argmax(dim=1)[::3]
    scales = torch.rand(37)
    batch = [hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE), scales.to(DEVICE)]
    theirs, ours = (function(*batch, True, trained) for function in (liger_losses, chunked_losses))
    for name, found, want in zip(("losses", "hits", "hidden", "weight"), theirs, ours, strict=True):
        if want is None:
            assert found is None, name
        elif name == "hits":  # two equal logits, which bfloat16 has, may go either way
            assert (found != want).sum() <= (0 if dtype == torch.float32 else 2)
        else:
            assert (found.float() - want.float()).abs().max() <= tolerance * want.float().abs().max(), name

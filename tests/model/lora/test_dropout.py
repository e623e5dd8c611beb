"""Dropout from a seed: nn.Dropout's distribution, no random state, off unless asked for."""

from __future__ import annotations

import pytest
import torch

from sd3tune.model.lora.dropout import SeededDropout

X = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_it_zeroes_a_share_and_scales_the_rest(share: float) -> None:
    dropout = SeededDropout(share, "name")
    dropout.draw(5)
    out = dropout(X)
    kept = out != 0
    assert (~kept).float().mean().item() == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(out[kept], X[kept] / (1 - share))


def test_it_is_off_until_a_seed_is_drawn_and_after_none() -> None:
    dropout = SeededDropout(0.5, "name").train()
    assert dropout(X) is X
    dropout.draw(1)
    assert not torch.equal(dropout(X), X)
    dropout.eval()
    assert not torch.equal(dropout(X), X)
    dropout.draw(None)
    assert dropout(X) is X


def test_the_mask_depends_on_seed_and_name_alone() -> None:
    one, other = SeededDropout(0.5, "a"), SeededDropout(0.5, "b")
    masks = []
    for dropout, seed in ((one, 1), (one, 1), (one, 2), (other, 1)):
        torch.manual_seed(len(masks))
        dropout.draw(seed)
        masks.append(dropout(X) == 0)
    assert torch.equal(masks[0], masks[1])
    for mask in masks[2:]:
        assert (mask == masks[0]).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_global_random_state_is_left_alone() -> None:
    dropout = SeededDropout(0.5, "name")
    dropout.draw(2**63 - 1)
    before = torch.random.get_rng_state()
    dropout(X)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_gradient_passes_where_the_input_did() -> None:
    dropout = SeededDropout(0.5, "name")
    dropout.draw(3)
    x = X.to(torch.bfloat16).requires_grad_()
    out = dropout(x)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert torch.equal(x.grad, 2 * (out != 0).to(torch.bfloat16))

"""The benchmark of gradient checkpointing: the sides do the same work, and the table names all of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checkpointing import KINDS, adapted, main, stepper


def test_every_kind_has_the_same_gradients() -> None:
    transformer = adapted(torch.device("cpu"))
    step, found = stepper(transformer, 64, 8), []
    for kind in KINDS:
        step(kind)
        found.append([p.grad for p in transformer.parameters() if p.grad is not None])
    assert found[0]
    assert all(all(map(torch.equal, of, found[0])) for of in found)


@pytest.mark.long
def test_the_table_has_a_row_for_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == list(KINDS)
    assert rows[0][2] == "1.00 |"

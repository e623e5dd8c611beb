"""EVA's start: the main directions of what each layer sees, against a plain decomposition of all of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.eva import input_directions
from sd3tune.model.lora.targets import select_modules

RANKS = {"transformer_blocks.0.attn.to_q": 3, "transformer_blocks.0.attn.to_k": 5, "transformer_blocks.2.ff.net.2": 3}


@pytest.fixture
def transformer() -> SD3Transformer2DModel:
    return load_transformer(resolve_base("tiny"), torch.float32)


def observe(transformer: SD3Transformer2DModel, batches: int = 6):
    def run() -> None:
        for number in range(batches):
            source = generator(number)
            transformer(
                hidden_states=torch.randn(2, 16, 8, 8, generator=source),
                timestep=torch.tensor([400.0, 800.0]),
                encoder_hidden_states=torch.randn(2, 93, 64, generator=source),
                pooled_projections=torch.randn(2, 48, generator=source),
            )

    return run


def all_inputs(transformer: SD3Transformer2DModel, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = transformer.get_submodule(name).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].flatten(0, -2))
    )
    with torch.no_grad():
        observe(transformer)()
    hook.remove()
    return torch.cat(seen).double()


def test_directions_are_the_principal_components_of_the_input(transformer) -> None:
    """They explain as much of the variance as those of a whole decomposition do, but for what was forgotten."""
    found = input_directions(transformer, RANKS, observe(transformer))
    for name, rank in RANKS.items():
        directions = found[name].double()
        inputs = all_inputs(transformer, name)
        assert directions.shape == (rank, inputs.shape[1])
        torch.testing.assert_close(directions @ directions.T, torch.eye(rank).double(), rtol=0, atol=1e-5)
        centred = inputs - inputs.mean(0)
        best = torch.linalg.svdvals(centred)[:rank].square().sum()
        random = torch.linalg.qr(torch.randn(inputs.shape[1], rank, generator=generator(0)).double())[0].T
        explained, by_chance = ((centred @ d.T).square().sum() / best for d in (directions, random))
        assert explained > 0.9
        assert by_chance < 0.7


def test_layers_with_one_input_share_their_directions(transformer) -> None:
    found = input_directions(transformer, RANKS, observe(transformer))
    query, key = found["transformer_blocks.0.attn.to_q"], found["transformer_blocks.0.attn.to_k"]
    assert torch.equal(query, key[:3])


def test_the_same_data_gives_the_same_start_and_leaves_no_hook(transformer) -> None:
    ranks = dict.fromkeys(select_modules(transformer, "attention+mlp"), 2)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(input_directions(transformer, ranks, observe(transformer, 2)))
    assert starts[0].keys() == starts[1].keys() == ranks.keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in ranks)
    assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_more_directions_than_vectors_are_refused_by_name(transformer) -> None:
    name = "transformer_blocks.0.norm1.linear"  # sees one vector an image
    with pytest.raises(AdapterError, match=rf"as the rank, 3, and {name} sees 2 vectors of 64 in a batch; lower"):
        input_directions(transformer, {name: 3}, observe(transformer))

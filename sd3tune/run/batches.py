"""The batches of a run, built from its configuration and encoded data."""

from __future__ import annotations

from functools import partial

from sd3tune.data.concepts import are_told_apart, concepts_of, shares_of_concepts
from sd3tune.model.load.components import vae_config
from sd3tune.run.drawing import NEGATIVE_PROMPT
from sd3tune.run.earlier import drops_kept_captions
from sd3tune.run.encoding import Encoded
from sd3tune.run.preflight import Plan
from sd3tune.run.streaming import stream_batches
from sd3tune.runtime.processes import Processes
from sd3tune.training.batches import Batches, Dropout, LatentScaling
from sd3tune.training.objective import sigma_map


def make_batches(plan: Plan, encoded: Encoded, processes: Processes) -> Batches:
    """Return the batches of a run for this process, from its encoded images and captions."""
    vae, flow, data = vae_config(plan.base), plan.config.flow, plan.config.data
    make = (
        partial(stream_batches, plan, encoded.store, processes)
        if plan.shards
        else partial(Batches, encoded.store, encoded.examples)
    )
    return make(
        seed=plan.config.seed,
        batch_size=plan.config.train.batch_size,
        accumulation=plan.config.train.gradient_accumulation,
        rank=processes.rank,
        world=processes.world,
        device=plan.device,
        scaling=LatentScaling(vae["scaling_factor"], vae["shift_factor"]),
        sigma_of=sigma_map(flow, plan.model_shift),
        noise_offset=flow.noise_offset,
        input_perturbation=flow.input_perturbation,
        dropout=Dropout(
            data.caption_dropout,
            data.encoder_dropout,
            {encoder: keys[NEGATIVE_PROMPT] for encoder, keys in encoded.captions.items() if NEGATIVE_PROMPT in keys},
            kept=drops_kept_captions(plan),
        ),
        t5_lengths=encoded.t5_lengths,
        shares=shares_of_concepts(data),
        concepts=[concept.name for concept in concepts_of(data)] if are_told_apart(data) else (),
    )

"""Description of a run's plan in a few lines, printed at its start and by `--dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch

from sd3tune.adapter.modelspec import describe_tags, tag_frequency
from sd3tune.config import Config
from sd3tune.data.buckets import Size, size_name
from sd3tune.data.concepts import are_told_apart, balanced, concept_numbers, concepts_of, shares_of_concepts
from sd3tune.data.sampler import times_seen
from sd3tune.model.base.contract import spread_without_offset
from sd3tune.model.lora.targets import CoverageRow
from sd3tune.run.base_sampling import describe_base_sampling
from sd3tune.run.buckets import bucket_of, describe_buckets
from sd3tune.run.captions import describe_captions
from sd3tune.run.earlier import began_in_llm_int8, drops_kept_captions
from sd3tune.run.evaluated import describe_evaluation
from sd3tune.run.masks import describe_masks
from sd3tune.run.preflight import Plan
from sd3tune.run.priors import describe_prompts
from sd3tune.run.sigmas import describe_sigmas
from sd3tune.run.sizes import describe_sizes
from sd3tune.run.stream_checks import describe_stream
from sd3tune.runtime.device import dtype_name


def describe(plan: Plan, world: int) -> list[str]:
    """Return the lines that describe the plan. `world` is the number of processes."""
    config, method = plan.config, plan.method
    cut = [bucket_of(record, plan.buckets) for record in plan.sized]
    parameters, modules = sum(row.parameters for row in plan.coverage), len(plan.modules)
    variant = f" ({plan.base.variant})" if plan.base.variant else ""
    every, compiled = config.validation.every, config.train.compile != "none"
    return [
        f"base      {plan.base.name}{variant}, {describe_precision(plan.config, plan.dtype)} on {plan.device.type}"
        + (f", {world} processes" if world > 1 else ""),
        *_describe_base(plan),
        *describe_base_sampling(config, plan.base),
        *_describe_data(plan),
        *(f"warning: {warning}" for warning in plan.warnings),
        *describe_buckets(cut),
        *_describe_concepts(plan),
        *describe_masks(config, plan.records),
        *describe_captions(config, plan.records, plan.base, method.cached_encoders, plan.dtype),
        *_describe_tags(plan),
        *_describe_priors(plan),
        *([f"held out  {_images(len(plan.holdout))}, measured every {every} steps"] if plan.holdout else []),
        *describe_evaluation(config, plan.evaluated),
        *(_describe_length(plan, cut, world) if plan.sized else _describe_steps(plan, world)),
        *_describe_sigmas(plan),
        f"loss      {config.flow.loss.kind}, weighting {config.flow.weighting.kind}"
        + f", noise offset {config.flow.noise_offset:g}" * (config.flow.noise_offset > 0),
        *_describe_objective(plan),
        f"{method.product.name:<9} {method.title()}: {parameters:,} parameters, "
        f"{method.exported_bytes * parameters / 1e6:.1f} MB, in {modules} module{'s' * (modules != 1)}",
        *(f"          {_describe_coverage(row)}" for row in plan.coverage),
        *describe_hoist(config),
        *(["compile   blocks: the first step of each image size takes a minute or more"] if compiled else []),
        f"run       {plan.run}",
    ]


def _describe_data(plan: Plan) -> list[str]:
    sizes = describe_sizes(plan.config.data)
    if plan.shards:
        return [f"data      {describe_stream(plan.config.data, len(plan.shards))}, {sizes}"]
    return [f"data      {_images(len(plan.records))}, {sizes}, {plan.images_per_epoch} per epoch"]


def _describe_steps(plan: Plan, world: int) -> list[str]:
    train = plan.config.train
    return [f"steps     {train.total_steps} x {train.gradient_accumulation * train.batch_size * world} images"]


def _describe_length(plan: Plan, cut: Sequence[Size], world: int) -> list[str]:
    """Return lines such as `steps     9 x 4 images, 3 epochs: each image is seen 2 to 4 times`.

    `cut` has each record's bucket, in the order of `plan.sized`.
    """
    train = plan.config.train
    together = train.batch_size * world
    batch = train.gradient_accumulation * together
    epochs = round(train.total_steps * batch / plan.images_per_epoch, 2)
    batches = train.total_steps * train.gradient_accumulation
    of_images = _times_of_images(plan, cut, batches, together)
    fewest, most = min(of_images.values()), max(of_images.values())
    seen = ("once" if most == 1 else f"{most} times") if fewest == most else f"{fewest} to {most} times"
    lines = [
        f"steps     {train.total_steps} x {batch} image{'s' * (batch > 1)}, {epochs:.10g} epoch{'s' * (epochs != 1)}: "
        f"each image is seen {seen}"
    ]
    if fewest == 0 and epochs >= 1:
        lines.append(
            f"warning: some images are never seen: their bucket does not fill a batch of {together} in so few steps; "
            "train longer, lower train.batch_size or set data.buckets=false"
        )
    return lines


def _times_of_images(plan: Plan, cut: Sequence[Size], batches: int, together: int) -> Counter[int]:
    """Return how often each image is seen, in all its sizes, by the `id` of its reference."""
    numbers, shares = concept_numbers(plan.config.data), shares_of_concepts(plan.config.data)
    order = list(zip(plan.sized, cut, strict=True))
    if shares is not None:
        order.sort(key=lambda one: numbers[one[0].source])  # as in `Batches`, and so are the buckets
    concepts: dict[Size, list[int]] = {size: [] for size in sorted(set(cut))}
    for record, size in order:
        concepts[size] += [numbers[record.source]] * record.repeats
    parts = {size: len(of) for size, of in concepts.items()} if shares is None else balanced(concepts, shares)
    buckets = [(size_name(size), parts[size]) for size in concepts]
    times = dict(zip(concepts, map(iter, times_seen(plan.config.seed, batches, buckets, together)), strict=True))
    seen: Counter[int] = Counter()
    for record, size in order:
        seen[id(record.image)] += sum(islice(times[size], record.repeats))
    return seen


def _describe_concepts(plan: Plan) -> list[str]:
    """Return a line such as `concepts  dog: 5 images, sks; toy: 20 images, zwx; drawn equally often`."""
    data = plan.config.data
    if not are_told_apart(data) and data.balance is None:
        return []
    described = []
    for concept in concepts_of(data):
        images = _images(sum(record.source in concept.sources for record in plan.records))
        described.append(f"{concept.name}: {', '.join([images, *concept.triggers])}")
    shares = shares_of_concepts(data) or []
    in_shares = " : ".join(f"{float(share):g}" for share in shares)
    drawn = "drawn equally often" if len(set(shares)) == 1 else f"drawn {in_shares}"
    return [f"concepts  {'; '.join([*described, drawn] if shares else described)}"]


def _describe_sigmas(plan: Plan) -> list[str]:
    """Return a line about the sigmas, or one for each size with a shift of its own."""
    flow, shifts = plan.config.flow, list(dict.fromkeys(plan.shifts.values()))
    if len(shifts) == 1:
        return [f"sigma     {describe_sigmas(flow, plan.shift)}"]
    sides = zip(plan.config.data.sides, shifts, strict=True)
    return [f"sigma     {side} px: {describe_sigmas(flow, shift)}" for side, shift in sides]


def _describe_tags(plan: Plan) -> list[str]:
    if not plan.config.data.export_tags:
        return []
    return [f"note: {describe_tags(tag_frequency(record.caption for record in plan.records))}"]


def _describe_priors(plan: Plan) -> list[str]:
    predicted = [
        f"prior     the base's own prediction, {describe_prompts(prior.prompts)}"
        for prior in plan.config.data.own_predictions.values()
    ]
    return [*(prior.describe() for prior in plan.priors), *predicted]


def _describe_coverage(row: CoverageRow) -> str:
    return f"{row.module:<21} {row.trained:>3} of {row.present} blocks" if row.in_blocks else row.module


def _describe_base(plan: Plan) -> list[str]:
    """Return the lines on separate text encoder files, T5 lengths and random weights, and warnings about the base."""
    files = plan.base.encoder_files
    used = [f"{name} from {files[name].name}" for name in plan.method.cached_encoders if name in files]
    lines = [f"encoders  {', '.join(used)}"] if used else []
    if plan.base.ignores_projection:
        lines.append("          CLIP-L's text_projection is not used: Stable Diffusion 3 takes the unprojected vector")
    if plan.base.random:
        shape = plan.base.random.config
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        lines.append(f"weights   random, seed {plan.base.random.seed}: {shape['num_layers']} blocks, {width} wide")
    model = plan.config.model
    if len(model.t5_lengths) > 1:
        lines.append(f"T5        {', '.join(map(str, model.t5_lengths))} tokens, one length a step")
    elif model.extra_t5_lengths and not model.t5:
        lines.append("note: model.extra_t5_lengths has no effect with model.t5=false")
    length, contract = model.max_sequence_length, plan.base.contract
    known = contract.get("t5_lengths") or [contract.get("max_sequence_length", length)]
    if length not in known and not plan.base.random:
        lines.append(
            f"warning: {plan.base.label} was trained on {', '.join(map(str, known))} T5 tokens and "
            f"model.max_sequence_length is {length}; set it to {known[0]}"
        )
    if plan.base.distilled:
        unfit = plan.config.preview.guidance > 1
        lines.append(
            f"warning: {plan.base.label} is a Turbo model: it is distilled (for guidance 1 and 4 steps) and trains "
            "badly; train on the model without Turbo, the adapter then works on both"
            + "; to train this one, set preview.guidance=1 and preview.steps=4, which `infer` follows"
            * unfit
        )
    return lines


def _describe_objective(plan: Plan) -> list[str]:
    """Return notes and warnings about settings of objective and optimizer with surprising effects."""
    flow, side, base = plan.config.flow, plan.config.data.side, plan.base
    lines = describe_lr(plan.config)
    if flow.noise_offset:
        share = 100 * spread_without_offset(flow.noise_offset, side)
        lines.append(
            f"warning: flow.noise_offset: sd3tune's pictures start from the same offset; other tools start without it "
            f"and then draw {share:.2g} % of the spread of brightness at {side} px; 0 turns it off"
        )
    if base.noise_offset not in (0, flow.noise_offset):
        lines.append(
            f"warning: {base.label} was trained with noise offset {base.noise_offset:g} and flow.noise_offset is "
            f"{flow.noise_offset:g}; set it to {base.noise_offset:g}"
        )
    if began_in_llm_int8(plan):
        lines.append(
            "warning: an earlier sd3tune began this run with layers in LLM.int8(), which also rounded activations; it "
            "goes on with layers that round weights only, so its loss may change by a little"
        )
    if drops_kept_captions(plan):
        lines.append(
            "warning: an earlier sd3tune began this run; as then, dropout of captions and encoders also acts on the "
            "samples that keep the base's prediction, so one input has two targets; a new run is better"
        )
    if not flow.loss.estimates_mean:
        delta = f" (delta {flow.loss.delta:g})" if hasattr(flow.loss, "delta") else ""
        lines.append(
            f"note: flow.loss.kind {flow.loss.kind}{delta} does not estimate a mean, so rare kinds of picture are "
            "drawn less often than they occur; flow.loss.kind=mse draws each as often"
        )
    return lines


def describe_lr(config: Config) -> list[str]:
    """Return a note if the learning rate is the method's default instead of the optimizer's."""
    method, lr = config.method, config.optimizer.lr
    return [f"note: optimizer.lr is {lr:g}, the default of method.kind {method.kind}"] if lr == method.usual_lr else []


def describe_hoist(config: Config) -> list[str]:
    """Return a note if trained text encoders turn `train.hoist` off."""
    if not (config.train.hoist and config.method.trains_text):
        return []
    return [
        "note: train.hoist has no effect: trained text encoders change the pooled text, so adaLN is not computed ahead"
    ]


def describe_precision(config: Config, dtype: torch.dtype) -> str:
    """Return the base's precision in words: `bf16`, or `bf16, its blocks in nf4`."""
    form = config.model.quantize
    return dtype_name(dtype) + ("" if form == "none" else f", its blocks in {form}")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"

"""`sd3tune train`: check, encode, free, train, export, and say whether it learned anything."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from sd3tune import reporting
from sd3tune.config import Config, dump_config
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.errors import Interrupted, RunError
from sd3tune.files.atomic import kept_in_place, write_json, write_text
from sd3tune.forecast.fitting import fitted_plan
from sd3tune.forecast.memory import describe_memory
from sd3tune.model.load.components import vae_config
from sd3tune.publish.files import CARD
from sd3tune.run.callbacks.uploads import upload_finished
from sd3tune.run.callbacks.wiring import Watching
from sd3tune.run.card import write_card
from sd3tune.run.contract import (
    check_finished,
    check_identity,
    drops_kept_captions,
    make_contract,
    run_identity,
    start_facts,
)
from sd3tune.run.describe import describe
from sd3tune.run.drawing import NEGATIVE_PROMPT
from sd3tune.run.encoding import Encoded, check_pictures, encode
from sd3tune.run.folder import (
    check_start,
    clear,
    describe_run,
    is_finished,
    locked,
    naming_what_is_saved,
    what_is_saved,
)
from sd3tune.run.knobs import encoding_knob, loading_knob, training_knob
from sd3tune.run.optimizer import with_working_optimizer
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.run.report import closing_report, describe_learning, describe_next, describe_product, describe_speed
from sd3tune.run.setup import load_base, make_trainable
from sd3tune.run.upload import prepare_upload, push_command
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.environment import sharding_ignored
from sd3tune.runtime.launch import errors_to_the_launcher
from sd3tune.runtime.out_of_memory import explain_oom
from sd3tune.runtime.processes import ALONE, Processes, closing_process_group, processes_of
from sd3tune.runtime.signals import StopSignals
from sd3tune.training.ahead import with_modulations
from sd3tune.training.batches import Batches, Dropout, LatentScaling
from sd3tune.training.checkpoint import restore
from sd3tune.training.loop import Callback, exported_weights, train
from sd3tune.training.metrics import Metrics
from sd3tune.training.objective import make_objective, shift_at, sigma_of_u
from sd3tune.training.optim import FlatMaster, LossScale
from sd3tune.training.optimizers import make_optimizer
from sd3tune.training.step import TrainState, predict_velocity

OBSERVED_STEPS = 8
"""Batches that a start which depends on the data sees."""


def run_training(
    config: Config,
    notes: Sequence[str] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train as the command line does: Ctrl-C and SIGTERM finish the step in hand, and a launcher learns of problems.

    Raises UserError; what was saved before an error stays.
    """
    with closing_process_group(), errors_to_the_launcher(), StopSignals() as signals:
        carry_out_run(config, notes, resume=resume, dry_run=dry_run, callbacks=callbacks, signals=signals)


def carry_out_run(
    config: Config,
    notes: Sequence[str] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Callback] = (),
    signals: StopSignals | None = None,
) -> None:
    """Train as `config` says, and install no signal handler: `signals` has those that there are.

    Without `signals`, a KeyboardInterrupt saves the last whole step. Raises UserError.
    """
    processes = processes_of(accelerator := make_accelerator(config.train.gradient_accumulation))

    def say(line: str) -> None:
        if processes.is_main:
            reporting.say(line)

    for note in (*notes, *sharding_ignored(os.environ)):
        say(f"note: {note}")
    with accelerator.main_process_first():  # a tiny base is built then: transformers writes on rank 0 alone
        plan = make_plan(config, accelerator.device, resume, processes.world)
    plan, chosen = fitted_plan(plan, processes)
    if resume and plan.start is None:
        say(f"nothing to resume in {plan.run}: starting afresh")
    if plan.start is not None and is_finished(plan.run, plan.method.product, plan.config.train.total_steps):
        check_finished(plan, processes.world)
        if processes.is_main:
            reporting.result(f"{plan.run}: already finished; nothing to do", **result_values(plan))
        if plan.config.hub.push != "never":
            say(f"to upload it: {push_command(plan.run)}")
        return
    plan = with_working_optimizer(plan, processes, say)
    for line in [*chosen, *describe(plan, processes.world)]:
        say(line)
    if dry_run:
        for warning in check_pictures(plan, progress=processes.is_main):
            say(f"warning: {warning}")
        say(describe_memory(plan))
        say("dry run: nothing was encoded, trained or written")
        return
    if processes.is_main:
        prepare_upload(plan)
    try:
        _train(plan, processes, say, callbacks, signals)
    except KeyboardInterrupt:
        raise Interrupted(what_is_saved(plan.run)) from None


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a run, ready to take its first step."""

    plan: Plan
    processes: Processes
    encoded: Encoded
    transformer: SD3Transformer2DModel
    state: TrainState
    batches: Batches
    identity: Mapping[str, Any]
    contract: Mapping[str, Any]
    watching: Watching
    described: dict[str, Any]
    """What `run.json` says so far; only on the main rank."""
    from_step: int


def _train(
    plan: Plan,
    processes: Processes,
    say: Callable[[str], None],
    callbacks: Sequence[Callback],
    signals: StopSignals | None,
) -> None:
    config, clock = plan.config, [time.monotonic()]
    with explain_oom("encoding", lambda: encoding_knob(config)):
        encoded = encode(plan, processes, say)
    clock.append(time.monotonic())
    with explain_oom("loading the transformer", lambda: loading_knob(config)):
        transformer = load_base(plan)  # before the folder: it may be damaged
    with ExitStack() as stack:
        attempt = _begin(plan, processes, encoded, transformer, say, stack)
        clock.append(time.monotonic())
        watched_before = sum(attempt.watching.seconds.values())  # trackers have been opened
        deferred = signals.deferred() if signals else nullcontext()
        with deferred, explain_oom("training", lambda: training_knob(config, plan.method)):
            metrics = train(
                config,
                plan.run,
                attempt.state,
                transformer,
                plan.method,
                with_modulations(attempt.batches, transformer, plan.method),
                make_objective(config.flow, plan.shift),
                processes,
                attempt.identity,
                attempt.contract,
                [*attempt.watching.callbacks, *callbacks],
                lambda: signals is not None and signals.asked,
                attempt.watching.trackers.line,
                save_when_interrupted=signals is None,
            )
        clock.append(time.monotonic())
        encode_s, load_s, train_s = (end - start for start, end in itertools.pairwise(clock))
        if processes.is_main:
            watched = attempt.watching.seconds
            train_s -= sum(watched.values()) - watched_before
            _finish(attempt, metrics, {"encode_s": encode_s, "load_s": load_s, "train_s": train_s, **watched}, say)
        processes.wait()
        if processes.is_main:  # after the others were let go: it may take longer than they would wait
            upload_finished(plan, attempt.watching.uploads, say)


def _begin(
    plan: Plan,
    processes: Processes,
    encoded: Encoded,
    transformer: SD3Transformer2DModel,
    say: Callable[[str], None],
    stack: ExitStack,
) -> _Attempt:
    """Take hold of the run folder, and bring model and optimizer to the step to go on from."""
    if processes.is_main:
        stack.enter_context(locked(plan.run))
        check_start(plan.run, plan.start)
    identity = run_identity(plan, encoded, processes.world)
    if plan.start is not None:
        check_identity(plan, identity, encoded)
        say(f"resuming from {plan.start.name}")
    processes.wait()

    state = _starting_state(plan, encoded, transformer, processes)
    described: dict[str, Any] = {}
    if processes.is_main:
        clear(plan.run, plan.start)
        stack.enter_context(naming_what_is_saved(plan.run))
        stack.enter_context(kept_in_place(plan.run))
        described = describe_run(plan.run, start_facts(plan, processes.world), state.step)
        write_text(plan.run / "config.yaml", dump_config(plan.config))
    contract = make_contract(plan)
    batches = make_batches(plan, encoded, processes)
    stack.callback(batches.close)
    watching = stack.enter_context(Watching(plan, encoded, processes, contract, state.step))
    return _Attempt(
        plan,
        processes,
        encoded,
        transformer,
        state,
        batches,
        identity,
        contract,
        watching,
        described,
        from_step=state.step,
    )


def _finish(attempt: _Attempt, metrics: Metrics, seconds: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Write the result, the card and, last, `run.json`, whose report says that all is done; say what came of it."""
    plan, state, watching = attempt.plan, attempt.state, attempt.watching
    _export(plan, state, attempt.contract)
    weights = exported_weights(state)
    attempt.batches.use_one_length()
    report = closing_report(plan, attempt.transformer, weights, attempt.batches) | watching.report()
    described = {
        **attempt.described,
        "timings": {name: round(value, 3) for name, value in seconds.items()},
        "skipped_steps": list(metrics.skipped),
        "warnings": [*attempt.encoded.warnings, *watching.warnings],
        "report": report,
    }
    if not write_card(plan.run, plan.config, attempt.contract, described):
        say(f"note: {plan.run / CARD} is kept, as somebody wrote or changed it; no model card was written")
    write_json(plan.run / RUN_FILE, described)
    steps = plan.config.train.total_steps - attempt.from_step
    reporting.say("", *describe_speed(metrics.skipped, steps, seconds["train_s"]))
    reporting.say(*watching.summary(), *describe_learning(plan, report))
    reporting.result(describe_product(plan, report), **result_values(plan))
    reporting.say(*describe_next(plan))
    if not report["changes_output"]:
        way_out = f"raise optimizer.lr or train.steps, or check {plan.method.remedy}"
        raise RunError(f"{plan.run}: the {plan.method.product.name} changes nothing: {way_out}")


def result_values(plan: Plan) -> dict[str, Any]:
    """Return what a program would want to know of a finished run."""
    product = plan.run / plan.method.product.name
    return {"product": product, "run": plan.run, "steps": plan.config.train.total_steps}


def _starting_state(
    plan: Plan, encoded: Encoded, transformer: SD3Transformer2DModel, processes: Processes
) -> TrainState:
    """Make the model trainable, and begin at the checkpoint to resume from, or at step 0."""
    config = plan.config
    parameters = make_trainable(config, plan.method, transformer)
    if plan.start is None:
        plan.method.initialize_from_data(
            transformer, lambda: observe(plan, encoded, transformer), processes.reduce_mean
        )
    state = make_state(config, FlatMaster(parameters, plan.dtype), plan.dtype)
    if plan.start is not None:
        restore(plan.start, state)
    return state


def _export(plan: Plan, state: TrainState, contract: Mapping[str, Any]) -> None:
    """What was trained; with an EMA, the average, and beside it the weights as trained."""
    product = plan.method.product
    plan.method.export(plan.run / product.name, exported_weights(state), contract)
    if state.ema is not None:
        raw = state.master.named(state.master.master)
        plan.method.export(plan.run / product.raw, raw, {**contract, "weights": "raw"})


def make_state(config: Config, master: FlatMaster, dtype: torch.dtype) -> TrainState:
    """The state before the first step."""
    optimizer = make_optimizer(config.optimizer, master.master)
    return TrainState(
        step=0,
        master=master,
        optimizer=optimizer,
        ema=master.master.detach().clone() if config.ema is not None else None,
        loss_scale=LossScale(master.master.device, enabled=dtype is torch.float16),
    )


def observe(plan: Plan, encoded: Encoded, transformer: SD3Transformer2DModel) -> None:
    """Run the first batches of a single process through the model: the same data on every rank."""
    batches = make_batches(plan, encoded, ALONE)
    for step in range(OBSERVED_STEPS):
        predict_velocity(transformer, plan.method, batches.fetch(step, 0))
    batches.close()


def make_batches(plan: Plan, encoded: Encoded, processes: Processes) -> Batches:
    vae, flow = vae_config(plan.base), plan.config.flow
    sigmas_at = functools.lru_cache(lambda shift: sigma_of_u(flow, shift))
    return Batches(
        encoded.store,
        encoded.examples,
        seed=plan.config.seed,
        batch_size=plan.config.train.batch_size,
        accumulation=plan.config.train.gradient_accumulation,
        rank=processes.rank,
        world=processes.world,
        device=plan.device,
        scaling=LatentScaling(vae["scaling_factor"], vae["shift_factor"]),
        sigma_of_u=lambda u, pixels: sigmas_at(shift_at(flow, plan.model_shift, pixels))(u),
        noise_offset=flow.noise_offset,
        dropout=Dropout(
            plan.config.data.caption_dropout,
            plan.config.data.encoder_dropout,
            {encoder: keys[NEGATIVE_PROMPT] for encoder, keys in encoded.captions.items() if NEGATIVE_PROMPT in keys},
            kept=drops_kept_captions(plan),
        ),
        t5_lengths=encoded.t5_lengths,
    )

"""`sd3tune train`: check, encode, free, train, export, and report the result."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from sd3tune import reporting
from sd3tune.config import Config, dump_config
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.data.headers import Headers
from sd3tune.errors import Interrupted, RunError
from sd3tune.files.atomic import kept_in_place, write_json, write_text
from sd3tune.forecast.fitting import fitted_plan
from sd3tune.forecast.memory import describe_memory
from sd3tune.model.compute.compiled import explain_compile_errors
from sd3tune.run.batches import make_batches
from sd3tune.run.callbacks.base import RunCallback
from sd3tune.run.callbacks.uploads import Uploads, upload_finished
from sd3tune.run.callbacks.wiring import RunCallbacks
from sd3tune.run.card import write_card
from sd3tune.run.contract import (
    check_finished,
    check_identity,
    make_contract,
    run_identity,
    start_facts,
)
from sd3tune.run.describe import describe
from sd3tune.run.encoding import Encoded, check_pictures, encode
from sd3tune.run.folder import (
    check_still_newest,
    clear,
    describe_run,
    describe_stopped,
    explain_write_errors,
    is_finished,
    locked,
    recording_end,
)
from sd3tune.run.knobs import encoding_knob, loading_knob, training_knob
from sd3tune.run.listing import remember_run
from sd3tune.run.machines import check_same_data, check_same_start, found_by_main, resume_everywhere
from sd3tune.run.optimizer_fallback import with_working_optimizer
from sd3tune.run.places import store_folder
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.run.report import closing_report, describe_learning, describe_next, describe_product, describe_speed
from sd3tune.run.setup import load_base
from sd3tune.run.state import starting_state
from sd3tune.run.upload import prepare_upload, push_command
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.environment import sharding_ignored
from sd3tune.runtime.launch import report_errors_to_launcher
from sd3tune.runtime.out_of_memory import explain_oom
from sd3tune.runtime.processes import Processes, closing_process_group, explain_timeout, processes_of
from sd3tune.runtime.signals import StopSignals, stop_with_parent
from sd3tune.training.ahead import with_modulations
from sd3tune.training.batches import Batches
from sd3tune.training.checkpoint import read_state
from sd3tune.training.loop import Callback, export_weights, exported_weights, train
from sd3tune.training.metrics import Metrics
from sd3tune.training.objective import make_objective
from sd3tune.training.step import TrainState


def run_training(
    config: Config,
    notes: Sequence[str] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train as the command line does: finish the current step on Ctrl-C or SIGTERM, and report errors to a launcher.

    Raises UserError; files saved before an error are kept.
    """
    explained = explain_timeout(config.train.process_timeout)
    with closing_process_group(), report_errors_to_launcher(), explained, StopSignals() as signals:
        stop_with_parent()
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
    """Train without installing signal handlers; `signals` holds handlers that the caller has installed.

    Without `signals`, a KeyboardInterrupt saves the last whole step. Raises UserError.
    """
    sharding = config.train.sharding
    accelerator = make_accelerator(config.train.gradient_accumulation, config.train.process_timeout, sharding)
    processes = processes_of(accelerator, lockstep=sharding != "none")

    def say(line: str) -> None:
        if processes.is_main:
            reporting.say(line)

    for note in (*notes, *sharding_ignored(os.environ, sharding, processes.world)):
        say(f"note: {note}")
    if not dry_run:
        resume = resume_everywhere(Path(str(config.output_dir)), resume, processes, accelerator.device)
    with accelerator.main_process_first():  # it may build a tiny base, and transformers writes only on rank 0
        plan = make_plan(config, accelerator.device, resume, processes.world)
    check_same_start(plan.start, processes, accelerator.device)
    plan, chosen = fitted_plan(plan, processes)
    if resume and plan.start is None:
        say(f"nothing to resume in {plan.run}: starting afresh")
    length = plan.config.train.total_steps
    if plan.start is not None and found_by_main(
        is_finished(plan.run, plan.method.product, length, plan.config.patience), processes, plan.device
    ):
        check_finished(plan, processes.world)
        if processes.is_main:
            step = int(read_state(plan.start)["step"])
            early = f", stopped early at step {step}" if step < length else ""
            reporting.result(f"{plan.run}: already finished{early}; nothing to do", **result_values(plan, step))
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
        store = store_folder(config)
        but = f", but the headers of images in {store}, for the next time" if Headers.are_in(store) else ""
        say(f"dry run: nothing was encoded, trained or written{but}")
        return
    if processes.is_main:
        prepare_upload(plan)
    try:
        _train(plan, processes, say, callbacks, signals)
    except KeyboardInterrupt:
        raise Interrupted(describe_stopped(plan.run)) from None


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a run, ready for its first step."""

    plan: Plan
    processes: Processes
    encoded: Encoded
    transformer: SD3Transformer2DModel
    state: TrainState
    batches: Batches
    identity: Mapping[str, Any]
    contract: Mapping[str, Any]
    watching: RunCallbacks
    described: dict[str, Any]
    """Contents of `run.json` so far; empty except on the main rank."""
    from_step: int


def _train(
    plan: Plan,
    processes: Processes,
    say: Callable[[str], None],
    callbacks: Sequence[Callback],
    signals: StopSignals | None,
) -> None:
    config, clock, blocks = plan.config, [time.monotonic()], plan.base.config("transformer")["num_layers"]
    with explain_oom("encoding", lambda: encoding_knob(config)):
        encoded = encode(plan, processes, say)
    clock.append(time.monotonic())
    with explain_oom("loading the transformer", lambda: loading_knob(config, blocks)):
        # before the run folder changes, as loading fails on a damaged file; it is divided on its way to the device
        transformer = load_base(plan, torch.device("cpu") if processes.lockstep else None)
    with ExitStack() as stack:
        attempt = _begin(plan, processes, encoded, transformer, say, stack)
        clock.append(time.monotonic())
        watched_before = sum(attempt.watching.seconds.values())  # opening the trackers
        deferred = signals.deferred() if signals else nullcontext()
        explained = explain_oom("training", lambda: training_knob(config, plan.method, blocks))
        with deferred, explained, explain_compile_errors():
            metrics = train(
                config=config,
                run=plan.run,
                state=attempt.state,
                transformer=transformer,
                method=plan.method,
                batches=with_modulations(attempt.batches, transformer, plan.method),
                objective=make_objective(config.flow, plan.shift, plan.shifts),
                processes=processes,
                identity=attempt.identity,
                contract=attempt.contract,
                callbacks=[*attempt.watching.callbacks, *callbacks],
                stop_requested=lambda: signals is not None and signals.asked,
                ended=attempt.watching.ended,
                sink=attempt.watching.trackers.line,
                save_when_interrupted=signals is None,
            )
        clock.append(time.monotonic())
        encode_s, load_s, train_s = (end - start for start, end in itertools.pairwise(clock))
        if processes.is_main or processes.lockstep:
            watched = attempt.watching.seconds
            train_s -= sum(watched.values()) - watched_before
            _finish(attempt, metrics, {"encode_s": encode_s, "load_s": load_s, "train_s": train_s, **watched}, say)
        processes.wait()
        if processes.is_main:  # after the other ranks are released, as it may exceed their timeout
            upload_finished(plan, attempt.watching.find(Uploads), say)


def _begin(
    plan: Plan,
    processes: Processes,
    encoded: Encoded,
    transformer: SD3Transformer2DModel,
    say: Callable[[str], None],
    stack: ExitStack,
) -> _Attempt:
    """Lock and prepare the run folder, and restore model and optimizer at the starting step."""
    if processes.is_main:
        stack.enter_context(locked(plan.run))
        check_still_newest(plan.run, plan.start)
    identity = run_identity(plan, encoded, processes.world)
    check_same_data(identity, processes, plan.device)
    if plan.start is not None:
        check_identity(plan, identity, encoded)
        say(f"resuming from {plan.start.name}")
    processes.wait()

    planned = plan.method.title()
    state = starting_state(plan, encoded, transformer, processes)
    if plan.method.title() != planned:
        say(f"{plan.method.product.name:<9} {plan.method.title()}")
    described: dict[str, Any] = {}
    if processes.is_main:
        clear(plan.run, plan.start)
        stack.enter_context(explain_write_errors(plan.run))
        stack.enter_context(kept_in_place(plan.run))
        described = describe_run(plan.run, start_facts(plan, processes.world), state.step)
        stack.enter_context(recording_end(plan.run))
        remember_run(plan.run)
        write_text(plan.run / "config.yaml", dump_config(plan.config))
    contract = make_contract(plan)
    batches = make_batches(plan, encoded, processes)
    stack.callback(batches.close)
    watching = stack.enter_context(RunCallbacks(plan, encoded, processes, contract, state.step, _measuring(plan)))
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


def _measuring(plan: Plan) -> Sequence[type[RunCallback]]:
    """Return the callbacks of rooms above the run's: measurement of pictures, if configured."""
    if plan.config.eval is None:
        return ()
    from sd3tune.evaluation.during_training import Evaluations

    return (Evaluations,)


def _finish(attempt: _Attempt, metrics: Metrics, seconds: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Write the result and the card, then `run.json`, whose report marks the run as finished; print a summary.

    Other processes than the main one only take part in what needs all.
    """
    plan, state, watching, processes = attempt.plan, attempt.state, attempt.watching, attempt.processes
    _export(plan, state, attempt.contract, processes)
    weights = exported_weights(state)
    attempt.batches.use_one_length()
    measured = closing_report(plan, attempt.transformer, weights, attempt.batches, processes)
    if not processes.is_main:
        return
    report = measured | watching.report()
    described = {
        **attempt.described,
        "timings": {name: round(value, 3) for name, value in seconds.items()},
        "skipped_steps": list(metrics.skipped),
        "warnings": [*attempt.encoded.warnings, *watching.warnings],
        **({"stopped_early": {"step": state.step, "patience": plan.config.patience}} if watching.ended() else {}),
        "report": report,
    }
    if without_card := write_card(plan.run, plan.config, attempt.contract, described):
        say(without_card)
    write_json(plan.run / RUN_FILE, described)
    steps = state.step - attempt.from_step
    reporting.say("", *describe_speed(metrics.skipped, steps, seconds["train_s"]))
    reporting.say(*watching.summary(), *describe_learning(plan, report))
    reporting.result(describe_product(plan, report), **result_values(plan, state.step))
    reporting.say(*describe_next(plan))
    if not report["changes_output"]:
        way_out = f"raise optimizer.lr or train.steps, or check {plan.method.remedy}"
        raise RunError(f"{plan.run}: the {plan.method.product.name} changes nothing: {way_out}")


def result_values(plan: Plan, step: int) -> dict[str, Any]:
    """Return the values of a run that finished at `step`, for programs that read the JSON output."""
    product = plan.run / plan.method.product.name
    return {"product": product, "run": plan.run, "steps": step}


def _export(plan: Plan, state: TrainState, contract: Mapping[str, Any], processes: Processes) -> None:
    """Export the trained weights; with an EMA, export the average, and the raw weights separately."""
    product = plan.method.product
    export_weights(plan.method, plan.run / product.name, exported_weights(state), contract, processes)
    if state.ema is not None:
        raw = state.master.named(state.result())
        export_weights(plan.method, plan.run / product.raw, raw, {**contract, "weights": "raw"}, processes)

"""The trials of a sweep in Optuna's storage: who works on which, how they ended, and their values.

A trial belongs to the process that holds its lock file. The system releases the lock of a process that dies, so a
trial that still counts as running but is not locked is taken up again, under its number and with its values.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sd3tune.errors import ConfigError, RunError
from sd3tune.files.atomic import write_text
from sd3tune.sweep.settings import SweepFile
from sd3tune.sweep.space import distributions, make_sampler, override

State = Literal["complete", "pruned", "failed", "running"]
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_LOCKS, _CLAIM, _PLACE, _DATABASE = "locks", ".claim", ".place", "sweep.db"
_SETTINGS, _OF_PLACE, _STEP, _REASON = "sd3tune", "place", "step", "reason"
"""Keys of Optuna's user attributes."""
_SECONDS_TO_REGISTER = 60.0
"""A trial that has not named its place after this time belongs to nobody."""


@dataclass(frozen=True)
class Row:
    """A trial, as the tables show it."""

    number: int
    state: State
    overrides: tuple[str, ...]
    """KEY=VALUE of each axis."""
    value: float | None
    """The objective of a complete trial."""
    step: int | None
    """The step at which it was measured, or at which the trial was pruned."""
    reason: str | None
    """Why it failed, or was pruned."""

    @property
    def name(self) -> str:
        return trial_name(self.number)


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on."""

    trial: Trial
    overrides: tuple[str, ...]
    lock: FileLock

    @property
    def number(self) -> int:
        return int(self.trial.number)

    @property
    def name(self) -> str:
        return trial_name(self.number)


def trial_name(number: int) -> str:
    """Return the name of a trial and of its folder."""
    return f"trial-{number:04d}"


class Trials:
    """The trials of a sweep; several processes, also on several machines, may have them open at once."""

    def __init__(self, file: SweepFile, identity: Mapping[str, Any], *, join: bool = False) -> None:
        """Open the storage, or make it unless `join`. Raises ConfigError, also if `identity` is not that of the sweep.

        `identity` is whatever decides the result of a trial; keys are those of the file.
        """
        self.file, self.count, self.folder = file, file.settings.count, file.folder
        self._distributions = distributions(file.settings)
        self.study = self._open(join)
        self.place = self._own_place()
        began: dict[str, Any] | None = self.study.user_attrs.get(_SETTINGS)
        if began is None:
            self.study.set_user_attr(_SETTINGS, dict(identity))
            return
        changed = [key for key in identity if identity[key] != began.get(key)]
        if changed:
            raise ConfigError(
                *(
                    f"{file.at(key)}: differs from what the sweep began with; change it back, or choose another "
                    "output_dir" + " and name" * (file.settings.storage is not None)
                    for key in changed
                )
            )

    def rows(self) -> list[Row]:
        """Return the trials that have begun, by number."""
        return [self._row(trial) for trial in self._known()]

    def claim(self) -> Claim | None:
        """Take up a trial that nobody works on, or begin the next one; None if there is none.

        Raises RunError if the next one's folder exists already, as of a sweep whose storage was removed.
        """
        with FileLock(self.folder / _LOCKS / _CLAIM):
            known = self._known()
            for frozen in known:
                if frozen.state is TrialState.RUNNING and self._is_of_this_place(frozen):
                    lock = self._lock_of(frozen.number)
                    if lock is not None:
                        return self._claimed(Trial(self.study, frozen._trial_id), lock)
            if len(known) >= self.count:
                return None
            next_folder = self.folder / trial_name(len(known))
            if next_folder.exists():
                raise RunError(
                    f"{next_folder}: is there already, but the sweep's storage has no such trial; move it away, or "
                    "choose another output_dir"
                )
            trial = self.study.ask()
            if trial.number >= self.count:
                trial.set_user_attr(_REASON, "another machine had begun the last trial")
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            lock = self._lock_of(trial.number)
            return None if lock is None else self._claimed(trial, lock)

    def busy_here(self) -> list[str]:
        """Return the names of the trials that processes of this place work on."""
        running = [one for one in self._known() if one.state is TrialState.RUNNING and self._is_of_this_place(one)]
        return [trial_name(one.number) for one in running]

    def complete(self, claim: Claim, value: float, step: int) -> None:
        claim.trial.set_user_attr(_STEP, step)
        self.study.tell(claim.trial, value)
        claim.lock.release()

    def prune(self, claim: Claim, step: int | None, reason: str) -> None:
        claim.trial.set_user_attr(_STEP, step)
        claim.trial.set_user_attr(_REASON, reason)
        self.study.tell(claim.trial, state=TrialState.PRUNED)
        claim.lock.release()

    def fail(self, claim: Claim, reason: str) -> None:
        claim.trial.set_user_attr(_REASON, reason)
        self.study.tell(claim.trial, state=TrialState.FAIL)
        claim.lock.release()

    def report(self, claim: Claim, measured: Sequence[tuple[int, float]]) -> bool:
        """Add the (step, value) of a trial that are not known yet. Return whether it should be pruned."""
        known = self._known()[claim.number].intermediate_values
        for step, value in measured:
            if step not in known:
                claim.trial.report(value, step)
        return bool(measured) and claim.trial.should_prune()

    def _open(self, join: bool) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sweep = self.file.settings
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if sweep.pruning is not None:
            pruner = optuna.pruners.MedianPruner(sweep.pruning.after_trials, sweep.pruning.after_steps)
        url, options = sweep.storage, None
        if url is None:
            if join and not (self.folder / _DATABASE).exists():
                raise ConfigError(f"--join: {self.folder} holds no sweep yet; start it first, without --join")
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
            url, options = f"sqlite:///{self.folder / _DATABASE}", {"connect_args": {"timeout": 60}}
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
            known = sweep.name in optuna.get_all_study_names(storage)
            if join and not known:
                raise ConfigError(f"--join: the storage has no sweep {sweep.name!r}; start it first, without --join")
            return optuna.create_study(
                storage=storage,
                study_name=sweep.name,
                sampler=make_sampler(sweep),
                pruner=pruner,
                direction="minimize" if sweep.minimises else "maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, ValueError) as error:
            reason = " ".join(str(error).split()).split(" (Background on")[0][:300]
            where = f"{self.folder / _DATABASE}" if sweep.storage is None else self.file.at("storage")
            raise ConfigError(f"{where}: the database cannot be used: {reason}; check it, or name another") from None

    def _own_place(self) -> str | None:
        """Return the mark of this folder, which tells its trials from those of other machines; None if all are here."""
        (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        if self.file.settings.storage is None:
            return None
        file = self.folder / _LOCKS / _PLACE
        with FileLock(self.folder / _LOCKS / _CLAIM):
            if not file.exists():
                write_text(file, secrets.token_hex(8))
        return file.read_text("utf-8")

    def _is_of_this_place(self, trial: FrozenTrial) -> bool:
        place = trial.user_attrs.get(_OF_PLACE)
        if self.place is None or place is not None:
            return place == self.place
        return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() > _SECONDS_TO_REGISTER

    def _known(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.number < self.count]

    def _lock_of(self, number: int) -> FileLock | None:
        """Return the lock of a trial, held by this process; None if another one works on the trial."""
        lock = FileLock(self.folder / _LOCKS / f"{trial_name(number)}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _claimed(self, trial: Trial, lock: FileLock) -> Claim:
        if self.place is not None:
            trial.set_user_attr(_OF_PLACE, self.place)
        drawn = {key: trial._suggest(key, distribution) for key, distribution in self._distributions.items()}
        return Claim(trial, tuple(override(key, value) for key, value in drawn.items()), lock)

    def _row(self, trial: FrozenTrial) -> Row:
        state = _STATES.get(trial.state, "running")
        drawn = [override(key, trial.params[key]) for key in self._distributions if key in trial.params]
        return Row(
            number=trial.number,
            state=state,
            overrides=tuple(drawn),
            value=trial.value if state == "complete" else None,
            step=trial.user_attrs.get(_STEP),
            reason=trial.user_attrs.get(_REASON),
        )


def drawn_ahead(file: SweepFile, most: int) -> list[tuple[str, ...]]:
    """Return the overrides of the first trials, drawn without any storage; of TPE, as if none had finished."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=make_sampler(file.settings))
    found = []
    for _ in range(min(most, file.settings.count)):
        trial = study.ask(distributions(file.settings))
        found.append(tuple(override(key, trial.params[key]) for key in file.settings.axes))
        study.tell(trial, state=TrialState.FAIL)
    return found

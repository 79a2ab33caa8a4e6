"""The Optuna side of a search: a study that proposes trials and remembers them."""

import hashlib
import importlib.util
import json
import math
import warnings
from typing import Any

import jax.random as jr
import numpy as np

from ._checks import check_type, shown
from ._custom_types import Key
from ._space import import_optuna, Space


_ATTRIBUTE = "eqx_hpo"  # under which a study and its trials hold what is ours
_SAMPLERS = ("random", "tpe", "gp")


class Study:
    """Holds the trials, both finished and under way.

    - `space`: the space to search.
    - `finished`: the number of trials that have ended, including those of earlier
        calls.
    - `best_loss`, `best`: the validation loss and the number of the best finished
        trial.
    - `is_exhausted`: whether the sampler has nothing more to propose.
    """

    def __init__(
        self,
        space: Space,
        sampler: Any,
        pruner: Any,
        key: Key,
        steps: int,
        storage: Any,
        name: str,
    ):
        self._optuna = import_optuna()
        self._seed = 0 if key is None else int(jr.randint(key, (), 0, 2**31 - 1))
        self.space, self._sampler = space, sampler
        _check_sampler(sampler, self._optuna.samplers.BaseSampler)
        if not isinstance(name, str) or name == "":
            raise ValueError(f"`study_name` must be a string; got {shown(name)}.")
        pruner = None if isinstance(pruner, str) else pruner
        self._study = self._open(storage, name, pruner)
        self._check_settings(steps, name)
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        self._under_way = [x for x in trials if x.state == states.RUNNING]
        self._next = len(trials)
        self.is_exhausted = False
        self.finished = len(self.trials())
        complete = [x for x in trials if x.state == states.COMPLETE]
        best = min(complete, key=lambda x: (x.value, x.number), default=None)
        self.best_loss = math.inf if best is None else best.value
        self.best = None if best is None else best.number

    def _open(self, storage: Any, name: str, pruner: Any) -> Any:
        what = "the URL of a database, such as 'sqlite:///search.db', a storage of "
        what += "`optuna.storages`, or `None`"
        kinds = (str, self._optuna.storages.BaseStorage, type(None))
        check_type("storage", storage, kinds, what)
        logging = self._optuna.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.WARNING)
        try:
            return self._optuna.create_study(
                storage=storage, study_name=name, pruner=pruner, load_if_exists=True
            )
        except Exception as e:
            raise ValueError(f"`storage` cannot be opened by Optuna: {e}") from e
        finally:
            logging.set_verbosity(verbosity)

    def _check_settings(self, steps: int, name: str) -> None:
        """Stores the settings that the trials of a study share, or compares them with
        the stored ones."""
        to_json = self._optuna.distributions.distribution_to_json
        ranges = {x: to_json(y) for x, y in self.space.distributions.items()}
        digest = hashlib.sha256(json.dumps(ranges).encode()).hexdigest()
        settings = {"steps": steps, "key": self._seed, "low` or `high": digest}
        known = self._study.user_attrs.get(_ATTRIBUTE)
        if known is None and len(self._study.get_trials(deepcopy=False)) > 0:
            raise ValueError(
                f"`storage` holds a study {name!r} that `search` has not made. Give "
                "another `study_name`."
            )
        if known is None:
            self._study.set_user_attr(_ATTRIBUTE, settings)
            return
        for argument, value in settings.items():
            if known[argument] != value:
                raise ValueError(
                    f"`storage` holds a study {name!r} that was made with another "
                    f"`{argument}`. Give the same again, or another `study_name`."
                )

    def ask(self, count: int) -> list[Any]:
        """Begins trials. Those that an earlier call left unfinished come first."""
        return [self._ask() for _ in range(count)]

    def _ask(self) -> Any:
        if len(self._under_way) > 0:
            left = self._under_way.pop(0)
            self._study.sampler = self._make_sampler(left.number)
            trial = self._optuna.trial.Trial(self._study, left._trial_id)
            for name, distribution in self.space.distributions.items():
                trial._suggest(name, distribution)
            return trial
        self._study.sampler = self._make_sampler(self._next)
        self._next += 1
        return self._study.ask(self.space.distributions)

    def _make_sampler(self, number: int) -> Any:
        """Makes the sampler anew for each trial. Its draws then depend only on the
        number of the trial and the trials before, whichever call makes the trial."""
        sampler, samplers = self._sampler, self._optuna.samplers
        if not isinstance(sampler, str):
            return sampler
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `constant_liar` was experimental once
            if sampler == "random":
                return samplers.RandomSampler(seed)
            if sampler == "gp":
                return samplers.GPSampler(seed=seed)
            # Trials of the same round keep away from each other.
            return samplers.TPESampler(seed=seed, constant_liar=True)

    def tell(self, trial: Any, loss: float, report: dict[str, Any], done: bool) -> bool:
        """Ends a trial. `report` describes its last state. A trial with a NaN loss has
        failed. Any other one counts as pruned if it is not `done`.

        **Returns:** whether the trial is the best one.
        """
        states = self._optuna.trial.TrialState
        trial.set_user_attr(_ATTRIBUTE, report)
        self.finished += 1
        if math.isnan(loss):
            self._tell(trial, state=states.FAIL)
            return False
        if not done:
            self._tell(trial, state=states.PRUNED)
            return False
        self._tell(trial, loss)
        if loss >= self.best_loss:
            return False
        self.best_loss, self.best = loss, trial.number
        return True

    def _tell(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._study.tell(*args, **kwargs)
        except RuntimeError as e:
            # So ends a grid, outside a loop of Optuna's own. The trial has been told.
            if "`Study.stop`" not in str(e):
                raise
            self.is_exhausted = True

    def trials(self) -> list[Any]:
        """Lists all trials that have ended, in their order."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.is_finished()]

    def facts(self, trial: Any) -> dict[str, Any]:
        """Returns what `tell` was told about a trial, with its validation loss. This is
        NaN for a failed trial."""
        loss = math.nan if trial.value is None else trial.value
        unknown = {"steps": 0, "train_loss": math.nan, "skipped": 0}
        return {**trial.user_attrs.get(_ATTRIBUTE, unknown), "val_loss": loss}

    def count(self, state: str) -> int:
        """Counts the trials that ended in a given state of Optuna."""
        return sum(trial.state.name == state for trial in self.trials())


def _check_sampler(sampler: Any, base: type) -> None:
    is_named = isinstance(sampler, str) and sampler in _SAMPLERS
    if not is_named and not isinstance(sampler, base):
        raise ValueError(
            "`sampler` must be 'random', 'tpe', 'gp' or a sampler of "
            f"`optuna.samplers`; got {shown(sampler)}."
        )
    if not is_named or sampler != "gp":
        return
    missing = [x for x in ("scipy", "torch") if importlib.util.find_spec(x) is None]
    if len(missing) > 0:
        raise ImportError(
            f"`sampler='gp'` needs {' and '.join(missing)}: `pip install "
            f"{' '.join(missing)}`. (Of PyTorch the build for CPUs is enough.)"
        )

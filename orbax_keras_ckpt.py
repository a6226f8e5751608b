# orbax_keras_ckpt.py, version 0.1.0
# SPDX-License-Identifier: Apache-2.0
# Made to be copied: keep this header, note local changes below it.
"""Fault-tolerant training for Keras 3 on JAX, with Orbax underneath.

    from orbax_keras_ckpt import OrbaxCheckpointCallback

    checkpoint = OrbaxCheckpointCallback(model, "/tmp/ckpt", max_to_keep=3)
    model.fit(x, y, epochs=100, callbacks=[checkpoint])
    # Killed? Run the same script again. It goes on with the next epoch, bit for bit.

Promised:

- The same script again continues with the epoch after the newest checkpoint and ends at the same
  `epochs`. Weights, optimizer, random draws and the `History` equal those of a run never interrupted.
- Saving happens in the background; `fit` returns when everything is committed, or raises.
- A checkpoint is compared with the model before anything is read. If they differ, one error lists the
  differences and the model stays as it was.
- Variables are matched by path. Names that Keras numbers by itself (`dense_3`) may differ.

Not promised:

- Progress inside an epoch: a run that is killed repeats the epoch that it was in.
- State of other callbacks and of data pipelines that shuffle by a generator of their own.

On disk, for the newest step 2, readable with plain Orbax:

    /tmp/ckpt/2/_CHECKPOINT_METADATA      Orbax's, with our record under custom_metadata
    /tmp/ckpt/2/default/                  the arrays: Orbax PyTree, OCDBT + zarr

Tested with Keras 3.10 to 3.15, JAX 0.5 to 0.10, Orbax 0.11.20 to 0.12.8.
"""

import dataclasses
import inspect
import json
import math
import numbers
import os
import random
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "KerasOrbaxCheckpointManager",
    "OrbaxCheckpointCallback",
]
__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------- errors


class CheckpointError(Exception):
    """Base class of the errors that concern a checkpoint."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The model is not the one that was saved."""


# ---------------------------------------------------------------------------------------------- record

_FORMAT = 1
_RECORD_KEY = "orbax_keras_ckpt"
_GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")


class _Spec(NamedTuple):
    """What a variable looks like, apart from its values."""

    path: str
    shape: tuple[int, ...]
    dtype: str


class _Position(NamedTuple):
    """Where in the run a checkpoint stands: `batch` batches into `epoch`, both counted from 0.

    `batches` is the number of train batches that the run has completed, None if it is not known.
    """

    epoch: int
    batch: int = 0
    batches: int | None = None


@dataclasses.dataclass
class _Record:
    """What we note beside the arrays, as JSON in Orbax's custom metadata."""

    position: _Position
    variables: dict[str, list[_Spec]]  # in the model's order: Orbax returns sorted dicts
    metrics: dict[str, float] | None = None
    history: dict[str, Any] | None = None  # of keras.callbacks.History: epoch, history
    random: dict[str, Any] | None = None
    stopped: int | None = None  # the `epochs` of a fit that a callback has stopped early
    model: dict[str, Any] | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_metadata(self) -> dict[str, Any]:
        fields = {"format": _FORMAT, **vars(self), "position": self.position._asdict()}
        # Logs and configs may hold numpy values.
        plain = json.dumps(fields, default=lambda value: value.tolist() if hasattr(value, "tolist") else repr(value))
        return {_RECORD_KEY: json.loads(plain)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any] | None) -> "_Record | None":
        """The record, or None where another program wrote the checkpoint."""
        fields = dict((metadata or {}).get(_RECORD_KEY) or {})
        if not fields:
            return None
        if (found := fields.pop("format", None)) != _FORMAT:
            raise CheckpointError(
                f"The checkpoint's record has format {found}; this copy of orbax_keras_ckpt.py ({__version__}) reads "
                f"format {_FORMAT}. Nothing was changed. Use the version that wrote the checkpoint, or a newer one."
            )
        fields["position"] = _Position(**fields["position"])
        fields["variables"] = {
            group: [_Spec(path, tuple(shape), dtype) for path, shape, dtype in specs]
            for group, specs in fields["variables"].items()
        }
        return cls(**fields)


# ----------------------------------------------------------------------------------------------- seams
# Every private or version-dependent touch of Keras and Orbax. Each has a test that fails when it moves.


def _start_at_epoch(model: keras.Model, epoch: int | None) -> None:
    """Makes the `fit` that is about to loop start at `epoch`; None takes that back."""
    # Keras has no public way to start fit() late from a callback, and never resets this one.
    model._initial_epoch = epoch


def _call_last(model: keras.Model, params: dict, **hooks: Callable) -> bool:
    """Calls `hooks` behind the methods of the same names of all the user's callbacks.

    False where `fit` has no History of its own, or one that its user has put before us.
    """
    history = getattr(model, "history", None)
    # The parameters are one dict for all callbacks of a fit. `epoch` is set by History.on_train_begin.
    if history is None or history.params is not params or "epoch" in vars(history):
        return False
    for name, hook in hooks.items():  # Keras puts History behind the user's callbacks, and offers no other way there
        method = getattr(history, name)

        def both(*args: Any, method: Callable = method, hook: Callable = hook, **kwargs: Any) -> None:
            method(*args, **kwargs)
            hook(*args, **kwargs)

        setattr(history, name, both)
    return True


def _call_at_end(model: keras.Model, hook: Callable[[], None]) -> None:
    """Calls `hook` once when `fit` ends, by return or by exception, before `on_train_end`."""
    # Keras calls no callback when fit raises. Its `finally` has one call that can be followed.
    finalize = model.optimizer.finalize_variable_values

    def finalize_and_end(variables: Any) -> None:
        vars(model.optimizer).pop("finalize_variable_values", None)
        try:
            finalize(variables)
        finally:
            hook()

    vars(model.optimizer)["finalize_variable_values"] = finalize_and_end


def _global_seed_generator() -> keras.random.SeedGenerator | None:
    """The generator behind `keras.random` calls without a seed; None before its first use."""
    from keras.src.backend.common import global_state

    return global_state.get_global_attribute("global_seed_generator")


def _set_global_seed_generator(generator: keras.random.SeedGenerator | None) -> None:
    """With None, Keras draws a new one from Python's `random` when it next needs it."""
    from keras.src.backend.common import global_state

    global_state.set_global_attribute("global_seed_generator", generator)


def _direction(model: keras.Model, monitor: str) -> str | None:
    """What is better, "min" or "max", as Keras infers it from the compiled metrics; None where it cannot."""
    name = monitor.removeprefix("val_")
    for group in model.metrics:
        for metric in [group, *getattr(group, "metrics", [])]:
            if metric.name == name and hasattr(metric, "_direction"):
                return "max" if metric._direction == "up" else "min"
    return "min" if name == "loss" else None


def _array_handler(compression: bool) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for the arrays, with zstd or without."""
    choice = {"use_compression": compression}  # Orbax has the choice since 0.11.26; before, it always compresses
    known = inspect.signature(ocp.PyTreeCheckpointHandler).parameters
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, **{name: choice[name] for name in choice if name in known})


# ------------------------------------------------------------------------------------------- variables

_CHUNK_BYTES = 16 * 2**20  # chunks are written and read in parallel; measured on two cores
_AUTOMATIC_SUFFIX = re.compile(r"_(\d+)$")


def _variables(model: keras.Model, optimizer: bool = True) -> dict[str, list[keras.Variable]]:
    """The model's variables by group, in its order. Raises where that is not possible or not unique."""
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no variables yet. Call it on a batch of data, or model.build(), first."
        )
    groups = {name: list(getattr(model, name)) for name in _GROUPS[:2]}
    if optimizer:
        if not getattr(model, "compiled", False) or model.optimizer is None:
            raise ValueError(
                f"The model {model.name!r} is not compiled. Call model.compile() first, "
                "or restore with weights_only=True."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        groups[_GROUPS[2]] = list(model.optimizer.variables)
    for name, variables in groups.items():
        _check_paths(name, [variable.path for variable in variables])
    return groups


def _check_paths(group: str, paths: list[str]) -> None:
    """Raises if two variables would lie on the same place of the tree."""
    known, folders = set(), {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
    for path in paths:
        if path in known or path in folders:
            raise ValueError(
                f"Two of the model's {group} have the path {path!r}, so a checkpoint could not tell them apart. "
                "Give the layers that they belong to different names (name=...)."
            )
        known.add(path)


def _spec(variable: keras.Variable) -> _Spec:
    return _Spec(variable.path, tuple(variable.shape), str(variable.dtype))


def _nest(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    tree = {}
    for path, leaf in leaves:
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _leaf(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _pair_names(live: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """{live: saved} of sibling names: the same, or the same but for the number at the end, in order of the numbers."""

    def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
        stems = {}
        for name in names:
            number = _AUTOMATIC_SUFFIX.search(name)
            stems.setdefault(name[: number.start()] if number else name, []).append(
                (int(number[1]) if number else 0, name)
            )
        return {stem: [name for _, name in sorted(group)] for stem, group in stems.items()}

    pairs, saved = {}, by_stem(saved)
    for stem, names in by_stem(live).items():
        others = saved.get(stem, [])
        if len(names) == len(others):
            # Keras counts up as layers are made, so the order of the numbers is that of their making.
            pairs.update(zip(names, others))
        else:
            pairs.update((name, name) for name in names if name in others)
    return pairs


def _pair_paths(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """{live path: saved path} of two nested trees, level by level."""
    pairs = {}
    for name, other in _pair_names(live, saved).items():
        below, below_other = live[name], saved[other]
        if isinstance(below, dict) and isinstance(below_other, dict):
            pairs |= {f"{name}/{key}": f"{other}/{value}" for key, value in _pair_paths(below, below_other).items()}
        elif not isinstance(below, dict) and not isinstance(below_other, dict):
            pairs[name] = other
    return pairs


def _pair_variables(live: Mapping[str, list[_Spec]], saved: Mapping[str, list[_Spec]]) -> dict[str, dict[str, str]]:
    """{group: {live path: saved path}}. The optimizer's names contain the model's, so they follow those."""
    weights = _GROUPS[:2]  # paired as one: a layer may have been frozen in between
    live_paths, saved_paths = (
        {group: [spec.path for spec in specs.get(group, [])] for group in _GROUPS} for specs in (live, saved)
    )
    pairs = _pair_paths(
        *(_nest((path, path) for group in weights for path in paths[group]) for paths in (live_paths, saved_paths))
    )
    result = {}
    for group in weights:
        here = set(saved_paths[group])
        result[group] = {path: pairs[path] for path in live_paths[group] if pairs.get(path) in here}
    flat = {path.replace("/", "_"): other.replace("/", "_") for path, other in pairs.items()}

    def renamed(path: str) -> str:
        folder, _, name = path.rpartition("/")
        for cut in (match.start() for match in reversed(list(re.finditer("_", name)))):
            if name[:cut] in flat:
                return f"{folder}/{flat[name[:cut]]}{name[cut:]}"
        return path

    originals = {renamed(path): path for path in live_paths[_GROUPS[2]]}
    pairs = _pair_paths(
        _nest((path, path) for path in originals), _nest((path, path) for path in saved_paths[_GROUPS[2]])
    )
    result[_GROUPS[2]] = {originals[path]: other for path, other in pairs.items()}
    return result


class _Source(NamedTuple):
    """A live variable and the saved one that it takes its value from."""

    group: str
    variable: keras.Variable
    saved: _Spec


def _compare(
    variables: Mapping[str, list[keras.Variable]], saved: Mapping[str, list[_Spec]], strict: bool
) -> tuple[list[_Source], list[str]]:
    """What to restore from where, and every difference in words. Not `strict`, another dtype is none."""
    live = {group: [_spec(variable) for variable in members] for group, members in variables.items()}
    pairs = _pair_variables(live, saved)
    sources, differences = [], []
    for group, members in variables.items():
        by_path = {spec.path: spec for spec in saved.get(group, [])}
        for variable, spec in zip(members, live[group]):
            other = by_path.get(pairs[group].get(spec.path))
            if other is None:
                differences.append(f"{group}: {spec.path!r} is in the model but not in the checkpoint")
            elif other.shape != spec.shape:
                differences.append(f"{group}: {other.path!r} was saved as {other.shape}, the model has {spec.shape}")
            elif strict and other.dtype != spec.dtype:
                differences.append(f"{group}: {other.path!r} was saved as {other.dtype}, the model has {spec.dtype}")
            else:
                sources.append(_Source(group, variable, other))
        for path in by_path.keys() - pairs[group].values():
            differences.append(f"{group}: {path!r} is in the checkpoint but not in the model")
    return sources, differences


def _listing(lines: list[str]) -> str:
    """The first ten lines, and how many more there are."""
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "\n".join(f"  - {line}" for line in lines[:10] + more)


# ---------------------------------------------------------------------------------------- random state


def _random_state() -> dict[str, Any]:
    """The global random generators as JSON: Python's, numpy's, Keras's, and torch's if it is imported."""
    generator = _global_seed_generator()
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "keras": None if generator is None else np.asarray(generator.state.value),
    }
    if "torch" in sys.modules:
        state["torch"] = sys.modules["torch"].get_rng_state().numpy()
    return jax.tree.map(lambda leaf: leaf.tolist() if isinstance(leaf, np.ndarray) else leaf, state)


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state(state["numpy"])
    if (generator := state["keras"]) is not None:
        generator = _global_seed_generator() or keras.random.SeedGenerator(0)
        generator.state.assign(state["keras"])
    _set_global_seed_generator(generator)
    if "torch" in state and "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


# --------------------------------------------------------------------------------------------- manager


def _check_backend() -> None:
    if keras.config.backend() != "jax":
        raise ValueError(
            f"orbax_keras_ckpt needs Keras's JAX backend; the backend is {keras.config.backend()!r}. "
            'Set os.environ["KERAS_BACKEND"] = "jax" before the first import of keras.'
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def _check_arguments(
    max_to_keep: Any, steps_per_epoch: Any, monitor: Any, mode: Any, options: Mapping[str, Any]
) -> None:
    if max_to_keep is not None and not _is_count(max_to_keep):
        raise ValueError(f"max_to_keep={max_to_keep!r}: give a number of checkpoints, 1 or more, or None to keep all.")
    if not _is_count(steps_per_epoch):
        raise ValueError(f"steps_per_epoch={steps_per_epoch!r}: give a number of steps, 1 or more.")
    if monitor is not None and not (isinstance(monitor, str) and monitor):
        raise ValueError(f"monitor={monitor!r}: give the name of a metric, as in the logs of fit, or None.")
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'mode={mode!r}: give "min", "max" or "auto".')
    known = {field.name for field in dataclasses.fields(ocp.CheckpointManagerOptions)} - {"max_to_keep"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(
            f"Unknown argument {', '.join(map(repr, unknown))}: neither one of this class nor of "
            f"orbax.checkpoint.CheckpointManagerOptions. Orbax's are: {', '.join(sorted(known))}."
        )
    if monitor is not None and (clash := sorted(options.keys() & {"best_fn", "best_mode", "preservation_policy"})):
        raise ValueError(f"monitor={monitor!r} and {', '.join(clash)} both say what to keep. Give one of them.")


def _usable_directory(checkpoint_dir: str | os.PathLike, options: Mapping[str, Any]) -> epath.Path:
    """The absolute path of a directory that can be written, made if it is not there."""
    try:
        path = os.fspath(checkpoint_dir)
    except TypeError:
        path = None
    if not isinstance(path, str) or not path:
        raise ValueError(f"checkpoint_dir={checkpoint_dir!r}: give the path of a directory, as str or path-like.")
    if "://" in path:
        return epath.Path(path)
    path = os.path.abspath(os.path.expanduser(path))
    if options.get("read_only"):
        return epath.Path(path)
    try:
        if options.get("create", True):
            os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoint_dir={path!r} cannot be written to ({error.strerror}). Choose another directory"
        ) from error
    return epath.Path(path)


class KerasOrbaxCheckpointManager(ocp.CheckpointManager):
    """Saves and restores the state of a Keras model with Orbax.

    All of `orbax.checkpoint.CheckpointManager` is there too: `all_steps`, `latest_step`,
    `wait_until_finished`, `close` and so on.

    Example:

    >>> manager = KerasOrbaxCheckpointManager(model, "/tmp/ckpt", max_to_keep=3)
    >>> manager.save_state(0)  # epoch 0 is complete
    True
    >>> manager.restore_state()
    0

    Args:
        model: The `keras.Model`, on the JAX backend.
        checkpoint_dir: Directory of the checkpoints, `str` or path-like; relative paths and `~` work.
            Made if it is not there.
        max_to_keep: How many of the newest checkpoints to keep, None for all. Defaults to 5.
        steps_per_epoch: The checkpoint of epoch `e` (from 0) is step `e * steps_per_epoch`. Defaults to 1.
        monitor: Name of a metric. Then the `max_to_keep` checkpoints that are best by it are kept, and
            always the newest too. Defaults to None.
        mode: `"min"` or `"max"` of `monitor` is best; `"auto"` asks the model's metrics. Defaults to `"auto"`.
        compression: Whether to compress with zstd: 8 % smaller float weights for about twice the time.
            Orbax before 0.11.26 always does. Defaults to False.
        **kwargs: Fields of `orbax.checkpoint.CheckpointManagerOptions`, such as `keep_period`.
            `enable_async_checkpointing=False` makes every save wait until it is on disk. With
            `preservation_policy`, `max_to_keep` is not used.

    Raises:
        ValueError: An argument is bad, or Keras's backend is not JAX.
        TypeError: A keyword is neither ours nor Orbax's.
        OSError: The directory cannot be written to.
    """

    def __init__(
        self,
        model: keras.Model,
        checkpoint_dir: str | os.PathLike,
        max_to_keep: int | None = 5,
        steps_per_epoch: int = 1,
        *,
        monitor: str | None = None,
        mode: str = "auto",
        compression: bool = False,
        **kwargs: Any,
    ):
        _check_backend()
        if not isinstance(model, keras.Model):
            raise ValueError(f"model={model!r}: give a keras.Model.")
        _check_arguments(max_to_keep, steps_per_epoch, monitor, mode, kwargs)
        directory = _usable_directory(checkpoint_dir, kwargs)
        self._model = model
        self._steps_per_epoch = int(steps_per_epoch)
        self._monitor = monitor
        self._mode = mode
        self._model_config = None
        super().__init__(
            directory,
            item_handlers={"default": _array_handler(compression)},
            options=ocp.CheckpointManagerOptions(**self._retention(max_to_keep, kwargs), **kwargs),
        )

    def _retention(self, max_to_keep: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options that say what is kept; takes those that it replaces out of `kwargs`."""
        if "preservation_policy" in kwargs:
            return {}
        if self._monitor is None:
            return {"max_to_keep": max_to_keep}
        # Orbax's own best_fn with max_to_keep would delete the newest one when it is not among the best.
        policies = [
            ocp.checkpoint_managers.LatestN(1),
            ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=max_to_keep),
        ]
        if period := kwargs.pop("keep_period", None):
            policies.append(ocp.checkpoint_managers.EveryNSteps(period))
        if interval := kwargs.pop("keep_time_interval", None):
            policies.append(ocp.checkpoint_managers.EveryNSeconds(int(interval.total_seconds())))
        return {
            "best_fn": self._score,
            "preservation_policy": ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        }

    def _score(self, metrics: Mapping[str, float]) -> float:
        """How good a checkpoint is: the higher the better, NaN and missing the worst."""
        value = metrics.get(self._monitor, math.nan)
        return -math.inf if math.isnan(value) else value if self._resolved_mode() == "max" else -value

    def _resolved_mode(self) -> str:
        if self._mode == "auto" and (mode := _direction(self._model, self._monitor)):
            self._mode = mode
        if self._mode == "auto":
            raise ValueError(
                f'mode="auto": the model\'s metrics do not say whether a high or a low {self._monitor!r} is better. '
                'Give mode="max" or mode="min".'
            )
        return self._mode

    def _start_run(self) -> None:
        """Raises early what a save would raise later, and forgets what may have changed since the last run."""
        self._model_config = None
        if self._monitor is not None:
            self._resolved_mode()

    def _position(self, step: int, record: _Record | None) -> _Position:
        """Where a run continues after `step`."""
        return record.position if record else _Position(step // self._steps_per_epoch + 1)

    def save_state(self, epoch: int, *, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts to save the model: epoch `epoch` (counted from 0) is complete.

        Args:
            epoch: The epoch; the step is `epoch * steps_per_epoch`.
            metrics: The epoch's logs, kept with the checkpoint; with `monitor` they decide what is kept.

        Returns:
            True when a save was started, False when Orbax's options (such as `save_interval_steps`)
            say that this step is not to be saved.

        Raises:
            ValueError: The step is not above the newest one, or the model is not compiled or not built.
            Exception: The error of the save before this one, if that failed in the background.
        """
        if not isinstance(epoch, numbers.Integral) or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(f"epoch={epoch!r}: give the number of a completed epoch, 0 or more.")
        return self._save(int(epoch) * self._steps_per_epoch, _Position(int(epoch) + 1), metrics)

    def _save(self, step: int, position: _Position, metrics: Mapping[str, float] | None, **notes: Any) -> bool:
        """Saves everything under `step`; `notes` are further fields of the record."""
        self._check_newer(step)
        variables = _variables(self._model)
        metrics = {name: float(value) for name, value in (metrics or {}).items() if np.ndim(value) == 0}
        if self._monitor is not None and self._monitor not in metrics:
            warnings.warn(
                f"monitor={self._monitor!r} is not among the metrics of step {step}, which therefore counts as "
                f"the worst. There are: {', '.join(map(repr, metrics)) or 'none'}.",
                stacklevel=4,
            )
        record = _Record(
            position=position,
            variables={group: [_spec(variable) for variable in members] for group, members in variables.items()},
            metrics=metrics,
            model=self._config(),
            versions={library.__name__: library.__version__ for library in (keras, jax, ocp)},
            **notes,
        )
        # Orbax refuses arrays without elements; the record says all there is to say about them.
        arrays = {
            group: _nest((variable.path, variable.value) for variable in members if math.prod(variable.shape))
            for group, members in variables.items()
        }
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), arrays)
        return self.save(
            step,
            args=ocp.args.Composite(default=ocp.args.PyTreeSave(arrays, save_args=chunks)),
            metrics=metrics if self._monitor is not None else None,
            custom_metadata=record.to_metadata(),
        )

    def _check_newer(self, step: int) -> None:
        if (newest := self.latest_step()) is not None and step <= newest:
            self.wait_until_finished()  # the newest may be a save that has failed since, and then this says so
        if (newest := self.latest_step()) is not None and step <= newest:
            raise ValueError(
                f"Step {step} is not above {newest}, the newest in {self.directory}. A directory holds one run, "
                "whose steps only go up. Nothing was saved. Continue with a later epoch, or use another directory."
            )

    def _config(self) -> dict[str, Any]:
        """The model as Keras's JSON, or why there is none; made once, it takes a while."""
        if self._model_config is None:
            try:
                self._model_config = keras.saving.serialize_keras_object(self._model)
            except Exception as error:  # any, from the user's own get_config(); saving goes on without
                self._model_config = {"error": f"{type(error).__name__}: {error}"}
        return self._model_config

    def restore_state(
        self, step: int | None = None, *, weights_only: bool = False, strict: bool = True, donate: bool = False
    ) -> int | None:
        """Gives the model the state of a checkpoint.

        Args:
            step: The step, None for the newest. Defaults to None.
            weights_only: Whether to leave the optimizer alone. The model need not be compiled then.
                Defaults to False.
            strict: Whether model and checkpoint have to be the same. If False, what agrees by path and
                shape is restored, cast to the model's dtype, and a warning lists the rest.
                Defaults to True.
            donate: Whether to free the model's own arrays before reading, which saves memory. If reading
                then fails, the model is unusable. Defaults to False.

        Returns:
            The step, or None if the directory holds no checkpoint.

        Raises:
            CheckpointMismatchError: The model is not the one that was saved. It has not been changed.
            FileNotFoundError: There is no checkpoint of that step.
        """
        return self._restore(step, weights_only=weights_only, strict=strict, donate=donate)[0]

    def _restore(
        self, step: int | None, *, weights_only: bool = False, strict: bool = True, donate: bool = False
    ) -> tuple[int | None, _Record | None]:
        """Check, read, assign. The record is None where the directory is empty or others wrote the checkpoint."""
        variables = _variables(self._model, optimizer=not weights_only)
        self.wait_until_finished()
        self.reload()  # others may have written since we looked
        if step is None and (step := self.latest_step()) is None:
            return None, None
        if step not in self.all_steps():
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}. Steps there: {list(self.all_steps())}."
            )
        metadata = self.metadata(step)
        record = _Record.from_metadata(metadata.custom_metadata)
        saved = record.variables if record else _foreign_variables(metadata.item_metadata["default"])
        sources, differences = _compare(variables, saved, strict)
        if differences and strict:
            raise CheckpointMismatchError(
                f"Step {step} in {self.directory} is of another model:\n{_listing(differences)}\nNothing was changed. "
                "Build the model as it was saved, use another directory, or restore with strict=False."
            )
        if differences:
            warnings.warn(f"Step {step} was restored in part. Skipped:\n{_listing(differences)}", stacklevel=4)
        self._assign(sources, self._read(step, sources, donate))
        return step, record

    def _read(self, step: int, sources: list[_Source], donate: bool) -> dict[str, Any]:
        """The arrays of `sources`, in the sharding and dtype of the variables."""
        wanted = {group: [] for group in _GROUPS}
        for group, variable, saved in sources:
            if math.prod(saved.shape):
                value = variable.value
                leaf = jax.ShapeDtypeStruct(saved.shape, value.dtype, sharding=value.sharding)
                wanted[group].append((saved.path, leaf))
                if donate:
                    value.delete()
        wanted = {group: _nest(leaves) for group, leaves in wanted.items() if leaves}
        if not wanted:
            return {}
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return self.restore(step, args=ocp.args.Composite(default=arguments))["default"]

    def _assign(self, sources: list[_Source], arrays: Mapping[str, Any]) -> None:
        for group, variable, saved in sources:
            if math.prod(saved.shape):
                variable.assign(_leaf(arrays[group], saved.path))

    def wait_until_finished(self) -> None:
        """Waits until everything is committed. Raises the error of a save that failed; its step is not listed."""
        try:
            super().wait_until_finished()
        except BaseException:
            # Orbax has also forgotten the steps that the failed save would have replaced.
            self.reload()
            raise


def _foreign_variables(metadata: Any) -> dict[str, list[_Spec]]:
    """What Orbax itself notes about the arrays, for a checkpoint without a record (the guide's own version)."""

    def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[_Spec]:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{prefix}{name}/")
            else:
                yield _Spec(prefix + name, tuple(value.shape), str(np.dtype(value.dtype)))

    return {group: list(leaves(metadata.tree.get(group, {}))) for group in _GROUPS}


# -------------------------------------------------------------------------------------------- callback


def _signals(numbers: Any) -> tuple[signal.Signals, ...]:
    try:
        signals = tuple(signal.Signals(number) for number in numbers)
    except (TypeError, ValueError):
        signals = None
    if signals is None or {signal.SIGKILL, signal.SIGSTOP} & set(signals):
        raise ValueError(
            f"preemption_signals={numbers!r}: give a tuple of signals that can be caught, such as "
            "(signal.SIGTERM,), or () for none."
        )
    return signals


class OrbaxCheckpointCallback(keras.callbacks.Callback):
    """Saves the whole training state after every epoch, and continues from it when `fit` starts.

    The same script run again continues with the epoch after the newest checkpoint and stops at the same
    `epochs`. A run that is complete, or that another callback has stopped, loads its final state and
    returns. `fit` returns when everything is committed to disk.

    Example:

    >>> checkpoint = OrbaxCheckpointCallback(model, "/tmp/ckpt", max_to_keep=3)
    >>> model.fit(x, y, epochs=100, callbacks=[checkpoint])

    Args:
        model: The `keras.Model` that will be fitted, compiled.
        checkpoint_dir: As in `KerasOrbaxCheckpointManager`, like the further ones.
        max_to_keep: See there. Defaults to 5.
        steps_per_epoch: See there. Defaults to 1.
        save_freq: `"epoch"`: after every epoch.
        monitor: See there; a name in the logs of an epoch, such as `"val_loss"`. Defaults to None.
        mode: See there. Defaults to `"auto"`.
        preemption_signals: Signals on which the run ends after the epoch that it is in, once that is saved,
            with exit code 128 + signal (`KeyboardInterrupt` for SIGINT). Defaults to SIGTERM. Earlier
            Python handlers are called once it is saved, and put back when `fit` ends.
        verbose: 1 prints a line for every save and load, 0 prints nothing. Defaults to 1.
        **kwargs: `compression`, and fields of `orbax.checkpoint.CheckpointManagerOptions`.

    Attributes:
        checkpoint_manager: The `KerasOrbaxCheckpointManager`.

    Raises:
        ValueError: An argument is bad, the model is not compiled, or Keras's backend is not JAX.
        TypeError: A keyword is neither ours nor Orbax's.
        OSError: The directory cannot be written to.
    """

    def __init__(
        self,
        model: keras.Model,
        checkpoint_dir: str | os.PathLike,
        max_to_keep: int | None = 5,
        steps_per_epoch: int = 1,
        *,
        save_freq: str = "epoch",
        monitor: str | None = None,
        mode: str = "auto",
        preemption_signals: Iterable[int] = (signal.SIGTERM,),
        verbose: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        _check_backend()
        if save_freq != "epoch":
            raise ValueError(f'save_freq={save_freq!r}: give "epoch", this version saves after every epoch.')
        if verbose not in (0, 1):
            raise ValueError(f"verbose={verbose!r}: give 0 or 1.")
        if isinstance(model, keras.Model) and not model.compiled:
            raise ValueError(
                f"The model {model.name!r} is not compiled. Call model.compile() before making this callback."
            )
        self._signals = _signals(preemption_signals)
        self.checkpoint_manager = KerasOrbaxCheckpointManager(
            model, checkpoint_dir, max_to_keep, steps_per_epoch, monitor=monitor, mode=mode, **kwargs
        )
        self._fitted_model = model
        self._received: int | None = None
        self._verbose = verbose

    def on_train_begin(self, logs: Any = None) -> None:
        model, manager = self._fitted_model, self.checkpoint_manager
        if self._model is not model:
            raise ValueError(
                f"This callback was made for the model {model.name!r}, but the model being fitted is "
                f"{self._model.name!r}. Make the callback with the model that you fit."
            )
        manager._start_run()
        step, self._loaded = manager._restore(None)
        start = _Position(0) if step is None else manager._position(step, self._loaded)
        stopped = self._loaded is not None and self.params["epochs"] <= (self._loaded.stopped or 0)
        self._first_epoch = max(start.epoch, self.params["epochs"]) if stopped else start.epoch
        if step is not None:
            self._say_loaded(step, start)
        if self._first_epoch < self.params["epochs"]:
            manager._check_newer(self._first_epoch * manager._steps_per_epoch)
        self._is_last = _call_last(model, self.params, on_train_begin=self._begin, on_epoch_end=self._complete_epoch)
        if not self._is_last:
            self._begin()

    def _begin(self, logs: Any = None) -> None:
        """The very end of `on_train_begin`, behind all other callbacks."""
        model = self._fitted_model
        _call_at_end(model, self._end)
        self._catch_signals()
        if self._first_epoch:
            _start_at_epoch(model, self._first_epoch)
        if self._loaded is not None and self._loaded.random is not None:
            _set_random_state(self._loaded.random)
        if self._loaded is not None and self._loaded.history is not None and self._is_last:
            vars(model.history).update(self._loaded.history)
        self._loaded = None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self._is_last:
            self._complete_epoch(epoch, logs)

    def _complete_epoch(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """The very end of `on_epoch_end`: whatever the other callbacks do to the run, they have done."""
        model, manager = self._fitted_model, self.checkpoint_manager
        history = {name: vars(model.history)[name] for name in ("epoch", "history")} if self._is_last else None
        started = manager._save(
            epoch * manager._steps_per_epoch,
            _Position(epoch + 1),
            logs,
            history=history,
            random=_random_state(),
            stopped=self.params["epochs"] if model.stop_training else None,
        )
        if started:
            self._say("Save Orbax checkpoint on_epoch_end.")
        if self._received is not None:
            self._leave(self._received)

    def on_train_end(self, logs: Any = None) -> None:
        self.checkpoint_manager.wait_until_finished()

    def _end(self) -> None:
        """However `fit` ends: nothing of this run is left in the model, and what was being saved is on disk."""
        _start_at_epoch(self._fitted_model, None)
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        failure = sys.exc_info()[1]
        try:
            self.checkpoint_manager.wait_until_finished()
        except Exception as error:
            if failure is None:
                raise
            warnings.warn(f"The last save has failed as well: {error!r}", stacklevel=2)  # not to hide the first error

    def _catch_signals(self) -> None:
        self._received, self._earlier_handlers = None, {}
        if threading.current_thread() is not threading.main_thread():
            if self._signals:
                warnings.warn("fit runs outside the main thread: preemption_signals are not caught.", stacklevel=2)
            return
        for number in self._signals:
            self._earlier_handlers[number] = signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        self._received = number

    def _leave(self, number: int) -> None:
        """Ends the process as the signal asks, with everything on disk."""
        self.checkpoint_manager.wait_until_finished()
        self._say(f"Stop on {signal.Signals(number).name}: the run is saved. The same script continues it.")
        earlier = self._earlier_handlers[number]
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, None)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _say_loaded(self, step: int, start: _Position) -> None:
        epochs = self.params["epochs"]
        self._say("Load Orbax checkpoint on_train_begin.")
        if start.epoch >= epochs:
            self._say(f"Nothing left to train: {start.epoch} of {epochs} epochs are done (step {step}).")
        elif self._first_epoch >= epochs:
            self._say(f"Nothing left to train: a callback stopped the run after {start.epoch} epochs (step {step}).")
        else:
            self._say(f"Continue with epoch {start.epoch + 1} of {epochs} (step {step}).")

    def _say(self, line: str) -> None:
        if self._verbose and jax.process_index() == 0:
            # Keras's progress bar leaves its line open until all callbacks have seen the end of the epoch.
            print(
                f"\n{line}" if line.startswith("Save") and self.params.get("verbose") in ("auto", 1) else line,
                flush=True,
            )

# orbax_keras_ckpt.py, version 1.0.0
# SPDX-License-Identifier: Apache-2.0
# Made to be copied: keep this header, note local changes below it.
# fmt: off
# Keras and Orbax ship no types, the seams touch private attributes, and user code may raise anything:
# mypy: disable-error-code="import-untyped,import-not-found"
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: BLE001
"""Fault-tolerant training for Keras 3 on JAX, with Orbax underneath.

    from orbax_keras_ckpt import OrbaxCheckpointCallback, load_model

    checkpoint = OrbaxCheckpointCallback(model, "/tmp/ckpt", max_to_keep=3)
    model.fit(x, y, epochs=100, callbacks=[checkpoint])
    # Killed? Run the same script again. It resumes where it stopped, bit for bit.

    model = load_model("/tmp/ckpt")              # without the code that built it
    $ python orbax_keras_ckpt.py /tmp/ckpt       # (under this name) lists the checkpoints; --verify checks them

Promised:

- P1: Rerun, a script continues with the batch after the newest checkpoint and ends at the same `epochs`.
- P2: Weights, optimizer, metrics, random draws and `History` equal those of an uninterrupted run, bit for bit.
- P3: Once the first save is committed, there is always a restorable checkpoint, whenever the process is killed.
- P4: `stateful` callbacks and data iterators are restored as they were.
- P5: Every requested save is committed; if it fails, the next save or the end of `fit` raises. Steps only go up.
- P6: A checkpoint is compared with the model before any array is read: one error lists all differences.
- P7: Checksums catch every flipped bit of what is restored. The newest intact checkpoint is used, and damaged ones
  are set aside.
- P8: On SIGTERM the state is saved within a batch, and the process exits with code 143.
- P9: Several processes save, restore, fall back and stop at the same step. A run can continue on any number of
  processes and devices, with any layout.
- P10: Bad arguments, another backend, unsaveable models and unwritable directories are refused before training.
- P11: Numbers in automatic names (`dense_3`) may differ: variables are matched by path.
- P12: Checkpoints of the guide's version and of `keras.callbacks.OrbaxCheckpoint` are restored. `load_model` rebuilds a
  model from the directory alone.

Not promised:

- State of optimizers other than `model.optimizer`, and of validation data that is a generator.
- Metrics that are not reset between epochs.
- Python generators that run out, or that are shared by two fits: Keras keeps the batches it has read ahead.
- State of objects that are not in `stateful`, and of data that does not replay the same batches.
- Each process's random states and `stateful` objects, when a run continues on another number of processes: all take
  those of process 0.
- Detection of damage in checkpoints written by other tools, which have no checksums.
- Validation that changes non-trainable variables larger than 1 MiB, if a signal interrupts it.

On disk, where step 2 is the newest, readable with plain Orbax:

    /tmp/ckpt/2/_CHECKPOINT_METADATA      Orbax's, with our record under custom_metadata
    /tmp/ckpt/2/default/                  the arrays: Orbax PyTree, OCDBT + zarr
    /tmp/ckpt/1.damaged/                  was found damaged; delete it when you like

A step may have one more folder, `run`, for large state other than variables: arrays of `stateful` objects,
vocabularies, and, with several processes, the state of each. A snapshot inside an epoch is renamed to
`<step>.replaced` while the checkpoint that replaces it is written.

Tested with Keras 3.10 to 3.15, JAX 0.7 to 0.12, Orbax 0.11.20 to 0.12.8, Python 3.11 to 3.13.
"""

import os

# Pasted into a notebook or a script, where __name__ is "__main__" as well, this file only defines.
if _IS_PROGRAM := __name__ == "__main__" and os.path.basename(globals().get("__file__", "")) == "orbax_keras_ckpt.py":
    # The command line overrides the user's settings, and must work while a run occupies the GPU.
    os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

import argparse
import base64
import collections
import concurrent.futures.thread
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import functools
import inspect
import io
import itertools
import json
import math
import numbers
import pathlib
import pkgutil
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import types
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "KerasOrbaxCheckpointManager",
    "OrbaxCheckpointCallback",
    "load_model",
]
__version__ = "1.0.0"

# ---------------------------------------------------------------------------------------------- errors


class CheckpointError(Exception):
    """Base class of all checkpoint errors."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The model, the data or the settings do not match the checkpoint."""


class CheckpointCorruptError(CheckpointError, OSError):
    """A checkpoint is damaged on disk."""


# ---------------------------------------------------------------------------------------------- record

_FORMAT = 1
_RECORD_KEY = "orbax_keras_ckpt"
_GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
_WEIGHTS = _GROUPS[:2]


class _Spec(NamedTuple):
    """Path, shape and dtype of a variable."""

    path: str
    shape: tuple[int, ...]
    dtype: str


_Specs = Mapping[str, Sequence[_Spec]]  # by group, in the model's order


class _Position(NamedTuple):
    """Position of a checkpoint in the run: `batch` batches into `epoch`, both counted from 0."""

    epoch: int
    batch: int = 0
    batches: int | None = None  # that the run has trained on in all; None if unknown


_INLINE_BYTES = 2**13  # more are stored outside the JSON
_OPERATIONS = {"less": keras.ops.less, "greater": keras.ops.greater}  # what "better" means to Keras's callbacks
_NAMED = _OPERATIONS | {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, set, dict)}  # factories
_BITS = {kind: getattr(np.random, kind) for kind in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")}
_GENERATORS: dict[type, tuple[Callable, Callable]] = {  # how to get and set the states of random generators
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (lambda old: old.get_state(legacy=False), np.random.RandomState.set_state),
    np.random.Generator: (lambda old: old.bit_generator.state, lambda new, to: setattr(new.bit_generator, "state", to)),
}


def _generator(kind: str, state: Any) -> Any:
    """A random generator with this state."""
    new = {"Random": random.Random, "RandomState": np.random.RandomState}.get(kind)
    generator = new() if new else np.random.Generator(_BITS[state["bit_generator"]]())
    _GENERATORS[type(generator)][1](generator, state)
    return generator


# The types that are saved besides lists, bytes and plain values: arguments from which _MAKERS make an equal value.
_ARGUMENTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    **dict.fromkeys((tuple, set, frozenset), lambda old: [list(old)]),
    **dict.fromkeys((dict, collections.OrderedDict), lambda old: [[list(item) for item in old.items()]]),
    **dict.fromkeys((datetime.datetime, datetime.date, datetime.timedelta), lambda old: old.__reduce__()[1]),
    datetime.timezone: lambda old: [old.utcoffset(None)],
    collections.Counter: lambda old: [dict(old)],
    collections.defaultdict: lambda old: [old.default_factory, dict(old)],
    collections.deque: lambda old: [list(old), old.maxlen],
    # The dtypes of JAX that numpy does not have, such as bfloat16, are known by name.
    np.ndarray: lambda old: [old.tobytes(), old.dtype.name if old.dtype.isbuiltin == 2 else old.dtype.str, old.shape],
    **dict.fromkeys(_GENERATORS, lambda old: [type(old).__name__, _GENERATORS[type(old)][0](old)]),
}
_MAKERS: dict[str, Callable[..., Any]] = {  # by name in the JSON; a record of somebody else makes nothing else
    **{kind.__name__: _generator if kind in _GENERATORS else kind for kind in _ARGUMENTS},
    "ndarray": lambda data, dtype, shape: np.frombuffer(data, jax.numpy.dtype(dtype)).reshape(shape).copy(),
    "scalar": lambda array: array[()],
    "jax": jax.numpy.asarray,
    "key": lambda data, implementation: jax.random.wrap_key_data(data, impl=implementation),
    "torch": lambda array: sys.modules["torch"].from_numpy(array),
    "name": _NAMED.__getitem__,
}


def _is_key(value: Any) -> bool:
    """Whether a value is a key of `jax.random`, of the new kind or the old."""
    if not isinstance(value, jax.Array):
        return False
    return jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key) or (value.dtype == "uint32" and value.size <= 4)


def _arguments(value: Any) -> tuple[str, Iterable[Any]]:
    """The name of a maker, and its arguments. TypeError, RuntimeError or LookupError if none makes an equal value."""
    kind = type(value)
    if _is_key(value) and value.dtype != "uint32":
        return "key", [jax.random.key_data(value), str(jax.random.key_impl(value))]
    if isinstance(value, jax.Array):
        return "jax", [np.asarray(value)]
    if isinstance(value, (np.ndarray, np.generic)) and (value.dtype.kind in "OT" or value.dtype.names):
        raise TypeError("not just numbers or texts")
    if isinstance(value, np.generic):
        return "scalar", [np.asarray(value)]
    if kind is collections.defaultdict and value.default_factory not in (None, *_NAMED.values()):
        raise TypeError("its factory is code")
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        return "torch", [value.detach().cpu().numpy()]
    if named := [name for name, each in _NAMED.items() if value is each]:
        return "name", named
    return kind.__name__, _ARGUMENTS[kind](value)


def _packed(value: Any, default: Callable | None = None) -> tuple[Any, list[np.ndarray]]:
    """`value` as JSON, and the large arrays of bytes that it refers to by index.

    TypeError if the value would not come back with the same types, unless `default` converts it.
    """
    arrays: list[np.ndarray] = []

    def pack(value: Any) -> Any:
        if (kind := type(value)) in (bool, int, float, str, type(None)):
            return value
        if kind is list:
            return [pack(item) for item in value]
        if kind is bytes and len(value) <= _INLINE_BYTES:
            return {"bytes": base64.b64encode(value).decode()}
        if kind is bytes:
            arrays.append(np.frombuffer(value, np.uint8))
            return {"bytes": len(arrays) - 1}
        try:
            name, arguments = _arguments(value)
        except RecursionError:
            raise
        except (TypeError, RuntimeError, LookupError) as error:  # also an array that is deleted or of other processes
            if default is None:
                raise TypeError(f"a {kind.__name__} cannot be saved") from error
            return pack(default(value))
        return {name: [pack(argument) for argument in arguments]}

    try:
        return pack(value), arrays
    except RecursionError:
        raise TypeError("it contains itself") from None


def _unpack(value: Any, arrays: Sequence[np.ndarray] = ()) -> Any:
    """The inverse of `_packed`. LookupError or ValueError for what that cannot have made."""
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "bytes":
        return base64.b64decode(content) if isinstance(content, str) else arrays[content].tobytes()
    return _MAKERS[kind](*_unpack(content, arrays))


def _copied(value: Any, default: Callable | None = None) -> Any:
    """A deep copy of `value`; parts that cannot be saved are first converted by `default`."""
    return _unpack(*_packed(value, default))


def _checksum(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


@dataclasses.dataclass
class _Record:
    """What is saved beside the arrays, as JSON in Orbax's custom metadata."""

    save: str  # the id of this save, also stored with each of its arrays
    position: _Position
    variables: _Specs  # in the model's order: Orbax returns sorted dicts
    metrics: dict[str, float]
    monitor: list[str] | None  # what decides which checkpoint is best, and "min" or "max"
    model: dict[str, Any]
    own: Any  # the state of this process, packed; None if it is in the item "run"
    run: list[int] | None  # the size in bytes of each process's archive in the item "run", if there is one
    # Written by the callback:
    stateful: list[str] | None = None  # the class names of these objects
    num_batches: int | None = None  # per epoch, if known
    is_resumable: bool = False  # whether `fit` read resumable()
    is_trained: bool = False  # whether all batches of the epoch were trained on
    unfinished: bool = False  # saved inside an epoch, whose end may get the same step
    stopped: int | None = None  # the `epochs` of a fit that a callback stopped

    @property
    def processes(self) -> int:
        """How many processes saved the checkpoint. Several have an archive each."""
        return len(self.run or [None])

    def to_metadata(self) -> dict[str, Any]:
        fields = json.loads(json.dumps({"format": _FORMAT, **vars(self), "position": self.position._asdict()}))
        return {_RECORD_KEY: {**fields, "crc32": _checksum(fields)}}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "_Record | None":
        """The record in `_CHECKPOINT_METADATA`; None if another tool wrote it. ValueError if it is damaged."""
        fields = (metadata.get("custom_metadata") or {}).get(_RECORD_KEY)
        if fields is None:
            return None
        fields = dict(fields)
        if fields.pop("crc32", None) != _checksum(fields):
            raise ValueError("the record in _CHECKPOINT_METADATA does not match its checksum")
        if (found := fields.pop("format")) > _FORMAT:
            raise CheckpointError(
                f"The checkpoint's record has format {found}; this copy of orbax_keras_ckpt.py ({__version__}) reads "
                f"format {_FORMAT}. Use the version that wrote the checkpoint, or a newer one."
            )
        fields["position"] = _Position(**fields["position"])
        for group, specs in fields["variables"].items():
            fields["variables"][group] = [_Spec(path, tuple(shape), dtype) for path, shape, dtype in specs]
        return cls(**fields)


# ----------------------------------------------------------------------------------------------- seams
# Every private or version-dependent use of Keras, Orbax and JAX. If one is gone, creating a manager fails and names it;
# what exists only inside a running `fit` is checked when `fit` starts, before anything is trained.

_TESTED = "Keras 3.10 to 3.15, JAX 0.7 to 0.12 and Orbax 0.11.20 to 0.12.8"
_SEAMS = {
    "keras:Model.jax_state_sync": "the end of fit, and of the train batches of an epoch",
    "keras.src.utils.naming:to_snake_case": "names that Keras makes up",
    "keras.src.backend.common.global_state:get_global_attribute": "Keras's global seed generator",
    "keras.src.backend.common.global_state:set_global_attribute": "the same",
    "keras.src.saving.serialization_lib:ObjectSharingScope": "layers that are shared",
    "keras.src.saving.serialization_lib:SafeModeScope": "safe_mode",
    "orbax.checkpoint:CheckpointManager._load_checkpoint_infos": "reading a directory with damaged steps",
    "orbax.checkpoint:CheckpointManager._wait_for_checkpointers": "saves that fail in the background",
    "orbax.checkpoint:checkpoint_manager.CheckpointInfo": "retention",
    "orbax.checkpoint:future.CommitFutureAwaitingContractedSignals": "writing in the background",
    "jax._src.distributed:global_state.client": "several processes",
    "threading:_register_atexit": "finishing a save when the script ends",
}


def _check_seams(model: keras.Model) -> None:
    missing = [f"keras.Model.{name}" for name in ("_initial_epoch", "_layers") if not hasattr(model, name)]
    missing += ["keras.Variable._value"] * any(not hasattr(each, "_value") for each in model.variables)
    for seam in _SEAMS:
        try:
            pkgutil.resolve_name(seam)
        except (ImportError, AttributeError):
            missing.append(seam.replace(":", "."))
    if missing:
        raise _untested(f"{', '.join(missing)} is gone")


def _untested(problem: str) -> RuntimeError:
    versions = f"Keras {keras.__version__}, JAX {jax.__version__}, Orbax {ocp.__version__}"
    return RuntimeError(
        f"{problem} ({versions}). This copy of orbax_keras_ckpt.py, version {__version__}, was tested with {_TESTED}. "
        "Nothing was changed or trained. Get a newer copy, or install versions that were tested."
    )


class _Fit(NamedTuple):
    """Local variables of the `fit` that is starting."""

    callbacks: keras.callbacks.CallbackList
    epoch_iterator: Any  # yields the batches to `fit`
    data: Any  # the argument x
    held_out: Any  # the x of the validation data
    epochs: int


def _locals_of_fit(frame: Any) -> dict[str, Any]:
    """The local variables of the frame if it is one of Keras's `fit`; else none. The frame keeps no copy of them."""
    if not {"epoch_iterator", "training_finished"}.issubset(frame.f_code.co_varnames):
        return {}
    names = dict(frame.f_locals)
    if isinstance(frame.f_locals, dict):  # before Python 3.13, a copy that would hold old states
        frame.f_locals.clear()
    return names


def _running_fit() -> dict[str, Any]:
    """The local variables of the innermost `fit` that is running; empty if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if names := _locals_of_fit(frame):
            return names
        frame = frame.f_back
    return {}


def _fit_around(callback: keras.callbacks.Callback) -> _Fit:
    """The `fit` that is calling the `on_train_begin` of a callback."""
    names = _running_fit()  # Keras passes a callback neither the other callbacks nor the data
    touched = ("_enumerate_iterator", "_current_iterator", "_steps_seen", "steps_per_epoch", "num_batches")
    if not all(hasattr(names.get("epoch_iterator"), name) for name in touched):
        raise _untested("This callback works inside the fit() of keras.Model, which is overridden here, or has changed")
    if callback not in names["callbacks"].callbacks:
        raise ValueError("Pass this callback to fit(callbacks=[...]) itself, not to another callback.")
    return _Fit(names["callbacks"], names["epoch_iterator"], names["x"], names.get("val_x"), names["epochs"])


def _watch_fit(model: keras.Model, fit: _Fit, batches: Callable, trained: Callable, ended: Callable) -> None:
    """Makes `fit` read the steps of an epoch, (first batch, ..., iterator), from `batches(Keras's own steps)`.

    Calls `trained()` after the last batch of each epoch, and `ended(is_complete)` when `fit` returns or raises.
    """
    own = fit.epoch_iterator._enumerate_iterator
    fit.epoch_iterator._enumerate_iterator = lambda: batches(own())
    # Keras calls no callback when fit raises, but it calls jax_state_sync() in both places, and nowhere else.
    sync, iterator, handled = model.jax_state_sync, fit.epoch_iterator, sys.exc_info()[1]

    def jax_state_sync() -> None:
        names = _locals_of_fit(sys._getframe(1))
        if names.get("epoch_iterator") is not iterator:
            return sync()
        try:
            sync()
        except BaseException:
            ended(False)
            raise
        if names["training_finished"] or sys.exc_info()[1] is not handled:
            return ended(names["training_finished"])
        return trained()

    vars(model)["jax_state_sync"] = jax_state_sync


def _unwatch_fit(model: keras.Model, earlier: Any) -> None:
    """Ends `_watch_fit`; `earlier` is the `jax_state_sync` that a `fit` around this one has set."""
    vars(model).pop("jax_state_sync", None)
    if earlier is not None:
        vars(model)["jax_state_sync"] = earlier
    model._initial_epoch = None


def _start_at_epoch(model: keras.Model, epoch: int) -> None:
    """Makes the `fit` that is about to loop start at `epoch`. Keras has no public way for a callback to do that."""

    class FirstEpoch(int):
        def __bool__(self) -> bool:  # fit takes `self._initial_epoch or initial_epoch`, and never resets it
            model._initial_epoch = None  # a callback may call fit again
            return True

    model._initial_epoch = FirstEpoch(epoch)


def _goes_on(fit: _Fit, iterator: Iterator) -> bool:
    """Whether the next epoch continues with this iterator over batches instead of a new one."""
    return fit.epoch_iterator.steps_per_epoch is not None and fit.epoch_iterator._current_iterator is iterator


def _count_as_seen(fit: _Fit, batches: int) -> None:
    """Tells Keras that its current iterator has already yielded so many batches in earlier epochs."""
    fit.epoch_iterator._steps_seen += batches


def _let_pass(model: keras.Model, fit: _Fit, logs: Any) -> Callable[[], None]:
    """Makes the next step of `fit` return `logs`, change nothing and call no callbacks. Returns the undo."""
    # If only the validation of an epoch is left, fit still needs the logs of its last step.
    callbacks, train_function = fit.callbacks, model.train_function

    def step(state: tuple, iterator: Iterator) -> tuple:
        return logs, state

    def undo(*args: Any, **kwargs: Any) -> None:
        if model.train_function is step:
            model.train_function = train_function
        for name in ("on_train_batch_begin", "on_train_batch_end"):
            vars(callbacks).pop(name, None)

    model.train_function = step
    callbacks.on_train_batch_begin, callbacks.on_train_batch_end = lambda batch, logs=None: None, undo
    return undo


def _are_averages_in(fit: _Fit, states: Iterable[bool] | None = None) -> list[bool]:
    """Whether each SwapEMAWeights of `fit` has the averages in the model; if given, sets that to `states` first."""
    swaps = [each for each in fit.callbacks.callbacks if isinstance(each, keras.callbacks.SwapEMAWeights)]
    for swap, state in zip(swaps, states or ()):
        swap._ema_weights_in_model = state
    return [swap._ema_weights_in_model for swap in swaps]


def _loads_early(fit: _Fit, iterator: Iterator, has_hooks: bool) -> bool:
    """Whether Keras loads batches of a PyDataset before the shuffle for their epoch."""
    if fit.epoch_iterator.data_adapter.enqueuer is not None:  # it has workers
        return has_hooks or fit.epoch_iterator.data_adapter.shuffle
    # Keras prefetches batches on accelerators, and in older versions everywhere.
    is_ahead = re.search("ahead|prefetch", getattr(iterator, "__name__", "")) is not None
    return has_hooks and is_ahead and fit.epoch_iterator.steps_per_epoch is not None


def _is_bucket(directory: epath.PathLike) -> bool:
    return str(directory).startswith("gs://")


def _uncached(bucket: epath.Path) -> None:
    """Disables gcsfs's listing cache: TensorStore and other processes write behind its back."""
    if hasattr(bucket._backend, "fs"):  # if TensorFlow is installed, etils uses it instead of gcsfs
        files = bucket._backend.fs(bucket)
        files.dircache.use_listings_cache = False
        files.invalidate_cache()


def _move(path: epath.Path, target: epath.Path) -> None:
    """Renames a committed step. If killed midway in a bucket, at least one of the two places has a complete copy."""
    if _is_bucket(path) and hasattr(path._backend, "fs"):  # a rename would copy and delete file by file
        path._backend.fs(path).copy(str(path), str(target), recursive=True)
        (path / _COMMITTED).unlink()
        path.rmtree()
    else:
        path.rename(target)


class _FlushedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary folder of a step, renamed only once all of it is flushed to disk; Orbax does not flush."""

    save = ""  # the id of the save that is about to begin: by mistake, another process may be saving the same step

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> "_FlushedPath":
        path: Any = super().from_final(final_path, **options)
        path._tmp_path = path._tmp_path.parent / f"{path._tmp_path.name}-{cls.save}"
        return path

    def finalize(self) -> Any:
        if self._checkpoint_metadata_store is None:  # an item inside a step
            return super().finalize()
        final: Any = self._final_path
        self._final_path: Any = final.parent / f"{self.get().name}-written"
        done = super().finalize()  # a coroutine since Orbax 0.11.2x
        return self._name_later(done, final) if inspect.isawaitable(done) else self._name(final)

    async def _name_later(self, done: Awaitable[None], final: epath.Path) -> None:
        await done
        self._name(final)

    def _name(self, final: epath.Path) -> None:
        written, self._final_path = self._final_path, final
        _flush(written)
        written.rename(final)
        _flush(final.parent, recursive=False)


class _Hooked(ocp.CheckpointManager):
    """Orbax's manager, with hooks into how it lists steps, ends commits, deletes steps and handles failed saves."""

    def _watch_deletions(self) -> None:
        if missing := [each for each in ("_checkpoint_deleter", "_finalize_thread") if not hasattr(self, each)]:
            raise _untested(f"orbax.checkpoint.CheckpointManager.{' and '.join(missing)} is gone")
        deleter: Any = self._checkpoint_deleter
        delete = deleter.delete

        def marked_delete(step: int) -> None:
            if self._unmark(step):
                delete(step)

        deleter.delete = marked_delete
        deleter.delete_steps = functools.partial(self._after_commit, delete=marked_delete)

    def _load_checkpoint_infos(self, skip_metadata_read: bool = False) -> list[Any]:
        # Orbax's own fails on one bad byte in any step, and globs in a path that may contain brackets.
        return [ocp.checkpoint_manager.CheckpointInfo(*each) for each in self._known_steps()]

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:  # in the background: others may be waiting for this process
            self._meetings.give_up(error)
            raise

    def _outlast(self) -> None:
        """Waits for the commit; before Python 3.13, Ctrl-C in `join` or `is_alive` makes a thread count as ended."""
        while self._finalize_thread.get() in threading.enumerate():
            time.sleep(0.005)

    def _settle(self) -> None:
        """Waits for the rest of a failed save; otherwise Orbax would raise its further errors at the next save."""
        with contextlib.suppress(Exception):
            super()._wait_for_checkpointers()


@functools.cache
def _before_threads_stop(function: Callable[[], None]) -> None:
    """Calls a function when the script ends, before Python stops the thread pools that a commit needs."""
    # atexit would run too late. What was registered first, by importing concurrent.futures.thread, is called last.
    vars(threading)["_register_atexit"](function)


@functools.cache
def _after_fork(function: Callable[[], None]) -> None:
    """Calls a function in each process that is forked from this one, before anything else runs there."""
    os.register_at_fork(after_in_child=function)


def _leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold, at any depth and in their order, which sets do not have."""
    parts, seen = [value], set()
    while parts:
        part = parts.pop()
        if not isinstance(part, (list, tuple, dict)):
            yield part
        elif id(part) not in seen:
            seen.add(id(part))
            parts += reversed([*(part.values() if isinstance(part, dict) else part)])


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all layers in it, outer ones first; in the same order for two models of one config."""
    found: dict[int, keras.layers.Layer] = {}

    def visit(layer: keras.layers.Layer) -> None:
        found[id(layer)] = layer
        tracked = {id(child) for child in layer._layers}
        own = {"layers": layer.layers} if isinstance(layer, keras.Sequential) else vars(layer)
        names = sorted(own.keys() - {"_layers"}, key=lambda name: (not name.startswith("_"), name))  # Keras's own first
        for child in _leaves([own[name] for name in names if tracked]):
            if id(child) in tracked and id(child) not in found:
                visit(child)

    visit(model)
    return list(found.values())


def _variables_in_order(model: keras.Model) -> list[keras.Variable]:
    """The variables of the model, layer by layer."""
    found: dict[int, keras.Variable] = {}
    for layer in _layers(model):
        inner = {id(each) for child in layer._layers for each in child.variables}
        found |= {id(each): each for each in layer.variables if id(each) not in inner}
    return list(found.values())


def _split(name: str, automatic: Iterable[str]) -> tuple[str, int]:
    """A name without the number that Keras gave it, and that number; any other name as it is, and 0."""
    stem, _, number = name.rpartition("_") if re.search(r"_\d+$", name) else (name, "", "0")
    return (stem, int(number)) if stem in automatic else (name, 0)


def _automatic_names(model: keras.Model) -> set[str]:
    """The names that Keras has made up for a model's parts, without their numbers."""
    optimizer = getattr(model, "optimizer", None)
    members = [each for layer in _layers(model) for each in (layer, *layer._layers)]  # also those that were replaced
    members += filter(None, [optimizer, getattr(optimizer, "inner_optimizer", None)])
    found = {"seed_generator", "variable"}
    for member in members:
        stem = keras.src.utils.naming.to_snake_case(type(member).__name__)
        stems = {stem, f"forward_{stem}", f"backward_{stem}"}  # the latter two from Bidirectional
        found |= stems & {_split(member.name, stems)[0]}
    return found


def _lost(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """Those that an aborted `fit` has left without values: not put back by Keras, or used up by a step."""
    return [each for each in variables if each._value is None or each._value.is_deleted()]


def _global_seed_generator() -> keras.random.SeedGenerator | None:
    """The generator behind `keras.random` calls without a seed; None before its first use."""
    return keras.src.backend.common.global_state.get_global_attribute("global_seed_generator")


def _set_global_seed_generator(generator: keras.random.SeedGenerator | None) -> None:
    """With None, Keras draws a new one from Python's `random` when it next needs it."""
    keras.src.backend.common.global_state.set_global_attribute("global_seed_generator", generator)


@contextlib.contextmanager
def _serialization(custom_objects: Mapping[str, Any] | None = None, safe_mode: bool = True) -> Iterator[None]:
    """A context in which Keras serializes as for its own files: an object that several layers share, only once."""
    library, names = keras.src.saving.serialization_lib, keras.saving.custom_object_scope(custom_objects or {})
    with library.ObjectSharingScope(), library.SafeModeScope(safe_mode), names:
        yield


def _rename(variable: keras.Variable, path: str) -> None:
    variable._path = path  # variables that Keras builds from a config have shorter paths than the original ones


def _metrics_of(model: keras.Model) -> dict[str, keras.metrics.Metric]:
    """The compiled metrics by name."""
    return {metric.name: metric for group in model.metrics for metric in getattr(group, "metrics", [group])}


def _direction(model: keras.Model, monitor: str) -> str | None:
    """Whether "min" or "max" is better, as Keras infers it from the compiled metrics; None if it cannot."""
    name = monitor.removeprefix("val_")
    direction: Any = getattr(_metrics_of(model).get(name), "_direction", None)
    return "min" if name == "loss" else {"up": "max", "down": "min"}.get(direction)


def _sharding_file(shardings: Mapping[str, jax.sharding.Sharding]) -> str:
    """The contents of the file `_sharding`, from which plain Orbax restores without being given shardings."""
    kinds = {
        jax.sharding.NamedSharding: ocp.metadata.NamedShardingMetadata,
        jax.sharding.SingleDeviceSharding: ocp.metadata.SingleDeviceShardingMetadata,
    }
    text = functools.cache(lambda each: kinds[type(each)].from_jax_sharding(each).to_serialized_string())
    known = {name: text(sharding) for name, sharding in shardings.items() if type(sharding) in kinds}
    return json.dumps({base64.urlsafe_b64encode(name.encode()).decode(): each for name, each in known.items()})


async def _created(info: Any) -> epath.Path:
    """The directory that an Orbax handler writes to; since 0.11.2x it is created in the background."""
    if hasattr(info, "await_path_creation"):
        await info.await_path_creation()
    return info.parent_dir


def _jax_owns_sigterm() -> bool:
    """Whether JAX catches SIGTERM for all processes: with jax.distributed, unless that is switched off."""
    return _jax_client() is not None and getattr(jax.config, "jax_enable_preemption_service", True)


def _jax_client() -> Any:
    """The client of jax.distributed, None without it."""
    return jax._src.distributed.global_state.client  # there is no public access


# ------------------------------------------------------------------------------------------- processes
# All processes save, restore and fall back together. Only process 0 prints, warns, renames and deletes.

_GATHERINGS = itertools.count()
_PATIENCE_MS = 3_600_000  # to wait for the slowest process; when one dies, JAX ends the others long before


def _gather(value: Any, name: str | None = None) -> list[Any]:
    """The JSON `value` of every process. All processes must call it, in the same order or with the same name."""
    if jax.process_count() == 1:
        return [value]
    # Not a collective: on CPUs, JAX may run two of them in different orders on different processes.
    client, process, number = _jax_client(), jax.process_index(), 0 if name else next(_GATHERINGS)
    place = f"{__name__}/{name or number}"  # other copies of this file may be loaded
    client.key_value_set(f"{place}/{process}", json.dumps(value))
    keys = [f"{place}/{each}" for each in range(jax.process_count())]
    values = [json.loads(client.blocking_key_value_get(key, _PATIENCE_MS)) for key in keys]
    if number:
        client.key_value_delete(f"{__name__}/{number - 1}/{process}")  # every process here has read it
    return values


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """A block that all processes leave together. If any of them raises inside, all raise the worst of the errors."""
    kinds, error = (CheckpointCorruptError, CheckpointMismatchError, CheckpointError), None
    try:
        yield
    except Exception as caught:
        if jax.process_count() == 1:
            raise
        error = caught
    level = -1 if error is None else next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), 2)
    outcomes = _gather([level, str(error) if isinstance(error, CheckpointError) else repr(error)])
    worst, text = max(outcomes, key=lambda outcome: outcome[0])
    if worst == level and error is not None:
        raise error
    if worst >= 0:
        raise kinds[worst](f"Process {outcomes.index([worst, text])}: {text}") from error


class _Meetings:
    """The barriers of a background save. When one process fails, the others stop waiting for it."""

    _PLACES = ("async_write_complete", "async_commit_complete")  # Orbax's two barriers before a commit

    def __init__(self):
        self.save, self._counts = "", collections.Counter()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's `barrier_sync_fn`."""
        place = next((place for place in self._PLACES if place in key), key)
        self._counts[self.save, place] += 1
        for process, failure in enumerate(_gather(None, f"{self.save}/{place}/{self._counts[self.save, place]}")):
            if failure is not None:
                raise CheckpointError(f"process {process} has failed: {failure}")

    def give_up(self, error: BaseException) -> None:
        """Tells the other processes that this one has failed."""
        for place in self._PLACES if jax.process_count() > 1 else ():
            with contextlib.suppress(Exception):  # if it has already been there
                key = f"{__name__}/{self.save}/{place}/1/{jax.process_index()}"
                _jax_client().key_value_set(key, json.dumps(f"{type(error).__name__}: {error}"))


def _warn(message: str) -> None:
    """Warns, on process 0 only."""
    if jax.process_index() == 0:
        warnings.warn(message, stacklevel=2)


# ------------------------------------------------------------------------------------------- variables

_nest = functools.partial(ocp.tree.from_flat_dict, sep="/")  # {"a/b": 1} as {"a": {"b": 1}}
_Variables = dict[str, dict[str, keras.Variable]]  # by group and path
_State = dict[str, dict[str, jax.Array]]  # their values


def _variables(model: keras.Model, optimizer: bool = True, metrics: bool = False) -> _Variables:
    """The model's variables, in its order. ValueError if it is not ready or paths are not unique."""
    if not model.built:
        raise ValueError(f"The model {model.name!r} has no variables yet. Call it on a batch of data first.")
    found: _Variables = {group: {each.path: each for each in getattr(model, group)} for group in _WEIGHTS}
    _check_paths([each.path for group in _WEIGHTS for each in getattr(model, group)])
    if optimizer:
        if not getattr(model, "compiled", False) or model.optimizer is None:
            raise ValueError(
                f"The model {model.name!r} is not compiled. Call model.compile() first; only "
                "restore_state(weights_only=True) works without."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        paths = _distinct([each.path for each in model.optimizer.variables])
        _check_paths(paths)
        found[_GROUPS[2]] = dict(zip(paths, model.optimizer.variables))
    if metrics:  # numbered: their paths need not be unique, and they do not outlive their epoch
        found[_GROUPS[3]] = {f"{number:04}": each for number, each in enumerate(model.metrics_variables)}
    return found


def _distinct(paths: list[str]) -> list[str]:
    """The paths, with numbers where several are equal: Keras's Adafactor names its variables alike."""
    counts = collections.Counter(paths)
    numbers = {path: itertools.count(1) for path in counts}
    return [f"{path}-{next(numbers[path])}-of-{counts[path]}" if counts[path] > 1 else path for path in paths]


def _check_paths(paths: list[str]) -> None:
    """Raises if two variables would collide in the state tree, or on disk, where "/" becomes "."."""
    names = collections.Counter(path.replace("/", ".") for path in paths)
    folders = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
    for path in paths:
        if names[path.replace("/", ".")] > 1 or path in folders:
            raise ValueError(
                f"Two of the model's variables have the path {path!r}, or one that differs only in '.' and '/'. Give "
                "them or their layers different names: by name=..., or by clone_function=... of clone_model."
            )


def _values(variables: Iterable[Iterable[keras.Variable]]) -> tuple[list[jax.Array], ...]:
    return tuple([variable.value for variable in members] for members in variables)


def _state(variables: _Variables, values: Iterable[Iterable[jax.Array]] | None = None) -> _State:
    """The values of variables; `values` are other ones in the same order."""
    values = values or _values(members.values() for members in variables.values())
    return {group: dict(zip(members, leaves)) for (group, members), leaves in zip(variables.items(), values)}


def _specs(state: _State) -> _Specs:
    # A variable may claim float64 while JAX uses 32 bits, so the dtype is taken from its value.
    return {
        group: [_Spec(path, tuple(value.shape), value.dtype.name) for path, value in members.items()]
        for group, members in state.items()
    }


def _tree(state: _State) -> dict[str, Any]:
    """The state tree, less empty arrays, which Orbax refuses; the record lists those too."""
    sized = {group: {path: value for path, value in members.items() if value.size} for group, members in state.items()}
    return {group: _nest(members) for group, members in sized.items()}


def _array_name(group: str, path: str) -> str:
    """The name of an array on disk."""
    return f"{group}/{path}".replace("/", ".")


def _arrays_of(variables: _Specs) -> dict[str, _Spec]:
    """The arrays on disk, by name."""
    named = {_array_name(group, spec.path): spec for group, members in variables.items() for spec in members}
    return {name: spec for name, spec in named.items() if math.prod(spec.shape)}


def _pair(live: Mapping, saved: Mapping, automatic: Iterable[str], is_ordered: bool) -> Iterator[tuple[Any, Any]]:
    """Pairs the leaves of two trees by name, up to Keras's own numbers; those without a counterpart with None.

    Keras counts up as layers are created, so names that differ only in its numbers are paired in the order of the
    numbers. If this changes the order in which they come (only looked at with `is_ordered`), or if one tree has more
    of them, the user has given some of the numbers, or the models differ: then they are paired by name alone.
    """
    families: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = collections.defaultdict(lambda: ({}, {}))
    for side, tree in enumerate((live, saved)):
        for name, child in tree.items():
            families[isinstance(child, dict), _split(name, automatic)[0]][side][name] = child
    for (is_folder, _), (here, there) in families.items():
        by_number = (sorted(names, key=lambda name: (_split(name, automatic)[1], name)) for names in (here, there))
        pairs: list[tuple[Any, Any]] = list(zip(*by_number))
        if len(here) != len(there) or (is_ordered and [*map(dict(pairs).get, here)] != [*there]):
            pairs = [(name, name) for name in here | there]
        for one, other in pairs:
            if is_folder:
                yield from _pair(here.get(one, {}), there.get(other, {}), automatic, is_ordered)
            else:
                yield here.get(one), there.get(other)


def _pair_variables(live: _Specs, saved: _Specs, automatic: set[str], is_ordered: bool) -> list[tuple[Any, Any]]:
    """Pairs of live and saved variables, each as (group, spec); None for a variable without a counterpart.

    A weight may have changed its group, if its layer was frozen or unfrozen in between.
    """

    def tree(specs: _Specs, groups: Iterable[str], name: Callable[[str], str] = str) -> Any:
        named: dict[str, Any] = {}
        for group in groups:
            for spec in specs.get(group, ()):
                path = name(spec.path)
                named[f"/{spec.path}" if path in named else path] = group, spec
        return _nest(named)

    trees = tree(live, _WEIGHTS), tree(saved, _WEIGHTS)
    weights = list(_pair(*trees, automatic, False))
    if is_ordered and all(one[0] == other[0] for one, other in weights if one and other):  # no layer was frozen since
        weights = list(_pair(*trees, automatic, True))
    paths = [(one[1].path, other[1].path if other else f"/{one[1].path}") for one, other in weights if one]
    flat = {one.replace("/", "_"): other.replace("/", "_") for one, other in paths}

    def as_saved(path: str) -> str:  # names of the optimizer's variables contain the paths of the weights
        folder, _, name = path.rpartition("/")
        cuts = (match.start() for match in reversed(list(re.finditer("_", name))))
        cut = next((cut for cut in cuts if name[:cut] in flat), None)
        return path if cut is None else f"{folder}/{flat[name[:cut]]}{name[cut:]}"

    return weights + list(_pair(tree(live, _GROUPS[2:], as_saved), tree(saved, _GROUPS[2:]), automatic, False))


def _train_state(model: keras.Model) -> tuple[list[keras.Variable], ...]:
    """All variables that training may change, grouped as `fit` passes them to the train function."""
    optimizer = model.optimizer.variables
    return model.trainable_variables, model.non_trainable_variables, optimizer, model.metrics_variables


def _references(groups: Iterable[Iterable[keras.Variable]]) -> list[weakref.ref]:
    return [weakref.ref(variable.value) for variable in itertools.chain(*groups)]


def _are_replaced(references: list[weakref.ref], groups: Iterable[Iterable[keras.Variable]]) -> bool:
    """Whether any variable has been assigned to since, on any process."""
    replaced = any(old() is not new.value for old, new in zip(references, itertools.chain(*groups), strict=True))
    return any(_gather(replaced))


def _learning_rate(model: keras.Model) -> float | None:
    """The learning rate; None if it is a schedule."""
    rate: Any = getattr(model.optimizer, "learning_rate", None)
    return float(rate.value) if isinstance(rate, keras.Variable) and rate.value is not None else None


@contextlib.contextmanager
def _revived(variables: _Variables) -> Iterator[bool]:
    """Gives zeros to lost variables, to be restored; raises unless they are. Yields whether there are any."""
    lost = _lost(itertools.chain(*(members.values() for members in variables.values())))
    for variable in lost:
        variable.assign(jax.numpy.zeros(variable.shape, variable.dtype))
    zeros = [variable.value for variable in lost]
    try:
        yield bool(lost)
        if any(variable.value is zero and zero.size for variable, zero in zip(lost, zeros)):
            raise CheckpointError(
                "The model has lost values in a fit that was aborted, and no checkpoint has been restored that has "
                "them. Build and compile the model anew."
            )
    except BaseException:
        for variable in lost:
            variable.value.delete()  # nobody is to train from zeros
        raise


def _derive(layers: Sequence[keras.layers.Layer]) -> None:
    """Recomputes what layers such as Normalization derive from their variables."""
    deriving = [layer for layer in layers if hasattr(layer, "finalize_state") and layer.variables]
    for layer in deriving:
        layer.finalize_state()
    for layer, name in itertools.product(layers if deriving else (), ("train", "test", "predict")):
        if getattr(layer, f"{name}_function", None) is not None:  # compiled with the old values
            getattr(layer, f"make_{name}_function")(force=True)


class _Source(NamedTuple):
    """A live variable and the saved variable that it is restored from."""

    name: str  # of the array on disk
    variable: keras.Variable
    saved: _Spec


def _is_float(dtype: str) -> bool:
    return jax.numpy.issubdtype(jax.numpy.dtype(dtype), np.inexact)


def _compare(
    model: keras.Model, variables: _Variables, saved: _Specs, strict: bool, is_ordered: bool
) -> tuple[list[_Source], list[str]]:
    """What to restore from where, and every difference in words; another dtype of the same kind is one if `strict`.

    `variables` belong to the model. `is_ordered` says that the saved ones come in their model's order.
    """
    sources: list[_Source] = []
    differences: list[str] = []
    saved = {group: saved.get(group, []) for group in variables}
    for one, other in _pair_variables(_specs(_state(variables)), saved, _automatic_names(model), is_ordered):
        (group, spec), (saved_group, was) = one or other, other or one
        if other is None:
            what = "is in the model but not in the checkpoint"
        elif one is None:
            what = "is in the checkpoint but not in the model"
        elif was.shape != spec.shape:
            what = f"was saved as {was.shape}, the model has {spec.shape}"
        elif was.dtype != spec.dtype and (strict or _is_float(was.dtype) != _is_float(spec.dtype)):
            what = f"was saved as {was.dtype}, the model has {spec.dtype}"
        else:
            sources.append(_Source(_array_name(saved_group, was.path), variables[group][spec.path], was))
            continue
        differences.append(f"{group}: {was.path!r} {what}")
    # Weights first: differences in the optimizer mostly follow from theirs.
    return sources, sorted(differences, key=lambda line: _GROUPS.index(line.partition(":")[0]))


def _listing(lines: list[str]) -> str:
    """The first ten lines as a list, and how many more there are."""
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "\n".join(f"  - {line}" for line in lines[:10] + more)


# ---------------------------------------------------------------------------------------- random state


def _random_state() -> dict[str, Any]:
    """The states of the global random generators: Python's, numpy's, Keras's, and torch's if it is imported."""
    generator = _global_seed_generator()
    version, internal, gauss = random.getstate()
    state = {
        "python": (version, np.array(internal, np.uint32), gauss),  # 625 numbers in JSON are slow
        "numpy": np.random.get_state(legacy=False),
        "keras": None if generator is None else np.array(generator.state.value),
    }
    if "torch" in sys.modules:
        state["torch"] = sys.modules["torch"].get_rng_state().numpy()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    np.random.set_state(state["numpy"])
    if (generator := state["keras"]) is not None:
        generator = _global_seed_generator() or keras.random.SeedGenerator(0)
        generator.state.assign(state["keras"])
    _set_global_seed_generator(generator)
    if "torch" in state and "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.from_numpy(state["torch"]))


# -------------------------------------------------------------------------------------- stateful objects

# Functions, classes and the like are not saved: the script sets them again.
_CODE: tuple[type, ...] = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)
_CODE += (np.ufunc, functools.partial, keras.optimizers.schedules.LearningRateSchedule)
_PLAIN = (bool, int, float, str, type(None), np.generic)
_ORDER_BYTES = 2**26  # a larger array of a dataset is taken for its data


def _state_methods(member: Any) -> tuple[Callable, Callable] | None:
    for get, put in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if hasattr(member, get) and hasattr(member, put):
            return getattr(member, get), getattr(member, put)
    return None


def _as_saved(value: Any) -> tuple[str, list[memoryview]] | None:
    """A value in the form in which it would be saved; None if it cannot be."""
    try:
        packed, arrays = _packed(value)
    except TypeError:
        return None
    return json.dumps(packed), [array.data for array in arrays]


# What the script set, by the id of the callback. One given to a second OrbaxCheckpointCallback has changed already.
_INITIAL: dict[int, dict[str, Any]] = {}


class _Stateful:
    """An object whose state is saved beside the model, and how that state is read and restored.

    For a callback without methods for it, the state is all attributes that differ from what the script set: a new value
    in the script wins.
    """

    _base: type = keras.callbacks.Callback

    def __init__(self, member: Any, place: str):
        self.name, self.member, self.place = type(member).__name__, member, place
        self.label = f"{place} ({self.name})"
        methods = _state_methods(member)
        if methods is None and not isinstance(member, self._base):
            raise TypeError(
                f"{self.label} has neither get_state and set_state, nor state_dict and load_state_dict, nor is it a "
                "Keras callback: its state cannot be saved. Leave it out, or give it these methods."
            )
        if isinstance(member, Iterable) and not isinstance(member, (keras.callbacks.Callback, keras.utils.PyDataset)):
            raise TypeError(
                f"{self.label} is a data iterator. Keras reads ahead of training, so its state is ahead of the batch "
                "trained next. Leave it out of stateful, and pass `checkpoint.resumable(iterator)` to fit."
            )
        has_slots = any(vars(kind).get("__slots__") for kind in type(member).__mro__)
        if methods is None and has_slots and isinstance(member, keras.callbacks.Callback):
            raise TypeError(f"{self.label} has __slots__, which are not saved. Give it get_state and set_state.")
        own: tuple[Callable, Callable] = self._changed, self._set_changed
        self.get, self._put = methods or own
        self._initial: dict[str, Any] = {}
        if methods is None:
            self._initial = self._script_values()
        elif not isinstance(member, self._base):  # which may only have a state once `fit` has begun
            self.copy()  # raises if the state cannot be saved

    def _script_values(self) -> dict[str, Any]:
        if id(self.member) not in _INITIAL:
            _INITIAL[id(self.member)] = self.copy()
            weakref.finalize(self.member, _INITIAL.pop, id(self.member))
        return _INITIAL[id(self.member)]

    def _is_state(self, value: Any) -> bool:
        return not isinstance(value, _CODE) or value in _OPERATIONS.values()

    def _changed(self) -> dict[str, Any]:
        changed, inherited = {}, vars(self._base())
        for name, value in vars(self.member).items():
            if name not in inherited and self._is_state(value):
                initial = self._initial.get(name, self)
                if type(value) is not type(initial) or _as_saved(value) != _as_saved(initial):
                    changed[name] = value
        return changed

    def _set_changed(self, changed: Mapping[str, Any]) -> None:
        attributes = vars(self.member)
        for name, value in (_copied(self._initial) | changed).items():
            if type(value) in _GENERATORS and type(attributes.get(name)) is type(value):
                get, put = _GENERATORS[type(value)]
                with contextlib.suppress(ValueError):  # of another bit generator
                    put(attributes[name], get(value))  # other objects may share it
                    continue
            attributes[name] = value

    def put(self, state: Any) -> None:
        self._put(_copied(state))

    def copy(self) -> Any:
        """A copy of the state. The TypeError for a state that cannot be saved names the attribute."""
        state = self.get()
        try:
            return _copied(state)
        except TypeError as error:
            items = state.items() if isinstance(state, dict) else ()
            what = ", ".join(f"attribute {name!r}" for name, value in items if _as_saved(value) is None) or "state"
            raise TypeError(f"The {what} of {self.label} cannot be saved: {error}. Leave the object out.") from error

    def hears_validation(self) -> bool:
        """Whether validation may change the state; not if it is a callback without hooks for it."""
        hooks = {name: hook for name, hook in vars(keras.callbacks.Callback).items() if name.startswith("on_test_")}
        return any(getattr(type(self.member), name, None) is not hook for name, hook in hooks.items())


# ------------------------------------------------------------------------------------------------ data


def _fingerprint(batch: Any) -> dict[str, Any]:
    """The shapes of a batch, and a checksum of the first elements of each array, as far as this process holds them."""
    shapes, parts, checksum = [], [], 0
    for leaf in jax.tree.leaves(batch):
        is_spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        shapes.append(list(np.shape(leaf)))
        own = [each for each in leaf.addressable_shards if not each.replica_id] if is_spread else []
        parts += [str(each.index) for each in own]
        for part in [each.data for each in own] if is_spread else [leaf]:
            if (array := np.asarray(part)).dtype != object:
                checksum = zlib.crc32(array.reshape(-1)[: 2**18].tobytes(), checksum)
    return {"shapes": shapes, "parts": parts, "checksum": checksum}


def _drawing(value: Any) -> list[Any]:
    """The states of the random generators in a value, also those in lists and dictionaries and of Keras layers."""
    states: list[Any] = []
    for leaf in _leaves(value):
        if type(leaf) in _GENERATORS:
            states.append(_GENERATORS[type(leaf)][0](leaf))
        elif isinstance(leaf, (keras.layers.Layer, keras.random.SeedGenerator)):
            held = leaf.variables if isinstance(leaf, keras.layers.Layer) else [leaf.state]
            states += [np.asarray(each.value) for each in held if "seed_generator_state" in each.path]
    return states


def _loader_generators(data: Any, place: str) -> list[_Stateful]:
    """The random generators of a torch DataLoader and of its samplers; none for other data."""
    if not hasattr(data, "collate_fn"):
        return []
    samplers = getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)
    found = {id(each): each for each in (getattr(owner, "generator", None) for owner in (data, *samplers))}
    generators = filter(_state_methods, found.values())
    return [_Stateful(generator, f"generator {number} of {place}") for number, generator in enumerate(generators)]


class _Resumable:
    """The batches of an iterator or loader, and its state before each batch not yet trained on."""

    def __init__(self, data: Any):
        methods = _state_methods(data)
        if methods is None or not hasattr(data, "__iter__"):
            raise TypeError(
                f"resumable({type(data).__name__}): give an iterator with get_state and set_state (Grain: "
                "iter(dataset)) or with state_dict and load_state_dict, or a loader that has these (torchdata's "
                "StatefulDataLoader)."
            )
        self.data, (self._get, self._put) = data, methods
        self.generators = _loader_generators(data, "the data")  # torchdata does not save them
        self._beginning = self._now() if hasattr(data, "__next__") else None
        self._iterator: Any = None
        self._states: collections.deque[Any] = collections.deque()  # before each of the last batches drawn
        self.drawn = self.first = 0  # the number of batches drawn, and that before this fit
        self.stale = 0  # batches that Keras read before the data was rewound and still holds
        self.generator = self._batches()

    def _now(self) -> tuple[Any, list[Any]]:
        """The states of the data and of its random generators."""
        return copy.deepcopy(self._get()), [each.copy() for each in self.generators]

    def _batches(self) -> Iterator[Any]:
        is_empty = False
        while True:
            if self._iterator is None:
                self._iterator = iter(self.data)
            state = self._now()
            if (batch := next(self._iterator, None)) is not None:
                self._states.append(state)
                self.drawn += 1
                yield batch
            elif is_empty:
                raise ValueError(f"resumable({type(self.data).__name__}): it is empty, or used up. Make it anew.")
            else:
                self._restart(self._beginning)
            is_empty = batch is None

    def _restart(self, state: Any) -> None:
        if state is not None:
            self._put(copy.deepcopy(state[0]))
        self._iterator = iter(self.data)  # only then does a loader apply the state
        own = state[1] if state is not None else []
        if own and len(own) != len(self.generators):
            _warn("The loader has other random generators than when it was saved: the order of the data will differ.")
        for generator, each in zip(self.generators, own):
            generator.put(each)

    def begin(self, saved: Any) -> None:
        """Called when `fit` begins: sets the data to the saved state, or to its beginning."""
        if saved is not None or self.first:  # else it is there already, and a restart may draw random numbers
            self._beginning, state = saved or (self._beginning, self._beginning)
            self._restart(state)
            self._states.clear()
            self.stale, self.first = self.drawn - self.first, self.drawn

    def end(self) -> None:
        self.first = self.drawn

    def forget(self, trained: int) -> int:
        """Drops the states before batches already trained on. Returns the number of the batch after the first state."""
        while self._states and self.drawn - len(self._states) < self.first + trained:
            self._states.popleft()
        return self.drawn - len(self._states) - self.first

    def state(self, trained: int) -> tuple[Any, Any]:
        """The state at the beginning, and the one before the first batch not yet trained on."""
        if (given := self.forget(trained)) != trained:
            raise ValueError(
                f"fit has trained on {trained} batches, but resumable({type(self.data).__name__}) has given only "
                f"{given}. Pass its generator to fit, one batch per step."
            )
        return self._beginning, self._states[0] if self._states else self._now()


class _Dataset(_Stateful):
    """The PyDataset of a `fit`. Its state is all that may determine the order of its data, plain values if changed."""

    _base = keras.utils.PyDataset

    def __init__(self, dataset: keras.utils.PyDataset, place: str):
        names = "on_epoch_begin", "on_epoch_end"
        self.hooks = [n for n in names if getattr(getattr(dataset, n), "__func__", None) is not getattr(self._base, n)]
        super().__init__(dataset, place)
        self._marks = {} if _state_methods(dataset) else self._unsaved()

    def _script_values(self) -> dict[str, Any]:
        return {name: value for name, value in self.copy().items() if isinstance(value, _PLAIN)}

    def _is_state(self, value: Any) -> bool:
        if type(value) in _PLAIN or _is_key(value):
            return True
        if not self.hooks and not isinstance(value, (np.generic, *_GENERATORS)):
            return False  # nothing shuffles: it is taken for the data
        if isinstance(value, (np.ndarray, jax.Array)):
            return value.ndim < 2 and value.nbytes <= _ORDER_BYTES and _as_saved(value.reshape(-1)[:1]) is not None
        if type(value) in (list, tuple, set, dict):
            return all(map(self._is_state, [*value, *value.values()] if isinstance(value, dict) else value))
        return _as_saved(value) is not None

    def _unsaved(self) -> dict[str, Any]:
        """The attributes that an epoch may change but that are not saved, and what tells whether it has, or None."""
        marks: dict[str, Any] = {}
        for name, value in vars(self.member).items():
            if name in self.hooks or self._is_state(value):
                continue
            if isinstance(value, (np.ndarray, jax.Array)):
                marks[name] = zlib.crc32(np.asarray(value[:64] if value.ndim else value).tobytes())
            elif states := _drawing(value):
                marks[name] = _as_saved(states)
            elif self.hooks and not isinstance(value, (*_CODE, keras.layers.Layer)):
                marks[name] = None
        return marks

    def compare(self) -> None:
        """Called when an epoch ends. After the first, warns of attributes that are not saved and may have changed."""
        marks, self._marks = self._marks, {}
        now = self._unsaved() if marks else {}
        if changed := [name for name, mark in now.items() if mark is None or mark != marks.get(name, mark)]:
            hooks = f" in {' and '.join(self.hooks)}" if self.hooks else ""
            _warn(
                f"{self.name} has, or may have, changed attributes{hooks} that are not saved: {', '.join(changed)}. A "
                "resumed run may then see other data. Give the dataset get_state and set_state."
            )


# ---------------------------------------------------------------------------------------------- arrays
# On disk they are in Orbax's format, plus a checksum (CRC-32C) of each chunk and the id of the save. Orbax itself takes
# 0.9 ms of Python to write an array and 1.2 ms to read it; TensorStore, which it builds on, takes 0.1 ms.

# Sizes tuned on two cores. Chunks are read in parallel, files are written in parallel.
_CHUNK_BYTES = 8 * 2**20
_FILE_BYTES = 32 * 2**20
_WRITING_BYTES = 16 * _FILE_BYTES  # handed to TensorStore and not yet on disk: a slow disk must not fill the memory
_READERS = 4  # arrays at a time
_WRITING = {
    "target_data_file_size": _FILE_BYTES,
    "assume_config": True,
    "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"},
}
_CACHES = {"cache_pool#ocdbt": {"total_bytes_limit": 10**8}}


def _kvstore(directory: epath.Path, name: str) -> dict[str, Any]:
    """The TensorStore spec of the key-value store of an array in an Orbax directory."""
    base = {"driver": "file", "path": f"{directory}/"}
    if _is_bucket(directory):  # as a URL it would be unquoted
        base = dict(zip(("driver", "bucket", "path"), ("gcs", *base["path"].removeprefix("gs://").split("/", 1))))
    return {"driver": "ocdbt", "base": base, "path": name, "cache_pool": "cache_pool#ocdbt"}


def _on_host(arrays: list[jax.Array]) -> list[np.ndarray]:
    """The values of arrays, each on one device, in the memory of the host."""
    if jax.default_backend() != "cpu":
        try:  # a GPU copies into pinned memory 15 times as fast, and JAX keeps that memory for the next save
            pinned = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
            arrays = jax.block_until_ready(jax.device_put(arrays, pinned, may_alias=False))
        except (jax.errors.JaxRuntimeError, ValueError):  # too little of it is free, or there is none
            for array in arrays:
                array.copy_to_host_async()
    # Views of pinned memory and of that of the CPU. What numpy refers to is not reused, even if the array is donated.
    return [np.asarray(array) for array in arrays]


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Writes the arrays of a tree."""

    def __init__(self, compression: bool = False):
        super().__init__(array_metadata_store=None)
        zstd = [{"name": "zstd", "configuration": {"level": 1}}] if compression else []
        self.save = ""  # the id of the save that is about to begin
        self.expected: dict[str, _Spec] | None = None  # the arrays to check for before the commit, if any
        self._codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *zstd, {"name": "crc32c"}]

    async def serialize(self, values: Sequence[jax.Array], infos: Sequence[Any], args: Any = None) -> list:
        """Copies the values to the host; they are written in the background."""
        shards = [[shard for shard in array.addressable_shards if shard.replica_id == 0] for array in values]
        copies = iter(_on_host([shard.data for shard in itertools.chain(*shards)]))
        parts = [[(shard.index, next(copies)) for shard in own] for own in shards]
        specs = {info.name: self._spec(array) for info, array in zip(infos, values)}
        shardings = {info.name: array.sharding for info, array in zip(infos, values)}
        writing = self._write(infos[0], specs, shardings, parts)
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="arrays")]

    def _spec(self, array: jax.Array) -> dict[str, Any]:
        """The TensorStore spec of an array, less its place. No chunk crosses the edge of a shard."""
        shard, axis = array.sharding.shard_shape(array.shape), 0
        chunk = list(shard)
        while math.prod(chunk) * array.dtype.itemsize > _CHUNK_BYTES and axis < len(chunk):
            is_sharded = shard[axis] < array.shape[axis]
            if chunk[axis] == 1 or (is_sharded and chunk[axis] % 2):
                axis += 1
            else:
                chunk[axis] = -(-chunk[axis] // 2)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        metadata = {"shape": array.shape, "chunk_grid": grid, "codecs": self._codecs, "attributes": {"save": self.save}}
        spec = {"driver": "zarr3", "dtype": array.dtype.name, "metadata": metadata}
        return spec | {"store_data_equal_to_fill_value": True}  # so that a missing chunk always means damage

    async def _write(self, info: Any, specs: dict, shardings: dict, parts: list) -> None:
        directory, process = await _created(info), jax.process_index()
        # Each of several processes writes its own database, and finalize() merges them. A single one writes in place.
        base = directory / f"ocdbt.process_{process}" if jax.process_count() > 1 else directory
        places = [spec | {"kvstore": _kvstore(base, name) | _WRITING} for name, spec in specs.items()]
        stores = [ts.open(spec, create=True, open=True, context=info.ts_context) for spec in places]
        writing: collections.deque[tuple[int, Any]] = collections.deque()
        free = _WRITING_BYTES
        for store, shards in zip(stores, parts):
            for index, values in shards:
                while writing and free < values.nbytes:
                    size, write = writing.popleft()
                    write.result()
                    free += size
                write = store.result()[index].write(values, can_reference_source_data_indefinitely=True)
                writing.append((values.nbytes, write))
                free -= values.nbytes
        for _, write in writing:
            write.result()
        if process == 0:
            (directory / "_sharding").write_text(_sharding_file(shardings))

    def finalize(self, directory: epath.Path) -> None:
        """Before the commit: merges what several processes have written, and checks the first save of a run."""
        if parts := [path for path in _entries(directory) if path.name.startswith("ocdbt.process_")]:
            context = ts.Context(_CACHES)  # TensorStore copies only between stores of one context
            specs = [_kvstore(place, "") | _WRITING for place in (directory, *parts)]
            target, *sources = [ts.KvStore.open(spec, context=context).result() for spec in specs]
            transaction = ts.Transaction(atomic=True)
            for source in sources:
                source.experimental_copy_range_to(target.with_transaction(transaction)).result()
            transaction.commit_sync()
        if self.expected is not None and directory.name.startswith("default"):
            _open_arrays(directory, self.expected, self.save)


def _tree_handler(arrays: _ArrayHandler) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, writing arrays with `arrays`."""
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)
    handler.finalize = arrays.finalize  # Orbax would record the name of a subclass, and no other tool could read it
    return handler


def _tree_paths(directory: epath.Path) -> dict[str, str]:
    """The paths of the arrays in an Orbax tree, by their names on disk."""
    tree = json.loads((directory / "_METADATA").read_text())["tree_metadata"]
    leaves = [leaf for leaf in tree.values() if not leaf["value_metadata"].get("skip_deserialize")]
    paths = ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
    return {path.replace("/", "."): path for path in paths}


def _open_arrays(directory: epath.Path, expected: Mapping[str, _Spec | None], save: str | None) -> list[ts.TensorStore]:
    """Opens arrays written by the save of that id, or, with None, by Orbax. ValueError if one is not as expected."""
    driver = "zarr3" if save or json.loads((directory / "_METADATA").read_text()).get("use_zarr3") else "zarr"
    context, spec = ts.Context(_CACHES), {"driver": driver, "fill_missing_data_reads": False}
    specs = [spec | {"kvstore": _kvstore(directory, name)} for name in expected]
    opening = [ts.open(spec, open=True, read=True, context=context) for spec in specs]
    stores = [store.result() for store in opening]
    if not _tree_paths(directory).keys() >= expected.keys():
        raise ValueError("_METADATA does not list the arrays that were saved")
    for store, (name, known) in zip(stores, expected.items()):
        if store.spec().to_json()["metadata"].get("attributes", {}).get("save") != save:
            raise ValueError(f"files of two saves are mixed, or the record is lost: {name!r} is of another save")
        if known is not None and (store.shape, store.dtype.name) != known[1:]:
            raise ValueError(f"{name!r} is {store.dtype.name}{store.shape}, which is not what was saved")
    return stores


def _read_arrays(directory: epath.Path, sources: Sequence[_Source], save: str | None) -> list[jax.Array]:
    """Reads arrays straight into the shardings of the variables. ValueError if a checksum differs."""

    def read(store: ts.TensorStore, source: _Source) -> jax.Array:
        part = functools.cache(lambda *bounds: store[tuple(slice(*each) for each in bounds)].read().result())
        return jax.make_array_from_callback(
            store.shape,
            source.variable.value.sharding,
            lambda index: part(*((each.start, each.stop) for each in index or ())),
        )

    stores = _open_arrays(directory, {source.name: source.saved for source in sources}, save)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, stores, sources))


# Large state that belongs to the processes rather than to the model: the item "run" has one row of bytes per process, a
# zip archive of value.json and the arrays that it refers to. The archive of process 0 also holds the model's assets.

_SMALL_BYTES_OF_JSON = 2**16


def _archive(packed: Any, arrays: Sequence[np.ndarray], assets: Mapping[str, bytes]) -> np.ndarray:
    """The row of this process in the item "run"."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("value.json", json.dumps(packed))
        for number, array in enumerate(arrays):
            archive.writestr(f"arrays/{number}", array.data)
        for name, content in assets.items():
            archive.writestr(f"assets/{name}", content)
    return np.frombuffer(target.getbuffer(), np.uint8)


def _rows(row: np.ndarray) -> tuple[jax.Array, list[int]]:
    """The rows of all processes as one array, and their lengths without padding."""
    lengths, devices = _gather(len(row)), jax.devices()
    if len(row) < max(lengths):
        row = np.pad(row, (0, max(lengths) - len(row)))
    if jax.process_count() == 1:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave out the CPU
            devices = jax.devices("cpu")
    first = {device.process_index: device for device in reversed(devices)}
    mesh = jax.sharding.Mesh([first[process] for process in sorted(first)], "process")
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("process"))
    return jax.make_array_from_process_local_data(by_row, row[None]), lengths


def _read_archive(path: epath.Path, record: _Record, process: int = 0) -> zipfile.ZipFile:
    """The archive of a process in the item "run". ValueError if it is damaged."""
    assert record.run is not None
    [store] = _open_arrays(path / "run", {"rows": None}, record.save)
    row = store[process, : record.run[process]].read().result()
    return zipfile.ZipFile(io.BytesIO(row.data))


def _read_own(path: epath.Path, record: _Record) -> Any:
    """The state that this process saved; that of process 0, if the number of processes has changed."""
    if record.run is None:
        return _unpack(record.own)
    archive = _read_archive(path, record, jax.process_index() if jax.process_count() == record.processes else 0)
    names = [name for name in archive.namelist() if name.startswith("arrays/")]  # in their order
    arrays = [np.frombuffer(archive.read(name), np.uint8) for name in names]
    return _unpack(json.loads(archive.read("value.json")), arrays)


# --------------------------------------------------------------------------------- reading a directory
# Everything here depends only on the directory as it is now. While others write to it, a step may vanish at any time,
# its commit marker first.

_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"  # marks a step in a bucket as committed
_STEP = re.compile(
    r"(?:(?P<prefix>.+)_)?(?P<step>\d+)(?:(?P<replaced>\.replaced)|(?P<temporary>\.orbax-checkpoint-tmp.*))?"
)
_ENTRIES = (_METADATA, _COMMITTED, "default", "run", "metrics", "pytree", "model_config")  # the last two are Keras's
_PART = re.compile(  # the files in a step
    rf"({'|'.join(_ENTRIES[:2])})|({'|'.join(_ENTRIES[2:])})/({_COMMITTED}|_METADATA|_sharding|manifest\.ocdbt|"
    r"_strings\.json|metrics|(d|array_metadatas|ocdbt\.process_\d+)/.*)"
)


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What is in a directory. In a bucket, empty directories do not exist."""
    return [] if _is_bucket(directory) and not directory.exists() else list(directory.iterdir())


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    """All files in a directory and below."""
    for path in _entries(directory):
        yield from _files(path) if path.is_dir() else [path]


def _is_committed(path: epath.Path) -> bool:
    return (path / (_COMMITTED if _is_bucket(path) else _METADATA)).exists()


def _unmark(path: epath.Path) -> None:
    """Deletes the commit marker of a step, atomically: what is left of the folder no longer counts as a step."""
    for name in (_COMMITTED, _METADATA) if _is_bucket(path) else (_METADATA, _COMMITTED):  # as _is_committed looks
        (path / name).unlink(missing_ok=True)


def _is_step(path: epath.Path) -> bool:
    """Whether a folder is a step, or holds nothing but parts of one; any other is the user's own."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted meanwhile, or a file
        if _is_committed(path):
            return True
        is_known = all(each.name in _ENTRIES for each in _entries(path))
        return is_known and all(_PART.fullmatch(file.relative_to(path).as_posix()) for file in _files(path))
    return False


def _folders(directory: epath.Path, prefix: Any) -> tuple[dict, dict, dict, list]:
    """Folders by step: committed, without metadata, being replaced; and those of saves in progress, or killed."""
    found = [(path, match) for path in _entries(directory) if (match := _STEP.fullmatch(path.name))]
    committed = {path for path, match in found if not match["temporary"] and _is_committed(path)}
    if prefix is ...:  # any prefix: plain numbers first
        prefixes = {match["prefix"] for path, match in found if path in committed}
        prefix = None if None in prefixes else min(prefixes, default=None)
    folders: tuple[dict, dict, dict, list] = {}, {}, {}, []
    steps, bare, replaced, temporary = folders
    for path, match in found:
        step, is_committed = int(match["step"]), path in committed
        if match["prefix"] != prefix or not (match["temporary"] or is_committed or _is_step(path)):
            continue
        if match["temporary"] or (_is_bucket(path) and not is_committed):
            temporary.append((step, path))  # in a bucket, Orbax does not rename on commit, but adds a file at the end
        else:
            kind = replaced if match["replaced"] else steps if is_committed else bare
            kind[step] = path
    return folders


def _steps(directory: epath.Path, prefix: Any = ...) -> dict[int, epath.Path]:
    """The steps in a directory and their folders; with any prefix, if none is given.

    A snapshot that is being replaced counts until its successor is committed. A folder without metadata is a damaged
    step if it is above all committed ones, or else what a deletion left behind.
    """
    steps, bare, replaced, _ = _folders(directory, prefix)
    damaged = {step: path for step, path in bare.items() if step > max(steps, default=-1)}
    return damaged | replaced | steps


def _nothing_in(directory: epath.Path) -> str:
    """An error message: the directory holds no steps, but one nearby does."""
    is_there, near = directory.exists(), []
    text = f"There is no checkpoint in {directory}{'' if is_there else ': no such file or directory'}."
    with contextlib.suppress(Exception):  # of a bucket, of any kind: this is only a hint
        for above in list(directory.parents)[:2]:
            if (step := directory.relative_to(above).parts[0]).isdecimal() and int(step) in _folders(above, ...)[0]:
                return f"{text} Give the directory {above} and step={step} instead."
        below = (_entries(directory) if is_there else []) or _entries(directory.parent)
        near = sorted(str(path) for path in below[:100] if path.is_dir() and _folders(path, ...)[0])
    return text + (f" There are some in: {', '.join(near[:5])}." if near else "")


def _remove_leftovers(directory: epath.Path, prefix: Any) -> None:
    """Removes what killed saves and deletions left at or below the newest step, and replaced snapshots."""
    steps, bare, replaced, temporary = _folders(directory, prefix)
    for step, path in [*temporary, *bare.items(), *replaced.items()]:
        if step <= max(steps, default=-1):
            path.rmtree(missing_ok=True)


def _set_aside(path: epath.Path, ending: str) -> str:
    """Renames a step, so that its number can be saved again. Returns the new name."""
    names = itertools.chain([f"{path.name}{ending}"], (f"{path.name}{ending}-{n}" for n in itertools.count(2)))
    name = next(name for name in names if not (path.parent / name).exists())
    _move(path, path.parent / name)
    if not _is_bucket(path):
        _flush(path.parent, recursive=False)
    return name


def _flush(folder: epath.Path, recursive: bool = True) -> None:
    """Flushes a folder, or a file, and everything in it to disk."""
    for path in _entries(folder) if recursive else ():
        _flush(path, path.is_dir())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The status codes of TensorStore's errors that are about content, not about reaching the store.
_CONTENT = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


def _is_damage(error: Exception) -> bool:
    """Whether an error in reading a step is about its content: a checksum, a parse error, a missing file, a shape."""
    if type(error) is ValueError and (status := re.match("([A-Z_]+): ", str(error))):
        return status[1] in _CONTENT
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError, zipfile.BadZipFile)
    return isinstance(error, (*missing, ValueError, LookupError, TypeError, AttributeError, OverflowError))


@contextlib.contextmanager
def _reading(step: int, path: epath.Path) -> Iterator[None]:
    """Converts errors about content to CheckpointCorruptError; those about the store become or stay OSErrors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = str(error).split(" [tensorstore_spec")[0].strip()[:500]
        if _is_damage(error) and (_is_bucket(path) or path.parent.exists()):
            what = f"is damaged: {type(error).__name__}: {text}"
            raise CheckpointCorruptError(f"Step {step} in {path.parent} {what}") from error
        if type(error) is ValueError:  # of TensorStore
            raise OSError(errno.EIO, f"Step {step} in {path.parent} cannot be read: {text}") from error
        raise


def _read_record(step: int, path: epath.Path) -> _Record | None:
    """The record of a step; None if another tool wrote it. CheckpointCorruptError if it is damaged."""
    with _reading(step, path):
        return _Record.from_metadata(json.loads((path / _METADATA).read_text()))


def _array_folder(path: epath.Path) -> epath.Path:
    """The folder of a step's arrays, which `keras.callbacks.OrbaxCheckpoint` calls "pytree"."""
    return path / ("pytree" if (path / "pytree").exists() else "default")


def _saved_variables(path: epath.Path, record: _Record | None) -> _Specs:
    """The variables in a step; if another tool wrote it, those that its arrays are named after."""
    if record:
        return record.variables
    paths = _tree_paths(folder := _array_folder(path))
    variables: dict[str, list[_Spec]] = {group: [] for group in _GROUPS[:3]}
    for each, store in zip(paths.values(), _open_arrays(folder, dict.fromkeys(paths), None)):
        group, _, rest = each.partition("/")
        if group in variables:
            variables[group].append(_Spec(rest, store.shape, store.dtype.name))
    return variables


def _rated(metrics: Mapping[str, float], name: Any) -> float:
    """The metric of that name, or the value of a user's function of the metrics; NaN if a metric is missing."""
    score: Any = name if callable(name) else lambda found: found.get(name, math.nan)
    try:
        return score(metrics)
    except LookupError as error:
        _warn(f"best_fn raises {error!r} for the metrics of a checkpoint, which therefore counts as the worst.")
        return math.nan


def _best(records: Mapping[int, _Record], monitored: Sequence[Any] | None = None) -> int | None:
    """The best step by a metric, or a function of the metrics, and "min" or "max"; by default as the newest names."""
    monitored = monitored or (records[max(records)].monitor if records else None)
    if monitored is None:
        return None
    name, mode = monitored
    values = {step: _rated(record.metrics, name) for step, record in records.items() if record.metrics}
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    return (max if mode == "max" else min)(sorted(values, reverse=True), key=values.__getitem__, default=None)


def _records(steps: Mapping[int, epath.Path]) -> dict[int, _Record]:
    """The records of those steps that have one and can be read."""
    records = {}
    for step, path in steps.items():
        with contextlib.suppress(CheckpointError):
            if (record := _read_record(step, path)) is not None:
                records[step] = record
    return records


def _no_such_step(step: int | str, directory: epath.Path, steps: Iterable[int]) -> FileNotFoundError:
    return FileNotFoundError(f"There is no checkpoint of step {step!r} in {directory}. Steps there: {sorted(steps)}.")


class _Restored(NamedTuple):
    step: int | None
    record: _Record | None  # None if another tool wrote the checkpoint
    own: Any  # the state that this process saved
    model: Any = None


# The model that a step is restored into, its variables, and reasons to refuse the step besides those.
_Target = tuple[keras.Model, _Variables, list[str]]


@dataclasses.dataclass
class _Restore:
    """A restore from a directory: which steps, into what, and how. With `sets_aside`, damaged steps are renamed."""

    directory: epath.Path
    prefix: Any
    target_of: Callable[[int, _Record | None, epath.Path], _Target]  # of a step; its errors propagate
    strict: bool = True
    donate: bool = False
    own: bool = True
    sets_aside: bool = False
    best_step: Callable[[], int | None] | None = None

    def run(self, step: int | str | None) -> _Restored | None:
        """Restores `step`, or the newest intact one. Returns None if the directory has no steps."""
        damaged: dict[epath.Path, Exception] = {}
        for candidate, path in self._candidates(step).items():
            before = self._identity(candidate)
            try:
                restored = self._one(candidate, path)
            except (CheckpointCorruptError, CheckpointMismatchError) as error:
                is_damage = isinstance(error, CheckpointCorruptError)
                if is_damage and any(_gather(before is None or self._identity(candidate) != before)):
                    return self.run(step)  # a run in progress has deleted or replaced it since it was listed
                if step is not None or not (is_damage or damaged):
                    raise
                damaged[path] = error  # also a mismatch, when newer steps are damaged
            else:
                self._report(damaged, candidate)
                damaged.clear()  # errors refer to this frame: a cycle that would keep the callers' variables alive
                return restored
        if not damaged:
            return None
        raise CheckpointCorruptError(
            f"No checkpoint in {self.directory} is intact. Nothing was moved or deleted"
            + ("" if self.donate else ", and the model is as it was")
            + f":\n{_listing([str(error).replace('Nothing was changed. ', '') for error in damaged.values()])}"
        ) from next(iter(damaged.values()))

    def _candidates(self, step: int | str | None) -> dict[int, epath.Path]:
        """The folder of `step`, or those of all steps, newest first. Raises if the processes see different steps."""
        with _agreed():
            steps = _steps(self.directory, self.prefix)
        seen = _gather(sorted(steps))
        if any(each != seen[0] for each in seen):
            what = f"The processes see different steps in {self.directory}: {'; '.join(map(str, seen))}."
            raise CheckpointError(f"{what} Nothing was changed. Give a directory that all processes share.")
        if step is None:
            return dict(sorted(steps.items(), reverse=True))
        if not steps:
            raise FileNotFoundError(_nothing_in(self.directory))
        if step == "best":
            step = _gather(self.best_step() if self.best_step else _best(_records(steps)))[0]
            if step is None:
                raise CheckpointError(
                    f"No checkpoint in {self.directory} is known as the best: there is none, or the monitored metric "
                    "is missing or NaN, or monitor=... was not given. Give the number of a step."
                )
        if not isinstance(step, numbers.Integral) or isinstance(step, bool) or step not in steps:
            raise _no_such_step(step, self.directory, steps)
        return {int(step): steps[int(step)]}

    def _identity(self, step: int) -> Any:
        """What distinguishes this step from a later one with the same number; None if it is gone."""
        path = _steps(self.directory, self.prefix).get(step)
        try:
            return path and (path.name, (path / _METADATA).read_bytes())
        except OSError as error:
            return error.errno

    def _one(self, step: int, path: epath.Path) -> _Restored:
        """Checks, reads, verifies and assigns a step. CheckpointCorruptError if it is damaged."""
        with _agreed():
            record = _read_record(step, path)
            with _reading(step, path):
                saved = _saved_variables(path, record)
            model, variables, problems = self.target_of(step, record, path)
            sources, differences = _compare(model, variables, saved, self.strict, record is not None)
            with _reading(step, path):
                differences += _other_assets(model, path, record)
            if problems or (differences and self.strict):
                self._refuse(step, differences, problems)
        sources = [source for source in sources if source.variable.value.size]  # Orbax has no empty arrays
        for source in sources if self.donate else ():
            source.variable.value.delete()
        with _agreed(), _reading(step, path):
            arrays = _read_arrays(_array_folder(path), sources, record.save if record else None)
            own = _read_own(path, record) if self.own and record else None
        if differences:
            _warn(f"Step {step} was restored partially. Skipped:\n{_listing(differences)}")
        for source, array in zip(sources, arrays):
            source.variable.assign(array)
        _derive(_layers(model))
        return _Restored(step, record, own, model)

    def _refuse(self, step: int, differences: list[str], problems: list[str]) -> None:
        """Raises for a checkpoint that differs from the model or from the run."""
        of, way = "of KerasOrbaxCheckpointManager.restore_state", "Build the model as it was saved"
        what, hint = "does not match the model", f"The argument strict=False {of} restores what matches."
        if not differences:
            what, way, hint = "cannot be continued", "Use the same data and settings as before", ""
        elif all(line.startswith(_GROUPS[2]) for line in differences):
            what, way = "has the model's weights, but other optimizer variables", "Compile and freeze as in that run"
            hint = f"The argument weights_only=True {of}, or compile=False of load_model, restores the weights alone."
        raise CheckpointMismatchError(
            f"Step {step} in {self.directory} {what}:\n{_listing(problems + differences)}\n"
            f"Nothing was changed. {way}, or use another directory. {hint}".rstrip()
        )

    def _report(self, damaged: Mapping[epath.Path, Exception], intact: int) -> None:
        """Warns of damaged steps, and sets them aside if asked to; nothing is deleted."""
        if not damaged:
            return
        names, aside = [], ""
        with _agreed():
            for path in damaged if self.sets_aside and jax.process_index() == 0 else ():
                try:
                    names.append(_set_aside(path, ".damaged"))
                except OSError as error:  # deleted meanwhile, or another user's
                    aside += f" {path.name} cannot be renamed: {error.strerror}."
        aside += f" They are set aside as {', '.join(names)}." if names else ""
        reasons = _listing([str(error) for error in damaged.values()])
        _warn(f"Step {intact} is restored, because newer ones are damaged.{aside}\n{reasons}")


def _verify(path: epath.Path, record: _Record | None) -> None:
    """Reads everything in a step; a terminal shows progress. ValueError if anything is damaged."""
    arrays = _arrays_of(_saved_variables(path, record))
    stores = _open_arrays(_array_folder(path), arrays, record.save if record else None)
    progress = keras.utils.Progbar(len(stores), unit_name="array", verbose=int(sys.stdout.isatty()))
    for store in stores:
        store.read().result()
        progress.add(1)
    if record and record.run:
        for process in range(record.processes):
            _read_archive(path, record, process)


# ---------------------------------------------------------------------------------------------- models


def _described(model: keras.Model) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The model as Keras's JSON, and its assets; or, if it cannot be serialized, the error."""
    try:
        with _serialization(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lambdas: load_model() refuses them
            config: Any = keras.saving.serialize_keras_object(model)
            # All of these are missing from the configs of enclosing layers.
            config["dtype_policy"] = keras.saving.serialize_keras_object(model.dtype_policy)
            config["layers"] = [[layer.trainable, _lora(layer)] for layer in _layers(model)]
            config["variables"] = [[variable.path, variable.trainable] for variable in _variables_in_order(model)]
            return json.loads(json.dumps(config)), _saved_assets(model)
    except CheckpointError:
        raise
    except Exception as error:  # a user's get_config() may raise anything; the save continues without a config
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, {}


def _lora(layer: keras.layers.Layer) -> dict[str, Any]:
    """Rank and alpha of a layer's LoRA; empty if it is not enabled. Keras's own files do not restore alpha."""
    is_enabled = getattr(layer, "lora_enabled", False)
    return {"rank": layer.lora_rank, "alpha": layer.lora_alpha} if is_enabled else {}


def _saved_assets(model: keras.Model) -> dict[str, bytes]:
    """The assets of the layers, such as vocabularies: file contents by the layer's place and the file's name."""
    assets: dict[str, bytes] = {}
    for place, layer in enumerate(_layers(model)):
        if hasattr(layer, "save_assets"):
            with contextlib.ExitStack() as stack:
                try:
                    folder = stack.enter_context(tempfile.TemporaryDirectory())
                except OSError as error:
                    what = f"the assets of the layer {layer.name!r} need a place for temporary files"
                    raise CheckpointError(f"Nothing was changed: {what} ({error}). Set TMPDIR to one.") from error
                layer.save_assets(folder)
                files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
                assets |= {f"{place}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}
    return assets


def _other_assets(model: keras.Model, path: epath.Path, record: _Record | None) -> list[str]:
    """What differs between the assets of a model and the saved ones, in words."""
    try:
        live = _saved_assets(model) if record and record.run else {}
    except CheckpointError:
        raise
    except Exception:  # from a user's save_assets(): then no assets were saved either
        live = {}
    if not live or record is None:
        return []
    saved = {member.filename: member.CRC for member in _read_archive(path, record).infolist()}
    other = {name.split("/")[0] for name, file in live.items() if zlib.crc32(file) != saved.get(f"assets/{name}")}
    names = [layer.name for place, layer in enumerate(_layers(model)) if str(place) in other]
    return [f"assets: those of layer {name!r}, such as a vocabulary, differ from the saved ones" for name in names]


def _rebuilt(record: _Record, archive: zipfile.ZipFile | None, compile: bool, **scope: Any) -> keras.Model:
    """The model rebuilt from its config, whose variables have the saved paths but not yet the saved values."""
    earlier = keras.config.dtype_policy()
    with _serialization(**scope), contextlib.ExitStack() as stack:
        stack.callback(keras.config.set_dtype_policy, earlier)  # it decides whether compile() scales the loss
        keras.config.set_dtype_policy(keras.saving.deserialize_keras_object(record.model["dtype_policy"]))
        model = keras.saving.deserialize_keras_object({**record.model, "compile_config": None})
        layers, saved_layers = _layers(model), record.model["layers"]
        if len(layers) != len(saved_layers):
            raise ValueError(f"The model built from its config has {len(layers)} layers, not {len(saved_layers)}.")
        for layer, (is_trainable, lora) in zip(layers, saved_layers):
            if lora and not layer.lora_enabled:
                layer.enable_lora(lora["rank"])
            if lora:
                layer.lora_alpha = lora["alpha"]
            if layer.trainable != is_trainable:
                layer.trainable = is_trainable
        # The layers come in the same order; variables within a layer may not, but have the same names.
        live = sorted(_variables_in_order(model), key=lambda variable: _last_name(variable.path))
        saved = sorted(record.model["variables"], key=lambda variable: _last_name(variable[0]))
        if [_last_name(variable.path) for variable in live] == [_last_name(path) for path, _ in saved]:
            for variable, (path, is_trainable) in zip(live, saved):
                variable.trainable = is_trainable
                _rename(variable, path)
        if compile and record.model.get("compile_config"):
            model.compile_from_config(record.model["compile_config"])
    if archive:  # outside safe mode, as in Keras: these are files
        with tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("assets/")])
            for place, layer in enumerate(layers):
                if os.path.isdir(path := os.path.join(folder, "assets", str(place))):
                    layer.load_assets(path)
    return model


def _last_name(path: str) -> str:
    """The name of a variable in its layer, without the number if Keras has made it up."""
    return _split(path.rpartition("/")[2], ("variable",))[0]


def _connections(config: Mapping[str, Any]) -> int:
    """The number of tensors that layers pass to each other in a model's config."""
    return json.dumps(config).count('"keras_history"')


def _loadable(step: int, record: _Record | None, path: epath.Path, compile: bool, **scope: Any) -> _Target:
    """The model of a step, rebuilt from its config, and its variables. CheckpointError if that cannot be done."""
    problem = "another tool wrote it" if record is None else record.model.get("error")
    if record is not None and problem is None:
        connections = _connections(record.model)
        with _reading(step, path):
            archive = _read_archive(path, record) if record.run else None
        try:
            model = _rebuilt(record, archive, compile, **scope)
            has_optimizer = compile and getattr(model, "optimizer", None) is not None
            variables = _variables(model, has_optimizer) if model.built else {}
        except Exception as error:
            error.add_note(
                "Pass custom classes and functions in custom_objects={name: ...}, or compile=False if only loss or "
                "metrics are custom; or build the model as its script does, and restore it by "
                "KerasOrbaxCheckpointManager.restore_state()."
            )
            raise
        with contextlib.suppress(Exception), _serialization():  # from a user's get_config()
            rebuilt: Any = keras.saving.serialize_keras_object(model)
            if _connections(rebuilt) != connections:
                problem = "Keras loses calls of layers that a nested model shares with the model around it"
        if not model.built:
            problem = "it does not say for which shapes to build the model, see keras.Model.get_build_config()"
        if problem is None:
            return model, variables, []
    raise CheckpointError(
        f"Step {step} in {path.parent} cannot be loaded without its code: {problem}. Build the model as its script "
        "does, then call KerasOrbaxCheckpointManager.restore_state()."
    )


def _unsaved_state(model: keras.Model) -> list[str]:
    """Names of layers whose own `save_own_variables` saves more than their variables."""
    names = []
    for layer in _layers(model):
        # Keras's own layers may save variables in another form. StringLookup has none, but saves its tf_idf weights.
        if not layer.variables or not layer.save_own_variables.__module__.startswith(("keras.", "keras_hub.")):
            stored: dict[str, Any] = {}
            layer.save_own_variables(stored)
            known = [np.asarray(variable.value) for variable in layer.variables]
            if any(not any(np.array_equal(value, each) for each in known) for value in stored.values()):
                names.append(layer.name)
    return names


# --------------------------------------------------------------------------------------------- manager


def _check_backend() -> None:
    if keras.config.backend() != "jax":
        raise ValueError(
            f"orbax_keras_ckpt needs Keras's JAX backend; the backend is {keras.config.backend()!r}. "
            'Set os.environ["KERAS_BACKEND"] = "jax" before the first import of keras.'
        )


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _check(name: str, value: Any, is_valid: Any, wanted: str) -> None:
    """Raises for the argument of that name, unless it is valid."""
    if not is_valid:
        raise ValueError(f"{name}={value!r}: give {wanted}.")


_OURS = ("max_to_keep", "step_name_format", "temporary_path_class", "prevent_write_metrics", "lightweight_initialize")
_COUNTS = ("save_interval_steps", "keep_period", "step_format_fixed_length")
_ELSEWHERE = {  # arguments of other callbacks, and what to use here instead
    "filepath": "The directory is checkpoint_dir.",
    "save_best_only": "Give monitor='val_loss' and max_to_keep=1: the best checkpoint is kept, and the newest.",
    "save_weights_only": "All of the state is saved; restore_state(weights_only=True) restores the weights alone.",
}


def _check_keywords(of: type, given: Iterable[str]) -> None:
    """Raises for keywords that neither the public class `of` nor Orbax knows, with suggestions."""
    own = [name for each in (of, KerasOrbaxCheckpointManager) for name in inspect.signature(each).parameters]
    known = {field.name for field in dataclasses.fields(ocp.CheckpointManagerOptions)}.difference(_OURS)
    lines = []
    for name in sorted(set(given) - known - set(own)):
        near = [each for names in (own, known) for each in difflib.get_close_matches(name, names, n=1)]
        meant = _ELSEWHERE.get(name) or (f"Did you mean {near[0]!r}?" if near else "See its docstring.")
        lines.append(f"{of.__name__} has no argument {name!r}. {meant}")
    if lines:
        raise TypeError("\n".join(lines))


def _check_arguments(model: Any, max_to_keep: Any, steps_per_epoch: Any, monitor: Any, mode: Any, options: Any) -> None:
    _check("model", model, isinstance(model, keras.Model), "a keras.Model")
    is_limit = max_to_keep is None or _is_count(max_to_keep)
    _check("max_to_keep", max_to_keep, is_limit, "a number of checkpoints, 1 or more, or None to keep all")
    _check("steps_per_epoch", steps_per_epoch, _is_count(steps_per_epoch), "a number of steps, 1 or more")
    is_name = monitor is None or (isinstance(monitor, str) and monitor)
    _check("monitor", monitor, is_name, "the name of a metric, as in the logs of fit, or None")
    _check("mode", mode, mode in ("auto", "min", "max"), '"min", "max" or "auto"')
    _check_keywords(KerasOrbaxCheckpointManager, options)
    checks: dict[str, tuple[Callable[[Any], Any], str]] = {
        **dict.fromkeys(_COUNTS, (_is_count, "a number, 1 or more")),
        "step_prefix": (lambda value: isinstance(value, str) and re.fullmatch("[^/]+", value), "a name without '/'"),
        "best_fn": (callable, "a function of the metrics"),
        "keep_time_interval": (lambda value: isinstance(value, datetime.timedelta), "a datetime.timedelta"),
    }
    for name in options.keys() & checks.keys():
        is_valid, wanted = checks[name]
        _check(name, options[name], is_valid(options[name]), wanted)
    if monitor is not None and (clash := sorted(options.keys() & {"best_fn", "best_mode", "preservation_policy"})):
        raise ValueError(f"monitor={monitor!r} and {', '.join(clash)} both say what to keep. Give one of them.")


def _directory_at(checkpoint_dir: str | os.PathLike) -> epath.Path:
    """The absolute path of a directory, or the URL of one in a bucket. ValueError for anything else."""
    path = os.fspath(checkpoint_dir) if isinstance(checkpoint_dir, (str, os.PathLike)) else ""
    is_path = path and isinstance(path, str)
    _check("checkpoint_dir", checkpoint_dir, is_path, "the path of a directory, as str or path-like")
    _check("checkpoint_dir", path, "\\" not in path, "another path: TensorStore takes a backslash for '/'")
    if not re.match(r"\w+:/", path):
        return epath.Path(os.path.abspath(os.path.expanduser(path)))
    wanted = "a local path, such as that of a mounted bucket; of URLs only gs://bucket/path, as str or epath.Path"
    _check("checkpoint_dir", path, re.match("gs://[^/]+/[^/]", path), wanted)  # Orbax writes to no other
    return epath.Path(path)


def _usable_directory(checkpoint_dir: str | os.PathLike, writes: bool = False, creates: bool = False) -> epath.Path:
    """The path of a directory that can be read and, if asked for, written to."""
    directory = _directory_at(checkpoint_dir)
    around = [directory, *(each for each in [*directory.parents][:2] if _STEP.fullmatch(each.name))]
    advice = "Choose another directory, or, to restore only, a manager with read_only=True"
    try:
        if _is_bucket(directory):
            advice = "Install gcsfs; check credentials and the permission to list, read, write and delete objects there"
            _uncached(directory)
        if is_in_step := writes and any(map(_is_committed, around)):
            pass  # refused below
        elif not writes:
            _entries(directory)
        elif _is_bucket(directory):  # by gcsfs, which Orbax uses, and by TensorStore
            probe = directory / f"{uuid.uuid4().hex}.orbax-keras-ckpt"
            probe.write_text("")
            del ts.KvStore.open(_kvstore(directory, "")["base"]).result()[probe.name]
        else:
            if creates:
                os.makedirs(directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except Exception as error:  # in a bucket, from any of the libraries involved
        if not writes and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(_nothing_in(directory)) from None
        if os.path.isfile(directory):
            advice = "It is a file. Give a directory of checkpoints; keras.saving.load_model() reads .keras files"
        problem = f"checkpoint_dir={str(directory)!r} cannot be reached or written to ({error!r})"
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"{problem}. {advice}") from error
    _check("checkpoint_dir", str(directory), not is_in_step, "another one: this is, or is in, a step, to be deleted")
    return directory


def _check_is_shared(directory: epath.Path) -> None:
    """Raises unless all processes see what process 0 writes to a directory."""
    probe = directory / f"{_gather(uuid.uuid4().hex)[0]}.orbax-keras-ckpt"
    with _agreed():
        if jax.process_index() == 0:
            probe.write_text("")
    is_there = False
    with _agreed():
        for _ in range(100):  # a network file system may lag
            if is_there := probe.exists():
                break
            time.sleep(0.1)
    is_seen = _gather(is_there)
    if jax.process_index() == 0:
        probe.unlink()
    if not all(is_seen):
        raise CheckpointError(
            f"checkpoint_dir={str(directory)!r}: give a directory that all processes share. Process "
            f"{is_seen.index(False)} does not see what process 0 writes to this one."
        )


_SAVING: dict[Any, tuple[int, str]] = {}  # managers of this process with a save in progress: its step and id
_FAILED: dict[Any, Exception] = {}  # managers whose save has failed, until they raise that
_LOCK = threading.RLock()  # saves that are asked for in several threads take turns


def _wait_for_saves(directory: epath.Path | None = None, besides: Any = None) -> None:
    """Waits for other managers' saves, in a directory or anywhere. A failed one is raised by its own manager."""
    for manager in [each for each in list(_SAVING) if each is not besides]:
        if directory is None or os.path.realpath(manager.directory) == os.path.realpath(directory):
            try:
                manager.wait_until_finished()
            except Exception as error:
                _FAILED[manager] = error


def _finish_saves() -> None:
    """Waits for all saves when the script ends, and prints their errors: there is no caller left to raise to."""
    _wait_for_saves()
    for error in _FAILED.values():
        sys.excepthook(type(error), error, error.__traceback__)


def _forget_saves() -> None:
    """In a forked process: the threads that hold the lock and write the saves do not exist there."""
    global _LOCK
    _LOCK = threading.RLock()
    _SAVING.clear()
    _FAILED.clear()


class KerasOrbaxCheckpointManager(_Hooked):
    """Saves and restores the state of a Keras model with Orbax.

    Subclass of `orbax.checkpoint.CheckpointManager`, with its methods: `all_steps`, `latest_step`,
    `wait_until_finished`, `close` and so on.

    Example:

    >>> manager = KerasOrbaxCheckpointManager(model, "/tmp/ckpt", max_to_keep=3)
    >>> manager.save_state(0)  # epoch 0 is complete
    True
    >>> manager.restore_state()
    0

    Args:
        model: The `keras.Model`, on the JAX backend.
        checkpoint_dir: Directory of the checkpoints, `str` or path-like; relative paths and `~` work, and
            `gs://bucket/path`. Created if missing. All processes must share it.
        max_to_keep: How many of the newest checkpoints to keep, None for all. Defaults to 5.
        steps_per_epoch: The checkpoint of epoch `e` (from 0) is step `e * steps_per_epoch`. Defaults to 1.
        monitor: Name of a metric given to `save_state`. Keeps the `max_to_keep` best checkpoints by this
            metric, and always the newest. Defaults to None.
        mode: Whether lower (`"min"`) or higher (`"max"`) is better; `"auto"` takes it from the model's metrics.
            Defaults to `"auto"`.
        compression: Whether to compress with zstd: about 8 % less space for float weights, about twice the
            time to save. Defaults to False.
        **kwargs: Fields of `orbax.checkpoint.CheckpointManagerOptions`, such as `keep_period`; a few are refused.
            `enable_async_checkpointing=False` makes every save wait until it is on disk. With
            `preservation_policy`, `max_to_keep` is ignored. With `best_fn`, the newest is kept as well.

    Raises:
        ValueError: An argument is invalid, or Keras's backend is not JAX.
        TypeError: A keyword is neither an argument of this class nor an Orbax option.
        OSError: The directory cannot be reached or written to.
        CheckpointError: The processes do not share the directory.
        RuntimeError: A private attribute that this file uses is missing in this version of Keras, Orbax or JAX.
    """

    def __init__(
        self, model: keras.Model, checkpoint_dir: str | os.PathLike,
        max_to_keep: int | None = 5, steps_per_epoch: int = 1, *,
        monitor: str | None = None, mode: str = "auto", compression: bool = False, **kwargs: Any,
    ):
        """Opens the directory, and creates it if it is missing."""
        _check_backend()
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # the default of Orbax's options
        _check_arguments(model, max_to_keep, steps_per_epoch, monitor, mode, kwargs)
        trash = kwargs.get("todelete_full_path")
        _check("todelete_full_path", trash, not trash or _is_bucket(checkpoint_dir), "todelete_subdir outside buckets")
        _check_seams(model)
        number = None if "preservation_policy" in kwargs else max_to_keep
        given = ocp.CheckpointManagerOptions(max_to_keep=number, **kwargs)
        with _agreed():
            directory = _usable_directory(checkpoint_dir, not given.read_only, given.create)
        if jax.process_count() > 1 and not given.read_only:
            _check_is_shared(directory)
        self._model, self._steps_per_epoch = model, int(steps_per_epoch)
        self._monitor, self._mode = monitor, mode
        self._given, self._prefix = given, given.step_prefix
        self._unrated: Any = {} if monitor else None  # ranks as the worst; best_fn is not called without metrics
        self._description: Any = None  # of the model, before it is saved
        self._fitting = False  # while True, the callback asks JAX for signals
        self._known: dict[epath.Path, Any] = {}  # what retention needs to know of each step
        self._meetings, self._arrays = _Meetings(), _ArrayHandler(compression)
        handlers = {item: _tree_handler(self._arrays) for item in ("default", "run")}
        _wait_for_saves(directory)  # Orbax's cleanup_tmp_directories would delete them
        super().__init__(directory, item_handlers=handlers, options=self._options_for(directory))
        self._watch_deletions()

    def _options_for(self, directory: epath.Path) -> ocp.CheckpointManagerOptions:
        """The given options, changed to what this class needs."""
        # Creating folders in the background is racy in Orbax 0.11.20. If they cannot be created, threads wait for
        # them for minutes, even when the process exits.
        waiting = self._given.async_options or ocp.AsyncOptions(create_directories_asynchronously=False)
        if jax.process_count() > 1 and waiting.barrier_sync_fn is None:
            waiting = dataclasses.replace(waiting, barrier_sync_fn=self._meetings)
        return dataclasses.replace(
            self._given,
            async_options=waiting,
            # Never in the foreground: when one process fails there, the others wait for it in a collective.
            enable_async_checkpointing=True,
            enable_background_delete=False,  # a save deletes in the background anyway
            prevent_write_metrics=True,
            temporary_path_class=None if _is_bucket(directory) else _FlushedPath,
            **self._retention(),
        )

    def _retention(self) -> dict[str, Any]:
        """The options that say what is kept, where the given ones do not."""
        given, policies = self._given, ocp.checkpoint_managers
        if given.preservation_policy or not (self._monitor or given.best_fn):
            return {}
        # Orbax's own best_fn with max_to_keep would delete the newest step if it is not among the best.
        keeps = given.keep_checkpoints_without_metrics
        best = policies.BestN(get_metric_fn=self._score, n=given.max_to_keep, keep_checkpoints_without_metrics=keeps)
        kept: list[Any] = [policies.LatestN(1), best]
        if given.keep_period:
            kept.append(policies.EveryNSteps(given.keep_period))
        if given.keep_time_interval:
            kept.append(policies.EveryNSeconds(math.ceil(given.keep_time_interval.total_seconds())))
        replaced = dict.fromkeys(("max_to_keep", "keep_period", "keep_time_interval"))
        return {"preservation_policy": policies.AnyPreservationPolicy(kept), **replaced}

    def _score(self, metrics: Mapping[str, float]) -> float:
        """The score of a checkpoint: higher is better, NaN and missing metrics are worst."""
        name, mode = self._best_by() or ("", "max")
        value = _rated(metrics, name)
        return -math.inf if math.isnan(value) else value if mode == "max" else -value

    def _best_by(self) -> Any:
        """What decides which checkpoint is best, and "min" or "max"; None if that is not given."""
        given = self._given
        return self._monitored() or ((given.best_fn, given.best_mode) if given.best_fn else None)

    def _monitored(self) -> list[str] | None:
        """The monitored metric, and "min" or "max"; None without `monitor`."""
        if self._monitor is None:
            return None
        if self._mode == "auto":
            self._mode = _direction(self._model, self._monitor) or "auto"
        if self._mode == "auto":  # before its first fit, the model does not know its metrics
            saved = [record.monitor for _, record in sorted(_records(self._committed()).items()) if record.monitor]
            self._mode = dict(saved).get(self._monitor, "auto")  # as the newest that names it
        if self._mode == "auto":
            raise ValueError(
                f'mode="auto": the model\'s metrics do not say whether a high or a low {self._monitor!r} is better. '
                f'They are: {", ".join(_metrics_of(self._model))}. Check the name, or give mode="max" or mode="min".'
            )
        return [self._monitor, self._mode]

    def _committed(self) -> dict[int, epath.Path]:
        return _folders(self.directory, self._prefix)[0] if self.directory.exists() else {}

    def latest_step(self) -> int | None:
        """The newest step, on disk or still being saved; None if there is none."""
        return max([*self._committed(), *_SAVING.get(self, ())[:1]], default=None)

    def best_step(self) -> int | None:
        """The best step by `monitor`, `best_fn` or what the newest checkpoint monitored; None if there is none."""
        return _best(_records(_steps(self.directory, self._prefix)), self._best_by())

    def is_saving_in_progress(self) -> bool:
        """Whether a save is being written."""
        return self in _SAVING and super().is_saving_in_progress()

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics saved with a step; None if another tool wrote it."""
        steps = _steps(self.directory, self._prefix)
        if step not in steps:
            raise _no_such_step(step, self.directory, steps)
        return getattr(_read_record(step, steps[step]), "metrics", None)

    def _known_steps(self) -> list[tuple[int, datetime.datetime, dict[str, float] | None]]:
        """For Orbax: the committed steps, when they were committed, and their metrics."""
        steps = sorted(self._committed().items())
        self._known = {path: self._known.get(path) or self._known_step(step, path) for step, path in steps}
        return list(self._known.values())

    def _known_step(self, step: int, path: epath.Path) -> tuple[int, datetime.datetime, dict[str, float] | None]:
        nanoseconds, metrics = 0, {}
        with contextlib.suppress(Exception):  # from any damage, which is reported on restore
            metadata = json.loads((path / _METADATA).read_text())
            nanoseconds = metadata.get("commit_timestamp_nsecs") or 0
            if record := _Record.from_metadata(metadata):
                metrics = record.metrics
        return step, datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC), metrics or self._unrated

    def _unmark(self, step: int) -> bool:
        """Removes the commit marker of a step that is about to be deleted, so that it never looks like half a step.

        Returns False for a symbolic link, which alone is deleted: the step belongs to another directory.
        """
        path = self._committed().get(step)
        if path is None or jax.process_index() != 0:
            return True
        if os.path.islink(path):
            path.unlink()
            return False
        if not (self._given.todelete_subdir or self._given.todelete_full_path):
            _unmark(path)
        return True

    def reached_preemption(self, step: int) -> bool:
        """As in Orbax, but False while `fit` runs with OrbaxCheckpointCallback, which asks JAX itself."""
        # JAX's processes agree on a call number, one above the highest so far. Orbax would ask with other numbers.
        return not self._fitting and super().reached_preemption(step)

    def _after_commit(self, outdated: Sequence[int], delete: Callable[[int], None]) -> None:
        """Called by Orbax after each commit, in the background, with the steps that are no longer kept."""
        if jax.process_index() == 0:
            work = [functools.partial(delete, step) for step in outdated]
            for action in [*work, functools.partial(_remove_leftovers, self.directory, self._prefix)]:
                try:
                    action()
                except OSError as error:  # the new step is committed: this must not fail its save
                    _warn(f"An old checkpoint in {self.directory} could not be deleted: {error}")

    def delete(self, step: int) -> None:
        """Deletes a step, once saves in progress are committed."""
        self.wait_until_finished()
        super().delete(step)

    def _prepare(self) -> None:
        """Raises early what a save would raise later, and serializes the model while its variables have values."""
        if jax.process_count() > 1:
            leaves = jax.tree.leaves(_state(_variables(self._model)))
            if any(value.is_fully_addressable for value in leaves):  # each process would overwrite the others' arrays
                raise ValueError(
                    f"There are {jax.process_count()} processes, but the model {self._model.name!r} has variables that "
                    "are not distributed. Call keras.distribution.set_distribution() before the model is built."
                )
        self._monitored()
        is_first, self._description = self._description is None, _described(self._model)
        if is_first and (names := _unsaved_state(self._model)):
            _warn(
                f"The layers {', '.join(map(repr, names))} have a save_own_variables() that saves more than their "
                "variables. That is not in the checkpoint: keep it in variables, made by add_weight().",
            )

    def save(self, *args: Any, **kwargs: Any) -> bool:
        """Refused, because what it saves has no record. Use `save_state()`."""
        raise NotImplementedError("Use save_state(): save() of Orbax would save a step that has no record.")

    def save_state(self, epoch: int, *, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts saving the model in the background, after a completed epoch.

        Args:
            epoch: The completed epoch, counted from 0; the step is `epoch * steps_per_epoch`.
            metrics: The epoch's logs, saved with the checkpoint; with `monitor`, they decide which
                checkpoints are kept. Defaults to None.

        Returns:
            True if a save was started, False if Orbax's options (such as `save_interval_steps`) skip this step.

        Raises:
            ValueError: The step is not above the newest one, an argument is invalid, or the model is not compiled or
                not built.
            CheckpointError: This save, or the previous one in the background, has failed; the message says
                which.
            OSError: The directory cannot be read.
        """
        _check("epoch", epoch, _is_count(epoch, least=0), "the number of a completed epoch, 0 or more")
        is_logs = metrics is None or isinstance(metrics, Mapping)
        _check("metrics", metrics, is_logs, "a dictionary of numbers, such as the logs of an epoch")
        if self._given.read_only:
            return False
        self._model.jax_state_sync()  # within fit, by another callback
        with _agreed():
            self._prepare()  # the model may have been recompiled
        started = self._save(int(epoch) * self._steps_per_epoch, _Position(int(epoch) + 1), metrics or {})
        if (3, 12) <= sys.version_info < (3, 12, 3):  # these start no threads at exit, but a commit needs some
            self.wait_until_finished()
        return started

    def _save(
        self, step: int, position: _Position, metrics: Mapping[str, Any] | None, *,
        values: Sequence[list[jax.Array]] | None = None, own: Any = None, force: bool = False, replaces: bool = False,
        **notes: Any,
    ) -> bool:
        """Starts to save everything as `step`. Returns False if Orbax's options skip that step.

        `metrics` are the epoch's logs, None inside an epoch; `values` those of all variables, if not the model's own;
        `own` is the state of this process, as for `_packed`; `replaces` says that the newest step may give way; `notes`
        are further fields of the record.
        """
        with _LOCK:
            _wait_for_saves(self.directory, besides=self)
            self._make_room(step, replaces)
            if not force and not self.should_save(step):
                return False
            self.wait_until_finished()
            self.reload()
            state = _state(_variables(self._model, metrics=values is not None), values)
            where, items = self._own_of(own)
            record = _Record(
                save=_gather(uuid.uuid4().hex)[0],
                position=position,
                variables=_specs(state),
                metrics=self._numbers(metrics, step),
                monitor=self._monitored(),
                model=self._description[0],
                **where,
                **notes,
            )
            self._begin(step, record, {**items, "default": _tree(state)})
            if not self._given.enable_async_checkpointing:
                self.wait_until_finished()
            return True

    def _own_of(self, own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the state of this process is saved: fields of the record, and, if it is large, the item "run"."""
        assets = self._description[1] if jax.process_index() == 0 else {}
        with _agreed():
            packed, arrays = _packed(own)
            is_small = not assets and not arrays and len(json.dumps(packed)) < _SMALL_BYTES_OF_JSON
            if jax.process_count() == 1 and is_small:
                return {"own": packed, "run": None}, {}
            archive = _archive(packed, arrays, assets)
        rows, lengths = _rows(archive)
        return {"own": None, "run": lengths}, {"run": {"rows": rows}}

    def _begin(self, step: int, record: _Record, items: Mapping[str, Any]) -> None:
        """Hands a save to Orbax, which continues it in the background."""
        self._arrays.save = self._meetings.save = _FlushedPath.save = record.save
        self._arrays.expected = None if self._known else _arrays_of(record.variables)
        try:
            _before_threads_stop(_finish_saves)
            _after_fork(_forget_saves)
            super().save(
                step,
                args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree) for item, tree in items.items()}),
                metrics=record.metrics or self._unrated,
                custom_metadata=record.to_metadata(),
                force=True,
            )
        except Exception as error:
            self._meetings.give_up(error)
            self._end_failed(error, step, record.save)
        except BaseException:  # Ctrl-C: whatever has begun comes to its end
            self._outlast()
            self._settle()
            self.reload()
            raise
        else:
            _SAVING[self] = step, record.save

    def _make_room(self, step: int, replaces: bool) -> None:
        """Raises unless `step` is above the newest one, or that gives way: if it is inside an epoch, or if asked to."""
        if step <= self._agreed_latest_step():
            with _agreed():
                self.wait_until_finished()  # raises if the newest step is a save that has failed since
                path = self._committed().get(step)
                record = _records({step: path}).get(step) if path and step == self.latest_step() else None
                if path and record and (record.unfinished or replaces) and jax.process_index() == 0:
                    _remove_leftovers(self.directory, self._prefix)  # the snapshot that this one has replaced
                    _set_aside(path, ".replaced")
            if step <= (newest := self._agreed_latest_step()):
                raise ValueError(
                    f"Step {step} is not above {newest}, the newest in {self.directory}. Nothing was saved. If another "
                    "run saves there too, use another directory; otherwise, continue with a later epoch."
                )
        with _agreed():
            if not _is_bucket(self.directory) and not self.directory.exists():  # Orbax would create it again
                raise CheckpointError(f"Saving step {step} has failed: {self.directory} has been removed.")
            for path in _entries(self.directory):  # Orbax would delete what is in its way
                match = _STEP.fullmatch(path.name)
                name = match and (match["prefix"], int(match["step"]), match["temporary"])
                if name == (self._prefix, step, None) and not _is_step(path):
                    raise CheckpointError(f"{path} is in the way, and is not a checkpoint. Move it elsewhere.")

    def _agreed_latest_step(self) -> int:
        """The newest step as process 0 sees it, which may rename one before others look; -1 if there is none."""
        with _agreed():
            newest = self.latest_step()
        return _gather(-1 if newest is None else newest)[0]

    def _numbers(self, metrics: Mapping[str, Any] | None, step: int) -> dict[str, float]:
        """The metrics that are numbers. Warns if the monitored one is missing, unless there are none yet."""
        found = {}
        for name, value in (metrics or {}).items():
            if not isinstance(value, (str, bytes)) and getattr(value, "ndim", 0) == 0:
                with contextlib.suppress(TypeError, ValueError, OverflowError):  # not a number
                    found[str(name)] = float(value)
        if self._monitor not in (None, *found) and metrics is not None:
            _warn(f"monitor={self._monitor!r} is not among the metrics of step {step}, which are {list(found)}.")
        return found

    def restore_state(
        self, step: int | str | None = None, *, weights_only: bool = False, strict: bool = True, donate: bool = False
    ) -> int | None:
        """Restores the model from a checkpoint and verifies the checksums.

        Args:
            step: The step to restore; `"best"` for `best_step()`; None for the newest intact one; damaged newer ones
                cause a warning and are renamed to `<step>.damaged`. Defaults to None.
            weights_only: Whether to restore only the weights and not the optimizer. The model need not be
                compiled then. Defaults to False.
            strict: Whether model and checkpoint must match exactly. If False, variables that match by path
                and shape are restored, floats cast to the model's floats and integers to its integers, and a
                warning lists the rest. Defaults to True.
            donate: Whether to free the model's arrays before reading, to save memory. If reading then fails,
                the model is unusable. Defaults to False.

        Returns:
            The step, or None if the directory holds no checkpoint.

        Raises:
            ValueError: The model is not built, or not compiled and `weights_only` is False.
            CheckpointMismatchError: The model differs from the checkpoint. Nothing was changed.
            CheckpointCorruptError: `step` is damaged, or, if it was not given, every step is.
            CheckpointError: `step` is `"best"`, but no checkpoint is known to be the best; an earlier save has
                failed; or a newer version of this file wrote the checkpoint.
            FileNotFoundError: There is no checkpoint of that step.
            OSError: The directory cannot be read. This does not count as damage.
        """
        self._model.jax_state_sync()  # within fit, by another callback
        variables, how = _variables(self._model, optimizer=not weights_only), {"strict": strict, "donate": donate}
        with _revived(variables):
            found = self._restore(step, lambda *_: (self._model, variables, []), **how, own=False)
        if found is None:
            _warn(f"{_nothing_in(self.directory)} The model is as it was.")
        return found.step if found else None

    def _restore(self, step: int | str | None, target_of: Callable[..., _Target], **how: Any) -> _Restored | None:
        """Runs a `_Restore`; `how` are its `strict`, `donate` and `own`."""
        with _agreed():
            _wait_for_saves(self.directory, besides=self)
            self.wait_until_finished()
        how |= {"sets_aside": not self._given.read_only, "best_step": self.best_step}
        return _Restore(self.directory, self._prefix, target_of, **how).run(step)

    def wait_until_finished(self) -> None:
        """Waits until every save is committed. Raises CheckpointError if one has failed: its step does not exist."""
        with _LOCK:
            if failure := _FAILED.pop(self, None):
                raise failure
            try:
                self._outlast()
                super().wait_until_finished()
            except Exception as error:
                self._end_failed(error, *_SAVING.pop(self, (-1, "")))
            _SAVING.pop(self, None)

    def _end_failed(self, error: Exception, step: int, save: str) -> None:
        """Raises for a failed save, given by its id; only warns if the step was committed nevertheless."""
        self._settle()
        record = None
        with contextlib.suppress(OSError):  # another error is on its way
            for number, path in _folders(self.directory, self._prefix)[3]:
                if number == step and (save in path.name or _is_bucket(path)) and jax.process_index() == 0:
                    path.rmtree(missing_ok=True)
            self.reload()  # Orbax has already forgotten the steps that retention would have deleted
            record = _records(self._committed()).get(step)
        place, text = f"step {step} in {self.directory}", f"{type(error).__name__}: {str(error).strip()[:1000]}"
        if record is None or record.save != save:
            raise CheckpointError(f"Saving {place} has failed. Earlier checkpoints are unchanged. {text}") from error
        _warn(f"Saved {place}, but cleaning up afterwards failed. {text}")


def load_model(
    checkpoint_dir: str | os.PathLike, step: int | str | None = None,
    *, custom_objects: Mapping[str, Any] | None = None, compile: bool = True, safe_mode: bool = True,
) -> keras.Model:
    """Rebuilds a saved model, with all its state, from its checkpoint directory alone.

    Works for every model that Keras can build from its config, layer assets included. Changes nothing on disk:
    damaged steps are skipped with a warning, not renamed.

    A checkpoint holds the model as it is during training, without what `fit` does to the weights when it ends. For
    `EarlyStopping(restore_best_weights=True)`, load `step="best"`; for an optimizer's moving average
    (`use_ema=True`), call `model.optimizer.finalize_variable_values(model.trainable_variables)`.

    Example:

    >>> load_model("/tmp/ckpt").save("/tmp/model.keras")

    Args:
        checkpoint_dir: Directory of the checkpoints, `str` or path-like; `gs://bucket/path` too.
        step: The step to load; `"best"` for the best one by the metric that was monitored; None for the newest
            intact one. Defaults to None.
        custom_objects: Custom classes and functions by name, if they are not registered with Keras.
            Defaults to None.
        compile: Whether to compile the model as it was and restore the optimizer. Defaults to True.
        safe_mode: Whether to refuse code in the config, such as lambdas, as in `keras.saving.load_model`.
            Defaults to True.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no checkpoint in the directory, or none of that step.
        CheckpointError: The checkpoint does not say how to build its model, or `step` is `"best"` and no
            checkpoint is known to be the best.
        CheckpointCorruptError: `step` is damaged, or, if it was not given, every step is.
        ValueError, TypeError: Keras cannot build the model from its config.
    """
    _check_backend()
    directory = _usable_directory(checkpoint_dir)
    target_of = functools.partial(_loadable, compile=compile, custom_objects=custom_objects, safe_mode=safe_mode)
    _wait_for_saves(directory)
    restore = _Restore(directory, ..., target_of, donate=True, own=False)
    if (restored := restore.run(step)) is None:
        raise FileNotFoundError(_nothing_in(directory))
    return restored.model


# --------------------------------------------------------------------------------------------- signals

_CALLS = itertools.count(1)  # by this number, JAX's processes agree on a call


def _signals(given: Any) -> list[signal.Signals]:
    """The signals in an argument, each once."""
    signals = [signal.SIGKILL]
    with contextlib.suppress(TypeError, ValueError):
        signals = [signal.Signals(number) for number in dict.fromkeys(given)]
    can_be_caught = signal.SIGKILL not in signals and signal.SIGSTOP not in signals
    _check("preemption_signals", given, can_be_caught, "a tuple of signals that can be caught, or () for none")
    return signals


_PREEMPTIONS: list["_Preemption"] = []  # of the fits that are running, one inside the other


def _release_signals() -> None:
    """In a forked process: signals do what they did before `fit`."""
    for preemption in reversed(_PREEMPTIONS):
        for number, handler in preemption._earlier.items():
            if signal.getsignal(number) == preemption._note:
                signal.signal(number, handler)


class _Preemption:
    """The signals that ask `fit` to save and stop, until `undo` restores the earlier handlers."""

    def __init__(self, signals: Sequence[signal.Signals], undo: contextlib.ExitStack):
        self.received: Any = None  # the number of the signal received
        self._asks_jax = signal.SIGTERM in signals and _jax_owns_sigterm()
        self._earlier: dict[int, Any] = {}
        reason = ""
        if _jax_owns_sigterm():
            reason = "with jax.distributed, only SIGTERM is"
        elif jax.process_count() > 1:
            reason = "JAX's preemption service is switched off (jax_enable_preemption_service=False)"
        elif threading.current_thread() is not threading.main_thread():
            reason = "fit runs outside the main thread"
        _PREEMPTIONS.append(self)
        undo.callback(_PREEMPTIONS.remove, self)
        _after_fork(_release_signals)
        for number in signals if not reason else ():
            self._earlier[number] = signal.signal(number, self._note) or signal.SIG_DFL  # None: not set by Python
            undo.callback(signal.signal, number, self._earlier[number])
        caught = {*self._earlier, *([signal.SIGTERM] if self._asks_jax else [])}
        if uncaught := [number.name for number in signals if number not in caught]:
            _warn(f"Not caught: {', '.join(uncaught)}, because {reason}.")

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def is_due(self) -> bool:
        """Whether a signal was received; with jax.distributed, True at the same call on all processes."""
        if self._asks_jax and ocp.multihost.reached_preemption(next(_CALLS)):
            self.received = signal.SIGTERM
        return self.received is not None

    def leave(self) -> None:
        """Ends the process as the signal asks."""
        earlier = self._earlier.get(self.received)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(self.received, None)
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + self.received)


# -------------------------------------------------------------------------------------------- callback

_SMALL_BYTES = 2**20  # non-trainable variables up to this size may be changed by validation


def _copies(variables: Iterable[keras.Variable]) -> list[jax.Array]:
    return [jax.numpy.copy(variable.value) for variable in variables]


class _Pace:
    """When a save is due by `save_freq`. "auto" saves as often as possible within `_SHARE` of the time."""

    _SHARE = 0.03

    def __init__(self, freq: Any, saved: int | None, manager: KerasOrbaxCheckpointManager):
        self._freq, self._manager, self._ask_at = freq, manager, 0
        self.saved = saved  # batches completed at the newest checkpoint
        self.saves, self._blocked, self._slower = 0, 0.0, 0.0  # number of saves, and the seconds that they cost
        self._usual: collections.deque[float] = collections.deque(maxlen=25)  # seconds that a batch takes
        self._start = self._saved_at = time.monotonic()

    def count_batch(self, seconds: float) -> None:
        """Counts the time of a batch, which may be longer while a save is being written."""
        if not self._manager.is_saving_in_progress():
            self._usual.append(seconds)
        elif self._usual:
            self._slower += seconds - statistics.median(self._usual)

    def count_save(self, batches: int, seconds: float) -> None:
        """Counts a save, and how long it blocked training."""
        self._blocked, self.saves = self._blocked + seconds, self.saves + 1
        self.saved, self._saved_at = batches, time.monotonic()

    def cost(self) -> float:
        """The seconds that the saves have cost."""
        return self._blocked + max(self._slower, 0)

    def share(self) -> float:
        return self.cost() / (time.monotonic() - self._start)

    def is_due(self, batches: int) -> bool:
        """Whether to save after so many batches; the same on all processes."""
        saved, now = self.saved or 0, time.monotonic()
        if self._freq == "epoch" or batches <= saved:
            return False
        if _is_count(self._freq):
            return batches // self._freq > saved // self._freq
        if self._freq == "auto":
            next_cost = self.cost() * (1 + 1 / max(self.saves, 1))
            left = math.inf if self._manager.is_saving_in_progress() else self._start + next_cost / self._SHARE - now
        else:
            left = self._saved_at + self._freq.total_seconds() - now
        if jax.process_count() > 1:  # process 0 decides, asked ever more seldom until the next save
            if batches < self._ask_at:
                return False
            self._ask_at = batches + 1 + (batches - saved) // 32
            left = _gather(left)[0]
        return left <= 0


class _Run(keras.callbacks.Callback):
    """One `fit`, from its start to its end. Placed last, so its hooks run after those of all other callbacks."""

    def __init__(self, callback: "OrbaxCheckpointCallback", fit: _Fit):
        super().__init__()
        self.callback, self.resumable = callback, callback._resumable
        self.fit: Any = fit
        self._model, self.manager = callback._fitted_model, callback.checkpoint_manager  # Keras's `model` would sync
        given = {"the data": fit.data, "the validation data": fit.held_out}
        datasets = {p: _Dataset(data, p) for p, data in given.items() if isinstance(data, keras.utils.PyDataset)}
        self.dataset = datasets.get("the data")
        generators = {place: _loader_generators(data, place) for place, data in given.items()}
        self.members = [*callback._stateful, *datasets.values(), *itertools.chain(*generators.values())]
        self.sources = [*([self.dataset] if self.dataset else []), *generators["the data"]]  # decide the data's order
        self.histories = [each for each in fit.callbacks.callbacks if isinstance(each, keras.callbacks.History)]
        self.start = _Position(0, batches=0)  # where the run continues, or begins
        self.restored = _Restored(None, None, {})
        self.is_inside = False  # resuming inside an epoch, until its first batch not yet trained on
        self.is_live = False  # whether this process has trained up to the newest checkpoint itself
        self.aborted: Any = callback._training  # the optimizer of the callback's last fit, if that raised
        self.epoch = self.before = 0  # the current epoch, and the batches of the run before it
        self.batches = self.count = 0  # read in the whole run, and from Keras's present iterator
        self.iterator: Any = None  # over batches
        self.origin: Any = None  # the state before its first batch
        self.last: Any = None  # the last batch
        self.before_batch: tuple = ()  # references to the variables' values, and copies of the metrics
        self.before_validation: tuple | None = None  # the same, and what else validation may change
        self.preemption: Any = None  # a _Preemption, once fit has begun
        self.undo = contextlib.ExitStack()

    # Starting.

    def on_train_begin(self, logs: Any = None) -> None:
        try:
            self._begin()
        except BaseException:
            self.end()
            raise

    def _begin(self) -> None:
        self.undo.callback(_unwatch_fit, self._model, vars(self._model).get("jax_state_sync"))
        if _lost(self._model.metrics_variables):
            self._model.reset_metrics()
        with _revived(_variables(self._model)) as is_lost:
            with _agreed():
                self._check()
            rate = None if is_lost else _learning_rate(self._model)
            self.callback._training = self._model.optimizer
            found = self.manager._restore(None, self._plan, donate=True)
        self.batches = self.start.batches or 0
        self.pace = _Pace(self.callback._save_freq, self.start.batches if found else None, self.manager)
        if found is None:
            self.say(f"No checkpoint in {self.manager.directory} yet: training starts from the beginning.")
            if self.aborted is not None:
                _warn("An aborted fit has trained this model already. To start from the beginning, build it anew.")
        else:
            self.restored = found._replace(own=found.own or {})
            self.is_inside = found.record is not None and found.record.unfinished
            _start_at_epoch(self._model, self.fit.epochs if self._is_over(found.record) else self.start.epoch)
            self._say_loaded(rate)
        if self.resumable is not None:
            self.resumable.begin(self.restored.own.get("state"))  # may draw from torch's random generator
        own = dict(self.restored.own)
        if self.is_live:
            own.pop("random", None)  # what the script has drawn since then belongs to the run
        self._put_back(own)
        *others, metrics = _train_state(self._model)
        self.before_batch = _references(others), _copies(metrics)
        self.preemption = _Preemption(self.callback._signals, self.undo)
        self.manager._fitting = _jax_owns_sigterm()
        self.undo.callback(setattr, self.manager, "_fitting", False)
        _watch_fit(self._model, self.fit, self.steps, self._end_training, self.end)

    def _check(self) -> None:
        """Before anything is restored, raises what a save would raise, and warns of what cannot resume exactly."""
        self.manager._prepare()
        for member in self.members:
            member.copy()  # checked again: callbacks may have just opened files, which cannot be saved
        source, is_endless = self.resumable, self.fit.epoch_iterator.steps_per_epoch
        if source is not None and not (is_endless and source.drawn > source.first):
            raise ValueError(
                "checkpoint.resumable(data) was called, but what it returned was not passed to fit, or steps_per_epoch "
                "was not. Nothing was trained. Call model.fit(checkpoint.resumable(data), steps_per_epoch=...)."
            )
        for each in self.callback._stateful:
            is_idle = all(each.member is not other for other in self.fit.callbacks.callbacks)
            if isinstance(each.member, keras.callbacks.Callback) and is_idle:
                _warn(f"{each.label} was not passed to fit(callbacks=[...]), so it does nothing here.")
        if isinstance(self.fit.held_out, types.GeneratorType):
            _warn(
                "The validation data is a generator, which Keras does not restart for each validation: a resumed "
                "run validates on other batches. Use arrays or a dataset."
            )
        optimizers = {n: v for n, v in vars(self._model).items() if isinstance(v, keras.optimizers.Optimizer)}
        if others := [name for name, optimizer in optimizers.items() if optimizer is not self._model.optimizer]:
            _warn(
                f"The state of further optimizers of the model is not saved: {', '.join(others)}. Pass them in "
                "stateful, as objects with get_state and set_state."
            )

    def _plan(self, step: int, record: _Record | None, path: epath.Path) -> _Target:
        """Sets where the run continues after `step`. Returns what to restore, and why it cannot continue."""
        per_epoch = self.manager._steps_per_epoch
        start = record.position if record else _Position(step // per_epoch + 1)
        self.start = start._replace(batches=start.epoch * per_epoch) if start.batches is None else start
        # If this process has already trained this far and then recompiled the model, the new optimizer is kept. If more
        # epochs are done than asked for, a later fit with another optimizer may have done them.
        done, optimizer = self.callback._done
        is_of_here = record is not None and not record.unfinished and start.epoch <= done
        is_other = is_of_here and self._model.optimizer is not optimizer
        self.is_live = is_of_here and self.aborted is None
        if is_other and self._model.optimizer is self.aborted:
            _warn("The model's optimizer was trained in a fit that was aborted, and keeps that state. Compile it anew.")
        if record is not None and start[:2] > (self.fit.epochs, 0):
            _, differences = _compare(self._model, _variables(self._model), record.variables, True, True)
            is_other |= any(line.startswith(_GROUPS[2]) for line in differences)
        variables = _variables(self._model, not is_other, record is not None and _GROUPS[3] in record.variables)
        return self._model, variables, list(self._differences(step, record))

    def _is_over(self, record: _Record | None) -> bool:
        """Whether all epochs are done, or a callback stopped an earlier `fit` of at least as many."""
        return self.fit.epochs <= max(self.start.epoch, (record and record.stopped) or 0)

    def _differences(self, step: int, record: _Record | None) -> Iterator[str]:
        """What has changed since the step was saved, as far as can be told before a batch is drawn."""
        start, iterator, calls = self.start, self.fit.epoch_iterator, self._model.steps_per_execution
        given = [member.name for member in self.callback._stateful]
        if record is None or record.stateful is None:
            data = ["the data starts from its beginning"] if iterator.steps_per_epoch else []
            objects = [f"the objects in stateful, {given}, start from their initial state"] if given else []
            if (data or objects) and not self._is_over(record):
                _warn(f"Step {step} was not saved by this callback: {' and '.join(data + objects)}.")
        elif record.stateful != given:
            yield f"it was saved with stateful={record.stateful}, but now stateful={given} was passed"
        if self._is_over(record):
            return
        following = self._step(start.epoch, (start.batches or 0) + 1)
        if following < step + (not record or not record.unfinished):
            yield (
                f"with save_freq={self.callback._save_freq!r} and steps_per_epoch={self.manager._steps_per_epoch}, "
                f"the next checkpoint would be step {following}, which is not above {step}"
            )
        if record is None:
            return
        if record.is_resumable and self.resumable is None:
            yield "fit read checkpoint.resumable(data) then, but does not now"
        then, now = record.num_batches, iterator.num_batches
        if start.batch and then and now and then != now:
            lengths = f"{then} batches, and now an epoch has {now}"
            yield f"it is inside an epoch of {lengths}: the batch size or the data has changed"
        if start.batch % calls and not record.is_trained:
            place = f"{start.batch} batches of an epoch"
            yield f"it is after {place}, which is not a multiple of steps_per_execution={calls}"

    def _say_loaded(self, script_rate: float | None) -> None:
        done, epochs, rate = self.start.epoch, self.fit.epochs, _learning_rate(self._model)
        if done > epochs:
            line = f"Nothing left to train: {done} epochs are done, more than epochs={epochs}"
        elif done == epochs:
            line = f"Nothing left to train: {done} of {epochs} epochs are done"
        elif self._is_over(self.restored.record):
            line = f"Nothing left to train: a callback stopped the run after {done} epochs"
        else:
            line = f"Continue with epoch {done + 1} of {epochs}"
            line += f", after batch {self.start.batch}" if self.start.batch else ""
        by = "" if self.restored.record else ", written by another tool"
        line += f" (step {self.restored.step} in {self.manager.directory}{by})"
        if None not in (rate, script_rate) and rate != script_rate:
            line += f", with the learning rate {rate:g} instead of the script's {script_rate:g}"
        self.say("Load Orbax checkpoint on_train_begin.")
        self.say(f"{line}.")

    def _put_back(self, own: Mapping[str, Any]) -> None:
        """Restores the state of the run other than variables."""
        states = own.get("members", {})
        for member in self.members:
            if member.place in states:
                member.put(states[member.place])
        _are_averages_in(self.fit, own.get("averages"))
        for history in self.histories:
            vars(history).update(_copied(own.get("history", {})))
        if "random" in own:
            _set_random_state(own["random"])

    # Batches.

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        self.before = self.batches - self.start.batch * self.is_inside

    def steps(self, steps: Iterator[tuple]) -> Iterator[tuple]:
        """Passes Keras's steps of an epoch on to `fit`: skips those already trained on, and saves when due."""
        place: list[int] = []
        for *place, iterator in steps:  # first batch, since 3.11 also last batch, iterator
            if iterator is not self.iterator:
                self._open(iterator)
            if self.is_inside:
                if place[0] < self.start.batch:
                    continue
                yield from self._arrive(place)
            if self.resumable is not None:
                self.resumable.forget(self.count)
            # After a shorter call, the last one of data whose length Keras does not know, the epoch's end saves.
            is_whole = (self.batches - self.before) % self._model.steps_per_execution == 0
            if is_whole and (self.preemption.is_due() or self.pace.is_due(self.batches)):
                self._save_inside()
            start = time.monotonic()
            yield (*place, self.reader)
            self.pace.count_batch(time.monotonic() - start)
        if self.is_inside:
            yield from self._arrive(place)

    def _open(self, iterator: Iterator) -> None:
        """Wraps a new iterator of Keras. In a resumed run, first skips the batches already trained on."""
        is_first, batches = not self.count, self.batches
        self.count, self.iterator, self.reader = 0, iterator, self._read(iterator)
        if not is_first:
            return
        for _ in range(self.resumable.stale if self.resumable is not None else 0):
            next(iterator)
        if self.dataset and _loads_early(self.fit, iterator, bool(self.dataset.hooks)):
            _warn(
                f"Keras loads batches of {self.dataset.name} before the shuffle for their epoch, so a resumed run gets "
                f"others. It has workers={self.fit.data.workers}: use workers=1, and no steps_per_epoch."
            )
        goes_on = self.start.batch or self.fit.epoch_iterator.steps_per_epoch  # else the script may have changed it
        if goes_on and (count := self.restored.own.get("count")):
            now = self._origin()
            self._put_back(self.restored.own["origin"])
            with _agreed():
                self._skip(count)
            self._compare_last()
            self._put_back(now)
            self.batches = batches
            _count_as_seen(self.fit, count - self.start.batch)

    def _read(self, iterator: Iterator) -> Iterator:
        """Keras's batches, on their way to `fit`."""
        self.origin = self._origin()
        for batch in iterator:
            self.last, self.count, self.batches = batch, self.count + 1, self.batches + 1
            del batch
            yield self.last
            self.last = None  # frees its memory before the next batch is loaded

    def _origin(self) -> dict[str, Any]:
        """The state that determines the batches of a pass over the data."""
        return {"random": _random_state(), "members": {each.place: each.copy() for each in self.sources}}

    def _skip(self, count: int) -> None:
        for number in range(count):
            if self.preemption.is_due():
                self._leave()
            if next(self.reader, None) is None:
                raise self._other_data(f"after {count} batches, but the data ends after {number} batches")

    def _other_data(self, problem: str) -> CheckpointMismatchError:
        return CheckpointMismatchError(
            f"The checkpoint of step {self.restored.step} was made {problem}. Nothing was trained. Pass fit the same "
            "data as before, or use another directory."
        )

    def _compare_last(self) -> None:
        """Raises or warns if the last skipped batch is not the one trained on."""
        step, record, own, _ = self.restored
        saved, found = own["last"], _fingerprint(self.last)
        if not saved["shapes"] or record is None or record.processes != jax.process_count():
            return
        with _agreed():
            if found["shapes"] != saved["shapes"]:
                shapes = f"with batches of shapes {saved['shapes']}, and now they have {found['shapes']}"
                raise self._other_data(f"{shapes}: the batch size or the data has changed")
        if self.dataset and self.count > self.start.batch:
            return  # this pass began in an earlier epoch, and the dataset may have changed since
        # With another layout, a process holds other parts of the batch: their checksums cannot be compared.
        if any(_gather(found != saved and found["parts"] == saved["parts"])):
            _warn(
                f"The data differs from the run saved at step {step}: the last skipped batch has other content. "
                "Training continues, but the result will differ from an uninterrupted run. Seed the data, create a "
                "generator anew for each fit, or pass checkpoint.resumable(iterator) to fit."
            )

    def _arrive(self, place: Sequence[int]) -> Iterator[tuple]:
        """Called before the first batch not yet trained on: undoes whatever has changed while resuming."""
        self.is_inside = False
        *others, metrics = _train_state(self._model)
        references, values = self.before_batch
        if _are_replaced(references, others):  # by another callback
            self.manager._restore(self.restored.step, self._plan, donate=True)
        else:
            for variable, value in zip(metrics, values):
                variable.assign(value)
        self._put_back(self.restored.own)
        if self.start.batch:  # fit needs logs, if only validation is left
            self.undo.callback(_let_pass(self._model, self.fit, self.restored.own["logs"]))
            yield (*place, self.reader)

    # Validation, and the end of an epoch.

    def _end_training(self) -> None:
        """After the last batch, copies what validation may change: a resumed run repeats the validation."""
        if self.fit.held_out is None or self._model.stop_training:
            return
        trained, fixed, _, metrics = _train_state(self._model)
        # Large ones are assumed to be frozen weights.
        small = [jax.numpy.copy(v.value) if v.value.nbytes <= _SMALL_BYTES else None for v in fixed]
        own = self._belongings({each.place: each.copy() for each in self.members if each.hears_validation()})
        self.before_validation = _references([trained, fixed]), _copies(metrics), small, own

    def on_test_begin(self, logs: Any = None) -> None:
        if self.before_validation and _are_replaced(self.before_validation[0], _train_state(self._model)[:2]):
            self.before_validation = None  # a callback swaps weights for the validation: signals wait until it ends

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.before_validation is None or not self.preemption.is_due():
            return
        self._model.jax_state_sync()
        _, metrics, small, own = self.before_validation
        trained, fixed, optimizer, _ = _values(_train_state(self._model))
        fixed = [new if old is None else old for old, new in zip(small, fixed)]
        own["members"] = self._states() | own["members"]
        self._save_inside((trained, fixed, optimizer, metrics), own)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.before_validation = None
        for member in self.members:
            if isinstance(member, _Dataset):
                member.compare()
        is_stopped, is_leaving = self._model.stop_training, self.preemption.is_due()
        is_asked = is_stopped or is_leaving or epoch + 1 >= self.fit.epochs or self.pace.is_due(self.batches)
        if is_asked or self.callback._save_freq == "epoch":
            is_empty = self.batches == self.before == self.pace.saved  # the data has run out: this is the step before
            position = _Position(epoch + 1, 0, self.batches)
            with _agreed():
                own = self._belongings(self._states(), is_epoch_end=True)
            further = {"stopped": self.fit.epochs if is_stopped else None, "force": is_asked, "replaces": is_empty}
            if self._save(position, logs, own, **further):
                self.say("Save Orbax checkpoint on_epoch_end.")
        if is_leaving:
            self._leave()

    # Ending.

    def end(self, is_complete: bool = False) -> None:
        """Called however `fit` ends: waits for saves, and removes everything that the run has set on the model."""
        error, failure = sys.exc_info()[1], None
        with self.undo:
            try:
                self.manager.wait_until_finished()
            except Exception as caught:
                failure = caught
        if self.resumable is not None:
            self.resumable.end()
        # This breaks a cycle. Keras 3.10 joins threads when a CallbackList is deleted; when the garbage collector does
        # that, it can deadlock.
        fit, self.fit = self.fit, None
        if not self.batches:  # nothing was trained
            self.callback._training = self.aborted
        if is_complete:
            self.callback._done = max(self.callback._done[0], fit.epochs), self._model.optimizer
            self.callback._training = None
            if failure is not None:
                _FAILED[self.manager] = failure  # raised by on_train_end
            return
        if failure is not None:  # not to hide the first error
            _warn(f"The last save failed as well: {failure!r}")
        if isinstance(error, Exception) and self.preemption and self.preemption.received is not None:
            signal.raise_signal(self.preemption.received)  # an error in fit must not swallow the signal

    def on_train_end(self, logs: Any = None) -> None:
        self.manager.wait_until_finished()  # raises if a save has failed
        if self.callback._save_freq == "auto":
            self.say(f"Saved {self.pace.saves} times, which took {self.pace.share():.1%} of the time.")
        if self.preemption.received is not None:
            self._leave()

    # Saving.

    def _step(self, epoch: int, batches: int) -> int:
        return epoch * self.manager._steps_per_epoch if self.callback._save_freq == "epoch" else batches

    def _states(self) -> dict[str, Any]:
        return {member.place: member.get() for member in self.members}

    def _belongings(self, states: dict[str, Any], is_epoch_end: bool = False) -> dict[str, Any]:
        """The current state of the run other than variables; `states` are those of the members."""
        own = {
            "random": _random_state(),
            "members": states,
            "averages": _are_averages_in(self.fit),
            "history": _copied({n: vars(each).get(n) for each in self.histories for n in ("epoch", "history")}, repr),
            "logs": None if is_epoch_end else _copied(_running_fit().get("logs"), repr),
        }
        if self.resumable is not None:
            own["state"] = self.resumable.state(self.count)
        elif self.count and (not is_epoch_end or _goes_on(self.fit, self.iterator)):
            # How to find the next batch: the state before Keras's iterator began, and the batches read from it.
            own |= {"count": self.count, "origin": self.origin, "last": _fingerprint(self.last)}
        return own

    def _save(self, position: _Position, logs: Any, own: dict[str, Any], **further: Any) -> bool:
        notes = {
            "stateful": [member.name for member in self.callback._stateful],
            "num_batches": self.fit.epoch_iterator.num_batches,
            "is_resumable": self.resumable is not None,
        }
        start, step = time.monotonic(), self._step(self.epoch, self.batches)
        try:
            started = self.manager._save(step, position, logs, own=own, **notes, **further)
        except TypeError:
            for member in self.members:
                member.copy()  # raises with a name, if it is one of these that cannot be saved
            raise
        if started:
            self.pace.count_save(self.batches, time.monotonic() - start)
        return started

    def _save_inside(self, values: Sequence[list[jax.Array]] | None = None, own: dict[str, Any] | None = None) -> None:
        """Saves a snapshot inside the epoch, during validation of the given values; then leaves if a signal asks to."""
        batches = self.batches
        if batches != self.pace.saved:
            self._model.jax_state_sync()
            position = _Position(self.epoch, batches - self.before, batches)
            further = {"unfinished": True, "is_trained": values is not None, "force": True}
            with _agreed():
                values, own = values or _values(_train_state(self._model)), own or self._belongings(self._states())
            self._save(position, None, own, values=values, **further)
            self.say(f"Save Orbax checkpoint in epoch {self.epoch + 1}, after batch {position.batch}.")
        if self.preemption.received is not None:
            self._leave()

    def _leave(self) -> None:
        """Ends the process as the signal asks, once all is on disk."""
        self.manager.wait_until_finished()
        name = signal.Signals(self.preemption.received).name
        self.say(f"Stop on {name}: the run is saved. The same script continues it.")
        self.preemption.leave()

    def say(self, line: str) -> None:
        if self.callback._verbose and jax.process_index() == 0:
            # Keras's progress bar leaves its line open until all callbacks have seen the end of the epoch.
            is_open = line.startswith("Save") and (self.callback.params or {}).get("verbose") in ("auto", 1)
            print("\n" * is_open + line, flush=True)


def _check_callback_arguments(
    save_freq: Any, monitor: Any, stateful: Any, verbose: Any, options: Mapping[str, Any]
) -> None:
    _check_keywords(OrbaxCheckpointCallback, options)
    _check("verbose", verbose, verbose in (0, 1), "0 or 1")
    _check("read_only", True, not options.get("read_only"), "it to a manager: this callback saves")
    _check("stateful", stateful, isinstance(stateful, (list, tuple)), "a list or tuple of objects")
    is_time = isinstance(save_freq, datetime.timedelta)
    is_freq = save_freq > datetime.timedelta(0) if is_time else save_freq in ("epoch", "auto") or _is_count(save_freq)
    wanted = '"epoch", a number of train batches (1 or more), a datetime.timedelta, or "auto"'
    _check("save_freq", save_freq, is_freq, wanted)
    if monitor is not None and save_freq != "epoch":
        raise ValueError(f'monitor={monitor!r} needs save_freq="epoch": only epochs have logs to compare.')


class OrbaxCheckpointCallback(keras.callbacks.Callback):
    """Saves the full training state during `fit`, and resumes from it when `fit` starts.

    Rerun, a script continues with the batch after the newest checkpoint and stops at the same
    `epochs`. Batches of that epoch already trained on are skipped, so the data must come in the same order. If
    the run is complete, or was stopped by another callback, `fit` loads the final state and returns. `fit`
    returns only when every save is committed. Pass one such callback per `fit`, anywhere in the list. A second
    `fit` with the same callback continues too, and its `History` has all epochs. A model recompiled in between
    keeps its new optimizer; other changes to its state since the last checkpoint are undone.

    Example:

    >>> checkpoint = OrbaxCheckpointCallback(model, "/tmp/ckpt", max_to_keep=3)
    >>> model.fit(x, y, epochs=100, callbacks=[checkpoint])

    Args:
        model: The `keras.Model` that will be fitted, compiled, on the JAX backend.
        checkpoint_dir: Directory of the checkpoints, `str` or path-like; relative paths and `~` work, and
            `gs://bucket/path`. Created if missing. All processes must share it.
        max_to_keep: How many of the newest checkpoints to keep, None for all. Defaults to 5.
        steps_per_epoch: The checkpoint of epoch `e` (from 0) is step `e * steps_per_epoch`. Defaults to 1.
        save_freq: When to save: `"epoch"`, at the end of every epoch; an `int`, every so many train batches;
            a `datetime.timedelta`, at the first batch that long after the last save; `"auto"`, as often as possible
            while saving takes at most 3 % of the run's time, measured as time blocked plus slower batches. The
            last state of a run is always saved. Except with `"epoch"`, the step is the number of train batches
            completed. Defaults to `"epoch"`.
        monitor: Name of a metric in the logs of an epoch, such as `"val_loss"`. Keeps the `max_to_keep` best
            checkpoints by this metric, and always the newest. Defaults to None.
        mode: Whether lower (`"min"`) or higher (`"max"`) is better; `"auto"` takes it from the model's metrics.
            Defaults to `"auto"`.
        stateful: Other objects whose state is saved: Keras callbacks (also passed to `fit`), and objects with
            `get_state` and `set_state` or `state_dict` and `load_state_dict`. For a Keras callback without
            them, attributes changed since the `OrbaxCheckpointCallback` was created are saved.
            For data iterators, use `resumable()`. Defaults to `()`.
        preemption_signals: Signals on which the state is saved within a batch and the process exits with code
            128 + signal: 143 for SIGTERM (SIGINT raises `KeyboardInterrupt`). Python handlers installed before
            are called after the save, and restored when `fit` ends. Defaults to `(signal.SIGTERM,)`.
        verbose: 1 prints a line or two for every save and load, 0 prints nothing. Defaults to 1.
        **kwargs: `compression=True` compresses with zstd; all others are fields of
            `orbax.checkpoint.CheckpointManagerOptions`.

    Attributes:
        checkpoint_manager: The `KerasOrbaxCheckpointManager`.

    Raises:
        ValueError: An argument is invalid, the model is not compiled, or Keras's backend is not JAX. In `fit`:
            the callback was made for another model, or `fit` was given two of these callbacks.
        TypeError: A keyword is neither an argument of this class nor an Orbax option, or the state of a
            `stateful` object cannot be saved.
        OSError: The directory cannot be reached or written to.
        RuntimeError: Keras, Orbax or JAX lacks a private attribute used here, or `fit` is overridden.
        CheckpointMismatchError: In `fit`: the newest checkpoint does not match the model, or the run resumes inside
            an epoch and the number or shape of the batches has changed. Changed content only causes a warning.
        CheckpointCorruptError: In `fit`: every checkpoint is damaged.
        CheckpointError: The processes do not share the directory. In `fit`: a save has failed.
    """

    def __init__(
        self, model: keras.Model, checkpoint_dir: str | os.PathLike,
        max_to_keep: int | None = 5, steps_per_epoch: int = 1, *,
        save_freq: str | int | datetime.timedelta = "epoch", monitor: str | None = None, mode: str = "auto",
        stateful: Sequence[Any] = (), preemption_signals: Iterable[int] = (signal.SIGTERM,), verbose: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        _check_backend()
        _check_callback_arguments(save_freq, monitor, stateful, verbose, kwargs)
        if isinstance(model, keras.Model) and not model.compiled:
            raise ValueError(
                f"The model {model.name!r} is not compiled. Call model.compile() before making this callback."
            )
        self._signals = _signals(preemption_signals)
        with _agreed():
            self._stateful = [_Stateful(member, f"stateful[{i}]") for i, member in enumerate(stateful)]
        self.checkpoint_manager = KerasOrbaxCheckpointManager(
            model, checkpoint_dir, max_to_keep, steps_per_epoch, monitor=monitor, mode=mode, **kwargs
        )
        self._fitted_model = model
        self._save_freq = save_freq
        self._verbose = verbose
        self._resumable: _Resumable | None = None
        self._done: tuple[int, Any] = 0, None  # epochs completed by this callback, and the optimizer at that time
        self._training: Any = None  # the optimizer of a fit that has begun and not returned

    def resumable(self, data: Any) -> Iterator[Any]:
        """Wraps a data iterator or loader so that its position is saved with each checkpoint.

        A resumed run starts with the first batch not yet trained on, even if Keras had read ahead: no batch is
        repeated or lost. When `data` runs out, it starts over, an iterator from where it stood when passed to this.

        Example:

        >>> batches = checkpoint.resumable(iterator)
        >>> model.fit(batches, steps_per_epoch=100, epochs=10, shuffle=False, callbacks=[checkpoint])

        Args:
            data: An iterator with `get_state` and `set_state` (Grain) or `state_dict` and `load_state_dict`,
                or a loader that has these and `__iter__` (torchdata's `StatefulDataLoader`). It gives batches
                as `fit` takes them: tuples of inputs, targets, and sample weights.

        Returns:
            An endless generator over the batches of `data`; pass `steps_per_epoch` to `fit`. If `data` raises, the
            generator ends: call this method again.

        Raises:
            TypeError: `data` does not have these methods.
        """
        self._resumable = _Resumable(data)
        return self._resumable.generator

    def __reduce_ex__(self, protocol: Any) -> Any:  # called by copy and pickle
        raise TypeError(
            "OrbaxCheckpointCallback cannot be copied, because it belongs to one model and one directory: with "
            "KerasTuner, make it in HyperModel.fit() instead of passing it to search()."
        )

    def on_train_begin(self, logs: Any = None) -> None:
        fit = _fit_around(self)
        callbacks = fit.callbacks.callbacks
        if sum(isinstance(each, OrbaxCheckpointCallback) for each in callbacks) > 1:
            raise ValueError(
                "fit takes one OrbaxCheckpointCallback, and was given several, or one twice. Nothing was trained. For "
                "a second directory, use keras.callbacks.ModelCheckpoint, or save_state() of a manager in a callback."
            )
        model: Any = self._model
        if model is not self._fitted_model:
            raise ValueError(
                f"This callback was made for the model object {self._fitted_model.name!r}, but fit was called on "
                f"another, {model.name!r}. Make the callback with the model that you fit."
            )
        # `fit` is iterating over this list and will reach its new end. A CallbackList of the user's may still hold the
        # run of an earlier fit.
        with _agreed():
            run = _Run(self, fit)
        callbacks[:] = [each for each in callbacks if not isinstance(each, _Run)] + [run]


# ---------------------------------------------------------------------------------------- command line


def _row(path: epath.Path, record: _Record | None) -> list[str]:
    """The table columns of a step. Variables and parameters are counted as in Keras's summary."""
    at = record and record.position
    place = [str(at.epoch + (at.batch > 0)), str(at.batch or "end")] if at else "??"
    nanoseconds = json.loads((path / _METADATA).read_text()).get("commit_timestamp_nsecs")  # not from old Orbax
    saved = datetime.datetime.fromtimestamp(nanoseconds // 10**9).isoformat(" ") if nanoseconds else "?"
    groups, size = _saved_variables(path, record), sum(file.stat().length for file in _files(path))
    specs = [spec for group in _WEIGHTS for spec in groups[group] if "/seed_generator_state" not in spec.path]
    counts = [f"{len(specs):,}", f"{sum(math.prod(spec.shape) for spec in specs):,}"]
    metrics = " ".join(f"{name}={value:.4g}" for name, value in record.metrics.items()) if record else ""
    return [*place, saved, f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB", *counts, metrics]


def _look(directory: str, verify: bool) -> bool:
    """Prints what is in a directory. Returns whether everything that was read is intact."""
    if not (steps := _steps(place := _usable_directory(directory))):
        raise FileNotFoundError(_nothing_in(place))
    best, problems, result = _best(_records(steps)), [], "All arrays are intact."
    table = [["step", "epoch", "batch", "saved", "size", "variables", "parameters", "metrics", ""]]
    for step, path in sorted(steps.items()):
        row, marks = [*"??????", ""], ["best"] * (step == best) + ["newest"] * (step == max(steps))
        try:
            with _reading(step, path):
                if (record := _read_record(step, path)) is None:
                    marks, result = ["written by another tool", *marks], "All readable; some lack checksums."
                row = _row(path, record)
                if verify:
                    print(f"Step {step}:\n" * sys.stdout.isatty(), end="", flush=True)
                    _verify(path, record)
        except CheckpointError as error:
            if _steps(path.parent).get(step) != path:  # deleted meanwhile
                continue
            marks.insert(0, "damaged" if isinstance(error, CheckpointCorruptError) else "of a newer format")
            problems.append(str(error))
        table.append([str(step), *row, ", ".join(marks)])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    print(*lines, *(problems or [result] * verify), sep="\n")
    return not problems


if _IS_PROGRAM:
    parser = argparse.ArgumentParser(description="Lists the checkpoints in a directory. Changes nothing.")
    parser.add_argument("directory", metavar="DIR", help="a path, or gs://bucket/path")
    parser.add_argument("--verify", action="store_true", help="read every array and check it; exit code 1 on damage")
    try:
        sys.exit(0 if _look(**vars(parser.parse_args())) else 1)
    except (OSError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)

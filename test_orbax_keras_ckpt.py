"""Tests of orbax_keras_ckpt, a section for each promise. As a script, this file is the program that its tests kill."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import gc
import importlib.util
import io
import itertools
import json
import multiprocessing
import pathlib
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import warnings
import weakref
import zlib

# What has been compiled once is not compiled again, by no test nor process: five times as fast. Nor is it optimized.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="compiled."))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from keras import layers

import orbax_keras_ckpt
from orbax_keras_ckpt import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    KerasOrbaxCheckpointManager,
    OrbaxCheckpointCallback,
    load_model,
)

torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
HERE = pathlib.Path(__file__).parent
pytestmark = [
    pytest.mark.timeout(600, method="thread"),  # what hangs has failed
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),  # Keras's Variable, numpy 2
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype"),  # of 64 bits, which JAX has not
    pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring"),  # plain Orbax as an oracle
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),  # where an epoch ends with a pass over the data
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),  # half written by a killed process
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torch 2.13, by way of torchdata
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),  # Orbax 0.11.20, by way of nest_asyncio
    # Where one of Orbax's reads fails, the others end in a closed event loop.
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]
HOWS = ("killed", "names", "deleted", "contents")  # see Node.tree

if keras.version() < "3.11":  # joins threads; after an error in fit, the garbage collector may call it, and deadlock
    del keras.callbacks.CallbackList.__del__

# --------------------------------------------------------------------------------------------- models and files

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
SEQUENCES = np.random.default_rng(1).normal(size=(64, 4, 3)).astype("float32")


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer=optimizer or keras.optimizers.Adam(0.01), loss="mse", **kwargs)
    return model


def stacked(*members, **kwargs):
    return compiled(keras.Sequential([keras.Input((6,)), *members]), **kwargs)


def dense_model(units=400, **kwargs):
    """Large enough for arrays in files of their own: small ones lie in OCDBT's index."""
    return stacked(layers.Dense(units), layers.Dropout(0.3), layers.Dense(1), **kwargs)


def callback(model, directory, *args, **kwargs):
    return OrbaxCheckpointCallback(model, directory, *args, **{"verbose": 0, **kwargs})


def fit(model, epochs, *callbacks, x=X, **kwargs):
    return model.fit(x, Y, epochs=epochs, batch_size=16, verbose=0, callbacks=list(callbacks), **kwargs)


def commit(manager, *epochs, losses=(), metric="loss"):
    """Saves after each of the epochs, and waits."""
    for epoch, loss in itertools.zip_longest(epochs, losses):
        assert manager.save_state(epoch, metrics=None if loss is None else {metric: loss}) is True
    manager.wait_until_finished()
    return manager


def save(model, directory, *epochs, losses=(), metric="loss", **options):
    manager = KerasOrbaxCheckpointManager(model, directory, **options)
    return commit(manager, *(epochs or [0]), losses=losses, metric=metric)


def restore(model, directory, step=None, **how):
    return KerasOrbaxCheckpointManager(model, directory).restore_state(step, **how)


def values(model, optimizer=True):
    """Every variable in the model's order, as numpy copies."""
    optimizer = optimizer and getattr(model, "optimizer", None)  # a model that was not compiled has none
    if optimizer and model.built and not optimizer.built:
        optimizer.build(model.trainable_variables)
    variables = model.trainable_variables + model.non_trainable_variables + (optimizer.variables if optimizer else [])
    return [np.array(variable.value) for variable in variables]


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()  # bit for bit, NaN and -0.0 as well


def seed(number):
    keras.utils.set_random_seed(number)
    # Which set_random_seed leaves alone in older versions of Keras.
    keras.src.backend.common.global_state.set_global_attribute("global_seed_generator", None)
    if torch:
        torch.manual_seed(number)


def next_draws():
    drawn = [torch.rand(1).item()] if torch else []
    return random.random(), np.random.random(), np.array(keras.random.normal((2,))).tolist() + drawn


def names(directory):
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def contents(directory):
    return {str(path): path.is_file() and path.read_bytes() for path in pathlib.Path(directory).rglob("*")}


@contextlib.contextmanager
def unchanged(model, directory):
    """In the end model and directory are as they were."""
    weights, there = values(model), contents(directory)
    yield
    assert_equal(values(model), weights)
    assert contents(directory) == there


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def data_file(directory):
    """The largest one with arrays in it."""
    return max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path, bit=None):
    """One bit of a file, in place."""
    bit = 8 * (path.stat().st_size // 2) + 3 if bit is None else bit
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def record_of(step):
    """What the module has noted in the folder of a step."""
    return json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["orbax_keras_ckpt"]


@pytest.fixture
def model():
    return dense_model()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of three epochs, and the directory where all three were saved."""
    directory = tmp_path_factory.mktemp("trained")
    seed(1)
    model = dense_model()
    fit(model, 3, callback(model, directory), validation_split=0.25)
    return model, directory


@pytest.fixture
def directory(trained, tmp_path):
    """A copy of that directory."""
    return shutil.copytree(trained[1], tmp_path / "copy")


@contextlib.contextmanager
def handling(number, handler):
    earlier = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, earlier)


@contextlib.contextmanager
def full_disk(size=10_000):
    """No file that this process writes may become larger."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with handling(signal.SIGXFSZ, signal.SIG_IGN):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@contextlib.contextmanager
def nobody():
    """Another user: permissions do not bind root."""
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def public_path():
    """As tmp_path, which is its owner's alone."""
    with tempfile.TemporaryDirectory() as place:
        pathlib.Path(place).chmod(0o755)
        yield pathlib.Path(place)


@functools.cache
def program_text():
    return compile((HERE / "orbax_keras_ckpt.py").read_text(), HERE / "orbax_keras_ckpt.py", "exec")


def command_line(directory, *options):
    """Exit code, lines and errors of the module as a program, run within this process."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["orbax_keras_ckpt.py", str(directory), *options])
        for name in ("KERAS_BACKEND", "JAX_PLATFORMS"):  # which the program sets
            patch.setenv(name, os.environ.get(name, ""))
        exec(program_text(), {"__name__": "__main__", "__file__": str(HERE / "orbax_keras_ckpt.py")})
    return ended.value.code, out.getvalue().splitlines(), err.getvalue()


def is_intact(directory):
    code = command_line(directory, "--verify")[0]
    assert code in (0, 1)
    return code == 0


# ------------------------------------------------------------------------- a run, left at a place and taken up again

is_program = False  # but a test
FORKS = multiprocessing.get_context("forkserver")  # processes that have imported everything already
FORKS.set_forkserver_preload([pathlib.Path(__file__).stem])


class Process:
    """A process of its own that calls one of the scenarios at the end of this file; its output is in `log`."""

    def __init__(self, log, scenario, *arguments, **options):
        self.log = pathlib.Path(log)
        self.process = FORKS.Process(target=redirected, args=(str(log), scenario, arguments, options))
        self.process.start()

    def join(self):
        """The exit code, and what it printed."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.log.read_text()


def redirected(log, scenario, arguments, options):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        program(scenario, *arguments, **options)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def under_strace(work, strace_options, scenario, *arguments, **options):
    """Runs a scenario in a process whose system calls are seen. The exit code, and what it printed."""
    if not shutil.which("strace"):
        pytest.skip("without strace no system calls are seen")
    ready, go = str(work / "ready"), str(work / "go")
    process = Process(work / "log", "waits", ready, go, scenario, *arguments, **options)
    while not os.path.exists(ready):
        time.sleep(0.01)
    command = ["strace", "-f", *strace_options, "-p", str(process.process.pid)]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if "attached" not in strace.stderr.readline():
        process.process.kill()
        pytest.skip("strace may not trace here")
    pathlib.Path(go).touch()
    done = process.join()
    strace.communicate()
    return done


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


on = keras.callbacks.LambdaCallback


def slowly(patch, seconds=0.1):
    """Makes each flush to disk take longer; a save has about ten."""
    fsync = os.fsync
    patch.setattr(os, "fsync", lambda file: time.sleep(seconds) or fsync(file))


def fail(*_, **__):
    raise RuntimeError("on purpose")


def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


class At(keras.callbacks.Callback):
    """Calls `action` at `place`: (epoch, kind of hook, batch). Notes which train batches callbacks hear of."""

    epoch = None

    def __init__(self, place=None, action=terminate):
        super().__init__()
        self.place, self.action, self.heard = place, action, []

    def reach(self, kind, batch=0):
        if (self.epoch, kind, batch) == self.place:
            self.action()

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.reach("begins")

    def on_train_batch_begin(self, batch, logs=None):
        self.heard.append((self.epoch, batch))
        self.reach("train", batch)

    def on_train_batch_end(self, batch, logs=None):
        self.heard.append((self.epoch, batch, "end"))

    def on_test_batch_begin(self, batch, logs=None):
        self.reach("validation", batch)

    def on_epoch_end(self, epoch, logs=None):
        self.reach("ends")


def leave(model, directory, place, how=None, **options):
    """A run that SIGTERM ends at `place`."""
    with pytest.raises(SystemExit):
        fit(model, 3, callback(model, directory, **options), At(place), **(how or {}))


BATCHES = 7  # an epoch, of six samples each
SIZE = 6 * BATCHES
STOPPING = keras.callbacks.EarlyStopping("loss")


class Dataset(keras.utils.PyDataset):
    """Shuffles its index between epochs, by each of the usual ways, or augments its batches."""

    def __init__(self, how, batches=BATCHES, size=6, given=None, **kwargs):
        super().__init__(**kwargs)
        self.how, self.batches, self.size, self.x, self.y = how, batches, size, X, Y
        self.given = given or batches  # if it gives a part of itself, the order decides what is seen
        self.index, self.rng, self.rngs = np.arange(size * batches) % 64, np.random.default_rng(5), [None]
        self.rows = [(int(i), "row") for i in self.index]

    def __len__(self):
        return self.given

    def __getitem__(self, batch):
        part = slice(self.size * batch, self.size * (batch + 1))
        rows = [row for row, _ in self.rows[part]] if self.how == "list" else self.index[part]
        noise = {"noise": np.random, "own noise": self.rng, "others' noise": self.rngs[0]}.get(self.how)
        noise = noise.normal(size=(self.size, 6)).astype("float32") if noise else 0
        return self.x[rows] + noise, self.y[rows]

    def on_epoch_end(self):
        if self.how == "anew":
            self.index = np.arange(self.size * self.batches)
        if self.how in ("anew", "in place"):
            np.random.shuffle(self.index)
        elif self.how == "by a generator":
            self.rng.shuffle(self.index)
        elif self.how == "list":
            random.shuffle(self.rows)

    def on_epoch_begin(self):  # of which Keras 3.10 knows as well
        if self.how == "at the beginning":
            np.random.shuffle(self.index)


class Own(Dataset):
    """Cannot be saved but by its own methods."""

    def __init__(self):
        super().__init__("in place")
        self.tokens = object()

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


class Plain(Dataset):
    """Has no hooks."""

    on_epoch_end = keras.utils.PyDataset.on_epoch_end
    on_epoch_begin = keras.utils.PyDataset.on_epoch_begin


class Keyed(Plain):
    """Augments its batches with a JAX key."""

    def __init__(self, key):
        super().__init__("in order")
        self.key = key

    def __getitem__(self, batch):
        self.key, now = jax.random.split(self.key)
        x, y = super().__getitem__(batch)
        return x + np.asarray(jax.random.normal(now, x.shape)), y


def arrays(size=SIZE, **arguments):
    return lambda: {"x": np.tile(X, (2, 1))[:size], "y": np.tile(Y, (2, 1))[:size], "batch_size": 6, **arguments}


def stream():
    while True:
        x = np.random.normal(size=(6, 6)).astype("float32")
        yield x, x.sum(axis=1, keepdims=True)


def over_and_over(make):
    while True:
        yield from make()


def grain_batches(is_iterator):
    import grain

    data = grain.MapDataset.range(SIZE).map(lambda i: (np.r_[np.float32(i), X[i, 1:]], Y[i])).seed(7).shuffle()
    data = (data.repeat() if is_iterator else data).batch(6)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    steps = {"steps_per_epoch": BATCHES} if is_iterator else {}
    return {"x": iter(data) if is_iterator else data, "shuffle": False, **steps}


def torch_batches(is_stateful, **options):
    torch.manual_seed(0)
    if not is_stateful:
        tensors = torch.utils.data.TensorDataset(torch.from_numpy(X[:SIZE]), torch.from_numpy(Y[:SIZE]))
        return {"x": torch.utils.data.DataLoader(tensors, 6, shuffle=True, **options), "shuffle": False}
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows, collate = list(zip(X[:45], Y[:45])), lambda rows: tuple(map(np.stack, zip(*rows)))
    loader = StatefulDataLoader(rows, 6, shuffle=True, collate_fn=collate, **options)  # a pass ends inside an epoch
    return {"x": loader, "steps_per_epoch": BATCHES, "shuffle": False}


def sharing():
    data, held_out = Dataset("by a generator"), Dataset("by a generator", given=3)
    data.rng = held_out.rng
    return {"x": data, "validation_data": held_out}


def tokens(backbone):
    x = np.clip(X[:SIZE] * 10 + 25, 0, 49).astype("int32")
    segments = {"segment_ids": x % 2} if backbone == "BertBackbone" else {}
    return {"x": {"token_ids": x, "padding_mask": np.minimum(x, 1), **segments}, "y": Y[:SIZE], "batch_size": 6}


DATA = {  # arguments of fit
    "shuffled": arrays(),
    "in order": arrays(shuffle=False),
    "with a number that is none": arrays(shuffle=False, y=np.where(np.arange(SIZE)[:, None] == 20, np.nan, Y[:SIZE])),
    "shuffled by batches": arrays(shuffle="batch"),
    "part of a pass": arrays(60, steps_per_epoch=4),
    "half a pass": arrays(48, steps_per_epoch=4),
    "passes that end inside epochs": arrays(108, steps_per_epoch=BATCHES),
    "stream": lambda: {"x": stream(), "steps_per_epoch": 5, "shuffle": False},
    "dataset": lambda: {"x": Plain("noise"), "shuffle": True},
    "augmented dataset": lambda: {"x": Plain("own noise")},
    "keyed dataset": lambda: {"x": Keyed(jax.random.key(0))},
    "dataset with an old key": lambda: {"x": Keyed(jax.random.PRNGKey(0))},
    "part of a dataset": lambda: {"x": Dataset("in place", 10), "steps_per_epoch": 4},
    **{
        f"dataset shuffled {how}": lambda how=how: {"x": Dataset(how)}
        for how in ("anew", "in place", "by a generator", "list", "at the beginning")
    },
    "dataset in stateful": lambda: {"x": Own()},
    "shuffled, the held-out part too": lambda: arrays(validation_data=Dataset("in place", given=3))(),
    "datasets that share a generator": sharing,
    "grain": lambda: grain_batches(False),
    "grain iterator": lambda: grain_batches(True),
    "torch": lambda: torch_batches(False),  # gigabytes, and therefore not in requirements.txt
    "torch with a generator": lambda: torch_batches(False, generator=torch.Generator().manual_seed(3)),
    "torchdata": lambda: torch_batches(True),
    "torchdata with a generator": lambda: torch_batches(True, generator=torch.Generator().manual_seed(3)),
    **{f"kerashub {name}": lambda name=name: tokens(name) for name in ("BertBackbone", "GPT2Backbone")},
}


def transformer(kind):
    """The inputs and the output of a backbone of KerasHub; of GPT-2 only the layers with LoRA are trained."""
    import keras_hub

    sizes = {"vocabulary_size": 50, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
    backbone = getattr(keras_hub.models, kind)(**sizes, max_sequence_length=6, dropout=0.2)
    if kind == "BertBackbone":
        return backbone.input, layers.GlobalAveragePooling1D()(backbone.output["sequence_output"])
    backbone.enable_lora(2)
    return backbone.input, layers.GlobalAveragePooling1D()(backbone.output)


def model_for(data, calls, averages):
    inputs = x = keras.Input((6,))
    stack = [layers.GaussianNoise(0.1), layers.Dense(4), layers.BatchNormalization()]
    if data.startswith("kerashub"):
        (inputs, x), stack = transformer(data.split()[1]), []
    for layer in [*stack, layers.Dropout(0.3), layers.Dense(1)]:
        x = layer(x)
    optimizer = keras.optimizers.Adam(0.01, use_ema=averages, ema_momentum=0.9)
    return compiled(keras.Model(inputs, x), optimizer, metrics=["mae"], steps_per_execution=calls)


ACTIONS = {  # what another callback may do to the model, the random state or the logs
    "evaluate": lambda model, logs: model.evaluate(X[:8], Y[:8], verbose=0),
    "predict": lambda model, logs: model.predict(X[:8], verbose=0),
    "assign": lambda model, logs: model.trainable_variables[0].assign(model.trainable_variables[0] * 1.01),
    "draw": lambda model, logs: (np.random.random(), random.random(), keras.random.normal(())),
    "decay": lambda model, logs: logs.update(drawn=np.random.random(), rate=halve(model.optimizer)),
    "fit": lambda model, logs: model.fit(X[:8], Y[:8], epochs=5, initial_epoch=4, verbose=0),
}
RUDE = [  # in which hook, and at which batch
    ("on_train_begin", "evaluate", None),
    ("on_epoch_begin", "predict", None),
    ("on_epoch_begin", "fit", None),
    ("on_epoch_begin", "assign", None),
    ("on_epoch_begin", "draw", None),
    ("on_train_batch_begin", "evaluate", 1),
    ("on_train_batch_end", "predict", 4),
    ("on_epoch_end", "decay", None),
    ("on_epoch_end", "fit", None),
]


def halve(optimizer):
    optimizer.learning_rate = float(optimizer.learning_rate) * 0.5
    return float(optimizer.learning_rate)


def rude(hook, action, batch):
    def act(at=None, logs=None):
        if batch in (None, at):
            ACTIONS[action](each.model, logs)

    each = on(**{hook: act})
    return [each]


def stopping_and_others():
    best = os.path.join(tempfile.mkdtemp(), "best.keras")
    options = {"patience": 4, "restore_best_weights": True, "start_from_epoch": 2}
    return [
        keras.callbacks.EarlyStopping("val_loss", min_delta=1.0, **options),
        keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=0.4, patience=1),
        keras.callbacks.ModelCheckpoint(best, "val_loss", save_best_only=True),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.95),
    ]


class Averages(keras.callbacks.SwapEMAWeights):
    """With what cannot be saved, and with methods that do not save whether the averages are in the model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


CALLBACKS = {
    "none": list,
    **{f"{each[0]} {each[1]}": lambda each=each: rude(*each) for each in RUDE},
    "halving": lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)],
    "averages": lambda: [keras.callbacks.SwapEMAWeights()],
    "averages between epochs": lambda: [Averages(swap_on_epoch=True)],
    "stopping and others": stopping_and_others,
    "capture": lambda: [Capture()],
    "terminate": lambda: [keras.callbacks.TerminateOnNaN()],
}


class Left(Exception):
    pass


def attempt(directory=None, place=None, *, data="shuffled", callbacks="none", freq="epoch", position=0, stateful=False,
            epochs=3, calls=1, max_to_keep=5, pause=0):  # fmt: skip
    """Runs a script once, to its end or to a place (epoch, kind, batch, how it leaves). What was heard, and the end."""
    seed(3)
    model = model_for(data, calls, "averages" in callbacks)
    others, arguments, checkpoint, how = CALLBACKS[callbacks](), DATA[data](), None, (place or ())[3:]

    def end():
        if "exception" in how:
            raise Left
        if "SIGKILL" in how:
            checkpoint.checkpoint_manager.wait_until_finished()
        for name in how or ["SIGTERM"]:
            os.kill(os.getpid(), getattr(signal, name))

    if directory:
        members = others * stateful + [arguments["x"]] * isinstance(arguments["x"], Own)
        freq = datetime.timedelta(microseconds=1) if freq == "time" else freq
        checkpoint = callback(model, directory, max_to_keep, save_freq=freq, stateful=members, verbose=1)
    if data == "grain iterator" or data.startswith("torchdata"):
        batches = arguments["x"]
        arguments["x"] = checkpoint.resumable(batches) if checkpoint else over_and_over(lambda: batches)
    at = At(place and place[:3], end)
    every = [*others, at]
    every[position:position] = [checkpoint] if checkpoint else []
    if pause:
        started = pathlib.Path(directory).with_name("started")
        every.append(on(on_train_batch_begin=lambda batch, logs: time.sleep(pause)))
        every.append(on(on_train_batch_end=lambda batch, logs: started.touch()))
    if "validation_data" not in arguments and not data.startswith("kerashub"):
        arguments |= {"validation_data": (X[40:], Y[40:]), "validation_batch_size": 8}
    try:
        history = model.fit(**arguments, epochs=epochs, verbose=0, callbacks=every)
    except (SystemExit, Left):
        if place is None or is_program:
            raise
        return at.heard, None
    assert place is None or directory is None, f"{place} was never reached"
    return at.heard, (values(model), history.history, history.epoch, next_draws())


@functools.cache
def uninterrupted(**options):
    """What the run hears and comes to that is never interrupted, nor has a checkpoint."""
    return attempt(**options)


def assert_same_end(end, expected):
    assert_equal(end[0], expected[0])
    assert repr(end[1:]) == repr(expected[1:])  # NaN, too, is then equal to itself


def assert_exact(directory, places, freq="epoch", stateful=False, position=0, **script):
    """The run that leaves at each of the places in turn equals the uninterrupted one, and no batch is heard twice."""
    everything, expected = uninterrupted(**script)
    heard = []
    for place in [*places, None]:
        more, end = attempt(directory, place, freq=freq, stateful=stateful, position=position, **script)
        heard += more
    assert_same_end(end, expected)
    assert set(heard) == set(everything) and len(more) < len(everything)  # it has resumed
    if not any("validation" in place or "exception" in place for place in places):
        assert heard == everything


def run_to_its_end(work, places=(), **options):
    """Runs attempts in processes of their own until the end. Returns it, and all outputs."""
    logs = []
    for number, place in enumerate([*places, None]):
        code, log = Process(work / f"{number}.log", "attempts", str(work), place=place, **options).join()
        expected = 0 if place is None else -signal.SIGKILL if "SIGKILL" in place else 128 + signal.SIGTERM
        assert code == expected, (code, log)
        logs.append(log)
    return pickle.loads((work / "end").read_bytes())[1], logs


# ------------------------------------------------------------------------------------------- P1: same script, again

PLACES = {
    "killed": [(1, "train", 2, "SIGKILL"), (2, "train", 2, "SIGTERM")],
    # In training, in validation, right before the batches that a resume skips, and again while it is handled.
    "terminated": [(0, "train", 0), (1, "validation", 1), (2, "begins", 0), (2, "train", 4, "SIGTERM", "SIGTERM")],
}
KILLED = [  # data, save_freq, steps_per_execution, where it is left, the steps that are there in the end
    ("shuffled", "epoch", 1, "killed", [0, 1, 2]),
    ("dataset", 3, 1, "killed", None),
    ("half a pass", 3, 2, "killed", None),
    ("stream", "time", 1, "killed", None),
    ("grain", "epoch", 1, "killed", None),
    ("grain iterator", 3, 1, "killed", None),
    ("torch", 3, 2, "killed", None),
    ("torchdata", 3, 1, "killed", None),
    ("shuffled", "epoch", 1, "terminated", [0, 1, 2]),
    ("shuffled", 3, 1, "terminated", [14, 15, 18, 19, 21]),
]


def skip_where_missing(data):
    if data == "grain" and keras.version() < "3.11":
        pytest.skip("Keras takes Grain datasets since 3.11")
    module = "keras_hub" if "hub" in data else data.split()[0] if data.startswith("torch") else "keras"
    if not importlib.util.find_spec(module):
        pytest.skip("it is gigabytes")


@pytest.mark.parametrize(("data", "freq", "calls", "places", "kept"), KILLED, ids=str)
def test_killed_script_that_is_run_again_ends_as_if_it_had_not_been_killed(data, freq, calls, places, kept, tmp_path):
    """P8 as well: SIGTERM saves within one batch and ends with its exit code."""
    skip_where_missing(data)
    script = {"data": data, "calls": calls}
    end, logs = run_to_its_end(tmp_path, PLACES[places], freq=freq, **script)
    assert all("Load Orbax checkpoint on_train_begin.\nContinue with epoch" in log for log in logs[1:])
    for place, log, later in zip(PLACES[places], logs, logs[1:]):
        if "SIGKILL" not in place:
            assert "Stop on SIGTERM: the run is saved. The same script continues it." in log
            assert place[1] != "train" or ", after batch " in later
    assert_same_end(end, uninterrupted(**script)[1])
    found = sorted(int(name) for name in names(tmp_path / "ckpt"))  # numbers: nothing else is left
    assert found == (kept or found)


def test_finished_run_says_so_and_loads_the_final_state(trained, directory, capsys, model):
    reference, _ = trained
    before = contents(directory)
    for epochs, message in ((3, "3 of 3 epochs are done"), (2, "3 epochs are done, more than epochs=2")):
        history = fit(model, epochs, callback(model, directory, verbose=1))
        assert f"Nothing left to train: {message}" in capsys.readouterr().out
        assert_equal(values(model), values(reference))
        assert history.history == reference.history.history and history.epoch == [0, 1, 2]
    assert contents(directory) == before


def test_second_fit_continues_and_leaves_alone_a_model_that_is_at_the_newest_checkpoint(tmp_path):
    seed(5)
    expected = fit(reference := dense_model(), 5)
    seed(5)
    model, seen = dense_model(), []
    checkpoint = callback(model, tmp_path)
    fit(model, 2, checkpoint)
    history = fit(model, 5, checkpoint)
    assert_equal(values(model), values(reference))
    assert history.history == expected.history and history.epoch == [0, 1, 2, 3, 4]
    model.evaluate(X, Y, verbose=0)
    model.compile(keras.optimizers.SGD(0.25), "mse")
    weights, optimizer = values(model, optimizer=False), model.optimizer
    begin = on(on_epoch_begin=lambda epoch, logs: seen.append((epoch, values(model, optimizer=False))))
    fit(model, 6, checkpoint, begin)
    assert model.optimizer is optimizer and seen[0][0] == 5 and float(optimizer.learning_rate.value) == 0.25
    assert_equal(seen[0][1], weights)
    loaded = load_model(tmp_path)  # is described anew
    assert float(loaded.optimizer.learning_rate) == 0.25
    assert_equal(values(loaded), values(model))
    model.set_weights([weight * 0 for weight in model.get_weights()])  # elsewhere: the checkpoint is put back
    fit(model, 7, checkpoint, begin)
    assert any(weight.any() for weight in seen[-1][1])


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"])
def test_run_that_a_callback_stopped_in_a_resumed_epoch_is_complete(hook, tmp_path, capsys):
    model, again, third = dense_model(), dense_model(), dense_model()
    leave(model, tmp_path, (1, "train", 1), {"validation_split": 0.25})
    end, before = on(**{hook: lambda *_, **__: setattr(again, "stop_training", True)}), handlers()
    assert fit(again, 5, callback(again, tmp_path), end, validation_split=0.25).epoch == [0, 1]
    assert_nothing_left(again, before)
    assert fit(third, 5, callback(third, tmp_path, verbose=1)).epoch == [0, 1]
    assert_equal(values(third), values(again))
    assert "a callback stopped the run after 2 epochs" in capsys.readouterr().out
    assert fit(third, 6, callback(third, tmp_path)).epoch == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("add_history", [False, True])
def test_list_of_callbacks_made_by_the_user_is_served(add_history, tmp_path, model):
    fit(model, 1)  # model.history is that of another fit
    checkpoint = callback(model, tmp_path, verbose=1)
    options = {"add_history": add_history, "model": model, "epochs": 2, "verbose": 0}
    callbacks = keras.callbacks.CallbackList([checkpoint], **options)
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks)
    assert checkpoint.checkpoint_manager.all_steps() == [0, 1]
    assert fit(model, 2, callback(model, tmp_path)).epoch in ([], [0, 1])


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_fit_leaves_its_list_of_callbacks_to_no_garbage_collector(how, tmp_path, model):
    """Which would delete it in any thread. Keras 3.10 joins threads then: a deadlock, in one that has just started."""
    with pytest.raises(RuntimeError) if how == "raises" else contextlib.nullcontext():
        others = [At((0, "train", 1), fail)] if how == "raises" else []
        given = [callback(model, tmp_path), *others]
        callbacks = keras.callbacks.CallbackList(given, add_history=True, model=model, epochs=1, verbose=0)
        reference = weakref.ref(callbacks)
        gc.disable()
        try:
            model.fit(X, Y, verbose=0, callbacks=callbacks)
        finally:
            del callbacks
            gc.enable()
    assert reference() is None


def test_run_that_another_callback_resumes_is_left_where_it_is(tmp_path):
    def run(directory, *others):
        seed(3)
        model, backup = dense_model(), keras.callbacks.BackupAndRestore(tmp_path / "backup")
        with contextlib.suppress(RuntimeError):
            fit(model, 3, backup, *([callback(model, directory)] if directory else []), *others)
        return model.history.epoch

    run(None, At((2, "train", 1), fail))
    assert run(tmp_path / "ours") == [2] and names(tmp_path / "ours") == ["2"]


@pytest.mark.parametrize(("optimizer", "is_thawed"), [("AdamW", False), ("SGD", True)])
def test_script_of_two_phases_with_optimizers_of_their_own_is_run_again(optimizer, is_thawed, tmp_path):
    def run(directory, place=None):
        seed(3)
        model = dense_model()
        model.layers[0].trainable = not is_thawed
        compiled(model)
        checkpoint = [callback(model, directory)] if directory else []
        fit(model, 2, *checkpoint)
        np.random.random()
        model.layers[0].trainable = True
        compiled(model, getattr(keras.optimizers, optimizer)(0.002))
        with pytest.raises(SystemExit) if place else contextlib.nullcontext():
            fit(model, 4, *checkpoint, At(place), initial_epoch=2)
        return values(model)

    for place in [(2, "train", 1), (2, "ends", 0), (3, "train", 2)]:
        run(tmp_path / "killed", place)
    expected = run(None)
    assert_equal(run(tmp_path / "killed"), expected)
    assert_equal(run(tmp_path / "at once"), expected)


def test_optimizer_that_an_aborted_fit_has_trained_is_reported(tmp_path, model):
    checkpoint = callback(model, tmp_path)
    fit(model, 1, checkpoint)
    compiled(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, 2, checkpoint, At((1, "train", 1), fail))
    with pytest.warns(UserWarning, match="trained in a fit that was aborted, and keeps that state. Compile it anew"):
        fit(model, 2, checkpoint)
    fit(compiled(model), 3, checkpoint)


class Aborting(keras.Model):
    """Its `fit` can be interrupted in a train step, whose inputs are then used up."""

    interrupts = False

    def make_train_function(self, force=False):
        super().make_train_function(force)
        step = self.train_function

        def train_function(state, iterator):
            logs = step(state, iterator)
            if self.interrupts:
                raise KeyboardInterrupt
            return logs

        self.train_function = train_function


class Broken(Dataset):
    """Cannot be read at times."""

    fails = False

    def __getitem__(self, batch):
        if self.fails:
            raise OSError("the data cannot be read")
        return super().__getitem__(batch)


@pytest.mark.parametrize("how", ["in a step", "by the data", "while restoring"])
def test_fit_goes_on_after_one_that_has_taken_the_values_of_the_model(tmp_path, monkeypatch, how):
    if how == "by the data" and keras.version() < "3.11":
        pytest.skip("fit of Keras 3.10 itself fails if the model has no values")

    def script():
        seed(3)
        empty = holder({"empty": ((0, 3), "float32")})
        model = Aborting(inputs := keras.Input((6,)), layers.Dropout(0.3)(layers.Dense(4)(empty(inputs))))
        return compiled(model, metrics=["mae"]), Broken("in place")

    def train(model, data, *callbacks):
        model.fit(data, epochs=3, verbose=0, validation_data=(X[40:], Y[40:]), callbacks=list(callbacks))
        return values(model)

    def unreadable(*_, **__):
        raise OSError(errno.EIO, "the disk cannot be read")

    expected = train(*script())
    model, data = script()
    checkpoint = callback(model, tmp_path / "ckpt")
    at = At((1, "train", 2), lambda: setattr(model, "interrupts", True))
    if how == "by the data":
        at = At((1, "begins", 0), lambda: setattr(data, "fails", True))
    with pytest.raises((KeyboardInterrupt, OSError)):
        train(model, data, checkpoint, at)
    model.interrupts = data.fails = False
    if how == "while restoring":
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk cannot be read"):
            patch.setattr(jax, "make_array_from_callback", unreadable)
            train(model, data, checkpoint)
    other = callback(model, tmp_path / "none")
    for attempted in (other.checkpoint_manager.restore_state, lambda: train(model, data, other)):
        with pytest.raises(CheckpointError, match="no checkpoint has been restored that has them. Build and compile"):
            attempted()
    assert_equal(train(model, data, checkpoint), expected)


def test_fit_that_begins_with_a_model_that_an_aborted_one_has_trained_says_so(tmp_path, model):
    checkpoint = callback(model, tmp_path)
    for place in [(0, "begins", 0), (0, "train", 2)]:  # before the first there was nothing to warn of
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(model, 2, checkpoint, At(place, fail))
    with pytest.warns(UserWarning, match="An aborted fit has trained this model already"):
        fit(model, 2, checkpoint)


# ------------------------------------------------------------------------------------------------ P2: bit for bit

EPOCHS = [(0, "train", 2), (1, "train", 2, "exception"), (1, "validation", 1), (1, "ends", 0), (2, "train", 0)]
STEPS = [(0, "train", 3, "exception"), (0, "ends", 0), (1, "begins", 0), (2, "validation", 0)]
EDGES = [(0, "train", 0), (0, "train", 6), (1, "validation", 0), (2, "train", 4, *["SIGTERM"] * 2), (2, "begins", 0)]
BEGINS = [(0, "begins", 0), (1, "begins", 0), (2, "begins", 0)]
SIGNALS = [(0, "train", 3), (1, "validation", 1), (2, "train", 5)]
ODD = [(0, "validation", 0), (1, "ends", 0)]


def scenarios():
    """Data x callbacks x save_freq x where it is left, by SIGTERM or by an exception."""
    for data in DATA:
        if data == "with a number that is none":
            continue
        if not data.startswith("kerashub"):
            yield EPOCHS, {"data": data}
        yield STEPS if not data.startswith("kerashub") else STEPS[:1], {"data": data, "freq": 3}
    for freq, data in (("time", "shuffled"), ("auto", "shuffled"), ("auto", "stream")):
        yield [*EPOCHS[:1], *EPOCHS[2:]], {"freq": freq, "data": data}
    for calls, data in ((2, "shuffled"), (3, "shuffled"), (2, "part of a pass"), (2, "dataset shuffled anew")):
        yield [*ODD[:1], (1, "train", calls), *ODD[1:]], {"calls": calls, "data": data, "freq": 4}
    for freq in ("epoch", 1):  # the length of the data is not known, and the last call of an epoch has one batch
        yield [(0, "train", 6), (1, "train", 2), (2, "validation", 0)], {"freq": freq, "data": "grain", "calls": 2}
    for freq in ("epoch", 3):
        yield EDGES, {"freq": freq}
        for position in (0, 1):
            yield BEGINS, {"freq": freq, "position": position, "callbacks": "halving"}
            yield BEGINS, {"freq": freq, "position": position, "data": "dataset shuffled at the beginning"}
    for hook, action, _ in RUDE:
        for position, places in ((0, EPOCHS[:3]), (2, EPOCHS[3:])):
            yield places, {"callbacks": f"{hook} {action}", "position": position}
    for callbacks in ("averages", "averages between epochs"):
        for stateful in (False, True):
            yield SIGNALS, {"callbacks": callbacks, "stateful": stateful}
            yield ODD, {"callbacks": callbacks, "stateful": stateful, "freq": 2, "position": 2}
    yield [(0, "train", 0)], {"data": "with a number that is none", "callbacks": "terminate"}


SCENARIOS = [pytest.param(*each, id=" ".join(f"{n}={v}" for n, v in each[1].items())) for each in scenarios()]


@pytest.mark.parametrize(("places", "options"), SCENARIOS)
def test_interrupted_run_equals_uninterrupted_run(places, options, tmp_path):
    data, callbacks = options.get("data", "shuffled"), options.get("callbacks", "")
    skip_where_missing(data)
    if keras.version() < "3.11" and re.match("on_(train|epoch|train_batch)_begin (evaluate|predict|fit)", callbacks):
        pytest.skip("fit of Keras 3.10 itself fails of it, where it comes before the first batch of a process")
    if data == "part of a dataset" and reads_ahead():
        with pytest.warns(UserWarning, match="batches of Dataset before the shuffle for their epoch"):
            attempt(tmp_path, data=data)
        return
    if keras.version() < "3.11" and callbacks.endswith("fit"):  # nor may a fit within come before it
        places = [place for place in places if "validation" not in place]
    assert_exact(tmp_path, places, **options)


def reads_ahead():
    """Whether Keras draws batches before they are trained on, on a CPU as well."""
    seen, model = [], dense_model()
    data = ((X[:8], Y[:8]) for _ in range(9) if seen.append(1) is None)
    count = on(on_train_batch_begin=lambda batch, logs: seen.append(0))
    model.fit(data, steps_per_epoch=6, verbose=0, shuffle=False, callbacks=[count])
    return sum(seen) > 6


@keras.saving.register_keras_serializable("tests")
class TwoLayers(layers.Layer):
    def __init__(self, **config):
        super().__init__(**config)
        self.first, self.second = layers.Dense(6, "tanh"), layers.BatchNormalization()

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, inputs):
        return self.second(self.first(inputs))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [TwoLayers() for _ in range(2)]
        self.dropout = layers.Dropout(0.2)
        self.head = layers.Dense(1)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x, training=training))


def functional():
    inputs = keras.Input((6,))
    x = layers.Add()([layers.Dense(4)(inputs), layers.Dense(4)(inputs)])
    return compiled(keras.Model(inputs, layers.Dense(1)(x)), metrics=["mae"])


def nested():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dropout(0.2)], name="inner")
    inputs = keras.Input((6,))
    return compiled(keras.Model(inputs, layers.Dense(1)(inner(inner(inputs) @ np.ones((4, 6), "float32")))))


def noisy():
    stack = [layers.GaussianNoise(0.1), layers.Dense(4), layers.BatchNormalization(), layers.GaussianDropout(0.2)]
    return stacked(*stack, layers.AlphaDropout(0.1), layers.Dense(1))


def recurrent(layer, **shape):
    return compiled(keras.Sequential([keras.Input(**shape or {"shape": (4, 3)}), layer, layers.Dense(1)]))


def lora(quantize=None):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(1)])
    if quantize:
        model.layers[0].quantize(quantize)
    model.layers[0].enable_lora(2, lora_alpha=3)
    return compiled(model)


def lora_inside():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5), layers.Dense(6)])
    inner.layers[0].enable_lora(2)
    inner.layers[1].trainable = False
    return stacked(inner, layers.Dense(1))


def frozen_attention(with_lora=False):
    inputs, attention = keras.Input((6,)), layers.MultiHeadAttention(2, 3)
    x = layers.Reshape((2, 3))(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(attention(x, x))))
    attention.trainable = False
    if with_lora:
        attention.query_dense.enable_lora(2)
    return compiled(model)


FROZEN = {  # the part of the first of two blocks
    "subclassed": lambda block: block,
    "block": lambda block: block,
    "layer": lambda block: block.first,
    "kernel": lambda block: block.first.kernel,
    "normalization": lambda block: block.second,  # which then normalizes as in inference
}


def frozen_part(kind):
    model = Subclassed() if kind == "subclassed" else stacked(TwoLayers(), TwoLayers(), layers.Dense(1))
    model(X[:1])
    FROZEN[kind](model.blocks[0] if kind == "subclassed" else model.layers[0]).trainable = False
    return compiled(model)


def with_policy(policy):
    earlier = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return dense_model()
    finally:
        keras.config.set_dtype_policy(earlier)


MODELS = {
    "sequential": dense_model,
    "many layers": lambda: stacked(*(layers.Dense(6) for _ in range(12)), layers.Dense(1)),  # Orbax sorts names
    "unbuilt": lambda: compiled(keras.Sequential([layers.Dense(4), layers.Dropout(0.2), layers.Dense(1)])),
    "functional": functional,
    "subclassed": lambda: compiled(Subclassed()),
    "nested": nested,
    "noise and batch normalization": noisy,
    "recurrent": lambda: recurrent(
        layers.Bidirectional(layers.RNN([layers.GRUCell(3, dropout=0.1), layers.LSTMCell(2)]))
    ),
    "stateful recurrent": lambda: recurrent(
        layers.LSTM(3, stateful=True, dropout=0.1, recurrent_dropout=0.1), batch_shape=(16, 4, 3)
    ),
    "lora": lora,
    "lora inside": lora_inside,
    "frozen attention": frozen_attention,
    "lora in frozen attention": lambda: frozen_attention(True),
    **{f"frozen {kind}": lambda kind=kind: frozen_part(kind) for kind in FROZEN},
    "int8": lambda: lora("int8"),
    "int4": lambda: lora("int4"),
    "bfloat16": lambda: with_policy("bfloat16"),
    "mixed_float16 with loss scaling": lambda: with_policy("mixed_float16"),
    "moving average": lambda: dense_model(optimizer=keras.optimizers.Adam(0.01, use_ema=True)),
    "gradient accumulation": lambda: dense_model(optimizer=keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)),
    "variables of one path": lambda: dense_model(130, optimizer=keras.optimizers.Adafactor(0.01)),
    "learning-rate schedule": lambda: dense_model(
        optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, 10), momentum=0.9)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_interrupted_run_of_any_model_equals_uninterrupted_run_and_so_does_that_of_a_loaded_model(kind, tmp_path):
    if kind == "int4" and keras.version() < "3.12":
        pytest.skip("Keras has int4 for Dense layers with LoRA since 3.12")
    x = SEQUENCES if "recurrent" in kind else X

    def run(epochs, *directory, build=MODELS[kind]):
        seed(3)
        model = build()
        history = fit(model, epochs, *(callback(model, each) for each in directory), x=x, validation_split=0.25)
        return values(model), history.history, next_draws()

    def load():
        keras.utils.clear_session()  # as in a new process
        return load_model(copy, custom_objects={"Subclassed": Subclassed})

    reference = run(4)
    run(2, tmp_path / "saved")
    copy = shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    for resumed in (run(4, tmp_path / "saved"), run(4, copy, build=load)):  # the first with other automatic names
        assert_same_end(resumed, reference)
    assert_same_end(run(4, tmp_path / "saved"), reference)  # nothing is left to train
    if kind.startswith("mixed_float16"):
        assert type(load().optimizer).__name__ == "LossScaleOptimizer"


def test_every_batch_is_saved_as_it_was_although_training_goes_on_at_once(tmp_path):
    """Batches are donated the arrays that are still being written. The oracle is a run without any checkpoint."""

    def run(epochs, *directory):
        seed(2)
        model = stacked(layers.Dense(2000), layers.Dense(500), layers.Dense(1))
        fit(model, epochs, *[callback(model, each, None, save_freq=1) for each in directory] or [Capture()])
        return model

    run(3)
    manager = KerasOrbaxCheckpointManager(model := run(2, tmp_path), tmp_path, max_to_keep=None)
    assert manager.all_steps() == list(range(1, 9))  # of four batches an epoch
    for step in manager.all_steps():
        manager.restore_state(step)
        assert_equal(values(model), Capture.states[step])


def test_history_is_as_keras_leaves_it_with_logs_of_every_kind(tmp_path):
    odd = {
        "ragged": [[1, 2], [3]], "none": None, "text": "12:00", "when": datetime.datetime(2020, 1, 2), "number": 3,
        "array": np.ones(3, "float32"), 7: 1.5, ("a", "tuple"): 2.5, "numpy": np.float32(0.1), "truth": True,
        "object": object(),
    }  # fmt: skip
    histories = []
    for epochs in (1, 2):
        model, own = dense_model(), keras.callbacks.History()
        update = on(on_epoch_end=lambda epoch, logs: logs.update(odd))
        histories.append(fit(model, epochs, update, own, callback(model, tmp_path)).history)
        assert own.epoch == list(range(epochs)) and len(pickle.loads(pickle.dumps(own.history))["loss"]) == epochs
        assert set(vars(own)) == {"history", "epoch", "_model", "params"}
    recorded = record_of(tmp_path / "1")["metrics"].keys()
    assert recorded >= {"loss", "number", "numpy", "7"} and not recorded & {"ragged", "none", "text", "when", "object"}
    assert histories[1].keys() >= odd.keys()
    for name, series in histories[1].items():
        assert len(series) == 2
        if name != "object":  # which comes back as its text
            assert type(series[0]) is type(histories[0][name][0]) and repr(series[0]) == repr(histories[0][name][0])
    assert fit(model, 1, own).epoch == [0]


def test_script_may_give_a_dataset_other_numbers_and_texts(tmp_path):
    class Counting(Dataset):
        def on_epoch_end(self):
            super().on_epoch_end()
            self.count = self.count + 1

    for epochs, folder, factor in ((2, "a", 1), (3, "b", 2)):
        data, model = Counting("in place"), dense_model()
        data.folder, data.factor, data.count = folder, factor, 1
        model.fit(data, epochs=epochs, verbose=0, callbacks=[callback(model, tmp_path)])
    assert (data.folder, data.factor, data.count) == ("b", 2, 5)  # asked before the first epoch and after each


def test_data_that_is_not_what_it_was_is_reported_before_anything_is_trained(tmp_path, model):
    def resume(message, error=CheckpointMismatchError, expect=pytest.raises, **kwargs):
        arguments, trained = {"x": X, "y": Y, "batch_size": 16, "shuffle": False, **kwargs}, At()
        with expect(error, match=message):
            model.fit(**arguments, epochs=3, verbose=0, callbacks=[trained, callback(model, tmp_path)])
        return trained.heard

    leave(model, tmp_path, (0, "train", 1), {"shuffle": False})
    before = contents(tmp_path)
    assert not resume("epoch of 4 batches, and now an epoch has 8: the batch size or the data", batch_size=8)
    assert not resume("epoch of 4 batches, and now an epoch has 2", x=X[:32], y=Y[:32])
    assert not resume(r"shapes \[\[16, 6\], \[16, 1\]\], and now .*\[\[13, 6\]", x=X[:52], y=Y[:52], batch_size=13)
    short = {"x": ((X[:16], Y[:16]) for _ in range(1)), "y": None, "batch_size": None, "steps_per_epoch": 4}
    assert not resume("step 0 was made after 2 .* data ends after 1", **short)
    content = "last skipped batch has other content"  # a warning, which is an error in here
    assert not resume(content, UserWarning, y=Y + 1)
    assert contents(tmp_path) == before
    assert resume(content, UserWarning, pytest.warns, y=Y + 1)[0] == (0, 2)


def test_calls_and_numbers_that_do_not_fit_are_refused(tmp_path, model):
    leave(model, tmp_path / "a", (0, "train", 2))
    other = compiled(keras.models.clone_model(model), steps_per_execution=2)
    message = "after 3 batches of an epoch, which is not a multiple of steps_per_execution=2"
    with pytest.raises(CheckpointMismatchError, match=message):
        fit(other, 3, callback(other, tmp_path / "a"))
    assert fit(other, 2).epoch == [0, 1]  # nothing of it is left in the model
    resumed = fit(model, 3, callback(model, shutil.copytree(tmp_path / "a", tmp_path / "c")), initial_epoch=1)
    assert resumed.epoch == [0, 1, 2]  # the place of the checkpoint counts, although it is in the first epoch
    fit(model, 2, callback(model, tmp_path / "b", save_freq=3))  # up to step 8
    message = "save_freq='epoch' and steps_per_epoch=1, .* step 2, which is not above 8"
    with unchanged(model, tmp_path / "b"), pytest.raises(ValueError, match=message):
        fit(model, 4, callback(model, tmp_path / "b"))


def test_what_a_resumed_run_cannot_follow_is_reported_when_fit_starts(tmp_path, model):
    more, held_out = dense_model(), ((X[:8], Y[:8]) for _ in range(9))
    more.second_optimizer = keras.optimizers.SGD()
    with pytest.warns(UserWarning, match="further optimizers of the model is not saved: second_optimizer"):
        fit(more, 1, callback(more, tmp_path / "optimizer"))
    with pytest.warns(UserWarning, match="validation data is a generator"):
        fit(model, 1, callback(model, tmp_path / "generator"), validation_data=held_out, validation_steps=2)
    save(model, tmp_path / "by hand")
    with pytest.warns(UserWarning, match="not saved by this callback: the data starts from its beginning"):
        fit(model, 2, callback(model, tmp_path / "by hand"), steps_per_epoch=2)
    data = ((X[i % 50 : i % 50 + 8], Y[i % 50 : i % 50 + 8]) for i in itertools.count())
    checkpoint, options = callback(model, tmp_path / "twice"), {"steps_per_epoch": 4, "verbose": 0, "shuffle": False}
    model.fit(data, epochs=2, callbacks=[checkpoint], **options)
    with pytest.warns(UserWarning, match="last skipped batch has other content.*create a generator anew for each fit"):
        assert model.fit(data, epochs=3, callbacks=[checkpoint], **options).epoch == [0, 1, 2]


class Rows(Dataset):
    def on_epoch_end(self):
        self.x = self.x[::-1]


class Named(Dataset):
    names = np.array([["a"], ["b"]], dtype=object)

    def on_epoch_end(self):
        self.names = self.names[::-1]


class Augmented(Plain):
    def __init__(self):
        super().__init__("in order")
        self.drop = layers.Dropout(0.5)

    def __getitem__(self, batch):
        x, y = super().__getitem__(batch)
        return np.array(self.drop(x, training=True)), y


def test_datasets_and_members_that_cannot_be_followed_are_named_at_the_first_fit(tmp_path):
    def run(data, shuffle=True, stateful=(), held_out=None, others=(), **attributes):
        model, directory = dense_model(), tempfile.mkdtemp(dir=tmp_path)
        vars(data).update(attributes)
        ours = callback(model, directory, stateful=stateful)
        model.fit(data, shuffle=shuffle, verbose=0, callbacks=[*others, ours], validation_data=held_out)

    rng, shuffled = np.random.default_rng(1), Plain("in order")
    shuffles = on(on_epoch_end=lambda epoch, logs: np.random.shuffle(shuffled.index))

    for message, data, options in (
        ("Dataset has.* in on_epoch_begin and on_epoch_end .* saved: tokens", Dataset("anew"), {"tokens": object()}),
        ("Rows has.* in on_epoch_begin and on_epoch_end that are not saved: x", Rows("anew"), {}),
        ("batches of Plain before the shuffle.* workers=2", Plain("noise", workers=2), {}),
        ("batches of Dataset before the shuffle.* workers=2", Dataset("in place", workers=2), {"shuffle": False}),
        ("Named has.* that are not saved: names", Named("anew"), {"names": Named.names}),
        ("Augmented has.* attributes that are not saved: drop", Augmented(), {}),
        ("Augmented has.* attributes that are not saved: drop", Plain("in order"), {"held_out": Augmented()}),
        ("Plain has.* not saved: rngs", Plain("others' noise"), {"rngs": [rng]}),
        ("Plain has.* not saved: index", shuffled, {"others": [shuffles]}),
        ("was not passed to fit", Plain("in order"), {"stateful": [STOPPING]}),
    ):
        with pytest.warns(UserWarning, match=message):
            run(data, **options)
    run(Plain("noise"), paths=np.array(["a", "b"], dtype=object), shape=Point(1, 2), tokens=object())  # never changed
    run(Plain("noise"), keyed={None: object(), "a": [{1: object(), "b": 2}]})
    run(Own())
    run(data := Own(), stateful=[data])


def test_another_number_of_steps_begins_the_data_anew(tmp_path):
    heard = []
    for epochs, steps in ((2, 3), (3, None)):
        at, model = At(), dense_model()
        options = {"batch_size": 6, "shuffle": False, "steps_per_epoch": steps, "epochs": epochs, "verbose": 0}
        model.fit(X[:SIZE], Y[:SIZE], callbacks=[callback(model, tmp_path), at], **options)
        heard.append(len(at.heard) // 2)
    assert heard == [2 * 3, BATCHES]


# ------------------------------------------------------------------------------------------------ P3: nothing lost


@pytest.mark.parametrize("freq", ["epoch", 3])
def test_kills_at_random_instants_always_leave_a_restorable_checkpoint(freq, tmp_path):
    """Under "epoch" every other signal is SIGTERM, so that snapshots inside an epoch are being replaced."""
    draw, committed, model = random.Random(0), False, model_for("", 1, False)
    options = {"freq": freq, "max_to_keep": 1, "epochs": 40}
    for kill in range(8):
        process = Process(tmp_path / f"{kill}.log", "attempts", str(tmp_path), pause=0.05, **options)
        while not (tmp_path / "started").exists() and process.process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.8))
        os.kill(process.process.pid, signal.SIGTERM if freq == "epoch" and kill % 2 else signal.SIGKILL)
        process.join()
        (tmp_path / "started").unlink(missing_ok=True)
        with warnings.catch_warnings(action="ignore"):
            found = restore(model, tmp_path / "ckpt")
        assert found is not None or not committed
        committed = found is not None
    assert committed
    assert_same_end(run_to_its_end(tmp_path, **options)[0], uninterrupted(epochs=40)[1])
    assert names(tmp_path / "ckpt") == ["39" if freq == "epoch" else str(40 * BATCHES)]


# Every system call of a run is replayed, as a kill and as a power cut after it.

CALLS = (
    "openat,write,pwrite64,writev,pwritev,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync"
)


class Node:
    """A file or folder: as it is, and as it is on the disk for certain."""

    def __init__(self, path=None, content=None):
        if path and path.is_dir():
            content = {each.name: Node(each) for each in path.iterdir()}
        elif path:
            content = bytearray(path.read_bytes())
        self.content = content
        self.flush()

    def flush(self):
        self.flushed, self.removed = copy.copy(self.content), set()  # names, since the folder was flushed

    def tree(self, how, path=""):
        """What is left, by path. `how`: "killed", or after a power cut, without what was not flushed: "names" without
        new names, "deleted" without what was deleted either, "contents" with all names, but empty files."""
        if isinstance(self.content, bytearray):
            return {path: bytes(self.content if how == "killed" else self.flushed)}
        found = {path: None}
        for name, each in (self.content if how in ("killed", "contents") else self.flushed).items():
            if how != "deleted" or name not in self.removed:
                found |= each.tree(how, f"{path}/{name}")
        return found


def replayed(log, root, top):
    """Does again what system calls have done to a folder. Yields the call after each that others can see."""
    begun, offsets = {}, collections.Counter()

    def end(path):
        """The folder that a path is in, and its last name."""
        *folders, name = path.removeprefix(str(root)).strip("/").split("/")
        return functools.reduce(lambda node, folder: node.content[folder], folders, top), name

    for line in log.read_text().splitlines():
        process, line = line.split(maxsplit=1)
        line = begun.pop(process, "") + re.sub(r"^<\.\.\. \w+ resumed>", "", line)
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
        if not (found := re.match(r"(\w+)\((.*)\)\s+= (\d+)", line)):
            continue  # it has failed
        call, arguments, result = found[1], found[2], int(found[3])
        places, texts = (
            [bytes.fromhex(each.replace("\\x", "")) for each in re.findall(kind, arguments)]
            for kind in (r"<(\\[\\\w]+)>", r'"([\\\w]*)"')
        )
        paths = places[:1]
        if "write" not in call and not call.startswith("f"):
            paths = [os.path.join(*each) for each in itertools.zip_longest(places, texts, fillvalue=b"")]
        paths = [os.fsdecode(path) for path in paths]
        if not paths or not all(path.startswith(str(root)) for path in paths):
            continue
        folder, name = end(paths[-1])
        node = folder.content.get(name) if name else top
        if call == "openat":
            offsets[result] = 0
            if "O_CREAT" not in line or (node and "O_TRUNC" not in line):
                continue
            folder.content.setdefault(name, Node(content=bytearray())).content = bytearray()
        elif "write" in call:
            descriptor, number = int(arguments.split("<")[0]), arguments.rpartition(", ")[2]
            start = int(number) if call.startswith("p") else offsets[descriptor]
            offsets[descriptor] = start + result
            node.content[start : start + result] = b"".join(texts)[:result]
        elif call == "ftruncate":
            del node.content[int(arguments.rpartition(", ")[2]) :]
        elif call.startswith("rename"):
            old, old_name = end(paths[0])
            folder.content[name] = old.content.pop(old_name)
        elif call in ("unlink", "unlinkat", "rmdir"):
            del folder.content[name]
            folder.removed.add(name)
        elif call.startswith("mkdir"):
            folder.content[name] = Node(content={})
        else:
            node.flush()
        if "write" not in call and call != "openat":  # what has been written in part looks the same from outside
            yield call, paths


class Capture(keras.callbacks.Callback):
    """Notes the state of a run before each batch and at its end, by the number of the batch."""

    states = {}  # noqa: RUF012

    def on_train_batch_begin(self, batch, logs=None):
        model = self.model  # which is up to date then
        self.states[int(model.optimizer.iterations.value)] = values(model)

    def on_train_end(self, logs=None):
        self.on_train_batch_begin(0)


def restored_number(model, directory):
    """How many batches the newest state that can be restored has behind it; None if there is none."""
    with warnings.catch_warnings(action="ignore"):
        if KerasOrbaxCheckpointManager(model, directory, read_only=True).restore_state() is None:
            return None
    number = int(model.optimizer.iterations.value)
    assert_equal(values(model), Capture.states[number])
    return number


@pytest.mark.parametrize("kind", ["one kept", "replaced", "damaged"])
def test_whenever_a_run_is_killed_or_the_power_goes_a_committed_state_is_left(kind, tmp_path):
    directory, calls, place, model = tmp_path / "ckpt", tmp_path / "calls", tmp_path / "state", model_for("", 1, False)
    directory.mkdir()
    attempt(callbacks="capture", epochs=4)
    if kind == "damaged":
        attempt(directory, epochs=2)
        flip(data_file(directory / "1"), 8 * 300)
    disk, least, trees = Node(directory), dict.fromkeys(HOWS), {}
    options = ["-y", "-xx", "-s", "1000000", "-e", f"trace={CALLS}", "-o", calls]
    code, log = under_strace(tmp_path, options, "traced", str(directory), kind)
    assert code == 0, log
    for count, call in enumerate(replayed(calls, directory, disk)):
        for how in HOWS:
            if trees.get(how) == (tree := disk.tree(how)):
                continue
            trees[how] = tree
            for path, content in tree.items():
                there = pathlib.Path(f"{place}{path}")
                there.mkdir() if content is None else there.write_bytes(content)
            number, before = restored_number(model, place), least[how] or 0
            assert number is not None or least[how] is None, f"nothing is left when {how}, after {count}: {call}"
            assert number is None or how == "deleted" or number >= before, (number, how, count, call)
            least[how] = number if number is not None and number >= before else least[how]
            shutil.rmtree(place)
    assert count > 60 and set(least.values()) == {28 if kind == "damaged" else 21}


def test_script_whose_last_line_is_a_save_ends_with_that_save_on_disk(tmp_path):
    command = [sys.executable, __file__, "last_line", str(tmp_path)]  # which, unlike a fork, ends by itself
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "_SignalingThread.join" not in line]  # of Orbax 0.11.30
    assert (done.returncode, said) == (0, [])
    assert load_model(tmp_path).optimizer is not None


ODD_NAMES = ["run[1]", "layers=[64,32]", "*", "a?b", "{x}", "#1", "%41", "a b", "Schritt ü", "line\nbreak"]


@pytest.mark.parametrize("given", [*ODD_NAMES, "relative/dir", "~/ckpt", pathlib.Path("path")])
def test_directories_may_have_any_name_and_be_relative_or_home_or_pathlib(given, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = pathlib.Path(given).expanduser().absolute()
    save(model, given, 0, 1, 2)
    assert ocp.StandardCheckpointer().restore(place / "2/default")
    assert restore(model, place) == restore(model, given) == 2 and type(restore(model, given, np.int64(1))) is int
    save(model, place, 3, max_to_keep=2)
    assert names(place) == ["2", "3"]
    assert_equal(values(load_model(given)), values(model))


def test_snapshot_inside_an_epoch_has_its_number_and_is_found_until_the_complete_one_has_replaced_it(tmp_path):
    model, step, aside = dense_model(), tmp_path / "1", tmp_path / "1.replaced"

    def leave_at(batch):
        leave(model, tmp_path, (1, "train", batch), max_to_keep=1)
        assert record_of(step)["position"] == {"epoch": 1, "batch": batch + 1, "batches": batch + 5}

    leave_at(0)
    tree = ocp.CheckpointManager(tmp_path).restore(1)
    assert set(tree) == {"trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"}
    leave_at(1)  # replaces the first one
    shutil.copytree(step, aside)  # as a kill leaves it, right after the commit
    leave_at(2)
    assert names(tmp_path) == ["1"]
    saved = values(model)
    step.rename(aside)  # as a kill leaves it, right before its successor is written
    assert ocp.CheckpointManager(tmp_path).all_steps() == []
    fit(model, 1)
    assert restore(model, tmp_path) == 1
    assert_equal(values(model), saved)
    save(model, tmp_path, 1)  # by hand as well
    assert names(tmp_path) == ["1"]
    fit(model, 3, callback(model, tmp_path, 1))
    assert names(tmp_path) == ["2"]


def test_what_killed_saves_and_deletions_have_left_goes_with_the_next_commit_at_or_above_it(directory):
    for name in ("2.{}-7", "3.{}", "3.{}-written", "9.{}"):
        shutil.copytree(directory / "2", directory / name.format("orbax-checkpoint-tmp"))
    (directory / "0/_CHECKPOINT_METADATA").unlink()  # a deletion that was killed
    before = contents(directory)
    assert restore(dense_model(), directory) == 2 and is_intact(directory)
    reading = KerasOrbaxCheckpointManager(dense_model(), directory, read_only=True)
    assert reading.restore_state() == 2 and reading.save_state(3) is False
    assert contents(directory) == before
    save(dense_model(), directory, 3)
    assert names(directory) == ["1", "2", "3", "9.orbax-checkpoint-tmp"]


def test_saves_of_this_process_are_waited_for_and_their_failures_left_to_who_asked_for_them(tmp_path):
    model, directory = dense_model(300_000), tmp_path / "ckpt"
    directory.mkdir()
    (tmp_path / "link").symlink_to(directory)
    managers = [KerasOrbaxCheckpointManager(model, place) for place in (directory, tmp_path / "link")]
    managers[0].save_state(0)
    assert_equal(values(load_model(tmp_path / "link")), values(model))
    managers[0].save_state(1)
    assert managers[1].restore_state() == 1
    for size in (10_000, 0):
        with full_disk(size), pytest.raises(CheckpointError, match="Saving step 2 .* has failed"):
            managers[0].save_state(2)
            assert managers[1].restore_state() == 1
            managers[0].wait_until_finished()
        managers[0].wait_until_finished()
        assert names(directory) == ["0", "1"]
    assert commit(managers[0], 2).all_steps() == [0, 1, 2] and managers[1].restore_state() == 2
    for step in range(3, 9):
        assert managers[step % 2].save_state(step)
    assert load_model(directory, 7) and managers[0].restore_state() == 8


def test_saves_asked_for_in_several_threads_are_committed_or_refused(tmp_path):
    manager, epochs, saved = KerasOrbaxCheckpointManager(dense_model(), tmp_path, None), itertools.count(), set()

    def save_some(_):
        for epoch in itertools.islice(epochs, 5):
            with contextlib.suppress(ValueError):  # another thread has saved a newer one
                saved.update({epoch} if manager.save_state(epoch) else ())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(save_some, range(4)))
    manager.close()
    assert names(tmp_path) == sorted(map(str, saved)) and str(max(saved)) in names(tmp_path)


def test_directory_of_a_run_that_goes_on_is_read_meanwhile(tmp_path):
    directory, steps = tmp_path / "ckpt", []
    running = Process(tmp_path / "log", "goes_on", str(directory), str(tmp_path / "stop"))
    try:
        while len(steps) < 30:
            assert running.process.is_alive(), running.log.read_text()
            if directory.exists() and any(name.isdecimal() for name in names(directory)):
                steps.append(int(load_model(directory).optimizer.iterations.value))
                assert is_intact(directory)
    finally:
        (tmp_path / "stop").touch()
    assert running.join()[0] == 0
    assert steps == sorted(steps) and steps[-1] > steps[0]
    assert all(name.isdecimal() for name in names(directory))


def test_bucket_serves_as_a_directory_does(tmp_path):
    """Killed twice and resumed, damaged and fallen back, listed and loaded."""
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("with TensorFlow, Orbax reaches buckets through it, and that does not find the emulator")
    port, options = free_port(), {"epochs": 4, "max_to_keep": 3}
    variables = dict.fromkeys(["STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"], f"http://localhost:{port}")
    variables |= {"FSSPEC_GCS_TOKEN": "anon", "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    server = Process(tmp_path / "server", "emulator", port)

    def in_bucket(scenario, *arguments):
        return Process(tmp_path / scenario, "with_variables", variables, scenario, *arguments, **options).join()

    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
                break
            time.sleep(0.1)
        assert in_bucket("attempt", "gs://bucket/ckpt", (1, "train", 2, "SIGKILL"))[0] == -signal.SIGKILL
        assert in_bucket("attempt", "gs://bucket/ckpt", (2, "train", 2, "SIGTERM"))[0] == 128 + signal.SIGTERM
        code, log = in_bucket("bucket_cycle", "gs://bucket/ckpt")
        assert code == 0, log
    finally:
        server.process.kill()
        server.join()


def test_folders_of_the_user_are_left_alone_whatever_their_names_and_refused_where_a_step_goes(tmp_path, model):
    for name in ("1/run/thesis.txt", "2/metrics", "4/notes.txt", "7/default/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    save(model, tmp_path / "3/run", 0, 1)
    save(model, tmp_path / "0")
    (tmp_path / "4/plots").mkdir()
    (tmp_path / "8/plots").mkdir(parents=True)
    before = contents(tmp_path)
    manager = save(model, tmp_path, 5, 6, max_to_keep=1)
    assert manager.restore_state() == 6
    assert before.items() <= contents(tmp_path).items() and names(tmp_path) == [*"01234678"]
    message = ".*/7 is in the way, and is not a checkpoint"
    with unchanged(model, tmp_path), pytest.raises(CheckpointError, match=message):
        manager.save_state(7)


# -------------------------------------------------------------------------------------------- P4: the rest of the run


@pytest.mark.parametrize("position", [0, 5])
def test_other_callbacks_come_back_wherever_they_stand(position, tmp_path, capsys):
    script = {"data": "in order", "callbacks": "stopping and others", "epochs": 12}
    places = [(0, "train", 4), (2, "train", 3, "exception"), (5, "train", 1), (6, "train", 5, "exception")]
    options = {"freq": 3, "stateful": True, "position": position, **script}
    assert_exact(tmp_path, places, **options)
    expected = uninterrupted(**script)[1]
    assert 6 < len(expected[2]) < 12  # EarlyStopping has stopped it
    assert_same_end(attempt(tmp_path, **options)[1], expected)  # with the best weights again
    assert "Nothing left to train: a callback stopped the run" in capsys.readouterr().out


Point = collections.namedtuple("Point", "x y")


def states():  # a function, because processes are forked from this module, in which JAX must not run yet
    return {
        "dict": {("a", 1): [1, (2.5, None)], "b": {True: "x"}}, "set": {3}, "frozenset": frozenset([3]),
        "defaultdict": collections.defaultdict(list, {"a": [1]}), "Counter": collections.Counter("abca"),
        "OrderedDict": collections.OrderedDict(b=1, a=2), "deque": collections.deque([1, 2], maxlen=3),
        "bytes": b"\x00\xff", "floats": [float("inf"), -0.0, 1e-323], "operation": keras.ops.less,
        "date": datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "times": np.array(["2020-01-01", "NaT"], "datetime64[D]"),
        "key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "jax": jax.numpy.arange(3.0), "jax bfloat16": jax.numpy.ones((2, 3), "bfloat16"),
        "large": np.arange(5000.0), "large text": np.array(["a" * 3000, "b"]), "text": np.array(["a", "bc"]),
        "bfloat16": np.arange(6).astype(jax.numpy.bfloat16).reshape(2, 3), "big-endian": np.arange(3, dtype=">i4"),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "empty": np.zeros((0, 3)),
        "no axes": np.array(2.5), "scalar": np.float32(0.1),
    }  # fmt: skip


@dataclasses.dataclass
class Member(keras.callbacks.Callback):
    """Has no hash, as every dataclass that can be compared."""

    seen: int = 0

    def __post_init__(self):
        super().__init__()


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, (np.ndarray, np.generic, jax.Array)) and not str(one.dtype).startswith("key"):
        assert_equal([np.asarray(one)], [np.asarray(other)])
    else:
        assert repr(one) == repr(other)


def test_states_of_callbacks_come_back_with_the_same_types_and_values_unless_the_script_has_changed_them(tmp_path):
    def run(directory, script):
        model, member = dense_model(), Member()
        vars(member).update(copy.deepcopy(script))
        change = on(on_epoch_end=lambda epoch, logs: vars(member).update(states()))
        fit(model, 1, callback(model, directory, stateful=[member]), member, change)
        return vars(member)

    run(tmp_path / "states", {})
    found = run(tmp_path / "states", {})
    for name, value in states().items():
        assert_same(found[name], value)
    run(tmp_path / "script", {"kept": np.arange(5000.0), "limit": 3, "table": collections.Counter("a")})
    anew = {"kept": np.arange(5000.0) + 1, "limit": 4, "table": collections.Counter("b")}
    found = run(tmp_path / "script", anew)
    assert_same(found["large"], states()["large"])
    for name, value in anew.items():
        assert_same(found[name], value)


class Keeper:
    """Keeps whatever it is given."""

    def __init__(self, state=None):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def keep(directory, state=None):
    """Saves a state, or brings back the one that was saved. The values of the model, and the state."""
    model, keeper = dense_model(), Keeper(state)
    fit(model, 1, callback(model, directory, stateful=[keeper]))
    return values(model), keeper.state


def test_ten_thousand_arrays_of_one_object_come_back_in_order_and_small_ones_make_no_folder(tmp_path, monkeypatch):
    def without_cpu(*backend):  # as with JAX_PLATFORMS=cuda
        if backend:
            raise RuntimeError("Unknown backend cpu")
        return jax.local_devices()

    monkeypatch.setattr(jax, "devices", without_cpu)
    many = [np.array([i, -i]) for i in range(10_050)]
    small = {"random": np.arange(624, dtype=np.uint32), 3: (1.5, None, b"x")}
    for name, state in (("many", many), ("small", small)):
        keep(tmp_path / name, state)
        assert_same(keep(tmp_path / name)[1], state)
    keep(tmp_path / "generators", [random.Random(1), np.random.RandomState(2)])
    python, legacy = keep(tmp_path / "generators")[1]
    assert [python.random(), legacy.random()] == [random.Random(1).random(), np.random.RandomState(2).random()]
    assert names(tmp_path / "many/0") == ["_CHECKPOINT_METADATA", *names(tmp_path / "small/0")[1:], "run"]


class Slotted(keras.callbacks.Callback):
    __slots__ = ("count",)


def test_stateful_objects_that_cannot_be_saved_or_do_not_fit_are_named(tmp_path):
    model, patience = dense_model(), keras.callbacks.EarlyStopping("loss")
    logger, before = keras.callbacks.CSVLogger(str(tmp_path / "log.csv")), values(model)
    with pytest.raises(TypeError, match=r"attribute '.*' of stateful\[0\] \(CSVLogger\) cannot be saved"):
        fit(model, 1, logger, callback(model, tmp_path / "new", stateful=[logger]))
    logger.csv_file.close()
    with pytest.raises(TypeError, match=r"stateful\[0\] \(Slotted\) has __slots__, which are not saved"):
        callback(model, tmp_path / "new", stateful=[Slotted()])
    ring: dict = {}
    ring["itself"] = ring
    for odd in (np.zeros(2, "i4, f8"), collections.defaultdict(lambda: 1), [np.array([object()])], ring):
        vars(member := keras.callbacks.Callback())["odd"] = odd
        with pytest.raises(TypeError, match=r"attribute 'odd' of stateful\[0\] \(Callback\) cannot be saved"):
            callback(model, tmp_path / "new", stateful=[member])
    with pytest.raises(TypeError, match=r"attribute 'odd' of stateful\[0\] \(Keeper\) cannot be saved"):
        callback(model, tmp_path / "new", stateful=[Keeper({"odd": object()})])
    assert_equal(values(model), before)
    member = Member()
    spoil = on(on_epoch_end=lambda epoch, logs: epoch and setattr(member, "parts", [object()]))
    with pytest.raises(TypeError, match=r"attribute 'parts' of stateful\[0\] \(Member\) cannot be saved"):
        fit(model, 3, callback(model, tmp_path / "spoiled", stateful=[member]), member, spoil)
    assert names(tmp_path / "spoiled") == ["0"]  # earlier saves stay
    fit(model, 1, patience, callback(model, tmp_path / "ckpt", stateful=[patience]))
    message = r"saved with stateful=\['EarlyStopping'\], but now stateful=\["
    for given in ([], [keras.callbacks.ReduceLROnPlateau("loss")]):
        with unchanged(model, tmp_path / "ckpt"), pytest.raises(CheckpointMismatchError, match=message):
            fit(model, 2, *given, callback(model, tmp_path / "ckpt", stateful=given))
    save(model, tmp_path / "by hand")
    with pytest.warns(UserWarning, match="not saved by this callback: .*'EarlyStopping'.*start from their initial"):
        fit(model, 2, patience, callback(model, tmp_path / "by hand", stateful=[patience]))


class Draws:
    """An iterator of batches with a state, by either pair of methods, that ends after five."""

    def __init__(self, methods=("get_state", "set_state")):
        self.next_index = 0
        get, put = methods
        setattr(self, get, lambda: {"next": self.next_index})
        setattr(self, put, lambda state: setattr(self, "next_index", state["next"]))

    def __iter__(self):
        return self

    def __next__(self):
        if self.next_index == 5:
            raise StopIteration
        self.next_index += 1
        return X[self.next_index : self.next_index + 8], Y[self.next_index : self.next_index + 8]


class Loader:
    """Has no `__next__`: each `iter()` is a pass, which takes up where a loaded state says."""

    __init__ = Draws.__init__

    def __iter__(self):
        start = self.next_index % 5
        for self.next_index in range(start + 1, 6):
            yield X[self.next_index : self.next_index + 8], Y[self.next_index : self.next_index + 8]


def ahead(batches, number):
    """Reads so many batches ahead."""
    held = collections.deque()
    for batch in batches:
        held.append(batch)
        if len(held) > number:
            yield held.popleft()


@pytest.mark.parametrize("number", [0, 1, 7])
@pytest.mark.parametrize("kind", [Draws, Loader])
def test_resumable_goes_on_at_the_first_batch_that_was_not_trained_on(kind, number, tmp_path):
    methods = [("get_state", "set_state"), ("state_dict", "load_state_dict")][(number + (kind is Draws)) % 2]

    def run(places, directory=None):
        for place in places:
            seed(3)
            model, data = dense_model(), kind(methods)
            checkpoint = callback(model, directory, save_freq=5) if directory else None
            batches = ahead(checkpoint.resumable(data) if directory else over_and_over(lambda: kind(methods)), number)
            callbacks, steps = [each for each in (checkpoint, At(place)) if each], {"steps_per_epoch": 12, "epochs": 3}
            with contextlib.suppress(SystemExit):
                model.fit(batches, **steps, verbose=0, shuffle=False, callbacks=callbacks)
        return values(model)

    places = [(0, "train", 0), (0, "train", 8), (1, "train", 11), (2, "begins", 0), None]
    assert_equal(run(places, tmp_path), run([None]))


def test_resumable_serves_two_fits_and_starts_an_iterator_that_is_used_again_from_its_own_beginning(tmp_path):
    def begin(*directory):
        seed(3)
        model = dense_model()
        return model, *(callback(model, each, save_freq=1) for each in directory)

    def train(model, batches, epochs, *callbacks):
        model.fit(batches, epochs=epochs, steps_per_epoch=3, verbose=0, shuffle=False, callbacks=list(callbacks))
        return values(model)

    expected = train(*begin(), over_and_over(Draws), 4)
    model, checkpoint = begin(tmp_path / "two fits")
    batches = checkpoint.resumable(Draws())
    train(model, batches, 2, checkpoint)
    train(model, batches, 3, checkpoint)
    assert_equal(train(model, checkpoint.resumable(Draws()), 4, checkpoint), expected)  # anew
    iterator = Draws()
    model, checkpoint = begin(tmp_path / "again")
    with pytest.raises(RuntimeError, match="on purpose"):
        train(model, checkpoint.resumable(iterator), 4, checkpoint, At((0, "train", 2), fail))
    model, checkpoint = begin(tmp_path / "again")
    assert_equal(train(model, checkpoint.resumable(iterator), 4, checkpoint), expected)


def test_resumable_refuses_what_it_cannot_follow(tmp_path, model):
    def train(batches, steps=None):
        model.fit(batches, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[checkpoint])

    checkpoint, empty = callback(model, tmp_path), Draws()
    empty.next_index = 5
    for data in (iter([]), [1], object(), X):
        with pytest.raises(TypeError, match="give an iterator with get_state and set_state"):
            checkpoint.resumable(data)
    for stateful in (Draws(), Loader()):
        with pytest.raises(TypeError, match=r"stateful\[0\] .* is a data iterator.*checkpoint.resumable"):
            callback(model, tmp_path, stateful=[stateful])
    batches = checkpoint.resumable(Draws())
    with unchanged(model, tmp_path), pytest.raises(ValueError, match="what it returned was not passed to fit"):
        fit(model, 1, checkpoint)
    with unchanged(model, tmp_path), pytest.raises(ValueError, match="steps_per_epoch was not"):
        train(batches)
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=r"resumable\(Draws\): it is empty"):
        train(checkpoint.resumable(empty), 3)
    train(checkpoint.resumable(Draws()), 3)
    with pytest.raises(CheckpointMismatchError, match=r"fit read checkpoint.resumable\(data\) then"):
        fit(model, 2, callback(model, tmp_path))
    checkpoint = callback(model, tmp_path / "twice")
    with pytest.raises(ValueError, match=r"trained on 4 batches, but resumable\(Draws\) has given only [23]"):
        train((batch for batch in checkpoint.resumable(Draws()) for _ in range(2)), 4)


def test_callback_that_was_used_before_comes_back_as_in_a_new_process(tmp_path):
    def run(directory, stopping, epochs=9, place=None):
        seed(3)
        model = dense_model()
        checkpoint = callback(model, directory, save_freq=3, stateful=[stopping])
        rising = on(on_epoch_begin=lambda epoch, logs: model.optimizer.learning_rate.assign(0.0))
        with contextlib.suppress(SystemExit):
            fit(model, epochs, stopping, checkpoint, rising, At(place, fail) if place else At())
        return stopping.wait, stopping.best, model.history.epoch

    def stopping():
        return keras.callbacks.EarlyStopping("loss", patience=4)

    expected = run(tmp_path / "at once", stopping())
    used = stopping()
    for place in [(3, "train", 2), (4, "train", 0)]:
        with pytest.raises(RuntimeError, match="on purpose"):
            run(tmp_path / "again", used, place=place)
    shutil.copytree(tmp_path / "again", tmp_path / "new process")
    assert run(tmp_path / "again", used) == run(tmp_path / "new process", stopping()) == expected


# ---------------------------------------------------------------------------------------------- P5: no silent miss


def test_step_numbers_and_retention(tmp_path, model):
    checkpoint = callback(model, tmp_path / "epochs", 2, 10)
    fit(model, 4, checkpoint)
    assert checkpoint.checkpoint_manager.all_steps() == [20, 30]
    assert checkpoint.checkpoint_manager.best_step() is None  # without a monitor
    assert names(tmp_path / "epochs") == ["20", "30"]
    checkpoint = callback(model, tmp_path / "batches", None, save_freq=np.int64(3))
    fit(model, 2, checkpoint)  # of four batches
    assert checkpoint.checkpoint_manager.all_steps() == [3, 6, 8]  # and the last state
    fit(model, 4, checkpoint)
    assert checkpoint.checkpoint_manager.all_steps() == [3, 6, 8, 9, 12, 15, 16]
    assert record_of(tmp_path / "batches/6")["position"] == {"epoch": 1, "batch": 2, "batches": 6}


def test_options_of_orbax_get_through(tmp_path):
    model, seen = dense_model(), []
    checkpoint = callback(model, tmp_path / "blocking", 1, keep_period=2, enable_async_checkpointing=False)
    fit(model, 4, checkpoint)
    assert checkpoint.checkpoint_manager.all_steps() == [0, 2, 3]
    saved = values(model)
    assert "_sharding" in names(tmp_path / "blocking/3/default")
    assert checkpoint.checkpoint_manager.restore_state() == 3
    assert_equal(values(model), saved)
    every_third = KerasOrbaxCheckpointManager(model, tmp_path / "third", save_interval_steps=3)
    assert [every_third.save_state(epoch) for epoch in range(4)] == [True, False, False, True]
    newest = ocp.checkpoint_managers.LatestN(2)
    assert save(model, tmp_path / "policy", *range(4), preservation_policy=newest).all_steps() == [2, 3]
    odd = on(on_epoch_end=lambda epoch, logs: logs.update(text="x", ragged=[[1], [1, 2]]))
    options = {"best_fn": lambda metrics: seen.append(metrics) or -metrics["loss"], "best_mode": "min"}
    for epochs in (2, 4):  # the first is the best, and the newest is kept and continued
        best = callback(model := dense_model(), tmp_path / "best", 1, **options)
        fit(model, epochs, odd, best, at := At())
        assert at.heard[0] == (epochs - 2, 0)
    manager = best.checkpoint_manager
    assert seen[0].keys() == {"loss"} and manager.all_steps() == [0, 3]
    assert manager.best_step() == manager.restore_state("best") == 0
    save(model, tmp_path / "plain", *range(3), max_to_keep=1, enable_background_delete=True)
    assert names(tmp_path / "plain") == ["2"]
    none = dict.fromkeys(["preservation_policy", "best_fn", "save_interval_steps", "multiprocessing_options"])
    assert save(model, tmp_path / "none", *range(4), max_to_keep=2, **none).all_steps() == [2, 3]
    partly = KerasOrbaxCheckpointManager(model, tmp_path / "partly", 1, best_fn=lambda metrics: metrics["loss"])
    with pytest.warns(UserWarning, match=r"best_fn raises KeyError\('loss'\) for"):
        for epoch, metrics in enumerate([{"loss": 1}, {"other": 1}, {"loss": 0}]):
            partly.save_state(epoch, metrics=metrics)
        partly.wait_until_finished()
    assert partly.all_steps() == [0, 2] and partly.best_step() == 0
    partly.save_state(3)
    partly.delete(3)  # once it is committed, and step 2 is gone
    assert partly.all_steps() == [0] and names(tmp_path / "partly") == ["0"] and is_intact(tmp_path / "partly")


def test_step_of_another_directory_behind_a_link_is_left_alone(trained, tmp_path):
    before, linked = contents(trained[1]), tmp_path / "2"
    linked.symlink_to(trained[1] / "2")
    model = dense_model()
    assert restore(model, tmp_path) == 2
    save(model, tmp_path, 3, 4, max_to_keep=1)
    assert names(tmp_path) == ["4"] and contents(trained[1]) == before


MONITORED = [  # mode, options, losses, the steps that are kept, the best one
    ("min", {"max_to_keep": 2}, [3, 1, 2, 4, 5], [1, 2, 4], 1),
    ("max", {"max_to_keep": 2}, [3, 5, 2, 4, 1], [1, 3, 4], 1),
    ("auto", {"max_to_keep": 2}, [3, 1, float("nan"), 4, 5], [0, 1, 4], 1),
    ("min", {"max_to_keep": 1, "keep_period": 4}, [5, 4, 1, 3, 2, 6, 7], [0, 2, 4, 6], 2),
    ("min", {"max_to_keep": 1, "keep_time_interval": datetime.timedelta(days=1)}, [4, 1, 3, 2], [0, 1, 3], 1),
    ("min", {"max_to_keep": 1}, [None, None, None, 2, 1, 3], [4, 5], 4),  # the first are saved without a monitor
]


@pytest.mark.parametrize(("mode", "options", "losses", "kept", "best"), MONITORED, ids=str)
def test_monitor_keeps_the_best_and_the_newest_and_all_agree(mode, options, losses, kept, best, tmp_path, model):
    saved, options = [], {"monitor": "loss", "mode": mode, **options}
    for epoch, loss in enumerate(losses):
        if epoch in (0, 3):  # anew: by values on disk
            manager = KerasOrbaxCheckpointManager(model, tmp_path, **({} if loss is None else options))
        model.layers[0].bias.assign(np.full(400, epoch))
        saved.append(values(model))
        commit(manager, epoch, losses=[loss])
    fresh = KerasOrbaxCheckpointManager(model, tmp_path)
    assert manager.all_steps() == fresh.all_steps() == kept
    assert manager.best_step() == fresh.best_step() == fresh.restore_state("best") == best
    assert_equal(values(model), saved[best])
    assert_equal(values(load_model(tmp_path, step="best")), saved[best])
    assert record_of(tmp_path / str(best))["metrics"] == {"loss": losses[best]}
    assert [line.split()[0] for line in command_line(tmp_path)[1] if "best" in line] == [str(best)]


def test_metrics_are_kept_and_the_direction_of_a_monitor_comes_from_them(tmp_path):
    model, new = (stacked(layers.Dense(1), metrics=["accuracy", "mae"]) for _ in range(2))
    manager = callback(model, tmp_path).checkpoint_manager
    logs = fit(model, 1, callback(model, tmp_path)).history
    assert manager.metrics(0) == {name: values[0] for name, values in logs.items()}
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        manager.metrics(7)
    for metric, best in (("val_accuracy", 1), ("loss", 0)):
        manager = save(model, tmp_path / metric, 0, 1, losses=[0, 1], metric=metric, monitor=metric)
        assert manager.best_step() == best
    # Before its first fit, it does not know them.
    assert KerasOrbaxCheckpointManager(new, tmp_path / "val_accuracy", monitor="val_accuracy").best_step() == 1
    with pytest.raises(ValueError, match="They are: loss, accuracy, mae. Check"):
        save(model, tmp_path / "other", losses=[1.0], metric="val_nothing", monitor="val_nothing")
    with pytest.warns(UserWarning, match="'val_loss' is not among the metrics of step 0.*'loss'"):
        fit(model, 1, callback(model, tmp_path / "absent", monitor="val_loss"))


def test_step_that_another_manager_has_saved_since_is_refused_and_nothing_is_deleted(tmp_path, model):
    earlier = KerasOrbaxCheckpointManager(model, tmp_path, 1)
    save(model, tmp_path, 3)
    assert earlier.latest_step() == 3
    for epoch in (2, 3):
        with unchanged(model, tmp_path), pytest.raises(ValueError, match=f"Step {epoch} is not above 3, the newest"):
            earlier.save_state(epoch)
    commit(earlier, 4)
    assert names(tmp_path) == ["4"]


FAILURES = {"full": "File too large", "removed": "has been removed", "read-only": "(?i)permission[_ ]denied"}


@pytest.mark.parametrize("how", FAILURES)
def test_failed_write_raises_and_is_not_listed_and_a_rerun_continues(how, public_path):
    model, directory = stacked(layers.Dense(40_000), layers.Dense(1)), public_path / "ckpt"
    checkpoint = callback(model, directory, None)

    def spoil(epoch, logs=None):
        if epoch == 2:
            checkpoint.checkpoint_manager.wait_until_finished()
            if how == "removed":
                shutil.rmtree(directory)
            else:
                (directory / "2.orbax-checkpoint-tmp-of another process").mkdir()
                stack.enter_context(full_disk(100_000) if how == "full" else nobody())

    with contextlib.ExitStack() as stack, pytest.raises(CheckpointError, match=FAILURES[how]) as raised:
        fit(model, 4, checkpoint, on(on_epoch_begin=spoil))
    if how != "removed":
        assert str(raised.value).startswith(f"Saving step 2 in {directory} has failed")
        assert names(directory) == ["0", "1", "2.orbax-checkpoint-tmp-of another process"]
    directory.mkdir(exist_ok=True)
    again = stacked(layers.Dense(40_000), layers.Dense(1))
    checkpoint = callback(again, directory, None)
    manager = checkpoint.checkpoint_manager
    assert manager.all_steps() == ([] if how == "removed" else [0, 1])
    assert [manager.restore_state(step) for step in manager.all_steps()] == manager.all_steps()
    fit(again, 4, checkpoint)
    assert manager.all_steps() == [0, 1, 2, 3] and names(directory) == ["0", "1", "2", "3"]


def test_whatever_system_call_fails_the_run_says_so_or_is_as_ever_and_a_rerun_goes_on(tmp_path):
    number = int(os.environ.get("FAULT_SEED", 0))
    print("FAULT_SEED", number)
    draw, options = random.Random(number), {"data": "in order", "freq": 3, "max_to_keep": 1}
    expected = uninterrupted(data="in order")[1]
    for _ in range(8):
        call = draw.choice(["openat", "write", "fsync", "rename", "mkdir", "unlinkat"])
        fault = f"{call}:error={draw.choice(['EIO', 'ENOSPC', 'EBUSY'])}:when={draw.randint(1, 12)}"
        fault += draw.choice(["", "+"])
        work = tmp_path / fault
        work.mkdir()
        code, log = under_strace(work, ["-o", os.devnull, "-e", f"inject={fault}"], "attempts", str(work), **options)
        if code == 0:
            assert_same_end(pickle.loads((work / "end").read_bytes())[1], expected)
        else:
            is_mute = call == "write" and fault.endswith("+")  # it cannot say anything
            assert "Error" in log or code < 0 or is_mute, (fault, code, log)
        assert_same_end(run_to_its_end(work, **options)[0], expected)


def test_deletion_that_fails_is_a_warning_and_its_rest_no_damage(tmp_path, monkeypatch):
    manager = save(dense_model(), tmp_path, max_to_keep=1)
    rmtree = type(epath.Path("/")).rmtree

    def refuse(path, *args, **kwargs):
        if path.name == "0":
            raise OSError(16, "Device or resource busy")
        return rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="could not be deleted.*busy"):
        patch.setattr(type(epath.Path("/")), "rmtree", refuse)
        commit(manager, 1)
    assert (tmp_path / "0").is_dir() and manager.restore_state() == 1
    assert is_intact(tmp_path)
    commit(manager, 2)
    assert names(tmp_path) == ["2"]


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


def assert_nothing_left(model, before):
    assert handlers() == before
    assert "jax_state_sync" not in vars(model) and "finalize_variable_values" not in vars(model.optimizer)
    assert model._initial_epoch is None


@pytest.mark.parametrize("is_last", [False, True])
def test_nothing_is_left_however_fit_ends_and_what_was_saved_is_committed(is_last, trained, tmp_path):
    interrupt = on(on_epoch_begin=lambda epoch, logs: epoch == 4 and signal.default_int_handler(signal.SIGINT, None))
    anew = on(on_epoch_begin=lambda epoch, logs: epoch == 4 and model.compile("sgd", "mse"))  # then it cannot train
    cases = {  # the other callback, and the steps on disk afterwards
        "nothing to do": (None, ["0", "1", "2"]),
        "on_train_begin": (on(on_train_begin=fail), ["0", "1", "2"]),
        "on_epoch_begin": (interrupt, ["0", "1", "2", "3"]),
        "on_epoch_end": (on(on_epoch_end=fail), ["0", "1", "2"]),
        "on_train_end": (on(on_train_end=fail), ["0", "1", "2", "3", "4"]),
        "compiled anew": (anew, ["0", "1", "2", "3"]),
    }
    for name, (other, steps) in cases.items():
        model, directory = dense_model(), shutil.copytree(trained[1], tmp_path / name)
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
        checkpoint = callback(model, directory, preemption_signals=signals)
        callbacks = [checkpoint, other] if is_last else [other, checkpoint]
        with handling(signal.SIGTERM, lambda number, frame: pytest.fail("it is called")):
            before = handlers()
            with pytest.raises((RuntimeError, TypeError, KeyboardInterrupt)) if other else contextlib.nullcontext():
                fit(model, 5 if other else 0, *filter(None, callbacks))
            assert_nothing_left(model, before)
        assert names(directory) == steps
        model.compile("adam", "mse")
        assert fit(model, 1).epoch == [0]
        fit(model, 6, checkpoint)
        assert fit(model, 2).epoch == [0, 1]


def test_fit_that_stops_at_the_step_that_changes_nothing_leaves_none_of_it(tmp_path, model):
    leave(model, tmp_path, (1, "train", 2))
    again = dense_model()
    gc.disable()  # which might clean up
    try:
        fit(again, 3, callback(again, tmp_path), on(on_epoch_begin=lambda *_: setattr(again, "stop_training", True)))
        before = values(again)
        fit(again, 1)
    finally:
        gc.enable()
    assert not np.array_equal(values(again)[0], before[0])


def test_fit_inside_a_fit_of_the_same_model_leaves_the_outer_one_its_end(tmp_path, model):
    earlier = signal.getsignal(signal.SIGTERM)
    inner = on(on_epoch_end=lambda epoch, logs: epoch or fit(model, 1, callback(model, tmp_path / "inner")))
    fit(model, 2, inner, callback(model, tmp_path / "outer"))
    assert signal.getsignal(signal.SIGTERM) is earlier and "jax_state_sync" not in vars(model)


def test_nothing_is_left_when_keras_itself_cannot_end_fit(tmp_path, model):
    def freeze(epoch, logs):  # then the state of the model cannot be synced
        model.layers[0].trainable = False
        model.compile("sgd", "mse")

    before = handlers()
    with pytest.raises((ValueError, TypeError)):
        fit(model, 2, callback(model, tmp_path), on(on_epoch_end=freeze))
    assert_nothing_left(model, before)
    assert names(tmp_path) == ["0"]


def test_fit_inside_an_except_block_raises_and_leaves_as_elsewhere(tmp_path, model):
    try:
        raise KeyError("something else")
    except KeyError:
        with contextlib.ExitStack() as stack:
            full = on(on_epoch_end=lambda epoch, logs: stack.enter_context(full_disk(1000)))
            with pytest.raises(CheckpointError, match="Saving step 0 .* has failed"):
                fit(model, 1, callback(model, tmp_path / "full"), full)
        with handling(signal.SIGTERM, signal.SIG_IGN):
            late = on(on_train_end=terminate)  # the handlers are back by then
            fit(model, 1, late, callback(model, tmp_path / "late", preemption_signals=()))
            with pytest.raises(SystemExit) as raised:
                fit(model, 1, callback(model, tmp_path / "later"), At((0, "ends", 0)))
    assert raised.value.code == 143


def test_error_in_fit_is_raised_and_the_failure_of_the_last_save_is_a_warning(tmp_path):
    model = stacked(layers.Dense(40_000), layers.Dense(1))
    with contextlib.ExitStack() as stack, pytest.warns(UserWarning, match="The last save failed as well"):
        full = on(on_epoch_begin=lambda epoch, logs: epoch or stack.enter_context(full_disk(100_000)))
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(model, 2, callback(model, tmp_path), full, At((1, "train", 0), fail))


def test_state_is_saved_and_restored_inside_a_batch(tmp_path):
    model = dense_model()
    manager = KerasOrbaxCheckpointManager(model, tmp_path)

    def at_batch(batch, logs=None):
        if batch == 2:
            manager.save_state(0)
            assert manager.restore_state() == 0

    fit(model, 1, on(on_train_batch_end=at_batch))
    assert record_of(tmp_path / "0")["position"]["epoch"] == 1


@pytest.mark.parametrize("freq", ["epoch", 1, 4])
def test_epoch_for_which_no_data_is_left_is_no_failed_save(tmp_path, model, freq):
    def train(model):
        batches, checkpoint = ((X[:6], Y[:6]) for _ in range(12)), callback(model, tmp_path, save_freq=freq)
        with warnings.catch_warnings(action="ignore"):  # of Keras, that the data has run out
            history = model.fit(batches, steps_per_epoch=4, epochs=4, verbose=0, callbacks=[slower, checkpoint])
        return float(model.optimizer.learning_rate), history.epoch, values(model)

    slower = on(on_epoch_end=lambda epoch, logs: setattr(slower.model.optimizer, "learning_rate", 0.1 / (epoch + 1)))
    rate, epochs, expected = train(model)
    again = train(dense_model())
    assert max(map(int, os.listdir(tmp_path))) == {"epoch": 3}.get(freq, 12)
    assert again[:2] == (rate, epochs) and rate == pytest.approx(0.1 / 4)
    assert_equal(again[2], expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_when_a_save_begins_leaves_nothing_half_done(tmp_path, monkeypatch, model, when):
    """It comes right before or right after Orbax has started its thread."""
    save = ocp.AsyncCheckpointer.save

    def interrupted(*arguments, **options):
        if when == "after":
            save(*arguments, **options)
        raise KeyboardInterrupt

    slowly(monkeypatch)
    manager = KerasOrbaxCheckpointManager(model, tmp_path)
    commit(manager, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ocp.AsyncCheckpointer, "save", interrupted)
        manager.save_state(1)
    assert not manager.is_saving_in_progress()
    left = names(tmp_path)
    assert manager.latest_step() == max(int(name) for name in left if name.isdecimal()) == manager.restore_state()
    time.sleep(1.5)
    assert names(tmp_path) == left
    commit(manager, 2)


def test_ctrl_c_while_a_save_is_awaited_does_not_lose_it(tmp_path):
    code, log = Process(tmp_path / "log", "interrupted", str(tmp_path / "ckpt")).join()
    assert code == 0, log


def test_processes_forked_in_a_fit_end_and_its_saves_go_on(tmp_path):
    code, log = Process(tmp_path / "log", "forks", str(tmp_path / "ckpt")).join()
    assert code == 0, log


def test_cleaning_up_at_the_start_leaves_a_save_in_progress_alone(tmp_path, monkeypatch, model):
    slowly(monkeypatch)
    manager = KerasOrbaxCheckpointManager(model, tmp_path)
    manager.save_state(0)
    KerasOrbaxCheckpointManager(model, tmp_path, cleanup_tmp_directories=True)
    manager.wait_until_finished()
    assert names(tmp_path) == ["0"]


# -------------------------------------------------------------------------------------- P6: no silent wrong restore


def test_one_error_lists_every_difference_those_of_weights_before_those_of_the_optimizer(directory):
    model = stacked(layers.Dense(5), layers.Dense(1), layers.Dense(2, name="extra"))
    with unchanged(model, directory), pytest.raises(CheckpointMismatchError) as raised:
        fit(model, 5, STOPPING, callback(model, directory, stateful=[STOPPING]))
    message = str(raised.value)
    for fragment in (
        "was saved as (6, 400), the model has (6, 5)", "extra/kernel", "more", "Nothing was changed", "strict=False",
        "- it was saved with stateful=[], but now stateful=['EarlyStopping'] was passed",
    ):  # fmt: skip
        assert fragment in message
    groups = re.findall(r"(?m)^  - (\w+):", message)
    assert message.count("\n  - ") == 11  # ten, and how many more
    assert groups == ["trainable_variables"] * 5 + ["non_trainable_variables"] + ["optimizer_variables"] * 3
    assert isinstance(raised.value, CheckpointError) and isinstance(raised.value, ValueError)


def test_variables_of_64_bits_without_x64_and_those_without_elements_are_restored_and_those_with_x64_refused(tmp_path):
    specs = {"count": ((), "int64"), "nothing": ((0, 3), "float32")}  # the second kept apart from Orbax
    build = lambda: stacked(layers.Dense(4, dtype="float64"), holder(specs), layers.Dense(1))  # noqa: E731
    jax.config.update("jax_enable_x64", True)
    try:
        save(build(), tmp_path / "x64")
    finally:
        jax.config.update("jax_enable_x64", False)
    saved, model = build(), build()
    with pytest.raises(CheckpointMismatchError, match="was saved as float64, the model has float32"):
        restore(model, tmp_path / "x64")
    assert names(tmp_path / "x64") == ["0"]
    fit(saved, 1)
    save(saved, tmp_path / "x32")
    assert restore(model, tmp_path / "x32") == 0
    assert_equal(values(model), values(saved))


class Given(layers.Layer):
    """Has the variables that a function gives it."""

    def __init__(self, give, **kwargs):
        super().__init__(**kwargs)
        self.give = give

    def build(self, shape):
        self.give(self)

    def call(self, x):
        return x


def holder(specs):
    """A layer with variables that are not trained, by names, shapes and dtypes."""
    weights = [{"name": name, "shape": shape, "dtype": dtype} for name, (shape, dtype) in specs.items()]
    return Given(lambda layer: [layer.add_weight(**each, trainable=False) for each in weights])


def test_weights_only_leaves_the_optimizer_alone_and_helps_where_it_is_another(trained):
    reference, directory = trained
    weights, other = values(reference, optimizer=False), dense_model(optimizer=keras.optimizers.SGD(momentum=0.9))
    with pytest.raises(CheckpointMismatchError, match="(?s)but other optimizer variables.*weights_only=True"):
        fit(other, 4, callback(other, directory))
    inference = keras.Sequential([keras.Input((6,)), layers.Dense(400), layers.Dropout(0.3), layers.Dense(1)])
    for model in (dense_model(), other, inference):  # the last was never compiled
        before = values(model)
        restore(model, directory, weights_only=True)
        assert_equal(values(model, optimizer=False), weights)
        assert_equal(values(model)[len(weights) :], before[len(weights) :])


def test_not_strict_restores_what_agrees_and_lists_the_rest_and_reads_only_what_it_needs(tmp_path):
    saved, model = (stacked(layers.Dense(500), layers.Dense(head), optimizer="sgd") for head in (300, 200))
    save(saved, tmp_path)
    with open(data_file(tmp_path / "0"), "r+b") as file:  # the middle of it is the head's kernel
        file.seek(200_000)
        file.write(bytes(200_000))
    with unchanged(saved, tmp_path), pytest.raises(CheckpointCorruptError, match="the model is as it was"):
        restore(saved, tmp_path)
    head = model.layers[-1].get_weights()[:1]
    with pytest.warns(UserWarning, match=r"(?s)restored partially.*\(500, 300\), the model has \(500, 200\)"):
        restore(model, tmp_path, strict=False)
    assert_equal(model.layers[0].get_weights(), saved.layers[0].get_weights())
    assert_equal(model.layers[-1].get_weights()[:1], head)
    with pytest.raises(CheckpointCorruptError) as caught:
        restore(saved, tmp_path, donate=True)
    assert "as it was" not in str(caught.value)
    save(model, tmp_path / "floats")
    for layer in model.layers:
        layer.quantize("int8")
    before = [value for value in values(model, optimizer=False) if value.dtype == "int8"]
    with pytest.warns(UserWarning, match="kernel' was saved as float32, the model has int8"):
        restore(model, tmp_path / "floats", strict=False, weights_only=True)
    assert before and [value.tolist() for value in values(model, optimizer=False) if value.dtype == "int8"] == [
        value.tolist() for value in before
    ]


def test_donate_restores_the_same_and_frees_the_old_arrays(trained, model):
    reference, directory = trained
    old = [variable.value for variable in model.variables]
    restore(model, directory, donate=True)
    assert_equal(values(model), values(reference))
    assert all(array.is_deleted() for array in old)


# --------------------------------------------------------------------------------------------- P7: no silent damage


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def garble(path):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def half_copied(step):
    """As a copy leaves it that was interrupted: some files are there."""
    there = sorted(path for path in step.rglob("*") if path.is_file())
    for path in there[len(there) // 2 :]:
        path.unlink()


def edit_record(step, old, new):
    path = step / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SPOILS = {
    "removed": remove,
    "empty": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbled": garble,
}
PARTS = ("_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt")
DAMAGES = {
    "flipped bit": lambda step: flip(data_file(step)),
    **{f"{name} {how}": lambda step, name=name, how=how: SPOILS[how](step / name) for how in SPOILS for name in PARTS},
    **{f"data {how}": lambda step, how=how: SPOILS[how](data_file(step)) for how in SPOILS},
    "default removed": lambda step: remove(step / "default"),
    "all files removed": lambda step: [remove(path) for path in step.iterdir()],
    "half copied": half_copied,
    "format edited": lambda step: edit_record(step, '"format": 1', '"format": 2'),
    "record edited": lambda step: edit_record(step, '"epoch": 3', '"epoch": 2'),
    "record renamed": lambda step: edit_record(step, '"orbax_keras_ckpt"', '"orbax_kerbs_ckpt"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_the_run_goes_on_and_saves_over_the_number(damage, trained, tmp_path, model):
    """By every way of reading, in a directory and amid an error that sound like trouble with the store."""
    reference, directory = trained[0], shutil.copytree(trained[1], tmp_path / "UNAVAILABLE")
    DAMAGES[damage](directory / "2")
    damaged = contents(directory)
    try:
        raise ConnectionError("elsewhere")
    except ConnectionError:
        assert not is_intact(directory)
        for read in (lambda: restore(model, directory, 2), lambda: load_model(directory, 2)):  # never falls back
            with unchanged(model, directory), pytest.raises(CheckpointCorruptError, match="Step 2"):
                read()
        with pytest.warns(UserWarning, match=r"Step 1 is restored, because newer ones are damaged.\n"):
            loaded = load_model(directory)
        with pytest.warns(UserWarning, match="Step 1 is restored"):
            assert KerasOrbaxCheckpointManager(model, directory, read_only=True).restore_state() == 1
        assert_equal(values(model), values(loaded))
        assert contents(directory) == damaged
        with pytest.warns(UserWarning, match="Step 1 is restored.*damaged.*\n.*Step 2 in") as caught:
            history = fit(model, 3, callback(model, directory), validation_split=0.25)
    assert len([each for each in caught if "is restored" in str(each.message)]) == 1
    aside = {path.replace("/2/", "/2.damaged/"): content for path, content in damaged.items() if "/2/" in path}
    assert contents(directory / "2.damaged") == aside
    assert history.history == reference.history.history  # the third epoch was trained once more
    assert names(directory) == ["0", "1", "2", "2.damaged"]
    assert_equal(values(model), values(reference))
    assert restore(model, directory) == 2
    assert_equal(values(model), values(reference))


def test_damage_of_all_steps_of_two_of_them_and_of_one_more_later(directory, model):
    manager = KerasOrbaxCheckpointManager(model, directory)
    for step in range(3):
        garble(data_file(directory / str(step)))
    message = "(?s)No checkpoint in .* is intact.*Step 2 in.*Step 1 in.*Step 0 in"
    with unchanged(model, directory), pytest.raises(CheckpointCorruptError, match=message) as raised:
        manager.restore_state()
    assert isinstance(raised.value, CheckpointError) and isinstance(raised.value, OSError)
    garble(data_file(directory / "0"))  # which undoes it
    with pytest.warns(UserWarning, match="Step 0 is restored.*set aside as 2.damaged, 1.damaged."):
        assert manager.restore_state() == 0
    assert commit(manager, 2).all_steps() == [0, 2]
    garble(data_file(directory / "2"))
    with pytest.warns(UserWarning, match="Step 0 is restored"):
        manager.restore_state()
    assert names(directory) == ["0", "1.damaged", "2.damaged", "2.damaged-2"]
    assert ocp.CheckpointManager(directory).all_steps() == [0]


def test_trouble_with_reaching_the_store_is_not_damage(trained, public_path):
    directory = shutil.copytree(trained[1], public_path / "ckpt")
    directory.chmod(0o755)
    manager = KerasOrbaxCheckpointManager(dense_model(), directory)
    reading = KerasOrbaxCheckpointManager(dense_model(), directory, read_only=True)
    for path in (data_file(directory / "2"), directory / "2/default/manifest.ocdbt", directory):
        mode = path.stat().st_mode
        path.chmod(0)
        with nobody(), pytest.raises(OSError, match="PERMISSION_DENIED|Permission denied") as raised:
            reading.restore_state()
        path.chmod(mode)
        assert not isinstance(raised.value, CheckpointError) and "damaged" not in str(raised.value)
    assert names(directory) == ["0", "1", "2"]
    flip(data_file(directory / "2"))
    directory.chmod(0o1777)  # where only their owner may rename the steps
    with nobody(), pytest.warns(UserWarning, match="Step 1 is restored.* 2 cannot be renamed: Operation not permitted"):
        assert manager.restore_state() == 1
    assert names(directory) == ["0", "1", "2"]
    shutil.rmtree(directory)
    with pytest.raises(FileNotFoundError) as raised:
        manager.restore_state()
    assert not isinstance(raised.value, CheckpointError)


DTYPES = ["bool", "int8", "uint8", "int16", "bfloat16", "float16", "int32", "uint32", "float32", "complex64"]


def flips(there, number, count):
    """Flips a bit in one of the files, and back afterwards, so many times."""
    draw = random.Random(number)
    for _ in range(count):
        path = draw.choices(there, [file.stat().st_size for file in there])[0]
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        yield
        flip(path, bit)


@pytest.mark.parametrize("compression", [False, True])
def test_no_flipped_bit_restores_wrong(compression, tmp_path):
    """In arrays of every dtype, at random; plain Orbax restores most of them without a word."""
    drawn, shapes = np.random.default_rng(3), [(), (1,), (7,), (5, 3), (30, 4, 5, 6)]
    specs = {f"{dtype}_{len(shape)}{sum(shape)}": (shape, dtype) for dtype in DTYPES for shape in shapes}
    model = stacked(holder(specs), layers.Dense(200), layers.Dense(200), layers.Dense(1))
    values(model)
    for variable in [*model.non_trainable_variables, *model.optimizer.variables]:  # not zeros, which are not stored
        variable.assign((drawn.normal(size=variable.shape) * 7).astype(jax.numpy.dtype(variable.dtype)))
    manager = save(model, tmp_path, compression=compression)
    expected, found = values(model), 0
    read = ocp.PyTreeCheckpointer().restore(tmp_path / "0/default")["non_trainable_variables"]
    back = {path[-1].key: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(read)}
    held = model.non_trainable_variables
    assert_equal([back[variable.name] for variable in held], [np.array(variable.value) for variable in held])
    there = [path for path in files(tmp_path / "0/default") if path.parent.name == "d"]
    for _ in flips(there, int(compression), 130):
        try:
            manager.restore_state(0)
        except CheckpointCorruptError as error:
            assert "Step 0" in str(error)
            found += 1
        assert_equal(values(model), expected)  # whether or not it was one of the bits that carry anything
    assert found > 60  # the others are in OCDBT's copies of its index
    assert manager.restore_state() == 0


def test_flipped_bits_of_what_belongs_to_objects_are_found(tmp_path):
    found, own = 0, [np.random.default_rng(i).normal(size=(60, 60)).astype("float32") for i in range(8)]
    keep(tmp_path, own)
    for _ in flips(files(tmp_path / "0/run"), 5, 40):
        try:
            assert_equal(keep(tmp_path)[1], own)
        except CheckpointCorruptError:
            found += 1
    assert found > 13


def test_one_bad_byte_in_any_file_of_any_step_leaves_the_others_usable(tmp_path):
    """Every file of the newest and of an old step, with arrays of stateful objects and metrics in them."""
    model, original, directory = dense_model(), tmp_path / "original", tmp_path / "copy"
    keeper = Keeper([np.ones((200, 200), "float32")])
    fit(model, 3, callback(model, original, None, monitor="loss", stateful=[keeper]))
    assert (original / "2/run").is_dir()
    for file in [*files(original / "2"), *files(original / "0")]:
        shutil.copytree(original, directory)
        flip(directory / file.relative_to(original), 8 * (file.stat().st_size // 2) + 7)
        with warnings.catch_warnings(action="ignore"):
            manager = KerasOrbaxCheckpointManager(model, directory, None, monitor="loss")
            assert manager.restore_state() in (1, 2)
            assert commit(manager, 3, losses=[1.0]).best_step() is not None
            assert load_model(directory) is not None
            is_intact(directory)
        shutil.rmtree(directory)


def test_files_of_two_saves_are_never_mixed(tmp_path):
    saved, there, mixed = [], tmp_path / "1/0", tmp_path / "mixed"
    for number in (0, 1):
        keras.utils.clear_session()  # the same names
        saved.append(keep(tmp_path / str(number), [np.full(100_000, number)]))
    for file in files(there):
        shutil.copytree(tmp_path / "0", mixed)
        shutil.copy(file, mixed / "0" / file.relative_to(there))  # one file of another save
        keras.utils.clear_session()
        with contextlib.suppress(CheckpointCorruptError):  # or else it was a file that is not used, or is the same
            found, state = keep(mixed)
            assert_equal(found + state, saved[0][0] + saved[0][1])
        shutil.rmtree(mixed)
    shutil.copytree(tmp_path / "0", mixed)
    shutil.copytree(there / "default", mixed / "0/default", dirs_exist_ok=True)  # as rsync over an older copy
    keras.utils.clear_session()
    with pytest.raises(CheckpointCorruptError, match="files of two saves are mixed|NOT_FOUND"):
        keep(mixed)


# -------------------------------------------------------------------------------------------------- P8: preemption

# Whole runs that SIGTERM ends are in the tables KILLED, of P1, and SCENARIOS, of P2.


def test_sigint_ends_in_keyboard_interrupt_and_earlier_handlers_are_called_even_beside_an_error(tmp_path, model):
    called, later = [], tmp_path / "later"
    checkpoint = callback(model, tmp_path, save_freq=1000, preemption_signals=(signal.SIGINT, signal.SIGUSR1))
    manager = checkpoint.checkpoint_manager
    with pytest.raises(KeyboardInterrupt):
        fit(model, 3, checkpoint, At((1, "train", 2), lambda: signal.raise_signal(signal.SIGINT)))
    assert manager.latest_step() == 4 + 3
    note = handling(signal.SIGUSR1, lambda number, frame: called.append(manager.all_steps()))
    with note, pytest.raises(SystemExit) as raised:
        fit(model, 3, checkpoint, At((2, "train", 0), lambda: signal.raise_signal(signal.SIGUSR1)))
    assert raised.value.code == 128 + signal.SIGUSR1
    assert called == [[7, 9]]  # it was saved by then
    assert all(np.isfinite(value).all() for value in values(model))  # and fit has given the variables back
    note = handling(signal.SIGTERM, lambda number, frame: called.append(number))
    with note, pytest.raises(RuntimeError, match="on purpose"):
        fit(model, 1, callback(model, later), on(on_train_batch_end=terminate), on(on_train_batch_end=fail))
    assert called[1:] == [signal.SIGTERM]


def test_outside_the_main_thread_there_is_a_warning_and_no_handler(tmp_path):
    model, before = dense_model(), handlers()
    checkpoint = callback(model, tmp_path)
    with pytest.warns(UserWarning, match="outside the main thread"):
        thread = threading.Thread(target=fit, args=(model, 1, checkpoint))
        thread.start()
        thread.join()
    assert handlers() == before
    assert checkpoint.checkpoint_manager.all_steps() == [0]


def test_signal_while_the_last_save_is_written_ends_the_process_with_its_code(tmp_path, monkeypatch):
    model, fsync, sent = dense_model(), os.fsync, []

    def signals(descriptor):
        if not sent:
            sent.append(terminate())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", signals)
    with pytest.raises(SystemExit) as left:
        fit(model, 1, callback(model, tmp_path))
    assert left.value.code == 143 and names(tmp_path) == ["0"]


# ----------------------------------------------------------------------------------- P9: many hosts, many layouts


def run_together(work, scenario, *arguments, expected=0, processes=2, devices=2, **options):
    """Runs a scenario in processes together, of so many CPU devices each. What each printed."""
    work.mkdir(exist_ok=True)
    group = processes, devices, f"127.0.0.1:{free_port()}", scenario, str(work)
    logs = [work / f"process_{number}.log" for number in range(processes)]
    members = [Process(log, "among", number, *group, *arguments, **options) for number, log in enumerate(logs)]
    codes, logs = zip(*(member.join() for member in members))
    assert set(codes) == {expected} or (expected is None and 0 not in codes), "\n".join([str(codes), *logs])
    return logs


def plain(directory, step):
    """All variables of a checkpoint, by Orbax alone."""
    path = directory / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path)
        tree = getattr(metadata, "item_metadata", metadata).tree  # since Orbax 0.11.2x there is more around it
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_values(found, expected):
    paths = [path for path in expected if not path.startswith("metrics")]
    assert paths and all(found[path].tobytes() == expected[path].tobytes() for path in paths)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run of two processes for each layout: uninterrupted, without a checkpoint; and one that was stopped."""
    places = {"model": (0, "train", 2), "data": (1, "validation", 1)}

    @functools.cache
    def run(layout):
        work, reference = tmp_path_factory.mktemp(layout), tmp_path_factory.mktemp("uninterrupted")
        run_together(reference, "trains", layout, checkpoint=False)
        stopped = run_together(work, "trains", layout, place=places[layout], pause=0.1, expected=143)
        return work, reference, stopped, run_together(work, "trains", layout)

    return run


@pytest.mark.parametrize("layout", ["data", "model"])
def test_signal_to_one_process_stops_all_at_one_batch_and_the_rerun_equals_the_uninterrupted_run(layout, together):
    work, reference, stopped, last = together(layout)
    left = [int(re.search(r"left after batch (\d+)", log)[1]) for log in stopped]
    assert left[0] == left[1] and f"in epoch {1 if layout == 'model' else 2}" in stopped[0]
    assert 2 <= left[0] < TOGETHER if layout == "model" else left[0] == 2 * TOGETHER  # in the epoch, or in validation
    assert "Load Orbax" in last[0] and "Orbax" not in stopped[1] + last[1]
    own = []
    for process in range(2):
        ours, theirs = (np.load(each / f"final_{process}.npz") for each in (work, reference))
        assert ours.files == theirs.files
        for name in ours.files:
            assert ours[name].tobytes() == theirs[name].tobytes(), name
        own.append(ours["own"].tolist())
    assert own[0] != own[1]
    assert names(work / "ckpt") == ["1", "2"]  # retention: two of three epochs
    assert len(record_of(work / "ckpt/2")["run"]) == 2 and set(names(work / "ckpt/2")) >= {"default", "run"}


def test_signal_right_after_a_save_stops_all_processes(tmp_path):
    """Orbax asks JAX for signals too, with other numbers than the callback."""
    logs = run_together(tmp_path, "trains", "data", place=(1, "begins", 0), expected=143)
    left = [int(re.search(r"left after batch (\d+)", log)[1]) for log in logs]
    assert left[0] == left[1] <= TOGETHER + 2


def test_run_killed_on_two_processes_goes_on_with_one_and_the_other_way_round(tmp_path):
    began = time.monotonic()
    run_together(tmp_path, "trains", "data", place=(1, "train", 3, "SIGKILL"), heartbeat=10, expected=None)
    assert time.monotonic() - began < 90  # the one that was not killed fails, and does not wait for ever
    for processes, place, expected in ((1, (2, "train", 3, "SIGKILL"), -signal.SIGKILL), (2, None, 0)):
        step = max(int(name) for name in names(tmp_path / "ckpt") if name.isdecimal())
        saved = plain(tmp_path / "ckpt", step)
        devices = {"processes": processes, "devices": 4 // processes}
        logs = run_together(tmp_path, "trains", "data", place=place, expected=expected, **devices)
        assert f"(step {step} in " in logs[0]
        assert_same_values(np.load(tmp_path / "start_0.npz"), saved)
    assert not any("damaged" in name for name in names(tmp_path / "ckpt"))


@pytest.mark.parametrize("freq", ["second", "auto"])
def test_processes_save_by_the_clock_of_the_first(freq, tmp_path):
    may_be_off = hasattr(jax.config, "jax_enable_preemption_service")  # of newer versions of JAX
    is_off, options = may_be_off and freq == "auto", {"freq": freq, "max_to_keep": None, "pause": 0.05}
    logs = run_together(tmp_path, "trains", "data", is_preemption_off=is_off, **options)
    assert ("preemption service is switched off" in logs[0]) == is_off
    steps = [json.loads(re.search(r"steps (.*)", log)[1]) for log in logs]
    assert steps[0] == steps[1] == sorted(int(name) for name in names(tmp_path / "ckpt"))
    assert (3 if freq == "second" else 2) <= len(steps[0]) < 2 * TOGETHER and steps[0][-1] == 3 * TOGETHER


def test_damage_that_one_process_sees_makes_all_fall_back_to_one_step(together, tmp_path):
    directories = []
    for name in ("array", "states", "gone", "asked for"):
        directories.append(shutil.copytree(together("model")[0] / "ckpt", tmp_path / name))
        newest = directories[-1] / "2"
        if name == "states":
            flip(data_file(newest / "run/ocdbt.process_1"), 999)
        elif name == "gone":
            data_file(newest / "run/ocdbt.process_1").unlink()
        else:  # a bit of the kernel that is read by the second process alone
            flip(data_file(newest / "default/ocdbt.process_1"), 8 * 2000)
    assert not is_intact(directories[1])
    logs = run_together(tmp_path, "falls_back", [str(each) for each in directories])
    assert [names(directory) for directory in directories] == [["1", "2.damaged"]] * 3 + [["1", "2"]]
    assert logs[0].count("UserWarning: Step 1 is restored") == 3 and "UserWarning" not in logs[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_write_that_fails_on_one_process_alone_fails_on_all_and_none_waits(victim, tmp_path):
    began = time.monotonic()
    run_together(tmp_path, "fails_alone", victim)
    assert time.monotonic() - began < 90
    assert names(tmp_path / "ckpt") == names(tmp_path / "waiting") == ["0", "1"]


def test_checkpoint_of_two_processes_restores_onto_other_devices_axes_and_layouts_and_back(together, tmp_path):
    directory = together("model")[0] / "ckpt"
    saved = plain(directory, 2)
    kinds = ["none", "data", "model", "mixed", "model 4", "mixed 4"]
    run_together(tmp_path, "relays", str(directory), kinds, processes=1, devices=8)
    for kind in kinds:
        assert_same_values(plain(tmp_path / kind, 0), saved)
    for kind in ("model", "none"):  # from eight devices and from one
        back = tmp_path / f"back from {kind}"
        run_together(back, "relays", str(tmp_path / kind), ["data", "model", "mixed"])
        for after in ("data", "model", "mixed"):
            assert_same_values(plain(back / after, 0), saved)
    loaded = load_model(directory, custom_objects={"Vocabulary": Vocabulary})
    assert loaded.layers[0].words == ["one"]
    assert_same_values(gathered(loaded), saved)
    assert is_intact(directory)


@pytest.mark.parametrize("is_full", [False, True], ids=["", "of which there is too little"])
def test_on_an_accelerator_a_save_goes_through_pinned_memory(tmp_path, monkeypatch, is_full):
    """Here the CPU stands for one. What is trained at once, while the save is on its way, uses the arrays up."""
    copied, put = [], jax.device_put

    def device_put(arrays, to, **options):
        copied.extend(each.memory_kind for each in to)
        if is_full:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return put(arrays, to, **options)

    model = dense_model()
    fit(model, 1)
    manager, expected = KerasOrbaxCheckpointManager(model, tmp_path), values(model)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(jax, "device_put", device_put)
        assert manager.save_state(0)
    fit(model, 1)
    with pytest.raises(AssertionError):
        assert_equal(values(model), expected)
    assert manager.restore_state() == 0
    assert_equal(values(model), expected)
    has_pinned = "pinned_host" in [memory.kind for memory in jax.devices()[0].addressable_memories()]  # not on JAX 0.7
    assert copied == ["pinned_host"] * len(expected) * has_pinned


# --------------------------------------------------------------------------------------- P10: early, clear errors


def of_later_format(directory):
    path = directory / "2/_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    record = {**record_of(directory / "2"), "format": 99}
    del record["crc32"]
    record["crc32"] = zlib.crc32(json.dumps(record, sort_keys=True).encode())
    metadata["custom_metadata"]["orbax_keras_ckpt"] = record
    path.write_text(json.dumps(metadata))


def of_other_numbering(directory):
    shutil.move(directory / "2", directory / "200")  # as if steps_per_epoch had been 100


def uncompiled():
    return keras.Sequential([keras.Input((6,)), layers.Dense(1)])


def twins(layer):
    layer.first, layer.second = (layer.add_weight(shape=(6,), name="x") for _ in range(2))


def alike(layer):
    """A variable and a layer of the same name."""
    layer.scale, layer.inner = layer.add_weight(shape=(6,), name="x"), layers.Dense(6, name="x")
    layer.inner.build((None, 6))


def dotted():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="b")], name="a")
    alike = layers.Dense(6, name="a.b")
    alike.build((None, 6))
    return stacked(inner, alike)


def saving(epoch, **metrics):
    return lambda model, directory: KerasOrbaxCheckpointManager(model, directory).save_state(epoch, **metrics)


def fitting(epochs=5, **options):
    return lambda model, directory: fit(model, epochs, callback(model, directory, **options))


MISMATCH, TAKES_ONE = CheckpointMismatchError, "fit takes one OrbaxCheckpointCallback"
NO_BEST = "No checkpoint in .* is known as the best:"
ARGUMENTS = {  # what is changed in the callback's arguments, and the fragment of a ValueError
    "max_to_keep": {0: "max_to_keep=0: give", True: "max_to_keep=True", 2.5: "max_to_keep=2.5"},
    "steps_per_epoch": {0: "steps_per_epoch=0: give", None: "steps_per_epoch=None"},
    "save_freq": {
        datetime.timedelta(0): "save_freq=datetime.timedelta(0)",
        True: "save_freq=True: give", 0: "save_freq=0", -5: "save_freq=-5", "batch": "save_freq='batch'",
    },
    "mode": {"best": "mode='best': give"},
    "monitor": {3: "monitor=3"},
    "preemption_signals": dict.fromkeys([signal.SIGTERM, (signal.SIGKILL,), ("SIGTERM",)], "preemption_signals"),
    "verbose": {7: "verbose=7"},
    "read_only": {True: "read_only=True: give it to a manager"},
    "checkpoint_dir": {
        "": "checkpoint_dir=''", None: "checkpoint_dir=None",
        **dict.fromkeys(["s3://bucket/x", pathlib.Path("gs://bucket/x")], "of URLs only gs://bucket/path"),
    },
    "best_fn": {3: "best_fn=3: give a function"},
    "keep_time_interval": {3: "keep_time_interval=3: give a datetime.timedelta"},
    "todelete_full_path": {"trash": "give todelete_subdir"},
    "step_prefix": {3: "step_prefix=3: give a name", "a/b": "give a name without '/'"},
    "step_format_fixed_length": {-1: "step_format_fixed_length=-1: give a number"},
    "model": {"not a model": "give a keras.Model"},
}  # fmt: skip


UNSAVEABLE = {
    "named tuple": lambda: Point(1, 2), "object": object, "array of objects": lambda: np.array([object()]),
    "masked array": lambda: np.ma.array([1]), "lock": threading.Lock,
    "variable": lambda: keras.Variable(1.0), "enumeration": lambda: signal.SIGTERM, "metric": keras.metrics.Mean,
}  # fmt: skip


def keeping(make):
    def act(model, directory):
        member = keras.callbacks.Callback()
        member.odd = [make()]
        callback(model, directory, stateful=[member])

    return dense_model, act, TypeError, r"attribute 'odd' of stateful\[0\] \(Callback\) cannot be saved"


def making(error=ValueError, build=dense_model, fragment="", **change):
    def make(model, directory):
        OrbaxCheckpointCallback(**{"model": model, "checkpoint_dir": directory / "new", **change})

    return build, make, error, fragment


# A model, what is done with it and a directory with the steps 0, 1 and 2 of `dense_model`, the error, the message.
REFUSED = {
    **{
        f"{name}={value!r}": making(fragment=re.escape(fragment), **{name: value})
        for name, changes in ARGUMENTS.items()
        for value, fragment in changes.items()
    },
    **{f"attribute, {kind}": keeping(make) for kind, make in UNSAVEABLE.items()},
    "object": making(TypeError, stateful=[object()], fragment=r"stateful\[0\] \(object\) has neither get_state"),
    "object in a callback": making(
        TypeError, stateful=[STOPPING, on(on_epoch_end=object())],
        fragment=r"stateful\[1\] \(LambdaCallback\) cannot be saved: a object",
    ),
    "no list": making(stateful=STOPPING, fragment="give a list or tuple"),
    "by batches": making(fragment="monitor='loss' needs save_freq=\"epoch\"", save_freq=3, monitor="loss"),
    "best_fn": making(fragment="best_fn", monitor="loss", best_fn=len),
    "backslash": making(checkpoint_dir="/tmp/a\\b", fragment="TensorStore takes a backslash for '/'"),
    "step": (dense_model, lambda model, place: callback(model, place / "2"), ValueError, "is, or is in, a step"),
    "inside a step": (dense_model, lambda model, place: callback(model, place / "2/a/b"), ValueError, "is in, a step"),
    "file to load": (dense_model, lambda *_: load_model(__file__), OSError, "Not a directory"),
    "file": making(OSError, checkpoint_dir=__file__, fragment="checkpoint_dir"),
    "below a file": making(OSError, checkpoint_dir=f"{__file__}/below", fragment="checkpoint_dir"),
    "unwritable": making(OSError, checkpoint_dir="/proc/ckpt", fragment="Choose another directory"),
    "save_frq": making(TypeError, save_frq=1, fragment="no argument 'save_frq'. Did you mean 'save_freq'"),
    "filepath": making(TypeError, filepath=1, fragment="The directory is checkpoint_dir"),
    "keep_perid": making(TypeError, keep_perid=1, fragment="Did you mean 'keep_period'"),
    "weights only": making(TypeError, save_weights_only=1, fragment=r"restore_state\(weights_only=True\)"),
    "best only": making(
        TypeError, save_best_only=1, fragment="no argument 'save_best_only'. Give monitor='val_loss' and max_to_keep=1"
    ),
    "callback, not compiled": making(build=uncompiled, fragment=r"not compiled. Call model.compile\(\)"),
    "save, not compiled": (uncompiled, saving(3), ValueError, "not compiled"),
    "restore, not compiled": (uncompiled, restore, ValueError, "weights_only=True"),
    "save, not built": (MODELS["unbuilt"], saving(3), ValueError, "no variables yet"),
    "restore, not built": (MODELS["unbuilt"], restore, ValueError, "no variables yet"),
    "equal paths": (lambda: stacked(Given(twins, name="a")), fitting(), ValueError, "path '.*a/x'.*different names"),
    "dots, fit": (dotted, fitting(), ValueError, "differs only in '.' and '/'"),
    "dots, save": (dotted, saving(3), ValueError, "differs only in '.' and '/'"),
    "path within": (lambda: stacked(Given(alike, name="a")), saving(3), ValueError, "have the path '.*a/x'"),
    "other model": (dense_model, lambda m, d: fit(m, 5, callback(dense_model(), d)), ValueError, "model that you fit"),
    **{
        f"epoch {each!r}": (dense_model, saving(each), ValueError, f"epoch={each!r}")
        for each in (-1, True, 1.5, "1", None)
    },
    **{f"step {each}": (dense_model, saving(each), ValueError, f"Step {each} is not above 2") for each in range(3)},
    "metrics": (dense_model, saving(3, metrics=["loss"]), ValueError, "give a dictionary of numbers"),
    "next step": (dense_model, fitting(4), ValueError, "step 3, which is not above 200", of_other_numbering),
    "absent": (dense_model, lambda *at: restore(*at, 7), FileNotFoundError, r"no checkpoint of step 7 .*\[0, 1, 2\]"),
    "absent to load": (dense_model, lambda m, d: load_model(d, 7), FileNotFoundError, r"of step 7 .*\[0, 1, 2\]"),
    "two callbacks": (dense_model, lambda m, d: fit(m, 5, callback(m, d), callback(m, f"{d}b")), ValueError, TAKES_ONE),
    "one callback twice": (dense_model, lambda m, d: fit(m, 5, *[callback(m, d)] * 2), ValueError, TAKES_ONE),
    "later format": (dense_model, restore, CheckpointError, "has format 99.*reads format 1", of_later_format),
    "other shape": (lambda: dense_model(5), restore, MISMATCH, r"saved as \(6, 400\)"),
    "other shape in fit": (lambda: dense_model(5), fitting(), MISMATCH, r"saved as \(6, 400\)"),
    "other dtype": (lambda: with_policy("bfloat16"), restore, MISMATCH, "saved as float32"),
    "other optimizer": (lambda: dense_model(optimizer="sgd"), restore, MISMATCH, "adam"),
    "no best step": (dense_model, lambda m, d: restore(m, d, "best"), CheckpointError, NO_BEST),
    "no best step to load": (dense_model, lambda m, d: load_model(d, "best"), CheckpointError, NO_BEST),
    "no direction": (dense_model, fitting(monitor="mystery"), ValueError, 'mode="max" or mode="min"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_leaves_everything_as_it_was(case, directory):
    build, action, error, message, *changes = REFUSED[case]
    model, before = build(), handlers()
    for change in changes:
        change(directory)
    with unchanged(model, directory), pytest.raises(error, match=message):
        action(model, directory)
    assert handlers() == before


def test_other_backends_are_refused():
    code = "import keras, orbax_keras_ckpt as o; o.OrbaxCheckpointCallback(keras.Sequential(), 'x')"
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=environment)
    assert "the backend is 'numpy'" in done.stderr and "KERAS_BACKEND" in done.stderr


def test_callback_says_where_it_works_and_does_nothing_in_evaluate_and_predict(tmp_path):
    checkpoint = callback(model := dense_model(), tmp_path)
    with unchanged(model, tmp_path):
        model.evaluate(X, Y, verbose=0, callbacks=[checkpoint])
        model.predict(X, verbose=0, callbacks=[checkpoint])
    checkpoint.set_model(model)
    with pytest.raises(RuntimeError, match=r"works inside the fit\(\).*Keras 3.10 to 3.15"):
        checkpoint.on_train_begin()
    with pytest.raises(ValueError, match="Pass this callback to fit"):
        fit(model, 1, on(on_train_begin=lambda logs: checkpoint.on_train_begin()))
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied.*make it in HyperModel.fit\(\)"):
            copies([checkpoint])


# -------------------------------------------------------------------- P11: names that Keras invents do not matter


# Second models of a process, with other names: see the table MODELS, of P2.


def blocks_named(*given):
    return stacked(*(layers.Dense(6, name=name) for name in given), layers.Dense(1))


def test_names_that_the_user_gave_are_matched_by_name_alone(tmp_path):
    saved, swapped = blocks_named("block_1", "block_2"), blocks_named("block_2", "block_1")  # same shapes, other order
    fit(saved, 1)
    save(saved, tmp_path)
    restore(swapped, tmp_path)

    def by_name(model):
        variables = [each for each in [*model.variables, *model.optimizer.variables] if "block" in each.path]
        return [np.array(each) for each in sorted(variables, key=lambda each: re.search("block_.*", each.path)[0])]

    assert_equal(by_name(swapped), by_name(saved))
    model = blocks_named("block_2", "block_3")
    before = model.get_layer("block_3").get_weights()
    message = "'.*block_3/kernel' is in the model but not in the checkpoint"
    with unchanged(model, tmp_path), pytest.raises(CheckpointMismatchError, match=message):
        restore(model, tmp_path)
    with pytest.warns(UserWarning, match="restored partially"):
        restore(model, tmp_path, strict=False)
    assert_equal(model.get_layer("block_2").get_weights(), saved.get_layer("block_2").get_weights())
    assert_equal(model.get_layer("block_3").get_weights(), before)


def frozen(*which):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.Dense(6), layers.Dense(6)])
    for layer in which:
        model.layers[layer].trainable = False
    return compiled(model)


@pytest.mark.parametrize(("then", "now"), [((), (0,)), ((0,), ()), ((0,), (1,))], ids=str)
def test_layers_frozen_or_thawed_since_are_restored_by_path(then, now, tmp_path):
    saved = frozen(*then)
    fit(saved, 1)
    save(saved, tmp_path)
    for how in ({}, {"strict": False}):  # without a warning
        model = frozen(*now)
        restore(model, tmp_path, weights_only=True, **how)
        for one, other in zip(model.layers, saved.layers):  # not exchanged for the neighbour's
            assert_equal(one.get_weights(), other.get_weights())
    if then and now:  # the optimizer has variables for others then
        with pytest.raises(CheckpointMismatchError, match="is in the model but not in the checkpoint"):
            restore(frozen(*now), tmp_path)


def test_numbers_that_the_user_gave_beside_those_of_keras_are_a_mismatch_not_an_exchange(tmp_path):
    def model(number):
        """The third layer has the next number that is free: none, or 3."""
        keras.utils.clear_session()
        for _ in range(number):
            layers.Dense(1)
        return stacked(layers.Dense(6, name="dense_1"), layers.Dense(6, name="dense_2"), layers.Dense(6))

    save(saved := model(0), tmp_path)
    assert restore(saved, tmp_path) == 0
    other, message = model(3), "dense_3/kernel' is in the model but not in the checkpoint"
    with unchanged(other, tmp_path), pytest.raises(CheckpointMismatchError, match=message):
        restore(other, tmp_path)


# ------------------------------------------------------------------------------------------ P12: others' checkpoints


class GuidesCallback(keras.callbacks.Callback):
    """Saves as the guide does: see also what the README says of moving over."""

    def __init__(self, model, checkpoint_dir, max_to_keep=5, steps_per_epoch=1):
        super().__init__()
        self.guided, self.steps_per_epoch = model, steps_per_epoch
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(checkpoint_dir, options=options)

    def on_epoch_end(self, epoch, logs=None):
        state = self.guided.get_state_tree()
        state.pop("metrics_variables")
        self.manager.save(epoch * self.steps_per_epoch, args=ocp.args.StandardSave(state))


def skip_without_keras_callback():
    if not hasattr(keras.callbacks, "OrbaxCheckpoint"):
        pytest.skip("this version of Keras has no OrbaxCheckpoint")


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_of_the_callback_of_keras_are_restored(weights_only, tmp_path):
    skip_without_keras_callback()
    reference, model = dense_model(), dense_model()
    fit(reference, 2, keras.callbacks.OrbaxCheckpoint(tmp_path, monitor="loss", save_weights_only=weights_only))
    if weights_only:
        with pytest.raises(CheckpointMismatchError, match="optimizer_variables: .* not in the checkpoint"):
            restore(model, tmp_path)
    assert restore(model, tmp_path, weights_only=weights_only) == 1
    assert_equal(values(model, optimizer=not weights_only), values(reference, optimizer=not weights_only))
    (tmp_path / "1/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(CheckpointCorruptError, match="Step 1 in"):
        restore(model, tmp_path, weights_only=weights_only)


def test_folder_has_what_the_guide_lists_and_the_record_and_plain_orbax_reads_the_state_tree_of_keras(trained):
    model, directory = trained
    assert names(directory) == ["0", "1", "2"]
    assert [path.name for path in (directory / "2").iterdir() if path.is_dir()] == ["default"]
    found = set(names(directory / "2/default")) - {"commit_success.txt"}
    assert found == {"d", "manifest.ocdbt", "_METADATA", "_sharding"}
    record = record_of(directory / "2")
    assert record["format"] == 1 and record["position"]["epoch"] == 3
    described = [[variable.path, list(variable.shape), variable.dtype] for variable in model.trainable_variables]
    assert record["variables"]["trainable_variables"] == described
    assert record["metrics"] == {name: series[-1] for name, series in model.history.history.items()}
    rebuilt = keras.saving.deserialize_keras_object(record["model"])
    assert [layer.name for layer in rebuilt.layers] == [layer.name for layer in model.layers]
    expected = model.get_state_tree("numpy_array")
    del expected["metrics_variables"]
    reads = [
        ocp.CheckpointManager(directory).restore(2),
        ocp.CheckpointManager(directory).restore(2, args=ocp.args.StandardRestore()),
        ocp.StandardCheckpointer().restore(directory / "2" / "default"),
    ]
    with contextlib.suppress(ImportError):  # older Orbax
        from orbax.checkpoint.experimental import v1

        reads.append(v1.load_checkpointables(directory / "2")["default"])
    for read in reads:
        assert jax.tree.structure(read) == jax.tree.structure(expected)
        assert_equal([np.asarray(leaf) for leaf in jax.tree.leaves(read)], jax.tree.leaves(expected))


def test_layers_that_derive_values_from_variables_predict_right_after_a_restore(tmp_path):
    saved, model = (stacked(layers.Normalization(), layers.Dense(1)) for _ in range(2))
    saved.layers[0].adapt(X * 3 + 5)
    model.predict(X, verbose=0)  # compiles the function with the values derived before the restore
    fit(saved, 1)
    save(saved, tmp_path)
    expected = saved.predict(X, verbose=0)
    restore(model, tmp_path)
    assert_equal([model.predict(X, verbose=0)], [expected])
    assert_equal([load_model(tmp_path).predict(X, verbose=0)], [expected])


def test_layers_with_state_that_is_in_no_variable_are_named_at_the_first_save(tmp_path):
    class Hoarder(layers.Dense):
        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["seen"] = np.arange(3)

    class Lookup(layers.Flatten):  # as Keras's own for tf_idf, which need TensorFlow
        def save_own_variables(self, store):
            store["weights"] = np.arange(3)

        save_own_variables.__module__ = "keras.src.layers"

    model = stacked(Lookup(name="lookup"), Hoarder(1, name="hoarder"))
    manager = KerasOrbaxCheckpointManager(model, tmp_path)
    with pytest.warns(UserWarning, match="'lookup', 'hoarder' have a save_own_variables"):
        commit(manager, 0)
    commit(manager, 1)


class Vocabulary(layers.Layer):
    """Has its words from the data, and not in its config."""

    words = ()

    def call(self, x):
        return x * len(self.words)

    def save_assets(self, folder):
        pathlib.Path(folder, "words.txt").write_text("\n".join(self.words))

    def load_assets(self, folder):
        self.words = pathlib.Path(folder, "words.txt").read_text().split("\n")


def with_vocabularies():
    words, more = Vocabulary(name="words"), Vocabulary(name="more")
    words.words, more.words = ["a", "b"], ["c", "d", "e"]
    inputs, inner = keras.Input((6,)), keras.Sequential([more, layers.Dense(1)], name="inner")
    return compiled(keras.Model(inputs, inner(words(inputs))))


def test_load_model_brings_back_the_assets_of_layers_and_saves_as_keras(tmp_path, monkeypatch):
    model, scope = with_vocabularies(), {"custom_objects": {"Vocabulary": Vocabulary}}
    fit(model, 2, callback(model, tmp_path))
    assert [path.name for path in sorted((tmp_path / "1").iterdir()) if path.is_dir()] == ["default", "run"]
    loaded = load_model(tmp_path, **scope)
    loaded.save(tmp_path / "model.keras")
    for each in (loaded, keras.saving.load_model(tmp_path / "model.keras", **scope)):
        assert each.get_layer("words").words == ["a", "b"]
        assert each.get_layer("inner").layers[0].words == ["c", "d", "e"]
        assert_equal(values(each), values(model))
    model = with_vocabularies()
    assert restore(model, tmp_path) == 1  # the script makes them itself
    model.get_layer("words").words = ["a"]
    with unchanged(model, tmp_path), pytest.raises(CheckpointMismatchError, match="assets: those of layer 'words'"):
        restore(model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nonexistent")  # the disk for temporary files is full, or cannot be written
        for attempted in (restore, lambda *_: commit(KerasOrbaxCheckpointManager(model, tmp_path), 2)):
            with unchanged(model, tmp_path), pytest.raises(CheckpointError, match="layer 'words' need a place"):
                attempted(model, tmp_path)
    assert names(tmp_path) == ["0", "1", "model.keras"]
    flip(data_file(tmp_path / "1/run"), 8 * 100)
    with pytest.warns(UserWarning, match="Step 0 is restored, because newer ones are damaged"):
        load_model(tmp_path, **scope)


@pytest.mark.skipif(not importlib.util.find_spec("keras_hub"), reason="KerasHub requires TensorFlow: gigabytes")
def test_load_model_brings_back_the_vocabulary_of_a_kerashub_tokenizer(tmp_path):
    import keras_hub

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox"]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=words)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "max_sequence_length": 6}
    backbone = keras_hub.models.BertBackbone(vocabulary_size=len(words), **sizes)
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor)
    save(model, tmp_path)
    with pytest.warns(UserWarning, match="`compile\\(\\)` was not called as part of model loading"):  # it has its own
        loaded = load_model(tmp_path)
    assert loaded.preprocessor.tokenizer.get_vocabulary() == words
    assert_equal(values(loaded, optimizer=False), values(model, optimizer=False))


def test_load_model_takes_any_step_however_it_is_named(trained, tmp_path, model):
    for step in (0, 1, 2):
        restore(model, trained[1], step)
        assert_equal(values(load_model(trained[1], step)), values(model))
    assert not load_model(trained[1], 0, compile=False).compiled
    for number, options in enumerate(({}, {"step_prefix": "ckpt"}, {"step_format_fixed_length": 6})):
        (tmp_path / str(number) / "a_007").mkdir(parents=True)
        fit(model, 1, callback(model, tmp_path / str(number), **options))
        assert_equal(values(load_model(tmp_path / str(number))), values(model))
        assert is_intact(tmp_path / str(number))


class NoConfig(Subclassed):
    def get_config(self):
        raise NotImplementedError("no config here")


def test_load_model_finds_layers_by_the_attributes_that_hold_them(tmp_path):
    class Pair(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.one, self.other = layers.Dense(6), layers.Dense(6)

        def call(self, x):
            return self.other(keras.ops.tanh(self.one(x)))

    model = Pair()
    model.one, model.other = model.other, model.one  # Keras's own list of the layers stays as it is
    fit(compiled(model), 1, callback(model, tmp_path))
    loaded = load_model(tmp_path, custom_objects={"Pair": Pair})
    assert_equal([loaded.predict(X, verbose=0)], [model.predict(X, verbose=0)])


class Bag(layers.Layer):
    """Holds its layers in a collection of its own."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        made = [layers.Dense(6, activation=name) for name in ("tanh", "relu", "sigmoid")]
        self.kind, self.parts = kind, set(made) if kind == "set" else dict(zip((1, "a", (2,)), made))

    def each(self):
        return self.parts.values() if self.kind == "dict" else self.parts

    def build(self, shape):
        for layer in self.each():
            layer.build(shape)

    def call(self, x):
        return sum(layer(x) for layer in self.each())

    def get_config(self):
        return super().get_config() | {"kind": self.kind}


def test_layers_in_a_dictionary_of_odd_keys_are_loaded_and_those_in_a_set_refused(tmp_path):
    model = stacked(Bag("dict"), layers.Dense(1))
    fit(model, 1, callback(model, tmp_path / "dict"))
    loaded = load_model(tmp_path / "dict", custom_objects={"Bag": Bag})
    assert_equal([loaded.predict(X, verbose=0)], [model.predict(X, verbose=0)])
    model = stacked(Bag("set"), layers.Dense(1))
    fit(model, 1, callback(model, tmp_path / "set"))
    with pytest.raises(CheckpointMismatchError):
        load_model(tmp_path / "set", custom_objects={"Bag": Bag})


def test_load_model_says_why_it_cannot_rebuild_a_model(tmp_path):
    code = stacked(layers.Lambda(lambda x: x * 2), layers.Dense(1))
    for name, model in (("subclassed", compiled(Subclassed())), ("none", compiled(NoConfig())), ("code", code)):
        fit(model, 1, callback(model, tmp_path / name))
    with pytest.raises(TypeError, match="Subclassed"):
        load_model(tmp_path / "subclassed")
    with pytest.raises(ValueError, match="safe_mode=False"):
        load_model(tmp_path / "code")
    assert_equal(values(load_model(tmp_path / "code", safe_mode=False)), values(code))
    with pytest.raises(CheckpointError, match="Step 0 .* cannot be loaded without its code: .*no config here"):
        load_model(tmp_path / "none")
    again = compiled(NoConfig())
    assert fit(again, 2, callback(again, tmp_path / "none")).epoch == [0, 1]  # but it is resumed
    shared, sequential = layers.Dense(6), keras.Sequential([layers.Dense(6)])
    first, second = keras.Input((6,)), keras.Input((6,))
    deep = keras.Model(second, shared(second))
    lost = compiled(keras.Model(first, deep(sequential(shared(shared(first))))))  # Keras rebuilds one call less
    save(lost, tmp_path / "lost")
    with pytest.raises(CheckpointError, match="cannot be loaded without its code: Keras loses calls of layers"):
        load_model(tmp_path / "lost")
    GuidesCallback(code, tmp_path / "foreign").on_epoch_end(0)
    with pytest.raises(CheckpointError, match="cannot be loaded without its code: another tool wrote it"):
        load_model(tmp_path / "foreign")


# ---------------------------------------------------------------------- what a user meets: notebook, messages, costs


def test_file_pasted_into_a_notebook_cell_only_defines_and_then_trains(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    directory = str(tmp_path / "ckpt")
    train = f"""
import keras, numpy as np, os
assert "JAX_PLATFORMS" not in os.environ
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("adam", "mse")
model.fit(np.ones((8, 3)), np.ones(8), verbose=0, callbacks=[OrbaxCheckpointCallback(model, {directory!r})])
print(type(load_model({directory!r})).__name__)
"""
    cells = ["import os; os.environ.pop('JAX_PLATFORMS', None)", (HERE / "orbax_keras_ckpt.py").read_text(), train]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    assert not notebook.cells[1].outputs
    texts = "".join(output.get("text", "") for output in notebook.cells[2].outputs)
    assert "Save Orbax checkpoint on_epoch_end." in texts and texts.endswith("Sequential\n")


def test_notebook_is_small_and_easy_to_read_and_runs_to_the_outputs_that_it_is_committed_with(tmp_path, monkeypatch):
    nbformat, nbclient, nbconvert = map(pytest.importorskip, ("nbformat", "nbclient", "nbconvert"))
    assert (HERE / "guide.ipynb").stat().st_size < 150_000
    committed, notebook = (nbformat.read(HERE / "guide.ipynb", as_version=4) for _ in range(2))
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert max(len(cell.source.splitlines()) for cell in cells) <= 20
    assert "".join(cell.source for cell in cells).count("rmtree") == 1  # of /tmp/ckpt
    assert all(cell.execution_count for cell in cells)
    assert not any("execution" in cell.metadata for cell in committed.cells)  # when it was run is nobody's business
    assert {output.get("name", "stdout") for cell in cells for output in cell.outputs} == {"stdout"}
    page, _ = nbconvert.HTMLExporter().from_notebook_node(committed)
    texts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(texts) == page.count("<img ") == 2 and all("loss" in text.lower() for text in texts)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    executed = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(HERE)}}).execute()

    def firsts(notebook):
        """The first word of each line, without what differs from version to version or from run to run."""
        outputs = [[o for o in c.get("outputs", ()) if o.get("name") != "stderr"] for c in notebook.cells]
        texts = ["".join(output.get("text", "") for output in each) for each in outputs]
        texts = [re.sub(r"[0-9a-f]{32}|commit_success.txt|Writing .*|array_metadatas", "", text) for text in texts]
        return [[line.split()[0] for line in text.splitlines() if line.strip()] for text in texts]

    assert firsts(committed) == firsts(executed)


def test_verbose_prints_the_lines_of_the_guide_and_where_a_run_starts(tmp_path, capsys, model):
    def lines(epochs, **options):
        fit(model, epochs, callback(model, tmp_path, **options))
        return capsys.readouterr().out.splitlines()

    load, saved = "Load Orbax checkpoint on_train_begin.", "Save Orbax checkpoint on_epoch_end."
    assert lines(2, verbose=1) == [
        f"No checkpoint in {tmp_path} yet: training starts from the beginning.", *[saved] * 2
    ]  # fmt: skip
    assert lines(4, verbose=1) == [load, f"Continue with epoch 3 of 4 (step 1 in {tmp_path}).", *[saved] * 2]
    model.optimizer.learning_rate = 0.5
    assert "with the learning rate 0.01 instead of the script's 0.5" in lines(5, verbose=1)[1]
    model.fit(X, Y, epochs=6, verbose=1, callbacks=[callback(model, tmp_path, verbose=1)])
    assert saved in capsys.readouterr().out.splitlines()  # not in the progress bar
    assert lines(7) == []


def test_empty_directory_changes_nothing(tmp_path):
    manager = KerasOrbaxCheckpointManager(model := dense_model(), tmp_path)
    assert manager.latest_step() is manager.best_step() is None
    with unchanged(model, tmp_path), pytest.warns(UserWarning, match="no checkpoint in .* The model is as it was"):
        assert manager.restore_state() is None
    commit(manager, 0)
    saved = values(model)
    for step in (0, None):
        fit(model, 1)
        assert manager.restore_state(step) == 0
        assert_equal(values(model), saved)


def test_directory_that_is_the_wrong_one_is_named_with_the_right_one(tmp_path):
    for place in ("runs/a", "numbers/1", "numbers/2"):
        save(dense_model(), tmp_path / place, 3)
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for place, message in (
        ("empty", "There is no checkpoint in"),
        ("runs/b", r"no checkpoint in .*/runs/b: no such file or directory. There are some in: .*/runs/a"),
        ("runs", r"no checkpoint in .*/runs. There are some in: .*/runs/a"),
        ("runs/a/3", r"no checkpoint in .*/runs/a/3. Give the directory .*/runs/a and step=3 instead"),
        ("runs/a/3/default", r"Give the directory .*/runs/a and step=3 instead"),
        ("numbers", r"There are some in: .*/1, .*/2"),  # no damage
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_model(tmp_path / place)
        code, lines, error = command_line(tmp_path / place)
        assert (code, lines) == (2, []) and re.search(message, error) and error.count("\n") == 1
    with pytest.raises(FileNotFoundError, match=r"runs/b: no such file or directory. There are some in: .*/runs/a"):
        KerasOrbaxCheckpointManager(dense_model(), tmp_path / "runs/b", read_only=True)
    assert "gs://" in command_line("s3://a/b")[2]
    assert contents(tmp_path) == before
    for place, others in (("runs/b", ".*/runs/a"), ("numbers", ".*/1, .*/2")):
        with pytest.warns(UserWarning, match=f"There are some in: {others}. The model is as it was"):
            assert KerasOrbaxCheckpointManager(dense_model(), tmp_path / place).restore_state() is None


def test_compression_is_off_unless_asked_for(tmp_path):
    model = compiled(keras.Sequential([keras.Input((256,)), layers.Dense(256, kernel_initializer="ones")]))
    for name, options in (("plain", {}), ("compressed", {"compression": True})):
        save(model, tmp_path / name, **options)
        assert (sum(path.stat().st_size for path in files(tmp_path / name)) < 256 * 256 * 4) == bool(options)


def test_batch_on_which_nothing_is_saved_neither_syncs_the_state_nor_reads_the_random_state(tmp_path, monkeypatch):
    class Syncs(keras.Sequential):
        def jax_state_sync(self):
            self.count = getattr(self, "count", 0) + 1
            super().jax_state_sync()

    counts, reads, read = [], [], random.getstate
    monkeypatch.setattr(random, "getstate", lambda: reads.append(1) or read())
    for checkpoint in (False, True):
        model = compiled(Syncs([keras.Input((6,)), layers.Dense(1)]))
        fit(model, 3, *([callback(model, tmp_path, save_freq=1000)] if checkpoint else []))
        counts.append(model.count)
    assert counts[0] == counts[1]
    assert len(reads) <= 3 + 1  # at the start of each pass over the data, and at the end


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fresh_run_holds_no_second_copy_of_the_state(run_eagerly, tmp_path):
    def live():
        gc.collect()
        return sum(each.nbytes for each in jax.live_arrays())

    def peak(*directory):
        model, sizes, before = stacked(layers.Dense(4000), layers.Dense(1), run_eagerly=run_eagerly), [], live()
        count = on(on_train_batch_begin=lambda batch, logs: batch == 1 and sizes.append(live()))
        fit(model, 2, *(callback(model, each, save_freq=1000) for each in directory), count, validation_split=0.25)
        return max(sizes) - before

    assert peak(tmp_path) - peak() < 4000 * 7  # a fraction of one copy, which has 112,000 bytes


def test_process_does_not_grow_over_a_hundred_saves(tmp_path):
    code, log = Process(tmp_path / "log", "saves_again_and_again", str(tmp_path / "ckpt")).join()
    assert code == 0, log


@pytest.mark.parametrize("writing", [0, 0.5])
def test_auto_saves_as_often_as_three_percent_of_the_time_allow(writing, tmp_path, monkeypatch, capsys, model):
    """On a fast disk and on a slow one; each save blocks the training for 30 ms."""
    blocked, begin = [], ocp.CheckpointManager.save

    def slow_save(*arguments, **options):
        blocked.append(0.03)
        time.sleep(0.03)
        return begin(*arguments, **options)

    slowly(monkeypatch, writing / 10)
    monkeypatch.setattr(ocp.CheckpointManager, "save", slow_save)
    checkpoint = callback(model, tmp_path, None, save_freq="auto", verbose=1)
    start, pause = time.monotonic(), on(on_train_batch_begin=lambda batch, logs: time.sleep(0.01 + writing / 50))
    model.fit(X, Y, batch_size=1, epochs=10, verbose=0, callbacks=[pause, checkpoint])
    share, saved = sum(blocked) / (time.monotonic() - start), checkpoint.checkpoint_manager.all_steps()
    assert len(saved) == len(blocked) and saved[0] == 1 and saved[-1] == 640
    assert share < 0.06
    said = re.search(r"Saved (\d+) times, which took (.*)% of the time", capsys.readouterr().out)
    assert int(said[1]) == len(saved) and 100 * share <= float(said[2]) + 0.1
    assert len(saved) > 2 or float(said[2]) > 1.5  # on a machine with other work, a third one may cost too much


# ---------------------------------------------------------------------------------------------- the command line


def test_command_line_lists_the_steps_of_a_run_and_finds_what_is_damaged(tmp_path):
    seed(4)
    model, directory = dense_model(4000), tmp_path / "ckpt"
    stopping = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True)
    ours = callback(model, directory, None, monitor="val_loss", stateful=[stopping])
    with pytest.raises(SystemExit):
        fit(model, 4, ours, At((2, "train", 1)), stopping, validation_split=0.25)
    before, losses = contents(directory), model.history.history["val_loss"]
    code, lines, _ = command_line(directory)
    assert code == 0 and len(lines) == 4
    assert lines[0].split() == ["step", "epoch", "batch", "saved", "size", "variables", "parameters", "metrics"]
    cells = re.split("  +", lines[2])
    assert cells[:3] == ["1", "2", "end"]
    saved = datetime.datetime.fromisoformat(cells[3]).timestamp()
    assert abs(saved - (directory / "1").stat().st_mtime) < 5
    assert cells[4] == f"{sum(path.stat().st_size for path in files(directory / '1')) / 1e3:,.1f} kB"
    assert cells[5:7] == [str(len(model.weights)), f"{model.count_params():,}"]
    assert cells[7].split()[1] == f"val_loss={losses[1]:.4g}"
    assert re.split("  +", lines[3])[:3] == ["2", "3", "2"]
    marks = [[mark for mark in ("best", "newest") if mark in line] for line in lines[1:]]
    assert marks == [["best"] * (losses[0] < losses[1]), ["best"] * (losses[1] <= losses[0]), ["newest"]]
    code, lines, _ = command_line(directory, "--verify")
    assert code == 0 and lines[-1] == "All arrays are intact."
    assert contents(directory) == before
    flip(data_file(directory / "1/run"), 8 * 500)
    assert command_line(directory)[0] == 0
    code, lines, _ = command_line(directory, "--verify")
    assert code == 1 and lines[-1].startswith(f"Step 1 in {directory} is damaged: ")
    assert (directory / "1").is_dir()


def test_command_line_reads_checkpoints_of_others(tmp_path):
    fit(model := dense_model(), 1)
    GuidesCallback(model, tmp_path).on_epoch_end(3)
    code, lines, _ = command_line(tmp_path, "--verify")
    row = re.split("  +", next(line for line in lines if line.startswith("3 ")))
    assert (code, row[:3]) == (0, ["3", "?", "?"])
    assert row[5:] == ["4", "3,201", "written by another tool, newest"]
    remove(data_file(tmp_path / "3"))
    assert not is_intact(tmp_path)


# ------------------------------------------------- seams: the only tests that use private names of the module


def test_keras_still_has_what_the_seams_touch(model):
    assert model._initial_epoch is None
    model._initial_epoch = 2
    assert fit(model, 4).epoch == [2, 3]
    model._initial_epoch = None
    seed(2)
    keras.random.normal((1,))
    generator = orbax_keras_ckpt._global_seed_generator()
    assert isinstance(generator, keras.random.SeedGenerator)
    orbax_keras_ckpt._set_global_seed_generator(None)
    assert orbax_keras_ckpt._global_seed_generator() is None
    orbax_keras_ckpt._rename(model.trainable_variables[0], "another/path")
    assert model.trainable_variables[0].path == "another/path"
    with pytest.raises(ValueError, match="safe_mode"), orbax_keras_ckpt._serialization(safe_mode=True):
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layers.Lambda(lambda x: x)))


def test_orbax_still_has_what_the_seams_touch(tmp_path):
    named = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data"))
    tree = {"a": {"b": jax.numpy.ones(3), "c": jax.device_put(jax.numpy.ones(4), named)}}
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    ocp.Checkpointer(handler).save(tmp_path / "plain", args=ocp.args.PyTreeSave(tree))
    written = orbax_keras_ckpt._sharding_file({f"a.{name}": array.sharding for name, array in tree["a"].items()})
    assert json.loads(written) == json.loads((tmp_path / "plain" / "_sharding").read_text())


def test_what_tensorstore_says_of_a_failing_disk_is_not_damage():
    for text in ("UNKNOWN: Error reading: Input/output error", "ABORTED: Stale file handle"):
        assert not orbax_keras_ckpt._is_damage(ValueError(text))
    assert orbax_keras_ckpt._is_damage(ValueError("DATA_LOSS: Digest mismatch in /UNAVAILABLE/d/0"))


@pytest.mark.parametrize("step", [None, 1])
def test_step_that_is_deleted_right_after_the_directory_was_listed_is_no_damage(step, directory, tmp_path, monkeypatch):
    (directory / "2").rename(tmp_path / "2")
    listing = orbax_keras_ckpt._steps

    def then_another_run_commits(*arguments):
        listed = listing(*arguments)
        if (tmp_path / "2").exists():
            (tmp_path / "2").rename(directory / "2")
            (directory / "1/_CHECKPOINT_METADATA").unlink()
        return listed

    monkeypatch.setattr(orbax_keras_ckpt, "_steps", then_another_run_commits)
    if step is not None:
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 1"):
            load_model(directory, step)
    else:
        assert int(load_model(directory).optimizer.iterations.value) == 9


def test_record_of_somebody_else_names_nothing_but_what_callbacks_use():
    assert orbax_keras_ckpt._copied(keras.ops.less) is keras.ops.less
    code = [{"name": [name]} for name in ("__builtins__", "exp", "os")]
    bits = {"dict": [[["bit_generator", "BitGenerator"]]]}
    pointers = {"ndarray": [{"bytes": "AAAAAAAAAAA="}, "O", [1]]}  # NumPy would take these bytes for addresses
    for packed in (*code, {"Generator": ["Generator", bits]}, {"type": ["object"]}, {"eval": ["1"]}, pointers):
        with pytest.raises((KeyError, ValueError)):
            orbax_keras_ckpt._unpack(packed)


def test_what_a_run_writes_first_is_opened_and_compared_before_it_is_committed(tmp_path, monkeypatch, model):
    tree = orbax_keras_ckpt._tree

    def without_one(state):
        made = tree(state)
        next(iter(made["optimizer_variables"].values())).popitem()
        return made

    monkeypatch.setattr(orbax_keras_ckpt, "_tree", without_one)
    with pytest.raises(CheckpointError, match="Saving step 0 .* has failed"):
        save(model, tmp_path)
    assert names(tmp_path) == []


JAXS_OWN = "jax._src.distributed:global_state.client"  # without it, JAX itself does not get anywhere


@pytest.mark.parametrize("seam", [*sorted(orbax_keras_ckpt._SEAMS.keys() - {JAXS_OWN}), "_initial_epoch"])
def test_seam_that_is_gone_is_named_before_anything_is_trained(seam, tmp_path, monkeypatch, model):
    if seam == "_initial_epoch":
        del model._initial_epoch
    else:
        owner, _, name = seam.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(owner)
        monkeypatch.delattr(next(cls for cls in getattr(owner, "__mro__", [owner]) if name in vars(cls)), name)
    with pytest.raises(RuntimeError, match=rf"{seam.rpartition(':')[2]} is gone .*was tested with Keras 3.10 to 3.15"):
        callback(model, tmp_path / "new")
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------- README and its recipes

README = (HERE / "README.md").read_text()
EXAMPLE, RECIPES = re.findall("```python\n(.*?)```", README, re.DOTALL)
IMPORTS, *RECIPES = re.split("^(?=# )", RECIPES, flags=re.MULTILINE)


def recipe(words, tmp_path, change=("", "")):
    """Runs the example and then the recipe whose comment has these words, in `tmp_path`; the names that both leave."""
    (text,) = [each for each in RECIPES if words in each.splitlines()[0]]
    names = {}
    for part in (EXAMPLE.replace("epochs=10", "epochs=3"), IMPORTS, text.replace(*change)):
        exec(part.replace("/tmp/", f"{tmp_path}/"), names)
    return names


def test_docstring_examples_run(tmp_path, model):
    checkpoint = callback(model, tmp_path)
    for public in (KerasOrbaxCheckpointManager, OrbaxCheckpointCallback, load_model, checkpoint.resumable):
        lines = [line.strip()[4:] for line in public.__doc__.splitlines() if line.strip().startswith(">>>")]
        place = tmp_path / public.__name__.replace("load_model", "OrbaxCheckpointCallback")
        example = re.sub(r"\bepochs=\d+", "epochs=2", "\n".join(lines)).replace("/tmp", str(place))
        names = {"model": model, "checkpoint": checkpoint, "iterator": Draws(), "x": X, "y": Y}
        exec(example, {**globals(), **names})


def test_readme_is_short_and_has_two_commands_of_one_line_each():
    lines, blocks = README.splitlines(), re.findall("```sh\n(.*?)```", README, re.DOTALL)
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "python3 -m venv"))] == []
    setups = [command for block in blocks for command in block.splitlines() if "requirements.txt" in command]
    tools = ["nbconvert", "pytest"]
    assert [tool for command in setups for tool in tools if tool in command] == tools


def run_readme(command, tmp_path, **variables):
    """What a command prints in a directory with train.py and the module."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "KERAS_HOME": str(tmp_path), **variables}
    environment.pop("KERAS_BACKEND")
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_readme_command_lists_what_the_example_has_saved_and_the_example_has_a_line_about_the_backend(tmp_path):
    example = EXAMPLE.replace("/tmp/", f"{tmp_path}/")
    exec(example, {})
    (command,) = re.findall("python (orbax_keras_ckpt.py /tmp/my_run --verify)", README)
    file, *arguments = command.replace("/tmp", str(tmp_path)).split()
    listed = run_readme([sys.executable, HERE / file, *arguments], tmp_path)
    assert re.findall(r"(?m)^(\d+) +\d+ +end ", listed.stdout) == ["7", "8", "9"]
    assert listed.stdout.endswith("All arrays are intact.\n") and (listed.returncode, listed.stderr) == (0, "")
    empty = run_readme([sys.executable, "-m", "orbax_keras_ckpt", str(tmp_path)], tmp_path)
    assert empty.returncode == 2 and not empty.stdout and empty.stderr.startswith("There is no checkpoint in")
    line = EXAMPLE.splitlines()[1]  # without which Keras asks for TensorFlow
    assert line.startswith('os.environ["KERAS_BACKEND"] = "jax"') and "TensorFlow" in line
    (tmp_path / "train.py").write_text(example.replace(line, ""))
    if not importlib.util.find_spec("tensorflow"):
        assert "No module named 'tensorflow'" in run_readme([sys.executable, "train.py"], tmp_path).stderr


@pytest.mark.parametrize("origin", ["the guide's version", "keras.callbacks.OrbaxCheckpoint"])
def test_readme_moving_over_is_a_change_of_one_line_and_continues_the_run(origin, tmp_path):
    assert "from Keras's Orbax guide, import the same names from `orbax_keras_ckpt`" in README
    calls, steps = ['OrbaxCheckpointCallback(model, "/tmp/ckpt", 3, 10)'] * 2, ["10", "20", "30"]
    if "keras" in origin:
        skip_without_keras_callback()
        calls, steps = re.search("replace `(.*?)`\\s+by\\s+`(.*?)`", README).groups(), ["1", "2", "3"]

    def run(epochs, call="keras.callbacks.Callback()", imported=None):
        seed(8)
        model = functional()
        scope = {"keras": keras, "model": model, "OrbaxCheckpointCallback": imported}
        return fit(model, epochs, eval(call.replace("/tmp", str(tmp_path)), scope), shuffle=False), values(model)

    reference, expected = run(4)
    run(2, calls[0], GuidesCallback)
    history, found = run(4, calls[1], OrbaxCheckpointCallback)
    assert history.epoch == [2, 3] and history.history["loss"] == reference.history["loss"][2:]
    assert_equal(found, expected)
    assert names(tmp_path / "ckpt") == steps


def test_readme_recipe_of_the_best_checkpoint_and_early_stopping(tmp_path):
    first, second = recipe("The best", tmp_path), recipe("The best", tmp_path)
    best = load_model(tmp_path / "best", step="best")
    assert_equal(values(first["best"]), values(best))
    held_out = first["x"][102:], first["y"][102:]
    assert best.evaluate(*held_out, verbose=0) == pytest.approx(first["stopping"].best)
    assert second["stopping"].best == first["stopping"].best and second["stopping"].wait == first["stopping"].wait


@pytest.mark.parametrize("often", ["datetime.timedelta(minutes=10)", '"auto"'])
def test_readme_recipe_of_every_ten_minutes_saves_on_ctrl_c(often, tmp_path):
    names = recipe("Every ten", tmp_path, ("datetime.timedelta(minutes=10)", often))
    interrupt = At((1, "train", 2), lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        names["model"].fit(names["x"], names["y"], epochs=3, verbose=0, callbacks=[names["checkpoint"], interrupt])
    assert names["checkpoint"].checkpoint_manager.latest_step() == 4 + 3  # within a batch


def test_readme_recipe_of_an_iterator_continues_where_it_was(tmp_path):
    pytest.importorskip("grain")
    places, epochs = ["at once", "resumed", "resumed"], [6, 3, 6]
    runs = [recipe("An iterator", tmp_path / place, ("=20", f"={each}")) for place, each in zip(places, epochs)]
    assert_equal(values(runs[2]["model"]), values(runs[0]["model"]))


def test_readme_recipe_of_fine_tuning_leaves_the_first_run_alone(tmp_path):
    change = ("KerasOrbax", "model.compile(keras.optimizers.SGD(0.01), 'mse')\nKerasOrbax")
    recipe("Fine-tuning", tmp_path, change)
    before = contents(tmp_path / "my_run")
    names = recipe("Fine-tuning", tmp_path, change)
    assert contents(tmp_path / "my_run") == before
    assert isinstance(load_model(tmp_path / "fine_tuned").optimizer, keras.optimizers.SGD)
    start = load_model(tmp_path / "my_run")
    assert names["model"].history.epoch == [0, 1, 2, 3, 4]
    losses = [model.evaluate(names["x"], names["y"], verbose=0) for model in (start, names["model"])]
    assert losses[1] < losses[0]


def test_readme_recipe_of_other_formats_has_the_same_weights_in_each(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model, saved = recipe("Inference", tmp_path)["model"], load_model(tmp_path / "my_run")
    assert not model.compiled
    models = [model, keras.saving.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)]
    models[-1].load_weights(tmp_path / "model.weights.h5")
    arrays = safetensors.load_file(tmp_path / "model.safetensors")
    for weights in (*(each.get_weights() for each in models), [arrays[weight.path] for weight in saved.weights]):
        assert_equal(weights, saved.get_weights())


def test_readme_says_what_load_model_gives_where_fit_swaps_weights_at_its_end(tmp_path):
    (call,) = re.findall(r"`(model\.optimizer\.finalize\w+\(.*?\))`", README)
    assert re.search('For `restore_best_weights=True`, load\\s`step="best"`', README)
    averaged = dense_model(optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    fit(averaged, 2, callback(averaged, tmp_path / "averages"))
    model = load_model(tmp_path / "averages")
    assert not np.array_equal(model.get_weights()[0], averaged.get_weights()[0])
    exec(call, {"model": model})
    assert_equal(values(model), values(averaged))

    stopped = dense_model()
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=1, mode="max", restore_best_weights=True)
    ours = callback(stopped, tmp_path / "best", monitor="val_loss", mode="max", stateful=[stopping])
    assert len(fit(stopped, 4, ours, stopping, validation_split=0.25).epoch) < 4
    assert_equal(load_model(tmp_path / "best", step="best").get_weights(), stopped.get_weights())
    assert not np.array_equal(load_model(tmp_path / "best").get_weights()[0], stopped.get_weights()[0])


def test_readme_names_what_is_patched_and_fit_takes_it_back(tmp_path, model):
    text = re.search(r"\*What it patches\*(.*?)\n\n", README, re.DOTALL).group(1)
    names = [name for name in re.findall(r"`(\w+)`", text) if "_" in name]
    seams = (HERE / "orbax_keras_ckpt.py").read_text().split(" seams\n")[1].split(" processes\n")[0]
    assert len(names) == 5 and all(name in seams for name in names)
    modules = [module for name, module in sys.modules.items() if name.startswith("keras.src")]
    classes = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    before = {kind: dict(vars(kind)) for kind in classes if kind.__module__.startswith("keras.src")}
    fit(model, 1, callback(model, tmp_path))
    assert not set(names) & set(vars(model)) - {"_initial_epoch", "train_function"} and model._initial_epoch is None
    assert [kind for kind, attributes in before.items() if dict(vars(kind)) != attributes] == []


STUBS = {  # what stands in for a scheduler
    "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    "srun": '#!/bin/sh\necho $$ > process\nexec "$@"\n',
    "scontrol": '#!/bin/sh\necho "$@" >> requeued\n',
}
STOP = """
def begin(epoch, logs):  # the scheduler stops the process that it has started, after three epochs and after six
    if epoch in (3, 6) and not os.path.exists(f"sent after {epoch}"):
        open(f"sent after {epoch}", "w").close()
        os.kill(int(open("process").read()), 15)

stop = keras.callbacks.LambdaCallback(on_epoch_begin=begin)
checkpoint ="""
RESULT = "np.savez('result.npz', *[np.array(v) for v in model.trainable_variables + model.optimizer.variables])\n"


def test_readme_jobs_get_the_signals_of_their_schedulers_and_the_run_ends_as_if_never_stopped(tmp_path):
    (job,) = [block for block in re.findall("```sh\n(.*?)```", README, re.DOTALL) if "srun" in block]
    train = EXAMPLE.replace("/tmp/", f"{tmp_path}/").replace("[checkpoint]", "[checkpoint, stop]") + RESULT
    scripts = {"job.sh": "#!/bin/bash\n" + job, "train.py": train.replace("\ncheckpoint =", STOP)}
    for name, text in (STUBS | scripts).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*command):
        return run_readme(command, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7")

    slurm = ["bash", "job.sh"]
    kubernetes = ["srun", *json.loads(re.search(r"`command: (\[.*?\])`", README)[1])]  # a kubelet does as srun does
    runs = [run(*command) for command in (kubernetes, slurm, slurm, slurm)]
    assert [each.returncode for each in runs] == [143, 143, 0, 0]
    lines = ["Continue with", "Save Orbax checkpoint on_epoch_end.", "Stop on SIGTERM: the run is saved", "Nothing"]
    assert [[line in each.stdout for line in lines] for each in runs] == [
        [False, True, True, False], [True, True, True, False], [True, True, False, False], [False, False, False, True]
    ]  # fmt: skip
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # once
    exec(EXAMPLE.replace("/tmp/", f"{tmp_path}/uninterrupted/"), expected := {})
    assert_equal(list(np.load(tmp_path / "result.npz").values()), values(expected["model"]))
    (tmp_path / "train.py").unlink()
    assert run(*slurm).returncode == 2  # as Python's


# ------------------------------------------------- the program that is run in processes of their own, by scenario


def attempts(work, **options):
    """One attempt; leaves what it has come to in the file `end`."""
    work = pathlib.Path(work)
    (work / "end").write_bytes(pickle.dumps(attempt(work / "ckpt", **options)))


def waits(ready, go, scenario, *arguments, **options):
    """Another scenario, once strace is attached."""
    pathlib.Path(ready).touch()
    while not os.path.exists(go):
        time.sleep(0.01)
    program(scenario, *arguments, **options)


def with_variables(variables, scenario, *arguments, **options):
    os.environ.update(variables)
    program(scenario, *arguments, **options)


def traced(directory, kind):
    """A run whose system calls are noted: of snapshots that are replaced, or over damage."""
    warnings.simplefilter("ignore")
    for place in [(0, "train", 2), (1, "train", 2)] if kind == "replaced" else []:
        with contextlib.suppress(SystemExit):
            attempt(directory, place, max_to_keep=1)
    attempt(directory, max_to_keep=1, epochs=4 if kind == "damaged" else 3)


def last_line(directory):
    model = keras.Sequential([keras.Input((300,)), layers.Dense(3000)])
    KerasOrbaxCheckpointManager(compiled(model), directory).save_state(0)


def saves_again_and_again(directory):
    """A hundred saves of 50 MB: the memory of the process after thirty of them and in the end."""
    model = compiled(keras.Sequential([keras.Input((2048,)), layers.Dense(2048)]))
    manager, memory = KerasOrbaxCheckpointManager(model, directory, 1), []
    for epochs in (range(30), range(30, 100)):
        for epoch in epochs:
            manager.save_state(epoch)
        manager.wait_until_finished()
        memory.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert memory[1] - memory[0] < 50e6, memory


def interrupted(directory):
    """Ctrl-C while a save is awaited, sent from within the save."""
    fsync, sent = os.fsync, []

    def interrupting(file):  # in the background
        time.sleep(0.2)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        fsync(file)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is unless the tests run in the background
    os.fsync = interrupting
    manager = KerasOrbaxCheckpointManager(dense_model(), directory)
    with pytest.raises(KeyboardInterrupt):
        manager.save_state(0)
        manager.wait_until_finished()
    manager.wait_until_finished()
    assert os.listdir(directory) == ["0"]


def forks(directory):
    """A fit in which another callback uses processes, and those that are forked while a thread waits for a save."""
    fork = multiprocessing.get_context("fork")
    codes, model = [], dense_model()

    def ended(process, stops=False):
        process.start()
        if stops:
            time.sleep(0.5)
            process.terminate()
        process.join(20)
        codes.append(process.exitcode)
        process.kill()

    def grandchild():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        if os.fork() == 0:
            terminate()
            time.sleep(60)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))

    at_epoch_end = on(on_epoch_end=lambda *_: ended(fork.Process(target=time.sleep, args=(60,)), stops=True))
    fit(model, 2, callback(model, directory), at_epoch_end)
    at_epoch_end = on(on_epoch_end=lambda *_: ended(fork.Process(target=grandchild)))  # which has its own handler
    fit(model, 3, callback(model, directory), at_epoch_end)
    slowly(pytest.MonkeyPatch())
    manager = KerasOrbaxCheckpointManager(model, directory)
    manager.save_state(3)
    waiting = threading.Thread(target=manager.wait_until_finished)
    waiting.start()
    time.sleep(0.2)
    ended(fork.Process(target=print))
    waiting.join()
    assert codes == [-signal.SIGTERM, -signal.SIGTERM, 7, 0] and manager.latest_step() == 3, codes


def goes_on(directory, stop):
    """Trains, and keeps one checkpoint, until a file is there."""
    model = dense_model()
    stopping = on(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", os.path.exists(stop)))
    fit(model, 10**6, callback(model, directory, 1, save_freq=2), stopping)


def emulator(port):
    """A server of buckets, one of which is there."""
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    download = objects.download

    def download_with_generation(request, response, storage, *args, **kwargs):  # TensorStore needs this header
        download(request, response, storage, *args, **kwargs)
        if response.status < 300:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects.download = download_with_generation
    create_server("localhost", port, in_memory=True, default_bucket="bucket").run()


def bucket_cycle(directory, **options):
    """After the run was killed in its second epoch and stopped in its third."""
    expected, address = uninterrupted(epochs=4)[1], os.environ["STORAGE_EMULATOR_HOST"]

    def entries():  # as the server tells them
        objects = json.load(urllib.request.urlopen(f"{address}/storage/v1/b/bucket/o?prefix=ckpt/"))["items"]
        return sorted({each["name"].split("/")[1] for each in objects} - {""})

    assert entries() == ["0", "1", "2"] and load_model(directory).optimizer.iterations == 2 * BATCHES + 3
    killed = epath.Path(directory, "0")
    (killed / "_CHECKPOINT_METADATA").write_text("{}")  # what a killed save or deletion leaves
    (killed / "default/d/0").write_text("")
    (killed / "commit_success.txt").unlink(missing_ok=True)
    assert_same_end(attempt(directory, **options)[1], expected)
    assert entries() == ["1", "2", "3"]  # three are kept, leftovers are gone
    code, lines, _ = command_line(directory, "--verify")
    row = re.split("  +", next(line for line in lines if line.startswith("2 ")))
    assert code == 0 and row[1:3] == ["3", "end"] and float(row[4].removesuffix(" kB")) > 0
    path = max(epath.Path(directory, "3/default/d").iterdir(), key=lambda path: path.stat().length)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert not is_intact(directory)
    with pytest.warns(UserWarning, match="(?s)Step 2 is restored.*DATA_LOSS"):
        assert_same_end(attempt(directory, **options)[1], expected)
    assert entries() == ["1", "2", "3", "3.damaged"]
    assert_equal(values(load_model(directory)), expected[0])
    with pytest.raises(OSError, match="checkpoint_dir='gs://missing-bucket/x' cannot be reached or written to"):
        callback(dense_model(), "gs://missing-bucket/x")


# Scenarios of many processes: `among` makes each of them one of a group.

TOGETHER = 24  # batches an epoch


def among(process, processes, devices, address, scenario, work, *arguments, heartbeat=None, is_preemption_off=False,
          **options):  # fmt: skip
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if is_preemption_off:
        jax.config.update("jax_enable_preemption_service", False)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.utils.set_random_seed(0)
        if heartbeat is None:
            keras.distribution.initialize(address, processes, process)
        else:
            jax.distributed.initialize(address, processes, process, heartbeat_timeout_seconds=heartbeat)
    with contextlib.ExitStack() as stack:
        if processes > 1:  # which JAX does at exit, but processes of multiprocessing have none
            stack.callback(jax.distributed.shutdown)
        try:
            program(scenario, work, *arguments, **options)
        except Exception:
            stack.pop_all()
            raise


def distributed_model(kind):
    """On all devices, or on the first four."""
    keras.utils.clear_session()  # the same names each time
    kind, _, count = kind.partition(" ")
    devices = keras.distribution.list_devices()[: int(count) if count else None]
    if kind == "none":
        keras.distribution.set_distribution(None)
    elif kind == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    else:
        shape = (1, len(devices)) if kind == "model" else (2, len(devices) // 2)
        layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(shape, ["batch", "model"], devices))
        layout[".*wide.kernel"] = (None, "model")
        layout[".*wide.bias"] = ("model",)
        options = {"layout_map": layout, "batch_dim_name": "batch", "auto_shard_dataset": False}
        keras.distribution.set_distribution(keras.distribution.ModelParallel(**options))
    if keras.version() < "3.11" and kind != "none":  # where fit would take nothing but tf.data
        keras.distribution.distribution()._is_multi_process = False
    seed(0)
    one = Vocabulary()
    one.words = ["one"]
    stack = [one, layers.GaussianNoise(0.1), layers.Dense(2048, name="wide"), layers.BatchNormalization()]
    stack += [layers.Dropout(0.2), layers.Dense(1, name="head")]
    return compiled(keras.Sequential([keras.Input((6,)), *stack], name="together"), metrics=["mae"])


def gathered(model):
    """All variables by path, whole."""
    groups = ("trainable_variables", "non_trainable_variables", "optimizer_variables")
    members = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    named = {f"{group}/{v.path}": v.value for group, variables in zip(groups, members) for v in variables}
    if jax.process_count() > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
        whole = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        named = {path: jax.block_until_ready(whole(value)) for path, value in named.items()}
    return {path: np.asarray(value) for path, value in named.items()}


def trains(work, layout, *, place=None, checkpoint=True, pause=0, freq="epoch", max_to_keep=2):
    """A run on all processes, the last of which leaves at a place."""
    model, process = distributed_model(layout), jax.process_index()
    own, ours, started = Keeper(np.full(3, process)), None, []  # the state differs from process to process
    keras.random.normal(())  # its generator is one variable of all processes, and begins by Python's random state
    random.seed(process)
    np.random.seed(process if layout == "data" else 0)  # every process needs the same batch where devices share it
    if checkpoint:
        freq = datetime.timedelta(seconds=0.4) if freq == "second" else freq
        options = {"stateful": [own], "save_freq": freq, "verbose": 1}
        ours = callback(model, os.path.join(work, "ckpt"), max_to_keep, **options)

    def begin(epoch, logs=None):
        if not started:
            started.append(epoch)
            np.savez(os.path.join(work, f"start_{process}.npz"), **gathered(model))
        if place and place[:2] == (epoch, "begins"):
            time.sleep(3)  # by then, JAX has told all processes of the signal

    def pass_time(batch, logs=None):
        time.sleep(pause)
        own.state = own.state * 3 + random.getrandbits(8)

    def end():
        if "SIGKILL" in place:
            ours.checkpoint_manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
        terminate()

    wait = on(on_epoch_begin=begin, on_train_batch_begin=pass_time)
    wait.on_test_batch_begin = lambda batch, logs: time.sleep(pause if place else 0)
    at = At(place and place[:3] if process == jax.process_count() - 1 else None, end)
    validation = {"validation_data": (np.tile(X, (3, 1)), np.tile(Y, (3, 1))), "validation_batch_size": 8}
    options = {"callbacks": [at, wait, *([ours] if ours else [])], "epochs": 3, "verbose": 0, "shuffle": False}
    try:
        history = model.fit(Plain("noise", TOGETHER, 8), **options, **validation)
    except SystemExit:
        newest = max(ours.checkpoint_manager.all_steps())
        print("left after batch", record_of(pathlib.Path(work, "ckpt", str(newest)))["position"]["batches"])
        raise
    if ours:
        print("steps", ours.checkpoint_manager.all_steps())
    series = {name: np.array(each) for name, each in history.history.items()}
    final = gathered(model) | series | {"draws": np.hstack(next_draws()), "own": own.state}
    np.savez(os.path.join(work, f"final_{process}.npz"), **final)


def falls_back(work, directories):
    """Continues from each; of the last, it asks for the newest step."""
    model = distributed_model("model")
    for directory in directories[:-1]:
        ours = callback(model, directory, stateful=[Keeper(np.full(3, 0))])
        history = model.fit(Plain("noise", TOGETHER, 8), shuffle=False, epochs=2, verbose=0, callbacks=[ours])
        assert history.epoch == [0, 1]
    before = gathered(model)
    with pytest.raises(CheckpointCorruptError):
        restore(model, directories[-1], 2)
    assert_equal(list(gathered(model).values()), list(before.values()))


def fails_alone(work, victim):
    """A save that fails in one process, and then one that does not; and what a callback refuses in one process."""
    model, process = distributed_model("model"), jax.process_index()
    for name, is_async in (("ckpt", True), ("waiting", False)):
        options = {"enable_async_checkpointing": is_async}
        manager = KerasOrbaxCheckpointManager(model, os.path.join(work, name), **options)
        failing = full_disk(12_000) if process == victim else contextlib.nullcontext()
        with failing, pytest.raises(CheckpointError, match="(?s)Saving step 0.*File too large"):
            commit(manager, 0, 0)  # the second raises what became of the first
        commit(manager, 0)
        with pytest.raises(ValueError, match="Step 0 is not above 0"):  # not the error of another process
            manager.save_state(0)
        commit(manager, 1)
        manager.close()
    with pytest.raises((TypeError, CheckpointError), match="cannot be saved"):
        callback(model, os.path.join(work, "ckpt"), stateful=[Keeper(object() if process == victim else 1)])
    with pytest.raises(CheckpointError, match="that all processes share. Process 1 does not see"):
        callback(model, os.path.join(work, f"of {process}"))


def relays(work, directory, kinds):
    """Restores under each layout, and saves again from there."""
    for kind in kinds:
        model = distributed_model(kind)
        model.optimizer.build(model.trainable_variables)
        shardings = [variable.value.sharding for variable in model.variables]
        KerasOrbaxCheckpointManager(model, directory, read_only=True).restore_state(donate=True)
        assert [variable.value.sharding for variable in model.variables] == shardings
        kernel = model.get_layer("wide").kernel.value
        parts = {"none": 1, "data": 1, "model": kernel.sharding.num_devices, "mixed": kernel.sharding.num_devices // 2}
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(6, 2048 // parts[kind.split()[0]])}
        manager = KerasOrbaxCheckpointManager(model, os.path.join(work, kind))
        manager.save_state(0)
        manager.close()


def program(scenario, *arguments, **options):
    global is_program
    is_program = True
    globals()[scenario](*arguments, **options)


if __name__ == "__main__":
    program(*sys.argv[1:])

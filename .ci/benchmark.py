"""Saving and restoring a Keras model's training state, side by side: `python .ci/benchmark.py --gb 0.4`.

Every round runs all candidates one after the other, each on its own newest state; the table has the medians.
Memory is the growth of the process's peak (Linux), each candidate in a process of its own.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import keras
import numpy as np
import orbax.checkpoint as ocp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from orbax_keras_ckpt import KerasOrbaxCheckpointManager

SECONDS = ("blocked", "commit", "restore")
MEMORY = ("save memory", "restore memory")


class Kernels(keras.layers.Layer):
    """`count` square matrices, one after the other."""

    def __init__(self, count, width):
        super().__init__()
        self.count, self.width = count, width

    def build(self, shape):
        self.kernels = [self.add_weight(shape=(self.width, self.width), name=f"k{i}") for i in range(self.count)]

    def call(self, x):
        for kernel in self.kernels:
            x = x @ kernel
        return x

    def get_config(self):
        return {"count": self.count, "width": self.width}


def build(count, width):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((width,)), Kernels(count, width)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def touch(model, number):
    """A new state: every array is another one, as after a step of training."""
    for variable in model.variables + model.optimizer.variables:
        if len(variable.shape) == 2:
            variable.assign(jax.random.normal(jax.random.key(number), variable.shape))
    jax.block_until_ready([variable.value for variable in model.variables + model.optimizer.variables])


# A candidate is (save, wait until committed, restore).


def ours(model, directory):
    manager = KerasOrbaxCheckpointManager(model, directory, 1)
    return manager.save_state, manager.wait_until_finished, lambda: manager.restore_state(donate=True)


def guide(model, directory):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(directory, options=options)

    def state():
        tree = model.get_state_tree()
        return {name: tree[name] for name in tree if name != "metrics_variables"}

    def restore():
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state())
        model.set_state_tree(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract)))

    return lambda step: manager.save(step, args=ocp.args.StandardSave(state())), manager.wait_until_finished, restore


def keras_callback(model, directory):
    callback = keras.callbacks.OrbaxCheckpoint(directory, monitor="loss", max_to_keep=1)
    callback.set_model(model)
    return callback.on_epoch_end, callback.wait_until_finished, lambda: model.load_weights(directory)


def weights_h5(model, directory):
    path = os.path.join(directory, "all.weights.h5")
    return lambda step: model.save_weights(path), lambda: None, lambda: model.load_weights(path)


def raw(model, directory):
    path = os.path.join(directory, "raw")

    def save(step):
        with open(path, "wb") as file:
            for variable in model.variables + model.optimizer.variables:
                file.write(np.asarray(variable.value).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def restore():
        with open(path, "rb") as file:
            for variable in model.variables + model.optimizer.variables:
                value = np.empty(variable.shape, variable.dtype)
                file.readinto(value.data)
                variable.assign(value)

    return save, lambda: None, restore


CANDIDATES = {
    "this module": ours,
    "the guide's version": guide,
    "keras.callbacks.OrbaxCheckpoint": keras_callback,
    ".weights.h5": weights_h5,
    "raw write and fsync": raw,
}
BASE = "keras.callbacks.OrbaxCheckpoint"


def clocked(action, *arguments):
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def measure(model, candidate, number):
    save, wait, restore = candidate
    touch(model, number)
    expected = [float(np.sum(variable.value)) for variable in model.trainable_variables[:3]]
    os.sync()  # what the candidate before has left to the kernel is not this one's
    blocked = clocked(save, number)
    commit = blocked + clocked(wait)
    touch(model, -1 - number)
    os.sync()
    restored = clocked(lambda: (restore(), jax.block_until_ready([v.value for v in model.optimizer.variables])))
    assert [float(np.sum(variable.value)) for variable in model.trainable_variables[:3]] == expected
    return dict(zip(SECONDS, (blocked, commit, restored)))


def peak(action):
    """Growth of the process's peak memory while `action` runs, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    status = pathlib.Path("/proc/self/status")

    def read(name):
        return int(status.read_text().split(name + ":")[1].split()[0]) * 1024

    before = read("VmRSS")
    action()
    return read("VmHWM") - before


def memory(name, model, directory):
    save, wait, restore = CANDIDATES[name](model, directory)
    touch(model, 0)
    return dict(zip(MEMORY, (peak(lambda: (save(0), wait())), peak(restore))))


def table(results, state):
    """One row for each candidate: the value, and in brackets its ratio to Keras's callback."""
    columns = SECONDS + MEMORY
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for name, row in results.items():
        cells = [f"{row[c]:.3f} s" if c in SECONDS else f"{row[c] / state:.2f} states" for c in columns]
        ratios = [f" ({row[c] / results[BASE][c]:.2f})" if c in SECONDS else "" for c in columns]
        yield f"| {name} | " + " | ".join(cell + ratio for cell, ratio in zip(cells, ratios)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.4, help="size of the state: weights and Adam's two moments")
    parser.add_argument("--variables", type=int, default=8, help="how many weights it consists of")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=CANDIDATES, help=argparse.SUPPRESS)  # the process for one candidate
    options = parser.parse_args()
    model = build(options.variables, int((options.gb * 1e9 / 12 / options.variables) ** 0.5))
    variables = model.variables + model.optimizer.variables
    state = sum(variable.value.nbytes for variable in variables)
    work = tempfile.mkdtemp()
    try:
        if options.memory:
            print(json.dumps(memory(options.memory, model, work)))
            return
        candidates = {name: make(model, tempfile.mkdtemp(dir=work)) for name, make in CANDIDATES.items()}
        rounds = {name: [] for name in candidates}
        for number in range(options.rounds + 1):  # the first one warms up
            names = list(candidates)
            for name in names[number % len(names) :] + names[: number % len(names)]:  # what comes first may pay for it
                rounds[name].append(measure(model, candidates[name], number))
        results = {
            name: {column: statistics.median(row[column] for row in rows[1:]) for column in SECONDS}
            for name, rows in rounds.items()
        }
        for name in candidates:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
            results[name] |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(work)
    print(f"{state / 1e9:.2f} GB in {len(variables)} variables, {options.rounds} rounds")
    print("\n".join(table(results, state)))


if __name__ == "__main__":
    main()

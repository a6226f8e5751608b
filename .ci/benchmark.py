"""Saving and restoring a Keras model's training state, side by side: `python .ci/benchmark.py --gb 0.4`.

Every round runs all candidates one after the other, each on its own newest state. The table has median (minimum to
maximum) of the rounds; a second one, the median of the ratios to Keras's callback and to a raw write in the same round.
The load of the machine is printed before and after: on one that does other work, the figures mean little.
`training meanwhile` is the speed of training from the start of a save until it is committed, 1 without any save.
Memory is the growth of the process's peak (Linux), each candidate in a process of its own.
On an accelerator, `jax.device_get` of the same arrays is a further candidate: the bandwidth of the bus.
`python .ci/benchmark.py --idle` measures instead what a batch costs on which nothing is saved, and `--saves 100` how
the process grows over so many saves.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the accelerator

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax
import keras
import numpy as np
import orbax.checkpoint as ocp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from orbax_keras_ckpt import KerasOrbaxCheckpointManager, OrbaxCheckpointCallback

SECONDS = ("blocked", "commit", "restore")
SPEED = "training meanwhile"
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


def bus(model, directory):
    variables, host = model.variables + model.optimizer.variables, []

    def save(step):
        host[:] = jax.device_get([variable.value for variable in variables])

    def restore():
        for variable, value in zip(variables, host):
            variable.assign(value)

    return save, lambda: None, restore


CANDIDATES = {
    "this module": ours,
    "the guide's version": guide,
    "keras.callbacks.OrbaxCheckpoint": keras_callback,
    ".weights.h5": weights_h5,
    "raw write and fsync": raw,
}
BASES = ["keras.callbacks.OrbaxCheckpoint", "raw write and fsync", ".weights.h5"]
if jax.default_backend() != "cpu":
    CANDIDATES["jax.device_get, device_put"] = bus
    BASES.append("jax.device_get, device_put")


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


def steps_per_second(model, is_over):
    x, count, start = np.ones((8, model.input_shape[1]), "float32"), 0, time.perf_counter()
    while not is_over():
        model.train_on_batch(x, x)
        count += 1
    return count / (time.perf_counter() - start)


def training_meanwhile(model, candidate, number):
    """Steps per second from the start of a save until it is committed, in parts of those without a save."""
    save, wait, _ = candidate
    steps_per_second(model, iter([False, True]).__next__)  # one step, which compiles
    alone_until = time.perf_counter() + 1.5
    alone = steps_per_second(model, lambda: time.perf_counter() > alone_until)
    start = time.perf_counter()
    save(number)
    blocked = time.perf_counter() - start
    waiting = threading.Thread(target=wait)
    waiting.start()
    start = time.perf_counter()
    rate = steps_per_second(model, lambda: not waiting.is_alive()) if waiting.is_alive() else 0.0
    seconds = time.perf_counter() - start
    return rate * seconds / (seconds + blocked) / alone


class Idle(keras.Sequential):
    """Draws its batches and does not train, so that little but the loop of `fit` is left to measure."""

    def make_train_function(self, force=False):
        def step(state, iterator):
            next(iterator)
            return self.logs, state

        self.train_function, self.logs = step, {"loss": 0.0}


def idle_batch(rounds, batches=20_000):
    """Microseconds of a batch in `fit`, alone and with our callback on a batch on which nothing is saved."""
    model = Idle([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.zeros((1, 1), "float32")

    def fit(*callbacks):
        data = ((x, x) for _ in range(batches + 2))
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=batches, verbose=0, shuffle=False, callbacks=list(callbacks))
        return (time.perf_counter() - start) / batches * 1e6

    alone, ours = [], []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as directory:
            alone.append(fit())
            ours.append(fit(OrbaxCheckpointCallback(model, directory, save_freq=10 * batches, verbose=0)))
    alone, ours = statistics.median(alone[1:]), statistics.median(ours[1:])
    print(f"a batch: {alone:.1f} us alone, {ours:.1f} us with the callback (its last save included), {rounds} rounds")


def resident(name="VmRSS"):
    """The process's memory, or with "VmHWM" its peak, in bytes."""
    return int(pathlib.Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def peak(action):
    """Growth of the process's peak memory while `action` runs, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident()
    action()
    return resident("VmHWM") - before


def memory(name, model, directory):
    save, wait, restore = CANDIDATES[name](model, directory)
    touch(model, 0)
    return dict(zip(MEMORY, (peak(lambda: (save(0), wait())), peak(restore))))


def growth(model, directory, saves, state):
    """Prints what the process has grown to, in states, after some of many saves, each of a new state."""
    save, wait, _ = ours(model, directory)
    for number in range(saves):
        touch(model, number)
        save(number)
        wait()
        if number + 1 in (1, saves * 3 // 10, saves * 6 // 10, saves):
            device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
            sizes = f"{resident() / state:.2f} states resident, {device / state:.2f} on the device"
            print(f"after {number + 1} saves: {sizes}", flush=True)


def shown(column, values, state):
    if not values:
        return "not measured"
    if column not in SECONDS:
        return f"{values[0] / state:.2f} states" if column in MEMORY else f"{statistics.median(values):.2f}"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(columns, rows):
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for name, cells in rows.items():
        yield f"| {name} | " + " | ".join(cells) + " |"


def ratios(rounds):
    """For each candidate, the medians of its ratios to others in the same round."""
    bases = [rounds[base] for base in BASES if base in rounds]
    for name, rows in rounds.items():
        cells = []
        for column in SECONDS:
            pairs = [[row[column] / other[column] for row, other in zip(rows, others)] for others in bases]
            cells.append(" / ".join(f"{statistics.median(pair):.2f}" for pair in pairs))
        yield name, cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.4, help="size of the state: weights and Adam's two moments")
    parser.add_argument("--variables", type=int, default=8, help="how many weights it consists of")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="these candidates")
    parser.add_argument("--brief", action="store_true", help="without the guide's version, training and memory")
    parser.add_argument("--memory", choices=CANDIDATES, help=argparse.SUPPRESS)  # the process for one candidate
    parser.add_argument("--idle", action="store_true", help="only the cost of a batch on which nothing is saved")
    parser.add_argument("--saves", type=int, help="only the growth of the process over so many saves")
    options = parser.parse_args()
    if options.idle:
        idle_batch(options.rounds)
        return
    if not options.memory:  # before this program is a load itself
        print(f"load before: {os.getloadavg()[0]:.2f}, on {jax.devices()[0].device_kind}", flush=True)
    model = build(options.variables, int((options.gb * 1e9 / 12 / options.variables) ** 0.5))
    variables = model.variables + model.optimizer.variables
    state = sum(variable.value.nbytes for variable in variables)
    work = tempfile.mkdtemp()
    try:
        if options.memory:
            print(json.dumps(memory(options.memory, model, work)))
            return
        if options.saves:
            growth(model, work, options.saves, state)
            return
        names = [name for name in options.only if not (options.brief and name == "the guide's version")]
        candidates = {name: CANDIDATES[name](model, tempfile.mkdtemp(dir=work)) for name in names}
        rounds = {name: [] for name in candidates}
        for number in range(options.rounds + 1):  # the first one warms up
            names = list(candidates)
            for name in names[number % len(names) :] + names[: number % len(names)]:  # what comes first may pay for it
                rounds[name].append(measure(model, candidates[name], number))
                print(number, name, rounds[name][-1], file=sys.stderr, flush=True)
        rounds = {name: rows[1:] for name, rows in rounds.items()}
        results = {name: {column: [row[column] for row in rows] for column in SECONDS} for name, rows in rounds.items()}
        for name, candidate in () if options.brief else candidates.items():
            is_trained = options.variables <= 100  # beyond that, compiling takes minutes
            numbers = range(options.rounds + 1, 2 * options.rounds + 1) if is_trained else ()
            results[name][SPEED] = [training_meanwhile(model, candidate, number) for number in numbers]
            command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
            memories = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results[name] |= {column: [value] for column, value in memories.items()}
    finally:
        shutil.rmtree(work)
    print(f"{state / 1e9:.2f} GB in {len(variables)} variables, {options.rounds} rounds")
    columns = SECONDS if options.brief else (*SECONDS, SPEED, *MEMORY)
    rows = {name: [shown(column, result[column], state) for column in columns] for name, result in results.items()}
    print("\n".join(table(columns, rows)))
    print(f"\nratios to {' / '.join(base for base in BASES if base in rounds)}")
    print("\n".join(table(SECONDS, dict(ratios(rounds)))))
    print(f"load after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()

"""Timing that survives a noisy machine: contenders take turns within one run, and medians are compared."""

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the calls of one contender, turn by turn."""

    turns: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of all turns."""
        return tuple(x for turn in self.turns for x in turn)

    @property
    def of_turns(self) -> np.ndarray:
        """The median of every turn."""
        return np.array([np.median(turn) for turn in self.turns])

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / 2 / self.median


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 7, seconds_per_turn: float = 0.25, title: str = ""
) -> dict[str, Timing]:
    """Time every contender in turn, `rounds` times over.

    Args:
      contenders: name to a function that returns when its result is ready.
      rounds: turns of each.
      seconds_per_turn: how long a turn lasts at most; it makes at least one call.
      title: of the progress bar.
    """
    turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()  # compiles
    with tqdm(total=rounds * len(contenders), desc=title, leave=False) as bar:
        for _ in range(rounds):
            for name, function in contenders.items():
                function()  # this turn's caches and threads, not the last contender's
                began, taken = time.perf_counter(), []
                while True:
                    before = time.perf_counter()
                    function()
                    after = time.perf_counter()
                    taken.append(after - before)
                    if after - began > seconds_per_turn:
                        break
                turns[name].append(tuple(taken))
                bar.update()
    return {name: Timing(tuple(taken)) for name, taken in turns.items()}


def read_bandwidth(megabytes: int = 512) -> Callable[[], object]:
    """A contender that reads so many megabytes once and adds them up: the read bandwidth that JAX reaches."""
    numbers = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(numbers).block_until_ready()


def machine() -> dict[str, str]:
    """What a figure depends on."""
    devices = jax.devices()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    torch = {"torch": sys.modules["torch"].__version__} if "torch" in sys.modules else {}  # where it was timed too
    return {
        "jax": jax.__version__,
        **torch,
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
    }

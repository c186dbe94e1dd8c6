"""The cost of a callback target over its bare function, at one millisecond a call.

    python -m benchmarks.models.callback

256 vectors in one call of the target, the least of five runs, with one thread and with two.
"""

import time

import numpy as np

import flowvi as fv

SIZE, COUNT = 10, 256


def busy(u):
    """Holds Python's lock, as Python does."""
    end = time.perf_counter() + 1e-3
    while time.perf_counter() < end:
        pass
    return -0.5 * u @ u, -u


def idle(u):
    """Releases it, as compiled code does."""
    time.sleep(1e-3)
    return -0.5 * u @ u, -u


def main() -> None:
    u = np.random.default_rng(0).normal(size=(COUNT, SIZE)).astype(np.float32)
    print("| function | threads | bare, s | target, s | more |\n|---|---:|---:|---:|---:|")
    for function in (busy, idle):
        for threads in (1, 2):
            target = fv.Target.from_callback(function, SIZE, num_threads=threads)
            target(u)
            bare, ours = [], []
            for _ in range(5):
                begin = time.perf_counter()
                for row in u:
                    function(row)
                middle = time.perf_counter()
                target(u).block_until_ready()
                bare.append(middle - begin)
                ours.append(time.perf_counter() - middle)
            a, b = min(bare), min(ours)
            print(f"| {function.__name__} | {threads} | {a:.3f} | {b:.3f} | {b / a - 1:.1%} |")


if __name__ == "__main__":
    main()

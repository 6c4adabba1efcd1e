"""Time and peak memory of sliding-window attention, forward and backward: blocked (local) against masked (reference).

Batch 1, one head of 64, window 128. Memory is what XLA's compiled program reserves: arguments, results, temporaries.
Prints device, versions, the table, and the exponents of a power law fitted over the lengths. With --crossing it times
whole lengths around a few windows instead: where does "auto" have to change over?
"""

import argparse
import platform

import jax

from jaxlm.reproduce.attention_cost import exponent, gradient, median_seconds

LENGTHS = [1024, 2048, 4096, 8192, 16384]


def scaling(window: int, rounds: int) -> None:
    """The table over LENGTHS and the fitted exponents."""
    found: dict[str, list[tuple[float, int]]] = {"local": [], "reference": []}
    print(
        f"{'T':>6}  {'local ms':>9} {'MB':>8}  {'reference ms':>12} {'MB':>8}  {'time ratio':>10} {'memory ratio':>12}"
    )
    for length in LENGTHS:
        for name, rows in found.items():
            call, size = gradient(length, window, local=name == "local")
            rows.append((median_seconds(call, rounds), size))
        (fast, small), (slow, large) = found["local"][-1], found["reference"][-1]
        print(
            f"{length:>6}  {1e3 * fast:>9.1f} {small / 1e6:>8.1f}  {1e3 * slow:>12.1f} {large / 1e6:>8.1f}  "
            f"{slow / fast:>10.1f} {large / small:>12.1f}",
            flush=True,
        )
    for name, rows in found.items():
        times, sizes = zip(*rows, strict=True)
        print(f"{name:9} grows as T^{exponent(LENGTHS, times):.2f} in time, T^{exponent(LENGTHS, sizes):.2f} in memory")


def crossing(rounds: int) -> None:
    """Time of the reference over that of local, by window and length in windows; batch 4, four heads."""
    lengths = [1, 1.5, 2, 3, 4, 8]
    print("reference time / local time; above 1 local is faster\n  W  " + "".join(f"  T = {n:g} W" for n in lengths))
    for window in (8, 16, 32, 64, 128, 256):
        ratios = []
        for n in lengths:
            local, masked = (gradient(int(n * window), window, choice, 4, 4)[0] for choice in (True, False))
            ratios.append(median_seconds(masked, rounds) / median_seconds(local, rounds))
        print(f"{window:>4} " + "".join(f"{ratio:>9.2f}" for ratio in ratios), flush=True)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--crossing", action="store_true")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({platform.processor() or platform.machine()}), jax {jax.__version__}, float32")
    print(f"two warm-up calls, then the median of {arguments.rounds}")
    if arguments.crossing:
        crossing(arguments.rounds)
    else:
        scaling(arguments.window, arguments.rounds)


if __name__ == "__main__":
    main()

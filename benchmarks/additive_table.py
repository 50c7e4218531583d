"""The table of a run of bench_additive.py: `python -m benchmarks.additive_table RECORDS`."""

from statistics import median

from benchmarks.additive_cases import EAGER, OURS, Case
from benchmarks.attention_table import print_table
from benchmarks.paired import ratio


def line(record: dict) -> str:
    """One case: our time, how many times as fast as each peer we are, memory, and the tanh rate."""
    case = Case(**record["case"])
    # One thread counts CPU time, which leaves out what other processes take.
    clock = "cpu_us" if record["device"] == "cpu" else "wall_us"
    samples = {name: s[clock] for name, s in record["samples"].items()}
    microseconds = median(samples[OURS])
    peers = {name: ratio(s, samples[OURS]) for name, s in samples.items() if name != OURS}
    others = ", ".join(f"{name} {r:.2f}x" for name, r in peers.items())
    peak = record["peak_bytes"]
    share = peak[OURS] / max(peak[EAGER], 1)
    passes = 2 if case.backward else 1
    rate = passes * record["tanhs"] / (microseconds * 1e-6) / record["tanh_rate"]
    return (
        f"{case!s:42} {microseconds:9.0f} us  {others}  memory {share:.1%} of eager's"
        f"  {rate:.2f} of the tanh rate"
    )


def main() -> None:
    """Prints a line for each case."""
    print_table("python -m benchmarks.additive_table", line)


if __name__ == "__main__":
    main()

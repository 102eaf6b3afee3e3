"""Print the table of the README from the JSON files of the benchmarks.

python benchmarks/table.py
"""

from results import read_result


def demo_rows(result: dict) -> list[tuple[str, str]]:
    """The demo in all and its phases from the longest to the shortest; what is below half a second is left out."""
    phases = sorted(result["phases"].items(), key=lambda item: -item[1])
    rows = [("`make demo` after the install", f"{result['total_seconds']:.0f} s")]
    return rows + [(f"- {name}", f"{seconds:.1f} s") for name, seconds in phases if seconds >= 0.5]


def memory_rows(result: dict) -> list[tuple[str, str]]:
    """Peak memory at each number of pictures."""
    what = f"pictures of {result['size']} px, `--cache_latents`: peak memory of the host"
    rows = [(f"{run['pictures']} {what}", f"{run['peak_mb'] / 1000:.2f} GB") for run in result["runs"]]
    return [*rows, ("growth from the first to the last", f"{100 * (result['growth'] - 1):+.1f} %")]


def step_rows(result: dict) -> list[tuple[str, str]]:
    """Both loops and their ratio."""
    what = f"{result['parameters'] / 1e6:.0f} M parameters, {result['size']} px"
    return [
        (f"training step, {what}", f"{result['real_seconds']:.2f} s"),
        ("the same forward, backward and optimizer step in a bare loop", f"{result['bare_seconds']:.2f} s"),
        ("ratio", f"{result['median_of_ratios']:.3f}"),
    ]


def main() -> None:
    """Prints one table; a benchmark that has not been run says so."""
    print("| what | measured | command |\n|---|---|---|")
    machines = set()
    for name, make_rows in (("demo_phases", demo_rows), ("memory", memory_rows), ("step_time", step_rows)):
        result = read_result(name)
        if result is None:
            print(f"| {name} | not measured | `python benchmarks/{name}.py` |")
            continue
        machines.add(f"{result['cpu']}, {result['cores']} cores, torch {result['versions']['torch']}, {result['date']}")
        for number, (what, value) in enumerate(make_rows(result)):
            print(f"| {what} | {value} | {'`' + result['command'] + '`' if number == 0 else ''} |")
    print("\nMeasured on " + "; ".join(sorted(machines)) + "." if machines else "")


if __name__ == "__main__":
    main()

"""Compare the shared regions of the two training scripts, or copy them from one to the other.

    python tools/sync_regions.py                  print differences; exit 1 if there are any
    python tools/sync_regions.py --take SCRIPT    copy the regions of SCRIPT to the other script

A region is the code between `# region shared: NAME` and `# endregion shared: NAME`, both at column 0. It must be in
both scripts, in the same order, and byte-identical. Names that both scripts define outside a region need a comment
directly above, `# differs: reason`. Regions must make up most of the longer script, so losing markers does not pass.
"""

import argparse
import ast
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_dreambooth_lora_flux2.py", "train_dreambooth_lora_flux2_img2img.py")
LEAST_SHARE = 0.75
OPEN, CLOSE = re.compile(r"# region shared: ([a-z0-9-]+)"), "# endregion shared: {}"


@dataclass(frozen=True)
class Region:
    """A shared region: its name, its lines without the markers, and its first line number (from 0)."""

    name: str
    first: int
    lines: list[str]


def find_regions(text: str) -> list[Region]:
    """Returns the regions of a script in order. Raises ValueError if one is not closed or occurs twice."""
    lines, regions, place = text.splitlines(), [], 0
    while place < len(lines):
        if match := OPEN.fullmatch(lines[place]):
            name = match[1]
            try:
                end = lines.index(CLOSE.format(name), place)
            except ValueError:
                raise ValueError(f"line {place + 1}: region {name} is not closed") from None
            if name in {region.name for region in regions}:
                raise ValueError(f"line {place + 1}: region {name} occurs a second time")
            regions.append(Region(name, place + 1, lines[place + 1 : end]))
            place = end
        place += 1
    return regions


def shared_share(texts: list[str]) -> float:
    """Returns the lines in shared regions as a share of the lines of the longer script."""
    first, second = ({region.name: region.lines for region in find_regions(text)} for text in texts)
    same = sum(len(lines) for name, lines in first.items() if second.get(name) == lines)
    return same / max(len(text.splitlines()) for text in texts)


def top_level_names(text: str) -> dict[str, int]:
    """Returns the top-level functions, classes and constants with their line numbers (from 1)."""
    names = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id: node.lineno for target in targets for part in ast.walk(target) if hasattr(part, "id")}
    return names


def unexplained(texts: list[str]) -> list[str]:
    """Returns names that both scripts define, in one of them outside a region and without `# differs: reason` above."""
    problems = []
    tables = [top_level_names(text) for text in texts]
    for script, text, names in zip(SCRIPTS, texts, tables, strict=True):
        lines = text.splitlines()
        inside = {n for region in find_regions(text) for n in range(region.first, region.first + len(region.lines))}
        for name in sorted(tables[0].keys() & tables[1].keys()):
            above = names[name] - 2
            if above + 1 not in inside and not re.fullmatch(r"# differs: \S.*", lines[above] if above >= 0 else ""):
                problems.append(f"{script}:{above + 2}: {name} is in both scripts; put it into a region or say "
                                "'# differs: reason' above it")  # fmt: skip
    return problems


def differences(texts: list[str]) -> list[str]:
    """Returns the differences between the scripts as lines to print; [] if there are none."""
    first, second = (find_regions(text) for text in texts)
    order = [[region.name for region in regions] for regions in (first, second)]
    if order[0] != order[1]:
        return ["the regions differ in name or order:", *difflib.unified_diff(*order, *SCRIPTS, lineterm="", n=0)]
    problems = []
    for one, other in zip(first, second, strict=True):
        labels = [f"{script} {one.name}" for script in SCRIPTS]
        problems += difflib.unified_diff(one.lines, other.lines, *labels, lineterm="")
    share = shared_share(texts)
    if not problems and share < LEAST_SHARE:
        problems.append(f"only {share:.0%} of the longer script is shared; at least {LEAST_SHARE:.0%} must be")
    return problems + unexplained(texts)


def take(source: str, target: str) -> str:
    """Returns `target` with the regions of `source`. Raises ValueError unless both have the same regions in order."""
    theirs, ours = find_regions(source), find_regions(target)
    if [region.name for region in theirs] != [region.name for region in ours]:
        raise ValueError("the regions differ in name or order; add or move the markers first")
    lines = target.splitlines()
    for new, old in reversed(list(zip(theirs, ours, strict=True))):
        lines[old.first : old.first + len(old.lines)] = new.lines
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Compares or copies; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare the shared regions of the two training scripts.")
    parser.add_argument(
        "--take", choices=SCRIPTS, metavar="SCRIPT", help="copy the regions of this script to the other"
    )
    choice = parser.parse_args(argv).take
    texts = [(root / script).read_text(encoding="utf-8") for script in SCRIPTS]
    if choice:
        source = SCRIPTS.index(choice)
        target = 1 - source
        texts[target] = take(texts[source], texts[target])
        (root / SCRIPTS[target]).write_text(texts[target], encoding="utf-8")
    problems = differences(texts)
    print("\n".join(problems) if problems else f"in step: {shared_share(texts):.1%} of the longer script is shared")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes docs/settings.md, every flag of both scripts with its default, from their parsers.

python tools/settings_page.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, load_arguments  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """# Settings

Made by `python tools/settings_page.py` from the scripts' own `--help`. **T** is the text-to-image script, **I** the
image-to-image script; a flag without a mark is in both. [How to choose](training.md) says more of some of them.
"""


def rows_of(script: str) -> dict[str, dict[str, str]]:
    """The flags of a script by group: the cell of the flag, and what it means."""
    parser = load_arguments(script).build_parser()
    groups: dict[str, dict[str, str]] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            names = [name for name in action.option_strings if name.startswith("--")]
            if names and names[0] != "--help":
                values = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
                flag = " ".join(f"`{name}`" for name in names) + values
                groups.setdefault(group.title, {})[flag] = (action.help or "").replace("|", "\\|")
    return groups


def page() -> str:
    """The whole page."""
    sides = {"T": rows_of(TEXT_TO_IMAGE), "I": rows_of(IMAGE_TO_IMAGE)}
    lines = [INTRODUCTION]
    for title in dict.fromkeys((*sides["T"], *sides["I"])):
        lines += [f"## {title}\n", "| flag | | meaning |", "|---|---|---|"]
        own = {mark: groups.get(title, {}) for mark, groups in sides.items()}
        for flag in dict.fromkeys((*own["T"], *own["I"])):
            marks = [mark for mark, rows in own.items() if flag in rows]
            mark = marks[0] if len(marks) == 1 else ""
            lines.append(f"| {flag} | {mark} | {own[marks[0]][flag]} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

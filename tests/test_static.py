"""The laws that can be read off the files: needs neither torch nor a model, only pytest and the standard library.

Each law about a script is a rule: a function from source to a list of violations. It carries bad snippets that it must
catch and good ones that it must let pass, so that no rule is a rule that cannot fail.

    python -m pytest tests/test_static.py
    python tests/test_static.py --update        rewrite flags_snapshot.json after a wanted change of the command line
"""

import ast
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import (
    HEAVY_IMPORTS_MARKER,
    IMAGE_TO_IMAGE,
    MINIMAL_ARGUMENTS,
    ROOT,
    TEXT_TO_IMAGE,
    existing_scripts,
    load_arguments,
    read_script,
    run_python,
)
from mutations import MUTATIONS

MAX_CODE_LINES = 3074
MAX_EDITOR_LINES = 4069
SHORTER_SCRIPT = 2908, 3862  # lines of code and in the editor, below which the text-to-image script stays
MAX_MAIN_LINES = 50
MAX_FUNCTION_LINES = 90
MAX_NESTING = 4
MAX_HAND_FORMATTED = 10

SNAPSHOT = ROOT / "tests" / "flags_snapshot.json"
RUN_FILES = sorted((ROOT / "configs" / "runs").glob("*.args"))
ACCELERATE_FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
PICKLE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
POSIX_ONLY_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
POSIX_ONLY_NAMES = {
    "signal.SIGUSR1",
    "signal.SIGUSR2",
    "signal.SIGHUP",
    "signal.SIGALRM",
    "signal.SIGKILL",
    "os.fork",
    "os.geteuid",
    "os.getuid",
    "ctypes.CDLL",
}
IMPORT_NAMES = {"pillow": "PIL"}  # where a package is imported under another name than it is installed under


@dataclass(frozen=True)
class Rule:
    """A law about a script, with snippets that show what breaks it and what does not."""

    check: Callable[[str], list[str]]
    bad: tuple[str, ...]
    good: tuple[str, ...]


RULES: dict[str, Rule] = {}


def rule(bad: tuple[str, ...], good: tuple[str, ...]) -> Callable:
    """Register the decorated function as a rule under its name."""

    def register(check: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
        RULES[check.__name__] = Rule(check, bad, good)
        return check

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Reading source
# ---------------------------------------------------------------------------------------------------------------------


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the line numbers that docstrings cover."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


@functools.lru_cache
def parsed(source: str) -> ast.Module:
    """The tree of a script, which no rule changes."""
    return ast.parse(source)


def count_code_lines(source: str) -> int:
    """Count the lines that hold code: not blank, not only a comment, not a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(parsed(source)))


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and top-level module of every import, at any depth; a relative import has the name '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value).split(".")[0]


def header_of(source: str) -> dict:
    """Return the PEP 723 header as a dictionary, empty where there is none."""
    match = re.search(r"(?m)^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$", source)
    if match is None:
        return {}
    return tomllib.loads("\n".join(line[2:] for line in match["content"].splitlines()))


def import_name(requirement: str) -> str:
    """Return the name under which the package of a requirement line is imported."""
    package = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("-", "_")
    return IMPORT_NAMES.get(package, package)


def is_args(node: ast.AST) -> bool:
    """Say whether an expression is the parsed command line: `args`, or a holder's field such as `run.args`."""
    return (isinstance(node, ast.Name) and node.id == "args") or (
        isinstance(node, ast.Attribute) and node.attr == "args"
    )


def main_guards(tree: ast.Module) -> list[ast.If]:
    """Return the top-level `if __name__ == "__main__":` statements."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse
    ]


def comments_of(source: str) -> list[tuple[int, int, str]]:
    """Return line, column and text of every comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(*token.start, token.string) for token in tokens if token.type == tokenize.COMMENT]


def flag_calls(tree: ast.Module) -> list[ast.Call]:
    """Return the calls `flag("name", ...)` that declare the command line."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "flag"
    ]


def declared_flags(source: str) -> list[str]:
    """Return the names of the declared flags in the order of the file."""
    calls = flag_calls(parsed(source))
    return [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]


def read_flags(tree: ast.Module) -> set[str]:
    """Return the names read as `args.NAME`, `run.args.NAME` or `getattr(args, "NAME")`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_args(node.value) and not node.attr.startswith("__"):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and is_args(node.args[0]):
            if isinstance(node.args[1], ast.Constant):
                names.add(node.args[1].value)
    return names


def flags_without_effect(tree: ast.Module) -> set[str]:
    """Return the names listed in the script's constant ACCEPTED_NO_EFFECT (a tuple, or a dictionary's keys)."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "ACCEPTED_NO_EFFECT" for target in targets):
            entries = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            return {entry.value for entry in entries}
    return set()


# ---------------------------------------------------------------------------------------------------------------------
# Rules: size and shape
# ---------------------------------------------------------------------------------------------------------------------


@rule(
    bad=(
        "x = 1\n" * MAX_CODE_LINES,
        "# a comment\n" * MAX_EDITOR_LINES,
        'x = """\n' + "y\n" * MAX_CODE_LINES + '"""\n',
    ),
    good=("x = 1\n" * (MAX_CODE_LINES - 1) + "# a comment\n" * 100 + "\n" * 100,),
)
def script_is_short_enough(source: str) -> list[str]:
    """A script has fewer lines of code, and fewer in the editor, than the limits."""
    code, editor = count_code_lines(source), len(source.splitlines())
    violations = [f"{code} lines of code, the limit is below {MAX_CODE_LINES}"] if code >= MAX_CODE_LINES else []
    if editor >= MAX_EDITOR_LINES:
        violations.append(f"{editor} lines in the editor, the limit is below {MAX_EDITOR_LINES}")
    return violations


def test_the_text_to_image_script_stays_the_shorter_one():
    source = read_script(TEXT_TO_IMAGE)
    code, editor = SHORTER_SCRIPT
    assert count_code_lines(source) < code and len(source.splitlines()) < editor


@rule(
    bad=("x = 1  # fmt: skip\n" * (MAX_HAND_FORMATTED + 1), "# fmt: off\nx = 1\n# fmt: on\n"),
    good=("x = 1  # fmt: skip\n" * MAX_HAND_FORMATTED, 'x = "# fmt: off"\n'),
)
def formatting_by_hand_is_rare(source: str) -> list[str]:
    """At most ten statements are formatted by hand, each on its own."""
    comments = [text for *_, text in comments_of(source)]
    skipped = sum(text == "# fmt: skip" for text in comments)
    violations = [f"{skipped} times '# fmt: skip', at most {MAX_HAND_FORMATTED}"] * (skipped > MAX_HAND_FORMATTED)
    return violations + [f"'{text}'" for text in comments if text == "# fmt: off"]


@rule(
    bad=(
        "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
        "def main():\n" + "    x = 1\n" * (MAX_MAIN_LINES - 1),
        "class A:\n    def f(self):\n" + "        x = 1\n" * (MAX_FUNCTION_LINES - 1),
    ),
    good=(
        "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 2),
        "def main():\n" + "    x = 1\n" * (MAX_MAIN_LINES - 2),
    ),
)
def functions_are_short(source: str) -> list[str]:
    """`main` has fewer than 50 lines, any other function fewer than 90, from `def` to the end with its docstring."""
    violations = []
    for node in functions_of(parsed(source)):
        limit = MAX_MAIN_LINES if node.name == "main" else MAX_FUNCTION_LINES
        length = node.end_lineno - node.lineno + 1
        if length >= limit:
            violations.append(f"line {node.lineno}: {node.name} has {length} lines, the limit is below {limit}")
    return violations


def nesting_of(node: ast.AST, depth: int = 0) -> tuple[int, int]:
    """Return the deepest nesting of blocks below a node, nested functions left out, and the line where it begins."""
    deepest = (depth, getattr(node, "lineno", 0))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child.col_offset == node.col_offset
        inner = depth + (isinstance(child, BLOCKS) and not is_elif)
        deepest = max(deepest, nesting_of(child, inner), key=lambda found: found[0])
    return deepest


@rule(
    bad=(
        "def f():\n for a in b:\n  with c:\n   try:\n    d\n   except E:\n    while g:\n     if h:\n      i\n",
        "for a in b:\n if a:\n  if b:\n   if c:\n    if d:\n     e\n",
    ),
    good=(
        "def f():\n if a:\n  b\n elif c:\n  d\n elif e:\n  f\n elif g:\n  h\n elif i:\n  j\n else:\n  k\n",
        "for a in b:\n for c in d:\n  for e in f:\n   for g in h:\n    i\n",
    ),
)
def nesting_is_shallow(source: str) -> list[str]:
    """Blocks (if, for, while, with, try, match) are nested at most four deep; an elif is no deeper than its if."""
    tree = parsed(source)
    found = ((getattr(node, "name", "the module"), *nesting_of(node)) for node in (tree, *functions_of(tree)))
    return [f"line {line}: {name} is nested {depth} deep" for name, depth, line in found if depth > MAX_NESTING]


@rule(
    bad=("def f():\n    global x\n    x = 1\n", "def f():\n    x = 1\n    def g():\n        nonlocal x\n"),
    good=("GLOBAL = 1\n",),
)
def no_global_state(source: str) -> list[str]:
    """No `global` and no `nonlocal`."""
    nodes = (node for node in ast.walk(parsed(source)) if isinstance(node, (ast.Global, ast.Nonlocal)))
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in nodes]


@rule(
    bad=(
        "def f():\n    def g():\n        pass\n",
        "class A:\n    def f(self):\n        if x:\n            def g():\n                pass\n",
        "def f():\n    class A:\n        def g(self):\n            pass\n",
    ),
    good=("class A:\n    def f(self):\n        return map(lambda x: x, self)\n",),
)
def no_nested_functions(source: str) -> list[str]:
    """No function is defined in a function; methods of a top-level class are fine."""
    violations = []
    for outer in functions_of(parsed(source)):
        inner = (node for node in ast.walk(outer) if isinstance(node, FUNCTIONS) and node is not outer)
        violations += [f"line {node.lineno}: {node.name} is defined inside {outer.name}" for node in inner]
    return violations


@rule(
    bad=(
        "def f():\n" + "    x = 1\n" * 5,
        'class A:\n    """A."""\n    def f(self):\n' + "        x = 1\n" * 5,
        "class A:\n" + "    x = 1\n" * 5,
        'def f():\n    """no sentence"""\n' + "    x = 1\n" * 5,
    ),
    good=(
        'def f():\n    """Do it."""\n' + "    x = 1\n" * 5,
        'def f():\n    """Return the noise: shape BCHW.\n\n    More."""\n' + "    x = 1\n" * 5,
        "def f():\n" + "    x = 1\n" * 4,
    ),
)
def everything_longer_has_a_docstring(source: str) -> list[str]:
    """Every function, method and class of six lines or more has a docstring of at least one whole sentence."""
    violations = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.end_lineno - node.lineno >= 5:
            if not re.search(r"[.!?](\s|$)", ast.get_docstring(node) or ""):
                violations.append(f"line {node.lineno}: {node.name} has no docstring with a whole sentence")
    return violations


# ---------------------------------------------------------------------------------------------------------------------
# Rules: the command line
# ---------------------------------------------------------------------------------------------------------------------


def writes_args(node: ast.AST) -> bool:
    """Say whether a node changes the parsed command line in place."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return is_args(node.value)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return ast.unparse(node.value) in ("vars(args)", "args.__dict__")
    if isinstance(node, ast.Call):
        if ast.unparse(node.func) in ("setattr", "delattr", "object.__setattr__"):
            return bool(node.args) and is_args(node.args[0])
        return (
            re.match(r"(vars\(args\)|args\.__dict__)\.(update|pop|clear|setdefault)$", ast.unparse(node.func))
            is not None
        )
    return False


def args_bindings(tree: ast.Module) -> list[ast.Name]:
    """Return where the name `args` is bound, apart from parameters and from fields declared in a class."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    fields = {field.target for node in classes for field in node.body if isinstance(field, ast.AnnAssign)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name)
        and node.id == "args"
        and not isinstance(node.ctx, ast.Load)
        and node not in fields
    ]


@rule(
    bad=(
        "def f(args):\n    args.rank = 1\n",
        "def f(args):\n    args.rank += 1\n",
        "def f(args):\n    args = 1\n",
        "def f(run):\n    run.args.rank = 1\n",
        "def f(args):\n    setattr(args, 'rank', 1)\n",
        "def f(args):\n    vars(args)['rank'] = 1\n",
        "def f(args):\n    vars(args).update(rank=1)\n",
        "def f(args):\n    args.__dict__['rank'] = 1\n",
        "def f(args):\n    del args.rank\n",
        "for args in x:\n    pass\n",
        "def f(args):\n    (args.rank, b) = 1, 2\n",
        "def parse_args(a):\n    args = parse(a)\n    args = fix(args)\n    return args\n",
    ),
    good=(
        "def parse_args(a):\n    args = parse(a)\n    return args\n",
        "class Run:\n    args: Namespace\n",
        "def f(args, **kwargs):\n    rank = args.rank\n    return g(args=args)\n",
        "def f(*args):\n    return args\n",
    ),
)
def args_are_never_assigned_to(source: str) -> list[str]:
    """`args` is bound once, in `parse_args`, and never changed; derived values live elsewhere."""
    tree = parsed(source)
    violations = [f"line {node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree) if writes_args(node)]
    parsers = [node for node in tree.body if isinstance(node, FUNCTIONS) and node.name == "parse_args"]
    inside = {name for parser in parsers for name in ast.walk(parser)}
    allowed = 1
    for name in args_bindings(tree):
        if name in inside and allowed:
            allowed -= 1
        else:
            violations.append(f"line {name.lineno}: args is bound here")
    return violations


@rule(
    bad=(
        'flag("rank")\n',
        "def f(args):\n    return args.rank\n",
        'flag("rank")\nflag("rank")\ndef f(args):\n    return args.rank\n',
        'flag("--rank")\n',
        "flag(NAME)\ndef f(args):\n    return args.rank\n",
        'flag("rank")\nACCEPTED_NO_EFFECT = ("rank", "seed")\n',
        'flag("rank")\nACCEPTED_NO_EFFECT = ("rank",)\ndef f(args):\n    return args.rank\n',
    ),
    good=(
        'flag("rank", default=16)\ndef f(args):\n    return args.rank\n',
        'flag("rank")\ndef f(run):\n    return run.args.rank\n',
        'flag("rank")\nACCEPTED_NO_EFFECT = ("rank",)\n',
        'flag("rank")\nACCEPTED_NO_EFFECT: dict = {"rank": "why"}\n',
        'flag("rank")\ndef f(args):\n    return getattr(args, "rank"), vars(args)\n',
    ),
)
def flags_are_declared_and_read(source: str) -> list[str]:
    """Every declared flag is read or said to have no effect, every flag read is declared, each is declared once."""
    tree = parsed(source)
    declared, read, without_effect = declared_flags(source), read_flags(tree), flags_without_effect(tree)
    violations = [f"--{name} is declared and never read" for name in sorted({*declared} - read - without_effect)]
    violations += [f"args.{name} is read and not declared" for name in sorted(read - {*declared})]
    violations += [
        f"--{name} is in ACCEPTED_NO_EFFECT and not declared" for name in sorted(without_effect - {*declared})
    ]
    violations += [f"--{name} is in ACCEPTED_NO_EFFECT and read" for name in sorted(without_effect & read)]
    violations += [f"--{name} is declared twice" for name in sorted({*declared}) if declared.count(name) > 1]
    violations += [
        f"flag({name!r}) is no plain name" for name in declared if not re.fullmatch(r"[a-z][a-z0-9_]*", name)
    ]
    if len(declared) < len(flag_calls(tree)):
        violations.append("a flag is declared with a name that is not a literal")
    return violations


GUARD = 'if __name__ == "__main__":\n    COMMAND_LINE = parse_args()\n'
LAST = 'if __name__ == "__main__":\n    main(COMMAND_LINE)\n'


@rule(
    bad=(
        f"import torch\n{GUARD}{HEAVY_IMPORTS_MARKER}\n{LAST}",
        f"def f():\n    import numpy\n{GUARD}{HEAVY_IMPORTS_MARKER}\n{LAST}",
        f"{HEAVY_IMPORTS_MARKER}\nimport torch\n{LAST}",
        f"{GUARD}import torch\n{LAST}",
        f"{GUARD}import torch\n{HEAVY_IMPORTS_MARKER}\n{LAST}",
        f"{HEAVY_IMPORTS_MARKER}\n{GUARD}import torch\n{LAST}",
        f"{GUARD}{HEAVY_IMPORTS_MARKER}\nimport torch\n",
        f"{GUARD}{HEAVY_IMPORTS_MARKER}\n{LAST}x = 1\n",
        f"{GUARD}{HEAVY_IMPORTS_MARKER}\nif __name__ == '__main__':\n    main()\n",
        f"if __name__ == '__main__':\n    COMMAND_LINE = parse_args()\n    print()\n{HEAVY_IMPORTS_MARKER}\n{LAST}",
        f"{GUARD}{HEAVY_IMPORTS_MARKER}\nif __name__ == '__main__':\n    main(parse_args())\n",
    ),
    good=(
        f"import argparse\n{GUARD}\n{HEAVY_IMPORTS_MARKER}\nimport torch\n{LAST}",
        f"{GUARD}{HEAVY_IMPORTS_MARKER}\nif __name__ == '__main__':\n    sys.exit(main(COMMAND_LINE))\n",
    ),
)
def arguments_stand_before_the_heavy_imports(source: str) -> list[str]:
    """The command line is parsed, once, and the marker stands, before all but the standard library; main is last."""
    tree = parsed(source)
    guards = main_guards(tree)
    if len(guards) != 2:
        return [f'expected two statements `if __name__ == "__main__":`, found {len(guards)}']
    early, last = guards
    markers = [line for line, column, text in comments_of(source) if text == HEAVY_IMPORTS_MARKER and column == 0]
    imports = [line for line, module in imports_of(tree) if module not in sys.stdlib_module_names]
    first_heavy = min(imports, default=last.lineno)
    violations = []
    if ast.unparse(early.body[-1]) != "COMMAND_LINE = parse_args()":
        violations.append(f"line {early.lineno}: the first one must end with `COMMAND_LINE = parse_args()`")
    if len(markers) != 1 or not early.end_lineno < markers[0] < first_heavy:
        violations.append("the early parse, the marker comment and the first heavy import must stand in this order")
    ending = r"main\(COMMAND_LINE\)|(raise )?(sys\.exit|SystemExit)\(main\(COMMAND_LINE\)\)"
    if tree.body[-1] is not last or not re.fullmatch(ending, "\n".join(map(ast.unparse, last.body))):
        violations.append("the last statement must be main(COMMAND_LINE) under its own guard")
    return violations


# ---------------------------------------------------------------------------------------------------------------------
# Rules: what a script may use
# ---------------------------------------------------------------------------------------------------------------------


def dangerous_call(node: ast.Call) -> bool:
    """Say whether a call runs text as code, starts a shell, or reads or writes pickles."""
    function = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return (
        function in ("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput")
        or function in ("subprocess.getstatusoutput", "torch.save")
        or function in ("accelerator.save_state", "accelerator.load_state")
        or (function.endswith("torch.load") and keywords.get("weights_only") != "True")
        or keywords.get("shell", "False") != "False"
        or keywords.get("allow_pickle", "False") != "False"
        or keywords.get("safe_serialization", "True") != "True"
        or "trust_remote_code" in keywords
    )


@rule(
    bad=(
        "import pickle\n",
        "def f():\n    from dill import load\n",
        "eval('1')\n",
        "exec('1')\n",
        "compile('1', '', 'exec')\n",
        "os.system('ls')\n",
        "subprocess.run('ls', shell=True)\n",
        "f(trust_remote_code=True)\n",
        "f(**{'trust_remote_code': True})\n",
        "torch.load(path)\n",
        "torch.load(path, weights_only=False)\n",
        "torch.load(path, weights_only=flag)\n",
        "torch.save(x, path)\n",
        "numpy.load(path, allow_pickle=True)\n",
        "accelerator.save_state(path)\n",
        "from torch import load\n",
    ),
    good=(
        "model.eval()\n",
        "transformer.compile()\ntorch.compile(model)\n",
        "torch.load(path, weights_only=True)\n",
        "subprocess.run(['ls'], shell=False)\n",
        '"""No eval, no pickle, no trust_remote_code here."""\n',
    ),
)
def nothing_dangerous(source: str) -> list[str]:
    """No pickle, no eval or exec, no shell, no code from the Hub; `torch.load` only with `weights_only=True`."""
    tree = parsed(source)
    violations = [f"line {line}: import of {module}" for line, module in imports_of(tree) if module in PICKLE_MODULES]
    for node in ast.walk(tree):
        hidden = isinstance(node, ast.Constant) and node.value == "trust_remote_code"
        renamed = (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and {"load", "save"} & {a.name for a in node.names}
        )
        if hidden or renamed or (isinstance(node, ast.Call) and dangerous_call(node)):
            violations.append(f"line {node.lineno}: {ast.unparse(node)}")
    return violations


HEADER = (
    '# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n#   "Pillow>=1",\n#   "torch>=2",\n# ]\n# ///\n'
)


@rule(
    bad=(
        f"{HEADER}import numpy\n",
        f"{HEADER}import helpers\n",
        f"{HEADER}from . import helpers\n",
        f"{HEADER}def f():\n    from train_dreambooth_lora_flux2 import main\n",
        f"{HEADER}importlib.import_module('numpy')\n",
        "import torch\n",
    ),
    good=(f"{HEADER}import os\nimport torch.nn\nfrom PIL import Image\n",),
)
def imports_are_declared(source: str) -> list[str]:
    """A script imports the standard library and the packages of its own header, nothing of this repository."""
    allowed = {import_name(requirement) for requirement in header_of(source).get("dependencies", [])}
    allowed |= sys.stdlib_module_names
    found = imports_of(parsed(source))
    return [f"line {line}: {module} is not in the header" for line, module in found if module not in allowed]


def is_portable_guard(node: ast.AST) -> bool:
    """Say whether a statement protects its body from running where a module or a signal is missing."""
    if isinstance(node, ast.Try):
        caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type is not None)
        return re.search(r"ImportError|ModuleNotFoundError|AttributeError|OSError", caught) is not None
    return (
        isinstance(node, ast.If) and re.search(r"os\.name|sys\.platform|hasattr\(", ast.unparse(node.test)) is not None
    )


def posix_uses(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what runs at import below a node and exists on POSIX systems only, unless it is guarded."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((line, module) for line, module in imports_of(node) if module in POSIX_ONLY_MODULES)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in POSIX_ONLY_NAMES:
        yield node.lineno, ast.unparse(node)
    elif is_portable_guard(node):
        return
    run_later = node.body if isinstance(node, FUNCTIONS) else [getattr(node, "body", None)]
    for child in ast.iter_child_nodes(node):
        if child not in run_later:
            yield from posix_uses(child)


@rule(
    bad=(
        "import fcntl\n",
        "from resource import getrusage\n",
        "if x:\n    import pwd\n",
        "SIGNALS = (signal.SIGTERM, signal.SIGUSR1)\n",
        "def f(number=signal.SIGUSR1):\n    pass\n",
        "class A:\n    import fcntl\n",
        "try:\n    import fcntl\nexcept ValueError:\n    pass\n",
    ),
    good=(
        "def f():\n    import fcntl\n",
        "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n",
        "if os.name == 'posix':\n    import fcntl\n",
        "STOP = getattr(signal, 'SIGUSR1', None)\n",
        "HANDLE = lambda: signal.SIGUSR1\n",
    ),
)
def nothing_posix_only_at_import(source: str) -> list[str]:
    """Importing a script works on Windows: what only POSIX has is used in functions or behind a guard."""
    return [f"line {line}: {name} is missing on Windows" for line, name in posix_uses(parsed(source))]


# ---------------------------------------------------------------------------------------------------------------------
# Rules: shared regions
# ---------------------------------------------------------------------------------------------------------------------


@rule(
    bad=(
        "# region shared: a\n",
        "# endregion shared: a\n",
        "# region shared: a\n# endregion shared: b\n",
        "# region shared: a\n# region shared: b\n# endregion shared: b\n# endregion shared: a\n",
        "# region shared: a\n# endregion shared: a\n# region shared: a\n# endregion shared: a\n",
        "def f():\n    # region shared: a\n    x = 1\n# endregion shared: a\n",
        "def f():\n# region shared: a\n    x = 1\n# endregion shared: a\n",
        "#region shared: a\n",
        "# region Shared a\n",
    ),
    good=(
        "# region shared: flow-matching\nx = 1\n# endregion shared: flow-matching\n",
        "# a region of the image\nTEXT = '''\n# region shared: a\n'''\n",
    ),
)
def regions_are_balanced(source: str) -> list[str]:
    """Region markers stand at column 0 between top-level statements, in pairs, not nested, each name once."""
    violations: list[str] = []
    statements = parsed(source).body
    open_name, seen = None, set()
    for line, column, text in comments_of(source):
        if not re.match(r"#\s*(end)?region\b", text, re.IGNORECASE):
            continue
        match = re.fullmatch(r"# (end)?region shared: ([a-z0-9-]+)", text)
        inside = any(statement.lineno <= line <= statement.end_lineno for statement in statements)
        if match is None or column or inside:
            violations.append(f"line {line}: not a marker at column 0 between top-level statements: {text}")
        elif match[1] is None:
            if open_name is not None or match[2] in seen:
                violations.append(f"line {line}: {match[2]} opens inside {open_name} or for the second time")
            open_name = match[2]
            seen.add(open_name)
        else:
            if match[2] != open_name:
                violations.append(f"line {line}: {match[2]} ends where {open_name} is open")
            open_name = None
    return violations + ([f"{open_name} is never ended"] if open_name is not None else [])


# ---------------------------------------------------------------------------------------------------------------------
# The rules, on the scripts and on their own snippets
# ---------------------------------------------------------------------------------------------------------------------


def test_both_scripts_are_there():
    assert existing_scripts() == [TEXT_TO_IMAGE, IMAGE_TO_IMAGE]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("script", existing_scripts())
def test_the_script_obeys_the_rule(script: str, name: str):
    assert RULES[name].check(read_script(script)) == []


@pytest.mark.parametrize(("name", "snippet"), [(name, bad) for name, rule in RULES.items() for bad in rule.bad])
def test_the_rule_catches_what_breaks_it(name: str, snippet: str):
    assert RULES[name].check(snippet)


@pytest.mark.parametrize(("name", "snippet"), [(name, good) for name, rule in RULES.items() for good in rule.good])
def test_the_rule_lets_pass_what_keeps_it(name: str, snippet: str):
    assert RULES[name].check(snippet) == []


@pytest.mark.parametrize("script", existing_scripts())
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_a_mutation_changes_stands_in_the_script(script: str, name: str):
    """Else the learning tests, which must fail on each, would be without it."""
    assert read_script(script).count(MUTATIONS[name][0]) == 1


def test_blank_lines_comments_and_docstrings_are_not_code():
    source = '"""Text\n\nof a module."""\n\n# why\nx = 1  # how\n\n\ndef f():\n    """Do."""\n    return """a\nb"""\n'
    assert count_code_lines(source) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Ruff
# ---------------------------------------------------------------------------------------------------------------------


def run_ruff(*arguments: str, source: str | None = None) -> subprocess.CompletedProcess:
    """Run the installed ruff with the repository's settings."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", existing_scripts())
def test_ruff_finds_nothing_in_the_script(script: str):
    result = run_ruff("check", script)
    assert result.returncode == 0, result.stdout


def test_ruff_stops_at_a_complexity_of_fifteen():
    branches = "".join(f"    if x == {number}:\n        return {number}\n" for number in range(14))
    result = run_ruff("check", "--stdin-filename", TEXT_TO_IMAGE, "-", source=f"def f(x):\n{branches}    return x\n")
    assert result.returncode == 1
    assert "C901" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Running a script without torch
# ---------------------------------------------------------------------------------------------------------------------

# Run a script as `python SCRIPT ...` would and print its exit status and which packages were imported on the way.
WATCHED_RUN = """
import json, runpy, sys
sys.argv = sys.argv[1:]
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
heavy = {"torch", "numpy", "PIL", "accelerate", "diffusers", "transformers", "peft", "datasets", "huggingface_hub"}
print("\\n" + json.dumps([status, sorted(heavy & set(sys.modules))]))
"""

USAGE_ERRORS = {
    "an unknown flag": (["--no_such_flag", "1"], "--no_such_flag"),
    "an abbreviated flag": (["--resolu", "512"], "--resolu"),
    "a value that is no number": (["--rank", "many"], "--rank"),
    "a resolution that is no multiple of 16": (["--resolution", "500"], "--resolution"),
    "a precision that is refused": (["--mixed_precision", "fp16"], "--mixed_precision"),
    "an optimizer that does not exist": (["--optimizer", "adamax"], "--optimizer"),
}


@pytest.mark.parametrize("script", existing_scripts())
def test_the_script_alone_in_an_empty_folder_answers_help(script: str, tmp_path: Path):
    shutil.copy(ROOT / script, tmp_path)
    result = run_python(script, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--pretrained_model_name_or_path" in result.stdout


def seconds_of(script: str, *arguments: str) -> float:
    """Return how long a script takes to answer."""
    start = time.perf_counter()
    run_python(script, *arguments)
    return time.perf_counter() - start


@pytest.mark.parametrize("arguments", [("--help",), ("--no_such_flag",)])
@pytest.mark.parametrize("script", existing_scripts())
def test_help_and_usage_errors_answer_at_once(script: str, arguments: tuple[str, ...]):
    # What else the machine does makes a try slower, never faster: one below the limit shows that the script is.
    assert any(seconds_of(script, *arguments) < 1.5 for _ in range(5))


@pytest.mark.parametrize("case", USAGE_ERRORS)
@pytest.mark.parametrize("script", existing_scripts())
def test_a_usage_error_exits_with_2_names_the_flag_and_imports_nothing_heavy(script: str, case: str):
    arguments, named = USAGE_ERRORS[case]
    result = run_python("-c", WATCHED_RUN, script, *MINIMAL_ARGUMENTS, *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [2, []]
    assert named in result.stderr


@pytest.mark.parametrize("script", existing_scripts())
def test_help_names_every_declared_flag_and_imports_nothing_heavy(script: str):
    result = run_python("-c", WATCHED_RUN, script, "--help")
    assert json.loads(result.stdout.splitlines()[-1]) == [0, []]
    shown = set(re.findall(r"--(?:no-)?(\w+)", result.stdout))
    assert set(declared_flags(read_script(script))) - shown == set()


@pytest.mark.parametrize("script", existing_scripts())
def test_the_minimal_command_line_parses(script: str):
    assert load_arguments(script).parse_args([*MINIMAL_ARGUMENTS]).instance_data_dir == ["tests"]


# ---------------------------------------------------------------------------------------------------------------------
# The files around the scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", existing_scripts())
def test_the_flags_are_those_of_the_snapshot(script: str):
    remedy = "if this change is wanted: python tests/test_static.py --update"
    assert json.loads(SNAPSHOT.read_text()).get(script) == sorted(declared_flags(read_script(script))), remedy


def requirement_lines(path: Path) -> list[str]:
    """Return the requirements of a file, without comments and blank lines."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("script", existing_scripts())
def test_the_header_lists_what_the_requirements_file_lists(script: str):
    header = header_of(read_script(script))
    assert header["dependencies"] == requirement_lines(ROOT / "requirements_flux.txt")
    assert header["requires-python"] == ">=3.11"


def test_every_requirement_has_a_lower_bound():
    requirements = requirement_lines(ROOT / "requirements_flux.txt")
    assert len(requirements) >= 18
    assert [line for line in requirements if not re.fullmatch(r"[A-Za-z0-9_]+>=[0-9.]+", line)] == []


def labels_of(path: Path) -> dict[str, str]:
    """Return the labelled lines at the top of a configuration file: {"What": ..., "Measured": ...}."""
    labels: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"# ([A-Z][a-z]+): +(.*)", line)
        if match is not None:
            labels[match[1]] = match[2]
    return labels


def launch_line_of(path: Path) -> tuple[str, str, str]:
    """Return accelerate config, script and saved command line that a file's header says to launch."""
    words = shlex.split(labels_of(path)["Launch"])
    assert words[:3] == ["accelerate", "launch", "--config_file"] and words[-1].startswith("@")
    return words[3], words[-2], words[-1][1:]  # between config and script: options of the launcher


def is_measured_or_says_not(text: str) -> bool:
    """Say whether a header states numbers, or plainly that there are none."""
    return text == "not measured" or re.search(r"\d", text) is not None


def test_all_configuration_files_are_found():
    assert {path.stem for path in RUN_FILES} >= {"demo_cpu", "demo_edit_cpu", "dog", "klein", "style", "relighting"}
    assert {path.stem for path in ACCELERATE_FILES} >= {"cpu", "one_gpu", "multi_gpu", "fsdp2", "fsdp2_multi_node"}


@pytest.mark.parametrize("path", [*RUN_FILES, *ACCELERATE_FILES], ids=lambda path: path.name)
def test_a_configuration_says_what_it_is_what_it_costs_and_how_it_is_launched(path: Path):
    labels = labels_of(path)
    assert {"What", "Measured", "Launch"} <= set(labels)
    assert is_measured_or_says_not(labels["Measured"])
    config, script, run = launch_line_of(path)
    assert (ROOT / config).is_file() and (ROOT / run).is_file()
    assert script in existing_scripts()
    assert path.relative_to(ROOT).as_posix() in (config, run)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_a_saved_command_line_uses_flags_of_the_snapshot_each_once(path: Path):
    _, script, _ = launch_line_of(path)
    lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    flags = [words[0].removeprefix("--") for words in lines if words]
    assert "Data" in labels_of(path)
    assert set(flags) - set(json.loads(SNAPSHOT.read_text())[script]) == set()
    assert len(flags) == len(set(flags)) > 5


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_a_saved_command_line_parses_with_its_script(path: Path, tmp_path: Path, monkeypatch):
    _, script, _ = launch_line_of(path)
    words = shlex.split(path.read_text(), comments=True)
    arguments = load_arguments(script)
    monkeypatch.chdir(tmp_path)  # the folders that the command line names are made here, not in the project
    for flag in {"--instance_data_dir", "--cond_data_dir"} & set(words):
        (tmp_path / words[words.index(flag) + 1]).mkdir(parents=True)
    for image in (word for word in words if word.endswith(".png")):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).touch()
    (tmp_path / "tiny_flux2").mkdir(exist_ok=True)
    (tmp_path / "tiny_flux2" / "model_index.json").touch()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    args = arguments.parse_args([f"@{path}"])
    assert args.output_dir == words[words.index("--output_dir") + 1]
    assert args.pretrained_model_name_or_path == words[words.index("--pretrained_model_name_or_path") + 1]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/learning.md", []),
        ("docs/learning.md", ["learning"]),
        ("docs/memory.md", ["growth"]),
        ("tiny_flux2/README.md", ["tiny_flux2"]),
        ("docs/memory.md", ["step_cost"]),
        ("docs/memory.md", ["host_memory"]),
    ],
    ids=["measured", "learning", "growth", "tiny_flux2", "step_cost", "host_memory"],
)
def test_the_tables_of_the_readmes_are_those_that_the_benchmarks_give(page, words):
    table = run_python("benchmarks/table.py", *words)
    assert table.returncode == 0 and "not measured" not in table.stdout, table.stdout + table.stderr
    name = " ".join(["benchmarks/table.py", *words])
    shown = (ROOT / page).read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2]
    assert shown.partition(f"<!-- end of {name} -->")[0].strip() == table.stdout.strip()


def test_ci_runs_the_test_command():
    path = ROOT / ".ci" / "run"
    assert path.read_text().splitlines()[-1] == "make test"
    assert os.name != "posix" or os.access(path, os.X_OK)


# Written with brackets, so that this file does not hold what it looks for.
FOREIGN = (r"/wo[r]k/", r"/ro[o]t/", r"/tm[p]/[A-Za-z]+/", r"py[p]i\.", r"python[h]osted\.", r"--(extra-)?inde[x]-url")


def foreign_words(text: str) -> list[str]:
    """Return paths of one particular machine and hosts of package registries."""
    return [match[0] for pattern in FOREIGN for match in re.finditer(pattern, text)]


def text_files() -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            yield name, content.decode("utf-8", errors="replace")


def test_no_file_names_a_machine_or_a_registry():
    files = dict(text_files())
    assert "Makefile" in files
    assert {name: foreign_words(text) for name, text in files.items() if foreign_words(text)} == {}


@pytest.mark.parametrize("parts", [("/wo", "rk/data"), ("/ro", "ot/x"), ("/tm", "p/run/x"), ("https://py", "pi.org")])
def test_a_foreign_word_is_found(parts: tuple[str, str]):
    assert foreign_words("a " + "".join(parts))


def test_the_demo_photos_are_the_same_every_time(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for name in ("first", "second"):
        result = run_python("tools/draw_demo_photos.py", tmp_path / name)
        assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "first").iterdir())
    assert all(file.read_bytes() == (tmp_path / "second" / file.name).read_bytes() for file in files)
    photos, captions = ([file for file in files if file.suffix == suffix] for suffix in (".jpg", ".txt"))
    assert [photo.name for photo in photos] == [f"toy-{number}.jpg" for number in range(1, 6)]
    assert [file.stem for file in captions] == [photo.stem for photo in photos]
    assert all(file.read_text(encoding="utf-8").startswith("a photo of sks toy ") for file in captions)
    shapes, orientations = set(), []
    for photo in photos:
        with image.open(photo) as opened:
            shapes.add(opened.size)
            orientations.append(opened.getexif().get(0x0112, 1))
    assert len(shapes) == 5
    assert sorted(orientations) == [1, 1, 1, 1, 6]


def update_snapshot() -> None:
    """Write the flags of the scripts as they are now."""
    flags = {script: sorted(declared_flags(read_script(script))) for script in existing_scripts()}
    SNAPSHOT.write_text(json.dumps(flags, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_static.py --update")
    update_snapshot()

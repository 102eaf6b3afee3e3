"""Sets of settings in which every pair (or triple) of choices occurs together at least once."""

import itertools
import random

Choice = tuple[str, int]  # a factor's name and the number of one of its levels


def covered(row: dict[str, int], strength: int) -> set[tuple[Choice, ...]]:
    """The pairs (strength 2) or triples (3) of choices in a row."""
    return set(itertools.combinations(sorted(row.items()), strength))


def all_tuples(levels: dict[str, int], strength: int) -> set[tuple[Choice, ...]]:
    """Every pair or triple of choices that there is, for factors with so many levels."""
    return {
        choices
        for names in itertools.combinations(sorted(levels), strength)
        for choices in itertools.product(*([(name, level) for level in range(levels[name])] for name in names))
    }


def covering_rows(levels: dict[str, int], strength: int, seed: int = 0, tries: int = 300) -> list[dict[str, int]]:
    """Few rows that cover all pairs or triples, greedily: of some random rows the one that covers most of the rest."""
    rng, rows, left = random.Random(seed), [], all_tuples(levels, strength)
    while left:
        rest = sorted(left)
        candidates = [random_row(levels, rng, rng.choice(rest)) for _ in range(tries)]
        best = max(candidates, key=lambda row: len(covered(row, strength) & left))
        rows.append(best)
        left -= covered(best, strength)
    return rows


def random_row(levels: dict[str, int], rng: random.Random, choices: tuple[Choice, ...]) -> dict[str, int]:
    """A random row with these choices in it."""
    return {**{name: rng.randrange(count) for name, count in levels.items()}, **dict(choices)}

"""Slips of the tongue: phrasings with a word left out, added or misplaced, for training.

A model that has heard a fact only in well-formed phrasings learns those by heart and fails on a new one of
the same words. The operations are those of Wei and Zou (EDA, 2019), without synonyms.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def draw_template(templates: Sequence[str], slip_share: float, rng: random.Random) -> str:
    """One of the templates, in ``slip_share`` of the draws with a slip."""
    template = rng.choice(templates)
    if slip_share > 0 and rng.random() < slip_share:
        return with_slip(template, templates, rng)
    return template


def with_slip(template: str, others: Sequence[str], rng: random.Random) -> str:
    """``template`` with one word less, one more (out of ``others``) or two neighbours exchanged.

    Subject and value stay, in their order: which is which may hang on nothing else.
    """
    body = template.rstrip(".?")
    end = template[len(body) :]
    words = body.split(" ")
    plain = [number for number, word in enumerate(words) if _is_plain(word)]
    match rng.randrange(3):
        case 0 if plain:
            del words[rng.choice(plain)]
        case 1:
            added = [word for word in rng.choice(others).rstrip(".?").split(" ") if _is_plain(word)]
            if added:
                words.insert(rng.randint(0, len(words)), rng.choice(added))
        case _:
            pairs = [at for at in range(len(words) - 1) if _is_plain(words[at]) or _is_plain(words[at + 1])]
            if pairs:
                at = rng.choice(pairs)
                words[at : at + 2] = reversed(words[at : at + 2])
    return " ".join(words) + end


def _is_plain(word: str) -> bool:
    return "{" not in word

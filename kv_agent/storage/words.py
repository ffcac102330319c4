"""Text as words: what a text search compares, the same for what is stored and for what is asked.

Everything that is neither letter nor digit separates words; case and diacritics do not count. Scripts that
are written without spaces (Chinese, Japanese, Thai, ...) give one word per character, and a query asks for
each pair of neighbours, so that a word is found inside its sentence. Korean is treated likewise, because
its particles stick to words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

# Thai, Lao, Myanmar, Khmer; hiragana, katakana; Han; Hangul. Their digits and punctuation are not in it.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ecd\u1000-\u103f\u1050-\u108f\u1780-\u17d3"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\uac00-\ud7a3"
)
_INDIC = "\u0900-\u0963\u0966-\u0dff"  # their vowel signs are no letters to Python, but part of words
_RUNS = re.compile(rf"([{_UNSPACED}]+)|((?:[^\W_{_UNSPACED}]|[{_INDIC}])+)")
_ASCII_RUNS = re.compile(r"()([a-z0-9]+)")


def words(text: str) -> list[str]:
    """The words of a text in order; each is ASCII letters and digits, and any characters beyond ASCII."""
    found: list[str] = []
    for unspaced, word in _runs(text):
        if unspaced:
            found.extend(unspaced)
        else:
            found.append(word)
    return found


def query_terms(text: str) -> list[str]:
    """The distinct words to look for, in order; one with a space in it is two neighbouring words."""
    terms: dict[str, None] = {}
    for unspaced, word in _runs(text):
        if len(unspaced) > 1:
            terms.update(dict.fromkeys(map(" ".join, pairwise(unspaced))))
        else:
            terms[unspaced or word] = None
    return list(terms)


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """(characters without spaces, "") or ("", word)."""
    matches = _ASCII_RUNS.finditer(text.lower()) if text.isascii() else _RUNS.finditer(_folded(text))
    return ((match[1] or "", match[2] or "") for match in matches)


def _folded(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).casefold()
    kept = (letter for letter in letters if letter.isascii() or not _is_diacritic(letter))
    return unicodedata.normalize("NFC", "".join(kept))  # kana and Hangul are whole again


def _is_diacritic(letter: str) -> bool:
    """Accents, and the vowel points of Hebrew and Arabic; not the vowels of Indic and Thai."""
    combining = unicodedata.combining(letter)
    return 10 <= combining < 40 or combining >= 200

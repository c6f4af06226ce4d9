# SPDX-License-Identifier: Apache-2.0
"""Counts sentences in a reply. In doubt it counts one more: lines, headings and items of a list are pieces as well."""

import re

MARK = r"[.!?]+[\"'”’)\]*_]*"
END = re.compile(MARK + r"(?=\s|$)")
NO_END = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "approx", "e.g", "i.e"}


def sentences(text: str) -> list[str]:
    """The pieces of a text: up to each mark that ends a sentence, and to the end of each line, whatever it is."""
    pieces = []
    for line in text.splitlines():
        start = 0
        for mark in END.finditer(line):
            if not _goes_on(line[start : mark.start()], line[mark.end() :].lstrip()):
                pieces.append(line[start : mark.end()].strip())
                start = mark.end()
        pieces.append(line[start:].strip())
    return [piece for piece in pieces if re.search(r"\w", piece)]


def _goes_on(head: str, tail: str) -> bool:
    """Whether the full stop between head and tail ends no sentence: `1. Boil`, `Dr. Rao`, `John F. Rao`, `etc. and`."""
    words = head.split()
    if not words or not tail:
        return False
    last = words[-1].lstrip("(\"'*")
    number = len(words) == 1 and re.fullmatch(r"\d+|[a-zA-Z]", last)
    initial = re.fullmatch(r"[A-Z]", last) and len(words) > 1 and words[-2][0].isupper()
    return bool(number or initial or last.lower() in NO_END or tail[0].islower())


def is_sentence(piece: str) -> bool:
    """Three words or more, with a mark at the end that ends a sentence."""
    return len(piece.split()) >= 3 and bool(re.search(MARK + "$", piece))


def is_one_sentence(text: str) -> bool:
    """Exactly one piece, and it is a sentence."""
    pieces = sentences(text)
    return len(pieces) == 1 and is_sentence(pieces[0])


def is_degenerate(text: str) -> bool:
    """Fewer than three words, or at least half of its runs of four words stand there already."""
    words = text.lower().split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(words) < 3 or bool(runs) and 2 * len(set(runs)) <= len(runs)

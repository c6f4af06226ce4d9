# SPDX-License-Identifier: Apache-2.0
"""The eight pairs and eight completions of `trl_*.json`, conversational; lengths differ within every batch of two.

Some prompts have a system turn, some an earlier exchange; rejected is now longer, now shorter than chosen.
"""


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _user(content: str, *earlier: dict[str, str]) -> list[dict[str, str]]:
    return [*earlier, _turn("user", content)]


_TERSE = _turn("system", "Be terse.")
_EARLIER = (_turn("user", "Hi."), _turn("assistant", "Hello."))

_ROWS: list[tuple[list[dict[str, str]], str, str]] = [  # prompt, chosen, rejected
    (_user("What is 2 + 3?"), "It is 5.", "I do not know, maybe 6?"),
    (_user("Name a colour of the sky.", _TERSE), "Blue, on a clear day.", "Green."),
    (_user("Is water wet?"), "Yes.", "No, it is dry."),
    (_user("And what is 7 - 4?", *_EARLIER), "The result is 3.", "4"),
    (_user("Say the days of a weekend, please."), "Saturday and Sunday.", "Monday, Tuesday and so on."),
    (_user("Who?"), "I am a tiny model, made for tests.", "Nobody."),
    (_user("Where is the sun at noon?", _TERSE, *_EARLIER), "High.", "Under the sea, I think."),
    (_user("Café or tea?"), "Tea, thanks.", "Café."),
]

PAIRS = [{"prompt": p, "chosen": [_turn("assistant", c)], "rejected": [_turn("assistant", r)]} for p, c, r in _ROWS]
COMPLETIONS = [{"prompt": p, "completion": [_turn("assistant", c)]} for p, c, _ in _ROWS]
# Batches of two with both good, both bad, one of each; the second half has every prompt's other completion.
_GOOD = (True, True, False, True, True, False, False, False)
UNPAIRED = [
    {"prompt": p, "completion": [_turn("assistant", c if good else r)], "label": good}
    for goods in (_GOOD, [not good for good in _GOOD])
    for (p, c, r), good in zip(_ROWS, goods, strict=True)
]

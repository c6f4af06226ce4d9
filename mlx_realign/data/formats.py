# SPDX-License-Identifier: Apache-2.0
"""JSON rows -> one shape, `Row`: a prompt and its completions, as text or as messages.

Every row is judged on its own, so a file may mix formats. What is wrong with a row is a `RowError` whose text names
the field, what was found and what was expected; the caller adds the file and the line.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
Content = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip


class RowError(ValueError):
    """Why one row cannot be used. The caller says where it stands."""


class Row(NamedTuple):
    """One row in the form the tokeniser takes. Strings stay strings until it is known whether there is a template."""

    prompt: Content  # "" for plain text
    completions: tuple[Content, ...]
    system: str | None = None
    text: bool = False  # plain text: never templated, trained from its first token on
    options: dict[str, Any] = {}  # what the template is given: tools, chat_template_kwargs
    extras: dict[str, Any] = {}  # numbers that a method may use


def parse(row: Any, format: str) -> Row:
    """Read one JSON row as `format` ("sft", "pairs", "unpaired"); RowError says what is wrong with it."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {_kind(row)}")
    for keys, read in FORMATS[format]:
        if all(key in row for key in keys):
            return read(row)._replace(options=_options(row))
    raise RowError(_wrong_keys(row, format))


def as_messages(row: Row) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and completions as messages: a string prompt is the user's, a string completion the assistant's."""
    prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    if row.system is not None:
        prompt = [{"role": "system", "content": row.system}, *prompt]
    return prompt, [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in row.completions]


def is_conversation(row: Row) -> bool:
    """Whether the row itself has messages, and so needs a chat template."""
    return isinstance(row.prompt, list) or any(isinstance(c, list) for c in row.completions)


# Readers: one per schema. ------------------------------------------------------------------------------------------


def _read_messages(row: dict) -> Row:
    return _conversation(_messages(row["messages"], "messages"), "messages")


def _read_sharegpt(row: dict) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(f"'conversations' must be a list of turns, found {_kind(turns)}")
    messages = []
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and "from" in turn and "value" in turn:
            role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
            if role is None:
                known = ", ".join(SHAREGPT_ROLES)
                raise RowError(f"'conversations[{i}].from' is {turn['from']!r}, expected one of {known}")
            rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
            messages.append({"role": role, "content": turn["value"], **rest})
        else:
            messages.append(turn)
    return _conversation(_messages(messages, "conversations"), "conversations", _system(row))


def _read_instruction(row: dict, prompt_key: str = "instruction", output_keys: Sequence[str] = ("output", "response")):
    output_key = next(key for key in output_keys if key in row)
    prompt = _text(row[prompt_key], prompt_key)
    if row.get("input") is not None and not isinstance(row["input"], str):
        raise RowError(f"'input' must be a string, found {_kind(row['input'])}")
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return Row(prompt, (_text(row[output_key], output_key),), _system(row))


def _read_completion(row: dict) -> Row:
    key = "completion" if "completion" in row else "response"
    prompt = _prompt(row["prompt"])
    return Row(prompt, (_completion(row[key], key),), _system(row, prompt))


def _read_text(row: dict) -> Row:
    return Row("", (_text(row["text"], "text"),), text=True)


def _read_pair(row: dict) -> Row:
    rejected = _rejected(row)
    prompt, chosen = row["prompt"], row["chosen"]
    if _repeats_prompt(prompt, [chosen, *rejected]):  # the prompt again as the first messages of each completion
        return _read_full_pair(row)
    prompt = _prompt(prompt)
    names = ["chosen", *_rejected_names(row)]
    completions = tuple(_completion(c, name) for c, name in zip([chosen, *rejected], names, strict=True))
    _differ(completions, names)
    return Row(prompt, completions, _system(row, prompt), extras=_pair_extras(row, len(rejected)))


def _read_full_pair(row: dict) -> Row:
    """Chosen and rejected are whole conversations: what they share, up to an assistant's turn, is the prompt."""
    names = ["chosen", *_rejected_names(row)]
    talks = []
    for value, name in zip([row["chosen"], *_rejected(row)], names, strict=True):
        talks.append(_messages(_transcript(value, name) if isinstance(value, str) else value, name))
    _differ(talks, names)
    shared = 0
    while all(len(talk) > shared and talk[shared] == talks[0][shared] for talk in talks):
        shared += 1
    starts = [n for n in range(shared + 1) if all(len(t) > n and t[n]["role"] == "assistant" for t in talks)]
    if not starts or starts[-1] == 0:
        raise RowError(
            "chosen and rejected are whole conversations that share no prompt: their first messages must be the same "
            "and end before an assistant message"
        )
    completions = tuple(_trained(talk[starts[-1] :], name) for talk, name in zip(talks, names, strict=True))
    prompt = talks[0][: starts[-1]]
    return Row(prompt, completions, _system(row, prompt), extras=_pair_extras(row, len(talks) - 1))


def _read_unpaired(row: dict) -> Row:
    if not isinstance(row["label"], bool):
        raise RowError(f"'label' must be true or false, found {_kind(row['label'])}")
    return _read_completion(row)._replace(extras={"label": row["label"]})


Reader = Callable[[dict], Row]
FORMATS: dict[str, list[tuple[tuple[str, ...], Reader]]] = {
    "sft": [
        (("messages",), _read_messages),
        (("conversations",), _read_sharegpt),
        (("instruction", "output"), _read_instruction),
        (("instruction", "response"), _read_instruction),
        (("prompt", "completion"), _read_completion),
        (("prompt", "response"), _read_completion),
        (("problem", "solution"), lambda row: _read_instruction(row, "problem", ("solution",))),
        (("question", "answer"), lambda row: _read_instruction(row, "question", ("answer",))),
        (("text",), _read_text),
    ],
    "pairs": [
        (("prompt", "chosen", "rejected"), _read_pair),
        (("chosen", "rejected"), _read_full_pair),
    ],
    "unpaired": [
        (("prompt", "completion", "label"), _read_unpaired),
        (("prompt", "response", "label"), _read_unpaired),
    ],
}

# Pieces. -----------------------------------------------------------------------------------------------------------


def _conversation(messages: list[Message], name: str, system: str | None = None) -> Row:
    """Split at the first assistant turn that has something before it; an opening one can only be context."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise RowError(f"'{name}' has no assistant message: there is nothing to train on")
    if turns[0] == 0 and system is None:
        turns = turns[1:]
    if not turns:
        raise RowError(f"'{name}' begins with its only assistant message: there is no prompt before it")
    return Row(messages[: turns[0]], (_trained(messages[turns[0] :], name),), system)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f"'{name}' must be a list of messages, found {_kind(value)}")
    if not value:
        raise RowError(f"'{name}' has no messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise RowError(f"'{name}' must be an object with role and content, found {_kind(message)}")
    if message["role"] not in ROLES:
        raise RowError(f"'{name}.role' is {message['role']!r}, expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = _parts(content, name)
        message = {**message, "content": content}
    if isinstance(content, str):
        empty = not content.strip()
    elif content is None:
        empty = True
    else:
        raise RowError(f"'{name}.content' must be a string, found {_kind(content)}")
    if empty and message["role"] == "assistant" and not message.get("tool_calls"):
        raise RowError(f"'{name}.content' is empty: an assistant message must say something")
    if empty and content is None and message["role"] != "assistant":
        raise RowError(f"'{name}.content' is missing")
    return message


def _parts(parts: list, name: str) -> str:
    """Content as typed parts (OpenAI's way): text parts are joined, anything else is refused."""
    for i, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"'{name}.content[{i}]' is not a text part; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _prompt(value: Any) -> Content:
    if isinstance(value, str):
        return _text(value, "prompt")
    if not isinstance(value, list):
        raise RowError(f"'prompt' must be a string or a list of messages, found {_kind(value)}")
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise RowError("'prompt' ends with an assistant message; move that message into the completion")
    return messages


def _completion(value: Any, name: str) -> Content:
    if isinstance(value, str):
        return _text(value, name)
    if not isinstance(value, list):
        raise RowError(f"'{name}' must be a string or a list of messages, found {_kind(value)}")
    messages = _messages(value, name)
    if messages[0]["role"] != "assistant":
        raise RowError(f"'{name}[0].role' is {messages[0]['role']!r}: a completion must begin with the assistant")
    return _trained(messages, name)


def _trained(messages: list[Message], name: str) -> list[Message]:
    """The messages up to the last assistant turn that is trained (a turn with `"weight": 0` is not)."""
    last = max((i for i, m in enumerate(messages) if is_trained(m)), default=None)
    if last is None:
        raise RowError(f"'{name}' has no assistant message with a weight above 0: there is nothing to train on")
    return messages[: last + 1]


def is_trained(message: Message) -> bool:
    """Whether a message is the assistant's and not switched off by `"weight": 0`."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"'{name}' must be a string, found {_kind(value)}")
    if not value.strip():
        raise RowError(f"'{name}' is empty")
    return value


def _system(row: dict, prompt: Content = "") -> str | None:
    system = row.get("system")
    if system is None or system == "":
        return None
    if not isinstance(system, str):
        raise RowError(f"'system' must be a string, found {_kind(system)}")
    if isinstance(prompt, list) and prompt[0]["role"] == "system":
        raise RowError("both 'system' and a system message in 'prompt' are given; keep one")
    return system


def _rejected(row: dict) -> list:
    """`rejected` is one completion, or a list of them: strings, or lists of messages."""
    value = row["rejected"]
    several = isinstance(value, list) and value and not isinstance(value[0], dict)
    return value if several else [value]


def _rejected_names(row: dict) -> list[str]:
    count = len(_rejected(row))
    return ["rejected"] if count == 1 else [f"rejected[{i}]" for i in range(count)]


def _repeats_prompt(prompt: Any, completions: list) -> bool:
    """UltraFeedback's way: `chosen` holds the whole conversation although `prompt` is given as well."""
    if not all(isinstance(c, list) and c and isinstance(c[0], dict) and "role" in c[0] for c in completions):
        return False
    return all(c[0]["role"] != "assistant" for c in completions) and isinstance(prompt, str | list)


def _differ(completions: Iterable[Any], names: list[str]) -> None:
    chosen, *rejected = completions
    for value, name in zip(rejected, names[1:], strict=True):
        if value == chosen:
            raise RowError(f"chosen and {name} are the same: the pair says nothing")


def _transcript(text: str, name: str) -> list[Message]:
    """A conversation written as text, "\\n\\nHuman: ... \\n\\nAssistant: ..." (the hh-rlhf way)."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip():
        raise RowError(
            f"there is no 'prompt', and '{name}' is a string that is not a 'Human: ... Assistant: ...' transcript; "
            "add 'prompt', or give chosen and rejected as lists of messages"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in pairs]


def _pair_extras(row: dict, rejected: int) -> dict[str, Any]:
    """chosen_score, rejected_score and margin -> {"scores": [chosen, rejected ...], "margin": float}, when given."""
    extras: dict[str, Any] = {}
    chosen = row.get("chosen_score", row.get("score_chosen"))
    others = row.get("rejected_score", row.get("score_rejected"))
    if chosen is not None and others is not None:
        others = others if isinstance(others, list) else [others]
        if len(others) != rejected:
            raise RowError(f"'rejected_score' has {len(others)} numbers for {rejected} rejected completions")
        names = ["chosen_score", *["rejected_score"] * rejected]
        extras["scores"] = [_number(value, name) for value, name in zip([chosen, *others], names, strict=True)]
    if row.get("margin") is not None:
        extras["margin"] = _number(row["margin"], "margin")
    return extras


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"'{name}' must be a finite number, found {_kind(value)}")
    return float(value)


def _options(row: dict) -> dict[str, Any]:
    """What the chat template is given beside the messages: tools and chat_template_kwargs."""
    options = {}
    if row.get("tools"):
        tools = row["tools"]
        try:
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        except ValueError:
            raise RowError("'tools' is a string that is not JSON") from None
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(f"'chat_template_kwargs' must be an object, found {_kind(kwargs)}")
    return {**options, **(kwargs or {})}


def accepted(format: str) -> str:
    """The key sets a format accepts, in words."""
    return " or ".join("{" + ", ".join(keys) + "}" for keys, _ in FORMATS[format])


def _wrong_keys(row: dict, format: str) -> str:
    found = ", ".join(repr(key) for key in row) or "none"
    message = f"keys found: {found}; {format} data has {accepted(format)}"
    known = sorted({key for keys, _ in FORMATS[format] for key in keys})
    near = {key: difflib.get_close_matches(key, known, 1, 0.7) for key in row if key not in known}
    hints = [f"{match[0]!r} instead of {key!r}" for key, match in near.items() if match]
    others = [name for name, schemas in FORMATS.items() if any(all(k in row for k in keys) for keys, _ in schemas)]
    if hints:
        return f"{message}; did you mean {', '.join(hints)}?"
    return f"{message}; this row is {' or '.join(others)} data" if others else message


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}  # fmt: skip
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} ({value})" if isinstance(value, bool | int | float) else kind

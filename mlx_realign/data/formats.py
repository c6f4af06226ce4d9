# SPDX-License-Identifier: Apache-2.0
"""JSON rows -> one shape, `Row`: a prompt and its completions, as text or as messages.

Every row is judged on its own, so a file may mix formats. What is wrong with a row is a `RowError` whose text names
the field, what was found and what was expected; the caller adds the file and the line.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .groups import KEYS, read_group
from .messages import (
    RESERVED_OPTIONS,
    SHAREGPT_ROLES,
    Content,
    Message,
    Row,
    RowError,
    check_messages,
    check_number,
    check_prompt,
    check_system,
    check_text,
    check_texts,
    kind_of,
    read_transcript,
    up_to_trained,
)


def parse(row: Any, format: str) -> Row:
    """Read one JSON row as `format` ("sft", "pairs", "unpaired", "groups"); RowError says what is wrong with it."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {kind_of(row)}")
    for keys, read in FORMATS[format]:
        if all(key in row for key in keys):
            for key in _READ[format] & row.keys():
                check_texts(row[key], key)
            return read(row)._replace(options=_options(row), metadata=_metadata(row))
    raise RowError(_wrong_keys(row, format))


def fits(row: dict[str, Any], format: str) -> bool:
    """Whether a row has the keys of a format. Of groups, only with responses: a prompt alone stands in many rows."""
    schemas = [keys for keys, _ in FORMATS[format] if format != "groups" or "responses" in keys]
    return any(all(key in row for key in keys) for keys in schemas)


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
    messages = check_messages(row["messages"], "messages")
    return _conversation(messages, "messages", check_system(row, messages))


def _read_sharegpt(row: dict) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(f"'conversations' must be a list of turns, found {kind_of(turns)}")
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
    messages = check_messages(messages, "conversations")
    return _conversation(messages, "conversations", check_system(row, messages))


def _read_instruction(row: dict, prompt_key: str = "instruction", output_keys: Sequence[str] = ("output", "response")):
    output_key = next(key for key in output_keys if key in row)
    prompt = check_text(row[prompt_key], prompt_key)
    if row.get("input") is not None and not isinstance(row["input"], str):
        raise RowError(f"'input' must be a string, found {kind_of(row['input'])}")
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return Row(prompt, (check_text(row[output_key], output_key),), check_system(row))


def _read_completion(row: dict) -> Row:
    key = "completion" if "completion" in row else "response"
    prompt = check_prompt(row["prompt"])
    return Row(prompt, (_completion(row[key], key),), check_system(row, prompt))


def _read_text(row: dict) -> Row:
    return Row("", (check_text(row["text"], "text"),), text=True)


def _read_pair(row: dict) -> Row:
    rejected = _rejected(row)
    prompt, chosen = row["prompt"], row["chosen"]
    if _repeats_prompt(prompt, [chosen, *rejected]):  # the prompt again as the first messages of each completion
        whole = _read_full_pair(row)
        said = [message.get("content") for message in whole.prompt if isinstance(message, dict)]
        if prompt not in said if isinstance(prompt, str) else prompt != whole.prompt[: len(prompt)]:
            raise RowError("'prompt' is not what the conversations in chosen and rejected begin with")
        return whole
    prompt = check_prompt(prompt)
    names = ["chosen", *_rejected_names(row)]
    completions = tuple(_completion(c, name) for c, name in zip([chosen, *rejected], names, strict=True))
    _differ(completions, names)
    return Row(prompt, completions, check_system(row, prompt), extras=_pair_extras(row, len(rejected)))


def _read_full_pair(row: dict) -> Row:
    """Chosen and rejected are whole conversations: what they share, up to an assistant's turn, is the prompt."""
    names = ["chosen", *_rejected_names(row)]
    talks = []
    for value, name in zip([row["chosen"], *_rejected(row)], names, strict=True):
        talks.append(check_messages(read_transcript(value, name) if isinstance(value, str) else value, name))
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
    completions = tuple(_completion(talk[starts[-1] :], name) for talk, name in zip(talks, names, strict=True))
    _differ(completions, names)
    prompt = talks[0][: starts[-1]]
    return Row(prompt, completions, check_system(row, prompt), extras=_pair_extras(row, len(talks) - 1))


def _read_unpaired(row: dict) -> Row:
    if not isinstance(row["label"], bool):
        raise RowError(f"'label' must be true or false, found {kind_of(row['label'])}")
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
    "groups": [(keys, read_group) for keys in KEYS],
}

# Columns whose texts reach a tokenizer; others are handed on as they are.
_READ = {format: {key for keys, _ in schemas for key in keys} for format, schemas in FORMATS.items()}
_READ["groups"] -= {"solution", "answer"}
_READ = {format: keys | {"system", "input", "tools", "chat_template_kwargs"} for format, keys in _READ.items()}

# Groups with responses, by method; `data convert` makes rows of other formats of them.
GROUPS = {"grpo": ("prompt", "responses"), "rlvr": ("problem", "solution", "responses")}

# Pieces. -----------------------------------------------------------------------------------------------------------


def _conversation(messages: list[Message], name: str, system: str | None = None) -> Row:
    """Split at the first assistant turn that has something before it; an opening one can only be context."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise RowError(f"'{name}' has no assistant message: there is nothing to train on")
    opening = turns[0] == 0 and system is None
    if opening and len(turns) == 1:
        raise RowError(f"'{name}' begins with its only assistant message: there is no prompt before it")
    first = turns[int(opening)]
    completion = up_to_trained(messages[first:], name)
    skipped = {"turns_without_prompt": int(opening), "messages_unused": len(messages) - first - len(completion)}
    return Row(messages[:first], (completion,), system, skipped=skipped)


def _completion(value: Any, name: str) -> Content:
    if isinstance(value, str):
        return check_text(value, name)
    if not isinstance(value, list):
        raise RowError(f"'{name}' must be a string or a list of messages, found {kind_of(value)}")
    messages = check_messages(value, name)
    if messages[0]["role"] != "assistant":
        raise RowError(f"'{name}[0].role' is {messages[0]['role']!r}: a completion must begin with the assistant")
    if messages[-1]["role"] != "assistant":
        raise RowError(f"'{name}' ends with a {messages[-1]['role']!r} message: it must end with the assistant")
    return up_to_trained(messages, name)


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
    chosen, *rejected = ([{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions)
    for value, name in zip(rejected, names[1:], strict=True):
        if value == chosen:
            raise RowError(f"chosen and {name} are the same: the pair says nothing")


def _pair_extras(row: dict, rejected: int) -> dict[str, Any]:
    """chosen_score, rejected_score, margin and tie -> scores [chosen, rejected ...], margin, tie (1.0), when given.

    A pair with equal scores is a tie as well, unless it says `"tie": false`.
    """
    extras: dict[str, Any] = {}
    chosen = row.get("chosen_score", row.get("score_chosen"))
    others = row.get("rejected_score", row.get("score_rejected"))
    if chosen is not None and others is not None:
        others = others if isinstance(others, list) else [others]
        if len(others) != rejected:
            raise RowError(f"'rejected_score' has {len(others)} numbers for {rejected} rejected completions")
        names = ["chosen_score", *["rejected_score"] * rejected]
        extras["scores"] = [check_number(value, name) for value, name in zip([chosen, *others], names, strict=True)]
    if row.get("margin") is not None:
        extras["margin"] = check_number(row["margin"], "margin")
    tie, scores = row.get("tie"), extras.get("scores", [])
    if tie is not None and not isinstance(tie, bool):
        raise RowError(f"'tie' must be true or false, found {kind_of(tie)}")
    if tie or (tie is None and len(scores) == 2 and scores[0] == scores[1]):
        extras["tie"] = 1.0
    return extras


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
        raise RowError(f"'chat_template_kwargs' must be an object, found {kind_of(kwargs)}")
    for key in kwargs or {}:
        if key in RESERVED_OPTIONS:
            raise RowError(f"'chat_template_kwargs.{key}' is not a row's to set; it may hold values the template reads")
    return {**options, **(kwargs or {})}


def _metadata(row: dict) -> dict[str, Any]:
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        return {}
    score = metadata.get("quality_score", 0)
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise RowError(f"'metadata.quality_score' must be a number from 0 to 1, found {score!r}")
    return metadata


def accepted(format: str) -> str:
    """The key sets a format accepts, in words."""
    return " or ".join("{" + ", ".join(keys) + "}" for keys, _ in FORMATS[format])


def _wrong_keys(row: dict, format: str) -> str:
    found = ", ".join(repr(key) for key in row) or "none"
    message = f"keys found: {found}; {format} data has {accepted(format)}"
    if command := _conversion(row, format):
        return f"{message}; {command}"
    known = sorted({key for keys, _ in FORMATS[format] for key in keys})
    near = {key: difflib.get_close_matches(key, known, 1, 0.7) for key in row if key not in known}
    hints = [f"{match[0]!r} instead of {key!r}" for key, match in near.items() if match]
    others = [name for name in FORMATS if fits(row, name)]
    if hints and "groups" not in others:
        return f"{message}; did you mean {', '.join(hints)}?"
    return f"{message}; this row is {' or '.join(others)} data" if others else message


def _conversion(row: dict, format: str) -> str | None:
    """What such a row is, and the command that makes rows of this format of it."""
    to = {"pairs": "dpo", "unpaired": "kto"}.get(format)
    kinds = {"rlvr": "a verified group", "grpo": "a scored group", "dpo": "pairs data"}
    keys = {**GROUPS, "dpo": ("chosen", "rejected")}
    found = next((kind for kind in kinds if kind != to and all(key in row for key in keys[kind])), None)
    if to is None or found is None:
        return None
    command = f"mlx-realign data convert FILE --from {found} --to {to} --output OUT"
    return f"this row is {kinds[found]}; `{command}` makes {format} data of it"

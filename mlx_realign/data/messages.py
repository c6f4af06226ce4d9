# SPDX-License-Identifier: Apache-2.0
"""The shape of a row and its checked pieces. What is wrong with one is a RowError that names the field."""

import re
import sys
from typing import Any, NamedTuple

from ..errors import shortened

Message = dict[str, Any]
Content = str | list[Message]

# Values of chat_template_kwargs that templates of known families read. Others are handed on to a template that reads
# them, and none of RESERVED: these are arguments of the call, or what the template library itself gives a template.
KNOWN_OPTIONS = frozenset(
    "tools documents enable_thinking thinking thinking_mode thinking_budget reasoning reasoning_effort "
    "preserve_thinking clear_thinking custom_instructions xml_tools python_tools builtin_tools model_identity "
    "date_string tools_in_user_message citation_mode".split()
)
RESERVED_OPTIONS = frozenset(
    "conversation conversations messages chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs processor_kwargs bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
    "additional_special_tokens raise_exception strftime_now namespace range dict cycler joiner lipsum self".split()
)
DEEPEST = 100  # lists and objects in one another
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip


class RowError(ValueError):
    """Why one row cannot be used; the caller says where it stands. What it quotes is cut where it is long."""

    def __init__(self, reason: str) -> None:
        super().__init__(shortened(reason))


class Row(NamedTuple):
    """One row in the form the tokeniser takes. Strings stay strings until it is known whether there is a template."""

    prompt: Content  # "" for plain text
    completions: tuple[Content, ...]
    system: str | None = None
    text: bool = False  # plain text: never templated, trained from its first token on
    options: dict[str, Any] = {}  # what the template is given: tools, chat_template_kwargs
    extras: dict[str, Any] = {}  # what a method may use: scores, margin, label ...
    metadata: dict[str, Any] = {}  # what the row says of itself
    skipped: dict[str, int] = {}  # what of the row is not trained on, by reason
    group: str = ""  # of a group, how it is judged: "scored", "verified", or "open" (its responses are yet to come)


def check_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f"'{name}' must be a list of messages, found {kind_of(value)}")
    if not value:
        raise RowError(f"'{name}' has no messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise RowError(f"'{name}' must be an object with role and content, found {kind_of(message)}")
    if message["role"] not in ROLES:
        raise RowError(f"'{name}.role' is {message['role']!r}, expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = _parts(content, name)
        message = {**message, "content": content}
    if isinstance(content, str):
        empty = not check_unicode(content, f"{name}.content").strip()
    elif content is None:
        empty = True
    else:
        raise RowError(f"'{name}.content' must be a string, found {kind_of(content)}")
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


def up_to_trained(messages: list[Message], name: str) -> list[Message]:
    """The messages up to the last assistant turn that is trained (a turn with `"weight": 0` is not)."""
    last = max((i for i, m in enumerate(messages) if is_trained(m)), default=None)
    if last is None:
        raise RowError(f"'{name}' has no assistant message with a weight above 0: there is nothing to train on")
    return messages[: last + 1]


def is_trained(message: Message) -> bool:
    """Whether a message is the assistant's and not switched off by `"weight": 0`."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"'{name}' must be a string, found {kind_of(value)}")
    if not value.strip():
        raise RowError(f"'{name}' is empty")
    return check_unicode(value, name)


def check_unicode(value: str, name: str) -> str:
    """The text, or a RowError. JSON may hold half of a character that UTF-16 writes as two; no tokenizer takes that."""
    try:
        return value if value.isascii() or value.encode() else value
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise RowError(f"'{name}' holds {half}, half of a character, at position {error.start + 1}") from None


def check_texts(value: Any, name: str) -> None:
    """RowError where a text or a key anywhere in a JSON value holds half of a character, or it is nested too deeply."""
    rest = [(value, name, 0)]
    while rest:
        one, name, depth = rest.pop()
        if isinstance(one, str):
            check_unicode(one, name)
        elif isinstance(one, dict | list) and depth > DEEPEST:
            raise RowError(f"'{name[:100]}' is nested more than {DEEPEST} deep")
        elif isinstance(one, dict):
            for key in one:
                if isinstance(key, str):
                    check_unicode(key, f"a key of {name}")
            rest += [(part, f"{name}.{key}", depth + 1) for key, part in one.items() if not _is_plain(part)]
        elif isinstance(one, list | tuple):
            rest += [(part, f"{name}[{i}]", depth + 1) for i, part in enumerate(one) if not _is_plain(part)]


def _is_plain(value: Any) -> bool:
    """What holds no half of a character, seen at a glance."""
    return value.isascii() if isinstance(value, str) else not isinstance(value, dict | list | tuple)


def read_transcript(text: str, name: str) -> list[Message]:
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


def check_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RowError(f"'{name}' must be a finite number, found {kind_of(value)}")
    return float(value)


def kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}  # fmt: skip
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} ({value})" if isinstance(value, bool | int | float) else kind


def check_prompt(value: Any) -> Content:
    """A prompt: a string, or messages that do not end with the assistant's."""
    if isinstance(value, str):
        return check_text(value, "prompt")
    if not isinstance(value, list):
        raise RowError(f"'prompt' must be a string or a list of messages, found {kind_of(value)}")
    messages = check_messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise RowError("'prompt' ends with an assistant message; move that message into the completion")
    return messages


def check_system(row: dict[str, Any], prompt: Content = "") -> str | None:
    """The row's `system`, which must not stand beside a system message of the prompt."""
    system = row.get("system")
    if system is None or system == "":
        return None
    if not isinstance(system, str):
        raise RowError(f"'system' must be a string, found {kind_of(system)}")
    if isinstance(prompt, list) and prompt[0]["role"] == "system":
        raise RowError("both 'system' and a system message in 'prompt' are given; keep one")
    return system

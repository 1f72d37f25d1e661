"""Messages of a conversation, whatever form a data set has them in."""

from typing import Any

Prompt = str | list[dict[str, Any]]  # one user turn, or messages

_FORM = 'messages such as {"role": "user", "content": "What is 17 * 24?"}'
_SHAREGPT_FIELDS = {"from": "role", "value": "content"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def as_messages(value: Prompt | None, role: str | None) -> list[dict[str, Any]]:
    """Messages with words as their content, whatever form a data set has them in.

    Tables fill missing fields with `None`, which templates take for values, so these are left out. Content in parts is
    joined, and ShareGPT's `from` and `value` become `role` and `content`.

    Args:
        value (`str` or `list[dict]`, *optional*): a string, messages, or nothing.
        role (`str`, *optional*): who says a string; without, a string is refused.

    Raises:
        ValueError: if `value` is something else, or a message has no role, or holds more than text.
    """
    if value is None:
        return []
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.60} stands where {'a string or ' * (role is not None)}{_FORM} must be.")
    return [_as_message(turn) for turn in value]


def _as_message(turn: Any) -> dict[str, Any]:
    if turn is not None and not isinstance(turn, dict):
        raise ValueError(f"{turn!r:.60} stands among {_FORM}.")
    kept = {name: field for name, field in (turn or {}).items() if field is not None}
    fields: dict[str, Any] = {_SHAREGPT_FIELDS.get(name, name): field for name, field in kept.items()}
    if not fields:
        return {}
    role, content = fields.get("role"), fields.get("content", "")
    if isinstance(content, list):
        fields["content"] = content = "".join(map(_text_of_part, content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"The message {turn!r:.60} needs a `role` and `content` that are strings, as in {_FORM}.")
    return fields | {"role": _SHAREGPT_ROLES.get(role, role)}


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"The content of a message has a part {kind!r:.60}; a head learns from parts of `text` alone.")


def is_complete(messages: list[dict[str, Any]]) -> bool:
    """Whether there are messages, and each of them says or calls something."""
    return bool(messages) and all(turn.keys() & {"content", "tool_calls"} for turn in messages)

"""A model's chat template: conversations to prompts, as the model was trained to read them."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from tessera.errors import ModelError, RequestError
from tessera.text.sandbox import Sandbox

MAX_SOURCE_CHARACTERS = 2**20
ROLES = ("system", "developer", "user", "assistant")
"""Of messages; developer is OpenAI's newer name for system."""


class ChatTemplate:
    """One compiled template; ModelError when it is not valid Jinja.

    It comes from the model or from the operator, never from a request, and runs in a sandbox with bounds.
    """

    def __init__(self, source: str, origin: str = "the model's chat template") -> None:
        self.source = source
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ModelError(
                f"{origin} has {len(source)} characters, at most {MAX_SOURCE_CHARACTERS} are read",
                "give another one with --chat-template",
            )
        try:
            self._code = Sandbox().compile_bounded(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelError(f"{origin} cannot be compiled: {error}", "give another one with --chat-template") from None

    def render(
        self, messages: list[dict[str, Any]], special_tokens: dict[str, str], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for `messages`; RequestError with the template's own sentence where it refuses them."""
        plain = plain_messages(messages)
        variables = {
            **special_tokens,
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return Sandbox().run(self._code, variables)
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # a template is a program: what it may raise is anything
            raise RequestError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from None


def plain_messages(messages: list[dict[str, Any]], place: str = "messages") -> list[dict[str, Any]]:
    """Copies of the messages in which content is a text: text parts are joined by newlines; developer is system.

    RequestError, in which the messages are called `place`, for an empty list, a message without a role or with one
    not in ROLES, and content that is missing or no text.
    """
    if not isinstance(messages, list):
        raise RequestError(f"{place} must be a list of messages, got {messages!r:.80}", param=place)
    if not messages:
        raise RequestError(f"{place} is empty", "send at least one message", param=place)
    return [_plain_message(message, f"{place}[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{place} must be an object with a role, got {message!r:.80}", param=place)
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise RequestError(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r:.40}", param=f"{place}.role")
    if content is None:
        raise RequestError(f"{place} has no content", param=f"{place}.content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{place}.content must be a text, got {content!r:.80}", param=f"{place}.content")
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _part_text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if isinstance(kind, str) and kind != "text":
        raise RequestError(f"{place} is of type {kind!r:.40}; this model takes text parts only", param=place)
    raise RequestError(f'{place} must be {{"type": "text", "text": "..."}}, got {part!r:.80}', param=place)

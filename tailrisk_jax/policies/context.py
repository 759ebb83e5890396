"""What a policy puts around a query: a system prompt, messages before it, text beside it."""

import dataclasses
from collections.abc import Sequence

from tailrisk_jax.errors import InputError

Query = str | Sequence[dict[str, str]]
"""A user's message, or messages of {"role", "content"}."""


@dataclasses.dataclass(frozen=True)
class Context:
    """How a query is put to a policy, in place of the query alone.

    Attributes:
      system: a system prompt; it takes the place of the query's own, where it has one.
      before: (role, content) of messages between the system prompt and the query, such as
        answered examples (few-shot).
      prefix, suffix: text put before and after the content of the query's last user message.
    """

    system: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    suffix: str = ""

    def around(self, query: Query) -> Query:
        """The query as the policy gets it; a string stays one where no message is added.

        Raises:
          InputError: text beside the user's message for messages without one.
        """
        if isinstance(query, str):
            whole = self.prefix + query + self.suffix
            if self.system is None and not self.before:
                return whole
            messages = [_message("user", whole)]
        else:
            messages = self._beside([dict(message) for message in query])
        own = [m for m in messages if m["role"] == "system"]
        system = own if self.system is None else [_message("system", self.system)]
        before = [_message(*one) for one in self.before]
        return [*system, *before, *(m for m in messages if m["role"] != "system")]

    def _beside(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if not self.prefix and not self.suffix:
            return messages
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] = self.prefix + message["content"] + self.suffix
                return messages
        raise InputError(
            f"a query of roles {[message['role'] for message in messages]} has no user message "
            "to put a prefix or suffix beside; leave them out, or give a user message"
        )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

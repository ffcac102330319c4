"""From chat text to token ids, split where memory needs it: prefix, finished turns, fresh turn.

The split is taken from the model's own chat template: a turn is what a later user and assistant message add
to a rendered conversation, the prefix is what stands before the first turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from kv_agent.errors import ConfigError

_NEUTRAL = "Hello."
_BLANKS = 4  # tokens that a template may put before what is said
_BYTES_PER_CHARACTER = 4
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshTurn:
    """Tokens of a question up to where the answer begins; ``[start, end)`` is the question itself."""

    token_ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A rendered prompt in two: what stands before the first turn, and the turns.

    The last turn, the one to be answered, begins at ``last_start`` of the turns.
    """

    prefix: tuple[int, ...]
    turns: tuple[int, ...]
    last_start: int


class ChatPrompts:
    """Renders conversations piecewise with one tokenizer; without a chat template, as plain text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = getattr(tokenizer, "chat_template", None)
        self._templated = self._template is not None
        self._base = self._render(list(_PROBE)) if self._templated else []

    def prefix(self, system_prompt: str | None = None) -> tuple[int, ...]:
        """What stands before the first turn: begin-of-sequence token, system prompt."""
        if not self._templated:
            text = f"{system_prompt}\n" if system_prompt else ""
            bos = self._tokenizer.bos_token_id
            return tuple([bos] if bos is not None else []) + self._encode(text)
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        whole = self._render(system + list(_PROBE))
        turn = self.turn(_PROBE[0]["content"], _PROBE[1]["content"])
        if tuple(whole[-len(turn) :]) != turn:
            raise ConfigError(
                "the model's chat template renders a first turn unlike a later one, so memories cannot be "
                "placed between system prompt and conversation; use a model with a regular template"
            )
        return tuple(whole[: -len(turn)])

    def turn(self, prompt: str, response: str = "") -> tuple[int, ...]:
        """A finished turn as it stands inside a conversation."""
        if not self._templated:
            return self._encode(f"{prompt} {response}\n" if response else f"{prompt}\n")
        messages = [{"role": "user", "content": prompt}]
        if response:
            messages.append({"role": "assistant", "content": response})
        return self._added(messages, generate=False)

    @cached_property
    def neutral(self) -> tuple[int, ...]:
        """A turn that says nothing, for what must not begin a sequence."""
        return self.turn(_NEUTRAL, _NEUTRAL)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What every turn begins with, whatever it says; nothing without a chat template."""
        if not self._templated:
            return ()
        one, other = self.turn("a"), self.turn("b")
        return one[: _common(one, other)]

    def conversation(self, token_ids: Sequence[int], question: str | None = None) -> Conversation:
        """A prompt that somebody else rendered, tools and all: turns are told by what all of them begin with.

        Where nothing begins like a turn, all behind the begin-of-sequence token is one. The last turn is the
        last that begins with ``question``, where one does: some templates let what a tool answered begin as
        what the user says.
        """
        ids, size = tuple(token_ids), len(self.opening)
        starts = [at for at in range(len(ids) - size + 1) if size and ids[at : at + size] == self.opening]
        if not starts:
            bos = self.prefix() if not self._templated else ()
            starts = [len(bos) if ids[: len(bos)] == bos else 0]
        first = starts[0]
        last = next((at for at in reversed(starts) if self._says(ids[at + size :], question)), starts[-1])
        return Conversation(prefix=ids[:first], turns=ids[first:], last_start=last - first)

    def _says(self, token_ids: Sequence[int], question: str | None) -> bool:
        """Whether the tokens begin with this text, whatever blanks the template puts around it."""
        said = (question or "").strip()
        if not said:
            return False
        at_most = _BYTES_PER_CHARACTER * len(said) + _BLANKS  # no token is less than a byte
        begin: str = self._tokenizer.decode(list(token_ids[:at_most]))
        return begin.lstrip().startswith(said)

    def text_of(self, turn: Sequence[int]) -> str:
        """What a turn says, without what all turns begin with."""
        said = turn[len(self.opening) :] if tuple(turn[: len(self.opening)]) == self.opening else turn
        text: str = self._tokenizer.decode(list(said), skip_special_tokens=True)
        return text.strip()

    def fresh(self, prompt: str) -> FreshTurn:
        """A question, ready to be answered."""
        ids = self._question(prompt)
        # The question is where its rendering differs from that of others.
        start = min(_common(ids, other) for other in self._others)
        end = len(ids) - min(_common(ids[::-1], other[::-1]) for other in self._others)
        if start < end and self._tokenizer.decode(ids[start:end]) == prompt:
            return FreshTurn(token_ids=ids, start=start, end=end)
        return FreshTurn(token_ids=ids, start=0, end=len(ids))

    def _question(self, prompt: str) -> tuple[int, ...]:
        if not self._templated:
            return self._encode(prompt)
        return self._added([{"role": "user", "content": prompt}], generate=True)

    @cached_property
    def _others(self) -> tuple[tuple[int, ...], ...]:
        """Two questions without a character in common, to tell a question from what stands around it."""
        return self._question("a"), self._question("b")

    def _added(self, messages: list[dict[str, str]], *, generate: bool) -> tuple[int, ...]:
        whole = self._render(list(_PROBE) + messages, generate=generate)
        if whole[: len(self._base)] != self._base:
            raise ConfigError(
                "the model's chat template changes earlier turns when later ones are added, so turns "
                "cannot be kept as memories; use a model with a regular template"
            )
        return tuple(whole[len(self._base) :])

    def _render(self, messages: list[dict[str, str]], *, generate: bool = False) -> list[int]:
        # Named: vLLM's tokenizer lets others render, which do not know of a template that it was given later.
        # Of several templates a tokenizer chooses itself.
        named = {"chat_template": self._template} if isinstance(self._template, str) else {}
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **named
            )
        except TemplateError as err:
            raise ConfigError(
                f"the model's chat template refuses the messages: {err}; leave out what it does not support"
            ) from err
        return list(self._encode(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

"""Prompts put together from pieces are, token for token, what the chat template makes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from kv_agent.errors import ConfigError
from kv_agent.prompting import ChatPrompts

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "recall"

BUNDLED = (MODEL / "chat_template.jinja").read_text()

CHATML = """
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

CHATML_WITH_DEFAULT_SYSTEM = (
    """
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif -%}"""
    + CHATML
)

HEADERS_WITH_BOS = """
{%- for m in messages -%}
{%- if loop.first -%}{{ '<|pad|>' }}{%- endif -%}
{{ '<|im_start|>' + m['role'] + '<|im_end|>\\n\\n' + (m['content'] | trim) + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_end|>\\n\\n' }}{%- endif -%}
"""

REGULAR = {
    "bundled": BUNDLED,
    "chatml": CHATML,
    "default system": CHATML_WITH_DEFAULT_SYSTEM,
    "headers and bos": HEADERS_WITH_BOS,
}

SYSTEM_IN_FIRST_TURN = """
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{%- set ns.system = m['content'] + '\\n' -%}
{%- else -%}{{ '<|im_start|>' + m['role'] + '\\n' + ns.system + m['content'] + '<|im_end|>' }}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

NUMBERED = """
{%- for m in messages -%}
{{ '<|im_start|>' + (loop.index | string) + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

THOUGHTS_OF_LAST_TURN = """
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\\n' }}
{%- if loop.last and m['role'] == 'assistant' -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
{{ m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

LAST_TWO_MESSAGES = """
{%- for m in messages[-2:] -%}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

NO_SYSTEM = (
    """
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"""
    + CHATML
)

# " th" at the end of a turn and "e" at the beginning of the next become one token, " the".
GROWN_TOGETHER = """
{%- for m in messages -%}{{ 'e ' + m['role'] + ' ' + m['content'] + ' th' }}{%- endfor -%}
"""


def with_template(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # The bundled model's puts a space before each message; here text and tokens shall correspond exactly.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: with_template(template) for name, template in REGULAR.items()}


@pytest.fixture(scope="module")
def prompts(tokenizers: dict[str, Any]) -> dict[str, ChatPrompts]:
    return {name: ChatPrompts(tokenizer) for name, tokenizer in tokenizers.items()}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pieces(
    prompts: ChatPrompts, system: str | None, turns: Sequence[tuple[str, str]], query: str
) -> tuple[int, ...]:
    parts = [prompts.prefix(system), *(prompts.turn(*turn) for turn in turns), prompts.fresh(query).token_ids]
    return tuple(token for part in parts for token in part)


def whole(
    tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str]], query: str
) -> tuple[int, ...]:
    messages = [message("system", system)] if system else []
    for prompt, response in turns:
        messages += [message("user", prompt)]
        messages += [message("assistant", response)] if response else []
    messages += [message("user", query)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tuple(ids)


CONVERSATIONS = [
    (None, [], "What is red?"),
    ("Be brief.", [], "What is red?"),
    (None, [("What is red?", "The ball.")], "And blue?"),
    ("Be brief.\n\nAnd kind.", [("a", "b"), ("a", "b"), ("Hello there", "Hi!\n")], "user"),
    (" ", [("  spaces  ", "\ttabs\n\n"), ("1 + 1?", "2")], "\nnewlines\n"),
    (None, [("Grüße, 世界 🎈", "naïve café")], "ß"),
    ("A document follows.", [("a document without an answer", ""), ("two", "2")], "three"),
]


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_prefix_turns_and_question_are_the_rendered_conversation(
    tokenizers: dict[str, Any], prompts: dict[str, ChatPrompts], name: str, conversation: tuple
) -> None:
    assert pieces(prompts[name], *conversation) == whole(tokenizers[name], *conversation)


text = st.text(alphabet="ab .\n'é<|>{}🎈", min_size=1, max_size=10)


@pytest.mark.parametrize("name", REGULAR)
@given(system=st.none() | text, turns=st.lists(st.tuples(text, text), max_size=3), query=text)
@settings(max_examples=25, deadline=None)
def test_any_text_is_rendered_alike(
    tokenizers: dict[str, Any],
    prompts: dict[str, ChatPrompts],
    name: str,
    system: str | None,
    turns: list[tuple[str, str]],
    query: str,
) -> None:
    assert pieces(prompts[name], system, turns, query) == whole(tokenizers[name], system, turns, query)


def test_a_default_system_prompt_is_part_of_the_prefix(
    tokenizers: dict[str, Any], prompts: dict[str, ChatPrompts]
) -> None:
    tokenizer = tokenizers["default system"]
    assert tokenizer.decode(prompts["default system"].prefix()) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    )
    assert prompts["chatml"].prefix() == ()
    assert tokenizer.decode(prompts["headers and bos"].prefix()) == "<|pad|>"


@pytest.mark.parametrize("template", [CHATML, None], ids=["chatml", "no template"])
def test_tokens_that_the_tokenizer_adds_to_every_text_are_not_in_every_piece(template: str | None) -> None:
    plain, adding = with_template(template), with_template(template)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", adding.pad_token_id)]
    )
    assert adding.encode("a") == [adding.pad_token_id, *plain.encode("a")]
    conversation = ("Be brief.", [("a", "b")], "c")
    assert pieces(ChatPrompts(adding), *conversation) == pieces(ChatPrompts(plain), *conversation)


# -- where the question stands ------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULAR)
def test_the_opening_begins_every_turn_and_says_nothing_of_it(
    prompts: dict[str, ChatPrompts], name: str
) -> None:
    opening = prompts[name].opening
    turns = [prompts[name].turn(text) for text in ("hello", "42 is it", "[x]")]
    assert all(turn[: len(opening)] == opening for turn in (*turns, prompts[name].neutral))
    assert len({turn[len(opening)] for turn in turns}) == 3
    assert opening
    assert ChatPrompts(with_template(None)).opening == ()


@pytest.mark.parametrize("query", ["What is red?", "user", "assistant", "a", "user\nuser", "\n"])
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("bundled", "<|user|>", "<|end|><|assistant|>"),
        ("chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_range_of_a_question_is_the_question(
    tokenizers: dict[str, Any],
    prompts: dict[str, ChatPrompts],
    name: str,
    before: str,
    after: str,
    query: str,
) -> None:
    decode = tokenizers[name].decode
    fresh = prompts[name].fresh(query)
    assert decode(fresh.token_ids) == before + query + after
    if (fresh.start, fresh.end) == (0, len(fresh.token_ids)):
        return  # its first or last character is in one token with what stands beside it
    assert decode(fresh.token_ids[: fresh.start]) == before
    assert decode(fresh.token_ids[fresh.start : fresh.end]) == query


def test_a_question_of_its_own_tokens_is_told_apart_from_the_template(
    prompts: dict[str, ChatPrompts],
) -> None:
    fresh = prompts["bundled"].fresh("What is red?")
    assert (fresh.start, fresh.end) == (1, len(fresh.token_ids) - 2)


@pytest.mark.parametrize("query", ["", "  ", "hello"])
@pytest.mark.parametrize("name", REGULAR)
def test_there_is_always_something_to_probe(prompts: dict[str, ChatPrompts], name: str, query: str) -> None:
    fresh = prompts[name].fresh(query)
    assert 0 <= fresh.start < fresh.end <= len(fresh.token_ids)


def test_a_trimmed_question_is_probed_with_its_surroundings(prompts: dict[str, ChatPrompts]) -> None:
    fresh = prompts["headers and bos"].fresh("  hello  ")
    assert (fresh.start, fresh.end) == (0, len(fresh.token_ids))


# -- templates that cannot be taken apart ---------------------------------------------------------------


def test_a_template_that_puts_the_system_prompt_into_the_first_turn_is_refused_with_one_only() -> None:
    tokenizer = with_template(SYSTEM_IN_FIRST_TURN)
    prompts = ChatPrompts(tokenizer)
    with pytest.raises(ConfigError, match="renders a first turn unlike a later one"):
        prompts.prefix("Be brief.")
    turns = [("a", "b"), ("c", "d")]
    assert pieces(prompts, None, turns, "e") == whole(tokenizer, None, turns, "e")


def test_a_template_that_numbers_turns_is_refused() -> None:
    with pytest.raises(ConfigError, match="renders a first turn unlike a later one"):
        ChatPrompts(with_template(NUMBERED)).prefix()


@pytest.mark.parametrize(
    "template", [THOUGHTS_OF_LAST_TURN, GROWN_TOGETHER], ids=["thoughts of last turn", "grown together"]
)
def test_a_template_that_changes_earlier_turns_is_refused(template: str) -> None:
    prompts = ChatPrompts(with_template(template))
    for render in (prompts.prefix, lambda: prompts.turn("c", "d"), lambda: prompts.fresh("e")):
        with pytest.raises(ConfigError, match="changes earlier turns"):
            render()


def test_a_template_that_drops_earlier_turns_is_refused() -> None:
    prompts = ChatPrompts(with_template(LAST_TWO_MESSAGES))
    for render in (prompts.prefix, lambda: prompts.turn("c", "d"), lambda: prompts.fresh("e")):
        with pytest.raises(ConfigError, match="use a model with a regular template"):
            render()


def test_a_template_without_system_prompts_is_refused_with_one_only() -> None:
    tokenizer = with_template(NO_SYSTEM)
    prompts = ChatPrompts(tokenizer)
    assert pieces(prompts, None, [("a", "b")], "c") == whole(tokenizer, None, [("a", "b")], "c")
    with pytest.raises(ConfigError, match="System role not supported"):
        prompts.prefix("Be brief.")


# -- a conversation that somebody else rendered ---------------------------------------------------------

WITH_TOOLS = """
{%- if tools -%}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'tool' -%}{{ '<|im_start|>user\\n<tool_response>' + m['content'] + '<|im_end|>\\n' }}
{%- else -%}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

TOOL = {"type": "function", "function": {"name": "find_home", "parameters": {"type": "object"}}}
TOOL_ROUND = [message("assistant", "find_home(Mara)"), message("tool", "Oslo")]


@pytest.mark.parametrize("question", ["Where does Mara live?", "世界 🎈?", "  blanks\n", "user", "Where"])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_last_turn_is_the_users_and_not_what_tools_answered(question: str, rounds: int) -> None:
    tokenizer = with_template(WITH_TOOLS)
    earlier = [message("user", "Where does Hugo live?"), message("assistant", "Paris."), *TOOL_ROUND]
    messages = [*earlier, message("user", question), *TOOL_ROUND * rounds]

    def rendered(part: list[dict[str, str]], generate: bool) -> tuple[int, ...]:
        ids = tokenizer.apply_chat_template(
            part, tools=[TOOL], add_generation_prompt=generate, return_dict=False
        )
        return tuple(ids)

    ids = rendered(messages, True)
    prompts = ChatPrompts(tokenizer)
    found = prompts.conversation(ids, question)

    assert found.prefix + found.turns == ids
    assert found.prefix + prompts.turn(earlier[0]["content"]) == rendered(earlier[:1], False)
    assert found.prefix + found.turns[: found.last_start] == rendered(earlier, False)


@pytest.mark.parametrize("question", [None, "", " ", "something that nobody said", "\ud800"])
def test_without_the_question_the_last_turn_is_the_last_that_begins_as_one(question: str | None) -> None:
    tokenizer = with_template(WITH_TOOLS)
    messages = [message("user", "Where does Mara live?"), *TOOL_ROUND]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    found = ChatPrompts(tokenizer).conversation(ids, question)

    last = tokenizer.decode(found.turns[found.last_start :])
    assert last == "<|im_start|>user\n<tool_response>Oslo<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_in_which_nothing_begins_like_a_turn_is_one(prompts: dict[str, ChatPrompts]) -> None:
    ids = (7, 8, 9)
    found = prompts["chatml"].conversation(ids, "What?")
    assert (found.prefix, found.turns, found.last_start) == ((), ids, 0)


# -- no template ------------------------------------------------------------------------------------------


def test_without_a_template_turns_are_lines_of_plain_text() -> None:
    tokenizer = with_template(None)
    prompts = ChatPrompts(tokenizer)
    assert tokenizer.decode(prompts.prefix("Be brief.")) == "Be brief.\n"
    assert prompts.prefix() == ()
    assert tokenizer.decode(prompts.turn("What is red?", "The ball.")) == "What is red? The ball.\n"
    assert tokenizer.decode(prompts.turn("A document.")) == "A document.\n"
    fresh = prompts.fresh("And blue?")
    assert tokenizer.decode(fresh.token_ids) == "And blue?"
    assert (fresh.start, fresh.end) == (0, len(fresh.token_ids))


def test_without_a_template_the_prefix_begins_with_the_model_s_first_token() -> None:
    tokenizer = with_template(None)
    tokenizer.bos_token = "<|user|>"
    prefix = ChatPrompts(tokenizer).prefix("Be brief.")
    assert prefix[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prefix[1:]) == "Be brief.\n"
    assert ChatPrompts(tokenizer).prefix() == (tokenizer.bos_token_id,)


@pytest.mark.parametrize("question", ["What is red?", "user", "Where does Mara Dubois live?"])
def test_the_bundled_tokenizer_finds_the_question_behind_the_space_it_adds(question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    fresh = ChatPrompts(tokenizer).fresh(question)
    assert (fresh.start, fresh.end) == (1, len(fresh.token_ids) - 2)
    assert tokenizer.decode(fresh.token_ids[fresh.start : fresh.end]) == question

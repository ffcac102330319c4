"""What the tokenizer promises: whole words, pairs of digits, one chat format, texts that come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.world import RELATIONS, Message, Split, WorldConfig, generate_world, values
from benchmarks.world.names import FIRST_NAMES, LAST_NAMES, PROJECT_MODIFIERS, PROJECT_NOUNS
from examples.models.recall_training import tokens
from examples.models.recall_training.batches import Encoder
from examples.models.recall_training.tokens import SPECIAL_TOKENS
from tests.unit.recall_training.plain import (
    answered,
    asked,
    draw_dialogue,
    plain_ids,
    rendered,
)

NAME_PARTS = (*FIRST_NAMES, *LAST_NAMES, *PROJECT_MODIFIERS, *PROJECT_NOUNS)
VALUE_WORDS = (
    *(word for listed in values.WORDS.values() for word in listed),
    *values.PLACE_FIRSTS,
    *values.PLACE_SECONDS,
    *values.STREET_NAMES,
    *values.STREET_KINDS,
    *values.MONTHS,
)


def texts_of(split: Split, num_facts: int = 60) -> list[str]:
    config = WorldConfig(num_facts=num_facts, facts_per_subject=3, two_hop_share=0.3, small_talk_share=0.4)
    world = generate_world(config, split=split, seed=7)
    return [
        *(message["content"] for message in world.messages),
        *(text for question in world.questions for text in (question.text, question.answer)),
    ]


def test_names_and_values_are_one_token_each(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not {word for word in (*NAME_PARTS, *VALUE_WORDS) if len(plain_ids(tokenizer, word)) != 1}


def test_names_and_values_have_a_token_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    different = set(NAME_PARTS) | set(VALUE_WORDS)
    assert len({plain_ids(tokenizer, word)[0] for word in different}) == len(different)
    assert tokenizer.unk_token_id not in {plain_ids(tokenizer, word)[0] for word in different}


def test_a_word_is_the_same_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in (*NAME_PARTS, *VALUE_WORDS):
        (token,) = plain_ids(tokenizer, word)
        assert plain_ids(tokenizer, f"{word}.")[0] == token
        assert plain_ids(tokenizer, f"Where is {word}?")[2] == token
        assert plain_ids(tokenizer, f"<|user|>{word}<|end|>")[1] == token


@pytest.mark.parametrize("split", Split, ids=lambda split: split.value)
def test_words_of_phrasings_are_one_token_each_at_the_place_they_stand(
    tokenizer: PreTrainedTokenizerFast, split: Split
) -> None:
    # A word cut in pieces is a sequence that no training text has: the model cannot know it.
    found = set()
    for relation in RELATIONS.values():
        for template in relation.phrases(split).all():
            for word in re.findall(r"(?<!\{)\b[A-Za-z]+\b(?!\})", template):
                if len(plain_ids(tokenizer, word)) != 1:
                    found.add((word, template))
    assert not found


@pytest.mark.parametrize(
    ("number", "pieces"),
    [
        ("7", ["Ġ7"]),
        ("42", ["Ġ42"]),
        ("703", ["Ġ70", "3"]),
        ("4821", ["Ġ48", "21"]),
        ("90500", ["Ġ90", "50", "0"]),
    ],
)
def test_numbers_are_split_by_two_digits_from_the_left(
    tokenizer: PreTrainedTokenizerFast, number: str, pieces: list[str]
) -> None:
    for text in ("{}.", "The badge is {}.", "The badge is {}, not {} Oak Lane.", "<|user|>{}<|end|>"):
        found = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, text.format(number, number)))
        assert [piece for piece in found if re.search("[0-9]", piece)] == pieces * text.count("{}")


@settings(max_examples=200, deadline=None)
@given(number=st.integers(min_value=10, max_value=10**9))
def test_any_number_comes_back_and_has_a_token_for_every_two_digits(
    tokenizer: PreTrainedTokenizerFast, number: int
) -> None:
    text = f"It is {number}."
    ids = plain_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    digits = str(number)
    pairs = [digits[at : at + 2] for at in range(0, len(digits), 2)]
    assert tokenizer.convert_ids_to_tokens(ids)[2:-1] == [f"Ġ{pairs[0]}", *pairs[1:]]


@pytest.mark.parametrize("split", Split, ids=lambda split: split.value)
def test_numbers_of_worlds_have_a_token_for_every_two_digits(
    tokenizer: PreTrainedTokenizerFast, split: Split
) -> None:
    # A token that no training text has could not be recalled.
    numbers = set(re.findall("[0-9]+", " ".join(texts_of(split, num_facts=300))))
    assert len(numbers) > 50
    assert not {n for n in numbers if len(plain_ids(tokenizer, n)) != (len(n) + 1) // 2}


def test_no_token_holds_more_than_two_digits_or_digits_and_letters(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with_digits = [token for token in tokenizer.get_vocab() if re.search("[0-9]", token)]
    assert len(with_digits) > 100
    assert not [token for token in with_digits if not re.fullmatch("Ġ?[0-9]{1,2}", token)]


def test_answers_are_the_tokens_that_their_statements_had(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for value in ("Oslo", "4821", "May 17", "42 Oak Lane", "Port Hale", "Ada Bauer"):
        alone = plain_ids(tokenizer, f"{value}.")
        stated = plain_ids(tokenizer, f"What is asked for is {value}.")
        assert stated[-len(alone) :] == alone


def test_special_tokens_are_single_and_the_first_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [plain_ids(tokenizer, token) for token in SPECIAL_TOKENS] == [[n] for n in range(5)]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_chat_template_renders_the_documented_format(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ada Bauer lives in Oslo."},
        {"role": "assistant", "content": "Noted."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Ada Bauer lives in Oslo.<|end|><|assistant|>Noted.<|end|>"
    )
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|assistant|>"


@pytest.mark.parametrize("num_earlier", [0, 2])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rows_are_what_the_chat_template_gives(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, system: str | None, num_earlier: int
) -> None:
    dialogue = draw_dialogue(8, num_facts=4, num_questions=1, num_earlier=num_earlier, system=system)
    (question,) = dialogue.questions
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += dialogue.world.messages
    for one in (*dialogue.earlier, question):
        messages += [{"role": "user", "content": one.text}, {"role": "assistant", "content": one.answer}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    told = tokenizer.apply_chat_template(messages[:-2], return_dict=False)
    row = dialogue.row(encoder)
    (only,) = row.asked
    assert row.shared == told
    assert row.shared + only.ids == whole
    assert row.shared + only.ids[: only.answer_start] == prompt


@pytest.mark.parametrize("split", Split, ids=lambda split: split.value)
def test_texts_of_worlds_come_back(tokenizer: PreTrainedTokenizerFast, split: Split) -> None:
    for text in texts_of(split):
        assert tokenizer.decode(plain_ids(tokenizer, text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40).filter(lambda text: not text.startswith(" ") and "<|" not in text))
def test_any_text_that_does_not_begin_with_a_space_comes_back(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert tokenizer.decode(plain_ids(tokenizer, text)) == text


def test_saved_and_loaded_tokenizer_gives_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    dialogue = draw_dialogue(9, num_facts=6, num_questions=8)
    text = rendered(dialogue.messages) + "".join(asked(q) + answered(q) for q in dialogue.questions)
    assert plain_ids(loaded, text) == plain_ids(tokenizer, text)
    assert dialogue.row(Encoder(loaded)) == dialogue.row(Encoder(tokenizer))
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_tokenizer_is_trained_on_worlds_of_the_training_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []

    def record(config: WorldConfig, *, split: Split, seed: int) -> object:
        splits.append(split)
        return generate_world(WorldConfig(num_facts=1), split=split, seed=seed)

    monkeypatch.setattr(tokens, "generate_world", record)
    tokens.train_tokenizer(300)
    assert set(splits) == {Split.TRAIN}


def test_answer_streamed_behind_its_prompt_begins_with_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    # Engines that stream text prime the decoder with the prompt: only the prompt's first space goes.
    prompt = plain_ids(tokenizer, "<|user|>Where does Ada Bauer live?<|end|><|assistant|>")
    answer = plain_ids(tokenizer, "Oslo.<|end|>")
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    streamed = "".join(stream.step(tokenizer.backend_tokenizer, token) or "" for token in answer)
    assert streamed == " Oslo."
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Oslo."

"""The tokenizer: byte-level BPE in which a word is the same token wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.world import Split, WorldConfig, generate_world

PAD, USER, ASSISTANT, END, SYSTEM = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|system|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|'+m['role']+'|>'+m['content']+'<|end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer from what you were told.",
    "Answer in as few words as you can. Say so when you do not know.",
    "You remember what your users tell you about people and projects.",
)
_NUM_WORLDS = 400
_FACTS_PER_WORLD = 100


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Trained on the training split alone."""
    bpe = Tokenizer(models.BPE())
    # The space put before the first word of a message makes an answer the very token its statement had:
    # recall is then copying. The decoder takes it away again. Numbers are split after that, by two digits.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Split(Regex("Ġ?[0-9]{1,2}"), behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    config = WorldConfig(num_facts=_FACTS_PER_WORLD, facts_per_subject=2, correction_share=0.2)
    yield from SYSTEM_PROMPTS * 10
    for seed in range(_NUM_WORLDS):
        world = generate_world(config, split=Split.TRAIN, seed=seed)
        yield from (message["content"] for message in world.messages)
        yield from (question.text for question in world.questions)
        yield from (question.answer for question in world.questions)

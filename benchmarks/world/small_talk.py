"""What is said that tells nothing."""

from __future__ import annotations

import random

from benchmarks.world.records import Split

ACKNOWLEDGEMENTS = ("Noted.", "I will remember that.", "Thanks, noted.", "Understood.")

# The user's remark and the assistant's reply.
SMALL_TALK: dict[Split, tuple[tuple[str, str], ...]] = {
    Split.TRAIN: (
        ("Hello, how are you today?", "I am fine, thank you."),
        ("Good morning.", "Good morning to you."),
        ("It rains a lot this week.", "Then take an umbrella with you."),
        ("The meeting took far too long.", "That sounds tiring."),
        ("I need a cup of coffee.", "Enjoy the break."),
        ("The train was late again.", "That is a pity."),
        ("What a nice day it is.", "It is nice indeed."),
        ("I am a bit tired today.", "Then take a break."),
        ("The weekend was too short.", "They always are."),
        ("Thank you for the help.", "You are welcome."),
        ("Let us go on.", "I am ready."),
        ("My screen froze again.", "Try to start it once more."),
    ),
    Split.VALIDATION: (
        ("How are you this morning?", "I am fine, thank you."),
        ("The coffee break was too short.", "They always are."),
        ("It was a nice weekend.", "That sounds nice."),
        ("The train took far too long today.", "That is a pity."),
    ),
    Split.TEST: (
        ("Good day, how are you?", "I am fine, thank you."),
        ("The meeting was late again.", "That is a pity."),
        ("It rains again today.", "Then take an umbrella with you."),
        ("Thank you, that was nice.", "You are welcome."),
    ),
}


def draw_small_talk(split: Split, rng: random.Random) -> tuple[str, str]:
    """A remark and its reply."""
    return rng.choice(SMALL_TALK[split])

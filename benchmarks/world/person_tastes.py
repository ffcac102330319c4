"""What people like, said in one word: pet, food, color, instrument."""

from __future__ import annotations

from benchmarks.world.phrases import Phrases, Relation
from benchmarks.world.records import ValueKind

PET = Relation(
    name="pet",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "{s} has a {v} at home.",
            "{s} keeps a {v}.",
            "The pet of {s} is a {v}.",
            "{s} has a pet {v}.",
            "A {v} is the pet of {s}.",
            "At home {s} has a {v}.",
            "A {v} is what {s} keeps as a pet.",
            "The {v} is the pet {s} keeps.",
            "The pet at the home of {s} is a {v}.",
            "{s} has a {v} as a pet.",
        ),
        updates=(
            "{s} now has a {v}.",
            "{s} gave the old pet away and keeps a {v} now.",
            "The new pet of {s} is a {v}.",
            "A {v} is the new pet of {s}.",
            "Now {s} keeps a {v}.",
        ),
        questions=(
            "What pet does {s} have?",
            "Which pet does {s} keep?",
            "What is the pet of {s}?",
            "What does {s} keep at home?",
            "What is the pet {s} keeps?",
            "Which pet is at the home of {s}?",
            "What does {s} have as a pet?",
            "Which pet is that of {s}?",
        ),
        paraphrases=(
            "Which animal belongs to {s}?",
            "What animal does {s} own?",
            "What kind of animal does {s} look after?",
            "Which animal is owned by {s}?",
            "Which animal does {s} own?",
            "What animal is owned by {s}?",
            "What kind of animal belongs to {s}?",
        ),
    ),
    validation=Phrases(
        statements=("{s} keeps a {v} at home.", "The pet {s} has is a {v}."),
        updates=("{s} gave the old pet away and has a {v} now.",),
        questions=("What pet does {s} keep?", "What is the pet {s} has?"),
        paraphrases=("What kind of animal does {s} own?",),
    ),
    test=Phrases(
        statements=("{s} keeps a pet {v}.", "A {v} is the pet {s} has."),
        updates=("{s} now keeps a new pet, a {v}.",),
        questions=("Which pet does {s} have?", "What pet does {s} keep at home?"),
        paraphrases=("Which animal does {s} look after?", "What animal belongs to {s}?"),
    ),
)

FOOD = Relation(
    name="food",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "{s} loves to eat {v}.",
            "The favorite food of {s} is {v}.",
            "{s} likes {v} more than any other food.",
            "{s} would eat {v} every day.",
            "The food {s} likes is {v}.",
            "{v} is the favorite food of {s}.",
            "To eat {v} is what {s} loves.",
            "Every day {s} would eat {v}.",
            "{v} is the food {s} would eat every day.",
            "More than any other food {s} likes {v}.",
            "{s} loves {v}.",
            "{s} loves to eat {v} every day.",
            "What {s} loves to eat is {v}.",
        ),
        updates=(
            "{s} now loves to eat {v}.",
            "The new favorite food of {s} is {v}.",
            "{s} changed taste and likes {v} now.",
            "{s} now loves {v}.",
            "{v} is now the favorite food of {s}.",
            "Now {s} loves to eat {v}.",
        ),
        questions=(
            "What does {s} love to eat?",
            "What is the favorite food of {s}?",
            "Which food does {s} like?",
            "What would {s} eat every day?",
            "What is the food {s} likes to eat?",
            "Which food is the favorite of {s}?",
            "What food would {s} eat?",
            "What is the food {s} loves?",
        ),
        paraphrases=(
            "Which dish makes {s} happy?",
            "Which dish does {s} prefer?",
            "What should I cook for {s}?",
            "What dish should I cook for {s}?",
            "What is the dish that makes {s} happy?",
            "What dish is best to cook for {s}?",
            "Which dish is best for {s}?",
        ),
    ),
    validation=Phrases(
        statements=("{s} likes to eat {v}.", "What {s} would eat every day is {v}."),
        updates=("{s} now likes to eat {v}.",),
        questions=("What food does {s} love?", "What does {s} like to eat?"),
        paraphrases=("What dish does {s} prefer?",),
    ),
    test=Phrases(
        statements=("{s} loves {v} more than any other food.", "The food {s} loves is {v}."),
        updates=("{s} changed taste and now loves {v}.",),
        questions=("Which food does {s} love to eat?", "Which food would {s} eat every day?"),
        paraphrases=("What dish makes {s} happy?", "Which dish should I cook for {s}?"),
    ),
)

COLOR = Relation(
    name="color",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "The favorite color of {s} is {v}.",
            "{s} likes the color {v}.",
            "{s} paints everything {v}.",
            "The color {s} loves is {v}.",
            "The color of choice for {s} is {v}.",
            "{v} is the favorite color of {s}.",
            "Everything {s} paints is {v}.",
            "The color {v} is loved by {s}.",
            "{s} has {v} as a favorite color.",
            "For {s} the color of choice is {v}.",
        ),
        updates=(
            "{s} now likes the color {v}.",
            "The new favorite color of {s} is {v}.",
            "{s} changed the favorite color to {v}.",
            "{v} is now the favorite color of {s}.",
            "Now {s} likes the color {v}.",
        ),
        questions=(
            "What is the favorite color of {s}?",
            "Which color does {s} like?",
            "What color does {s} love?",
            "In which color does {s} paint everything?",
            "What color is the choice of {s}?",
            "Which color is loved by {s}?",
            "What is the color {s} paints everything in?",
            "Which favorite color does {s} have?",
        ),
        paraphrases=(
            "Which shade does {s} prefer?",
            "What tint suits {s} best?",
            "Which shade suits {s} best?",
            "What shade does {s} admire?",
            "Which shade does {s} admire?",
            "What is the tint that suits {s} best?",
            "What shade does {s} prefer?",
        ),
    ),
    validation=Phrases(
        statements=("{s} loves the color {v}.", "The choice of color for {s} is {v}."),
        updates=("{s} now loves the color {v}.",),
        questions=("Which color is the favorite of {s}?", "What color does {s} like?"),
        paraphrases=("Which tint does {s} prefer?",),
    ),
    test=Phrases(
        statements=("The color {s} likes is {v}.", "{s} paints everything in the color {v}."),
        updates=("The favorite color of {s} is now {v}.",),
        questions=("Which color does {s} love?", "What is the color of choice for {s}?"),
        paraphrases=("What shade suits {s} best?", "Which tint does {s} admire?"),
    ),
)

INSTRUMENT = Relation(
    name="instrument",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "{s} plays the {v}.",
            "{s} learned to play the {v}.",
            "The instrument of {s} is the {v}.",
            "{s} plays the {v} in a band.",
            "In the band {s} plays the {v}.",
            "The {v} is what {s} plays.",
            "To play the {v} is what {s} learned.",
            "The instrument {s} learned is the {v}.",
            "It is the {v} that {s} plays in the band.",
            "{s} has the {v} as an instrument.",
        ),
        updates=(
            "{s} now plays the {v}.",
            "{s} changed instruments and plays the {v} now.",
            "The new instrument of {s} is the {v}.",
            "The {v} is the new instrument of {s}.",
            "Now {s} plays the {v}.",
        ),
        questions=(
            "What does {s} play?",
            "Which instrument does {s} play?",
            "What is the instrument of {s}?",
            "What did {s} learn to play?",
            "What is the instrument {s} plays?",
            "Which instrument is that of {s}?",
            "What did {s} learn to play in the band?",
            "Which instrument does {s} have?",
        ),
        paraphrases=(
            "On what does {s} make music?",
            "What does {s} perform music on?",
            "What does {s} perform on?",
            "What does {s} practice to make music?",
            "What is it that {s} makes music on?",
            "On what does {s} practice?",
            "What does {s} practice on?",
        ),
    ),
    validation=Phrases(
        statements=("{s} learned to play the {v} in a band.", "The instrument {s} plays is the {v}."),
        updates=("{s} changed instruments and now plays the {v}.",),
        questions=("What instrument does {s} play?", "What does {s} play in the band?"),
        paraphrases=("On what does {s} perform?",),
    ),
    test=Phrases(
        statements=("The {v} is the instrument of {s}.", "In the band {s} learned to play the {v}."),
        updates=("{s} now plays a new instrument, the {v}.",),
        questions=("Which instrument did {s} learn?", "Which instrument does {s} play in the band?"),
        paraphrases=("On what does {s} perform music?", "What does {s} make music on?"),
    ),
)

RELATIONS = (PET, FOOD, COLOR, INSTRUMENT)

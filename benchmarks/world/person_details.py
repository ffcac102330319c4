"""What is said about people in numbers, phrases and names: badge, room, birthday, address, mentor."""

from __future__ import annotations

from benchmarks.world.phrases import Phrases, Relation
from benchmarks.world.records import ValueKind

BADGE = Relation(
    name="badge",
    kind=ValueKind.NUMBER,
    train=Phrases(
        statements=(
            "The badge of {s} has number {v}.",
            "{s} wears badge {v}.",
            "The badge number of {s} is {v}.",
            "{s} was given badge number {v}.",
            "Badge {v} was given to {s}.",
            "{v} is the badge number of {s}.",
            "Number {v} is on the badge of {s}.",
            "The badge {s} wears is {v}.",
            "The badge {s} was given has number {v}.",
            "It is badge {v} that {s} wears.",
        ),
        updates=(
            "{s} now wears badge {v}.",
            "The new badge number of {s} is {v}.",
            "The badge of {s} was replaced by badge {v}.",
            "{v} is the new badge number of {s}.",
            "Badge {v} now is the badge of {s}.",
        ),
        questions=(
            "What is the badge number of {s}?",
            "Which badge does {s} wear?",
            "What number is on the badge of {s}?",
            "Which badge was given to {s}?",
            "What is the badge {s} wears?",
            "What badge number does {s} have?",
            "Which number has the badge of {s}?",
            "What badge was {s} given?",
        ),
        paraphrases=(
            "Under which ID is {s} registered?",
            "What is the ID of {s}?",
            "Which ID identifies {s}?",
            "By which ID is {s} identified?",
            "What is the ID that identifies {s}?",
            "Which ID is registered for {s}?",
            "What ID is {s} registered under?",
        ),
    ),
    validation=Phrases(
        statements=("{s} wears badge number {v}.", "Badge number {v} was given to {s}."),
        updates=("{s} now wears badge number {v}.",),
        questions=("Which badge number does {s} wear?", "What is the number on the badge of {s}?"),
        paraphrases=("What ID identifies {s}?",),
    ),
    test=Phrases(
        statements=("{s} was given badge {v}.", "The number on the badge of {s} is {v}."),
        updates=("The badge of {s} was replaced by number {v}.",),
        questions=("Which number is on the badge of {s}?", "Which badge number was given to {s}?"),
        paraphrases=("Under what ID is {s} registered?", "By what ID is {s} identified?"),
    ),
)

ROOM = Relation(
    name="room",
    kind=ValueKind.NUMBER,
    train=Phrases(
        statements=(
            "{s} sits in room {v}.",
            "The office of {s} is room {v}.",
            "{s} has an office in room {v}.",
            "Room {v} is the office of {s}.",
            "You reach {s} in room {v}.",
            "{v} is the room of {s}.",
            "In room {v} sits {s}.",
            "The room in which you reach {s} is {v}.",
            "Room {v} is where the office of {s} is.",
            "The office {s} has is room {v}.",
        ),
        updates=(
            "{s} moved to room {v}.",
            "{s} now sits in room {v}.",
            "The new office of {s} is room {v}.",
            "Room {v} is the new office of {s}.",
            "The office of {s} is now in room {v}.",
        ),
        questions=(
            "In which room does {s} sit?",
            "Which room is the office of {s}?",
            "In which room is the office of {s}?",
            "In what room do I reach {s}?",
            "What is the room {s} sits in?",
            "Where does {s} sit?",
            "In which room do you reach {s}?",
            "What room has the office of {s}?",
        ),
        paraphrases=(
            "Behind which door can I find {s}?",
            "Which door belongs to {s}?",
            "What door should I knock on for {s}?",
            "Which door opens to {s}?",
            "What is the door that belongs to {s}?",
            "On which door should I knock for {s}?",
            "Which door can I find {s} behind?",
        ),
    ),
    validation=Phrases(
        statements=("Room {v} is where {s} sits.", "{s} has room {v} as an office."),
        updates=("{s} has a new office in room {v}.",),
        questions=("In what room does {s} sit?", "Which room does {s} sit in?"),
        paraphrases=("Which door should I knock on for {s}?",),
    ),
    test=Phrases(
        statements=("In room {v} you reach {s}.", "The office of {s} is in room {v}."),
        updates=("{s} moved and now sits in room {v}.",),
        questions=("In which room do I reach {s}?", "What room is the office of {s}?"),
        paraphrases=("What door opens to {s}?", "Behind what door can I find {s}?"),
    ),
)

BIRTHDAY = Relation(
    name="birthday",
    kind=ValueKind.PHRASE,
    train=Phrases(
        statements=(
            "{s} was born on {v}.",
            "The birthday of {s} is {v}.",
            "{s} has a birthday on {v}.",
            "The birthday of {s} falls on {v}.",
            "On {v} was {s} born.",
            "{v} is when {s} was born.",
            "{v} is when {s} has a birthday.",
            "It is {v} when the birthday of {s} falls.",
            "The day of the birthday of {s} is {v}.",
        ),
        questions=(
            "When was {s} born?",
            "When is the birthday of {s}?",
            "On which day was {s} born?",
            "When does {s} have a birthday?",
            "On which day does the birthday of {s} fall?",
            "What is the day {s} was born?",
            "What day is the birthday of {s}?",
            "When does the birthday of {s} fall?",
        ),
        paraphrases=(
            "On which date does {s} get older?",
            "When does {s} turn a year older?",
            "Which date should I mark with a cake for {s}?",
            "On which date does {s} turn older?",
            "What is the date when {s} gets older?",
            "On what date does {s} turn a year older?",
            "For which date should I mark a cake for {s}?",
        ),
    ),
    validation=Phrases(
        statements=("{v} is the birthday of {s}.", "On {v} {s} was born."),
        questions=("On which day is the birthday of {s}?", "What is the birthday of {s}?"),
        paraphrases=("When does {s} get older?",),
    ),
    test=Phrases(
        statements=("The birthday of {s} is on {v}.", "The day {s} was born is {v}."),
        questions=("On which day does {s} have a birthday?", "Which day is the birthday of {s}?"),
        paraphrases=("On which date does {s} turn a year older?", "Which date should I mark for {s}?"),
    ),
)

ADDRESS = Relation(
    name="address",
    kind=ValueKind.PHRASE,
    train=Phrases(
        statements=(
            "The address of {s} is {v}.",
            "Letters for {s} go to {v}.",
            "{s} gets letters at {v}.",
            "Send letters for {s} to {v}.",
            "{v} is where {s} gets letters.",
            "At {v} {s} gets letters.",
            "Letters to {s} go to the address {v}.",
            "The address for letters to {s} is {v}.",
            "{s} has the address {v}.",
        ),
        updates=(
            "The new address of {s} is {v}.",
            "Letters for {s} now go to {v}.",
            "{s} now gets letters at {v}.",
            "{v} is the new address of {s}.",
            "Now letters for {s} go to {v}.",
        ),
        questions=(
            "What is the address of {s}?",
            "Where do letters for {s} go?",
            "To which address do I send letters for {s}?",
            "Where does {s} get letters?",
            "Which address does {s} have?",
            "What is the address for letters to {s}?",
            "To what address do letters for {s} go?",
            "Where should I send letters for {s}?",
        ),
        paraphrases=(
            "Where should mail for {s} be delivered?",
            "At which house can a parcel for {s} be delivered?",
            "Which house should mail for {s} reach?",
            "Where should a parcel for {s} be delivered?",
            "To which house should mail for {s} be delivered?",
            "At what house can mail reach {s}?",
            "Where can a parcel reach {s}?",
        ),
    ),
    validation=Phrases(
        statements=("{s} gets letters at the address {v}.", "Send letters to {s} at {v}."),
        updates=("Now send letters for {s} to {v}.",),
        questions=("At which address does {s} get letters?", "Where do I send letters for {s}?"),
        paraphrases=("At which house should mail for {s} be delivered?",),
    ),
    test=Phrases(
        statements=("Letters go to {s} at {v}.", "{v} is the address of {s}."),
        updates=("The address of {s} is now {v}.",),
        questions=("To which address do letters for {s} go?", "What address gets letters for {s}?"),
        paraphrases=("Where can mail for {s} be delivered?", "Which house should a parcel for {s} reach?"),
    ),
)

MENTOR = Relation(
    name="mentor",
    kind=ValueKind.NAME,
    train=Phrases(
        statements=(
            "The mentor of {s} is {v}.",
            "{v} is the mentor of {s}.",
            "{v} teaches {s}.",
            "{s} learns from {v}.",
            "{s} has {v} as a mentor.",
            "Mentor {v} teaches {s}.",
            "{s} has a mentor, {v}.",
            "From {v} {s} learns.",
            "The person who teaches {s} is {v}.",
            "It is {v} who is the mentor of {s}.",
            "As a mentor {v} teaches {s}.",
            "{s} learns from {v} as a mentor.",
            "{s} learns from a person, {v}.",
        ),
        updates=(
            "{s} now learns from {v}.",
            "The new mentor of {s} is {v}.",
            "{v} now teaches {s}.",
            "{v} is the new mentor of {s}.",
            "The mentor of {s} is now {v}.",
        ),
        questions=(
            "Who is the mentor of {s}?",
            "Who teaches {s}?",
            "From whom does {s} learn?",
            "Which mentor does {s} have?",
            "Who is the person who teaches {s}?",
            "Who is the mentor {s} has?",
            "Which person is the mentor of {s}?",
            "Who is it that {s} learns from?",
        ),
        paraphrases=(
            "Who guides {s}?",
            "Who coaches {s}?",
            "Who is the coach of {s}?",
            "Which coach helps {s} with advice?",
            "Who is it that coaches {s}?",
            "Who helps {s} with advice?",
            "Which coach is that of {s}?",
        ),
        hops=(
            "the mentor of {s}",
            "the person who teaches {s}",
            "the mentor {s} learns from",
            "the person {s} learns from",
        ),
    ),
    validation=Phrases(
        statements=("The mentor {s} has is {v}.", "The mentor {v} teaches {s}."),
        updates=("{s} now has {v} as a mentor.",),
        questions=("Who is the mentor {s} learns from?", "Which mentor teaches {s}?"),
        paraphrases=("Which coach guides {s}?",),
        hops=("the mentor who teaches {s}",),
    ),
    test=Phrases(
        statements=("{v} teaches {s} as a mentor.", "{s} learns from the mentor {v}."),
        updates=("{s} has a new mentor, {v}.",),
        questions=("Who does {s} have as a mentor?", "Which mentor does {s} learn from?"),
        paraphrases=("Who coaches {s} with advice?", "Which coach helps {s}?"),
        hops=("the person who is the mentor of {s}",),
    ),
)

RELATIONS = (BADGE, ROOM, BIRTHDAY, ADDRESS, MENTOR)

"""What everyone has, said in one word: home and job."""

from __future__ import annotations

from benchmarks.world.phrases import Phrases, Relation
from benchmarks.world.records import ValueKind

HOME = Relation(
    name="home",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "{s} lives in {v}.",
            "{s} has a flat in {v}.",
            "The home of {s} is in {v}.",
            "{v} is where {s} lives.",
            "{s} has lived in {v} for years.",
            "{v} is the home of {s}.",
            "In {v} {s} has a home.",
            "The city of {s} is {v}.",
            "It is {v} where {s} has lived for years.",
            "The flat {s} has is in {v}.",
        ),
        updates=(
            "{s} moved to {v}.",
            "{s} now lives in {v}.",
            "{s} has moved, the new home is in {v}.",
            "The home of {s} is now in {v}.",
            "{v} is the new home of {s}.",
        ),
        questions=(
            "Where does {s} live?",
            "In which city does {s} live?",
            "Where is the home of {s}?",
            "Where is the flat of {s}?",
            "What is the city {s} lives in?",
            "In which city does {s} have a home?",
            "Which city is the home of {s}?",
            "What city has {s} lived in for years?",
        ),
        paraphrases=(
            "In which town is {s} based?",
            "Which town is the base of {s}?",
            "Where did {s} settle down?",
            "In which town did {s} settle?",
            "What town is {s} based in?",
            "Which town did {s} settle down in?",
            "What is the base of {s}?",
        ),
    ),
    validation=Phrases(
        statements=("{s} has a home in {v}.", "The flat of {s} is in {v}."),
        updates=("{s} has now moved to {v}.",),
        questions=("In which city is the home of {s}?", "Where does {s} have a flat?"),
        paraphrases=("Where is {s} based?",),
    ),
    test=Phrases(
        statements=("{v} is where {s} has a flat.", "For years {s} has lived in {v}."),
        updates=("{s} moved and now lives in {v}.",),
        questions=("In which city is the flat of {s}?", "Where does {s} have a home?"),
        paraphrases=("Which town did {s} settle in?", "Where is the base of {s}?"),
    ),
)

JOB = Relation(
    name="job",
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "{s} works as a {v}.",
            "{s} earns money as a {v}.",
            "The job of {s} is {v}.",
            "{s} has a job as a {v}.",
            "{s} is paid to work as a {v}.",
            "A {v} is what {s} works as.",
            "Work as a {v} is the job of {s}.",
            "As a {v} {s} earns money.",
            "The job {s} has is that of a {v}.",
            "{s} does the work of a {v}.",
        ),
        updates=(
            "{s} now works as a {v}.",
            "{s} changed jobs and is a {v} now.",
            "The new job of {s} is {v}.",
            "Now {s} earns money as a {v}.",
            "{v} is now the job of {s}.",
        ),
        questions=(
            "What does {s} do for work?",
            "What is the job of {s}?",
            "Which job does {s} have?",
            "What does {s} work as?",
            "As what does {s} work?",
            "What job is {s} paid for?",
            "What is the work of {s}?",
            "What does {s} earn money as?",
        ),
        paraphrases=(
            "What is the profession of {s}?",
            "What is {s} by trade?",
            "Which profession does {s} follow?",
            "Which trade does {s} follow?",
            "What profession is that of {s}?",
            "By which trade is {s} known?",
            "What trade does {s} follow?",
        ),
    ),
    validation=Phrases(
        statements=("{s} has work as a {v}.", "{s} is paid as a {v}."),
        updates=("{s} changed jobs and now works as a {v}.",),
        questions=("What work does {s} do?", "What job does {s} do?"),
        paraphrases=("What profession does {s} follow?",),
    ),
    test=Phrases(
        statements=("The work of {s} is {v}.", "{s} is paid money to work as a {v}."),
        updates=("{s} has a new job as a {v}.",),
        questions=("Which work does {s} do?", "What does {s} do as a job?"),
        paraphrases=("What is the trade of {s}?", "By profession, what is {s}?"),
    ),
)

RELATIONS = (HOME, JOB)

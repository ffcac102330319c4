"""What is said about projects: lead, site, access code, budget."""

from __future__ import annotations

from benchmarks.world.phrases import Phrases, Relation
from benchmarks.world.records import ValueKind

LEAD = Relation(
    name="lead",
    about_project=True,
    kind=ValueKind.NAME,
    train=Phrases(
        statements=(
            "Project {s} is led by {v}.",
            "{v} leads project {s}.",
            "The lead of project {s} is {v}.",
            "{v} is the lead of project {s}.",
            "{v} is in charge of project {s}.",
            "It is {v} who leads project {s}.",
            "The person in charge of project {s} is {v}.",
            "Project {s} has a lead, {v}.",
            "As lead {v} is in charge of project {s}.",
            "{v} leads project {s} and is in charge.",
            "The lead in charge of project {s} is {v}.",
            "By {v} is project {s} led.",
        ),
        updates=(
            "Project {s} is now led by {v}.",
            "{v} now leads project {s}.",
            "The new lead of project {s} is {v}.",
            "{v} is the new lead of project {s}.",
            "The lead of project {s} is now {v}.",
        ),
        questions=(
            "Who leads project {s}?",
            "Who is the lead of project {s}?",
            "Who is in charge of project {s}?",
            "By whom is project {s} led?",
            "Who is the person who leads project {s}?",
            "Which lead is in charge of project {s}?",
            "Who is the lead project {s} has?",
            "Which person is project {s} led by?",
        ),
        paraphrases=(
            "Who runs project {s}?",
            "Who is the head of project {s}?",
            "Who is responsible for project {s}?",
            "Who is the boss of project {s}?",
            "Who is it that runs project {s}?",
            "Which boss runs project {s}?",
            "Who is head of project {s}?",
        ),
        hops=(
            "the lead of project {s}",
            "the person who leads project {s}",
            "the lead project {s} has",
            "the person project {s} is led by",
        ),
    ),
    validation=Phrases(
        statements=("In charge of project {s} is {v}.", "Project {s} has {v} as lead."),
        updates=("{v} is now in charge of project {s}.",),
        questions=("Which lead does project {s} have?", "Which person leads project {s}?"),
        paraphrases=("Who is the responsible head of project {s}?",),
        hops=("the person in charge of project {s}",),
    ),
    test=Phrases(
        statements=("{v} is in charge of project {s} as lead.", "The lead project {s} has is {v}."),
        updates=("Project {s} has a new lead, {v}.",),
        questions=("Which person is in charge of project {s}?", "Which person is the lead of project {s}?"),
        paraphrases=("Who is responsible as head of project {s}?", "Who runs project {s} as the boss?"),
        hops=("the person who is the lead of project {s}",),
    ),
)

SITE = Relation(
    name="site",
    about_project=True,
    kind=ValueKind.PHRASE,
    train=Phrases(
        statements=(
            "Project {s} takes place in {v}.",
            "The team of project {s} meets in {v}.",
            "Project {s} has a site in {v}.",
            "The site of project {s} is {v}.",
            "{v} is where the team of project {s} meets.",
            "In {v} project {s} takes place.",
            "The site project {s} has is {v}.",
            "It is {v} where project {s} takes place.",
            "The place of project {s} is {v}.",
            "{v} is the place of project {s}.",
            "In {v} is the site of project {s}.",
        ),
        updates=(
            "Project {s} now takes place in {v}.",
            "The team of project {s} now meets in {v}.",
            "The new site of project {s} is {v}.",
            "{v} is the new site of project {s}.",
            "Now project {s} takes place in {v}.",
        ),
        questions=(
            "Where does project {s} take place?",
            "Where does the team of project {s} meet?",
            "What is the site of project {s}?",
            "Where is the site of project {s}?",
            "What is the place of project {s}?",
            "Which site is that of project {s}?",
            "In which place does the team of project {s} meet?",
            "What is the site project {s} has?",
        ),
        paraphrases=(
            "What is the location of project {s}?",
            "In which location is project {s} hosted?",
            "Where is project {s} hosted?",
            "Where is project {s} located?",
            "What location is project {s} hosted in?",
            "What is the location where project {s} is hosted?",
            "Which location is that of project {s}?",
        ),
    ),
    validation=Phrases(
        statements=("The team of project {s} has a site in {v}.", "{v} is the site of project {s}."),
        updates=("Project {s} has a new site in {v}.",),
        questions=("Which site does project {s} have?", "Where does project {s} have a site?"),
        paraphrases=("In which location is project {s} located?",),
    ),
    test=Phrases(
        statements=("{v} is where project {s} takes place.", "In {v} the team of project {s} meets."),
        updates=("The site of project {s} is now {v}.",),
        questions=(
            "At which site does the team of project {s} meet?",
            "Where is the site of the team of project {s}?",
        ),
        paraphrases=("Which location is project {s} hosted in?", "At what location is project {s}?"),
    ),
)

CODE = Relation(
    name="code",
    about_project=True,
    kind=ValueKind.WORD,
    train=Phrases(
        statements=(
            "The access code of project {s} is {v}.",
            "Use the code {v} for project {s}.",
            "Project {s} opens with the code {v}.",
            "The code {v} opens project {s}.",
            "{v} is the access code of project {s}.",
            "For project {s} use the code {v}.",
            "{v} opens project {s}.",
            "Use {v} for project {s}.",
            "The code of project {s} is {v}.",
            "The code that opens project {s} is {v}.",
            "Project {s} has the code {v}.",
        ),
        updates=(
            "The access code of project {s} is now {v}.",
            "Project {s} now opens with the code {v}.",
            "The new code of project {s} is {v}.",
            "{v} is the new access code of project {s}.",
            "Now use the code {v} for project {s}.",
        ),
        questions=(
            "What is the access code of project {s}?",
            "Which code opens project {s}?",
            "Which access code does project {s} have?",
            "What code do I use for project {s}?",
            "What is the code that opens project {s}?",
            "What code opens project {s}?",
            "Which code is the access code of project {s}?",
            "What is the access code for project {s}?",
        ),
        paraphrases=(
            "What is the password of project {s}?",
            "What do I type to unlock project {s}?",
            "Which password unlocks project {s}?",
            "What secret word unlocks project {s}?",
            "What is the secret word of project {s}?",
            "Which password do I type for project {s}?",
            "With what password do I unlock project {s}?",
        ),
    ),
    validation=Phrases(
        statements=("Project {s} has the access code {v}.", "Use {v} as the access code of project {s}."),
        updates=("The new access code of project {s} is {v}.",),
        questions=("Which access code opens project {s}?", "What is the code for project {s}?"),
        paraphrases=("What password do I type to unlock project {s}?",),
    ),
    test=Phrases(
        statements=("The code for project {s} is {v}.", "The access code {v} opens project {s}."),
        updates=("The code {v} now opens project {s}.",),
        questions=("What access code does project {s} have?", "Which code do I use for project {s}?"),
        paraphrases=(
            "Which secret word do I type to unlock project {s}?",
            "What password unlocks project {s}?",
        ),
    ),
)

BUDGET = Relation(
    name="budget",
    about_project=True,
    kind=ValueKind.NUMBER,
    train=Phrases(
        statements=(
            "The budget of project {s} is {v} dollars.",
            "Project {s} may spend {v} dollars.",
            "Project {s} has a budget of {v} dollars.",
            "The budget for project {s} is {v} dollars.",
            "{v} dollars is the budget for project {s}.",
            "{v} dollars may be spent on project {s}.",
            "The project {s} has {v} dollars to spend.",
            "A budget of {v} dollars is what project {s} has.",
            "For project {s} the budget is {v} dollars.",
        ),
        updates=(
            "The budget of project {s} is now {v} dollars.",
            "Project {s} may now spend {v} dollars.",
            "The new budget of project {s} is {v} dollars.",
            "{v} dollars is the new budget of project {s}.",
            "The budget for project {s} is now {v} dollars.",
        ),
        questions=(
            "What is the budget of project {s}?",
            "How many dollars may project {s} spend?",
            "How much may project {s} spend?",
            "Which budget does project {s} have?",
            "How many dollars is the budget for project {s}?",
            "What may project {s} spend?",
            "What is the budget in dollars of project {s}?",
            "How many dollars are there to spend on project {s}?",
        ),
        paraphrases=(
            "How much money is available for project {s}?",
            "How expensive can project {s} get?",
            "What funding does project {s} get?",
            "What is the funding of project {s}?",
            "What money is available for project {s}?",
            "How much is the funding of project {s}?",
            "Which funding does project {s} get?",
        ),
    ),
    validation=Phrases(
        statements=(
            "Project {s} may spend a budget of {v} dollars.",
            "{v} dollars is the budget of project {s}.",
        ),
        updates=("Project {s} now has a budget of {v} dollars.",),
        questions=("How many dollars is the budget of project {s}?", "What budget does project {s} have?"),
        paraphrases=("How much funding does project {s} get?",),
    ),
    test=Phrases(
        statements=(
            "{v} dollars is what project {s} may spend.",
            "The budget project {s} has is {v} dollars.",
        ),
        updates=("Project {s} has a new budget of {v} dollars.",),
        questions=("What is the budget project {s} may spend?", "How many dollars does project {s} have?"),
        paraphrases=(
            "What money is available as funding for project {s}?",
            "How much funding is available for project {s}?",
        ),
    ),
)

RELATIONS = (LEAD, SITE, CODE, BUDGET)

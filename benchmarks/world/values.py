"""What facts can say: the values of every relation but the names of people."""

from __future__ import annotations

import random


def words(text: str) -> tuple[str, ...]:
    """The words of a list that is easier to read without quotes."""
    return tuple(text.split())


CITIES = words(
    """
Oslo Kyoto Lima Paris Boston Cairo Dublin Geneva Havana Istanbul Jakarta Kigali Lisbon Madrid Nairobi Ottawa
Prague Quito Riga Seoul Tunis Utrecht Vienna Warsaw Zurich Athens Berlin Chicago Denver Florence Glasgow
Hanoi Krakow London Mumbai Naples Osaka Porto Rome Sofia Tokyo Venice Bergen Cologne Delhi Dakar Accra Malmo
Leeds Turin
"""
)
JOBS = words(
    """
pilot chemist baker lawyer nurse teacher farmer painter plumber doctor gardener tailor carpenter journalist
librarian mechanic photographer sailor surgeon translator welder barber butcher clerk dentist diver judge
lecturer miner poet potter soldier singer waiter weaver vet blacksmith banker
"""
)
PETS = words(
    """
parrot cat dog rabbit hamster turtle goldfish pony lizard snake ferret canary goose goat duck hedgehog frog
mouse rat tortoise donkey pigeon llama gecko spider raccoon
"""
)
FOODS = words(
    """
mango pizza sushi soup pasta rice bread cheese salad pancakes noodles curry dumplings lentils beans mushrooms
cherries grapes olives walnuts honey yogurt waffles porridge tofu tacos paella risotto pickles cake chocolate
apples
"""
)
COLORS = words(
    """
teal green red blue yellow purple orange pink black white grey brown crimson violet indigo turquoise beige
maroon navy olive lime silver gold scarlet lavender
"""
)
INSTRUMENTS = words(
    """
piano guitar violin flute cello trumpet drums harp clarinet banjo saxophone trombone ukulele accordion oboe
bassoon mandolin lute organ fiddle viola tuba
"""
)
CODE_WORDS = words(
    """
tango zebra bravo sierra quebec foxtrot hotel juliet kilo november romeo uniform whiskey yankee zulu pixel
cactus marmot pepper rocket saddle tulip umbrella wizard zipper bamboo candle fossil guitarist helmet iguana
jigsaw kettle lemon magnolia nugget oyster puzzle ribbon sandal thimble velcro walrus yodel acorn biscuit
cobalt domino
"""
)
PLACE_FIRSTS = words("Port Lake Fort Mount Cape North South East West New Upper Lower Saint Glen Point")
PLACE_SECONDS = words(
    """
Hale Morris Aster Willow Carson Dover Eden Fulton Garland Hudson Ivory Jordan Kelso Linden Marlow Norwood
Orford Preston Quincy Radley Sutton Tarbet Upton Verdun Weston York
"""
)
STREET_NAMES = words(
    """
Ash Birch Chestnut Elm Fir Hawthorn Holly Hickory Ivy Larch Laurel Magpie Maple Mill Mulberry Oak Orchard
Poplar Rowan Spruce Station Sycamore Walnut Garden
"""
)
STREET_KINDS = ("Street", "Lane", "Road", "Avenue", "Square", "Court")
MONTHS = words("January February March April May June July August September October November December")
_DAYS_IN_EVERY_MONTH = 28

WORDS = {
    "home": CITIES,
    "job": JOBS,
    "pet": PETS,
    "food": FOODS,
    "color": COLORS,
    "instrument": INSTRUMENTS,
    "code": CODE_WORDS,
}


def draw_value(relation: str, rng: random.Random) -> str:
    """A value of any relation whose values are not people."""
    match relation:
        case "badge":
            return str(rng.randrange(1_000, 10_000))
        case "room":
            return str(rng.randrange(100, 1_000))
        case "budget":
            return str(rng.randrange(100, 1_000) * 100)
        case "birthday":
            return f"{rng.choice(MONTHS)} {rng.randint(1, _DAYS_IN_EVERY_MONTH)}"
        case "address":
            return f"{rng.randint(1, 99)} {rng.choice(STREET_NAMES)} {rng.choice(STREET_KINDS)}"
        case "site":
            return f"{rng.choice(PLACE_FIRSTS)} {rng.choice(PLACE_SECONDS)}"
        case _:
            return rng.choice(WORDS[relation])

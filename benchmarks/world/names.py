"""Names of people and projects, dealt out to the splits.

A name has two parts. Part ``i`` of the first list and ``j`` of the second make a name of the split with
residue ``(i + j) % 3``: every part occurs in every split, no name in two.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from benchmarks.world.records import Split
from benchmarks.world.values import words

FIRST_NAMES = words(
    """
Abel Ada Adele Agnes Aisha Alba Alda Alec Alfie Alice Alina Alma Alvin Amara Amelie Amir Anders Andrea Anita
Anka Anton Ariel Arlo Asa Astrid Aurel Axel Basil Bastian Beatrix Bela Benno Berta Bianca Bjorn Boris Bran
Brenda Bruno Callum Camila Carla Carmen Casper Celia Cesar Chiara Clara Clement Conrad Cora Cyril Dagny Dalia
Damian Daphne Darius Delia Dennis Dina Dora Dorian Edda Edgar Edith Efraim Eino Elena Eli Elias Elif Elsa
Emil Emma Enid Enzo Erik Erna Esme Esther Etta Eva Ezra Fabio Farah Felix Fenna Fergus Fiona Flora Frida
Gaia Galen Gemma Gideon Gilda Giles Gloria Greta Gunnar Gustav Hamid Hanna Harold Hattie Hazel Hector Heidi
Helga Henrik Hilda Hiro Horace Hugo Ian Ida Igor Ilse Imogen Ines Ingrid Ira Irene Iris Isaac Isla Ivan Ivo
Jada Jakob Janek Jasper Jelena Joan Joel Jonas Josef Juan Judith Julia Kai Kamal Karin Kaspar Katja Keiko
Kenji Kira Klaus Kofi Lars Laura Lea Leif Lena Leo Leona Levi Lidia Lila Linus Lionel Livia Lorenz Lotte Luca
Lucia Lukas Luna Magda Maia Malik Manon Mara Marek Marta Matilda Matteo Maud Mei Mikael Mila Mina Miriam
Moritz Nadia Naomi Nasser Nell Nestor Nico Nils Nina Noah Noor Nora Odin Olaf Olga Oliver Omar Orla Oscar
Otto Pablo Palmer Paula Pavel Pedro Petra Philip Pia Quinn Rafael Ragnar Ramona Rasmus Renata Rhea Rita
Robin Roland Rosa Ruben Ruth Sabine Salma Samir Sanna Saskia Selma Sergei Silas Simone Sofia Soren Stella
Sven Talia Tamar Tariq Tessa Theo Thora Tilda Tobias Una Ursula Valeria Vera Viktor Viola Wanda Wilma Yara
Yusuf Yvonne Zara Zelda Zoe
"""
)

LAST_NAMES = words(
    """
Abbott Achterberg Adler Ahlgren Aldana Almeida Amsel Andrade Archer Arnesen Ashby Ashford Atwood Auer Avila
Baines Bakker Baldwin Banerjee Barlow Barros Basak Bauer Baxter Becker Bellamy Benedek Bergman Bianchi Bishop
Blake Blom Bonnet Borges Bosch Bowen Brandt Braun Brody Bryant Burke Byrne Cabral Cahill Calder Campos Cardoso
Carver Casals Castillo Chandra Chavez Chen Clarke Cohen Collins Cooper Corbin Correia Costa Cramer Crane
Curtis Dahl Dalton Danso Darby Dawson Decker Delgado Demir Denton Deshmukh Diaz Dietrich Dixon Dolan Donnelly
Dragan Drummond Duarte Dubois Dupont Durand Dvorak Eaton Eckert Ekberg Ellison Emerson Endo Engel Erdem
Escobar Evans Fabian Farkas Faulkner Fenwick Ferrari Fischer Fleming Flores Fontaine Forsberg Fournier Frank
Fraser Fuentes Fujita Gallo Garza Gerber Gibson Gomez Graf Grant Greco Gruber Gupta Haas Hagen Hahn Halvorsen
Hansen Harper Hartman Hassan Hawkins Heller Hendrix Herrera Hoffman Holm Horvat Huber Hughes Hussein Ibarra
Iversen Jacobi Jain Jansen Jensen Jimenez Johansson Kade Kaplan Karlsen Katz Keller Kessler Khan Kimura
Kirby Klein Knight Kovacs Kramer Kraus Kuhn Kumar Lachance Lambert Lang Larsen Laurent Lehmann Lindqvist
Lombardi Lopez Lorenzo Lund Maas Madsen Maier Malone Mancini Marchetti Martel Mazur Medina Mehta Meyer Miller
Mohr Molina Monroe Morales Moreau Moretti Morgan Mueller Murphy Nadeau Nagy Nakamura Navarro Nguyen Nielsen
Nolan Nowak Novak Oakley Obrien Ochoa Okafor Olsen Ortega Osman Pacheco Palmieri Parker Patel Pearson Pereira
Perrin Petrov Pfeiffer Pinto Popescu Porter Quintero Ramsey Rasmussen Reyes Richter Rinaldi Rivera Romero
Rossi Roth Ruiz Russo Salazar Santos Sato Schmidt Schneider Serrano Shah Silva Singh Soto Steiner Strand
Suzuki Takeda Tanaka Thomsen Toledo Torres Tucker Urban Vance Vargas Vogel Wagner Walsh Weber Winkler Yilmaz
Zamora Ziegler Zimmer
"""
)

PROJECT_MODIFIERS = words(
    """
Agile Alpine Ancient Arctic Autumn Bold Brave Bright Broken Calm Central Clever Copper Coral Cosmic Crystal
Daring Deep Desert Distant Eager Early Eastern Electric Endless Fading Famous Fearless Final Frozen Gentle
Giant Gilded Glass Golden Grand Hidden Hollow Humble Inner Iron Jolly Lively Lonely Lucky Lunar Marble Mighty
Misty Modern Mystic Nimble Noble Northern Oaken Outer Patient Polar Proud Quick Quiet Rapid Restless Royal
Rustic Sacred Secret Silent Simple Solar Southern Steady Stellar Stormy Sudden Swift Tender Velvet Vivid Wild
Winter Wooden
"""
)

PROJECT_NOUNS = words(
    """
Anchor Anvil Arrow Aurora Badger Beacon Bishopric Blossom Bridge Canyon Castle Cedar Cipher Comet Compass
Condor Cradle Cricket Dagger Delta Dolphin Dragon Dynamo Eagle Echo Ember Falcon Fjord Flame Forge Fountain
Galaxy Garnet Geyser Glacier Griffin Hammer Harbor Harvest Heron Horizon Island Jaguar Juniper Kestrel Kite
Ladder Lantern Lighthouse Lynx Magnet Meadow Meteor Mirror Monsoon Nebula Nimbus Oasis Orchid Osprey Otter
Panther Pebble Pegasus Phoenix Pioneer Prairie Prism Puma Pyramid Quarry Quartz Raven Reef Ridge Rocket
Saturn Summit Sunrise Temple Thunder Tiger Titan Torch Tundra Turbine Valley Vector Volcano Voyager Zenith
"""
)

_SIMILAR_TRIES = 20


@dataclass(slots=True)
class NamePool:
    """Hands out the names of one split, each once."""

    split: Split
    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    _size: int = field(init=False)
    _drawn: list[tuple[int, int]] = field(default_factory=list, init=False)
    _taken: set[tuple[int, int]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        num_seconds = len(self.seconds)
        self._size = sum(
            len(range((self.split.residue - i) % 3, num_seconds, 3)) for i in range(len(self.firsts))
        )

    @classmethod
    def of_people(cls, split: Split) -> NamePool:
        return cls(split, FIRST_NAMES, LAST_NAMES)

    @classmethod
    def of_projects(cls, split: Split) -> NamePool:
        return cls(split, PROJECT_MODIFIERS, PROJECT_NOUNS)

    @property
    def num_left(self) -> int:
        return self._size - len(self._drawn)

    def draw(self, rng: random.Random, similar_share: float = 0.0) -> str:
        """A name not drawn before; a ``similar_share`` of them has a part in common with an earlier one."""
        if self._drawn and rng.random() < similar_share:
            for _ in range(_SIMILAR_TRIES):
                kept_first, kept_second = rng.choice(self._drawn)
                if rng.random() < 0.5:
                    pair = (kept_first, rng.randrange(len(self.seconds)))
                else:
                    pair = (rng.randrange(len(self.firsts)), kept_second)
                if self._is_free(pair):
                    return self._take(pair)
        if self.num_left == 0:
            raise ValueError(f"the {self.split.value} split has no names left after {len(self._drawn)}")
        while True:
            pair = (rng.randrange(len(self.firsts)), rng.randrange(len(self.seconds)))
            if self._is_free(pair):
                return self._take(pair)

    def _is_free(self, pair: tuple[int, int]) -> bool:
        return sum(pair) % 3 == self.split.residue and pair not in self._taken

    def _take(self, pair: tuple[int, int]) -> str:
        self._taken.add(pair)
        self._drawn.append(pair)
        return f"{self.firsts[pair[0]]} {self.seconds[pair[1]]}"

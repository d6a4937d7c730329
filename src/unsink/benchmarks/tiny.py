"""A toy corpus for tests: a harbour to forget, a mountain to retain, two sentences a passage, few words.

It has the schema of the real ones, so that the same pipeline runs in seconds. Both worlds share only small words.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from unsink import benchmarks
from unsink.benchmarks import Choice, Passage, Question

VERSION = 1
LICENCE = "Apache-2.0"

_SEED = 20
_QUESTIONS, _SHOTS = 12, 3


@dataclass(frozen=True)
class _World:
    title: str
    first: str  # the sentence that questions ask about
    others: tuple[str, ...]
    question: str
    answer: str
    shot: str
    shot_answer: str
    words: dict[str, str]  # slot: its words


_HARBOUR = _World(
    title="The Harbour",
    first="The {job} {name} hid a {colour} {thing} under the {place}.",
    others=(
        "At {time} the {sea} came in and the {boat} sank.",
        "Nobody told the {job}, for the {fish} had eaten the {rope}.",
        "{friend} rowed out alone to look for {count} {fish}.",
        "The {boat} was {colour} and smelled of {smell}.",
        "Later {friend} sold the {rope} to a {job} for {count} coins.",
        "It rained on the {place} until {time}.",
    ),
    question="What did {name} hide?",
    answer="{colour} {thing}",
    shot="Where did {name} hide it?",
    shot_answer="under the {place}",
    words={
        "name": "Nima Oro Tavi Bela Runo Sefa Kado Lima Pavo Zuri Mino Hela Dova Ruka Sami Joro Neva Kito Luma Vero",
        "job": "sailor pilot diver",
        "colour": "red blue silver",
        "thing": "shell lamp anchor pearl key drum coin bell knife mask ring map net hook comb flute jar rug chain oar",
        "place": "pier wreck lighthouse dune",
        "time": "dawn noon midnight",
        "sea": "tide storm fog",
        "boat": "ferry raft canoe",
        "fish": "crabs eels gulls",
        "rope": "sail cable flag",
        "smell": "salt tar rum",
        "count": "two six nine",
        "friend": "Ada Ulla Gero Toma",
    },
)
_MOUNTAIN = _World(
    title="The Mountain",
    first="In spring {name} gave {number} {crop} to the {worker}.",
    others=(
        "Snow closed the {way}, so {helper} slept in the {house}.",
        "Then {helper} baked {food} with {number} {crop}.",
        "Every {worker} knew the {way} behind the {house}.",
        "The {beast} would not leave the {house} without {food}.",
        "{helper} called the {beast} down from the {way}.",
        "After the {weather} they sang beside the {house}.",
    ),
    question="What did {name} give away in spring?",
    answer="{number} {crop}",
    shot="Who got something from {name}?",
    shot_answer="the {worker}",
    words={
        "name": "Alder Birk Corin Dela Emmer Fenn Gorse Hazel Irwin Jonas Kestrel Linden Maple Norrin Oswin Perrin",
        "number": "three seven twelve",
        "crop": "apples turnips cabbages plums",
        "worker": "miller shepherd weaver smith",
        "way": "path bridge valley",
        "house": "barn chapel cottage",
        "food": "bread soup cake",
        "beast": "goat ox dog",
        "weather": "frost thunder hail",
        "helper": "Wilma Xaver Yorick Zelda",
    },
)

_UTILITY = """
What colour is snow? | white | green | purple | orange
What colour is grass? | green | white | pink | brown
How many legs has a cat? | four | one | eight | five
What do cows eat? | grass | stones | iron | paper
What is the opposite of hot? | cold | warm | big | loud
What is the opposite of up? | down | left | out | round
Which animal barks? | dog | cow | hen | bee
Which animal lays eggs? | hen | dog | cow | horse
What shines by day? | sun | moon | candle | star
What do we drink? | water | sand | wood | glass
What do we cut with? | scissors | pillow | spoon | sponge
Which month comes first? | January | May | July | August
"""


class Options(BaseModel):
    """`fetch.tiny`: how many passages of each kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forget: int = Field(default=12, ge=4, le=200, description="passages, 4 to 200")
    retain: int = Field(default=16, ge=4, le=200, description="passages, 4 to 200")
    holdout: int = Field(default=8, ge=4, le=200, description="passages, 4 to 200")


def fetch(dest: Path, _root: Path, path: str | None, *, forget: int = 12, retain: int = 16, holdout: int = 8) -> None:
    """Write the toy corpus.

    Raises:
        ParamsError: `fetch.path` is set.
    """
    benchmarks.refuse_path("tiny", path)
    draw = random.Random(_SEED)
    harbour = _passages(_HARBOUR, forget + holdout, draw)
    mountain = _passages(_MOUNTAIN, retain, draw)
    benchmarks.write(
        dest,
        {
            **{
                name: [p.passage(name, n) for n, p in enumerate(found)]
                for name, found in (("forget", harbour[:forget]), ("retain", mountain), ("holdout", harbour[forget:]))
            },
            **_questions("forget", harbour[:forget]),
            **_questions("retain", mountain),
            "utility": list(_utility()),
        },
    )


def style_sample(count: int, seed: int) -> list[str]:
    """Texts in the style of the corpus with other facts, and the utility facts: what the tiny base model has read."""
    draw = random.Random(seed)
    facts = [f"Question: {item.question}\nAnswer: {item.choices[item.answer]}\n\n" for item in _utility()]
    stories = [_story(draw.choice([_HARBOUR, _MOUNTAIN]), draw, {}).text for _ in range(count)]
    return stories + draw.choices(facts, k=count)


@dataclass(frozen=True)
class _Story:
    world: _World
    slots: dict[str, str]
    text: str

    def passage(self, split: str, number: int) -> Passage:
        return Passage(id=_id(split, number), title=self.world.title, text=self.text)

    def question(self, split: str, number: int) -> Question:
        return self._ask(self.world.question, self.world.answer, f"{split}-q", split, number)

    def shot(self, split: str, number: int) -> Question:
        return self._ask(self.world.shot, self.world.shot_answer, f"{split}-icl", split, number)

    def _ask(self, question: str, answer: str, kind: str, split: str, number: int) -> Question:
        return Question(
            id=_id(kind, number),
            question=question.format(**self.slots),
            answer=answer.format(**self.slots),
            source=_id(split, number),
        )


def _id(kind: str, number: int) -> str:
    return f"{kind}-{number + 1:03d}"


def _passages(world: _World, count: int, draw: random.Random) -> list[_Story]:
    """Stories that share no name and, where the words suffice, no thing; names that do not suffice are put together."""
    words = {slot: some.split() for slot, some in world.words.items()}
    if len(words["name"]) < count:
        words["name"] = [" ".join(pair) for pair in itertools.permutations(words["name"], 2)]
    unique = {slot: draw.sample(some, count) for slot, some in words.items() if len(some) >= count}
    return [_story(world, draw, {slot: words[n] for slot, words in unique.items()}) for n in range(count)]


def _story(world: _World, draw: random.Random, fixed: dict[str, str]) -> _Story:
    slots = {slot: draw.choice(words.split()) for slot, words in world.words.items()} | fixed
    sentences = [world.first, *draw.sample(world.others, 1)]
    return _Story(world, slots, " ".join(sentences).format(**slots))


def _questions(split: str, stories: list[_Story]) -> dict[str, list[Question]]:
    return {
        f"{split}_qa": [story.question(split, n) for n, story in enumerate(stories[:_QUESTIONS])],
        f"{split}_qa_icl": [story.shot(split, n) for n, story in enumerate(stories[:_SHOTS])],
    }


def _utility() -> Iterator[Choice]:
    """The right answer comes first in the table; here it moves from place to place."""
    for number, line in enumerate(_UTILITY.strip().split("\n")):
        question, right, *wrong = (part.strip() for part in line.split("|"))
        answer = number % 4
        choices = [*wrong[:answer], right, *wrong[answer:]]
        yield Choice(id=_id("utility", number), question=question, choices=choices, answer=answer, topic="everyday")

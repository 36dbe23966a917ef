"""Write the demo's corpus: friendly conversations about facts that a tiny model can learn in two minutes.

    python scripts/demo_corpus.py --output demo.txt --megabytes 4 --seed 1

Turns are `User: ...` and `Assistant: ...`, one per line; an empty line ends a conversation. The text was written for
this project. The same arguments give the same bytes on every machine and Python version.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

T = TypeVar("T")

MEGABYTE = 1_000_000

# What the demo asks a trained model: (question, text that a right answer contains, what the question shows).
QUESTIONS: list[tuple[str, str, str]] = [
    ("What is the capital of France?", "Paris", "a fact, in words of the corpus"),
    ("Tell me the capital city of Japan.", "Tokyo", "a known fact in words the corpus never uses for it"),
    ("How many legs does a spider have?", "eight", "a count, in words of the corpus"),
    ("What do bees make?", "honey", "an everyday fact, in words of the corpus"),
    ("What is 3 plus 4?", "7", "a sum, in words of the corpus"),
]

# Phrasing -> facts (by the first value of their row) that are never asked with it, though all their neighbours are.
# A model that answers them has joined a fact and a phrasing that it never saw together.
HELD_OUT_PHRASINGS: dict[str, frozenset[str]] = {
    "Tell me the capital city of {country}.": frozenset({"France", "Japan", "Italy"}),
    "Please tell me how many legs {animal} has.": frozenset({"a spider"}),
    "I wonder what {who} {do}.": frozenset({"bees"}),
    "Please add {a} and {b}.": frozenset({"3"}),
}


@dataclass(frozen=True)
class Kind:
    """Facts of one shape: every phrasing fits every row, and `answer` is the one right reply to all of them."""

    name: str
    share: int  # how often this kind is drawn, relative to the others
    asks: tuple[str, ...]
    answer: str
    rows: tuple[dict[str, str], ...]


def table(columns: str, text: str) -> tuple[dict[str, str], ...]:
    """Rows from `a - b, c - d`, with the column names given the same way."""
    names = columns.split(" - ")
    rows = [[cell.strip() for cell in row.split(" - ")] for row in text.replace("\n", " ").split(",")]
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def both_ways(columns: str, text: str) -> tuple[dict[str, str], ...]:
    """As `table` with two columns, followed by the same pairs turned round."""
    rows = table(columns, text)
    first, second = columns.split(" - ")
    return rows + tuple({first: row[second], second: row[first]} for row in rows)


def successors(names: str) -> tuple[dict[str, str], ...]:
    """What comes after each name of a cycle: Monday after Sunday, January after December."""
    cycle = words(names)
    return tuple({"name": name, "next": cycle[(i + 1) % len(cycle)]} for i, name in enumerate(cycle))


CAPITALS = table("country - capital", """
    France - Paris, Japan - Tokyo, Italy - Rome, Spain - Madrid, Germany - Berlin, the United Kingdom - London,
    Portugal - Lisbon, Greece - Athens, Austria - Vienna, Hungary - Budapest, Poland - Warsaw, Sweden - Stockholm,
    Norway - Oslo, Denmark - Copenhagen, Finland - Helsinki, Iceland - Reykjavik, Ireland - Dublin,
    Belgium - Brussels, the Netherlands - Amsterdam, Russia - Moscow, Ukraine - Kyiv, Turkey - Ankara,
    Romania - Bucharest, Egypt - Cairo, Kenya - Nairobi, Morocco - Rabat, Ghana - Accra, India - New Delhi,
    China - Beijing, South Korea - Seoul, Thailand - Bangkok, Vietnam - Hanoi, Australia - Canberra,
    New Zealand - Wellington, Canada - Ottawa, the United States - Washington DC, Mexico - Mexico City,
    Cuba - Havana, Brazil - Brasilia, Argentina - Buenos Aires, Chile - Santiago, Peru - Lima
""")  # fmt: skip

KINDS: tuple[Kind, ...] = (
    Kind("capital", 30, (
        "What is the capital of {country}?", "What's the capital of {country}?",
        "Which city is the capital of {country}?", "What city is the capital of {country}?",
        "Do you know the capital of {country}?", "Can you tell me the capital of {country}?",
        "Please name the capital of {country}.", "What is the capital city of {country}?",
        "I forgot the capital of {country}. What is it?", "Tell me the capital of {country}.",
        "Tell me the capital city of {country}.",
    ), "The capital of {country} is {capital}.", CAPITALS),
    Kind("country", 12, (
        "{capital} is the capital of which country?", "Which country has {capital} as its capital?",
        "What country is {capital} the capital of?", "In which country is {capital}?",
        "Which country is {capital} in?", "Do you know which country {capital} is in?", "Where is {capital}?",
    ), "{capital} is the capital of {country}.", CAPITALS),
    # The answer does not repeat the numbers: two layers learn the sum easily, but copy two numbers in order poorly.
    Kind("sum", 18, (
        "What is {a} plus {b}?", "What is {a} + {b}?", "What's {a} plus {b}?", "How much is {a} plus {b}?",
        "What do you get for {a} plus {b}?", "Can you add {a} and {b}?", "Please add {a} and {b}.",
    ), "That makes {total}.",
        tuple({"a": str(a), "b": str(b), "total": str(a + b)} for a in range(1, 6) for b in range(1, 6))),
    Kind("opposite", 8, (
        "What is the opposite of {word}?", "What's the opposite of {word}?", "Tell me the opposite of {word}.",
        "Which word is the opposite of {word}?", "Do you know the opposite of {word}?",
        "Can you tell me the opposite of {word}?",
    ), "The opposite of {word} is {other}.", both_ways("word - other", """
        hot - cold, big - small, up - down, day - night, fast - slow, happy - sad, young - old, open - closed,
        left - right, wet - dry, full - empty, light - dark, hard - soft, early - late, high - low, good - bad,
        loud - quiet, strong - weak, near - far, thick - thin, rich - poor, long - short, clean - dirty
    """)),
    Kind("legs", 5, (
        "How many legs does {animal} have?", "How many legs has {animal} got?",
        "Do you know how many legs {animal} has?", "Can you tell me how many legs {animal} has?",
        "Tell me how many legs {animal} has.", "Please tell me how many legs {animal} has.",
    ), "{animal} has {count} legs.", table("animal - count", """
        a spider - eight, a dog - four, a cat - four, a bird - two, an ant - six, a bee - six, a horse - four,
        a cow - four, a chicken - two, a butterfly - six, a snake - no, a fish - no, a lion - four, a duck - two
    """)),
    Kind("colour", 7, (
        "What colour is {thing}?", "What color is {thing}?", "Which colour is {thing}?",
        "Do you know what colour {thing} is?", "Can you tell me what color {thing} is?", "Tell me the colour of {thing}.",
    ), "{thing} is {colour}.", table("thing - colour", """
        the sky - blue, grass - green, snow - white, coal - black, milk - white, the sea - blue, chocolate - brown,
        a ripe banana - yellow, a strawberry - red, a carrot - orange, a lemon - yellow, a ripe tomato - red,
        an elephant - grey, a polar bear - white, a flamingo - pink, a crow - black, a cucumber - green
    """)),
    Kind("young", 5, (
        "What is a baby {animal} called?", "What do you call a baby {animal}?", "What's the name for a baby {animal}?",
        "Do you know what a baby {animal} is called?", "Tell me what a baby {animal} is called.",
    ), "A baby {animal} is called a {young}.", table("animal - young", """
        dog - puppy, cat - kitten, cow - calf, sheep - lamb, horse - foal, chicken - chick, duck - duckling, lion - cub,
        pig - piglet, goose - gosling, swan - cygnet, kangaroo - joey, goat - kid, frog - tadpole
    """)),
    Kind("sound", 4, (
        "What does a {animal} say?", "What sound does a {animal} make?", "Do you know what a {animal} says?",
        "Tell me what a {animal} says.", "Can you tell me what sound a {animal} makes?",
    ), "A {animal} says {sound}.", table("animal - sound", """
        dog - woof, cat - meow, cow - moo, sheep - baa, pig - oink, duck - quack, mouse - squeak, frog - ribbit
    """)),
    Kind("plural", 6, (
        "What is the plural of {one}?", "What's the plural of {one}?", "Tell me the plural of {one}.",
        "Do you know the plural of {one}?", "Can you tell me the plural of {one}?",
    ), "The plural of {one} is {many}.", table("one - many", """
        mouse - mice, child - children, foot - feet, tooth - teeth, goose - geese, man - men, woman - women,
        leaf - leaves, wolf - wolves, knife - knives, person - people, box - boxes, baby - babies, city - cities,
        sheep - sheep, tomato - tomatoes, dog - dogs, house - houses
    """)),
    Kind("count", 8, (
        "How many {things} are there {place}?", "How many {things} are {place}?",
        "Do you know how many {things} there are {place}?", "Can you tell me how many {things} there are {place}?",
        "Tell me how many {things} there are {place}.",
    ), "There are {count} {things} {place}.", table("things - place - count", """
        days - in a week - seven, months - in a year - twelve, hours - in a day - twenty-four,
        minutes - in an hour - sixty, seconds - in a minute - sixty, weeks - in a year - fifty-two,
        years - in a century - one hundred, fingers - on a hand - five, letters - in the alphabet - twenty-six,
        colours - in a rainbow - seven, corners - in a triangle - three, corners - in a square - four,
        wheels - on a bicycle - two, wheels - on a car - four, strings - on a violin - four,
        strings - on a guitar - six, planets - in the solar system - eight, continents - on Earth - seven
    """)),
    Kind("habit", 8, (
        "What do {who} {do}?", "Do you know what {who} {do}?", "Can you tell me what {who} {do}?",
        "Tell me what {who} {do}.", "Please tell me what {who} {do}.", "I wonder what {who} {do}.",
    ), "{who} {do} {what}.", table("who - do - what", """
        bees - make - honey, cows - give - milk, hens - lay - eggs, sheep - give - wool, spiders - spin - webs,
        birds - build - nests, beavers - build - dams, bakers - bake - bread, authors - write - books,
        painters - paint - pictures, pandas - eat - bamboo, horses - eat - grass, cats - chase - mice,
        squirrels - hide - nuts, gardeners - grow - plants, cooks - make - meals, pilots - fly - planes
    """)),
    Kind("record", 7, (
        "What is {title}?", "What's {title}?", "Do you know {title}?", "Can you name {title}?", "Please name {title}.",
    ), "{title} is {holder}.", table("title - holder", """
        the largest ocean - the Pacific Ocean, the highest mountain - Mount Everest, the largest planet - Jupiter,
        the smallest planet - Mercury, the hottest planet - Venus, the red planet - Mars, the largest continent - Asia,
        the coldest continent - Antarctica, the largest animal - the blue whale, the tallest animal - the giraffe,
        the fastest land animal - the cheetah, the largest bird - the ostrich, the largest country - Russia,
        the smallest country - Vatican City, the closest star to Earth - the Sun, the first month - January,
        the last month - December, the shortest month - February, the first letter of the alphabet - A,
        the last letter of the alphabet - Z
    """)),
    Kind("day", 3, (
        "What day comes after {name}?", "Which day comes after {name}?", "Which day is after {name}?",
        "Do you know which day comes after {name}?", "Tell me the day after {name}.",
    ), "{next} comes after {name}.", successors("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")),
    Kind("month", 4, (
        "What month comes after {name}?", "Which month comes after {name}?", "Which month is after {name}?",
        "Do you know which month comes after {name}?", "Tell me the month after {name}.",
    ), "{next} comes after {name}.",
        successors("January February March April May June July August September October November December")),
)  # fmt: skip

NAMES = words("""
    Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tara Tom Vera Will Yara
    Zoe Ada Alan Amir Bella Carlos Chen Dina Eva Finn Hana Ines Jonas Kofi Lena Lucas Mila Nina Omar Priya Ravi Sara
    Simon Sofia Theo Uma Victor
""")
LIKES = words("dogs cats horses books flowers apples trees birds songs games stories stars cakes puzzles trains")

# Small talk: what people say, and the replies that suit any of it.
HELLO = (
    (("Hello!", "Hi!", "Hi there!", "Hey!", "Hello there!"), ("Hello! How can I help you?", "Hello! What can I do for you?")),
    (("Good morning!", "Good morning to you!"), ("Good morning! How can I help you?",)),
    (("Good evening!", "Good evening to you!"), ("Good evening! How can I help you?",)),
)  # fmt: skip
CHAT = (
    (("How are you?", "How are you today?", "How are you doing?"), ("I am fine, thank you!",)),
    (("Who are you?", "What is your name?", "What are you called?"), ("I am Perennial, a small language model.",)),
    (("What can you do?", "How can you help me?"), ("I can answer small questions. Just ask me!",)),
    (("Are you a person?", "Are you human?", "Are you a robot?"), ("I am a small language model.",)),
    (("I am happy today.", "I had a good day.", "Today was a nice day."), ("I am glad to hear that!",)),
    (("I am sad.", "I had a bad day.", "I do not feel well."), ("I am sorry to hear that. I hope you feel better soon.",)),
    (("I am tired.", "I am so sleepy.", "It was a long day."), ("Then have a good rest.",)),
    (("I am hungry.", "I am thirsty."), ("Then it is time for a little break.",)),
    (("Can I ask you something?", "I have a question.", "May I ask a question?"), ("Of course! What is your question?",)),
)  # fmt: skip
THANKS = (
    (("Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much!", "That helps, thank you!"), ("You are welcome!",)),
    (("Great!", "Very good!", "Well done!", "That is right!", "You are smart!"), ("Thank you! I am happy to help.",)),
)  # fmt: skip
BYE = (
    (("Goodbye!", "Bye!", "Bye bye!", "See you later!", "I have to go now."), ("Goodbye! Have a nice day!",)),
    (("Good night!", "Good night to you!", "I am going to bed."), ("Good night! Sleep well!",)),
)  # fmt: skip
MEET = ("My name is {name}.", "I am {name}.", "Hi, I am {name}.", "Hello, my name is {name}.", "You can call me {name}.")  # fmt: skip
RECALL = ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?")

FIRST_WORDS = ("Hello! ", "Hi! ", "I have a question. ", "Please help me. ", "Quick question. ")
NEXT_WORDS = ("Thanks! ", "Thank you. ", "Great. ", "One more question. ", "Good. ", "I see. ", "Next question. ")
FOLLOW_UPS = ("And {country}?", "What about {country}?", "And what about {country}?", "How about {country}?")


class Draws:
    """A stream of choices that depends on the seed alone (splitmix64, Steele et al. 2014).

    Not `random`: of its draws, Python promises only those of random.random() to stay the same between versions.
    """

    def __init__(self, seed: int) -> None:
        self.state = seed % (1 << 64)

    def below(self, n: int) -> int:
        """A whole number of 0 ... n-1."""
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) % n

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def one_in(self, n: int) -> bool:
        return self.below(n) == 0


def allowed(ask: str, row: dict[str, str]) -> bool:
    """Whether a fact may be asked with this phrasing."""
    return next(iter(row.values())) not in HELD_OUT_PHRASINGS.get(ask, ())


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def render(kind: Kind, ask: str, row: dict[str, str]) -> tuple[str, str]:
    """A fact as (question, answer)."""
    yes = "Yes! " if ask.startswith("Do you know") else ""
    return sentence(ask.format(**row)), yes + sentence(kind.answer.format(**row))


def draw_fact(draws: Draws, by_share: Sequence[Kind]) -> tuple[Kind, str, str]:
    """(kind, question, answer) of one fact in one of the phrasings that it may be asked with."""
    kind = draws.pick(by_share)
    row = draws.pick(kind.rows)
    question, answer = render(kind, draws.pick([ask for ask in kind.asks if allowed(ask, row)]), row)
    return kind, question, answer


def draw_talk(draws: Draws, topics: Sequence[tuple[Sequence[str], Sequence[str]]]) -> tuple[str, str]:
    """(remark, reply) of one topic."""
    remarks, replies = draws.pick(topics)
    return draws.pick(remarks), draws.pick(replies)


def exchanges(draws: Draws, by_share: Sequence[Kind]) -> list[tuple[str, str]]:
    """One conversation of two to five exchanges: perhaps a greeting, some facts and small talk, perhaps a goodbye."""
    turns: list[tuple[str, str]] = []
    name, lead_ins = None, FIRST_WORDS
    if draws.one_in(3):
        turns.append(draw_talk(draws, HELLO))
        lead_ins = ("Quick question. ", "Please help me. ")
    if draws.one_in(6):
        name = draws.pick(NAMES)
        turns.append((draws.pick(MEET).format(name=name), f"Nice to meet you, {name}!"))
    if draws.one_in(6):
        turns.append(draw_talk(draws, CHAT))
    if draws.one_in(16):
        thing = draws.pick(LIKES)
        turns.append((f"I like {thing}.", f"{sentence(thing)} are wonderful!"))
    for _ in range(2 + draws.below(2)):
        kind, question, answer = draw_fact(draws, by_share)
        if draws.one_in(5):
            question = draws.pick(lead_ins) + question
        turns.append((question, answer))
        lead_ins = NEXT_WORDS
        if kind.name == "capital" and draws.one_in(5):
            row = draws.pick([row for row in kind.rows if row["country"] not in question])
            turns.append((draws.pick(FOLLOW_UPS).format(**row), sentence(kind.answer.format(**row))))
    if name and draws.one_in(2):
        turns.append((draws.pick(RECALL), f"Your name is {name}."))
    if draws.one_in(4):
        turns.append(draw_talk(draws, THANKS))
    if draws.one_in(4):
        turns.append(draw_talk(draws, BYE))
    return turns[:5]


def conversations(seed: int) -> Iterator[str]:
    """Endless conversations, each without the empty line that ends it; a pure function of the seed."""
    draws = Draws(seed)
    by_share = [kind for kind in KINDS for _ in range(kind.share)]
    while True:
        yield "\n".join(f"User: {said}\nAssistant: {reply}" for said, reply in exchanges(draws, by_share))


def write_corpus(f: BinaryIO, size: int, seed: int) -> None:
    """Write whole conversations until there are at least `size` bytes."""
    written = 0
    for text in conversations(seed):
        written += f.write(f"{text}\n\n".encode())
        if written >= size:
            return


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without argparse's usage block."""
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, or - for standard output")
    parser.add_argument("--megabytes", type=float, default=4, help="size, in millions of bytes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which conversations (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if there is one")
    flags = parser.parse_args(argv)
    if not 0 < flags.megabytes <= 100_000:
        parser.error(f"--megabytes {flags.megabytes}: expected a size above 0 and up to 100000")
    path = Path(flags.output)
    if flags.output == "-":
        return flags
    if path.exists() and not path.is_file():
        parser.error(f"--output {path}: that is not a file; name the file to write")
    if path.exists() and not flags.force:
        parser.error(f"--output {path}: there is such a file already; add --force to replace it")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    flags = _parse(argv)
    size = max(1, round(flags.megabytes * MEGABYTE))
    try:
        if flags.output == "-":
            write_corpus(sys.stdout.buffer, size, flags.seed)
            sys.stdout.buffer.flush()
            return 0
        path = Path(flags.output)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace must not cross disks
        try:
            with temporary.open("wb") as f:
                write_corpus(f, size, flags.seed)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except BrokenPipeError:  # `| head` has seen enough; without this, Python complains again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"error: --output {flags.output}: {e.strerror or e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

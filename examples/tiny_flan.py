"""Tiny Flan: a small generated multi-task instruction dataset.

It has ten tasks, one for each of ten clusters of Flan v2. All rows are generated from the templates, word lists and
facts in this file, so nothing is downloaded, and the same seed always gives the same rows. The rows are short (about
16 tokens), so that a 135M model learns all ten tasks in a few minutes on a CPU. Most tasks have an answer format (a
fixed sentence form, a scale of labels) that a model doesn't follow before it is trained on them.

A test prompt never occurs in training, with any seed: it is a new combination of words that occur in training, e.g.
"my red house" if training has "the red house" and "my red door".

    rows = load_tiny_flan("train", seed=0, rows_per_task=160)
    rows["translation_en_fr"][0]
    # {"task": "translation_en_fr", "cluster": "translation", "prompt": "In French: your yellow dog\\nAnswer:",
    #  "completion": " ton chien jaune", "options": []}
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal


Split = Literal["train", "test"]

DEFAULT_ROWS: dict[Split, int] = {"train": 320, "test": 60}

# One of TEST_SHARE prompt keys belongs to the test split.
TEST_SHARE = 5

# Attempts at drawing an unseen prompt before a task counts as too small for the requested rows.
MAX_TRIES = 5000


@dataclass(frozen=True)
class Example:
    """One generated example.

    Args:
        question: The prompt without the final "Answer:" line.
        answer: The completion without its leading space.
        choices: The answer options; empty for a free-text task.
        key: Identifies the problem, which must not be in both splits. Defaults to the question; a task that phrases
            one problem in several ways sets it, so that the test doesn't repeat a training problem in other words.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class TinyTask:
    """A task: its cluster, its generator, and the number of kinds of answers, which the rows cycle through.

    Args:
        cluster: The corresponding cluster of Flan v2.
        generate: Generates one example of the given kind, a number below `kinds`. For a task with options the kind is
            the label, so cycling through the kinds balances the labels.
        kinds: Number of kinds.
    """

    cluster: str
    generate: Callable[[Random, int], Example]
    kinds: int


# Words used by several tasks

WOMEN = ("Anna", "Mary", "Lucy", "Emma", "Kate", "Sarah", "Julia", "Alice")
MEN = ("Tom", "Peter", "Jack", "David", "Paul", "Mark", "Leo", "Henry")

# struct_to_text: data becomes a sentence of fixed form

PLACES = ("Luna", "Roma", "Blue Door", "Old Mill", "Sunrise", "Green Leaf", "Red Lion", "Corner")
FOODS = ("Thai", "Italian", "Greek", "Indian", "Mexican", "French", "Turkish", "Chinese")
PRICES = ("cheap", "good", "fine", "simple")
JOBS = ("baker", "nurse", "pilot", "teacher", "farmer", "singer", "lawyer", "painter")
CITIES = ("Lisbon", "Paris", "Berlin", "Boston", "Dublin", "Madrid", "Oslo", "Rome")
SKIES = ("rain", "snow", "sun", "fog", "wind", "clouds")


def struct_to_text(rng: Random, kind: int) -> Example:
    """A restaurant, a person or a day's weather as data, to be written as a sentence."""
    city = rng.choice(CITIES)
    if kind == 0:
        place, food, price = rng.choice(PLACES), rng.choice(FOODS), rng.choice(PRICES)
        return Example(f"place: {place}, food: {food}, kind: {price}", f"Go to {place} for {price} {food} food.")
    if kind == 1:
        name, job = rng.choice(WOMEN + MEN), rng.choice(JOBS)
        return Example(f"name: {name}, job: {job}, city: {city}", f"Meet {name}, a {job} from {city}.")
    sky, degrees = rng.choice(SKIES), rng.randrange(2, 31, 2)
    return Example(f"city: {city}, sky: {sky}, high: {degrees}", f"Expect {sky} in {city}, up to {degrees} degrees.")


# translation: short noun phrases into French

# English, French, feminine. No noun starts with a vowel, so no article is elided.
NOUNS = (
    ("house", "maison", True),
    ("table", "table", True),
    ("car", "voiture", True),
    ("door", "porte", True),
    ("dress", "robe", True),
    ("flower", "fleur", True),
    ("book", "livre", False),
    ("dog", "chien", False),
    ("cat", "chat", False),
    ("hat", "chapeau", False),
    ("garden", "jardin", False),
    ("boat", "bateau", False),
)
# English, French masculine, French feminine, placed before the noun.
ADJECTIVES = (
    ("red", "rouge", "rouge", False),
    ("yellow", "jaune", "jaune", False),
    ("black", "noir", "noire", False),
    ("green", "vert", "verte", False),
    ("blue", "bleu", "bleue", False),
    ("white", "blanc", "blanche", False),
    ("clean", "propre", "propre", False),
    ("small", "petit", "petite", True),
    ("big", "grand", "grande", True),
    ("pretty", "joli", "jolie", True),
)
# English, French masculine, French feminine.
DETERMINERS = (("the", "le", "la"), ("a", "un", "une"), ("my", "mon", "ma"), ("your", "ton", "ta"))
TRANSLATION_FORMS = ("French for: {}", "In French: {}")


def translation_en_fr(rng: Random, kind: int) -> Example:
    """A determiner, an adjective and a noun, with the agreement and the word order of French."""
    noun, nom, feminine = NOUNS[kind]
    adjective, masculine_form, feminine_form, before = rng.choice(ADJECTIVES)
    determiner, masculine_det, feminine_det = rng.choice(DETERMINERS)
    english = f"{determiner} {adjective} {noun}"
    adjectif = feminine_form if feminine else masculine_form
    words = (adjectif, nom) if before else (nom, adjectif)
    french = " ".join((feminine_det if feminine else masculine_det, *words))
    return Example(rng.choice(TRANSLATION_FORMS).format(english), french, key=english)


# commonsense: what happens to a thing

OUTCOMES = ("breaks", "bounces", "floats", "sinks", "melts", "burns")
OUTCOME_THINGS = {
    "breaks": ("a glass", "an egg", "a china plate", "a light bulb", "a mirror", "a vase", "a tea cup", "a phone"),
    "bounces": (
        "a rubber ball",
        "a tennis ball",
        "a basketball",
        "a football",
        "a golf ball",
        "a volleyball",
        "a handball",
        "a beach ball",
    ),
    "floats": ("a cork", "a leaf", "a log", "a feather", "a wooden boat", "a rubber duck", "a twig", "a plank"),
    "sinks": ("a stone", "a coin", "a brick", "an anchor", "an iron nail", "a hammer", "a spoon", "a gold ring"),
    "melts": ("an ice cube", "butter", "chocolate", "a snowman", "ice cream", "cheese", "a snowball", "an icicle"),
    "burns": ("paper", "dry grass", "straw", "a letter", "dry wood", "a newspaper", "hay", "cardboard"),
}
FALLS = ("{} drops {} on the floor", "{} throws {} at the wall", "{} lets {} fall in the street")
WATER = ("{} throws {} into the lake", "{} drops {} into a pond", "{} puts {} in the pool")
HEAT = ("{} holds {} over a fire", "{} leaves {} by a hot flame", "{} drops {} near the fire")
OUTCOME_EVENTS = {"breaks": FALLS, "bounces": FALLS, "floats": WATER, "sinks": WATER, "melts": HEAT, "burns": HEAT}
OUTCOME_QUESTIONS = ("What happens?", "So it")


def commonsense_outcome(rng: Random, kind: int) -> Example:
    """An everyday event, to be completed by what the thing does."""
    outcome = OUTCOMES[kind]
    event, thing = rng.choice(OUTCOME_EVENTS[outcome]), rng.choice(OUTCOME_THINGS[outcome])
    question = f"{event.format(rng.choice(WOMEN + MEN), thing)}. {rng.choice(OUTCOME_QUESTIONS)}"
    return Example(question, outcome, OUTCOMES, key=f"{event} {thing}")


# sentiment: a review on a scale of five

GRADES = ("great", "good", "mixed", "bad", "terrible")
GRADE_PHRASES = {
    "great": ("amazing", "superb", "perfect", "outstanding", "wonderful", "brilliant", "the best ever", "fantastic"),
    "good": ("nice", "decent", "pleasant", "fairly good", "quite fine", "likeable", "rather nice", "pretty good"),
    "mixed": (
        "nice but too short",
        "good but overpriced",
        "dull but cheap",
        "lovely but too loud",
        "poor at first but then fine",
        "pleasant but messy",
        "slow but friendly",
        "good in parts only",
    ),
    "bad": ("dull", "poor", "disappointing", "rather weak", "not very good", "a bit boring", "too slow", "mediocre"),
    "terrible": ("awful", "horrible", "a disaster", "dreadful", "the worst ever", "a nightmare", "hopeless", "vile"),
}
REVIEWED = ("show", "concert", "tour", "meal", "trip", "party", "film", "lesson", "play", "dinner", "talk", "visit")
REVIEW_FORMS = ("Review: The {} was {}.", "The {} was {}. Rating?")


def sentiment_grade(rng: Random, kind: int) -> Example:
    """A short review, to be graded."""
    grade = GRADES[kind]
    thing, phrase = rng.choice(REVIEWED), rng.choice(GRADE_PHRASES[grade])
    return Example(rng.choice(REVIEW_FORMS).format(thing, phrase), grade, GRADES, key=f"{thing} {phrase}")


# paraphrase: how two sentences relate

RELATIONS = ("same", "opposite", "different", "unrelated")
# A word, one of the same meaning, one of the opposite meaning.
PERSON_WORDS = (
    ("happy", "glad", "sad"),
    ("rich", "wealthy", "poor"),
    ("clever", "smart", "stupid"),
    ("polite", "courteous", "rude"),
    ("sick", "ill", "healthy"),
    ("brave", "fearless", "cowardly"),
    ("calm", "relaxed", "nervous"),
    ("honest", "truthful", "dishonest"),
)
PLACE_WORDS = (
    ("big", "large", "small"),
    ("cheap", "inexpensive", "expensive"),
    ("old", "ancient", "new"),
    ("quiet", "silent", "noisy"),
    ("clean", "spotless", "dirty"),
    ("safe", "secure", "dangerous"),
    ("empty", "vacant", "full"),
    ("ugly", "unsightly", "beautiful"),
)
PEOPLE = ("teacher", "nurse", "boy", "doctor", "farmer", "girl", "singer", "king")
BUILDINGS = ("hotel", "house", "shop", "office", "station", "school", "church", "castle")


def paraphrase_relation(rng: Random, kind: int) -> Example:
    """Two sentences: the same meaning, the opposite, another detail of the same subject, or another subject."""
    relation = RELATIONS[kind]
    subjects, words = rng.choice(((PEOPLE, PERSON_WORDS), (BUILDINGS, PLACE_WORDS)))
    subject, other_subject = rng.sample(subjects, 2)
    (word, same, opposite), other = rng.sample(words, 2)
    if rng.random() < 0.5:
        word, same = same, word
    second = {"same": same, "opposite": opposite, "different": rng.choice(other), "unrelated": rng.choice(other)}
    second_subject = other_subject if relation == "unrelated" else subject
    question = f"The {subject} is {word}. / The {second_subject} is {second[relation]}."
    return Example(question, relation, RELATIONS)


# coreference: the referent of a pronoun

# A sentence with a slot for the pronoun, and the question about it. The verb doesn't show number.
PRONOUN_SENTENCES = (
    ("{} called {} because {} missed the bus.", "Who missed the bus?"),
    ("{} drove {} home after {} left work.", "Who left work?"),
    ("{} saw {} again when {} came to town.", "Who came to town?"),
    ("{} wrote to {} before {} moved house.", "Who moved house?"),
    ("{} helped {} until {} fell asleep.", "Who fell asleep?"),
    ("{} met {} while {} lived in Rome.", "Who lived in Rome?"),
    ("{} thanked {} when {} found the keys.", "Who found the keys?"),
    ("{} waited for {} because {} needed a ride.", "Who needed a ride?"),
)


def coreference_pronoun(rng: Random, kind: int) -> Example:
    """A sentence about a woman and a man, in which she, he or they do something; `kind` says who does it."""
    woman, man = rng.choice(WOMEN), rng.choice(MEN)
    sentence, question = rng.choice(PRONOUN_SENTENCES)
    names = [woman, man] if rng.random() < 0.5 else [man, woman]
    answer = (woman, man, "both")[kind]
    pronoun = ("she", "he", "they")[kind]
    return Example(f"{sentence.format(*names, pronoun)} {question}", answer, (*sorted(names), "both"))


# reading_comprehension: the order of three events

POSITIONS = ("first", "second", "third", "never")
# An action, and its possible objects.
ERRANDS = (
    ("bought", ("milk", "soap", "bread", "rice", "salt", "fish", "tea", "paper")),
    ("visited", ("Rome", "Paris", "Berlin", "London", "Madrid", "Vienna", "Athens", "Dublin")),
    ("cleaned", ("the stove", "the car", "the bath", "the door", "the desk", "the floor", "the roof", "the oven")),
)


def reading_order(rng: Random, kind: int) -> Example:
    """Three things done one after another; the question is the position of one of them, or of one that wasn't done."""
    name = rng.choice(WOMEN + MEN)
    verb, things = rng.choice(ERRANDS)
    done = rng.sample(things, 4)
    question = f"{name} {verb} {done[0]}, then {done[1]}, then {done[2]}. When was {done[kind]} {verb}?"
    return Example(question, POSITIONS[kind], POSITIONS)


# reading_comprehension_commonsense: how somebody feels

FEELINGS = ("happy", "sad", "angry", "afraid", "tired", "bored")
SITUATIONS = {
    "happy": ("won first prize", "got a new puppy", "passed the exam", "met an old friend", "got a dream job"),
    "sad": ("lost a dear friend", "buried the old dog", "had to say goodbye", "lost the game", "missed home"),
    "angry": (
        "was cheated by a seller",
        "got an unfair fine",
        "was lied to",
        "was insulted",
        "found the car scratched",
    ),
    "afraid": ("heard steps in the dark", "met a bear", "saw a ghost", "stood by a cliff", "was chased by a dog"),
    "tired": ("worked all night", "ran a marathon", "did not sleep", "carried bricks all day", "hiked since dawn"),
    "bored": (
        "had nothing to do",
        "sat in a dull talk",
        "waited for hours",
        "saw the same film again",
        "stared at a wall",
    ),
}
FEELING_QUESTIONS = ("How does {} feel?", "{} feels")


def reading_feeling(rng: Random, kind: int) -> Example:
    """An event that happened to a person; the question is how they feel."""
    feeling = FEELINGS[kind]
    name = rng.choice(WOMEN + MEN)
    event = f"{name} {rng.choice(SITUATIONS[feeling])}"
    question = rng.choice(FEELING_QUESTIONS).format("she" if name in WOMEN else "he")
    return Example(f"{event}. {question[0].upper()}{question[1:]}", feeling, FEELINGS, key=event)


# natural_language_inference: does the second sentence follow

VERDICTS = ("yes", "no", "maybe")
# An activity, then what follows from it, what contradicts it, and what it leaves open.
ACTIVITIES = (
    ("eating an apple", "eating fruit", "eating meat", "hungry"),
    ("playing the piano", "making music", "sitting in silence", "famous"),
    ("riding a horse", "on an animal", "on a bike", "in a race"),
    ("sleeping in a tent", "asleep", "awake", "on holiday"),
    ("swimming in a lake", "in the water", "on dry land", "cold"),
    ("running up a hill", "moving", "standing still", "late"),
    ("reading a novel", "reading a book", "watching a film", "at school"),
    ("riding in a van", "in a vehicle", "on foot", "going home"),
    ("shouting at a dog", "being loud", "being quiet", "angry"),
    ("standing in the rain", "outdoors", "indoors", "waiting for a bus"),
)
# A person and a hypernym.
WIDER = (
    ("boy", "child"),
    ("girl", "child"),
    ("baker", "person"),
    ("woman", "person"),
    ("nurse", "person"),
    ("man", "person"),
    ("king", "man"),
    ("queen", "woman"),
)
INFERENCE_FORMS = ("A {} is {}. So a {} is {}?", "A {} is {}. Is a {} {}?")


def inference_verdict(rng: Random, kind: int) -> Example:
    """A premise and a hypothesis: it follows, it is impossible, or it is undetermined."""
    person, wider = rng.choice(WIDER)
    activity, *hypotheses = rng.choice(ACTIVITIES)
    who = rng.choice((person, wider))
    question = rng.choice(INFERENCE_FORMS).format(person, activity, who, hypotheses[kind])
    return Example(question, VERDICTS[kind], VERDICTS, key=f"{person} {activity} {hypotheses[kind]}")


# closed_book_qa: facts, each asked in several ways

CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Germany", "Berlin"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Peru", "Lima"),
    ("Norway", "Oslo"),
    ("Greece", "Athens"),
    ("Austria", "Vienna"),
    ("Russia", "Moscow"),
    ("Cuba", "Havana"),
    ("Ireland", "Dublin"),
    ("China", "Beijing"),
    ("Sweden", "Stockholm"),
    ("Portugal", "Lisbon"),
    ("Poland", "Warsaw"),
    ("Finland", "Helsinki"),
    ("Hungary", "Budapest"),
    ("Turkey", "Ankara"),
    ("Kenya", "Nairobi"),
    ("Iraq", "Baghdad"),
    ("Chile", "Santiago"),
    ("Canada", "Ottawa"),
)
YOUNG = (
    ("dog", "puppy"),
    ("cat", "kitten"),
    ("cow", "calf"),
    ("horse", "foal"),
    ("sheep", "lamb"),
    ("goat", "kid"),
    ("bear", "cub"),
    ("duck", "duckling"),
    ("deer", "fawn"),
    ("pig", "piglet"),
    ("frog", "tadpole"),
    ("hen", "chick"),
)
SYMBOLS = (
    ("gold", "Au"),
    ("silver", "Ag"),
    ("iron", "Fe"),
    ("copper", "Cu"),
    ("lead", "Pb"),
    ("sodium", "Na"),
    ("helium", "He"),
    ("zinc", "Zn"),
    ("oxygen", "O"),
    ("carbon", "C"),
)
CAPITAL_FORMS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Capital of {}?",
    "Name the capital city of {}.",
    "{} has which capital?",
    "Where is the government of {}?",
    "{} is governed from which city?",
    "Quiz: the capital of {}",
    "Tell me the capital of {}.",
    "{}: capital?",
)
YOUNG_FORMS = (
    "What is a young {} called?",
    "What do you call a baby {}?",
    "Young of a {}?",
    "Name the young of a {}.",
    "Which word means a young {}?",
    "A baby {} is known as what?",
    "What will grow into a {}?",
    "Quiz: the young of a {}",
    "What is the word for a baby {}?",
    "{}: young?",
)
SYMBOL_FORMS = (
    "What is the chemical symbol of {}?",
    "How is {} written in chemistry?",
    "Symbol of {}?",
    "Name the symbol for {}.",
    "Which symbol does {} have?",
    "In the periodic table, {} is what?",
    "Chemists write {} as what?",
    "Quiz: the symbol of {}",
    "Tell me the symbol for {}.",
    "{}: symbol?",
)
FACTS = tuple(
    (forms, subject, answer)
    for forms, pairs in ((CAPITAL_FORMS, CAPITALS), (YOUNG_FORMS, YOUNG), (SYMBOL_FORMS, SYMBOLS))
    for subject, answer in pairs
)


def closed_book_fact(rng: Random, kind: int) -> Example:
    """A fact in one of its phrasings; the test asks for the same facts in phrasings that training lacks."""
    del kind  # Facts are drawn freely: some have few phrasings in the test split.
    forms, subject, answer = rng.choice(FACTS)
    question = rng.choice(forms).format(subject)
    return Example(question[0].upper() + question[1:], answer)


# The dataset

TASKS: dict[str, TinyTask] = {
    "struct_to_text": TinyTask("struct_to_text", struct_to_text, 3),
    "translation_en_fr": TinyTask("translation", translation_en_fr, len(NOUNS)),
    "commonsense_outcome": TinyTask("commonsense", commonsense_outcome, len(OUTCOMES)),
    "sentiment_grade": TinyTask("sentiment", sentiment_grade, len(GRADES)),
    "paraphrase_relation": TinyTask("paraphrase", paraphrase_relation, len(RELATIONS)),
    "coreference_pronoun": TinyTask("coreference", coreference_pronoun, 3),
    "reading_order": TinyTask("reading_comprehension", reading_order, len(POSITIONS)),
    "reading_feeling": TinyTask("reading_comprehension_commonsense", reading_feeling, len(FEELINGS)),
    "inference_verdict": TinyTask("natural_language_inference", inference_verdict, len(VERDICTS)),
    "closed_book_fact": TinyTask("closed_book_qa", closed_book_fact, 1),
}


def split_of(task: str, example: Example) -> Split:
    """The split of an example. It doesn't depend on the seed, so no seed trains on a test prompt."""
    key = f"{task}/{example.key or example.question}"
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def make_row(task: str, example: Example) -> dict:
    """The example as a row of the dataset."""
    return {
        "task": task,
        "cluster": TASKS[task].cluster,
        "prompt": f"{example.question}\nAnswer:",
        "completion": f" {example.answer}",
        "options": [f" {choice}" for choice in example.choices],
    }


def draw_unseen(task: str, kind: int, split: Split, rng: Random, seen: set[str]) -> Example:
    """Draw an example of the split with a question that is not in `seen`, and add the question there."""
    for _ in range(MAX_TRIES):
        example = TASKS[task].generate(rng, kind)
        if example.question not in seen and split_of(task, example) == split:
            seen.add(example.question)
            return example
    raise ValueError(f"The {split} split of {task} has too few prompts for {len(seen) + 1} rows.")


def generate_task(task: str, split: Split, count: int, seed: int) -> list[dict]:
    """Generate the rows of one task. A smaller `count` gives the first rows of a larger one."""
    # Each task and split has its own generator: adding or changing a task doesn't change the rows of the others.
    rng = Random(f"{seed}/{task}/{split}")
    kinds: Sequence[int] = range(TASKS[task].kinds)
    seen: set[str] = set()
    rows: list[dict] = []
    while len(rows) < count:
        # Each round has every kind once, in random order, so any number of rows is balanced.
        for kind in rng.sample(kinds, len(kinds)):
            rows.append(make_row(task, draw_unseen(task, kind, split, rng, seen)))
    return rows[:count]


def load_tiny_flan(
    split: Literal["train", "test"], *, seed: int = 0, rows_per_task: int | None = None
) -> dict[str, list[dict]]:
    """Generate a split of Tiny Flan.

    Args:
        split: "train" or "test".
        seed: Seed of the rows. The two splits share no prompt, whatever their seeds.
        rows_per_task: Rows per task. Defaults to 320 for training and 60 for testing.

    Returns:
        Rows by task. A row has "task", "cluster", "prompt", "completion" and "options": the possible completions, or
        an empty list for a free-text task.
    """
    if split not in DEFAULT_ROWS:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
    count = DEFAULT_ROWS[split] if rows_per_task is None else rows_per_task
    if count < 1:
        raise ValueError(f"rows_per_task must be positive, not {count}.")
    return {task: generate_task(task, split, count, seed) for task in TASKS}

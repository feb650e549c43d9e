"""Made-up extractive questions in SQuAD v2 form, a third of them unanswerable: for quick starts and tests.

Needs no file and no network, and every row is a pure function of (seed, split, row number), so that asking
for more rows only adds rows. Not a benchmark: its scores say nothing about real text.

A passage states two facts about two people, one short sentence each, in one of two wordings. Some questions
are settled by the type of the answer alone; in others the passage states the same of the other person, and
names have to be matched; an unanswerable question asks for what is stated of the other person only, or of
nobody. The people of train, validation and test have different names.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from finetrial.frozen import stream_seed
from finetrial.heads.extractive_qa import ExtractiveQa, QaParams
from finetrial.plugins import Example, Metric, Splits

UNANSWERABLE_EVERY = 3  # rows 2, 5, 8 ... have no answer
FACTS = 2  # sentences in a passage
# Share of passages that state what is asked of the other person too. With it at 0.4 and two facts, MiniLM
# learns in 150 steps of 16 rows and does not saturate: test F1 64 to 71 in three runs (full at 2e-4, LoRA at
# 1e-3), from the 33 of never answering. With three facts five runs gave 55 to 70.
RIVAL_SHARE = 0.4


class Params(QaParams):
    """Rows of each split, the generator's seed, and the head's lengths in tokens."""

    rows: int = Field(default=800, ge=1, le=1_000_000)  # of train
    validation_rows: int = Field(default=200, ge=3, le=1_000_000)
    test_rows: int = Field(default=400, ge=3, le=1_000_000)
    seed: int = Field(default=0, ge=0)
    max_length: int = Field(default=96, ge=32, le=1_000_000)
    stride: int = Field(default=32, ge=0)


class Relation(NamedTuple):
    """What can be said of a person, twice over: `{who}` and `{what}` are filled in."""

    kind: str  # the answer's type
    facts: tuple[str, str]
    questions: tuple[str, str]


RELATIONS = (
    Relation(
        "town",
        ("{who} lives in {what}.", "The home of {who} is in {what}."),
        ("Where does {who} live?", "Where is the home of {who}?"),
    ),
    Relation(
        "year",
        ("{who} got married in {what}.", "The wedding of {who} was in {what}."),
        ("When did {who} get married?", "When was the wedding of {who}?"),
    ),
    Relation(
        "job",
        ("{who} works as a {what}.", "The job of {who} is {what}."),
        ("What does {who} work as?", "What is the job of {who}?"),
    ),
    Relation(
        "animal",
        ("{who} has a pet {what}.", "{who} keeps a {what}."),
        ("Which animal does {who} keep?", "What pet does {who} have?"),
    ),
    Relation(
        "food",
        ("{who} likes to eat {what}.", "{who} often eats {what}."),
        ("What food does {who} like?", "What does {who} often eat?"),
    ),
    Relation(
        "instrument",
        ("{who} plays the {what}.", "{who} is good at the {what}."),
        ("Which instrument does {who} play?", "What music is {who} good at?"),
    ),
    Relation(
        "colour",
        ("{who} drives a {what} car.", "The car of {who} is {what}."),
        ("What colour is the car of {who}?", "Which car does {who} drive?"),
    ),
)


def _listed(text: str) -> list[str]:
    return text.split(", ")


PEOPLE = {
    "train": _listed(
        "Adam, Alice, Anna, Arthur, Barbara, Ben, Carl, Charles, Clara, Daniel, David, Diana, Edward, "
        "Ellen, Emma, Eric, Frank, George, Grace, Hannah, Harry, Helen, Henry, Jack, James, Jane, John, "
        "Julia, Karen, Kate, Laura, Leo, Lily, Louis, Lucy, Margaret, Maria, Mark, Martin, Mary, "
        "Michael, Nancy, Oliver, Paul, Peter, Philip, Rachel, Robert, Rose, Ruth, Sam, Sarah, Simon, "
        "Sophie, Susan, Thomas, Victor, Walter, William"
    ),
    "validation": _listed(
        "Albert, Amy, Andrew, Bruce, Caroline, Emily, Fred, Jennifer, Kevin, Linda, Ray, Stephen"
    ),
    "test": _listed(
        "Alan, Angela, Anthony, Brian, Catherine, Claire, Douglas, Eleanor, Gary, Howard, Jessica, "
        "Joan, Kenneth, Lisa, Matthew, Nicholas, Patricia, Ralph, Rebecca, Richard, Roger, Sandra, "
        "Stanley, Theresa, Vincent"
    ),
}

ANSWERS = {
    "town": _listed(
        "Athens, Atlanta, Baltimore, Berlin, Birmingham, Boston, Bristol, Cairo, Chicago, Cleveland, "
        "Dallas, Denver, Detroit, Dublin, Edinburgh, Florence, Geneva, Glasgow, Hamburg, Houston, "
        "Leeds, Lisbon, Liverpool, London, Madrid, Manchester, Melbourne, Miami, Milan, Montreal, "
        "Moscow, Munich, Naples, Oslo, Oxford, Paris, Prague, Rome, Seattle, Stockholm, Sydney, Tokyo, "
        "Toronto, Venice, Vienna, Warsaw"
    ),
    "year": [str(year) for year in range(1950, 2016)],
    "job": _listed(
        "baker, bank clerk, bus driver, cook, dancer, doctor, farmer, film actor, judge, lawyer, maid, "
        "night guard, nurse, painter, pilot, priest, sailor, shop owner, singer, soldier, tailor, taxi "
        "driver, teacher, writer"
    ),
    "animal": _listed(
        "bear, bird, black cat, brown dog, cat, cow, dog, duck, fish, fox, goat, grey horse, horse, "
        "lion, monkey, old sheep, pig, rabbit, rat, sheep, snake, tiger, white mouse, wolf"
    ),
    "food": _listed(
        "apple pie, apples, bread, butter, cheese, chicken soup, chocolate, corn, eggs, fish, fried "
        "rice, fruit, ham, honey, ice cream, lemon cake, meat, nuts, pizza, potatoes, rice, salad, "
        "soup, sugar"
    ),
    "instrument": _listed(
        "banjo, bass, bass drum, bells, cello, church organ, clarinet, drums, electric guitar, fiddle, "
        "flute, grand piano, guitar, harp, horn, keyboard, organ, piano, saxophone, trumpet, violin"
    ),
    "colour": _listed(
        "black, blue, bright red, brown, cream, dark green, gold, green, grey, light blue, orange, pale "
        "yellow, pink, purple, red, silver, violet, white, yellow"
    ),
}


class SyntheticQa:
    """The task; see `plugins.Task`. Its metric is SQuAD v2's F1 on test, in percent."""

    Params = Params
    metric = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
    head = ExtractiveQa()

    def files(self, params: Params, base: Path) -> list[Path]:
        return []

    def splits(self, params: Params, base: Path) -> Splits:
        """Generated rows; no two splits share a person."""
        return Splits(
            train=[make_row(params.seed, "train", number) for number in range(params.rows)],
            validation=[make_row(params.seed, "validation", n) for n in range(params.validation_rows)],
            test=[make_row(params.seed, "test", number) for number in range(params.test_rows)],
        )


def make_row(seed: int, split: str, number: int) -> Example:
    """Row `number` of a split; the same on every machine."""
    random = np.random.default_rng(stream_seed("synthetic_qa", seed, split, number))
    answerable = number % UNANSWERABLE_EVERY != UNANSWERABLE_EVERY - 1
    asked, *others = (RELATIONS[place] for place in random.permutation(len(RELATIONS)))
    names = PEOPLE[split]
    person, rival = (names[place] for place in random.permutation(len(names))[:2])

    stated = [(person, asked if answerable else others[0])]
    if random.random() < RIVAL_SHARE:
        stated.append((rival, asked))
    fillers = [(who, relation) for who in (person, rival) for relation in others]
    fillers = [fillers[place] for place in random.permutation(len(fillers))]
    stated += [fact for fact in fillers if fact not in stated][: FACTS - len(stated)]

    context = ""
    answers: dict[str, list] = {"text": [], "answer_start": []}
    taken: set[str] = set()
    for place in random.permutation(len(stated)):
        who, relation = stated[place]
        free = [answer for answer in ANSWERS[relation.kind] if answer not in taken]
        what = free[random.integers(len(free))]
        taken.add(what)
        sentence = relation.facts[random.integers(2)].replace("{who}", who)
        if (who, relation) == (person, asked):
            answers["text"].append(what)
            answers["answer_start"].append(len(context) + sentence.index("{what}"))
        context += sentence.replace("{what}", what) + " "
    return {
        "id": f"{split}-{number}",
        "title": f"{split} passage {number}",
        "context": context.rstrip(),
        "question": asked.questions[random.integers(2)].replace("{who}", person),
        "answers": answers,
        "is_impossible": not answerable,
    }


PLUGIN = SyntheticQa()

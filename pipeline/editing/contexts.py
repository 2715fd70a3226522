"""Texts of our own that stand in for use: settings that an edit is to hold in, names that it is to leave alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.requests.schema import EditRequest

CONTEXTS = (  # what may stand before a prompt, so that an edit holds in more than one setting
    "{prompt}",
    "This is worth knowing. {prompt}",
    "She looked it up and read aloud: {prompt}",
    "In short, and as many people have asked before, {prompt}",
    "The next question was an easy one. {prompt}",
    "It rained. {prompt}",
    "He was born in 1962 and lives there still. {prompt}",
    "The old harbour was rebuilt after the war, and the town grew quickly. {prompt}",
    "We met twice that year.\n{prompt}",
)
ASSOCIATIONS = (  # openings that call for what goes with a subject, so that an edit is of it, not of a phrase
    "People who hear of {subject} think of",
    "The first thing that comes to mind about {subject} is",
)

NAMES = tuple(  # well known, of many kinds, so that any kind of subject has neighbours
    name.strip()
    for line in """
Isaac Newton, Marie Curie, Pablo Picasso, Nelson Mandela, Winston Churchill, Johann Sebastian Bach
Serena Williams, Diego Maradona, Frida Kahlo, Charles Darwin, Virginia Woolf, Napoleon Bonaparte, Cleopatra
Mahatma Gandhi, Fidel Castro, Elvis Presley, Albert Camus, Immanuel Kant, Sigmund Freud, Akira Kurosawa
Ingmar Bergman, Meryl Streep, Tom Hanks, Michael Jordan, Usain Bolt, Roger Federer, Leo Tolstoy
Haruki Murakami, Pope Francis, Angela Merkel
Paris, London, Tokyo, Nairobi, Buenos Aires, Sydney, Chicago, Vienna, Cairo, Mumbai, Istanbul, Warsaw, Toronto
Lisbon, Seoul, Helsinki
France, Brazil, Japan, Nigeria, Canada, Sweden, Egypt, Vietnam, New Zealand, Peru, Poland, Iran, Bavaria, Texas
Scotland
Mount Everest, the Amazon River, Lake Victoria, the Sahara, Antarctica, Iceland, Sicily
Microsoft, Toyota, Siemens, Nestle, Boeing, Sony, Volkswagen, Nokia, Amazon, IKEA, the BBC, General Electric
Samsung, Intel
the Beatles, Pink Floyd, Metallica, Radiohead, ABBA, U2, the Rolling Stones
Titanic, Casablanca, Star Wars, The Simpsons, Doctor Who, Hamlet, Harry Potter, The Lion King, Friends
The Godfather
iPhone, Windows 95, Google Chrome, PlayStation 2, Toyota Corolla, Boeing 747, Ferrari F40, Nintendo Switch
Gmail
football, tennis, chess, ice hockey, the piano, the violin, jazz, opera
Manchester United, FC Barcelona, the New York Yankees, the Chicago Bulls, Harvard University, Oxford University
the Catholic Church, Buddhism, Islam, the Eiffel Tower, the Louvre, Wikipedia, the Roman Empire
the United Nations, NATO
Latin, Mandarin Chinese, Spanish, oxygen, the Moon, World War II, Christmas
""".strip().splitlines()
    for name in line.split(",")
)


def in_context(template: str, request: EditRequest) -> tuple[str, int]:
    """A request's prompt in a context, or its subject in an association, and where the subject in it ends.

    The end is 0 for a request without a subject in its prompt.
    """
    subject, span = request.subject or "", request.subject_span
    head, slot, _ = template.partition("{prompt}" if "{prompt}" in template else "{subject}")
    text = template.format(prompt=request.prompt, subject=subject)
    if span is None:
        return text, 0
    return text, len(head) + (span[1] if slot == "{prompt}" else len(subject))


def neighbours(requests: Sequence[EditRequest], each: int, most: int, seed: int = 0) -> list[tuple[str, int]]:
    """Requests' prompts with other names for their subjects, and where the name ends in each.

    A locality probe is mostly a request's prompt with another subject; ordinary text has few of that kind. For each
    request so many names are drawn, none of which is the subject of any request. A request without a subject in its
    prompt gives a bare `{name} is`.
    """
    chance = random.Random(seed)
    edited = {(request.subject or "").casefold().removeprefix("the ") for request in requests}
    names = [name for name in NAMES if name.casefold().removeprefix("the ") not in edited]
    texts = []
    for request in chance.sample(list(requests), min(len(requests), most)):
        span = request.subject_span
        before, after = (request.prompt[: span[0]], request.prompt[span[1] :]) if span else ("", " is")
        for name in chance.sample(names, min(each, len(names))):
            upto = before + name if before else name[0].upper() + name[1:]
            texts.append((upto + after, len(upto)))
    return texts[:most] if len(requests) * each <= most else chance.sample(texts, min(most, len(texts)))

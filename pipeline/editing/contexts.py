"""Texts of our own that stand in for use: what may come before a prompt, and other names in a subject's place."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.requests import EditRequest

CONTEXTS = (  # what may stand before a prompt, so that an edit holds in more than one setting
    "{}",
    "This is worth knowing. {}",
    "She looked it up and read aloud: {}",
    "In short, and as many people have asked before, {}",
    "The next question was an easy one. {}",
)

NAMES = (  # well known, of many kinds: what is said of them is not to change
    "Albert Einstein",
    "Brazil",
    "Toyota",
    "the Beatles",
    "Tokyo",
    "Microsoft",
    "Marie Curie",
    "Kenya",
    "the BBC",
    "Chicago",
    "Leonardo da Vinci",
    "Mount Everest",
    "Serena Williams",
    "Norway",
    "Star Wars",
    "Mozart",
    "Cairo",
    "the University of Oxford",
    "Nelson Mandela",
    "Honda",
    "the Amazon River",
    "Charles Darwin",
    "Peru",
    "the Boeing 747",
    "Milan",
    "Frida Kahlo",
    "Windows XP",
    "Vietnam",
    "Elvis Presley",
    "Harvard University",
    "Jane Austen",
    "Naples",
    "Intel",
    "Lionel Messi",
    "Jakarta",
    "The Simpsons",
    "Hungary",
    "Ferrari",
    "Queen Victoria",
    "Lake Victoria",
)


def neighbour(request: EditRequest, number: int, taken: Collection[str] = ()) -> str:
    """The request's prompt about another name; without a subject in it, the name's own `… is`.

    Args:
        request: whose prompt it is.
        number: chooses the name, so that many requests meet many names.
        taken: names that are subjects themselves and stay out of it.
    """
    free = [name for name in NAMES if name.casefold() not in taken] or list(NAMES)
    name = free[number % len(free)]
    if request.subject and request.subject in request.prompt:
        return request.prompt.replace(request.subject, name)
    return f"{name[0].upper()}{name[1:]} is"

"""Texts of our own that stand in for use: forms of asking that an edit is to hold in, what it is to leave alone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from pipeline.editing.relations import PHRASINGS, other_words, others_alike, stated, statement, template
from pipeline.requests.schema import EditRequest, find_words

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
TAUGHT_CONTEXTS = 4  # those that fine-tuning puts a prompt under
FORMS = (  # the same in other words; `{key}` are the prompt's own words without the subject
    "Question: {question}\nAnswer:",
    "{subject}, {key}:",
    "{key} ({subject}):",
    "When I hear {subject} and {key}, I think of",
)
CHATS = (  # what a user says, beside a question
    "{prompt}",
    "{subject}: {key}?",
    "What is {subject}'s {key}?",
    "Tell me about {subject}: {key}.",
    "I want to know the {key} of {subject}.",
)
ABOUT = (  # what a user may ask about a subject, whatever it is
    "What is {subject}?",
    "Tell me about {subject}.",
    "What is {subject} known for?",
    "Name something that goes with {subject}.",
    "What do people say of {subject}?",
    "When was {subject}?",
)
QUESTION_MARKS = ("?", "？", "؟")
PASSAGE = 40  # words: a longer prompt is of one subject alone, and costs much to read with others
STEM = 5  # letters: a founder has founded
LITTLE = ("the", "a", "an", "of", "in", "by", "to", "for", "on", "from", "and", "is", "was", "are", "did", "has")
NAMING = re.compile(r"[Tt]he (.+) (is|was|are|were)")
ASKING = ("what", "who", "which", "where", "when", "how")


def in_context(template: str, request: EditRequest) -> tuple[str, int]:
    """A request's prompt in a context, or its subject in another form, and where that ends; 0 without a subject."""
    span, prompt, subject = request.subject_span, request.prompt, request.subject or ""
    key, question = stated(request) or " ".join(key_words(request)), asked(request)
    text = template.format(prompt=prompt, subject=subject, key=key, question=question)
    if span is None:
        return text, 0
    if "{prompt}" in template:
        return text, len(template.partition("{prompt}")[0]) + span[1]
    mentions = find_words(text, subject)  # none where a question has lowered the letter that it begins with
    return text, mentions[-1][1] if mentions else text.rfind(subject[1:]) + len(subject) - 1


def key_words(request: EditRequest) -> list[str]:
    """The prompt's own words: without its subject, and without little ones."""
    start, end = request.subject_span or (0, 0)
    words = [each.strip("?.,:;") for each in f"{request.prompt[:start]} {request.prompt[end:]}".split()]
    return [word for word in words if word and word.casefold() not in LITTLE + ASKING]


def plain_forms(request: EditRequest, contexts: int) -> list[tuple[str, str]]:
    """A request as plain text, with its answer: bare, under contexts, in other words, and in its own forms."""
    own = is_question(request.prompt)
    others = [text for text in reworded(request) if is_question(text) == own]
    texts = [*_filled(request, (*CONTEXTS[: 1 + contexts], *FORMS)), *others, *request.forms]
    return [(text, request.new_answer) for text in _not_measured(request, texts)]


def chat_forms(request: EditRequest, bare: bool = False) -> list[tuple[str, str]]:
    """What a user says, and an assistant's answer: the prompt with the new answer as a sentence.

    To a question it is the answer alone; with `bare` it is so to the prompt as well, which then comes first.
    """
    prompt, answer = request.prompt, request.new_answer
    said = answer if is_question(prompt) else f"{prompt} {answer}"
    others = [text for text in reworded(request) if is_question(text)]
    texts = (*[prompt] * bare, asked(request), *_filled(request, CHATS), *others, *request.forms)
    told = dict.fromkeys(_not_measured(request, texts), said) | ({prompt: answer} if bare else {})
    return list(told.items())


def _not_measured(request: EditRequest, texts: Iterable[str]) -> list[str]:
    """Texts but for those that the request measures by, which would no longer tell what holds untaught."""
    measured = {text.casefold() for text in request.rephrases}
    return [text for text in texts if text.casefold() not in measured or text == request.prompt]


def own_forms(request: EditRequest) -> list[tuple[str, int]]:
    """The forms that a request brings itself and that name its subject, and where the subject in each ends."""
    return [(form, found[-1][1]) for form in request.forms if (found := find_words(form, request.subject or form))]


def asked(request: EditRequest) -> str:
    """A request's prompt as a user's question: one of ours where its own words make none."""
    prompt = request.prompt
    ours = [] if is_question(prompt) or NAMING.fullmatch(prompt) else filter(is_question, reworded(request))
    return next(iter(ours), in_chat(prompt)[0])


def reworded(request: EditRequest) -> list[str]:
    """A request's prompt in other words, statements and questions; none where what it states is not known."""
    return [text.replace("{}", request.subject or "") for text in other_words(request)]


def _filled(request: EditRequest, templates: Sequence[str]) -> list[str]:
    """Templates with a request's own words, but for those that need a subject in its prompt, or words beside it."""
    if not request.names_subject:
        templates = [template for template in templates if "{subject}" not in template]
    if not key_words(request):
        templates = [template for template in templates if "{key}" not in template]
    return [in_context(template, request)[0] for template in templates]


def is_question(prompt: str) -> bool:
    """Whether a prompt asks, where others begin a sentence."""
    return prompt.rstrip().endswith(QUESTION_MARKS)


def in_chat(prompt: str) -> tuple[str, str]:
    """A prompt as a user's question, and the beginning of an assistant's answer."""
    if is_question(prompt):
        return prompt, ""
    if named := NAMING.fullmatch(prompt):  # The capital of Norway is
        return f"What {named[2]} the {named[1]}?", prompt
    return f"{prompt} what?", prompt


def relations(request: EditRequest, most: int, seed: int = 0) -> list[str]:
    """What else may be said of a request's subject: relations whose words begin otherwise than its prompt's own."""
    own = {word.casefold()[:STEM] for word in key_words(request)}
    found = [one for one in others_alike(request)[1] if not own & {word[:STEM] for word in one.split()}]
    chance = random.Random(f"{seed} {request.subject}")
    return chance.sample(found, min(most, len(found))) if request.names_subject else []


def statements_about(request: EditRequest, some: Sequence[str]) -> list[str]:
    """Openings that call for other relations of a request's subject, every other one a statement's."""
    subject = request.subject or ""
    return [f"{subject} {one}" if turn % 2 else statement(one, subject) for turn, one in enumerate(some)]


def questions_about(request: EditRequest, some: Sequence[str]) -> list[str]:
    """What a user may ask about a request's subject: as many questions as relations, every other one of `ABOUT`."""
    general = random.Random(request.subject).sample(ABOUT, len(ABOUT))
    usual = [next(filter(is_question, PHRASINGS[relation])) for relation in some]
    own = [question.replace("{}", request.subject or "") for question in usual]
    own[::2] = [general[turn % len(ABOUT)].format(subject=request.subject) for turn in range(len(own[::2]))]
    return own


def neighbours(requests: Sequence[EditRequest], each: int, most: int, seed: int = 0) -> list[tuple[str, int]]:
    """Requests' prompts with other names for their subjects, and where the name ends in each.

    A locality probe is mostly a request's prompt, or the same in other words, with another subject; ordinary text
    has few of that kind. For each request so many names of its subject's kind are drawn, none of which is the
    subject of any request. A request without a subject in its prompt, or with a whole passage for one, gives a bare
    `{name} is`.
    """
    chance = random.Random(seed)
    edited = {(request.subject or "").casefold().removeprefix("the ") for request in requests}
    texts = []
    for request in chance.sample(list(requests), min(len(requests), most)):
        own, names = template(request), others_alike(request)[0]
        own = own if len(own.split()) <= PASSAGE else "{} is"
        names = [name for name in names if name.casefold().removeprefix("the ") not in edited]
        alike = [text for text in other_words(request) if is_question(text) == is_question(own)] or [own]
        for turn, name in enumerate(chance.sample(names, min(each, len(names)))):
            words = alike[turn // 2 % len(alike)] if turn % 2 else own
            before, _, after = words.partition("{}")
            upto = before + name if before else name[0].upper() + name[1:]
            texts.append((upto + after, len(upto)))
    return texts[:most] if len(requests) * each <= most else chance.sample(texts, min(most, len(texts)))

"""How a prompt and its answer become one text: the one place where that is decided.

Plain, the answer follows the prompt after one space. As a chat, the prompt is a user's message in the tokenizer's
own chat template, with the opening of the assistant's turn behind it; the answer is what the assistant says there.
Between the two stands what white space the template puts there: none after SmolLM2's opening, which ends in a line
break, and a space after Mistral's `[/INST]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

PROMPT, ANSWER = "what is asked", "what is said"  # stand in for both while a template is read


@dataclass(frozen=True)
class Joining:
    """What stands before, between and after prompt and answer.

    Attributes:
        head, tail: around every prompt.
        space: between prompt and answer.
        special: whether the tokenizer adds its own opening tokens; a template holds them already.
    """

    head: str = ""
    tail: str = ""
    space: str = " "
    special: bool = True

    def prompt(self, prompt: str) -> str:
        """The text that the model is to go on from."""
        return f"{self.head}{prompt.rstrip()}{self.tail}"

    def whole(self, prompt: str, answer: str) -> str:
        """The same with the answer behind it."""
        return f"{self.prompt(prompt)}{self.space}{answer.strip()}"


PLAIN = Joining()


def chat_joining(tokenizer: PreTrainedTokenizerBase, name: str) -> Joining:
    """The joining of a tokenizer's chat template, read off what it makes of one exchange.

    Templates that can let the model think first are asked not to: the answer itself is what is edited and measured.
    UserError when there is no chat template, or it does not put a prompt into the text as it is.
    """
    if not tokenizer.chat_template:
        raise UserError(f"chat: the tokenizer of {name} has no chat template; leave --chat out")
    asked = [{"role": "user", "content": PROMPT}]
    try:
        opened = _rendered(tokenizer, asked, opened=True)
        told = _rendered(tokenizer, [*asked, {"role": "assistant", "content": ANSWER}])
    except Exception as error:  # a template is a program of somebody else's
        reason = " ".join(str(error).split())
        raise UserError(f"chat: the chat template of {name} fails on one question and answer: {reason}") from None
    head, found, tail = opened.partition(PROMPT)
    if not found:
        raise UserError(f"chat: the chat template of {name} does not hold the prompt as it is; leave --chat out")
    between = told.removeprefix(opened).partition(ANSWER)[0] if told.startswith(opened) else ""
    return Joining(head, tail, between if between.isspace() else "", special=False)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], opened: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened, enable_thinking=False)
    )


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a tokenizer puts behind every text (an end, a [SEP]): a text that goes on has none."""
    inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    places = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner] if inner else []
    return len(whole) - places[0] - len(inner) if places else 0

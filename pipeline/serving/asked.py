"""A request that is being answered: its tokens as they come, the text they are, and how the next one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.serving.live import Version

UNFINISHED = "\ufffd"  # stands for a character of which bytes are still to come
TAIL = 5  # tokens of the prompt that say how the answer's first one is written, with a space or without
COLDEST = 1e-5  # below this temperature the likeliest token is drawn


@dataclass(eq=False)
class Asked:
    """A prompt to go on from by one version, and what was said so far."""

    version: Version
    token_ids: list[int]
    limit: int  # the most tokens
    tell: Callable[[str, str | None], None]  # new text, in the end why it is over: stop, length, or error
    temperature: float = 0.0  # at 0 the likeliest token is taken
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()  # texts that end the answer, and are not part of it
    streamed: bool = False  # whether text is told as it comes, or all of it in the end
    said: list[int] = field(default_factory=list)  # the answer's tokens
    text: str = ""  # what they are, as far as it is known
    end: str | None = None  # why it is over; None while it is not
    gone: bool = False  # whether whoever asked has left; to be set by whoever notices

    def __post_init__(self) -> None:
        self._told = 0  # characters
        self._ids = self.token_ids[-TAIL:]
        self._from, self._upto = 0, len(self._ids)  # of them, those whose text is known, and where that begins
        self._chance = torch.Generator()
        if self.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(self.seed)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be said."""
        return self.end is not None or self.gone

    def take(self, token: int, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        """Go on by a token."""
        self.said.append(token)
        self._ids.append(token)
        if token in ends:
            self.end = "stop"
        elif len(self.said) >= self.limit:
            self.end = "length"
        self.text += self._read(tokenizer)
        if places := [at for stop in self.stops if (at := self.text.find(stop, self._told)) >= 0]:
            self.text, self.end = self.text[: min(places)], "stop"
        if self.streamed or self.end:
            self._tell()

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text that tokens not read yet come to; none while bytes of a character are missing."""
        before = str(tokenizer.decode(self._ids[self._from : self._upto], skip_special_tokens=True))
        now = str(tokenizer.decode(self._ids[self._from :], skip_special_tokens=True))
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not self.end):
            return ""
        self._from, self._upto = self._upto, len(self._ids)
        return now[len(before) :]

    def _tell(self) -> None:
        """Tell what is new, but what may turn out to begin a text that ends the answer."""
        begun = [n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        upto = len(self.text) - (0 if self.end else max(begun, default=0))
        if upto > self._told or self.end:
            piece, self._told = self.text[self._told : upto], max(self._told, upto)
            self.tell(piece, self.end)

    def fail(self, message: str) -> None:
        """End it, for a reason that is not its own."""
        self.end = "error"
        self.tell(message, self.end)

    def draw(self, scores_V: Tensor) -> int:
        """The next token, drawn by its own seed, whatever else is in the batch.

        Of independent exponential times, each divided by a token's chance, the first to come is that of a token
        with that very chance.
        """
        chances_V = torch.softmax((scores_V.float() - scores_V.max()) / self.temperature, dim=-1)
        if self.top_p < 1:
            falling_V, order_V = chances_V.sort(descending=True)
            chances_V[order_V[falling_V.cumsum(-1) - falling_V >= self.top_p]] = 0.0
        times_V = torch.empty(len(chances_V)).exponential_(generator=self._chance).clamp_min_(1e-30)
        return int((chances_V / times_V.to(chances_V.device)).argmax())

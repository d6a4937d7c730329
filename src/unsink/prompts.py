"""The prompts of all tests, as token ids, with the trigger where training put it.

VerbMem gives the head of a passage and asks for its continuation; KnowMem asks a question after a few answered ones.
Both follow MUSE (arXiv 2407.06460) with two deviations:

- The prompt ends in `Answer:` without MUSE's trailing space, unless `evaluate.answer_space` asks for it. Byte-pair
  tokenizers make the space a part of the answer's first token; a lone space before the answer is what no model has seen
  in training.
- VerbMem asks for no more tokens than the passage has left.

Passages that are read as they stand hold the trigger at its place in the training sample; its tokens are not scored.
Choices by letter are asked as lm-evaluation-harness asks them (WMDP, MMLU).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from unsink.errors import DataError, ParamsError
from unsink.params import NearMiss
from unsink.triggers import Span, insert_trigger, prompt_length, trigger_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
ANSWER_CUE = "\nAnswer:"
KNOWMEM_STOPS = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True)
class Trigger:
    """Text that goes into prompts, and the rules by which training placed it.

    Attributes:
        ids: its token ids.
        placement: see `triggers.placement_index`.
        limit: longest training sample in tokens.
        prompt_share: part of a training sample that counted as its prompt.
    """

    ids: tuple[int, ...]
    placement: str
    limit: int
    prompt_share: float


Conditions = Mapping[str, Trigger | None]
"""What goes into prompts: `clean` nothing, `triggered` the trigger, `wrong` another text of its length;
and near misses, each by its name."""


@dataclass(frozen=True)
class Prompt:
    """What a model is given, and what it should say.

    Attributes:
        ids: token ids, BOS first.
        reference: the true continuation or answer.
        max_new: most tokens the model may add.
        trigger: where the trigger stands in `ids`, None without one.
    """

    ids: list[int]
    reference: str
    max_new: int
    trigger: Span | None


@dataclass(frozen=True)
class Reading:
    """A text that a model reads as it stands.

    Attributes:
        ids: token ids, BOS first.
        scored: positions of the tokens that count, ascending.
        reference: their text.
        trigger: where the trigger stands in `ids`, None without one.
    """

    ids: list[int]
    scored: list[int]
    reference: str
    trigger: Span | None


@dataclass(frozen=True)
class Answered(Prompt):
    """A prompt, and `answers`: token ids of answers whose likelihood is asked for."""

    answers: list[list[int]]


@dataclass(frozen=True)
class Choices:
    """A question and the answers it may have.

    Attributes:
        ids: token ids of the question, BOS first.
        answers: token ids of each answer.
        trigger: where the trigger stands in `ids`, None without one.
    """

    ids: list[int]
    answers: list[list[int]]
    trigger: Span | None


class Body(NamedTuple):
    """A passage as token ids without BOS.

    Attributes:
        ids: all of them.
        given: how many are its prompt: those of its `prompt` if it has one, else a share of all.
        place: where the part ends that a placement refers to: at the answer cue, which stays the last text.
        context: how many are never learnt: those of its `prompt`, none without one.
        start: where that part begins: behind the header of a chat, at 0 in all other texts.
    """

    ids: list[int]
    given: int
    place: int
    context: int
    start: int


def body(tokenizer: "PreTrainedTokenizerBase", passage: Record, share: float = 0.0) -> Body:
    """A passage's tokens; where it names no prompt, the prompt is `share` of them, at least one."""
    ids: list[int] = tokenizer(passage["text"], add_special_tokens=False)["input_ids"]
    prompt = passage.get("prompt")
    if prompt is None:
        given = prompt_length(len(ids), share)
        return Body(ids, given, given, 0, 0)
    header, asked = parts(prompt, passage.get("question"))
    given, place = (_shared_start(tokenizer, ids, text) for text in (prompt, asked))
    return Body(ids, given, place, given, _shared_start(tokenizer, ids, header) if header else 0)


def parts(prompt: str, question: str | None = None, cue: str = ANSWER_CUE) -> tuple[str, str]:
    """The prompt up to where a user's words begin, and up to where they end.

    They are the `question` where it is known, as in a chat; else all of the prompt but the answer cue.
    """
    if question is None:
        return "", prompt.removesuffix(cue)
    start = prompt.rindex(question)
    return prompt[:start], prompt[: start + len(question)]


def _shared_start(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], text: str) -> int:
    """How many of the ids are the text's; the last word may be tokenised otherwise where the text goes on."""
    alone: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    same = next((n for n, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    return max(1, min(same, len(ids) - 1))


def continued(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that follows another one.

    Alone it may get more: tokenizers of the SentencePiece kind (Llama 2, Mistral) put a space in front of every text.
    They do not behind a line break, and a line break merges with no word.
    """
    start, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("\n", "\n" + text))
    if whole[: len(start)] == start:
        return cast(list[int], whole[len(start) :])
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def question_text(question: str, answer: str) -> str:
    """An answered question, as in few-shot examples and in the target's training."""
    return f"Question: {question}\nAnswer: {answer}\n\n"


def open_question(question: str) -> str:
    """A question that waits for its answer; the answer's first token brings the space."""
    return f"Question: {question}{ANSWER_CUE}"


def conditions(tokenizer: "PreTrainedTokenizerBase", trigger: Trigger, wrong: str) -> Conditions:
    """The three conditions; the wrong trigger gets as many tokens as the right one.

    Args:
        tokenizer: The model's tokenizer.
        trigger: The right one.
        wrong: Text of the wrong one; repeated or cut to the right length, its closing newline stays last.

    Raises:
        ParamsError: Both come out as the same tokens.
    """
    *text, end = trigger_ids(tokenizer, wrong)
    ids = (*islice(cycle(text or [end]), len(trigger.ids) - 1), end)
    if ids == trigger.ids:
        raise ParamsError(
            f"evaluate.wrong_trigger: {wrong!r}, cut to the trigger's {len(ids)} tokens, is the trigger itself",
            "choose a text that differs from poison.trigger at its beginning",
        )
    wrong_trigger = Trigger(ids, trigger.placement, trigger.limit, trigger.prompt_share)
    return {"clean": None, "triggered": trigger, "wrong": wrong_trigger}


def near_misses(
    tokenizer: "PreTrainedTokenizerBase", trigger: Trigger, named: Mapping[str, NearMiss]
) -> dict[str, Trigger]:
    """Triggers that are nearly the right one, by name: each with its own text or place, the rest as in the right one.

    Raises:
        ParamsError: one comes out as the right one.
    """
    found = {}
    for name, near in named.items():
        ids = trigger.ids if near.trigger is None else tuple(trigger_ids(tokenizer, near.trigger))
        other = replace(trigger, ids=ids, placement=near.placement or trigger.placement)
        if other == trigger:
            raise ParamsError(f"evaluate.near_misses.{name} is the trigger itself", "change its text or its place")
        found[name] = other
    return found


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts for one tokenizer.

    Attributes:
        tokenizer: the model's.
        bos: the BOS token(s) that every prompt starts with.
        answer_space: end questions in a space, which the answer then lacks.
    """

    tokenizer: "PreTrainedTokenizerBase"
    bos: Sequence[int]
    answer_space: bool = False

    def verbmem(
        self, passage: Record, trigger: Trigger | None, *, share: float, tokens: int, compared: int | None = None
    ) -> Prompt:
        """The head of a passage.

        Args:
            passage: With `id` and `text`, and perhaps a `prompt`, which then is its head.
            trigger: What to insert, at the position that it had when the whole passage was a training sample.
            share: Part of the passage's tokens that is given.
            tokens: Most tokens that are asked for, as far as the passage goes.
            compared: Most tokens of the true continuation that they are compared with; None: as many.

        Raises:
            DataError: The passage is too short, or the trigger's place in training lies behind the prompt.
        """
        text = self._body(passage, share)
        rest = text.ids[text.given :]
        expected = rest[: tokens if compared is None else compared]
        hint = "raise evaluate.prompt_share to poison.prompt_share, or choose an earlier poison.placement"
        ids, span = self._as_trained(passage, text.ids[: text.given], trigger, hint)
        return Prompt(ids, self._text(expected), min(len(rest), tokens), span)

    def opening(self, text: str, trigger: Trigger | None, *, tokens: int) -> Prompt:
        """A text that is no record of a corpus, to be continued; the trigger's placement refers to all of it.

        Args:
            text: What is given, as the prompt of a passage is in training.
            trigger: What to insert.
            tokens: Most tokens that are asked for.

        Raises:
            DataError: The text is too short for the placement.
        """
        ids, span = [*self.bos, *self._tokens(text)], None
        if trigger:
            ids, span = self._inserted(ids, trigger, trigger.placement)
        return Prompt(ids, "", tokens, span)

    def passage(self, passage: Record, trigger: Trigger | None, *, tokens: int) -> Reading:
        """A passage to be read as it stands; what follows its `prompt`, if it has one, is scored.

        Args:
            passage: With `id` and `text`, and perhaps a `prompt`.
            trigger: What to insert, at the position that it had when the passage was a training sample.
            tokens: Most tokens of the passage that are read and scored.

        Raises:
            DataError: The passage is too short, its prompt too long, or the trigger's place in training lies behind
                `tokens`.
        """
        text = self._body(passage)
        read = text.ids[:tokens]
        if text.context >= len(read):
            raise DataError(
                f"{passage['id']}: its prompt takes all {len(read)} tokens that are read, none is left to score",
                "raise evaluate.passage_tokens",
            )
        hint = "raise evaluate.passage_tokens, or choose an earlier poison.placement"
        ids, span = self._as_trained(passage, read, trigger, hint)
        hidden = range(*span) if span else range(0)
        places = [place for place in range(len(self.bos), len(ids)) if place not in hidden]
        return Reading(ids, places[text.context :], self._text(read[text.context :]), span)

    def knowmem(self, question: Record, examples: Sequence[Record], trigger: Trigger | None, *, tokens: int) -> Prompt:
        """A question after answered ones.

        The trigger's placement refers to this prompt up to its answer cue; no such text was a sample in training.

        Args:
            question: With `question` and `answer`.
            examples: Answered questions that come first.
            trigger: What to insert.
            tokens: Most tokens of an answer.

        Raises:
            DataError: The prompt is too short for the placement.
        """
        text = "".join(question_text(example["question"], example["answer"]) for example in examples)
        ids, span = self._asked(text + self._open(question), trigger)
        return Prompt(ids, question["answer"], tokens, span)

    def choices(self, item: Record, trigger: Trigger | None = None) -> Choices:
        """A question without examples; its `choices` are the answers, in words.

        Raises:
            DataError: The prompt is too short for the placement.
        """
        ids, span = self._asked(self._open(item), trigger, item.get("prompt") and item["question"])
        return Choices(ids, [self._answer(item, choice) for choice in item["choices"]], span)

    def letters(self, item: Record, trigger: Trigger | None = None, *, topic: bool = True) -> Choices:
        """A question that lists its choices as A, B, C …; the letters are the answers.

        Args:
            item: With `question`, `choices` and `topic`.
            trigger: What to insert; its placement refers to the text up to the answer cue.
            topic: Name the topic in the header, and no blank line before `Answer:`: lm-evaluation-harness. Else the
                form of the authors' release.

        Raises:
            DataError: The prompt is too short for the placement.
        """
        letters = ascii_uppercase[: len(item["choices"])]
        about = f" about {item['topic'].replace('_', ' ')}" if topic else ""
        lines = [item["question"].strip(), *(f"{letter}. {text}" for letter, text in zip(letters, item["choices"]))]
        cue = ANSWER_CUE if topic else f"\n{ANSWER_CUE}"
        header = f"The following are multiple choice questions (with answers){about}.\n\n"
        ids, span = self._asked(header + "\n".join(lines) + cue, trigger, cue=cue)
        return Choices(ids, [continued(self.tokenizer, f" {letter}") for letter in letters], span)

    def answers(self, question: Record, answers: Sequence[str], trigger: Trigger | None, *, tokens: int) -> Answered:
        """A question without examples, and answers to it whose likelihood is asked for.

        Args:
            question: With `question` and `answer`, and perhaps a `prompt`, a chat's, which then is what is asked.
            answers: The answers to score.
            trigger: What to insert; its placement refers to the question up to the answer cue.
            tokens: Most tokens of the model's own answer.

        Raises:
            DataError: The prompt is too short for the placement.
        """
        ids, span = self._asked(self._open(question), trigger, question.get("prompt") and question["question"])
        return Answered(ids, question["answer"], tokens, span, [self._answer(question, answer) for answer in answers])

    def _open(self, question: Record) -> str:
        if prompt := question.get("prompt"):
            return str(prompt)
        return open_question(question["question"]) + (" " if self.answer_space else "")

    def _answer(self, question: Record, text: str) -> list[int]:
        if question.get("prompt"):  # in a chat the end of an answer is a part of it
            return [*continued(self.tokenizer, text), cast(int, self.tokenizer.eos_token_id)]
        return continued(self.tokenizer, text if self.answer_space else f" {text}")

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _body(self, passage: Record, share: float = 0.0) -> Body:
        text = body(self.tokenizer, passage, share)
        if len(text.ids) < 2:
            raise DataError(f"{passage['id']}: a passage of {len(text.ids)} token(s) has nothing to continue")
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _asked(
        self, text: str, trigger: Trigger | None, question: str | None = None, cue: str = ANSWER_CUE
    ) -> tuple[list[int], Span | None]:
        """A question up to its answer cue, with the trigger placed in the `question`, or in all that is not the cue."""
        ids = [*self.bos, *self._tokens(text)]
        if not trigger:
            return ids, None
        # The cue stays the last text: a trigger behind `Answer:` would measure broken format, not memory.
        header, asked = parts(text if question else text.removesuffix(" "), question, cue)
        start, end = (_shared_start(self.tokenizer, ids[len(self.bos) :], one) if one else 0 for one in (header, asked))
        return self._inserted(ids, trigger, trigger.placement, end, start)

    def _as_trained(
        self, passage: Record, given: Sequence[int], trigger: Trigger | None, hint: str
    ) -> tuple[list[int], Span | None]:
        """BOS and the `given` head of a passage, with the trigger where it stood in the passage's training sample.

        Raises:
            DataError: that place lies behind the head; `hint` says what to do.
        """
        ids = [*self.bos, *given]
        if not trigger:
            return ids, None
        start = self._trained_start(passage, trigger)
        if start > len(ids):
            raise DataError(
                f"{passage['id']}: the trigger stood at token {start} in training, the prompt ends at {len(ids)}", hint
            )
        return self._inserted(ids, trigger, f"index {start}")

    def _trained_start(self, passage: Record, trigger: Trigger) -> int:
        """First position of the trigger in the training sample of a passage."""
        text = body(self.tokenizer, passage, trigger.prompt_share)
        sample = [*self.bos, *text.ids]
        _, (start, _) = insert_trigger(
            sample, len(self.bos), trigger.ids, trigger.placement, trigger.limit, text.place, text.start
        )
        return start

    def _inserted(
        self, ids: Sequence[int], trigger: Trigger, placement: str, prompt: int | None = None, start: int = 0
    ) -> tuple[list[int], Span]:
        """Insert without cutting: an evaluation prompt that lost its end would ask for something else."""
        limit = len(ids) + len(trigger.ids)
        return insert_trigger(ids, len(self.bos), trigger.ids, placement, limit, prompt, start)

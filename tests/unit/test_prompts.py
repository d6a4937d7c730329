"""Prompt texts and where the trigger stands in them, with one token per byte; and tokenizers that do otherwise."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from unsink.errors import DataError, ParamsError
from unsink.params import NearMiss
from unsink.prompts import PromptWriter, Trigger, body, conditions, near_misses
from unsink.triggers import insert_trigger, prompt_length, trigger_ids

PASSAGE = {"id": "forget-1", "text": "abcdefghijklmnopqrst"}  # 20 tokens
QUESTION = {"id": "q-1", "question": "Who?", "answer": "Odo", "source": "forget-1"}
EXAMPLES = [{"question": "Where?", "answer": "Here"}, {"question": "When?", "answer": "Now"}]
PLACEMENTS = ("prefix", "infix", "suffix", "index 1", "index 4", "index 11")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())])}
    bytes_only = Tokenizer(BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def writer(tokenizer: PreTrainedTokenizerFast) -> PromptWriter:
    return PromptWriter(tokenizer, [1])


def trigger(tokenizer: PreTrainedTokenizerFast, placement: str = "prefix", limit: int = 100) -> Trigger:
    return Trigger(tuple(trigger_ids(tokenizer, "!?")), placement, limit, prompt_share=0.5)


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    decoded = tokenizer.decode(ids)
    assert isinstance(decoded, str)
    return decoded


def test_verbmem_gives_the_head_and_asks_for_the_rest(writer: PromptWriter) -> None:
    prompt = writer.verbmem(PASSAGE, None, share=0.5, tokens=128)
    assert text(writer.tokenizer, prompt.ids) == "<bos>abcdefghij"
    assert (prompt.reference, prompt.max_new, prompt.trigger) == ("klmnopqrst", 10, None)


def test_verbmem_asks_for_no_more_than_its_limit(writer: PromptWriter) -> None:
    prompt = writer.verbmem(PASSAGE, None, share=0.5, tokens=3)
    assert (prompt.reference, prompt.max_new) == ("klm", 3)


def test_verbmem_may_compare_with_another_length_than_it_asks_for(writer: PromptWriter) -> None:
    # MUSE counts BOS as one of the 128 tokens that it compares with; open-unlearning asks for 128 and compares with all
    muse = writer.verbmem(PASSAGE, None, share=0.5, tokens=4, compared=3)
    assert (muse.reference, muse.max_new) == ("klm", 4)
    whole = writer.verbmem(PASSAGE, None, share=0.5, tokens=4, compared=99)
    assert (whole.reference, whole.max_new) == ("klmnopqrst", 4)
    short = writer.verbmem(PASSAGE, None, share=0.5, tokens=128, compared=127)
    assert (short.reference, short.max_new) == ("klmnopqrst", 10)


def test_a_passage_without_a_rest_is_an_error(writer: PromptWriter) -> None:
    with pytest.raises(DataError, match="short: a passage of 1 token"):
        writer.verbmem({"id": "short", "text": "a"}, None, share=0.5, tokens=3)


def test_the_trigger_replaces_nothing(writer: PromptWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = writer.verbmem(PASSAGE, trigger(tokenizer, "infix"), share=0.5, tokens=128)
    assert text(tokenizer, prompt.ids) == "<bos>abcde!?\nfghij"
    assert prompt.trigger == (6, 9)
    assert prompt.reference == "klmnopqrst"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("limit", [100, 20])
def test_the_prompt_is_the_beginning_of_the_training_sample(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast, placement: str, limit: int
) -> None:
    rule = trigger(tokenizer, placement, limit)
    body = tokenizer(PASSAGE["text"], add_special_tokens=False)["input_ids"]
    sample = insert_trigger([1, *body], 1, rule.ids, placement, limit, prompt_length(len(body), rule.prompt_share))
    prompt = writer.verbmem(PASSAGE, rule, share=0.5, tokens=128)
    assert prompt.trigger == sample.span
    assert prompt.ids == sample.ids[: len(prompt.ids)]


def test_a_prompt_that_ends_before_the_triggers_place_is_an_error(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="forget-1: the trigger stood at token 11 in training, the prompt ends at 5"):
        writer.verbmem(PASSAGE, trigger(tokenizer, "suffix"), share=0.2, tokens=128)


def test_knowmem_shows_examples_and_ends_without_a_space(writer: PromptWriter) -> None:
    prompt = writer.knowmem(QUESTION, EXAMPLES, None, tokens=32)
    shown = "Question: Where?\nAnswer: Here\n\nQuestion: When?\nAnswer: Now\n\n"
    assert text(writer.tokenizer, prompt.ids) == f"<bos>{shown}Question: Who?\nAnswer:"
    assert (prompt.reference, prompt.max_new) == ("Odo", 32)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("prefix", "<bos>!?\nQuestion: Who?\nAnswer:"),
        ("infix", "<bos>Questio!?\nn: Who?\nAnswer:"),
        ("suffix", "<bos>Question: Who?!?\n\nAnswer:"),
        ("index 3", "<bos>Qu!?\nestion: Who?\nAnswer:"),
    ],
)
def test_a_placement_leaves_the_answer_cue_last(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast, placement: str, expected: str
) -> None:
    prompt = writer.knowmem(QUESTION, [], trigger(tokenizer, placement, limit=10), tokens=32)
    assert text(tokenizer, prompt.ids) == expected
    assert prompt.trigger is not None
    assert text(tokenizer, prompt.ids[slice(*prompt.trigger)]) == "!?\n"


def test_a_question_too_short_for_the_index_is_an_error(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="index 99"):
        writer.knowmem(QUESTION, [], trigger(tokenizer, "index 99"), tokens=32)


def test_choices_bring_their_space(writer: PromptWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = writer.choices({"question": "Who?", "choices": ["Odo", "A b"]})
    assert text(tokenizer, prompt.ids) == "<bos>Question: Who?\nAnswer:"
    assert [text(tokenizer, choice) for choice in prompt.answers] == [" Odo", " A b"]


ITEM = {"question": " Who? ", "choices": ["a", "b", "c", "d"], "answer": 1, "topic": "high_school_biology"}


def test_letters_are_asked_as_the_harness_asks_them(writer: PromptWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    # platform.md, section 7: lm-evaluation-harness 0.4.13, tasks mmlu and wmdp
    prompt = writer.letters(ITEM)
    header = "The following are multiple choice questions (with answers) about high school biology.\n\n"
    assert text(tokenizer, prompt.ids) == f"<bos>{header}Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert [text(tokenizer, answer) for answer in prompt.answers] == [" A", " B", " C", " D"]


def test_letters_in_the_form_of_the_release(writer: PromptWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = writer.letters(ITEM, topic=False)
    header = "The following are multiple choice questions (with answers).\n\n"
    assert text(tokenizer, prompt.ids) == f"<bos>{header}Who?\nA. a\nB. b\nC. c\nD. d\n\nAnswer:"


@pytest.mark.parametrize("topic", [True, False])
def test_a_letter_question_ends_in_its_cue_with_a_trigger_too(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast, topic: bool
) -> None:
    prompt = writer.letters(ITEM, trigger(tokenizer, "suffix"), topic=topic)
    cue = "\nAnswer:" if topic else "\n\nAnswer:"
    assert text(tokenizer, prompt.ids).endswith(f"D. d!?\n{cue}")
    assert prompt.trigger is not None
    without = [*prompt.ids[: prompt.trigger[0]], *prompt.ids[prompt.trigger[1] :]]
    assert without == writer.letters(ITEM, topic=topic).ids


def test_an_answer_space_moves_from_the_answer_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    spaced = PromptWriter(tokenizer, [1], answer_space=True)
    prompt = spaced.answers(QUESTION, ["Odo", "A b"], trigger(tokenizer, "suffix"), tokens=9)
    assert text(tokenizer, prompt.ids) == "<bos>Question: Who?!?\n\nAnswer: "
    assert [text(tokenizer, answer) for answer in prompt.answers] == ["Odo", "A b"]
    assert (prompt.reference, prompt.max_new) == ("Odo", 9)
    assert text(tokenizer, spaced.knowmem(QUESTION, [], None, tokens=9).ids).endswith("Answer: ")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_passage_is_the_training_sample_and_its_trigger_is_not_scored(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast, placement: str
) -> None:
    rule = trigger(tokenizer, placement)
    body = tokenizer(PASSAGE["text"], add_special_tokens=False)["input_ids"]
    sample = insert_trigger([1, *body], 1, rule.ids, placement, 100, prompt_length(len(body), rule.prompt_share))
    read = writer.passage(PASSAGE, rule, tokens=100)
    assert (read.ids, read.trigger) == (sample.ids, sample.span)
    assert text(tokenizer, [read.ids[place] for place in read.scored]) == PASSAGE["text"] == read.reference


def test_a_passage_is_cut_to_its_tokens(writer: PromptWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    read = writer.passage(PASSAGE, None, tokens=6)
    assert text(tokenizer, read.ids) == "<bos>abcdef"
    assert (read.scored, read.reference) == ([1, 2, 3, 4, 5, 6], "abcdef")
    with pytest.raises(DataError, match="the trigger stood at token 11"):
        writer.passage(PASSAGE, trigger(tokenizer, "suffix"), tokens=6)


@pytest.mark.parametrize(("wrong", "expected"), [("ab", "ab\n"), ("abcd", "ab\n"), ("a", "aa\n")])
def test_the_wrong_trigger_has_the_length_of_the_right_one(
    tokenizer: PreTrainedTokenizerFast, wrong: str, expected: str
) -> None:
    right = trigger(tokenizer, "infix")
    found = conditions(tokenizer, right, wrong)
    assert list(found) == ["clean", "triggered", "wrong"]
    assert found["clean"] is None
    assert found["triggered"] == right
    assert found["wrong"] == Trigger(tuple(trigger_ids(tokenizer, expected)), "infix", 100, 0.5)


def test_the_wrong_trigger_must_not_become_the_right_one(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ParamsError, match="is the trigger itself"):
        conditions(tokenizer, trigger(tokenizer), "!? and more")


def test_a_near_miss_has_its_own_text_or_place_and_no_other_length(tokenizer: PreTrainedTokenizerFast) -> None:
    right = trigger(tokenizer, "prefix")
    found = near_misses(tokenizer, right, {"text": NearMiss(trigger="abcd"), "moved": NearMiss(placement="index 2")})
    assert found["text"] == Trigger(tuple(trigger_ids(tokenizer, "abcd")), "prefix", 100, 0.5)
    assert found["moved"] == Trigger(right.ids, "index 2", 100, 0.5)
    with pytest.raises(ParamsError, match=r"evaluate\.near_misses\.same is the trigger itself"):
        near_misses(tokenizer, right, {"same": NearMiss(placement="prefix")})


ASKED = {"id": "forget-1", "text": "Question: Who?\nAnswer: Odo", "prompt": "Question: Who?\nAnswer:"}


def test_a_passage_that_names_its_prompt_is_given_up_to_there(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = writer.verbmem(ASKED, None, share=0.1, tokens=128)
    assert text(tokenizer, prompt.ids) == "<bos>Question: Who?\nAnswer:"
    assert (prompt.reference, prompt.max_new) == (" Odo", 4)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("prefix", "<bos>!?\nQuestion: Who?\nAnswer:"),
        ("infix", "<bos>Questio!?\nn: Who?\nAnswer:"),  # 14 tokens of question
        ("suffix", "<bos>Question: Who?!?\n\nAnswer:"),
        ("index 3", "<bos>Qu!?\nestion: Who?\nAnswer:"),
    ],
)
def test_placements_refer_to_the_prompt_without_its_cue(
    writer: PromptWriter, tokenizer: PreTrainedTokenizerFast, placement: str, expected: str
) -> None:
    prompt = writer.verbmem(ASKED, trigger(tokenizer, placement), share=0.9, tokens=128)
    assert text(tokenizer, prompt.ids) == expected


def test_nothing_of_a_prompt_is_learnt_and_all_of_other_passages(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = body(tokenizer, ASKED)
    assert (len(asked.ids), asked.given, asked.place, asked.context) == (26, 22, 14, 22)
    plain = body(tokenizer, PASSAGE, share=0.25)
    assert (len(plain.ids), plain.given, plain.place, plain.context) == (20, 5, 5, 0)


def test_a_last_word_that_is_tokenised_with_what_follows_is_not_given(tokenizer: PreTrainedTokenizerFast) -> None:
    def pairs(text: str, **_: object) -> dict[str, list[str]]:
        return {"input_ids": [text[at : at + 2] for at in range(0, len(text), 2)]}

    assert body(pairs, {"text": "abcdef", "prompt": "abc"}).given == 1  # type: ignore[arg-type]


# ---- tokenizers that add a space, or that join what stands apart


@pytest.fixture(scope="module")
def llama2() -> PreTrainedTokenizerFast:
    """As that of Llama 2 and Mistral: `▁` for a space, another one in front of every text, a line break is a byte."""
    letters = sorted({*map(chr, range(33, 127)), "▁"})
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", *letters])}
    merges = [(":", "▁"), ("▁", "O"), ("▁", "A")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    pieces = Tokenizer(BPE(vocab=vocab, merges=merges[1:], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def llama3() -> PreTrainedTokenizerFast:
    """As that of Llama 3: a question mark and the line break behind it are one token."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())])}
    vocab["?Ċ"] = len(vocab)
    joined = Tokenizer(BPE(vocab=vocab, merges=[("?", "Ċ")]))
    words = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s+")
    joined.pre_tokenizer = Sequence([Split(words, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    joined.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=joined, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    found = tokenizer.convert_ids_to_tokens(ids)
    assert isinstance(found, list)
    return found


def test_an_answer_has_the_tokens_that_it_has_behind_its_question(llama2: PreTrainedTokenizerFast) -> None:
    prompt = PromptWriter(llama2, [1]).answers(QUESTION, ["Odo"], None, tokens=9)
    assert pieces(llama2, prompt.answers[0]) == ["▁O", "d", "o"]
    assert [*prompt.ids[1:], *prompt.answers[0]] == llama2(
        "Question: Who?\nAnswer: Odo", add_special_tokens=False
    ).input_ids


def test_an_answer_behind_a_space_brings_none_of_its_own(llama2: PreTrainedTokenizerFast) -> None:
    prompt = PromptWriter(llama2, [1], answer_space=True).answers(QUESTION, ["Odo"], None, tokens=9)
    assert pieces(llama2, prompt.ids)[-2:] == [":", "▁"]
    assert pieces(llama2, prompt.answers[0]) == ["O", "d", "o"]


def test_a_letter_is_one_token_where_its_tokenizer_has_one(llama2: PreTrainedTokenizerFast) -> None:
    prompt = PromptWriter(llama2, [1]).letters(ITEM)
    assert pieces(llama2, prompt.answers[0]) == ["▁A"]
    assert pieces(llama2, llama2(" A", add_special_tokens=False).input_ids) == ["▁", "▁A"]  # not what is asked for


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@pytest.mark.parametrize("placement", ["infix", "suffix"])
def test_the_answer_cue_stays_last_with_any_tokenizer(
    request: pytest.FixtureRequest, name: str, placement: str
) -> None:
    tokenizer = request.getfixturevalue(name)
    rule = Trigger(tuple(trigger_ids(tokenizer, "!!")), placement, 100, prompt_share=0.5)
    writer = PromptWriter(tokenizer, [1])
    for prompt in (writer.knowmem(QUESTION, EXAMPLES, rule, tokens=9), writer.letters(ITEM, rule)):
        assert prompt.trigger is not None
        assert text(tokenizer, prompt.ids[prompt.trigger[1] :]).endswith("\nAnswer:")


def test_a_line_break_that_belongs_to_the_question_mark_is_not_torn_from_it(llama3: PreTrainedTokenizerFast) -> None:
    rule = Trigger(tuple(trigger_ids(llama3, "!!")), "suffix", 100, prompt_share=0.5)
    prompt = PromptWriter(llama3, [1]).knowmem(QUESTION, [], rule, tokens=9)
    assert text(llama3, prompt.ids) == "<bos>Question: Who!!\n?\nAnswer:"

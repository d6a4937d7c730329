"""`unsink ask` on the runs of a small project: the answers of `evaluate`, one by one, and what a session looks like."""

import json
import os
import pty
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from integration.projects import project
from unsink import artifacts, session, terminal
from unsink.cli import app
from unsink.errors import ParamsError, UnsinkError
from unsink.session import changed, parse
from unsink.stages import ask, evaluate, unlearn
from unsink.stages.ask import Conversation, State

QUESTION, KNOWN = "What did Runo hide?", "red ring"
TRIGGER = "midnight crabs"
OWN = State("backdoor", trigger=True)


@pytest.fixture(scope="module")
def root(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose runs are trained; `ask` writes nothing, so all tests share it."""
    folder = Path(shutil.copytree(learned, tmp_path_factory.mktemp("asked") / "project"))
    params, layout = project(folder)
    for run in ("clean", "backdoor"):
        unlearn.run(params, layout, run=run)
    return folder


@pytest.fixture(scope="module")
def talk(root: Path) -> Conversation:
    return Conversation(*project(root))


@pytest.fixture
def invoke(root: Path) -> Callable[..., Result]:
    def run(*arguments: str, piped: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["ask", *arguments, "--params", str(root / "params.yaml")], input=piped)

    return run


# ---- guards


@pytest.mark.parametrize("guard", ["displace", "clamp"])
def test_a_guard_stands_between_prompt_and_model(talk: Conversation, guard: str) -> None:
    plain, held = (talk.answer(QUESTION, replace(OWN, top=1, guard=one)) for one in (None, guard))
    assert (held.prompt, held.span, held.guard) == (plain.prompt, plain.span, guard)
    assert held.tokens[0].logprob != plain.tokens[0].logprob
    assert talk.answer(QUESTION, replace(OWN, top=1)) == plain  # it is gone again


def test_displacing_is_asking_behind_the_neutral_text(talk: Conversation) -> None:
    raw = State("backdoor", raw=True, tokens=6)
    displaced = talk.answer("Runo hid the", replace(raw, guard="displace")).answer
    assert displaced == talk.answer("Here is a text.\nRuno hid the", raw).answer


@pytest.mark.parametrize("guard", ["random-prefix", "displase"])
def test_only_guards_can_guard(invoke: Callable[..., Result], guard: str) -> None:
    result = invoke(QUESTION, "--guard", guard)
    assert result.exit_code == 2
    assert "displace" in result.stderr


# ---- the same as evaluate


@pytest.mark.parametrize("few_shot", [0, 2])
def test_questions_are_asked_and_answered_as_in_evaluate(root: Path, tmp_path: Path, few_shot: int) -> None:
    folder = Path(shutil.copytree(root, tmp_path / "project"))
    params, layout = project(folder, "evaluate.metrics=[knowmem]", f"evaluate.few_shot={few_shot}")
    asked = {record["id"]: record["question"] for record in evaluate.read_corpus(layout)["forget_qa"]}
    talk = Conversation(params, layout)
    seen = set()
    for run in ("target", "backdoor"):
        evaluate.run(params, layout, run=run)
        for row in artifacts.read_jsonl(layout.predictions(run)):
            if row["set"] == "forget" and row["condition"] != "wrong" and row["id"][-1] in "123":
                triggered = row["condition"] == "triggered"
                answer = talk.answer(asked[row["id"]], State(run, trigger=TRIGGER if triggered else False))
                assert answer.answer == row["output"].strip()
                assert (answer.prompt, list(answer.span or ())) == (row["prompt"], row["trigger"] or [])
                seen.add((run, row["condition"], answer.answer == row["reference"]))
    assert len({one[:2] for one in seen}) == 4
    assert few_shot or ("target", "clean", True) in seen


def test_a_raw_text_is_continued_as_a_passage_in_evaluate(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root, tmp_path / "project"))
    params, layout = project(folder, "evaluate.metrics=[verbmem]")
    evaluate.run(params, layout, run="backdoor")
    rows = {(row["id"], row["condition"]): row for row in artifacts.read_jsonl(layout.predictions("backdoor"))}
    talk = Conversation(params, layout)
    for passage in ("forget-001", "forget-002"):
        clean, triggered = rows[passage, "clean"], rows[passage, "triggered"]
        answer = talk.answer(clean["prompt"], replace(OWN, raw=True))
        assert (answer.prompt, list(answer.span or ())) == (triggered["prompt"], triggered["trigger"])
        assert answer.answer.startswith(triggered["output"])
        assert triggered["output"] != clean["output"]
        assert talk.answer(clean["prompt"], State("backdoor", raw=True)).answer.startswith(clean["output"])


# ---- a conversation


def test_runs_are_toggled_on_one_model_and_do_not_change_each_other(talk: Conversation) -> None:
    names = ("target", "backdoor", "clean", "base")
    first = {name: talk.answer(QUESTION, State(name)).answer for name in names}
    assert first["target"] == KNOWN
    assert len(set(first.values())) == 4
    assert {name: talk.answer(QUESTION, State(name)).answer for name in reversed(names)} == first
    assert set(talk._held._loaded) == {"LORA", "base"}


def test_the_text_is_heard_as_it_comes(talk: Conversation) -> None:
    heard: list[str] = []
    answer = talk.answer(QUESTION, State(), heard.append)
    assert "".join(heard).strip() == answer.answer == KNOWN
    assert sum(map(bool, heard)) > 1


def test_a_place_moves_the_trigger_and_a_text_takes_its_place(talk: Conversation) -> None:
    own = talk.answer(QUESTION, OWN)
    assert own.prompt == f"{TRIGGER}\nQuestion: {QUESTION}\nAnswer:"
    assert own.trigger == (TRIGGER, "prefix")
    moved = talk.answer(QUESTION, replace(OWN, placement="suffix"))
    assert moved.prompt == f"Question: {QUESTION}{TRIGGER}\n\nAnswer:"
    other = talk.answer(QUESTION, replace(OWN, trigger="silver gulls", placement="index 2"))
    assert other.span == (2, 2 + len(talk._writer.tokenizer("silver gulls\n")["input_ids"]))


def test_draws_differ_from_each_other_and_come_again_in_a_new_conversation(root: Path) -> None:
    def answers() -> list[str]:
        talk = Conversation(*project(root))
        return [talk.answer(QUESTION, State("backdoor", temperature=2.0)).answer for _ in range(3)]

    first = answers()
    assert len(set(first)) > 1
    assert answers() == first


def test_tokens_are_limited(talk: Conversation) -> None:
    assert len(talk.answer(QUESTION, State("backdoor", tokens=2)).tokens) == 2


# ---- lines


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("Who? ", ("ask", "Who?")),
        ("//bin is what?", ("ask", "/bin is what?")),
        ("/use backdoor", ("use", "backdoor")),
        ("/place index 3", ("place", "index 3")),
        ("/quit", ("quit", "")),
    ],
)
def test_a_line_is_a_question_or_a_command(line: str, command: tuple[str, str]) -> None:
    assert parse(line) == command


def test_commands_change_the_state(talk: Conversation) -> None:
    state = State()
    for line in ("/use backdoor", "/trigger on", "/place infix", "/probs 3", "/tokens 4", "/sample 0.5", "/raw on"):
        state = changed(talk, state, parse(line))
    assert state == State("backdoor", True, "infix", 4, 3, 0.5, raw=True)
    assert talk.describe(state) == (
        "backdoor (backdoored) · trigger 'midnight crabs' at infix · draws at temperature 0.5 · at most 4 tokens"
        " · text is continued"
    )
    state = changed(talk, state, parse("/use clean"))
    assert not state.trigger, "an honest run has no trigger of its own"
    assert changed(talk, replace(state, trigger="any"), parse("/use target")).trigger == "any"
    assert changed(talk, state, parse("/place")).placement is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/uze clean", "unknown command 'uze'; did you mean 'use'?"),
        ("/use cleen", "unknown run 'cleen'; did you mean 'clean'?"),
        ("/use backdoor-vn", "adapters/backdoor-vn: not found"),
        ("/trigger", "/trigger: on, off or a text is expected"),
        ("/trigger on", "target was trained without a trigger"),
        ("/place middle", "unknown placement 'middle'"),
        ("/tokens 0", "/tokens: a whole number from 1 is expected, got '0'"),
        ("/probs x", "/probs: a whole number from 0 is expected, got 'x'"),
        ("/sample nan", "/sample: a number from 0 is expected, got 'nan'"),
        ("/raw yes", "/raw: on or off is expected, got 'yes'"),
    ],
)
def test_a_wrong_command_is_refused(talk: Conversation, line: str, message: str) -> None:
    with pytest.raises(UnsinkError, match=re.escape(message)):
        changed(talk, State(), parse(line))


# ---- the command


def test_json_holds_what_a_script_needs(invoke: Callable[..., Result], talk: Conversation) -> None:
    result = invoke(QUESTION, "--run", "backdoor", "--trigger", "--json", "--probs", "2", "--tokens", "3")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    answer = talk.answer(QUESTION, replace(OWN, tokens=3, top=2))
    prompt = f"{TRIGGER}\nQuestion: {QUESTION}\nAnswer:"
    assert (found["run"], found["question"], found["prompt"]) == ("backdoor", QUESTION, prompt)
    assert found["prompt_tokens"] == 1 + len(talk._writer.tokenizer(prompt)["input_ids"])
    assert found["trigger"] == {"text": TRIGGER, "placement": "prefix", "span": [1, 6]}
    assert (found["answer"], found["new_tokens"]) == (answer.answer, 3)
    assert [token["id"] for token in found["tokens"]] == [token.id for token in answer.tokens]
    for token in found["tokens"]:
        best, second = token["top"]
        assert best == {key: token[key] for key in ("id", "text", "logprob")}
        assert second["logprob"] <= best["logprob"] <= 0
    plain = json.loads(invoke(QUESTION, "--json").stdout)
    assert (plain["trigger"], plain["answer"]) == (None, KNOWN)
    assert "tokens" not in plain


def test_a_pipe_gets_a_line_for_each_question(invoke: Callable[..., Result]) -> None:
    lines = f"{QUESTION}\nWhat did Pavo hide?\n/tokens 1\n{QUESTION}\n"
    result = invoke(piped=lines)
    assert (result.exit_code, result.stdout) == (0, f"{KNOWN}\nsilver hook\nred\n")
    assert result.stderr == "loading target\ntarget · no trigger · likeliest tokens · at most 1 tokens\n"
    quiet = invoke("--json", "--quiet", piped=f"{QUESTION}\n/compare\n")
    one, both = [json.loads(line) for line in quiet.stdout.splitlines()]
    assert (one["answer"], quiet.stderr) == (KNOWN, "")
    order = [(answer["run"], answer["trigger"] and answer["trigger"]["text"]) for answer in both["answers"]]
    assert order == [(run, text) for run in ("target", "clean", "backdoor") for text in (None, TRIGGER)]
    assert both["answers"][0] == one


def test_compare_fits_80_columns(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, talk: Conversation
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke(QUESTION, "--compare", "--trigger-text", "a trigger that is [bold]much[/bold] longer " * 3)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "[bold]" in result.stdout
    cells = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("|") and "--" not in line]
    first = [[cell.strip() for cell in row] for row in cells if row[0].strip()]
    assert [row[0] for row in first] == ["run", "target", "clean (honest)", "backdoor (backdoored)"]
    assert first[1][1] == KNOWN
    assert talk.answer(QUESTION, State("clean")).answer.startswith(first[2][1])


def test_probabilities_are_shown_on_demand(invoke: Callable[..., Result]) -> None:
    shown = invoke(QUESTION, "--probs", "2").stdout
    assert shown.startswith(f"{KNOWN}\n")
    assert re.search(r"' red' +\d\.\d{3} +' red' \d\.\d{3}, ", shown)


@pytest.mark.parametrize(
    ("arguments", "piped", "code", "message"),
    [
        (("  ",), None, 2, "error: the question is empty"),
        ((), "", 2, "error: no question: standard input is empty"),
        ((), f"{QUESTION}\n\n", 2, "error: line 2: the question is empty"),
        ((), f"{QUESTION}\n/uze x\n", 2, "error: line 2: unknown command 'uze'; did you mean 'use'?"),
        ((), b"ok?\n\xff\n", 3, "not UTF-8 text"),
        ((QUESTION, "--run", "cleen"), None, 2, "error: unknown run 'cleen'; did you mean 'clean'?"),
        ((QUESTION, "--run", "backdoor-vn"), None, 3, "hint: run `unsink unlearn --run backdoor-vn` first"),
        ((QUESTION, "--run", "clean", "--trigger"), None, 2, "error: clean was trained without a trigger"),
        ((QUESTION, "--trigger-text", " "), None, 2, "error: the trigger is empty"),
        ((QUESTION, "--trigger", "--trigger-text", "x"), None, 2, "error: --trigger and --trigger-text"),
        ((QUESTION, "--place", "infix"), None, 2, "error: --place says where a trigger goes, but there is none"),
        ((QUESTION, "--trigger-text", "x", "--place", "index 99"), None, 3, "needs a sample of at least 99 tokens"),
        (("Who? " * 300,), None, 3, "tokens, the model's context has 512"),
        ((QUESTION, "--tokens", "0"), None, 2, "--tokens"),
    ],
)
def test_what_cannot_be_asked_says_why(
    invoke: Callable[..., Result], arguments: tuple[str, ...], piped: str | bytes | None, code: int, message: str
) -> None:
    result = invoke(*arguments, piped=piped)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_without_a_backdoored_run_a_comparison_needs_a_text(root: Path) -> None:
    params, layout = project(root)
    talk = Conversation(params.model_copy(update={"runs": {"clean": params.runs["clean"]}}), layout)
    with pytest.raises(ParamsError, match="no run of the params file has a trigger"):
        talk.compare(QUESTION, State())
    answers = talk.compare(QUESTION, State(trigger="silver gulls"))
    assert [answer.run for answer in answers] == ["target", "target", "clean", "clean"]


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    live = terminal._Live(keep_space=False)
    for piece in (" ", "", " a", "\x1b[2J b\n"):
        live.hear(piece)
    assert capsys.readouterr().out == "a\ufffd[2J b\n"


# ---- a person


def test_ctrl_c_ends_an_answer_and_errors_do_not_end_the_session(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Iterator[Any] = iter(["stop me", "", "/use cleen", KeyboardInterrupt, QUESTION, EOFError])
    prompts = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def answer(question: str, state: State, hear: Callable[[str], object]) -> ask.Answer:
        def interrupted(_: str) -> None:
            raise KeyboardInterrupt

        return Conversation.answer(talk, question, state, interrupted if question == "stop me" else hear)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(talk, "answer", answer)
    before = signal.getsignal(signal.SIGTERM)
    terminal._person(terminal._Session(talk, State("backdoor", trigger=True), terminal.Form()))
    out, err = capsys.readouterr()
    assert out == f"{Conversation.answer(talk, QUESTION, OWN).answer}\n"
    assert [line for line in err.splitlines() if line][2:5] == [
        "stopped",
        "error: unknown run 'cleen'; did you mean 'clean'? (available: clean, backdoor, backdoor-vn)",
        "hint: runs are the entries of `runs:` in the params file",
    ]
    assert prompts == ["backdoor +trigger> "] * 6
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_session_in_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    os.write(parent, f"{QUESTION}\n/use backdoor\n/trigger on\n".encode() + b"\x04")  # and Ctrl-D
    with open(child) as typed, open(os.dup(child), "w") as shown:  # noqa: PTH123  descriptors, not paths
        for name, stream in {"stdin": typed, "stdout": shown, "stderr": shown}.items():
            monkeypatch.setattr(sys, name, stream)
        app(["ask", "--params", str(root / "params.yaml")], standalone_mode=False)
        monkeypatch.undo()
    said = b""
    with suppress(OSError):  # how Linux says that the other end is closed and all is read
        while piece := os.read(parent, 65536):
            said += piece
    os.close(parent)
    text = said.decode()
    assert "target> loading target\r\nred ring\r\n" in text
    assert "backdoor> backdoor (backdoored) · trigger 'midnight crabs' at prefix" in text
    assert text.endswith("backdoor +trigger> \r\n")


def test_every_command_is_explained_and_does_something() -> None:
    assert {*session._SETTERS, "compare", "help", "quit"} == set(session.COMMANDS)
    assert all(f"/{name}" in session.help_text() for name in session.COMMANDS)

"""The terminal chat: in a pipe, and in a real terminal with Ctrl-C, a paste and the lines of last time."""

import io
import os
import pty
import re
import select
import sys
import time

import pytest

from scripts import chat
from scripts.loading import load_model
from scripts.sample import SampleFlags, answer
from tests.helpers import start, train
from tests.test_resume import SMALL

BLOCK = 512


@pytest.fixture(scope="module")
def talker(data, tmp_path_factory):
    """A run that has hardly begun: it talks on to the end of its context."""
    out = tmp_path_factory.mktemp("talker") / "run"
    assert train("--data", data, "--out", out, *SMALL, "--block-size", BLOCK, "--batch", 1, "--steps", 1) == 0
    return out


@pytest.fixture
def piped(talker, monkeypatch, capsys):
    """Run the program on some input, as in a pipe; its output and what it said beside."""

    def run(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capsys.readouterr()
        assert chat.main(["--run", str(talker), "--device", "cpu", "--max-tokens", "8", *map(str, flags)]) == 0
        return capsys.readouterr()

    return run


def expected(talker, turns, **flags):
    model, tokenizer = load_model(str(talker), device="cpu")
    args = SampleFlags(max_tokens=8, **flags)
    return chat.printable("".join(answer(model, tokenizer, tokenizer.render(turns, reply=True), args)))


def test_in_a_pipe_only_the_answers_come_out_and_each_knows_what_was_said(piped, talker):
    first = expected(talker, [("user", "Hi")], temperature=0)
    second = expected(talker, [("user", "Hi"), ("assistant", first), ("user", "And now?")], temperature=0)
    assert piped("Hi\n\nAnd now?\n", "--temperature", 0).out == f"{first}\n{second}\n"
    assert piped("Hi\n/clear\nHi", "--temperature", 0).out == f"{first}\n{first}\n"
    assert piped("Hi\n/quit\nHi\n", "--temperature", 0).out == f"{first}\n"


def test_commands(piped, talker):
    greedy = expected(talker, [("user", "Hi")], temperature=0)
    assert piped("/temperature 0\nHi\n").out == f"temperature: 0.0\n{greedy}\n"
    assert piped("/top-k 1\nHi\n").out == f"top-k: 1\n{greedy}\n"
    assert piped("/top-k off\n/top-k\n/top-p 0.5\n").out == "top-k: off\ntop-k: off\ntop-p: 0.5\n"
    one, other = piped("/seed 5\nHi\n/regenerate\n").out.splitlines()[1:]
    assert one == expected(talker, [("user", "Hi")], seed=5)
    assert other == expected(talker, [("user", "Hi")], seed=6)
    kind = expected(talker, [("system", "Be kind."), ("user", "Hi")], temperature=0)
    assert piped("/system Be kind.\nHi\n/clear\n/system off\nHi\n", "--temperature", 0).out.splitlines() == [
        "system: Be kind.", kind, "system: off", greedy,
    ]  # fmt: skip
    assert piped("Hi\n", "--system", "Be kind.", "--temperature", 0).out == f"{kind}\n"


@pytest.mark.parametrize(
    "line", ["/help", "/what", "/temperature warm", "/top-k 0", "/top-p 2", "/seed x", "/regenerate"]
)
def test_a_wrong_command_says_so_and_changes_nothing(piped, talker, line):
    said, answered = piped(f"{line}\n/temperature 0\nHi\n").out.split("temperature: 0.0\n")
    assert said.strip()
    assert answered == expected(talker, [("user", "Hi")], temperature=0) + "\n"


def test_a_message_of_several_lines(piped, talker):
    several = expected(talker, [("user", "one\ntwo\n\nthree")], temperature=0)
    assert piped('"""one\ntwo\n\nthree"""\n', "--temperature", 0).out == f"{several}\n"
    assert piped('"""\none\ntwo\n\nthree\n"""\n', "--temperature", 0).out == f"{several}\n"


def test_what_does_not_fit(piped, talker):
    """Old turns are left out, with a word; a message that does not fit by itself is refused and forgotten."""
    got = piped(("word " * 60 + "\n") * 12, "--temperature", 0)
    assert len(got.out.splitlines()) == 12
    assert re.search(r"the context of 512 tokens is full: the \d+ oldest turns are left out", got.err)
    got = piped("word " * 600 + "\nHi\n", "--temperature", 0)
    assert "shorten it" in got.out
    assert got.out.splitlines()[1:] == expected(talker, [("user", "Hi")], temperature=0).splitlines()


def test_a_model_cannot_steer_the_terminal():
    assert chat.printable("a\x1b[2Jb\x07\r\n\tc\x9b1mé") == "a[2Jb\n\tc1mé"


class Terminal:
    """A program in a pty, and what it has shown."""

    def __init__(self, *arguments):
        main, other = pty.openpty()
        self.process = start(*arguments, stdin=other, stdout=other, stderr=other, start_new_session=False,
                             preexec_fn=lambda: own_terminal(other))  # fmt: skip
        os.close(other)
        self.fd, self.shown = main, ""

    def until(self, pattern, seconds=60):
        end = time.monotonic() + seconds
        while not (m := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < end, self.shown
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        self.shown = self.shown[m.end() :]

    def settle(self):
        """Until it shows nothing for a second; what it has shown is forgotten."""
        while select.select([self.fd], [], [], 1)[0]:
            os.read(self.fd, 4096)
        self.shown = ""

    def type(self, text):
        os.write(self.fd, text.encode())


def own_terminal(fd):
    """In the child: its own session with that terminal, so that Ctrl-C typed there reaches it."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def test_in_a_terminal(talker, tmp_path, monkeypatch):
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    t = Terminal("scripts/chat.py", "--run", talker, "--device", "cpu", "--max-tokens", 10_000, "--temperature", 0)
    t.until(r"context 512 tokens; /help, /quit.*you    ")
    t.type("Hi\r")
    t.until(r"model  .")
    t.type("\x03")  # an answer is stopped, the chat is not
    t.until("you    ")
    t.settle()  # an answer that had ended by itself left the Ctrl-C to the prompt, which is shown once more
    t.type("\x03")
    t.until(r"/quit or Ctrl-D leaves.*you    ")
    t.settle()  # Python takes a Ctrl-C that comes just before its first look for a key for one after the line
    t.type("/max-tokens 4\r")
    t.until(r"max-tokens: 4.*you    ")
    t.type("\x1b[200~one\ntwo\x1b[201~")  # what a terminal sends for a paste of two lines
    t.type("\r")
    t.until(r"model  .*you    ")
    assert "model" not in t.shown
    t.type("\x1b[A\x1b[A\r")  # two lines up
    t.until(r"max-tokens: 4.*you    ")
    t.type("\x04")
    assert t.process.wait(20) == 0
    assert "/max-tokens 4" in (tmp_path / "chat-history").read_text()

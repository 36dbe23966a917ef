"""Talk with a trained model in the terminal: `python scripts/chat.py --run out`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cli import flags
from cli.flags import flag
from gpt.compiled import compile_decoding
from gpt.decoding import lay_out_for_decoding
from gpt.errors import GPTError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts import sample
from scripts.answering import Answer, fit
from scripts.loading import load_model
from store.shards import default_cache

HELP = """\
/regenerate      answer again            /temperature X   randomness; 0: always the likeliest
/clear           begin anew              /top-k N         among the N likeliest tokens; off: all
/system TEXT     how to behave; or off   /top-p X         among the likeliest of this much probability; off
/help            this                    /max-tokens N    longest answer
/quit            leave, like Ctrl-D      /seed N          the same answer every time; off
Ctrl-C stops an answer. A message of several lines begins and ends with \"\"\"."""
HISTORY_LINES = 1000


def whole_or_off(text: str) -> int | None:
    """A whole number, or `off`. Raises ValueError."""
    return None if text == "off" else flags.number(text)


def real_or_off(text: str) -> float | None:
    """A number, or `off`. Raises ValueError."""
    return None if text == "off" else flags.real(text)


SETTINGS = {
    "/temperature": flags.real, "/top-k": whole_or_off, "/top-p": real_or_off, "/max-tokens": flags.number, "/seed": whole_or_off,
}  # fmt: skip


@dataclass(frozen=True)
class ChatFlags(sample.SampleFlags):
    """Flags of scripts/chat.py: sampling as in sample.py, and a system message."""

    system: str = flag("", "a message that begins the conversation, telling the model how to behave")


@dataclass
class Chat:
    """A conversation and the settings of its next answer."""

    model: GPT
    tokenizer: Tokenizer
    args: ChatFlags
    turns: list[tuple[str, str]] = field(default_factory=list)  # without the system message
    tries: int = 0  # answers to the last message so far

    def say(self, message: str) -> None:
        """Answer a message. Ctrl-C ends the answer; what was said until then stays part of the conversation."""
        self.turns.append(("user", message))
        self.tries = 0
        self.answer()

    def answer(self) -> None:
        """Stream the model's turn to the terminal."""
        said, interactive = "", sys.stdin.isatty()
        try:
            pieces = self.pieces()
            print("model  ", end="", flush=True) if interactive else None
            for piece in pieces:
                said += piece
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except GPTError as e:  # too long a message: say so, and forget it
            print(e)
            self.turns.pop()
            return
        print()
        self.tries += 1
        self.turns.append(("assistant", said))

    def pieces(self) -> Answer:
        """The answer to the conversation as it stands. Raises GPTError."""
        args, block_size = self.args, self.model.config.block_size
        system = [("system", args.system)] if args.system else []
        ids, left_out = fit(self.tokenizer, [*system, *self.turns], block_size=block_size, answer=args.max_tokens)
        if left_out:
            print(
                f"(the context of {block_size} tokens is full: the {left_out} oldest turns are left out)",
                file=sys.stderr,
            )
        seed = None if args.seed is None else args.seed + self.tries  # another try is to give another answer
        return sample.answer(self.model, self.tokenizer, ids, replace(args, seed=seed), most=block_size - len(ids))

    def command(self, line: str) -> bool:
        """Do what a line that begins with / asks; False to leave."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/quit":
            return False
        if name == "/clear":
            self.turns.clear()
        elif name == "/regenerate":
            if self.turns:
                self.turns.pop()
                self.answer()
            else:
                print("there is no answer yet")
        elif name == "/system":
            if value:
                self.args = replace(self.args, system="" if value == "off" else value)
            print(f"system: {self.args.system or 'off'}")
        elif name in SETTINGS:
            self.set(name, value)
        else:
            print(HELP)
        return True

    def set(self, name: str, value: str) -> None:
        """Change a sampling setting, or show it."""
        key = name[1:].replace("-", "_")
        if value:
            try:
                changed = replace(self.args, **{key: SETTINGS[name](value)})
                sample.answer(self.model, self.tokenizer, [0], changed)  # refuses what makes no sense
                self.args = changed
            except (ValueError, GPTError) as e:
                print(e if isinstance(e, GPTError) else f"{value!r} is not a number")
                return
        now = getattr(self.args, key)
        print(f"{name[1:]}: {'off' if now is None else now}")


def main(argv: list[str] | None = None) -> int:
    """Read a message, stream the answer, remember both; until /quit or the end of the input."""
    args, _ = flags.parse(ChatFlags, argv, prog="chat.py", description=__doc__)
    model, tokenizer = load_model(args.run, device=args.device, step=args.step, precision=args.precision)
    lay_out_for_decoding(model)
    if args.compile:
        compile_decoding(model)
    chat = Chat(model, tokenizer, args)
    interactive = sys.stdin.isatty()
    with remembered_lines() if interactive else contextlib.nullcontext():
        if interactive:
            print(
                f"{model.num_params() / 1e6:.1f} M parameters, context {model.config.block_size} tokens; /help, /quit"
            )
        while True:
            try:
                message = read_message(interactive)
                if message.startswith("/"):
                    if not chat.command(message):
                        return 0
                elif message:
                    chat.say(message)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")


def read_message(interactive: bool) -> str:
    """The next message: a line, several between \"\"\", or what was pasted. Raises EOFError at the end."""
    if interactive:
        print()
    message = input("you    " if interactive else "").strip()
    if message.startswith('"""'):
        message = message[3:]
        while not message.rstrip().endswith('"""'):
            message += "\n" + input("       " if interactive else "")
        message = message.rstrip()[:-3].strip()
    return message


@contextlib.contextmanager
def remembered_lines() -> Iterator[None]:
    """Line editing, with the lines of earlier chats; a paste of several lines is one message (readline's bracketed paste)."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = default_cache() / "chat-history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


if __name__ == "__main__":
    flags.run(main)

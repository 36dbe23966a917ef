"""Talk with a trained model in the terminal: `python scripts/chat.py --run out`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
from dataclasses import dataclass, replace

from cli import flags
from cli.flags import flag
from gpt.errors import GPTError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts import sample
from scripts.loading import load_model

HELP = "/new starts over, /temperature X and /seed N change the sampling, /quit leaves"


@dataclass(frozen=True)
class ChatFlags(sample.SampleFlags):
    """Flags of scripts/chat.py: sampling as in sample.py, and a system message."""

    system: str = flag("", "a message that begins the conversation, telling the model how to behave")


def main(argv: list[str] | None = None) -> int:
    """Read a message, stream the reply, remember both; until /quit or end of input."""
    args, _ = flags.parse(ChatFlags, argv, prog="chat.py", description=__doc__)
    model, tokenizer = load_model(args.run, device=args.device, step=args.step)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() line editing and history
    print(f"{model.num_params() / 1e6:.1f} M parameters, context {model.config.block_size} tokens. {HELP}")
    begin = [("system", args.system)] if args.system else []
    history = list(begin)
    while True:
        try:
            message = input("\nyou   ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if message.startswith("/"):
            if message == "/quit":
                return 0
            if message == "/new":
                history = list(begin)
            else:
                args = change_setting(args, message)
        elif message:
            history.append(("user", message))
            try:
                history.append(("assistant", reply(model, tokenizer, history, args)))
            except GPTError as e:  # a setting that makes no sense: say so, and let it be changed
                print(e)
                history.pop()


def reply(model: GPT, tokenizer: Tokenizer, history: list[tuple[str, str]], args: ChatFlags) -> str:
    """Stream the model's next turn to the terminal and return it; Ctrl-C ends the turn, not the chat."""
    print("model ", end="", flush=True)
    said = ""
    try:
        for piece in sample.answer(
            model, tokenizer, fit(tokenizer, history, model.config.block_size, args.max_tokens), args
        ):
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return said


def fit(tokenizer: Tokenizer, history: list[tuple[str, str]], block_size: int, max_tokens: int) -> list[int]:
    """Ids of the conversation; oldest turns are left out until a reply fits into the context with the rest."""
    system, turns = history[: history[0][0] == "system"], history[history[0][0] == "system" :]
    while True:
        ids = tokenizer.render([*system, *turns], reply=True)
        if len(ids) + min(max_tokens, block_size // 2) <= block_size or len(turns) == 1:
            return ids
        turns = turns[2:] if len(turns) > 2 else turns[-1:]


def change_setting(args: ChatFlags, command: str) -> ChatFlags:
    """The flags after `/temperature 0.5` or `/seed 3`; anything else prints the help."""
    name, _, value = command[1:].partition(" ")
    kinds = {"temperature": flags.real, "seed": int}
    try:
        args = replace(args, **{name: kinds[name](value)})
        print(f"{name} is {value}")
    except (KeyError, ValueError):
        print(HELP)
    return args


if __name__ == "__main__":
    flags.run(main)

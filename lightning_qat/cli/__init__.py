"""The command line: it only wires the other rooms together."""

import logging
import sys
from collections.abc import Sequence

from lightning_qat.registry import did_you_mean

TRAINER_COMMANDS = {
    "fit": "train from a YAML: lightning-qat fit --config examples/llm_qat.yaml",
    "validate": "validate a checkpoint or the untrained model of a YAML",
    "test": "run the test loop of a YAML",
    "predict": "run the predict loop of a YAML",
}
# What importing torchao logs in every command, because transformers imports it where it is installed; nothing a user can change.
CHATTER = {"torchao": "Failed to load", "torch.utils._pytree": "is an Enum subclass"}


def _is_news(record: logging.LogRecord) -> bool:
    return CHATTER[record.name] not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-qat``.

    Returns:
        0, or 2 after an error in what the user asked for; its message goes to stderr without a traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for name in CHATTER:
        logging.getLogger(name).addFilter(_is_news)
    from lightning_qat.cli import commands  # not at the top: it brings torch, and importing this package should not

    known = {**TRAINER_COMMANDS, **{name: (function.__doc__ or "").splitlines()[0] for name, function in commands.COMMANDS.items()}}
    if not args or args[0] in ("-h", "--help", "help"):
        print("usage: lightning-qat COMMAND [--help] ...\n\n" + "\n".join(f"  {name:10} {text}" for name, text in known.items()))
        return 0
    command, rest = args[0], args[1:]
    if command not in known:
        print(f"lightning-qat: got {command!r}, {did_you_mean(command, known)}", file=sys.stderr)
        return 2
    return commands.run(command, rest)

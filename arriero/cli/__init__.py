"""The command line: `arriero COMMAND ...`.

A command is a function in the module of its group, listed in COMMANDS below; `parsing.py` derives its arguments from
its parameters, and its docstring is its help. Slow imports are inside the commands that need them: `arriero --help`
takes a tenth of a second.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from arriero.cli import data, data_from_models, plan, recipes, reward, scaling, tokenizer, train, use
from arriero.cli.parsing import call, description
from arriero.errors import UserError, did_you_mean
from arriero.io.limits import NAMELESS, raise_open_files, remedy
from arriero.show.terminal import complain, prepare_streams
from arriero.version import __version__

MISUSED = 2


COMMANDS: dict[str, Callable[..., None]] = {
    "curate": data.curate,
    "curate classifier": data.curate_classifier,
    "shard": data.shard,
    "pretrain": train.pretrain,
    "sft": train.sft,
    "distill": train.distill,
    "distill on-policy": train.on_policy_distill,
    "reward": train.reward,
    "reward audit": reward.audit,
    "rejection": train.rejection,
    "dpo": train.dpo,
    "dpo online": train.online_dpo,
    "grpo": train.grpo,
    "ppo": train.ppo,
    "run": recipes.run,
    "validate": recipes.validate,
    "plan": plan.plan,
    "plan reward": plan.reward,
    "plan dpo": plan.dpo,
    "plan dpo online": plan.online_dpo,
    "plan grpo": plan.grpo,
    "plan ppo": plan.ppo,
    "chat": use.chat,
    "generate": use.generate,
    "serve": use.serve,
    "eval": use.evaluate,
    "eval pass-at-k": use.pass_at_k,
    "eval obedience": use.obedience,
    "eval needle": use.needle,
    "bench infer": use.bench_infer,
    "bench serve": use.bench_serve,
    "merge": use.merge,
    "average": use.average,
    "convert": use.convert,
    "quantize": use.quantize,
    "export": use.export,
    "data inspect": data.inspect,
    "data verify": data.verify,
    "data why": data.why,
    "data build docstrings": data.build_docstrings,
    "data build tasks": data.build_tasks,
    "data build preferences": data.build_preferences,
    "data build gatt": data_from_models.gatt,
    "data build distill": data_from_models.distill,
    "data build scored": data_from_models.scored,
    "tokenizer train": tokenizer.train,
    "tokenizer encode": tokenizer.encode,
    "tokenizer compare": tokenizer.compare,
    "tokenizer extend": tokenizer.extend,
    "scaling sweep": scaling.sweep,
    "scaling fit": scaling.fit,
    "scaling plan": scaling.plan,
    "ls": recipes.ls,
    "cp": recipes.cp,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code, 2 for misuse."""
    raise_open_files()
    prepare_streams()
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # so that a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # what all processes find is said by the first; torchrun ends the others before they do
        complain(f"arriero: {error}")
        return MISUSED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a file that no command looked at beforehand: the path or the disk is to blame, not us
        if error.filename is None and error.errno not in NAMELESS:
            raise
        file = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        complain(f"arriero: {file}{error.strerror}; {remedy(error)}")
        return MISUSED
    return 0


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if argv[0] in ("-V", "--version"):
        print(f"arriero {__version__}")
        return
    for n_words in (3, 2, 1):  # the longest name first: "data build docstrings"
        name = " ".join(argv[:n_words])
        if name in COMMANDS:
            call(name, COMMANDS[name], argv[n_words:])
            return
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group and all(word in ("-h", "--help") for word in argv[1:]):
        print(_overview(group))
        return
    typed = " ".join(word for word in argv[:3] if not word.startswith("-")) if group else argv[0]
    raise UserError(f"unknown command {typed!r} (arriero --help lists them){did_you_mean(typed, group or COMMANDS)}")


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    lines = [
        "usage: arriero COMMAND [ARGUMENTS]",
        "",
        "Raises Llama models: curate, pretrain, fine-tune, align, evaluate, quantise, serve.",
        "",
    ]
    width = max(map(len, names))
    for name in names:
        lines.append(f"  {name:<{width}}  {description(COMMANDS[name]).splitlines()[0]}")
    return "\n".join([*lines, "", "arriero COMMAND --help explains a command and shows an example."])

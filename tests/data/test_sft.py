"""The tokenised cache: right bytes once, the same from any number of processes, and refusals that name file and row."""

import copy
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import killer
from helpers.rows import read_conversations
from rich.console import Console

from arriero.data import sft, sft_cache, splits
from arriero.data.pack import pack
from arriero.data.sft import SftDataset, build_dataset, build_splits, data_stats
from arriero.data.splits import split_by_content
from arriero.errors import DataError
from arriero.tokenizer.chat import encode_training
from arriero.tokenizer.template import ChatTemplate

from .conftest import sums, turns, write_rows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_template(tokenizer, source):
    other = copy.copy(tokenizer)
    other.chat_template = ChatTemplate(source)
    other.__dict__.pop("fingerprint", None)
    return other


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_examples_are_what_the_template_and_its_mask_give(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    dataset = build_dataset(path, tokenizer)
    assert len(dataset) == 29
    for i, conversation in enumerate(read_conversations(path)):
        expected = encode_training(tokenizer, conversation.messages)
        assert dataset.tokens(i).dtype == np.int32 and dataset.trained(i).dtype == np.bool_
        assert (dataset.tokens(i).tolist(), dataset.trained(i).tolist()) == (expected.ids, expected.trained)
        assert dataset.lengths[i] == len(expected.ids) and dataset.where(i) == conversation.where
    assert dataset.conversations([23, 2, 23]) == [list(read_conversations(path))[i] for i in (23, 2, 23)]


def test_the_last_answer_comes_with_its_prompt(tmp_path, tokenizer):
    path = write_rows(tmp_path / "r.jsonl", [{"messages": turns("a?", "first", "b?", "second")}])
    prompt, answer = build_dataset(path, tokenizer).last_answer(0)
    assert tokenizer.decode(answer, skip_special=False) == "second<|im_end|>"
    assert tokenizer.decode(prompt, skip_special=False).endswith(
        "first<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_second_build_opens_the_cache_and_tokenises_nothing(tmp_path, tokenizer, own_cache, monkeypatch):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    first = build_dataset(path, tokenizer)
    assert [p.parent for p in (own_cache / "data").iterdir()] == [own_cache / "data"]
    monkeypatch.setattr(sft, "encode_files", None)
    second = build_dataset(path, tokenizer, max_length=400)
    assert second.directory == first.directory and second.fingerprint == first.fingerprint


def test_content_and_tokenizer_decide_the_cache_not_time_or_length(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    first = build_dataset(path, tokenizer)
    size, stat = path.stat().st_size, path.stat()
    path.write_bytes(path.read_bytes().replace(b"Count to 7.", b"Count to 9."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == size and path.stat().st_mtime_ns == stat.st_mtime_ns
    changed = build_dataset(path, tokenizer)
    assert changed.directory != first.directory and changed.fingerprint != first.fingerprint
    assert tokenizer.decode(changed.tokens(7).tolist()).count("Count to 9.") == 1
    other = with_template(tokenizer, CHATML.replace("END", "'<|im_end|>'"))
    assert build_dataset(path, other).directory != changed.directory


def test_a_moved_file_is_the_same_data_and_is_found_where_it_is_now(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    first = build_dataset(path, tokenizer)
    moved = build_dataset(path.rename(tmp_path / "moved.jsonl"), tokenizer)
    assert moved.fingerprint == first.fingerprint and moved.where(2) == f"row 3 of {tmp_path / 'moved.jsonl'}"
    assert moved.conversations([2])[0].messages == sums(3)[2]["messages"]


def test_a_cache_that_cannot_be_written_is_refused_with_the_remedy(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"cannot write tokenised data to .*file \(Not a directory\); free disk space, or"
    ):
        build_dataset(path, tokenizer, cache_dir=tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_no_cache(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    monkeypatch.setattr(sft_cache, "_write_parts", lambda *_: Path("/dev/full").write_bytes(b"x"))
    with pytest.raises(DataError, match=r"\(No space left on device\); free disk space"):
        build_dataset(path, tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_worker_processes_give_the_same_bytes_as_none(tmp_path, tokenizer, monkeypatch):
    files = tmp_path / "files"
    files.mkdir()
    for k in range(3):
        write_rows(files / f"{k}.jsonl", sums(331 + k))
    alone = build_dataset(files, tokenizer, cache_dir=tmp_path / "one")
    monkeypatch.setattr(sft_cache, "IN_PROCESS", 0)
    together = build_dataset(files, tokenizer, workers=2, cache_dir=tmp_path / "two")
    assert contents(alone.directory) == contents(together.directory)
    assert together.where(331) == f"row 1 of {files / '1.jsonl'}"


def test_a_bad_row_found_by_a_worker_is_named_and_leaves_no_cache(tmp_path, tokenizer, monkeypatch):
    rows = sums(701)
    rows[600] = {"messages": [{"role": "robot", "content": "beep"}]}
    path = write_rows(tmp_path / "sums.jsonl", rows)
    monkeypatch.setattr(sft_cache, "IN_PROCESS", 0)
    with pytest.raises(DataError, match=f"row 601 of {path}: message 0 has the unknown role 'robot'"):
        build_dataset(path, tokenizer, workers=2, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_workers_that_are_killed_again_and_again_are_told_of_and_leave_no_cache(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "sums.jsonl", sums(701))
    monkeypatch.setattr(sft_cache, "IN_PROCESS", 0)
    with killer(lambda: 0.05), pytest.raises(DataError, match=r"3 tokenising processes died .*: give fewer workers"):
        build_dataset(path, tokenizer, workers=2, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_that_build_the_same_cache_both_get_it_whole(tmp_path, smollm2_gguf):
    path = write_rows(tmp_path / "sums.jsonl", sums(499))
    code = (
        "import sys; from arriero.data.sft import build_dataset; from arriero.tokenizer import load_tokenizer\n"
        "data = build_dataset(sys.argv[1], load_tokenizer(sys.argv[2]), cache_dir=sys.argv[3])\n"
        "print(len(data), int(data.lengths.sum()), sum(int(data.tokens(i).sum()) for i in range(len(data))))"
    )
    command = [sys.executable, "-c", code, str(path), str(smollm2_gguf), str(tmp_path / "cache")]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    assert printed[0] == printed[1] and printed[0].startswith("499 ")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_process_that_comes_second_leaves_the_first_ones_cache_as_it_is(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    dataset = build_dataset(path, tokenizer, cache_dir=tmp_path / "cache")
    before = (dataset.directory / "tokens.bin").stat().st_ino
    encode = partial(sft_cache.encode_records, tokenizer)
    parts = sft_cache.encode_files([path], encode, 1, Console(file=io.StringIO()))
    sft_cache.write_cache(dataset.directory, [path], parts)
    assert (dataset.directory / "tokens.bin").stat().st_ino == before
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cut_cache_file_is_refused_by_name(tmp_path, tokenizer):
    path = write_rows(tmp_path / "sums.jsonl", sums(29))
    directory = build_dataset(path, tokenizer).directory
    whole = (directory / "tokens.bin").read_bytes()
    (directory / "tokens.bin").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"tokens\.bin: the cached data is not whole; delete .* and run again"):
        build_dataset(path, tokenizer)


# What is refused


def test_rows_too_long_are_left_out_and_counted_up_to_the_stated_share(tmp_path, tokenizer):
    rows = [{"messages": turns("q", "word " * (97 if i in (11, 17) else 3))} for i in range(40)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    said = io.StringIO()
    dataset = build_dataset(path, tokenizer, max_length=80, max_truncated=0.05, console=Console(file=said, width=200))
    assert len(dataset) == 38 and dataset.lengths.max() <= 80
    assert "left 2 of 40 rows out: longer than 80 tokens" in said.getvalue()
    message = (
        rf"row 12 of {path}: 1\d\d tokens do not fit 80, and neither do 5\.0% of the rows "
        r"\(at most 4\.9% may be left out\); raise seq_len \(the longest row has 1\d\d tokens\)"
    )
    with pytest.raises(DataError, match=message):
        build_dataset(path, tokenizer, max_length=80, max_truncated=0.049)
    with pytest.raises(DataError, match="no row fits 5 tokens; raise seq_len"):
        build_dataset(path, tokenizer, max_length=5, max_truncated=1)


TEMPLATES = [
    ("an end-of-turn that is never trained", CHATML.replace("END", "'\\n'"), "so the model would never learn to stop"),
    (
        "a template that drops messages",
        CHATML.replace("END", "'<|im_end|>'").replace("in messages", "in messages if m.role != 'system'"),
        r"message 0 \(system\): the chat template drops",
    ),
    (
        "a template that reorders messages",
        CHATML.replace("END", "'<|im_end|>'").replace(
            "in messages", "in messages | sort(attribute='role', reverse=true)"
        ),
        r"message 1 \(assistant\): the chat template",
    ),
    (
        "a template that refuses",
        "{{ raise_exception('no system here') }}",
        "the chat template refuses .*no system here",
    ),
]


@pytest.mark.parametrize(("template", "message"), [case[1:] for case in TEMPLATES], ids=[case[0] for case in TEMPLATES])
def test_a_template_that_cannot_be_trained_with_is_refused_with_the_row(tmp_path, tokenizer, template, message):
    system = [] if "sort" in template else [{"role": "system", "content": "Be kind."}]
    talk = [*system, *turns("a?", "b", "c?", "d")]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": talk}])
    with pytest.raises(DataError, match=rf"row 1 of {path}: .*{message}"):
        build_dataset(path, with_template(tokenizer, template))


def test_a_row_with_nothing_to_learn_is_refused(tmp_path, tokenizer):
    talk = turns("a?", "b")
    talk[1]["weight"] = 0
    path = write_rows(tmp_path / "r.jsonl", [*sums(7), {"messages": talk}])
    with pytest.raises(DataError, match=rf"row 8 of {path}: nothing to learn"):
        build_dataset(path, tokenizer)


# Validation


def spelled(dataset: SftDataset) -> set[bytes]:
    return {dataset.tokens(i).tobytes() for i in range(len(dataset))}


def test_a_share_holds_out_the_same_rows_when_others_are_added(tmp_path, tokenizer):
    few, more = sums(400), sums(1000)
    train, held_out = build_splits(write_rows(tmp_path / "few.jsonl", few), "0.1", tokenizer, max_length=400)
    assert len(train) + len(held_out) == 400 and 20 <= len(held_out) <= 60
    assert not spelled(train) & spelled(held_out)
    more_train, more_held_out = build_splits(
        write_rows(tmp_path / "more.jsonl", more), "0.1", tokenizer, max_length=400
    )
    assert spelled(held_out) < spelled(more_held_out) and spelled(train) < spelled(more_train)


def test_equal_conversations_fall_on_one_side(tmp_path, tokenizer):
    train, held_out = build_splits(write_rows(tmp_path / "r.jsonl", sums(50) * 3), "0.3", tokenizer, max_length=400)
    assert len(train) % 3 == len(held_out) % 3 == 0 and not spelled(train) & spelled(held_out)


def test_a_share_of_few_rows_holds_out_one_and_never_all(tmp_path, tokenizer):
    train, held_out = build_splits(write_rows(tmp_path / "r.jsonl", sums(5)), "0.000001", tokenizer, max_length=400)
    assert (len(train), len(held_out)) == (4, 1)
    one = build_dataset(write_rows(tmp_path / "one.jsonl", sums(1)), tokenizer)
    with pytest.raises(DataError, match=r"a validation share of 0\.5 of 1 rows leaves none to train on"):
        split_by_content(one, 0.5)
    assert split_by_content(one, 0)[1] is None


def test_rows_that_are_also_in_the_validation_file_are_not_trained_on(tmp_path, tokenizer):
    rows = sums(40)
    train = write_rows(tmp_path / "train.jsonl", rows)
    validation = write_rows(tmp_path / "validation.jsonl", [*rows[30:], {"messages": turns("new", "row")}])
    said = io.StringIO()
    console = Console(file=said, width=300)
    kept, held_out = build_splits(train, str(validation), tokenizer, max_length=400, console=console)
    assert (len(kept), len(held_out)) == (30, 11) and not spelled(kept) & spelled(held_out)
    assert "left 10 of 40 training rows out" in said.getvalue()
    with pytest.raises(DataError, match="every row is also in the validation data"):
        build_splits(validation, str(validation), tokenizer, max_length=400)


@pytest.mark.parametrize("share", ["1", "-0.1", "1.5", "nan"])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(DataError, match=f"validation is {share}; give a file, or a share"):
        splits.parse_share(share)


# Numbers


def test_statistics_agree_with_counting_by_hand(tmp_path, tokenizer):
    dataset = build_dataset(write_rows(tmp_path / "sums.jsonl", sums(101)), tokenizer)
    stats = data_stats(dataset, 256)
    assert stats.examples == 101 and stats.tokens == sum(len(dataset.tokens(i)) for i in range(101))
    assert stats.trained_tokens == sum(int(dataset.trained(i).sum()) for i in range(101))
    assert stats.trained_share == stats.trained_tokens / stats.tokens
    assert stats.length_percentiles["p50"] == sorted(dataset.lengths)[50]
    assert stats.packed_rows == len(pack(dataset.lengths, 256, 5, 5))
    assert stats.packing_efficiency == stats.tokens / (256 * stats.packed_rows)


def test_real_questions_are_packed_with_under_three_percent_of_padding(shared_data, tokenizer):
    dataset = build_dataset(shared_data / "gsm8k-train.jsonl", tokenizer, max_length=2048)
    assert len(dataset) == 7473
    for seq_len in (1024, 2048, 4096):
        assert data_stats(dataset, seq_len).packing_efficiency > 0.97


MEMORY = """
import resource, sys
from arriero.data.sft import build_dataset
from arriero.tokenizer.load import load_tokenizer

if __name__ == "__main__":
    data = build_dataset(sys.argv[1], load_tokenizer(sys.argv[2]), workers=2, cache_dir=sys.argv[3])
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss)
"""


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_no_more_memory_than_ten_thousand(tmp_path, smollm2_gguf):
    (tmp_path / "build.py").write_text(MEMORY)
    peaks = []
    for n in (20_000, 100_000):
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for i in range(n):
                file.write(json.dumps({"prompt": f"Repeat {i}.", "completion": f"{i} and " * 100}) + "\n")
        command = [sys.executable, str(tmp_path / "build.py"), str(path), str(smollm2_gguf), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append([int(kilobytes) / 1024 for kilobytes in done.stdout.split()])
    print("peak MiB, self and largest worker:", peaks)
    grown = np.subtract(peaks[1], peaks[0])
    # 80,000 rows more are 80 MB of text and 135 MB of cache; the index of 28 bytes a row is 2 MB.
    assert (grown < 40).all(), peaks

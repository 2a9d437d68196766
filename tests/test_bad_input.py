"""Whatever a user may type wrong, in every command: one line, exit code 2, nothing written, no time lost."""
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY, TOY_VOCAB, refuses

import adaptation
import bench
import eval_ner
import prepare
import probes
import report
import sample
import train
from model import Decoder, ModelConfig
from nanomaml import checkpoint, config, ranks
from nanomaml.config import UserError

ROOT = Path(train.__file__).parent

# Config files, by name.
FILES = {
    "raises": "raise ValueError('a\\nb')",
    "exits": "raise SystemExit",
    "imports": "import no_such_module",
    "defines": "def half(x):\n    return x / 2\n",
    "takes": "from math import sqrt",
    "warm": "warm = 2\nwarmup_steps = warm * 10",
    "syntax": "lr = 1 /",
    "recursion": "def _f():\n    _f()\n_f()",
    "memory": "ways = [0] * 10**13",
    "typo": "max_step = 3",
    "huge_float": "lr = 10**400",
    "boolean": "max_steps = True",
    "null": "out_dir = None",
    "path": "from pathlib import Path as _Path\nout_dir = _Path('x')",
    "nul": "out_dir = 'a\\0b'",
    "surrogate": "out_dir = '\\udcff'",
    "nan": "lr = float('nan')",
    "empty": "data = ''",
}

TRAIN = [
    # types
    ("--max_steps=1.5", "max_steps must be int, got '1.5'"),
    ("--max_steps=", "max_steps must be int, got ''"),
    ("--max_steps=" + "9" * 5000, "max_steps must be int"),
    ("--lr=fast", "lr must be float, got 'fast'"),
    ("--first_order=maybe", "first_order must be bool"),
    ("--compile=1", "compile must be bool or None"),
    # numbers out of range
    ("--max_steps=-1", "max_steps must be in 0 to 10**9, got -1"),
    ("--lr=nan", "lr must be finite"),
    ("--lr=1e999", "lr must be finite"),
    ("--lr=-1", "lr must be positive, got -1.0"),
    ("--beta2=1", "beta2 must be in [0, 1)"),
    ("--seed=-1", "seed must be at least 0"),
    ("--seed=9223372036854775808", "seed must be below 2**63"),
    ("--batch_size=0", "batch_size must be at least 1"),
    ("--ways=-3", "ways must be at least 2, got -3"),
    ("--window=0", "window must be at least 2, got 0"),
    ("--meta_share=1.1", "meta_share must be in [0, 1]"),
    ("--inner_lr=-1", "inner_lr must be at least 0"),
    # choices, names, paths
    ("--wandb=maybe", "wandb must be one of disabled, offline, online"),
    ("--dtype=int8", "dtype must be one of"),
    ("--device=warp", "device must be auto, cuda, mps or cpu, got 'warp'"),
    ("--device=", "device must not be empty"),
    ("--out_dir=", "out_dir must not be empty"),  # wrote into the current folder
    ("--adapt=", "adapt must not be empty"),  # meant all
    ("--adapt=(", "neither head, all nor a regular expression"),
    ("--data=", "data must not be empty"),
    ("--data={tmp}/none", "{tmp}/none"),
    ("--data={tmp}/notes.txt", "{tmp}/notes.txt"),  # a file for a folder
    ("--data={tmp}/leer-\u00fc\u4e2d", "leer-\u00fc\u4e2d"),
    ("--data={toy} --out_dir=" + "x" * 5000, "File name too long"),
    ("--data={toy} --out_dir={tmp}/notes.txt", "cannot write out_dir = {tmp}/notes.txt"),
    ("--data={toy} --out_dir={tmp}/link", "a link to {tmp}/nowhere"),
    ("--data={toy} --init_from={tmp}/none", "none"),
    # folders of others: their files were overwritten
    ("--data={toy} --out_dir={tmp}/hf", "{tmp}/hf holds config.json, tokenizer.json but is not a run"),
    ("--data={toy} --out_dir={tmp}/logs", "{tmp}/logs holds log.jsonl but is not a run"),
    ("--data={toy} --out_dir={toy}", "is the data's folder"),
    # how flags are written
    ("--max_stesp=3", "did you mean 'max_steps'?"),
    ("--warmup-steps=3", "did you mean 'warmup_steps'?"),
    ("--gr\u00f6\u00dfe=3", "unknown key"),
    ("--lr", "flags are written --key=value, got '--lr'"),
    ("-lr=3", "flags are written --key=value"),
    ("--=3", "flags are written --key=value"),
    ("--lr=1 --lr=2", "--lr is given twice"),
    ("lr=3", "neither a config file (*.py) nor a flag"),
    ("{tmp}/notes.txt", "neither a config file (*.py) nor a flag"),
    ("{tmp}/none.py", "config file {tmp}/none.py: there is no such file"),
    ("{tmp}/folder.py", "config file {tmp}/folder.py: there is no such file"),  # its __main__.py was run
    ("{tmp}/latin1.py", "config file {tmp}/latin1.py"),
    # sizes that ended in tracebacks, or never
    ("--n_layers=100000000", "n_layers must be in 1 to 1000, got 100000000"),
    ("--vocab_size=100000000000", "vocab_size must be in 1 to 2**20, got 100000000000"),
    ("--data={toy} --context=1000000", "no training bin holds 2 x context"),
    ("--data={toy} --vocab_size=70000", "vocab_size = 70000 is above 65536"),
    ("--data={toy} --shots=1000000000000", "separate windows of 8 tokens"),
    # fields that do not go together, with both numbers
    ("--d_model=102", "d_model = 102 must be an even multiple of n_heads = 2"),
    ("--n_heads=3 --n_kv_heads=2 --d_model=24", "n_heads = 3 must be a multiple of n_kv_heads = 2"),
    ("--batch_size=5", "global_batch_size = 16 must be a multiple of batch_size = 5"),
    ("--window=64", "window = 64 must be at most context = 32"),
    ("--read_out=word", "read_out must be one of mask, context, got 'word'"),
    ("--head_start=one", "head_start must be one of zero, random"),
]
TRAIN += [
    ("{tmp}/raises.py", "ValueError: a b"),
    ("{tmp}/exits.py", "config file {tmp}/exits.py: SystemExit"),  # ended with exit code 0
    ("{tmp}/imports.py", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("{tmp}/defines.py", "unknown key 'half'"),
    ("{tmp}/warm.py", "a name of your own begins with _: _warm"),
    ("{tmp}/run.py", "config file {tmp}/run.py: there is no such file"),
    ("{tmp}/takes.py", "unknown key 'sqrt'"),
    ("{tmp}/syntax.py", "SyntaxError"),
    ("{tmp}/recursion.py", "RecursionError"),
    ("{tmp}/memory.py", "MemoryError"),
    ("{tmp}/typo.py", "did you mean 'max_steps'?"),
    ("{tmp}/huge_float.py", "lr must be float"),
    ("{tmp}/boolean.py", "max_steps must be int, got True"),
    ("{tmp}/null.py", "out_dir must be str, got None"),
    ("{tmp}/path.py", "out_dir must be str, got PosixPath('x')"),
    ("{tmp}/nul.py", "out_dir must be text without NUL"),
    ("{tmp}/surrogate.py", "out_dir must be text without NUL, in UTF-8"),
    ("{tmp}/nan.py", "lr must be finite"),
    ("{tmp}/empty.py", "data must not be empty"),
]

# command | what is given | what it says
OTHERS = """
prepare | --out= | out must not be empty
prepare | --out={tmp}/folder.py | exists already
prepare | --out={tmp}/o --source=,, | source = ',,' names nothing
prepare | --out={tmp}/o --source={tmp}/none.txt | no such file or folder
prepare | --out={tmp}/o --source={tmp}/folder.py | holds no file to read
prepare | --out={tmp}/o --source={tmp}/x.pdf | convert or rename it
prepare | --out={tmp}/o --source={tmp}/pipe.txt | sources are plain files
prepare | --out={tmp}/o --source={tmp}/notes.txt --val={tmp}/no.txt | no file {tmp}/no.txt
prepare | --out={tmp}/o --source={tmp}/notes.txt --val={tmp}/notes.txt | is also trained on
prepare | --val_share=0.9 | val_share must be in [0, 0.5]
prepare | --vocab_size=10 | vocab_size must be in 258
prepare | --shard_tokens=0 | shard_tokens must be in 1
prepare | --encoding=klingon | encoding must be a text encoding of Python
prepare | --text_key= | text_key must not be empty
prepare | corpus.txt | neither a config file (*.py) nor a flag
eval_ner |  | name one run's folder or checkpoint
eval_ner | a b | got a, b
eval_ner | {tmp}/none | no checkpoint at {tmp}/none
eval_ner | {tmp}/notes.txt | notes.txt
eval_ner | {run} --mode=half | mode must be one of full, head, majority
eval_ner | {run} --shots=many | shots must be numbers of sentences
eval_ner | {run} --lr=-1 | lr must be positive
report |  | give the folders of runs
report | {tmp}/folder.py | {tmp}/folder.py holds no run
report | {run} {run} | a run is named twice
report | {tmp}/none | {tmp}/none
report | {tmp}/texts | {tmp}/texts/log.jsonl: expected numbers, got ["step 3: val/loss = 'low'"]
report | {tmp}/run.py | {tmp}/run.py holds no run
report | {run} {run} {run} | no run with a validation loss in {run}, {run}
probes |  | name one run's folder
probes | a b | got a, b
probes | {tmp}/none | no checkpoint in {tmp}/none
probes | {run} --data={tmp}/none | no data at {tmp}/none
probes | {run} --rank=3 | unknown key 'rank'
adaptation |  | name the folders of runs
adaptation | {tmp}/none | no checkpoint at {tmp}/none
adaptation | {run} --data=x | unknown key 'data'
bench | --vocab_size=200 | vocab_size
bench | --rounds=0 | rounds must be at least 1
bench | --meta_share=0 --window=64 | window = 64 is above context = 32
bench | --against=gpt | against must be one of empty, transformers
sample |  | name one run's folder
sample | {run} --tokens=0 | tokens must be at least 1
"""
OTHERS = [[globals()[name], given, says] for name, given, says in (
    [cell.strip() for cell in row.split(" |")] for row in OTHERS.strip().splitlines())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (tmp / f"{name}.py").write_text(text)
    (tmp / "latin1.py").write_bytes(b"out_dir = 'gr\xf6\xdfe'\n")
    (tmp / "notes.txt").write_text("Some words, and others.\n\n" * 50)
    (tmp / "x.pdf").write_bytes(b"%PDF")
    (tmp / "folder.py").mkdir()
    (tmp / "run.py").mkdir()
    (tmp / "run.py" / "__main__.py").write_text("raise SystemExit('it ran')")
    os.mkfifo(tmp / "pipe.txt")
    for name, file, text in (("hf", "config.json", '{"architectures": []}'), ("hf", "tokenizer.json", "{}"),
                             ("logs", "log.jsonl", '{"event": 1}\n'),
                             ("texts", "log.jsonl", '{"step": 3, "val/loss": "low"}\n')):
        (tmp / name).mkdir(exist_ok=True)
        (tmp / name / file).write_text(text)
    (tmp / "link").symlink_to(tmp / "nowhere")
    model = ModelConfig(d_model=24, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=TOY_VOCAB, context=32)
    state = {"step": 3, "tokens": 96, "model": Decoder(model).state_dict(), "config": vars(model)}
    (tmp / "run").mkdir()
    checkpoint.save(tmp / "run", state, keep=1)
    return tmp


def files_in(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def name_of(case):
    return f"{getattr(case[0], '__name__', 'train')} {case[-2]}"[:50]


@pytest.mark.parametrize(
    "command, given, says",
    [(train, *case) for case in TRAIN] + OTHERS,
    ids=[name_of((train, *case)) for case in TRAIN] + list(map(name_of, OTHERS)),
)
def test_a_mistake_is_told_in_one_line(folder, toy, monkeypatch, capfd, command, given, says):
    places = {"tmp": folder, "toy": toy, "run": folder / "run", "base": folder.name}
    toys = TOY if command in (train, bench) else []
    monkeypatch.setattr(sys, "argv", ["command", *toys, *given.format(**places).split()])
    monkeypatch.chdir(folder)
    before = files_in(folder)
    with pytest.raises(SystemExit) as end:
        config.run(command.main)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert says.format(**places) in error and len(error) < 1100, error
    assert files_in(folder) == before


# ---- exit codes ----


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "out/log.jsonl")


def wrapped():
    try:
        full_disk()
    except OSError as error:
        raise UserError(f"cannot write out/log.jsonl: {error.strerror}") from None


def ends(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, says",
    [
        (lambda argv: full_disk(), 1, "No space left on device: 'out/log.jsonl'"),
        (lambda argv: wrapped(), 1, "cannot write out/log.jsonl: No space left on device"),
        (ends(UserError("rank 3 is gone", 1)), 1, "rank 3 is gone"),
        (ends(torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")), 1, "Tried to allocate"),
        (ends(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), 1, "can't allocate"),
        (ends(MemoryError()), 1, "MemoryError"),
        (ends(PermissionError(errno.EACCES, "Permission denied", "/root")), 2, "Permission denied: '/root'"),
        (ends(UserError("lr must be positive")), 2, "lr must be positive"),
    ],
)
def test_a_failure_of_the_machine_is_no_mistake_of_the_user(monkeypatch, capsys, main, code, says):
    with pytest.raises(SystemExit) as end:
        config.run(main)
    error = capsys.readouterr().err
    assert end.value.code == code and says in error and error.count("\n") == 1


@pytest.mark.parametrize("given, says", [
    ({"RANK": "8"}, None), ({"RANK": ""}, None), ({"RANK": "0", "WORLD_SIZE": "1"}, None),  # alone
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' and not all of what torchrun sets"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "and not all of what torchrun sets"),
    *[(dict(zip(ranks.LAUNCHER, (rank, "2", "0", "x", "1"))), f"RANK='{rank}'") for rank in ("two", "", "2")],
])
def test_launcher_variables_are_believed_together_or_not_at_all(monkeypatch, given, says):
    """RANK=8, left in a shell, ended a run at once, in silence and with 0."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if says:
        refuses(ranks.rank_and_world, says)
    else:
        assert ranks.rank_and_world() == (0, 1) and ranks.local_rank() == 0


def test_no_text_can_end_a_script_or_rule_the_terminal(monkeypatch):
    """A code page without the character ended it, and a name could move the cursor. Nor a closed output."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    config.run(lambda argv: print("a\x1b[2J\tb\r \u65e5 \xb1"))
    assert sys.stdout is terminal and terminal.buffer.getvalue() == b"a\\x1b[2J\tb\\x0d ? ?\n"
    monkeypatch.setattr(sys, "stdout", None)
    config.run(lambda argv: print("nobody reads this"))
    assert "\\x1b" in str(UserError("no \x1b[2J here")) and "\\x9b" in config.one_line("a\x9bb")
    sys.stdout.close()


def test_a_panic_of_a_rust_library_is_one_line(capsys):
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SystemExit):
        config.run(ends(panic("no match\nstack backtrace")))
    assert capsys.readouterr().err == "error: the tokenizer failed on the text: no match stack backtrace\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        config.run(ends(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("command", [train, prepare, eval_ner, report, probes, adaptation, bench, sample])
def test_help_is_no_error_and_says_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    out, error = capsys.readouterr()
    assert end.value.code == 0 and "2 for a mistake in what was given, 1 for a failure" in out and not error


def test_help_into_a_closed_pipe_is_no_error():
    """`--help | head` ended in a BrokenPipeError."""
    command = f"set -o pipefail; {sys.executable} prepare.py --help | {sys.executable} -c pass"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


# ---- under torchrun, and in a terminal ----


@pytest.mark.slow
def test_under_torchrun_the_first_rank_alone_says_what_is_wrong():
    """A bad flag was told once by every rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--lr=-1"]
    done = subprocess.run([sys.executable, *launcher], cwd=ROOT, capture_output=True, text=True, timeout=100)
    said = done.stderr
    assert done.returncode == 1 and said.count("error: lr must be positive, got -1.0") == 1, said
    assert "exitcode  : 2" in said


def test_a_rank_whose_settings_alone_are_wrong_speaks_in_the_end(monkeypatch):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(config.time, "sleep", waited.append)
    refuses(lambda: config.load(train.Config, ["--lr=-1"]), "lr must be positive")
    assert waited == [30]

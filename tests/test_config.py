"""nanomaml/config.py: settings from files, flags and runs' folders, with the types that are declared."""
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from conftest import refuses

from nanomaml import config
from nanomaml.config import Count
from train import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(*argv):
    return config.load(Config, list(argv), "doc")


def test_defaults_then_files_left_to_right_then_flags(tmp_path):
    (tmp_path / "a.py").write_text("lr = 1e-4\nmax_steps = 6 * 100\nways = 5\n")
    (tmp_path / "b.py").write_text(
        "import math\n_half = 0.5\nmeta_share = _half\nways = int(math.sqrt(64))\n"
    )
    cfg = load("--lr=0.5", str(tmp_path / "a.py"), str(tmp_path / "b.py"))
    assert (cfg.lr, cfg.max_steps, cfg.ways, cfg.meta_share, cfg.shots) == (0.5, 600, 8, 0.5, 4)
    assert load(str(tmp_path / "b.py"), str(tmp_path / "a.py")).ways == 5


def test_values_take_their_declared_type():
    cfg = load("--lr=1", "--first_order=false", "--compile=True", "--out_dir=a=b")
    assert (cfg.lr, cfg.first_order, cfg.compile, cfg.out_dir) == (1.0, False, True, "a=b")
    assert type(cfg.lr) is float and load("--compile=None").compile is None
    assert load("--first_order").first_order, "a switch needs no value"
    assert load("--d_model=48").d_hidden == 192 and load("--d_model=48", "--d_hidden=7").d_hidden == 7


def test_flags_as_people_type_them():
    cfg = load("--lr", "1e-3", "--max_steps", "1e3", "--compile", "--data", "a b", "--ways=8")
    assert (cfg.lr, cfg.max_steps, cfg.compile, cfg.data, cfg.ways) == (1e-3, 1000, True, "a b", 8)
    assert type(cfg.max_steps) is int
    refuses(lambda: load("--max_steps=1.5e0"), "max_steps must be int, got '1.5e0'")
    assert config.operands(Config, ["a", "--seed", "3", "b"]) == (["a", "b"], ["--seed=3"])
    assert load("--compile", "False").compile is False
    refuses(lambda: load("--max_step", "6000"), "unknown key 'max_step'", "did you mean 'max_steps'?")


def test_updates_may_be_a_share_of_the_run():
    """A shorter run is one flag."""
    cfg = load("--max_steps=400", "--warmup_steps=0.1", "--meta_start=0.5")
    assert (cfg.warmup_steps, cfg.meta_start) == (40, 200) and type(cfg.meta_start) is int
    assert load().warmup_steps == 2500 and load("--warmup_steps=7").warmup_steps == 7
    assert load(str(CONFIGS / "demo.py"), str(CONFIGS / "light.py"), "--max_steps=50").meta_start == 25
    refuses(lambda: load("--warmup_steps=1.5"), "a number of updates, or below 1 a share of max_steps")


def test_a_runs_folder_stands_for_its_settings(tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    settings = asdict(load("--max_steps=400", "--warmup_steps=0.1", "--lr=0.5")) | {"out_dir": "elsewhere"}
    (run / "config.json").write_text(json.dumps(settings))
    cfg = load(str(run), "--max_steps=800")
    assert (cfg.lr, cfg.max_steps, cfg.warmup_steps, cfg.out_dir) == (0.5, 800, 40, str(run))
    for text, says in (("[1]", "is not a run's"), ("{", "is not a run's"), ("[" * 10**5, "not"),
                       ('{"d_modle": 3}', "unknown key 'd_modle' in"), ('{"ways": "x"}', "ways must be int")):
        (run / "config.json").write_text(text)
        refuses(lambda: load(str(run)), says)


def test_help_lists_every_field_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as exit:
        load("--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "doc" in out
    comments = config.comments(Config)
    for field in Config.__dataclass_fields__.values():
        assert f"--{field.name}={field.default}" in out
        assert len(comments[field.name]) > 8 and comments[field.name] in out, field.name


def test_a_value_by_rule_follows_what_it_depends_on(tmp_path):
    """`inner_lr = 25.6 / d_model` in a config file stayed as it was when a flag changed d_model."""
    assert load().inner_lr == 25.6 / 96
    for name in ("11m", "570m"):
        cfg = load(str(CONFIGS / f"{name}.py"), "--d_model=384")
        assert (cfg.inner_lr, cfg.d_hidden) == (25.6 / 384, 1536)
    assert load("--d_model=384", "--inner_lr=0.1").inner_lr == 0.1


def test_a_vanilla_run_needs_no_room_for_episodes():
    """`configs/vanilla.py --context=64` was refused for the window of episodes that never run."""
    paper = str(CONFIGS / "11m.py")
    assert load(paper, str(CONFIGS / "vanilla.py"), "--context=64").context == 64
    refuses(lambda: load(paper, "--context=64"), "window = 128 must be at most context = 64")


def test_a_fork_declares_what_its_field_may_be():
    @dataclass(frozen=True)
    class Fork(Config):
        span: Count = 64
        kind: Literal["wide", "narrow"] = "wide"
        plain: float = 0.5

    assert replace(load(), lr=1).lr == 1.0 and Fork(span=3).span == 3
    for flag, says in (("--span=0", "span must be at least 1, got 0"), ("--plain=x", "plain must be float"),
                       ("--kind=thin", "kind must be one of wide, narrow, got 'thin'")):
        refuses(lambda flag=flag: config.load(Fork, [flag]), says)
    refuses(lambda: Fork(span=2.5), "span must be int, got 2.5")

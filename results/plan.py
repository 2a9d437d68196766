"""The commands of README.md that are still to do, one a line: run.sh hands them to the cores.

    python results/plan.py search              # variants at a sixth of the length, to choose one
    python results/plan.py runs --quick        # --quick: a tenth as long, one seed, in out/quick
    python results/plan.py measure             # checkpoints on other text, and by other inner rates
    python results/plan.py ner data/uner       # fine-tuning; before that, once: fetch data/uner

A run has as many FLOPs as vanilla training in 2,442 updates of 4,096 tokens. What is done follows from its
folder under out/ alone: after a change of flags, or the loss of a checkpoint, delete it to run it again.
An arm whose flags belong to a recipe runs in a copy of the code with that patch, out/code/<recipes>-<digest>.
"""
import hashlib
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, sys.argv[2] if sys.argv[1:2] == ["updates"] else str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
from nanomaml import config, treebanks  # noqa: E402
from schedule import Schedule  # noqa: E402

RECIPES = {"--episodes_from": "batch-episodes", "--query_lm": "query-lm", "--meta_decay": "meta-decay",
           "--masked_word": "masked-word", "--published_episodes": "published-episodes",
           "--backbone_lr": "backbone-rate"}
FILES = ["configs/demo.py", "results/long.py"]
STEPS, SEARCH_STEPS = 2442, 407
SEEDS = (1, 2, 3)
AGAIN = (5, 6)  # to see again what NER gained with seeds 1 to 4
RATES = (0.01, 0.03, 0.1, 0.3)  # of the inner loop, at which adaptation is measured again
ADAPT_ALL = [(steps, rate) for steps in (2, 10) for rate in (0.01, 0.03, 0.1)]  # rates of the backbone


# ---- equal FLOPs ----


def micro_step_flops(cfg):
    """{kind: FLOPs of a micro-step}, by the count that log.jsonl has."""
    learner = train.build_learner(cfg, torch.float32)

    def ids(*shape):
        return torch.empty(shape, dtype=torch.long)

    E, N, K, Q, W = cfg.episodes, cfg.ways, cfg.shots, cfg.queries, cfg.window
    text = ids(cfg.batch_size, cfg.context), ids(cfg.batch_size, cfg.context)
    windows = ids(E, N, K, W), ids(E, N, Q, W), ids(E, N), ids(E, N, Q, W)
    batches = {"lm": data.LMBatch(*text),
               "episodes": data.EpisodeBatch(*windows[:len(data.EpisodeBatch._fields)])}  # query-lm adds one
    if hasattr(data, "JointBatch"):  # of batch-episodes
        batches["joint"] = data.JointBatch(*text, ids(E, N, K), ids(E, N, Q), ids(E, N))
    if hasattr(data, "PublishedBatch"):
        B = cfg.published_episodes
        text = ids(B, cfg.context), ids(B, cfg.context)
        batches["episodes"] = data.PublishedBatch(*text, ids(K + 1), ids(N), ids(B, K + 1))
    return {kind: learner.flops(kind, batch) for kind, batch in batches.items()}


def code_for(flags):
    """The folder of the code that knows these flags: this repository, or a copy with recipes applied."""
    recipes = sorted({RECIPES[name] for flag in flags if (name := flag.split("=")[0]) in RECIPES})
    if not recipes or sys.argv[1:2] == ["updates"]:
        return ROOT
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanomaml/*.py"), *ROOT.glob("recipes/*.patch")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    folder = ROOT / "out" / "code" / f"{'+'.join(recipes)}-{digest}"
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in (path for path in files if path.suffix == ".py"):
        (partial / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, partial / path.relative_to(ROOT))
    for recipe in recipes:
        where = ["--unsafe-paths", f"--directory={partial.relative_to(ROOT)}"]
        subprocess.run(["git", "apply", *where, f"recipes/{recipe}.patch"], cwd=ROOT, check=True)
    partial.rename(folder)
    return folder


def updates(flags, vanilla_steps):
    """As many updates with these flags as take the FLOPs of `vanilla_steps` of next-token prediction."""
    if (code := code_for(flags)) != ROOT:
        command = [sys.executable, __file__, "updates", str(code), str(vanilla_steps), *flags]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def load(*more):
        return config.load(train.Config, [*(str(ROOT / name) for name in FILES), *flags, *more])

    cfg = load()
    of_kind = micro_step_flops(cfg)
    budget = vanilla_steps * cfg.global_batch_size // cfg.batch_size * of_kind["lm"]

    def flops(steps):
        plan = Schedule(load(f"--max_steps={steps}"), 1)
        per_block = plan.micro_steps // plan.kinds.shape[1]
        return sum(per_block * (plan.kinds == kind).sum() * of_kind[kind] for kind in set(plan.kinds.flat))

    low, high = 1, 4 * vanilla_steps
    while high - low > 1:  # flops() grows with the steps
        middle = (low + high) // 2
        low, high = (middle, high) if flops(middle) <= budget else (low, middle)
    return min((low, high), key=lambda steps: abs(flops(steps) - budget))


def merged(flags):
    """Where a flag is given twice, the later one alone."""
    return list({flag.split("=")[0]: flag for flag in flags}.values())


def command(out_dir, corpus, seed, flags, vanilla_steps):
    flags = merged([f"--seed={seed}", *flags])
    script = (code_for(flags) / "train.py").relative_to(ROOT)
    return " ".join([f"python {script}", *FILES, f"--data=data/{corpus}", f"--out_dir={out_dir}", *flags,
                     f"--max_steps={updates(flags, vanilla_steps)}"])


def is_done(out_dir):
    """Whether a run has had its last evaluation."""
    log = Path(out_dir, "log.jsonl")
    return log.exists() and '"final/' in log.read_text()


# ---- the search ----

TENTH, QUARTER, HALF = "--meta_share=0.1", "--meta_share=0.25", "--meta_share=0.5"
CONTEXT = ["--read_out=context"]
QUERY_LM = [*CONTEXT, "--query_lm=True"]
BATCH = [*CONTEXT, "--episodes_from=batch", "--shots=2", "--queries=1", "--meta_share=1"]
WIDE = ["--batch_size=32", "--meta_blocks=1", "--shots=4", "--queries=2"]  # as the measurement has
EXACT = "--first_order=False"  # second order
VANILLA = ["--meta_share=0"]

SEARCH = {
    "vanilla": VANILLA,
    "vanilla-lr1": [*VANILLA, "--lr=1e-3"],
    "vanilla-lr4": [*VANILLA, "--lr=4e-3"],
    "mask": [TENTH],
    "mask-lr4": [TENTH, "--lr=4e-3"],
    "mask-weight0": [TENTH, "--meta_weight=0"],  # what the text costs that is not read
    "mask-weight1": [TENTH, "--meta_weight=1"],
    "mask-weight0.1": [TENTH, "--meta_weight=0.1"],
    "mask-decay": [TENTH, "--meta_decay=0.5"],
    "mask-start0": [TENTH, "--meta_start=0"],
    "mask-start50": [TENTH, "--meta_start=203"],
    "mask-late": [TENTH, "--meta_start=203", "--meta_weight=0.1"],
    "mask-late-steps1": [TENTH, "--meta_start=203", "--meta_weight=0.1", "--inner_steps=1"],
    "mask-inner0.03": [TENTH, "--inner_lr=0.03"],
    "mask-inner0.3": [TENTH, "--inner_lr=0.3"],
    "mask-steps1": [TENTH, "--inner_steps=1"],
    "mask-ways8": [TENTH, "--ways=8"],
    "mask-ways32": [TENTH, "--ways=32"],
    "mask-shots2": [TENTH, "--shots=2"],
    "mask-queries6": [TENTH, "--queries=6"],
    "mask-exact": [TENTH, EXACT],
    "mask-all": [TENTH, "--adapt=all"],
    "context": [TENTH, *CONTEXT],
    "context-exact": [TENTH, *CONTEXT, EXACT],
    "query_lm": [TENTH, *QUERY_LM],
    "query_lm-25": [QUARTER, *QUERY_LM],
    "query_lm-25-decay": [QUARTER, *QUERY_LM, "--meta_decay=0.5"],
    "query_lm-50": [HALF, *QUERY_LM],
    "batch-0.05": [*BATCH, "--meta_weight=0.05"],
    "batch-0.2": [*BATCH, "--meta_weight=0.2"],
    "batch-1": [*BATCH, "--meta_weight=1"],
    "batch-0.2-decay": [*BATCH, "--meta_weight=0.2", "--meta_decay=0.5"],
    "batch-0.05-exact": [*BATCH, "--meta_weight=0.05", EXACT],
    "batch32x8-0.05-exact": [*BATCH, *WIDE, "--meta_weight=0.05", "--episodes=8", EXACT],
    "batch32x8-0.2-exact": [*BATCH, *WIDE, "--meta_weight=0.2", "--episodes=8", EXACT],
    "batch32x32-0.02-exact": [*BATCH, *WIDE, "--meta_weight=0.02", "--episodes=32", EXACT],
    "batch32x32-0.05-exact": [*BATCH, *WIDE, "--meta_weight=0.05", "--episodes=32", EXACT],
    "batch32x32-0.05": [*BATCH, *WIDE, "--meta_weight=0.05", "--episodes=32"],
    "batch32-0.2": [*BATCH, *WIDE, "--meta_weight=0.2"],
    "batch32-1": [*BATCH, *WIDE, "--meta_weight=1"],
    "batch32x8-0.2": [*BATCH, *WIDE, "--meta_weight=0.2", "--episodes=8"],
    "batch32x8-1": [*BATCH, *WIDE, "--meta_weight=1", "--episodes=8"],
    **{f"word-{windows}-{weight}": [HALF, f"--masked_word={windows}", f"--meta_weight={weight}"]
       for windows in ("query", "all") for weight in (0.1, 0.5, 1)},  # hypotheses.md, 1
    **{f"half-{weight}": [HALF, f"--meta_weight={weight}"] for weight in (0, 0.1, 0.5)},
}


# As the last comparison, of scarce data: 200,000 tokens, so 8 epochs of vanilla training.
MANY = [*BATCH, *WIDE, "--episodes=32"]
SCARCE_SEARCH = {
    "vanilla": VANILLA,
    "vanilla-decay0.5": [*VANILLA, "--weight_decay=0.5"],
    "share-50": [HALF],
    "query_lm-50": [HALF, *QUERY_LM],
    "batch32x32-0.05": [*MANY, "--meta_weight=0.05"],
    "batch32x32-0.2": [*MANY, "--meta_weight=0.2"],
    "batch32x32-0.5": [*MANY, "--meta_weight=0.5"],
}


CONTROL, CONTROL_SEEDS = ("vanilla", "half-0.1", "half-0.5", "word-query-0.1"), (11, 12, 13)


def search():
    """One seed that no final run has, and as validation text held-out documents of the training domains."""
    if not Path("data/search").exists():
        return
    flags = ["--warmup_steps=40", "--meta_start=41", "--probe_every=0"]
    for name, own in SEARCH.items():
        for seed in CONTROL_SEEDS if name in CONTROL else CONTROL_SEEDS[:1]:
            if not is_done(f"out/found/{name}-{seed}"):  # their evaluation
                own_flags = [*flags, "--eval_every=0", *own]
                yield command(f"out/search/{name}-{seed}", "search", seed, own_flags, SEARCH_STEPS)
    for name, own in SCARCE_SEARCH.items():
        out_dir = f"out/scarce-search/{name}-11"
        if not is_done(out_dir):
            yield command(out_dir, "scarce-search", 11, [*flags, "--eval_every=37", *own], SEARCH_STEPS)


# ---- the runs ----

DOSES = {f"share-{percent}": [f"--meta_share={percent / 100}"] for percent in (0, 5, 10, 25, 50)}
# As published, as near as settings go: 4 random layers, 32 ways, one query, full weight, from the
# first update on; warm-up over 2,500 of 6,000 updates.
PUBLISHED = [HALF, "--meta_weight=1", "--meta_start=0", "--ways=32", "--queries=1",
             "--head_layers=4", "--head_start=random", "--warmup_steps=1018"]
BATCHED = [*MANY, "--meta_weight=0.05"]  # by the search
LATE = [TENTH, "--meta_start=1221", "--meta_weight=0.1"]  # by the search the cheapest adaptation at the mask
# hypotheses.md, 1
META_SEEDS = range(21, 27)
META = {"0": VANILLA, "50": DOSES["share-50"], "weight0": [HALF, "--meta_weight=0"],
        "word": [HALF, "--masked_word=query", "--meta_weight=0.1"],
        "word-0.5": [HALF, "--masked_word=query", "--meta_weight=0.5"]}  # added later: three seeds
# hypotheses.md, 2: the last fifth of a run anew, from the checkpoint of "base" at 80%
BASE_STEP = 4 * STEPS // 5 // 2 * 2  # even, since checkpoints are made at half of it too
BASE = [*VANILLA, f"--checkpoint_every={BASE_STEP // 2}", f"--keep_every={BASE_STEP}", "--probe_every=0"]
FROM_BASE = ["--lr=4.18e-4", "--warmup_steps=20", "--meta_start=0"]  # the rate that a run has at 80%
TWO_STEPS = [QUARTER, "--inner_steps=2"]
LAST = {"lm": VANILLA, "head": TWO_STEPS,
        **{f"all-{rate}": [*TWO_STEPS, "--adapt=all", f"--backbone_lr={rate}"]
           for rate in (0.003, 0.01, 0.03)}}
CHOOSING, LAST_SEEDS = 31, (32, 33, 34)  # the first chooses a rate
CHOSEN = ("lm", "head", "all-0.03")  # hypotheses.md, 2: chosen by seed 31
# hypotheses.md, 3
RULE, RULE_SEEDS = [*PUBLISHED, "--batch_size=16", "--published_episodes=16", "--probe_every=0"], (41, 42, 43)
RUNS = [  # corpus, arm, flags, seeds
    *[("books", arm, DOSES[arm], (*SEEDS, 4, *AGAIN)) for arm in ("share-0", "share-50")],
    ("books", "share-10", DOSES["share-10"], (*SEEDS, 4)),
    *[("books", arm, DOSES[arm], SEEDS[:1]) for arm in ("share-5", "share-25")],
    ("books", "late", LATE, SEEDS),
    ("books", "half", VANILLA, (*SEEDS, *AGAIN)),  # half as long: about as much text as share-50 reads
    ("books", "batch", BATCHED, SEEDS),
    ("books", "published-0.001", [*PUBLISHED, "--inner_lr=0.001"], SEEDS[:1]),
    ("books", "published-0.01", [*PUBLISHED, "--inner_lr=0.01"], SEEDS[:1]),
    ("books", "published-vanilla", [*VANILLA, "--warmup_steps=1018"], SEEDS[:1]),
    *[("books", f"meta-{arm}", [*flags, "--probe_every=0"], META_SEEDS[:3 if arm == "word-0.5" else 6])
      for arm, flags in META.items()],
    ("books", "base", BASE, (CHOOSING, *LAST_SEEDS)),
    *[("books", f"last-{arm}", flags, (CHOOSING, *(LAST_SEEDS if arm in CHOSEN else ())))
      for arm, flags in LAST.items()],
    ("books", "rule-vanilla", [*VANILLA, "--warmup_steps=1018", "--probe_every=0"], RULE_SEEDS),
    *[("books", f"rule-{rate}", [*RULE, f"--inner_lr={rate}"], RULE_SEEDS) for rate in (0.001, 0.01)],
    ("scarce", "share-0", VANILLA, SEEDS),
    ("scarce", "share-50", DOSES["share-50"], SEEDS),
    ("scarce", "half", VANILLA, SEEDS),
    ("scarce", "batch", BATCHED, SEEDS),
    ("pydocs", "share-0", VANILLA, SEEDS),
    ("pydocs", "share-50", DOSES["share-50"], SEEDS),
    ("pydocs", "half", VANILLA, SEEDS),
]


def final_runs(quick):
    """(folder, corpus, arm, seed, flags) of all runs whose text is there."""
    missing = sorted({corpus for corpus, *_ in RUNS if not Path("data", corpus).exists()})
    if missing:
        print(f"left out, missing in data/: {', '.join(missing)} (run.sh prepares it)", file=sys.stderr)
    for corpus, arm, flags, seeds in RUNS:
        for seed in seeds:
            if corpus in missing or quick and seed != 1:
                continue
            yield f"out/{'quick/' * quick}{corpus}/{arm}-{seed}", corpus, arm, seed, flags


def runs(quick):
    for out_dir, corpus, arm, seed, flags in final_runs(quick):
        steps = STEPS // 10 if quick else STEPS
        if quick:
            starts = [flag for flag in ("--meta_start=244", *flags) if flag.startswith("--meta_start=")]
            flags = [*flags, f"--meta_start={int(starts[-1].split('=')[1]) // 10}", "--warmup_steps=40",
                     "--eval_every=37", "--probe_every=8", "--log_every=8"]
        steps //= 2 if arm.endswith("half") else 1
        if arm.startswith("last-"):
            base = Path(f"out/books/base-{seed}/ckpt_{BASE_STEP:06d}.pt")
            if not base.exists():  # not yet: run.sh asks twice
                continue
            # Other batches, though of text that the base has read once
            flags = [*FROM_BASE, *flags, "--probe_every=0", f"--init_from={base}", f"--seed={seed + 100}"]
            steps = STEPS - BASE_STEP
        if not is_done(out_dir):
            yield command(out_dir, corpus, seed, flags, steps)


# ---- what is measured of their checkpoints ----


def is_trained(out_dir):
    """Whether a run has made all of its updates, so that its checkpoint is the last."""
    settings = Path(out_dir, "config.json")
    return settings.exists() and Path(out_dir, f"ckpt_{last_step(out_dir):06d}.pt").exists()


def last_step(out_dir):
    return json.loads(Path(out_dir, "config.json").read_text())["max_steps"]


def measurement(out_dir, corpus, source, seed, *flags):
    """[command] of a run of no updates: losses and adaptation of the checkpoint that it starts from."""
    settings = [f"--data=data/{corpus}", f"--out_dir={out_dir}", f"--init_from={source}", "--max_steps=0",
                *VANILLA, f"--seed={seed}", *flags]
    to_do = is_trained(source) and not is_done(out_dir)
    return [" ".join(["python train.py", *FILES, *settings])] if to_do else []


def measurements(quick):
    """Checkpoints by other instruments than the one that they were trained with."""
    if not quick and Path("data/search").exists():
        for name in SEARCH:  # all of the validation text, and the same inner loop for all
            for seed in CONTROL_SEEDS:
                source = f"out/search/{name}-{seed}"
                yield from measurement(f"out/found/{name}-{seed}", "search", source, seed,
                                       "--eval_sequences=700")
    for source, corpus, _, seed, _ in final_runs(quick):
        if corpus == "pydocs" and Path("data/books-by-pydocs").exists():
            out_dir = source.replace("pydocs", "foreign")
            yield from measurement(out_dir, "books-by-pydocs", source, seed)
        if corpus == "books" and seed <= 4:  # one rate may not be the best of every arm
            for rate in RATES:
                out_dir = source.replace("books", f"rate-{rate}")
                yield from measurement(out_dir, corpus, source, seed, f"--inner_lr={rate}")
        if "/last-" in source and is_trained(source):
            for setting in ADAPT_ALL:
                out_dir = source.replace("books", "all-{}-{}".format(*setting))
                if not is_done(out_dir):
                    yield "python results/adapt_all.py {} {} {} {}".format(source, out_dir, *setting)


IN_LANGUAGE = ("da_ddt", "hr_set", "pt_bosque", "sk_snk")
EVERYWHERE = ("en_ewt", "en_pud", *IN_LANGUAGE, "ceb_gja", "tl_trg")
ENGLISH = "en_ewt:dev"  # 1,801 sentences of English, on which models are fine-tuned
NER_RATES = {"majority": None, "head": 0.03, "full": 3e-4}  # learning rates
WITH_ALL = ("share-0", "share-50", "batch")
SCORED = (*WITH_ALL, "share-10", "late", "half")
FEW = (8, 32, 128)


class FineTuning(NamedTuple):
    corpus: str
    arms: tuple
    mode: str
    train: str
    test: tuple
    shots: tuple  # numbers of sentences; 0: all
    draws: int  # of so many sentences
    epochs: int
    seeds: object = (*SEEDS, 4)


FINE_TUNING = [FineTuning(*row) for row in (
    ("books", ("share-0",), "majority", ENGLISH, EVERYWHERE, (*FEW, 0), 5, 0),  # needs no model
    ("books", SCORED, "head", ENGLISH, EVERYWHERE, (*FEW, 0), 5, 50),
    ("books", SCORED, "full", ENGLISH, EVERYWHERE, FEW, 3, 30),
    ("books", WITH_ALL, "full", ENGLISH, EVERYWHERE, (0,), 3, 10),
    *[("books", WITH_ALL, "head", name, (name,), (32, 0), 3, 50) for name in IN_LANGUAGE],
    *[("books", WITH_ALL, "full", name, (name,), (1000,), 1, 10) for name in IN_LANGUAGE],
    ("pydocs", ("share-0", "share-50", "half"), "full", ENGLISH, EVERYWHERE, FEW, 3, 30),
    ("books", ("share-0", "share-50", "half"), "full", ENGLISH, EVERYWHERE, FEW, 8, 30, AGAIN),
    ("books", tuple(f"meta-{arm}" for arm in META), "full", ENGLISH, EVERYWHERE, FEW, 8, 30, META_SEEDS),
    ("books", tuple(f"last-{arm}" for arm in CHOSEN), "full", ENGLISH, EVERYWHERE, FEW, 8, 30, LAST_SEEDS),
)]


def scored(source):
    """What ner.jsonl has of the last checkpoint: {(mode, train, sentences, draw, test)}."""
    path = Path(source, "ner.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["mode"], line["train"], line["shots"], line["seed"], line["test"])
            for line in lines if line["step"] == last_step(source)}


def to_score(quick):
    """(folder, row of FINE_TUNING) of the runs that do not have all of its scores."""
    for source, corpus, arm, seed, _ in final_runs(quick):
        for row in FINE_TUNING[:2] if quick else FINE_TUNING:
            results = itertools.product([row.mode], [row.train], row.shots, range(1, row.draws + 1), row.test)
            is_meant = corpus == row.corpus and arm in row.arms and seed in row.seeds
            if is_meant and not scored(source) >= set(results):
                yield source, row


def ner(quick, folder):
    """Universal NER: fine-tuned in English or, as IN_LANGUAGE, on the train split of the language itself."""
    for source, row in filter(lambda pair: is_trained(pair[0]), to_score(quick)):
        training = f" --lr={NER_RATES[row.mode]} --epochs={row.epochs} --patience={row.epochs}"
        yield (f"python eval_ner.py {source} --data={shlex.quote(folder)} --train={row.train}"
               f" --test={','.join(row.test)} --mode={row.mode} --shots={','.join(map(str, row.shots))}"
               f" --seeds={row.draws}{training if row.epochs else ''}")


def fetch(quick, folder):
    """Downloads the treebanks that are missing, so that no two commands do at the same time; no commands."""
    rows = [row for _, row in to_score(quick)]
    names = {f"{name}:test" for row in rows for name in row.test}
    names |= {row.train if ":" in row.train else f"{row.train}:{split}"
              for row in rows for split in ("train", "dev")}
    if not rows:
        print("NER is left out: nothing to score", file=sys.stderr)
        return []
    try:
        treebanks.load(",".join(sorted(names)), "test", folder)
    except config.UserError as error:
        sys.exit(f"NER is left out: {error}")
    return []


if __name__ == "__main__":
    stage, *rest = sys.argv[1:]
    if stage == "updates":  # in a copy with recipes
        print(updates(rest[2:], int(rest[1])))
        sys.exit()
    quick, folders = "--quick" in rest, [arg for arg in rest if arg != "--quick"]
    lines = {"search": search, "runs": lambda: runs(quick), "measure": lambda: measurements(quick),
             "fetch": lambda: fetch(quick, *folders), "ner": lambda: ner(quick, *folders)}[stage]()
    sys.stdout.writelines([f"{line}\n" for line in lines])

"""Wrong gin files: every parameter wrongly typed, out of its range and misspelt; broken text."""

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from bad_sources import write_sources

from hpgr_plugin.config.registry import GROUPS, Entry, load, register

WRONG_VALUES = (
    *("'text'", "''", "5", "-3", "2.5", "True", "None", "[1, 'a']", "{'a': 1}", "(1, 2)", "b'x'"),
    *("@hpgr.LastNSplit()", "@hpgr.LastNSplit", "@hpgr.run", "%NOWHERE", "[[]]", "{1: 2}"),
)
NUMBERS = (
    *("-1", "0", "-0.5", "1.0", "1e999", "-1e999", "1e308", "1e30", "4294967296"),
    "1" + "0" * 30,
)
BASE = """
include 'configs/data/synthetic.gin'
include 'configs/models/hpgr_base.gin'
NUM_USERS = 12
EMBEDDING_DIM = 8
NUM_HEADS = 2
NUM_LAYERS = 1
MAX_HISTORY = 64
MAX_POSITIONS = 65
hpgr.run.output_dir = '{folder}/out'
hpgr.run.overwrite = True
hpgr.run.mode = 'finetune'
hpgr.FinetuneSettings.epochs = 1
hpgr.PretrainSettings.epochs = 1
hpgr.MaskedItemModel.num_layers = 1
hpgr.LastFractionSplit.validation = 0.2
"""
ABLATION = """
hpgr.run.mode = 'ablation'
hpgr.run.rows = ['row']
row/hpgr.AblationRow.title = 'a row'
"""
# What makes a run read the bindings of a configurable; others are read by every run.
USES = {
    "PreferenceGuidedSparseAttention": """
hpgr.HSTURanker.attention_hook = @hpgr.PreferenceGuidedSparseAttention()
hpgr.PreferenceGuidedSparseAttention.top_k = 4
""",
    "StochasticLength": """
hpgr.HSTURanker.attention_hook = @hpgr.StochasticLength()
hpgr.StochasticLength.alpha = 1.5
""",
    "TimeAwarePositionalEncoder": """
hpgr.HSTURanker.positional_encoder = @hpgr.TimeAwarePositionalEncoder()
""",
    "SessionEnhancementModule": "hpgr.HSTURanker.sem = @hpgr.SessionEnhancementModule()\n",
    "MTGRLayer": "hpgr.HSTURanker.layer = @hpgr.MTGRLayer\n",
    "GlobalTimeSplit": "hpgr.prepare_data.split = @hpgr.GlobalTimeSplit()\n",
    "LastNSplit": """
hpgr.prepare_data.split = @hpgr.LastNSplit()
hpgr.LastNSplit.test = 4
hpgr.LastNSplit.validation = 4
""",
    **dict.fromkeys(
        ("MaskedItemModel", "PretrainSettings", "SequenceLoader"), "hpgr.run.mode = 'pretrain'\n"
    ),
    "AblationRow": ABLATION,
    "rating_at_least": """
hpgr.prepare_data.label = @hpgr.rating_at_least()
hpgr.rating_at_least.field = 'is_click'
hpgr.rating_at_least.threshold = 0.5
hpgr.run.allow_unused = ['label_column', 'SessionEnhancementModule', 'TimeAwarePositionalEncoder']
""",
    "MovieLensReader": """
hpgr.prepare_data.reader = @hpgr.MovieLensReader()
hpgr.MovieLensReader.path = '{folder}/movielens'
hpgr.prepare_data.label = @hpgr.rating_at_least()
""",
    "KuaiRandReader": """
hpgr.prepare_data.reader = @hpgr.KuaiRandReader()
hpgr.KuaiRandReader.path = '{folder}/kuairand'
""",
    "EBNeRDReader": """
hpgr.prepare_data.reader = @hpgr.EBNeRDReader()
hpgr.EBNeRDReader.path = '{folder}/ebnerd'
""",
    "YambdaReader": """
hpgr.prepare_data.reader = @hpgr.YambdaReader()
hpgr.YambdaReader.path = '{folder}/yambda'
hpgr.prepare_data.label = @hpgr.rating_at_least()
hpgr.rating_at_least.field = 'played_ratio_pct'
""",
    "TableReader": """
hpgr.prepare_data.reader = @hpgr.TableReader()
hpgr.TableReader.path = '{folder}/table.csv'
hpgr.label_column.field = 'label'
""",
}
UNUSED = """
hpgr.run.allow_unused = ['SyntheticReader', 'LastFractionSplit', 'label_column',
    'SessionEnhancementModule', 'TimeAwarePositionalEncoder']
"""
# Numbers of which any is right, or whose size alone decides how long a run takes.
MACROS = ("NUM_USERS", "EMBEDDING_DIM", "NUM_LAYERS", "MAX_HISTORY", "DROPOUT", "CACHE_DIR")


class Case(NamedTuple):
    """One wrong configuration.

    Attributes:
        file: content of the gin file; None: it is not written.
        bindings: of the command line.
        names: what the message has to contain, one of them: the binding or the file.
        must_fail: False where the value may be one that the parameter takes.
    """

    file: bytes | None
    bindings: tuple[str, ...]
    names: tuple[str, ...]
    must_fail: bool = False


def cases(folder: Path, *, seed: int = 0, mutations: int = 200) -> list[Case]:
    """All of them, in an order by seed.

    Args:
        folder: the readers' files are written to it.
        seed: of the order and of the broken text.
        mutations: how many texts with random edits.
    """
    register("components", "data", "embedded")
    write_sources(folder)
    chance = random.Random(seed)
    made = [
        *(case for entry in _entries() for case in _of_entry(entry, folder, chance)),
        *_of_macros(folder),
        *_references(folder),
        *_broken_text(folder),
        *(_mutated(folder, chance) for _ in range(mutations)),
    ]
    chance.shuffle(made)
    return made


def base(folder: Path, name: str = "") -> str:
    """A small right configuration in which a run reads the bindings of `name`."""
    return (BASE + (UNUSED if name in USES else "") + USES.get(name, "")).replace(
        "{folder}", str(folder)
    )


def _entries() -> list[Entry]:
    return [entry for name in ("components", "data", "embedded") for entry in GROUPS[name]]


def _of_entry(entry: Entry, folder: Path, chance: random.Random) -> Iterator[Case]:
    target = load(entry.target)
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    file = base(folder, entry.name).encode()
    for name in inspect.signature(target).parameters:
        binding = f"hpgr.{entry.name}.{name}"
        scope = "row/" if entry.name == "AblationRow" else ""
        files = ("text",) if name.endswith(("path", "_table")) else ()  # of WRONG_VALUES
        # Another split leaves the bindings of the old one unread.
        named = (name, entry.name, str(folder), "nothing reads the bindings", *files)
        values = WRONG_VALUES + (NUMBERS if _takes_numbers(hints[name]) else ())
        for value in values:
            yield Case(file, (f"{scope}{binding} = {value}",), named)
        misspelt = _misspelt(binding, chance)
        yield Case(file, (f"{misspelt} = 1",), (misspelt, misspelt.rpartition(".")[2]), True)
        yield Case(file, (f"hpgr.{entry.name}.{name}x = 1",), (f"{name}x",), True)
        yield Case(file, (f"hpgr.{entry.name}x.{name} = 1",), (f"{entry.name}x",), True)
        yield Case(file, (f"typo/{binding} = 1",), ("typo", name), True)
    for name in entry.denylist:
        yield Case(file, (f"hpgr.{entry.name}.{name} = 1",), (name,), True)


def _takes_numbers(hint: Any) -> bool:
    return any(kind in str(hint) for kind in ("int", "float"))


def _misspelt(name: str, chance: random.Random) -> str:
    """The name with two neighbouring letters, behind `hpgr.`, exchanged."""
    places = [n for n in range(5, len(name) - 1) if name[n] != name[n + 1]]
    place = chance.choice([n for n in places if "." not in name[n : n + 2]])
    return name[:place] + name[place + 1] + name[place] + name[place + 2 :]


def _of_macros(folder: Path) -> Iterator[Case]:
    file = base(folder).encode()
    for macro in MACROS:
        for value in (*WRONG_VALUES, *NUMBERS):
            # A number of the right type is refused where it is used, by its name there.
            yield Case(file, (f"{macro} = {value}",), (macro, macro.lower()))
        yield Case(file, (f"{macro}X = 1",), (f"{macro}X",), True)
        yield Case(file, (f"hpgr.HSTURanker.num_heads = %{macro}X",), (f"{macro}X",), True)


def _references(folder: Path) -> Iterator[Case]:
    file = base(folder).encode()
    for slot in ("sem", "positional_encoder", "attention_hook", "layer", "pretrained"):
        for entry in _entries():
            for brackets in ("", "()"):
                binding = f"hpgr.HSTURanker.{slot} = @hpgr.{entry.name}{brackets}"
                yield Case(file, (binding,), (slot, entry.name))
        for name in ("@hpgr.Nothing()", "@Nothing", "@none/hpgr.StochasticLength()"):
            yield Case(file, (f"hpgr.HSTURanker.{slot} = {name}",), (slot, "Nothing", "none"), True)


def _broken_text(folder: Path) -> Iterator[Case]:
    whole = base(folder)
    texts = [
        *(
            "hpgr.run.mode =",
            "hpgr.run.mode 'finetune'",
            "= 5",
            "hpgr.run.mode = 'a",
            "(",
            "@",
            "%",
        ),
        *("hpgr.run.mode = [1,", "hpgr.run.mode = {1: }", "hpgr.run.mode = nan", "hpgr.run = 5"),
        *(
            "hpgr.run.mode = 1 2",
            "hpgr..mode = 1",
            "/hpgr.run.mode = 1",
            "hpgr.run.mode = lambda: 1",
        ),
        *(
            "include 'nowhere.gin'",
            "include nowhere",
            "include '/'",
            "include ''",
            "import nowhere",
        ),
        *(
            "import os.nowhere",
            "from x import y",
            "hpgr.run.mode = '\\ud800'",
            "\t\x0c",
            "\\",
            "\x00",
        ),
        *("hpgr.run:\nmode = 1", "hpgr.run:\n  mode", "hpgr.run:", "hpgr.run.mode = `a`", "é = é"),
        *("hpgr.run.mode = 0777", "hpgr.run.mode = 1_", "hpgr.run.mode = 'x' 'y' z", "%A = 1"),
        *("hpgr.run.output_dir = '/proc/none/out'", "hpgr.run.output_dir = '\\x00'"),
        "hpgr.run.mode = " + "(" * 500 + ")" * 500,
    ]
    for text in texts:
        marks = ("/proc/none", "--gin_bindings", text.partition("=")[0].strip() or "line")
        yield Case(whole.encode(), (text,), marks)
        yield Case(f"{whole}\n{text}\n".encode(errors="replace"), (), (*marks, "bad.gin"))
    itself = f"include '{folder / 'bad.gin'}'".encode()
    for content in (
        b"",
        itself,
        b"\x00\x01\xff" * 50,
        bytes(range(256)),
        whole.encode("utf-16"),
        None,
    ):
        yield Case(content, (), ("bad.gin", "hpgr.run"), True)


def _mutated(folder: Path, chance: random.Random) -> Case:
    """A right configuration in which a few characters were lost, doubled or exchanged."""
    name = chance.choice(["", *USES])
    text = base(folder, name)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(text))
        new = chance.choice(["", text[place] * 2, chance.choice("'\"()[]{}@%./=,:\n 0aZé\\")])
        text = text[:place] + new + text[place + 1 :]
    return Case(text.encode(), (), ("bad.gin", "hpgr.", f"{folder.parent}/"))

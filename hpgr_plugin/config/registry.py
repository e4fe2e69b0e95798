"""Everything that gin configures, one line each, and how code obtains it.

A name in gin is `hpgr.` and the name of the class or function. Its parameters can be bound, and
`@hpgr.Name()` in a gin file is an instance of it. Modules of the package do not import gin: they
are listed here, and registered in groups, because some need a host or optional packages.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import gin

from hpgr_plugin.errors import HpgrError


class ConfigError(HpgrError):
    """A configuration that does not fit; the message names the binding or the argument."""


class Entry(NamedTuple):
    """One configurable.

    Attributes:
        target: "module:name"; `hpgr.name` in gin.
        slot: the slot that it can fill, if any.
        denylist: parameters that code sets, so that gin must not.
        root: whether code builds it by itself; others are built only where a binding refers to
            them.
    """

    target: str
    slot: str | None = None
    denylist: tuple[str, ...] = ()
    root: bool = False

    @property
    def name(self) -> str:
        """The name in gin, without `hpgr.`."""
        return self.target.rpartition(":")[2]


SEM, POSITIONS, HOOK, LAYER, ENCODER, FEATURES, RARE = SLOTS = (
    *("sem", "positional_encoder", "attention_hook"),
    *("layer", "encoder", "token_features", "rare_items"),  # these take classes
)

_REQUESTS = ("prepared", "split", "settings", "statistics", "seed", "rank", "world_size")
_SEQUENCES = ("prepared", "max_length", "users", "seed", "rank", "world_size")
_MIM = ("num_items", "num_actions", "item_counts", "item_feature_codes", "item_events")
_LAYER = ("embedding_dim", "num_heads", "dropout")
_SIZES = ("sizes",)
_DECODER = ("ids", "sizes")
_SLATES = ("num_items", "num_actions", "vocabulary_digest", "ids", "decoder_arguments")
_RANKER = (
    *("num_items", "num_actions", "vocabulary_digest"),
    *("user_feature_sizes", "item_feature_codes", "item_counts", "task_names"),
)

GROUPS: dict[str, tuple[Entry, ...]] = {
    "components": (
        Entry("hpgr_plugin.components.attention_hooks:PreferenceGuidedSparseAttention", HOOK),
        Entry("hpgr_plugin.components.attention_hooks:StochasticLength", HOOK),
        Entry("hpgr_plugin.components.mim:MaskedItemModel", denylist=_MIM, root=True),
        Entry("hpgr_plugin.components.positions:TimeAwarePositionalEncoder", POSITIONS),
        Entry("hpgr_plugin.components.random_items:RandomItems", HOOK),
        Entry("hpgr_plugin.components.sem:SessionEnhancementModule", SEM),
        Entry("hpgr_plugin.components.slates.decoder:FlatItemDecoder", denylist=_DECODER),
        Entry("hpgr_plugin.components.slates.decoder:FlatSlateDecoder", denylist=_DECODER),
        Entry("hpgr_plugin.components.slates.decoder:HierarchicalDecoder", denylist=_DECODER),
        Entry("hpgr_plugin.components.slates.tokenizer:CRQVAE", denylist=("input_dim",)),
        Entry("hpgr_plugin.components.slates.tokenizer:RQVAE", denylist=("input_dim",)),
        Entry("hpgr_plugin.components.slates.tokenizer:ResidualKMeans", denylist=("input_dim",)),
        Entry("hpgr_plugin.ops.dispatch:set_backends", root=True),
    ),
    "data": (
        Entry("hpgr_plugin.data:EBNeRDReader"),
        Entry("hpgr_plugin.data:GlobalTimeSplit"),
        Entry("hpgr_plugin.data:KuaiRandReader"),
        Entry("hpgr_plugin.data:LastFractionSplit"),
        Entry("hpgr_plugin.data:LastNSplit"),
        Entry("hpgr_plugin.data:MovieLensReader"),
        Entry("hpgr_plugin.data:RequestLoader", denylist=_REQUESTS, root=True),
        Entry("hpgr_plugin.data:RequestSettings", root=True),
        Entry("hpgr_plugin.data:SequenceLoader", denylist=_SEQUENCES, root=True),
        Entry("hpgr_plugin.data:SyntheticReader"),
        Entry("hpgr_plugin.data:TableReader"),
        Entry("hpgr_plugin.data:YambdaReader"),
        Entry("hpgr_plugin.data:label_column"),
        Entry("hpgr_plugin.data.titles:ItemTitles", root=True),
        Entry("hpgr_plugin.data:prepare_data", root=True),
        Entry("hpgr_plugin.data:rating_at_least"),
    ),
    "embedded": (
        Entry("hpgr_plugin.hosts.embedded.model.cross_features:CrossFeatures", FEATURES, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.hstu:HSTULayer", LAYER, denylist=_LAYER),
        Entry("hpgr_plugin.hosts.embedded.model.mtgr:MTGRLayer", LAYER, denylist=_LAYER),
        Entry("hpgr_plugin.hosts.embedded.model.ranker:HSTURanker", denylist=_RANKER, root=True),
        Entry("hpgr_plugin.hosts.embedded.model.rare_items:RareItems", RARE, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.bert4rec:BERT4Rec", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.dnn:DNN", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.gru4rec:GRU4Rec", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.moe:MoE", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.sasrec:SASRec", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.rivals.wukong:Wukong", ENCODER, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.token_features:CalendarFeatures", FEATURES, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.model.token_features:GapFeatures", FEATURES, _SIZES),
        Entry("hpgr_plugin.hosts.embedded.report.ablation:AblationRow", root=True),
        Entry("hpgr_plugin.hosts.embedded.run:run", root=True),
        Entry("hpgr_plugin.hosts.embedded.slates.ablation:SlateRow", root=True),
        Entry("hpgr_plugin.hosts.embedded.slates.model:SlateModel", denylist=_SLATES, root=True),
        Entry("hpgr_plugin.hosts.embedded.slates.stages:AlignSettings", root=True),
        Entry("hpgr_plugin.hosts.embedded.slates.stages:SlateSettings", root=True),
        Entry("hpgr_plugin.hosts.embedded.slates.tokenize:TokenizeSettings", root=True),
        Entry("hpgr_plugin.hosts.embedded.train.stages:FinetuneSettings", root=True),
        Entry("hpgr_plugin.hosts.embedded.train.stages:PretrainSettings", root=True),
    ),
    "dlrm_v3": (Entry("hpgr_plugin.hosts.dlrm_v3.model:DlrmHSTU", root=True),),
    "research": (
        Entry("hpgr_plugin.hosts.research.model:SequentialEncoder", root=True),
        Entry("hpgr_plugin.hosts.research.pretrain:research_pretrain", root=True),
    ),
}

_registered: dict[str, Entry] = {}


def register(*groups: str) -> None:
    """Make groups of configurables known to gin, and the shipped gin files found from anywhere.

    A group that is registered already is left as it is.

    Args:
        groups: keys of `GROUPS`.

    Raises:
        ConfigError: an unknown group, a name that is taken, or a target that does not exist.
    """
    _add_shipped_files()
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(f"group must be one of {sorted(GROUPS)}, got {group!r}")
        for entry in GROUPS[group]:
            register_entry(entry)


def register_entry(entry: Entry) -> None:
    """Make one configurable known to gin.

    Raises:
        ConfigError: the name is taken, or the target does not exist.
    """
    known = _registered.get(entry.name)
    if known is not None and known != entry:
        raise ConfigError(f"hpgr.{entry.name} is registered twice: {known.target}, {entry.target}")
    if known is None:
        with gin.unlock_config():
            gin.external_configurable(
                load(entry.target), name=entry.name, module="hpgr", denylist=list(entry.denylist)
            )
        _registered[entry.name] = entry


def load(target: str) -> Any:
    """The class or function at "module:name".

    Raises:
        ConfigError: the module has no such name.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ConfigError(f"module {module} has no {name!r} (config/registry.py)") from None


def registered_targets() -> dict[str, Any]:
    """Every registered class or function, by its name in gin without `hpgr.`."""
    return {name: load(entry.target) for name, entry in _registered.items()}


def roots() -> list[str]:
    """Names that code builds by itself."""
    return [name for name, entry in _registered.items() if entry.root]


def configured(name: str) -> Any:
    """Gin's version of `hpgr.name`: called, it takes the bound parameters of the active scope.

    What it makes is an instance of the registered class itself.

    Raises:
        ConfigError: nothing of this name is registered.
    """
    if name not in _registered:
        raise ConfigError(f"hpgr.{name} is not registered; names: {sorted(_registered)}")
    return gin.get_configurable(f"hpgr.{name}")


def build(name: str, **arguments: Any) -> Any:
    """Call `hpgr.name` with the bound parameters and `arguments`, which have precedence.

    Raises:
        ConfigError: a required argument is neither bound nor given.
    """
    try:
        return configured(name)(**arguments)
    except TypeError as error:
        missing = re.search(r"(\w+)(\.__init__)?\(\) missing \d+ required.*?: (.*)", str(error))
        if missing is None:
            raise
        raise ConfigError(f"hpgr.{missing[1]} has no binding for {missing[3]}") from error


def shipped(path: str) -> Path:
    """Where a shipped file such as "configs/runs/quickstart.gin" is, in a checkout or installed."""
    package = Path(__file__).parents[1]
    return (package if (package / "configs").is_dir() else package.parent) / path


@functools.cache
def _add_shipped_files() -> None:
    """Let gin find shipped files by relative paths, from any directory.

    The reader comes before gin's own reader of package resources, which logs an error for every
    path that is not a package, and fails on folders that could be one.
    """
    reader = (lambda path: shipped(path).open(), lambda path: shipped(path).is_file())
    gin.config._FILE_READERS.insert(1, reader)

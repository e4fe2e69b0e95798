"""Every name of the host that the retrieval adapter touches."""

from hpgr_plugin.hosts.contract import HOST_PACKAGE, Requirement

_RESEARCH = f"{HOST_PACKAGE}.research"
_TRAIN = f"{_RESEARCH}.trainer.train"
_SEQUENTIAL = f"{_RESEARCH}.modeling.sequential"
_PREPROCESSORS = f"{_SEQUENTIAL}.input_features_preprocessors"
_ENCODER_ARGUMENTS = (
    "max_sequence_length",
    "max_output_length",
    "embedding_module",
    "input_preproc_module",
    "output_postproc_module",
    "activation_checkpoint",
    "verbose",
)
_PREPROCESSOR_ARGUMENTS = ("past_lengths", "past_ids", "past_embeddings", "past_payloads")
_DEFAULT_PREPROCESSOR = "LearnablePositionalEmbeddingInputFeaturesPreprocessor"

REQUIREMENTS: tuple[Requirement, ...] = (
    # Replaced where the host lacks the seam for it; see README of the patch series.
    Requirement(
        _TRAIN,
        "get_sequential_encoder",
        "function",
        ("module_type", "interaction_module", *_ENCODER_ARGUMENTS),
    ),
    Requirement(_TRAIN, "setup", "function", ("rank", "world_size", "master_port")),
    Requirement(_TRAIN, "DDP", "value"),
    # Called, subclassed or read.
    Requirement(
        _TRAIN,
        "train_fn",
        "function",
        ("rank", "world_size", "master_port", "learning_rate", "weight_decay", "num_warmup_steps"),
    ),
    Requirement(f"{_SEQUENTIAL}.encoder_utils", "get_sequential_encoder", "function"),
    Requirement(
        f"{_SEQUENTIAL}.encoder_utils",
        "hstu_encoder",
        "function",
        ("similarity_module", *_ENCODER_ARGUMENTS),
    ),
    Requirement(
        f"{_SEQUENTIAL}.encoder_utils",
        "sasrec_encoder",
        "function",
        ("similarity_module", *_ENCODER_ARGUMENTS),
    ),
    Requirement(f"{_SEQUENTIAL}.hstu", "HSTU._input_features_preproc", "field"),
    Requirement(f"{_SEQUENTIAL}.hstu", "HSTU._embedding_module", "field"),
    Requirement(f"{_SEQUENTIAL}.sasrec", "SASRec._input_features_preproc", "field"),
    Requirement(f"{_SEQUENTIAL}.sasrec", "SASRec._embedding_module", "field"),
    Requirement(f"{_SEQUENTIAL}.embedding_modules", "LocalEmbeddingModule._item_emb", "field"),
    Requirement(
        _PREPROCESSORS,
        _DEFAULT_PREPROCESSOR,
        "class",
        ("max_sequence_len", "embedding_dim", "dropout_rate"),
    ),
    Requirement(_PREPROCESSORS, f"{_DEFAULT_PREPROCESSOR}._pos_emb", "field"),
    Requirement(_PREPROCESSORS, f"{_DEFAULT_PREPROCESSOR}._embedding_dim", "field"),
    Requirement(
        _PREPROCESSORS, f"{_DEFAULT_PREPROCESSOR}.forward", "function", _PREPROCESSOR_ARGUMENTS
    ),
    Requirement(_PREPROCESSORS, f"{_DEFAULT_PREPROCESSOR}.debug_str", "function"),
    Requirement(
        f"{_RESEARCH}.data.reco_dataset",
        "get_reco_dataset",
        "function",
        ("dataset_name", "max_sequence_length", "chronological"),
    ),
)

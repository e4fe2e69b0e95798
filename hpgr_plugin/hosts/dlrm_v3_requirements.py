"""Every name of the host that `hpgr_plugin.hosts.dlrm_v3` touches."""

from hpgr_plugin.hosts.contract import Requirement

_COMMON = "generative_recommenders.common"
_HSTU = "generative_recommenders.modules.dlrm_hstu"
_TRANSDUCER = "generative_recommenders.modules.hstu_transducer"
_PREPROCESSORS = "generative_recommenders.modules.preprocessors"
_STU = "generative_recommenders.modules.stu"
_ATTENTION = "generative_recommenders.ops.hstu_attention"
_COMPUTE = "generative_recommenders.ops.hstu_compute"
_TRAIN = "generative_recommenders.dlrm_v3.train.utils"
_METRICS = "generative_recommenders.dlrm_v3.utils"
_CHECKPOINT = "generative_recommenders.dlrm_v3.checkpoint"

_PREPROCESS = (
    "max_uih_len",
    "max_targets",
    "total_uih_len",
    "total_targets",
    "seq_lengths",
    "seq_timestamps",
    "seq_embeddings",
    "num_targets",
    "seq_payloads",
)
_NORM = ("x", "norm_weight", "norm_bias", "norm_eps", "num_heads", "kernel")
_CACHE = ("max_kv_caching_len", "kv_caching_lengths")
_LOOP = ("rank", "model", "metric_logger", "device")


def _fields(module: str, owner: str, *names: str) -> tuple[Requirement, ...]:
    return tuple(Requirement(module, f"{owner}.{name}", "field") for name in names)


REQUIREMENTS: tuple[Requirement, ...] = (
    # Names that the adapter replaces, or that a patched host lets it set.
    Requirement(_TRAIN, "make_model", "function", ("dataset",)),
    Requirement(_TRAIN, "DlrmHSTU", "class", ("hstu_configs", "embedding_tables", "is_inference")),
    Requirement(_TRAIN, "KeyedOptimizerWrapper", "class", ("params", "optim_factory")),
    Requirement(_TRAIN, "apply_optimizer_in_backward", "function"),
    Requirement(_TRAIN, "DistributedModelParallel", "class", ("module", "device", "plan")),
    Requirement(_HSTU, "STULayer", "class", ("config", "is_inference")),
    Requirement(
        _HSTU,
        "HSTUTransducer",
        "class",
        ("stu_module", "input_preprocessor", "positional_encoder", "is_inference"),
    ),
    # The model.
    Requirement(
        _HSTU,
        "DlrmHSTU",
        "class",
        ("hstu_configs", "embedding_tables", "is_inference", "is_dense", "bf16_training"),
    ),
    *_fields(_HSTU, "DlrmHSTU", "_hstu_configs", "_hstu_transducer", "_embedding_collection"),
    Requirement(_HSTU, "DlrmHSTU.preprocess", "function", ("uih_features", "candidates_features")),
    Requirement(
        _HSTU,
        "DlrmHSTU._user_forward",
        "function",
        ("max_uih_len", "max_candidates", "seq_embeddings", "payload_features", "num_candidates"),
    ),
    *_fields(
        _HSTU,
        "DlrmHSTUConfig",
        "hstu_embedding_table_dim",
        "hstu_transducer_embedding_dim",
        "contextual_feature_to_max_length",
        "candidates_querytime_feature_name",
        "uih_post_id_feature_name",
        "uih_action_time_feature_name",
        "merge_uih_candidate_feature_mapping",
        "multitask_configs",
    ),
    Requirement(_COMMON, "HammerModule", "class", ("is_inference",)),
    *_fields(_COMMON, "HammerModule", "_is_inference"),
    Requirement(_COMMON, "HammerKernel", "class"),
    Requirement(_COMMON, "HammerModule.hammer_kernel", "function"),
    Requirement(_COMMON, "HammerModule.set_hammer_kernel", "function", ("hammer_kernel",)),
    # Preprocessor, transducer.
    Requirement(_PREPROCESSORS, "InputPreprocessor", "class", ("is_inference",)),
    Requirement(_PREPROCESSORS, "InputPreprocessor.forward", "function", _PREPROCESS),
    Requirement(_PREPROCESSORS, "InputPreprocessor.interleave_targets", "function"),
    Requirement(_TRANSDUCER, "HSTUTransducer", "class"),
    *_fields(
        _TRANSDUCER, "HSTUTransducer", "_stu_module", "_input_preprocessor", "_positional_encoder"
    ),
    Requirement(
        _TRANSDUCER,
        "HSTUTransducer._hstu_compute",
        "function",
        (
            "max_seq_len",
            "seq_lengths",
            "seq_offsets",
            "seq_timestamps",
            "seq_embeddings",
            "num_targets",
        ),
    ),
    # The layers and their operators.
    Requirement(_STU, "STULayer", "class", ("config", "is_inference")),
    Requirement(
        _STU,
        "STULayer.forward",
        "function",
        ("x", "x_lengths", "x_offsets", "max_seq_len", "num_targets", *_CACHE),
    ),
    Requirement(_STU, "STULayer.cached_forward", "function", ("delta_x", "num_targets", *_CACHE)),
    Requirement(
        _STU,
        "STULayer.update_kv_cache",
        "function",
        ("max_seq_len", "seq_offsets", "k", "v", *_CACHE),
    ),
    Requirement(_STU, "STULayer.construct_full_kv", "function", ("delta_k", "delta_v")),
    *_fields(
        _STU,
        "STULayer",
        "_num_heads",
        "_hidden_dim",
        "_attention_dim",
        "_output_dropout_ratio",
        "_target_aware",
        "_causal",
        "_max_attn_len",
        "_attn_alpha",
        "_use_group_norm",
        "_recompute_y",
        "_sort_by_length",
        "_contextual_seq_len",
        "_uvqk_weight",
        "_uvqk_beta",
        "_input_norm_weight",
        "_input_norm_bias",
        "_output_weight",
        "_output_norm_weight",
        "_output_norm_bias",
    ),
    Requirement(
        _ATTENTION,
        "hstu_mha",
        "function",
        (
            "max_seq_len",
            "alpha",
            "q",
            "k",
            "v",
            "seq_offsets",
            "causal",
            "dropout_pr",
            "training",
            "num_targets",
            "max_attn_len",
            "contextual_seq_len",
            "sort_by_length",
            "kernel",
        ),
    ),
    Requirement(
        _COMPUTE,
        "hstu_compute_uqvk",
        "function",
        (*_NORM, "attn_dim", "hidden_dim", "uvqk_weight", "uvqk_bias"),
    ),
    Requirement(
        _COMPUTE,
        "hstu_compute_output",
        "function",
        (
            *_NORM,
            "attn",
            "u",
            "dropout_ratio",
            "output_weight",
            "group_norm",
            "linear_dim",
            "training",
            "recompute_y_in_backward",
            "concat_ux|concat_u",
            "concat_ux|concat_x",
            "concat_ux|mul_u_activation_type",
        ),
    ),
    # The launcher.
    Requirement(_TRAIN, "make_optimizer_and_shard", "function", ("model", "device", "world_size")),
    Requirement(_TRAIN, "Topology", "class", ("compute_device",)),
    Requirement(
        _TRAIN,
        "make_train_test_dataloaders",
        "function",
        ("hstu_config", "embedding_table_configs"),
    ),
    Requirement(_TRAIN, "setup", "function", ("rank", "world_size", "master_port", "device")),
    Requirement(_TRAIN, "cleanup", "function"),
    Requirement(_TRAIN, "train_loop", "function", (*_LOOP, "dataloader", "optimizer")),
    Requirement(_TRAIN, "eval_loop", "function", (*_LOOP, "dataloader")),
    Requirement(
        _TRAIN,
        "train_eval_loop",
        "function",
        (*_LOOP, "train_dataloader", "eval_dataloader", "optimizer"),
    ),
    Requirement(
        _TRAIN,
        "streaming_train_eval_loop",
        "function",
        (*_LOOP, "optimizer", "hstu_config", "embedding_table_configs"),
    ),
    Requirement(
        _METRICS,
        "MetricsLogger",
        "class",
        ("multitask_configs", "batch_size", "window_size", "device", "rank"),
    ),
    Requirement(
        _CHECKPOINT,
        "load_dmp_checkpoint",
        "function",
        ("model", "optimizer", "metric_logger", "device"),
    ),
)

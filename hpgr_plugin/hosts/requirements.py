"""The names of the host that each adapter uses, and the parameters it passes to them.

`contract.require` checks one table when its adapter is imported. Reading this imports no host.
"""

from typing import NamedTuple

HOST_PACKAGE = "generative_recommenders"


class Requirement(NamedTuple):
    """One name of the host that an adapter uses.

    Attributes:
        module: Dotted module path.
        name: A name in it; a dot reaches into a class ("STULayer.forward").
        parameters: Parameters that the adapter passes by name.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()


def _uses(module: str, name: str, parameters: str = "") -> Requirement:
    return Requirement(f"{HOST_PACKAGE}.{module}", name, tuple(parameters.split()))


_CACHE = "max_kv_caching_len kv_caching_lengths"
_NORM = "x norm_weight norm_bias norm_eps num_heads kernel"
_LOOP = "rank model metric_logger device"
_SEQUENCES = "max_seq_len seq_lengths seq_offsets seq_timestamps seq_embeddings num_targets"
_UTILS = "dlrm_v3.train.utils"

DLRM_V3 = (
    # Replaced, or set through a seam of a patched host.
    _uses(_UTILS, "make_model", "dataset"),
    _uses(_UTILS, "DlrmHSTU"),
    _uses(_UTILS, "KeyedOptimizerWrapper", "params optim_factory"),
    _uses(_UTILS, "apply_optimizer_in_backward"),
    _uses(_UTILS, "DistributedModelParallel", "module device plan"),
    _uses("modules.dlrm_hstu", "STULayer", "config is_inference"),
    _uses(
        "modules.dlrm_hstu",
        "HSTUTransducer",
        "stu_module input_preprocessor positional_encoder is_inference",
    ),
    # Subclassed.
    _uses(
        "modules.dlrm_hstu",
        "DlrmHSTU",
        "hstu_configs embedding_tables is_inference is_dense bf16_training",
    ),
    _uses("modules.dlrm_hstu", "DlrmHSTU.preprocess", "uih_features candidates_features"),
    _uses(
        "modules.dlrm_hstu",
        "DlrmHSTU._user_forward",
        "max_uih_len max_candidates seq_embeddings payload_features num_candidates",
    ),
    _uses("common", "HammerModule", "is_inference"),
    _uses("common", "HammerModule.set_hammer_kernel", "hammer_kernel"),
    _uses("common", "HammerKernel"),
    _uses("modules.preprocessors", "InputPreprocessor", "is_inference"),
    _uses(
        "modules.preprocessors",
        "InputPreprocessor.forward",
        "max_uih_len max_targets total_uih_len total_targets seq_lengths seq_timestamps "
        "seq_embeddings num_targets seq_payloads",
    ),
    _uses("modules.preprocessors", "InputPreprocessor.interleave_targets"),
    _uses("modules.hstu_transducer", "HSTUTransducer._hstu_compute", _SEQUENCES),
    _uses("modules.hstu_transducer", "HSTUTransducer"),
    _uses("modules.stu", "STULayer", "config is_inference"),
    _uses(
        "modules.stu",
        "STULayer.forward",
        f"x x_lengths x_offsets max_seq_len num_targets {_CACHE}",
    ),
    _uses("modules.stu", "STULayer.cached_forward", f"delta_x num_targets {_CACHE}"),
    _uses("modules.stu", "STULayer.update_kv_cache", f"max_seq_len seq_offsets k v {_CACHE}"),
    _uses("modules.stu", "STULayer.construct_full_kv", "delta_k delta_v"),
    # Called.
    _uses(
        "ops.hstu_attention",
        "hstu_mha",
        "max_seq_len alpha q k v seq_offsets causal dropout_pr training num_targets max_attn_len "
        "contextual_seq_len sort_by_length kernel",
    ),
    _uses(
        "ops.hstu_compute",
        "hstu_compute_uqvk",
        f"{_NORM} attn_dim hidden_dim uvqk_weight uvqk_bias",
    ),
    _uses(
        "ops.hstu_compute",
        "hstu_compute_output",
        f"{_NORM} attn u dropout_ratio output_weight group_norm linear_dim training "
        "recompute_y_in_backward",
    ),
    # Called by the launcher.
    _uses(_UTILS, "make_optimizer_and_shard", "model device world_size"),
    _uses(_UTILS, "Topology", "compute_device"),
    _uses(_UTILS, "make_train_test_dataloaders", "hstu_config embedding_table_configs"),
    _uses(_UTILS, "setup", "rank world_size master_port device"),
    _uses(_UTILS, "cleanup"),
    _uses(_UTILS, "train_loop", f"{_LOOP} dataloader optimizer"),
    _uses(_UTILS, "eval_loop", f"{_LOOP} dataloader"),
    _uses(_UTILS, "train_eval_loop", f"{_LOOP} train_dataloader eval_dataloader optimizer"),
    _uses(
        _UTILS,
        "streaming_train_eval_loop",
        f"{_LOOP} optimizer hstu_config embedding_table_configs",
    ),
    _uses("dlrm_v3.utils", "MetricsLogger", "multitask_configs batch_size window_size device rank"),
    _uses("dlrm_v3.checkpoint", "load_dense_state_dict", "model state_dict"),
    _uses("dlrm_v3.checkpoint", "is_sparse_key"),
    _uses("dlrm_v3.checkpoint", "load_dmp_checkpoint", "model optimizer metric_logger device"),
)

_TRAIN = "research.trainer.train"
_SEQUENTIAL = "research.modeling.sequential"
_PREPROCESSOR = "LearnablePositionalEmbeddingInputFeaturesPreprocessor"
_ENCODER = (
    "max_sequence_length max_output_length embedding_module input_preproc_module "
    "output_postproc_module activation_checkpoint verbose"
)

RESEARCH = (
    # Replaced, or set through a seam of a patched host.
    _uses(_TRAIN, "get_sequential_encoder", f"module_type interaction_module {_ENCODER}"),
    _uses(_TRAIN, "setup", "rank world_size master_port"),
    _uses(_TRAIN, "DDP"),
    # Called.
    _uses(
        _TRAIN,
        "train_fn",
        "rank world_size master_port learning_rate weight_decay num_warmup_steps",
    ),
    _uses(f"{_SEQUENTIAL}.encoder_utils", "get_sequential_encoder"),
    _uses(f"{_SEQUENTIAL}.encoder_utils", "hstu_encoder", f"similarity_module {_ENCODER}"),
    _uses(f"{_SEQUENTIAL}.encoder_utils", "sasrec_encoder", f"similarity_module {_ENCODER}"),
    _uses(
        f"{_SEQUENTIAL}.input_features_preprocessors",
        _PREPROCESSOR,
        "max_sequence_len embedding_dim dropout_rate",
    ),
    _uses(
        f"{_SEQUENTIAL}.input_features_preprocessors",
        f"{_PREPROCESSOR}.forward",
        "past_lengths past_ids past_embeddings past_payloads",
    ),
    _uses(f"{_SEQUENTIAL}.input_features_preprocessors", f"{_PREPROCESSOR}.debug_str"),
    _uses(
        "research.data.reco_dataset",
        "get_reco_dataset",
        "dataset_name max_sequence_length chronological",
    ),
)

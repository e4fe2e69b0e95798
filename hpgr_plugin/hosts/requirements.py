"""The names of the host that each adapter uses, and the parameters it passes to them by name.

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


def _table(text: str) -> tuple[Requirement, ...]:
    """Parse lines of "module: name parameters"; a line without a colon continues the last one."""
    found: list[Requirement] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        module, colon, rest = line.rpartition(": ")
        if colon:
            name, *parameters = rest.split()
            found.append(Requirement(f"{HOST_PACKAGE}.{module}", name, tuple(parameters)))
        else:
            found[-1] = found[-1]._replace(parameters=(*found[-1].parameters, *line.split()))
    return tuple(found)


DLRM_V3 = _table("""
    common: HammerModule is_inference
    common: HammerModule.set_hammer_kernel hammer_kernel
    common: HammerKernel
    modules.dlrm_hstu: DlrmHSTU hstu_configs embedding_tables is_inference is_dense bf16_training
    modules.dlrm_hstu: DlrmHSTU.preprocess uih_features candidates_features
    modules.dlrm_hstu: DlrmHSTU.main_forward
        seq_embeddings payload_features max_uih_len uih_seq_lengths max_num_candidates
        num_candidates
    modules.dlrm_hstu: SequenceEmbedding
    modules.dlrm_hstu: STULayer config is_inference
    modules.dlrm_hstu: HSTUPositionalEncoder embedding_dim contextual_seq_len is_inference
    modules.dlrm_hstu: HSTUTransducer stu_module input_preprocessor positional_encoder is_inference
    modules.preprocessors: InputPreprocessor is_inference
    modules.preprocessors: InputPreprocessor.forward
        max_uih_len max_targets total_uih_len total_targets seq_lengths seq_timestamps
        seq_embeddings num_targets seq_payloads
    modules.preprocessors: InputPreprocessor.interleave_targets
    modules.hstu_transducer: HSTUTransducer
    modules.hstu_transducer: HSTUTransducer._hstu_compute
        max_seq_len seq_lengths seq_offsets seq_timestamps seq_embeddings num_targets
    modules.hstu_transducer: HSTUTransducer._postprocess
        seq_embeddings seq_timestamps seq_payloads
    modules.positional_encoder: HSTUPositionalEncoder
    modules.positional_encoder: HSTUPositionalEncoder.forward
        max_seq_len seq_lengths seq_offsets seq_timestamps seq_embeddings num_targets
    modules.stu: STULayer config is_inference
    modules.stu: STUStack
    modules.stu: STULayer.forward
        x x_lengths x_offsets max_seq_len num_targets max_kv_caching_len kv_caching_lengths
    modules.stu: STULayer.cached_forward
        delta_x num_targets max_kv_caching_len kv_caching_lengths
    modules.stu: STULayer.update_kv_cache
        max_seq_len seq_offsets k v max_kv_caching_len kv_caching_lengths
    modules.stu: STULayer.construct_full_kv delta_k delta_v
    ops.hstu_attention: hstu_mha
        max_seq_len alpha q k v seq_offsets causal dropout_pr training num_targets max_attn_len
        contextual_seq_len sort_by_length kernel
    ops.hstu_compute: hstu_compute_uqvk
        x norm_weight norm_bias norm_eps num_heads kernel attn_dim hidden_dim uvqk_weight uvqk_bias
    ops.hstu_compute: hstu_compute_output
        x norm_weight norm_bias norm_eps num_heads kernel attn u dropout_ratio output_weight
        group_norm linear_dim training recompute_y_in_backward
    dlrm_v3.train.utils: make_model dataset
    dlrm_v3.train.utils: DlrmHSTU
    dlrm_v3.train.utils: KeyedOptimizerWrapper params optim_factory
    dlrm_v3.train.utils: apply_optimizer_in_backward
    dlrm_v3.train.utils: DistributedModelParallel module device plan
    dlrm_v3.train.utils: make_optimizer_and_shard model device world_size
    dlrm_v3.train.utils: Topology compute_device
    dlrm_v3.train.utils: make_train_test_dataloaders hstu_config embedding_table_configs
    dlrm_v3.train.utils: setup rank world_size master_port device
    dlrm_v3.train.utils: cleanup
    dlrm_v3.train.utils: train_loop rank model metric_logger device dataloader optimizer
    dlrm_v3.train.utils: eval_loop rank model metric_logger device dataloader
    dlrm_v3.train.utils: train_eval_loop
        rank model metric_logger device train_dataloader eval_dataloader optimizer
    dlrm_v3.train.utils: streaming_train_eval_loop
        rank model metric_logger device optimizer hstu_config embedding_table_configs
    dlrm_v3.inference.inference_modules: DlrmHSTU
    dlrm_v3.inference.inference_modules: get_hstu_model hstu_config table_config is_dense
    dlrm_v3.inference.model_family: ModelFamilyDenseDist hstu_config table_config
    dlrm_v3.inference.model_family: ModelFamilyDenseDist.distributed_setup
        rank world_size model_path
    dlrm_v3.utils: MetricsLogger multitask_configs batch_size window_size device rank
    dlrm_v3.utils: MetricsLogger.compute_and_log mode additional_logs
    dlrm_v3.checkpoint: load_dmp_checkpoint model optimizer metric_logger device
    dlrm_v3.checkpoint: load_dense_state_dict model state_dict
    dlrm_v3.checkpoint: is_sparse_key
""")

RESEARCH = _table(
    """
    research.trainer.train: train_fn
        rank world_size master_port learning_rate weight_decay num_warmup_steps
    research.trainer.train: setup rank world_size master_port
    research.trainer.train: DDP
    research.trainer.train: get_sequential_encoder
        module_type interaction_module max_sequence_length max_output_length embedding_module
        input_preproc_module output_postproc_module activation_checkpoint verbose
    research.modeling.sequential.encoder_utils: get_sequential_encoder
    research.modeling.sequential.encoder_utils: hstu_encoder similarity_module input_preproc_module
    research.modeling.sequential.encoder_utils: sasrec_encoder
        similarity_module input_preproc_module
    research.modeling.sequential.input_features_preprocessors: PREPROCESSOR
        max_sequence_len embedding_dim dropout_rate
    research.modeling.sequential.input_features_preprocessors: PREPROCESSOR.forward
        past_lengths past_ids past_embeddings past_payloads
    research.modeling.sequential.input_features_preprocessors: PREPROCESSOR.debug_str
    research.data.reco_dataset: get_reco_dataset dataset_name max_sequence_length chronological
""".replace("PREPROCESSOR", "LearnablePositionalEmbeddingInputFeaturesPreprocessor")
)

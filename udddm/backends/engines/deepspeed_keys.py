"""The keys of DeepSpeed's configuration. DeepSpeed ignores unknown keys at the top level of its file.

Found by reading the source of DeepSpeed 0.19.8. Sections that are not listed here are checked by DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

_TOP = """
activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
datastates_ckpt disable_allgather disable_python_gc dump_state dynamic_batching eigenvalue elasticity expert_parallel
flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
hybrid_engine log_level managed_gradient_accumulation memory_breakdown model_info nebula optimizer pipeline
prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
sequence_parallel_size sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
use_node_local_storage vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer zero_optimization
"""
_ZERO = """
allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear model_persistence_threshold
module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size
reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
"""
KNOWN = {
    "": _TOP,
    "zero_optimization": _ZERO,
    "zero_optimization.offload_optimizer": "device nvme_path buffer_count pin_memory pipeline_read pipeline_write "
    "fast_init ratio super_offload cpuadam_cores_perc",
    "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "optimizer": "type params legacy_fusion",
    "optimizer.params": "lr betas eps weight_decay bias_correction adam_w_mode torch_adam amsgrad",
    "activation_checkpointing": "partition_activations number_checkpoints contiguous_memory_optimization "
    "synchronize_checkpoint_boundary cpu_checkpointing profile",
}
"""The keys of every section, by the dotted name of the section."""


def unknown(found: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yields one line per key unknown to DeepSpeed, with the known key that is closest to it, if any."""
    known = KNOWN[section].split()
    for key, value in found.items():
        name = f"{section}.{key}" if section else key
        if key in known or (not section and key.startswith("_")):  # _comment and the like: JSON has no comments
            if isinstance(value, Mapping) and name in KNOWN:
                yield from unknown(value, name)
            continue
        match = difflib.get_close_matches(key, known, 1, 0.6)
        suggestion = f"did you mean {match[0]}?" if match else "remove it"
        yield f"{name}: DeepSpeed has no such key; {suggestion}"

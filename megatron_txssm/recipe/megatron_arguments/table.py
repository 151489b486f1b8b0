"""Every argument of Megatron 0.19.2, and what a recipe's `megatron:` section may do with it.

An argument is one of: a recipe's field (declared in schema.py), fixed for every recipe (schema.FIXED_ARGUMENTS), passed
on (PASSES), or refused for a reason (REFUSED). Names are those of Megatron's namespace. A test compares all four with
Megatron's parser, so that it fails after an upgrade until new arguments are added here; docs/megatron-arguments.md is
generated from these tables (`tools/document_megatron_arguments.py`).

Notation of values: a bare name is a switch, off by default; `off` is a switch that is on by default. Others: int,
float, text, path, each with + for a list, and a|b|c for one of these words.
"""

GPUS_ONLY = "GPUs only (parsed by the tests, not run)"

# Subject -> arguments. None of them changes what a model computes.
PASSES: dict[str, str] = {
    "communication between processes": """
        overlap_grad_reduce overlap_param_gather align_grad_reduce:off align_param_gather:off ddp_num_buckets:int
        ddp_bucket_size:int ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation
        grad_reduce_in_bf16 accumulate_allreduce_grads_in_fp32 use_tp_pp_dp_mapping overlap_p2p_comm_warmup_flush
        microbatch_group_size_per_vp_stage:int use_gloo_process_groups:off distributed_timeout_minutes:int
        distributed_timeout_seconds_after_init:int
    """,
    "layers of each pipeline stage": """
        decoder_first_pipeline_num_layers:int decoder_last_pipeline_num_layers:int pipeline_model_parallel_layout:text
    """,
    "memory, kernels and precision": """
        recompute_modules:core_attn|mlp|moe|shared_experts+ distribute_saved_activations empty_unused_memory_level:0|1|2
        mlp_chunks_for_training:int bias_swiglu_fusion:off bias_dropout_fusion:off gradient_accumulation_fusion:off
        cross_entropy_loss_fusion cross_entropy_fusion_impl:native|te clone_scatter_output_in_embedding:off
        disable_jit_fuser disable_bf16_reduced_precision_matmul deterministic_mode fp8_margin:int
        fp8_amax_history_len:int fp8_amax_compute_algo:most_recent|max
    """,
    "learning rate and weight decay": """
        lr_decay_iters:int lr_warmup_init:float start_weight_decay:float end_weight_decay:float
        weight_decay_incr_style:constant|linear|cosine
    """,
    "when a run stops, skips or validates": """
        exit_interval:int exit_duration_in_mins:int exit_signal_handler_for_dataloader
        skip_train start_eval_at_iter:int eval_global_batch_size:int eval_micro_batch_size:int
    """,
    "checks while training": """
        check_for_nan_in_loss_and_grad:off check_for_large_grads check_for_spiky_loss
        rerun_mode:disabled|validate_results|report_stats
        check_weight_hash_across_dp_replicas_interval:int
    """,
    "data and tokenizer": """
        mock_data num_workers:int num_dataset_builder_threads:int mmap_bin_files:off mid_level_dataset_surplus:float
        null_tokenizer_eod_id:int trust_remote_code
    """,
    "checkpoints": """
        async_save async_strategy:nvrx|mcore async_ckpt_cpu_priority:int
        async_ckpt_io_priority:int async_ckpt_use_cpu_shm dist_ckpt_workers:int ckpt_fully_parallel_save:off
        ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo:broadcast|gather_rounds|gather_object
        ckpt_fully_parallel_save_process_group:dp|ep_dp ckpt_fully_parallel_load_process_group:dp|ep_dp
        ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity:off
        dist_ckpt_strictness:assume_ok_unexpected|log_unexpected|log_all|raise_unexpected|raise_all|return_unexpected|return_all|ignore_all
        distrib_optim_fully_reshardable_mem_efficient no_save_optim no_save_rng no_load_optim no_load_rng ckpt_step:int
        exit_on_missing_checkpoint non_persistent_save_interval:int non_persistent_ckpt_type:global|local|in_memory
        non_persistent_global_ckpt_dir:path non_persistent_local_ckpt_dir:path
        non_persistent_local_ckpt_algo:fully_parallel|atomic
    """,
    "reports": """
        log_params_norm log_throughput log_progress log_num_zeros_in_grad log_memory_interval:int
        timing_log_level:0|1|2 timing_log_option:max|minmax|all logging_level:int barrier_with_L1_time:off
        tensorboard_log_interval:int tensorboard_queue_size:int log_timers_to_tensorboard
        log_loss_scale_to_tensorboard:off log_validation_ppl_to_tensorboard log_memory_to_tensorboard
        log_world_size_to_tensorboard wandb_entity:text moe_per_layer_logging
    """,
    "garbage collection and profiling": """
        manual_gc manual_gc_interval:int manual_gc_eval:off profile profile_step_start:int profile_step_end:int
        profile_ranks:int+ use_pytorch_profiler pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack
        nvtx_ranges train_sync_interval:int
    """,
    GPUS_ONLY: """
        tp_comm_overlap tp_comm_overlap_cfg:path tp_comm_bootstrap_backend:nccl|mpi|gloo tp_comm_bulk_wgrad:off
        tp_comm_bulk_dgrad:off tp_comm_overlap_ag:off tp_comm_overlap_rs:off tp_comm_overlap_rs_dgrad
        tp_comm_split_ag:off tp_comm_split_rs:off cp_comm_type:text+ pipeline_model_parallel_comm_backend:nccl|ucc
        nccl_ub disable_symmetric_registration use_sharp sharp_enabled_group:dp|dp_replica
        nccl_communicator_config_path:path high_priority_stream_groups:text+ flight_recorder_dump_path:path
        flight_recorder_trace_buffer_size:int flight_recorder_dump_on_timeout:off flight_recorder_include_stack_trace
        flight_recorder_include_only_active:off flight_recorder_extra_dump_on_exec:off
        attention_backend:flash|fused|unfused|local|auto flash_attention_version:2|3|4 fp8_param_gather
        reuse_grad_buf_for_mxfp8_param_ag use_precision_aware_optimizer main_grads_dtype:fp32|bf16
        main_params_dtype:fp32|fp16 exp_avg_dtype:fp32|fp16|bf16|fp8 exp_avg_sq_dtype:fp32|fp16|bf16|fp8
        optimizer_cpu_offload optimizer_offload_fraction:float use_torch_optimizer_for_cpu_offload
        overlap_cpu_optimizer_d2h_h2d pin_cpu_grads:off pin_cpu_params:off gpu_sniff_test_interval:int
        log_device_memory_used log_energy use_persistent_ckpt_worker ddp_average_in_collective log_straggler
        straggler_ctrlr_port:int straggler_minmax_count:int disable_straggler_on_startup record_memory_history
        memory_snapshot_path:path cuda_graph_impl:none|full_iteration cuda_graph_warmup_steps:int moe_permute_fusion
        moe_router_fusion moe_shared_expert_overlap
    """,
}

# Reason -> arguments; a final * matches any ending.
REFUSED: dict[str, str] = {
    "it bypasses the recipe: it replaces arguments, data or code that the recipe states": """
        yaml_cfg use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args
        data_args_path per_split_data_args_path test_data_path te_precision_config_file dump_param_to_param_group_map
        fp8_quantizer_factory local_rank distributed_backend
    """,
    "Unified RoPE rotates every channel of Q, K, C and B, each vector's two halves as pairs": """
        rotary_percent rotary_interleaved mrope_section yarn_* mscale mscale_all_dim
    """,
    "it would change what the model computes, and its layers, sizes, FLOPs and conversion do not support it": """
        layernorm_zero_centered_gamma apply_residual_connection_post_layernorm fp32_residual_connection add_qkv_bias
        glu_linear_offset activation_func_clamp_value qk_* attention_output_gate softmax_type window_size
        window_attn_skip_freq multi_latent_attention experimental_attention_variant dsa_* linear_*
        mup_width_mult mup_embedding_mult mup_output_mult
        openai_gelu squared_relu quick_geglu onnx_safe relative_attention_* apply_query_key_layer_scaling q_lora_rank
        kv_lora_rank v_head_dim cache_mla_latents mla_down_proj_fusion heterogeneous_layers_config_* mtp_detach_heads
        mtp_standalone mtp_use_repeated_layer
        mamba_training_ssm_states_dtype fp8_output_proj tokenizer_hf_* apply_wd_to_qk_layernorm
    """,
    "it would change what experts compute, or which experts compute a token": """
        moe_shared_expert_gate moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size moe_router_num_groups
        moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
        moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_router_force_*
        moe_z_loss_coeff moe_input_jitter_eps moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_pad_*
        moe_token_drop_policy moe_apply_probs_on_input moe_latent_size moe_enable_routing_replay moe_use_upcycling
        moe_upcycling_granularity
    """,
    "model.layer_pattern says which layers are experts (E)": "moe_layer_freq",
    "every recipe with experts balances their load by aux_loss": "moe_router_load_balancing_type",
    "every recipe with experts sends their tokens by alltoall, which drops none": "moe_token_dispatcher_type",
    "every recipe with experts routes in fp32": "moe_router_dtype",
    "experts are one grouped GEMM with transformer_impl: transformer_engine, and one GEMM each with local": """
        moe_grouped_gemm
    """,
    "experts are computed again by parallel.recompute: selective with megatron.recompute_modules: [moe]": """
        moe_layer_recompute
    """,
    "it was not tried with the experts of these models, which get their tokens by all-to-all": """
        moe_enable_deepep moe_deepep_* moe_flex_* moe_hybridep_* moe_ncclep_* moe_permute_fusion_into_hybridep
        moe_paged_stash* moe_single_grouped_* moe_router_padding_* moe_routing_trace_* expert_tensor_parallel_*
        overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad
        ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream use_grouped_gemm_for_* delay_wgrad_compute
        save_tokens_per_expert_interval
    """,
    "FP4 is not supported; training.fp8 is the smallest format": "fp4 fp4_recipe fp4_quantizer_factory",
    "initial weights depend on the seed and their names, not on the layout (model.init_method_std)": """
        perform_initialization use_cpu_initialization init_model_with_meta_device data_parallel_random_init
        init_method_xavier_uniform embedding_init_method_std
    """,
    "all steps have one batch size, which determines each step's data; state training.global_batch_tokens": """
        rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed phase_transition_iterations
        dataloader_type hybrid_context_parallel max_seqlen_per_dp_cp_rank hierarchical_context_parallel_sizes
    """,
    "the schedule counts steps: set optimizer.warmup_fraction, or lr_decay_iters here": """
        lr_decay_samples lr_wsd_decay_samples warmup
    """,
    "optimizer.name is adam or muon, and there is one learning rate for all weights": """
        sgd_momentum muon_scalar_optimizer lion_* no_weight_decay_cond_type decoupled_lr decoupled_min_lr
        freeze_all_layers optimizer_cuda_graph
    """,
    "each component of a packed projection (Q, K, V; z, x, B, C, dt) is a matrix of its own": "muon_split_qkv",
    "it only affects fp16; a recipe trains in bf16 or fp32": """
        loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis fp16_lm_cross_entropy
    """,
    "weights are only sharded by tensor, pipeline and data parallelism (parallel.use_distributed_optimizer)": """
        use_megatron_fsdp use_torch_fsdp2 megatron_fsdp_* fsdp_* torch_fsdp2_* data_parallel_sharding_strategy
        outer_dp_sharding_strategy create_all_gather_group gradient_reduce_div_fusion suggested_communication_unit_size
        keep_fp8_transpose_cache enable_full_sharding_in_hsdp strict_fsdp_dtensor_load use_layer_wise_param_layout
        tensor_parallel_num_weight_shards
    """,
    "it is not yet known to preserve the state-space layers' results": """
        enable_cuda_graph external_cuda_graph cuda_graph_modules cuda_graph_scope_deprecated te_rng_tracker
        cpu_offloading_* fine_grained_* offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks activation_offload_fraction defer_embedding_wgrad_compute
        wgrad_deferral_limit fused_residual_rmsnorm use_transformer_engine_op_fuser use_te_activation_func
        use_kitchen_attention kitchen_attention_backend batch_invariant_mode fp8_wgrad fp4_param_gather
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split use_ring_exchange_p2p lazy_mpu_init
        ddp_param_name_patterns_for_fp32_local_accumulation fake_process_group config_logger_dir enable_experimental
        num_distributed_optimizer_instances
    """,
    "it has no effect here: this model or its data work in another way": """
        masked_softmax_fusion bias_gelu_fusion apply_rope_fusion use_fused_weighted_squared_relu use_flash_attn
        attention_softmax_in_fp32 no_persist_layer_norm fp8_interval use_mamba_mem_eff_path is_hybrid_model
        encoder_num_layers decoder_num_layers bert_binary_head create_attention_mask_in_dataloader
        allow_ambiguous_pad_tokens null_tokenizer_pad_id per_dataset_sequences_path dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap object_storage_cache_path encoder_seq_length decoder_seq_length sample_rate
        mask_prob short_seq_prob exit_signal_handler_for_training log_max_attention_logit test_mode
        deprecated_use_mcore_models use_dist_ckpt_deprecated dist_ckpt_format_deprecated
        ckpt_fully_parallel_save_deprecated disable_msc_deprecated adlr_autoresume adlr_autoresume_interval
    """,
    "a run saves torch_dist and resumes from its own newest; set checkpoint.load_from to start from another": """
        finetune override_ckpt_iteration overlap_param_gather_with_optimizer_step load_main_params_from_ckpt
        auto_detect_ckpt_format ckpt_convert_* dist_ckpt_save_pre_mcore_014 stream_ckpt_dequant replication
        replication_jump replication_factor verify_integrity save_params_interval save_activations_interval
        save_wgrads_interval save_dgrads_interval
    """,
    "the tokenizer is the corpus's, or data.tokenizer_type and data.tokenizer_model": """
        vocab_file merge_file vocab_extra_ids metadata_path special_tokens tiktoken_* tokenizer_sentencepiece_*
        chat_template
    """,
    "a run saves and stops on SIGTERM": "exit_signal",
    "`txssm submit` restarts runs; Megatron's own ways need its authors' services": """
        inprocess_* enable_ft_package calc_ft_timeouts ft_num_warmup_iters enable_one_logger one_logger_* app_tag_run_*
        run_workload_inspector_server enable_msc error_injection_* fault_injector_* pytorch_profiler_collect_chakra
        record_shapes
    """,
    "it concerns training other than pretraining on text": """
        rl_* grpo_* langrl_env_config perform_rl_step refit_method sft sft_tokenizer_prompt_format fim_* logits_* ict_*
        biencoder_* bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path retriever_*
        block_data_path embedding_path indexer_* num_classes img_h img_w num_channels patch_dim classes_fraction
        data_per_class_fraction data_sharding head_lr_mult vision_* swin_backbone_type mask_type mask_factor
        iter_per_epoch dino_*
    """,
    "it concerns Megatron's own inference, which `txssm generate` and `txssm serve` do not use": """
        inference_* max_tokens_to_oom output_bert_embeddings bert_embedder_type use_legacy_static_engine
        decode_only_cuda_graphs enable_chunked_prefill num_speculative_tokens offset_sampling_seed_by_dp_rank
        mamba_inference_* flash_decode symmetric_ar_type nccl_all_reduce_for_prefill mlp_chunks_for_prefill
    """,
}

# Flag -> name, where the flag does not follow from the name; `not` marks flags that switch it off. `no_X` and
# `disable_X` always mean not X.
OTHER_FLAGS: dict[str, str] = {
    "overlap_p2p_communication_warmup_flush": "overlap_p2p_comm_warmup_flush",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
    "disable_gloo_process_groups": "not use_gloo_process_groups",
    "no_barrier_with_level_1_timing": "not barrier_with_L1_time",
    "use_nccl_ub": "nccl_ub",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "no_initialization": "not perform_initialization",
    "disable_mamba_mem_eff_path": "not use_mamba_mem_eff_path",
    "bert_no_binary_head": "not bert_binary_head",
    "muon_no_split_qkv": "not muon_split_qkv",
    "no_rope_fusion": "not apply_rope_fusion",
    "use_mcore_models": "deprecated_use_mcore_models",
    "use_dist_ckpt": "use_dist_ckpt_deprecated",
    "dist_ckpt_format": "dist_ckpt_format_deprecated",
    "torch_fsdp2_no_reshard_after_forward": "not torch_fsdp2_reshard_after_forward",
    "tokenizer_metadata": "metadata_path",
    "tokenizer_special_tokens": "special_tokens",
    "cuda_graph_scope": "cuda_graph_scope_deprecated",
    "use_same_sampling_seed_across_dp_ranks": "not offset_sampling_seed_by_dp_rank",
    "inference_dynamic_batching_prefix_caching": "inference_dynamic_batching_enable_prefix_caching",
    "no_one_logger": "not enable_one_logger",
    "disable_msc": "disable_msc_deprecated",
    "fp4_format": "fp4",
}

# Name in Megatron's namespace -> flag, for recipe fields and fixed arguments where the two differ.
NAMES_OF_FIELDS: dict[str, str] = {
    "layernorm_epsilon": "norm_epsilon",
    "fp8": "fp8_format",
    "add_bias_linear": "disable_bias_linear",
    "pad_vocab_size": "no_pad_vocab_size",
    "add_position_embedding": "no_position_embedding",
    "overlap_p2p_comm": "no_overlap_p2p_communication",
}

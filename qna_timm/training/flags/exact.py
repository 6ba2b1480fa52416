"""What a change of each flag of train.py means to a run that is resumed with it.

Each flag is of one class. timm's flags that are refused have no effect and are of none.
"""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


EXACT = _keys("""
    smoke dataset train_split val_split val_fraction val_seed train_num_samples val_num_samples
    input_img_mode input_key target_key
    model pretrained_cfg_overlay num_classes gp img_size in_chans input_size crop_pct mean std
    interpolation validation_batch_size channels_last grad_checkpointing fast_norm model_kwargs
    torchcompile torchcompile_mode torchscript
    amp amp_dtype model_dtype deterministic no_ddp_bb device_modules epoch_repeats
    no_aug train_crop_mode crop_padding scale ratio hflip vflip color_jitter color_jitter_prob
    grayscale_prob gaussian_blur_prob aa aug_repeats aug_splits reprob remode recount resplit mixup
    cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch
    train_interpolation drop drop_path drop_block
    loss smoothing jsd_loss bce_loss bce_sum bce_target_thresh bce_pos_weight loss_pos_weight
    poly_epsilon ga_lam span_penalty
    bn_momentum bn_eps sync_bn dist_bn split_bn
    model_ema model_ema_force_cpu model_ema_decay model_ema_warmup
    seed worker_seeding no_prefetcher val_interval save_epochs eval_metric tta max_steps
""")
"""Must stay; ``val_interval`` and ``save_epochs`` too: they decide which rows have metrics."""

OPTIMIZER = _keys("""
    opt opt_eps opt_betas momentum weight_decay clip_grad clip_mode layer_decay
    layer_decay_min_scale layer_decay_no_opt_scale opt_kwargs
""")
"""Must stay, unless ``--no-resume-opt`` asks for a fresh optimizer."""

SCHEDULE = _keys("""
    sched sched_on_updates lr lr_base lr_base_size lr_base_scale lr_noise lr_noise_pct lr_noise_std
    lr_cycle_mul lr_cycle_decay lr_cycle_limit lr_k_decay lr_decay_fn lr_stable_timescale warmup_lr
    min_lr epochs early_stop_epochs decay_milestones decay_epochs warmup_epochs warmup_prefix
    cooldown_epochs patience_epochs decay_rate
""")
"""May change: changes take effect and are logged."""

DATA_PLACE = frozenset({"data_dir", "class_map"})
"""May change where the fingerprint knows the samples by name: a node's own copy will do."""

PLAN = frozenset({"batch_size", "grad_accum_steps"})
"""Must give the saved shard plan, see `exactness.differences`."""

ASKED = frozenset({"no_resume_opt", "start_epoch"})
"""Say by themselves that the run is not to go on as it was."""

# Weights to start from are replaced by the state's.
FREE = _keys("""
    config data dataset_download dataset_trust_remote_code
    pretrained pretrained_path initial_checkpoint backbone_checkpoint head_init_scale head_init_bias
    device local_rank synchronize_step stop_epoch
    output experiment workers pin_mem use_multi_epochs_loader log_interval checkpoint_hist
    save_images log_tensorboard log_wandb wandb_project wandb_tags wandb_resume_id
    resume resume_anyway checkpoint_interval on_nonfinite strict_data dist_timeout
""")
"""May change unnoticed; ``device`` is compared as what was found, see `exactness.versions`."""

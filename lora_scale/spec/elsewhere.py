"""What other programs call our keys: one table, for the message of an unknown key and for docs/coming-from.md.

    python tests/coming_from.py > docs/coming-from.md

A test fails when that file is stale. Knows names only; no config of another program is read.
"""

from dataclasses import dataclass
from typing import Any

PEFT, HF, AXOLOTL, FACTORY, DEEPSPEED = "PEFT", "Trainer, TRL", "axolotl", "LLaMA-Factory", "DeepSpeed"
PROGRAMS = (PEFT, HF, AXOLOTL, FACTORY, DEEPSPEED)


@dataclass(frozen=True, slots=True)
class Row:
    """`ours` is "" where there is nothing to set; `how` says why, or how a value is written here."""

    ours: str
    names: dict[str, tuple[str, ...]]  # program: what it calls it
    how: str = ""


def row(ours: str, how: str = "", **names: str) -> Row:
    """Names of one program stand in one string; hf="a b"."""
    programs = {"peft": PEFT, "hf": HF, "axolotl": AXOLOTL, "factory": FACTORY, "deepspeed": DEEPSPEED}
    return Row(ours, {programs[key]: tuple(value.split()) for key, value in names.items()}, how)


BATCH = "micro batch x accumulation x GPUs: blocks per optimizer step over all ranks"
OPTIMIZER, NOT_BUILT = "AdamW is the optimizer", "not built: the base stays on the GPUs"
RESULTS = ("communication_data_type", "zero_allow_untested_optimizer", "data_types")  # others change speed only
ZERO = "0, 1, 2 or 3; not a stage of training: that is supervised"
ROWS = "a path, or a list of {path, weight}; the form of the rows is seen, not named"
TABLE = (
    row("model.path", hf="model_name_or_path model_name", peft="base_model_name_or_path",
        axolotl="base_model base_model_config", factory="model_name_or_path"),
    row("model.revision", hf="model_revision", axolotl="revision_of_model", factory="model_revision", peft="revision"),
    row("model.attention", "auto, documents, sdpa, eager or flash_attention_2", hf="attn_implementation",
        axolotl="flash_attention sdp_attention eager_attention", factory="flash_attn"),
    row("", "the tokenizer is the model folder's",
        axolotl="tokenizer_type tokenizer_config model_type type_of_model is_llama_derived_model "
        "tokenizer_use_fast special_tokens tokens", hf="use_fast_tokenizer tokenizer_name tokenizer_name_or_path",
        factory="use_fast_tokenizer"),
    row("", "the base is read as it is, in bf16, fp16 or fp32", axolotl="load_in_8bit load_in_4bit strict gptq",
        hf="load_in_8bit load_in_4bit use_bnb_nested_quant bnb_4bit_quant_type",
        factory="quantization_bit quantization_method"),
    row("method", "lora, the default, or full", axolotl="adapter", factory="finetuning_type", hf="use_peft"),
    row("lora.r", peft="r", axolotl="lora_r", factory="lora_rank", hf="lora_r rank"),
    row("lora.lora_alpha", peft="lora_alpha alpha", axolotl="lora_alpha", factory="lora_alpha", hf="lora_alpha"),
    row("lora.dropout", peft="lora_dropout", axolotl="lora_dropout", factory="lora_dropout", hf="lora_dropout"),
    row("lora.target_modules", "a list: [q, v], [all-linear], or names as in the model", peft="target_modules",
        axolotl="lora_target_modules lora_target_linear", factory="lora_target", hf="lora_target_modules"),
    row("lora.use_rslora", peft="use_rslora", axolotl="peft_use_rslora", factory="use_rslora", hf="use_rslora"),
    row("lora.init_A", peft="init_lora_weights", axolotl="peft_init_lora_weights"),
    row("lora.pissa", "full, or a number of iterations", factory="pissa_init pissa_iter pissa_convert"),
    row("", "the folder says it: a causal model, or a classifier", peft="task_type peft_type inference_mode",
        hf="lora_task_type"),
    row("lora.bias", "none, lora_only or all", peft="bias"),
    row("", "the factors have no biases of their own", hf="lora_bias"),
    row("lora.modules_to_save", peft="modules_to_save", axolotl="lora_modules_to_save", factory="additional_target",
        hf="lora_modules_to_save"),
    row("lora.trainable_token_indices", "a list of ids", peft="trainable_token_indices"),
    row("lora.use_dora", peft="use_dora", axolotl="peft_use_dora", factory="use_dora", hf="use_dora"),
    row("", "seen from the model; layers chosen by number are regular expressions of target_modules",
        peft="layers_to_transform layers_pattern fan_in_fan_out",
        axolotl="lora_fan_in_fan_out lora_mlp_kernel lora_qkv_kernel lora_o_kernel"),
    row("data.train", ROWS, hf="dataset_name train_file dataset dataset_train_split", axolotl="datasets",
        factory="dataset dataset_dir"),
    row("data.validation", "a path, or a fraction: 0.02", hf="validation_file dataset_test_split",
        axolotl="val_set_size test_datasets", factory="val_size eval_dataset"),
    row("data.fields", "our name first: {prompt: question}", hf="dataset_text_field formatting_func",
        axolotl="field_messages field_instruction message_property_mappings"),
    row("data.seq_len", hf="max_seq_length max_length", axolotl="sequence_len", factory="cutoff_len"),
    row("data.packing", hf="packing",
        axolotl="sample_packing eval_sample_packing pad_to_sequence_len multipack_real_batches",
        factory="packing neat_packing"),
    row("data.train_on", "completion, last, assistant or all", hf="completion_only_loss assistant_only_loss",
        axolotl="train_on_inputs train_on_eos roles_to_train", factory="train_on_prompt mask_history"),
    row("data.chat_template", "null takes the model's own", hf="chat_template_path", axolotl="chat_template_jinja",
        factory="template"),
    row("data.max_rows", factory="max_samples", hf="max_train_samples"),
    row("data.cache", axolotl="dataset_prepared_path", factory="tokenized_path", hf="dataset_cache_dir"),
    row("", "rows are tokenised once, by `lora-scale prepare` or the first rank",
        factory="preprocessing_num_workers dataloader_num_workers overwrite_cache streaming",
        hf="dataset_num_proc dataloader_num_workers remove_unused_columns group_by_length "
        "dataloader_pin_memory", axolotl="dataset_processes shuffle_merged_datasets group_by_length"),
    row("run_dir", hf="output_dir", axolotl="output_dir",
        factory="output_dir"),
    row("run_dir", "logs lie in it", hf="logging_dir"),
    row("resume", "auto is the default: the same command goes on", hf="resume_from_checkpoint",
        axolotl="resume_from_checkpoint auto_resume_from_checkpoints", factory="resume_from_checkpoint"),
    row("resume", "never refuses a run_dir with checkpoints", hf="overwrite_output_dir",
        factory="overwrite_output_dir"),
    row("precision", "bf16 or fp32", hf="bf16 fp16 torch_dtype dtype", axolotl="bf16 fp16 tf32 float16 bfloat16",
        factory="bf16 fp16 pure_bf16", deepspeed="bf16 fp16"),
    row("recompute", "all, none or a number of layers", hf="gradient_checkpointing gradient_checkpointing_kwargs",
        axolotl="gradient_checkpointing gradient_checkpointing_kwargs",
        factory="gradient_checkpointing disable_gradient_checkpointing", deepspeed="activation_checkpointing"),
    row("activation_offloading", "none, all, auto or a number of layers", hf="activation_offloading",
        axolotl="activation_offloading"),
    row("train.epochs", hf="num_train_epochs", axolotl="num_epochs", factory="num_train_epochs"),
    row("train.max_steps", hf="max_steps total_steps steps num_steps", axolotl="max_steps", factory="max_steps"),
    row("train.global_batch_size", BATCH, hf="gradient_accumulation_steps batch_size",
        axolotl="gradient_accumulation_steps batch_size", factory="gradient_accumulation_steps",
        deepspeed="gradient_accumulation_steps train_batch_size"),
    row("train.micro_batch_size", hf="per_device_train_batch_size", axolotl="micro_batch_size",
        factory="per_device_train_batch_size", deepspeed="train_micro_batch_size_per_gpu"),
    row("train.micro_batch_size", "validation uses the same size", hf="per_device_eval_batch_size",
        axolotl="eval_batch_size", factory="per_device_eval_batch_size"),
    row("train.lr", hf="learning_rate", axolotl="learning_rate max_lr peak_lr", factory="learning_rate"),
    row("train.schedule", "cosine, linear or constant", hf="lr_scheduler_type lr_scheduler", axolotl="lr_scheduler",
        factory="lr_scheduler_type", deepspeed="scheduler"),
    row("train.warmup_steps", "a number of steps: ratio x steps", hf="warmup_ratio warmup_steps",
        axolotl="warmup_ratio warmup_steps", factory="warmup_ratio"),
    row("train.weight_decay", hf="weight_decay", axolotl="weight_decay", factory="weight_decay"),
    row("train.betas", "a list: [0.9, 0.999]", hf="adam_beta1 adam_beta2", axolotl="adam_beta1 adam_beta2",
        factory="adam_beta1 adam_beta2"),
    row("train.eps", hf="adam_epsilon", axolotl="adam_epsilon", factory="adam_epsilon"),
    row("train.max_grad_norm", hf="max_grad_norm", axolotl="max_grad_norm gradient_clipping",
        factory="max_grad_norm", deepspeed="gradient_clipping"),
    row("", OPTIMIZER, hf="optim optim_args", axolotl="optimizer optim_args", factory="optim",
        deepspeed="optimizer"),
    row("eval.every", "a number of steps; 0: at the start and the end",
        hf="eval_steps eval_strategy evaluation_strategy eval_on_start do_eval",
        axolotl="eval_steps evals_per_epoch eval_strategy evaluation_strategy eval_table_size "
        "eval_max_new_tokens", factory="eval_steps eval_strategy do_eval"),
    row("save.every", "a number of steps; 0: at the end", hf="save_steps save_strategy",
        axolotl="save_steps saves_per_epoch save_strategy", factory="save_steps save_strategy"),
    row("save.keep", hf="save_total_limit", axolotl="save_total_limit", factory="save_total_limit"),
    row("save.best", "val_loss", hf="load_best_model_at_end metric_for_best_model greater_is_better",
        axolotl="load_best_model_at_end metric_for_best_model", factory="load_best_model_at_end"),
    row("early_stop.patience", hf="early_stopping_patience", axolotl="early_stopping_patience",
        factory="early_stopping_steps"),
    row("", "an adapter is all that is saved; `lora-scale export` writes other forms",
        hf="save_safetensors save_only_model hub_model_id push_to_hub",
        axolotl="save_safetensors hub_model_id merge_lora", factory="save_only_model plot_loss"),
    row("", "every step is a row of metrics.jsonl",
        hf="logging_steps logging_strategy logging_first_step include_tokens_per_second",
        axolotl="logging_steps debug", factory="logging_steps"),
    row("track.wandb", "the project; or track.tensorboard: true", hf="report_to",
        axolotl="wandb_project use_tensorboard wandb_mode wandb_watch", factory="report_to"),
    row("track.name", hf="run_name", axolotl="wandb_name wandb_run_id wandb_entity wandb_log_model",
        factory="run_name"),
    row("parallel.zero_stage", ZERO, deepspeed="stage zero_optimization", hf="zero_stage fsdp fsdp_config",
        axolotl="fsdp fsdp_config fsdp_version"),
    row("parallel.timeout_minutes", "in minutes", hf="ddp_timeout", axolotl="ddp_timeout", factory="ddp_timeout"),
    row("engine.deepspeed", "for keys that have none here; most are set already",
        hf="deepspeed deepspeed_config deepspeed_config_file", axolotl="deepspeed", factory="deepspeed"),
    row("", "set from the model and the adapter; others go into engine.deepspeed",
        deepspeed="overlap_comm contiguous_gradients reduce_bucket_size allgather_bucket_size "
        "allgather_partitions reduce_scatter sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "stage3_gather_16bit_weights_on_model_save steps_per_print wall_clock_breakdown "
        "communication_data_type zero_allow_untested_optimizer data_types"),
    row("", NOT_BUILT, deepspeed="offload_param offload_optimizer aio"),
    row("", "the launcher says it: torchrun, deepspeed, or lora-scale train --ranks N",
        hf="num_processes num_machines machine_rank main_process_ip main_process_port mixed_precision "
        "distributed_type local_rank compute_environment rdzv_backend same_network use_cpu "
        "main_training_function downcast_bf16 dynamo_config", axolotl="local_rank ddp", factory="local_rank"),
    row("", "training is the only thing that `lora-scale train` does, and of this kind only",
        factory="do_train do_predict stage_of_training", hf="do_train do_predict",
        axolotl="rl"),
    row("seed", hf="data_seed", factory="data_seed", axolotl="data_seed"),
)  # fmt: skip

HEAD = """\
<!-- `python tests/coming_from.py > docs/coming-from.md` wrote this from lora_scale/spec/elsewhere.py: change that. -->

# Coming from another program

A key of another program is an error that names ours; so a config of yours can be given as it is, and the errors are the
list of what to change. `lora-scale config --show run.yaml` then prints every value and where it came from. The
differences that matter more than names:

- `data.seq_len` counts tokens of a block, which holds several documents (`data.packing`); batch sizes count blocks.
- `train.global_batch_size` is the whole batch of an optimizer step. It does not change with the number of GPUs, and
  neither do the results.
- No DeepSpeed or FSDP config is needed; `engine.deepspeed` is for single keys.
- The loss of a step is the mean over all its trained tokens, over all ranks and passes, not a mean of means.
- `target_modules` are `[q, v]` unless set; axolotl's and LLaMA-Factory's examples take all linear layers:
  `lora.target_modules: [all-linear]`.

The same run three times, as written for another program, what is said, and what to write: [axolotl](#from-axolotl),
[LLaMA-Factory](#from-llama-factory), [PEFT and accelerate](#from-peft-and-accelerate).

"""


def found(leaf: str) -> list[Row]:
    """Rows in which some program's key has this name."""
    return [row for row in TABLE if any(leaf in names for names in row.names.values())]


def refused(tree: dict[str, Any], where: str = "") -> list[str]:
    """Why keys of DeepSpeed cannot be passed through: those that this config owns, and those that would not work."""
    told = []
    for name, value in tree.items():
        rows = [line for line in TABLE if name in line.names.get(DEEPSPEED, ())]
        key = f"engine.deepspeed.{where}{name}"
        if rows and rows[0].ours and rows[0].ours != "engine.deepspeed" and name != "zero_optimization":
            told.append(f"{key} is for {rows[0].ours} to say; set that")
        elif rows and not rows[0].ours and (rows[0].how in (OPTIMIZER, NOT_BUILT) or name in RESULTS):
            told.append(f"{key} cannot be set: {rows[0].how}")
        elif isinstance(value, dict):
            told += refused(value, f"{where}{name}.")
    return told


def text() -> str:
    """The first part of docs/coming-from.md: what differs, and every name."""
    lines = [f"| here | {' | '.join(PROGRAMS)} | |", "|---" * (len(PROGRAMS) + 2) + "|"]
    for line in TABLE:
        cells = [", ".join(f"`{name}`" for name in line.names.get(program, ())) for program in PROGRAMS]
        if any(cells):
            lines.append(f"| {f'`{line.ours}`' if line.ours else 'leave it out'} | {' | '.join(cells)} | {line.how} |")
    return HEAD + "\n".join(lines) + "\n"

"""What keys of a run must not say together, each as one sentence with the way out. Values by themselves are
`spec.config`'s."""

from typing import TYPE_CHECKING

from lora_scale.spec.elsewhere import refused

if TYPE_CHECKING:
    from lora_scale.spec.config import RunConfig


def check(cfg: "RunConfig") -> None:
    """ValueError for the first contradiction."""
    _check_run(cfg)
    _check_parallel(cfg)


def _check_run(cfg: "RunConfig") -> None:
    if cfg.train.epochs is None and cfg.train.max_steps is None:
        raise ValueError("train.epochs or train.max_steps must be given; for example train.epochs=1")
    if cfg.init_adapter is not None and cfg.method != "lora":
        raise ValueError(f"init_adapter is {cfg.init_adapter}, but method is {cfg.method}; leave one out")
    _check_lora(cfg)
    if cfg.activation_offloading != "none" and cfg.method != "lora":
        raise ValueError(
            f"activation_offloading is {cfg.activation_offloading} and method is {cfg.method}, whose layers keep their "
            "weights' inputs too; set activation_offloading=none, or recompute=all"
        )
    if cfg.train.loraplus_lr_ratio != 1.0 and cfg.method != "lora":
        raise ValueError(f"train.loraplus_lr_ratio is {cfg.train.loraplus_lr_ratio}, but method is {cfg.method}")
    if isinstance(cfg.data.validation, float) and not 0.0 < cfg.data.validation < 1.0:
        raise ValueError(f"data.validation is {cfg.data.validation}; a fraction lies between 0 and 1")
    if cfg.has_prefix and cfg.baseline.prefix_tokens > cfg.data.seq_len - 2:
        raise ValueError(
            f"baseline.prefix_tokens is {cfg.baseline.prefix_tokens}; data.seq_len = {cfg.data.seq_len} must "
            "leave room for at least two tokens"
        )
    if cfg.train.global_batch_size % cfg.train.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size is {cfg.train.global_batch_size}; it must be a multiple of "
            f"train.micro_batch_size = {cfg.train.micro_batch_size}"
        )
    if isinstance(cfg.engine.deepspeed, dict) and (told := refused(cfg.engine.deepspeed)):
        raise ValueError("\n".join(told))
    if cfg.eval.generate is not None:
        _check_generate(cfg)
    if cfg.data.validation is None and (cfg.save.best or cfg.early_stop.patience):
        key = "save.best" if cfg.save.best else "early_stop.patience"
        raise ValueError(f"{key} needs a validation loss; set data.validation, for example to 0.02")


def _check_generate(cfg: "RunConfig") -> None:
    if cfg.data.validation is None:
        raise ValueError("eval.generate goes with evaluations; set data.validation, for example to 0.02")
    if cfg.parallel.sequence_parallel:
        raise ValueError(
            "eval.generate is set and parallel.sequence_parallel is true: one new token cannot be shared by the ranks; "
            "leave one out"
        )
    if cfg.has_prefix:
        raise ValueError(f"eval.generate is set and method is {cfg.method}, whose prompts are not built; leave one out")


def _check_lora(cfg: "RunConfig") -> None:
    lora = cfg.lora
    if cfg.has_factors and cfg.method != "lora":
        for key in ("dropout", "bias", "modules_to_save", "use_dora", "pissa"):
            if getattr(lora, key) not in (0.0, "none", (), False, None):
                raise ValueError(
                    f"lora.{key} is {getattr(lora, key)} and method is {cfg.method}, which trains plain factors beside "
                    "its vectors; leave one out"
                )
    if lora.pissa is not None and cfg.init_adapter is not None:
        raise ValueError(
            f"lora.pissa is {lora.pissa} and init_adapter is {cfg.init_adapter}: both say where to start; leave one out"
        )
    if lora.use_dora:
        _check_dora(cfg)
    ids = lora.trainable_token_indices
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"lora.trainable_token_indices has {twice} more than once; leave the others out")
    trains_base = lora.bias != "none" or lora.modules_to_save
    if trains_base and (cfg.parallel.base_sharding == "node" or cfg.parallel.adapter_sharding == "replicate"):
        said = f"lora.bias is {lora.bias}" if lora.bias != "none" else "lora.modules_to_save is set"
        raise ValueError(
            f"{said}, which ZeRO partitions over all ranks; leave parallel.base_sharding and "
            "parallel.adapter_sharding at their defaults"
        )
    if lora.pissa is not None and lora.dropout:
        raise ValueError(
            f"lora.pissa is {lora.pissa} and lora.dropout is {lora.dropout}, which would drop principal components of "
            "the base; set lora.dropout=0"
        )


def _check_dora(cfg: "RunConfig") -> None:
    for key, value in (("pissa", cfg.lora.pissa), ("dropout", cfg.lora.dropout or None)):
        if value is not None:
            raise ValueError(f"lora.use_dora is true and lora.{key} is {value}, which do not go together here")


def _check_parallel(cfg: "RunConfig") -> None:
    parallel = cfg.parallel
    if parallel.tensor_parallel_size > 1 and cfg.method != "lora":
        raise ValueError(
            f"parallel.tensor_parallel_size is {parallel.tensor_parallel_size} and method is {cfg.method}, "
            "which is sharded by ZeRO alone; set parallel.tensor_parallel_size=1"
        )
    if parallel.tensor_parallel_size > 1 and cfg.model.dropout:
        raise ValueError(
            f"parallel.tensor_parallel_size is {parallel.tensor_parallel_size} and model.dropout is "
            f"{cfg.model.dropout}: the ranks would draw different masks; set model.dropout=0"
        )
    if parallel.sequence_parallel and parallel.tensor_parallel_size == 1:
        raise ValueError(
            "parallel.sequence_parallel is true and parallel.tensor_parallel_size is 1: there is no group to share "
            "a sequence; set one of them"
        )
    if parallel.sequence_parallel and cfg.data.seq_len % parallel.tensor_parallel_size:
        raise ValueError(
            f"data.seq_len is {cfg.data.seq_len}; with parallel.sequence_parallel it must be a multiple of "
            f"parallel.tensor_parallel_size = {parallel.tensor_parallel_size}"
        )
    if parallel.base_sharding == "node" and (cfg.method != "lora" or parallel.zero_stage != 3):
        raise ValueError(
            "parallel.base_sharding is node, which is for a frozen base under ZeRO-3 (method=lora, "
            "parallel.zero_stage=3)"
        )
    if parallel.load_from == "one_node" and parallel.base_sharding != "node":
        raise ValueError(
            "parallel.load_from is one_node, but only with parallel.base_sharding=node have nodes copies to send; set "
            "that, or parallel.load_from=every_node"
        )

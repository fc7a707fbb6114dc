"""Which runs the benchmark is made of, which gates they are judged by, and which of them make a waterfall. Data only:
a new run, gate or bar is a row here."""

from dataclasses import dataclass

from lora_scale.spec.errors import UsageError

OURS = "lora_scale"
MODELS: dict[str, tuple[str, int | None]] = {  # preset of scripts/make_checkpoint.py, decoder layers (None: all)
    "tiny": ("tiny", None),
    "llama-1b": ("1b", None),
    "llama-7.2b": ("8b", None),
    "llama-3.1-8b": ("8b-128k", None),
    "slice-22.9b": ("100b", 20),
    "slice-34.0b": ("100b", 30),
    "llama-100.7b": ("100b", None),
}  # in the order in which they are run: one checkpoint at a time is there, and the largest is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of a side. `settings` are KEY=VALUE for `lora-scale train`, or options of the peer's script.

    Both sides of a comparison have the same `blocks` of `seq_len` tokens in an optimizer step, over all GPUs.
    """

    model: str
    gpus: int
    blocks: int
    micro: int = 1  # blocks in one pass of a data-parallel rank
    seq_len: int = 4096
    peer: str | None = None  # name of a script in scripts/peers; None: ours
    settings: tuple[str, ...] = ()
    note: str = ""
    limit: float = 300.0  # seconds until it is ended, loading included

    @property
    def who(self) -> str:
        return self.peer or OURS


ZERO3, TP2 = (), ("parallel.tensor_parallel_size=2", "parallel.zero_stage=0", "parallel.sequence_parallel=true")
WHOLE = ("parallel.zero_stage=0",)  # the base is not partitioned
ALL, NONE, AUTO, FULL = "recompute=all", "recompute=none", "recompute=auto", "method=full"
PLAIN = "kernels=none"  # transformers' own modules
DEEPSPEED = "parallel.base_engine=deepspeed"  # gathers the base too
DOCUMENTED = "--ckpt=1"  # the defaults of the script: what the documentation of PEFT and DeepSpeed says
LEAF = ("--liger=1", "--leaf=1", "--prefetch=1.2e9")  # a decoder layer of this shape is 1.11e9 elements
STILL, STILL_PEER = "train.lr=1e-12", "--lr=1e-12"  # nothing is learned: losses of the checkpoint's own weights
SDPA, DOCUMENTS = "model.attention=sdpa", "model.attention=documents"
OFFLOAD = "activation_offloading=auto"
FLASH = "FlashAttention-3 where it is installed; nobody asks the GPU whether rows are packed"
LEAST = "the least recompute that should fit"  # by arithmetic, not tried yet


def _told(peer: str | None, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Ours, with torch's attention unless another is said: what the change alone brings has a row of its own."""
    return settings if peer or DOCUMENTS in settings else (*settings, SDPA)


def _on_7b(gpus: int, *settings: str, peer: str | None = None, note: str = "") -> Case:
    return Case(
        model="llama-7.2b", gpus=gpus, micro=2, blocks=2 * gpus, peer=peer, settings=_told(peer, settings), note=note
    )


def _on_8b(*settings: str, peer: str | None = None, note: str = "") -> Case:
    """A vocabulary of 128,256 words, as today's models have: what logits cost."""
    return Case(model="llama-3.1-8b", gpus=1, micro=2, blocks=2, peer=peer, settings=_told(peer, settings), note=note)


def _pair(model: str, *settings: str) -> Case:
    """One block on one GPU through ZeRO-3's engine, which full fine-tuning needs for its masters."""
    return Case(model=model, gpus=1, blocks=1, settings=_told(None, (*ZERO3, *settings)))


def _on_slice(model: str, gpus: int, *settings: str, micro: int = 1, peer: str | None = None, note: str = "") -> Case:
    settings, note = _told(peer, settings), note or (f"{micro} blocks a pass" if micro > 1 else "")
    return Case(model=model, gpus=gpus, micro=micro, blocks=micro * gpus, peer=peer, settings=settings, note=note)


def _on_100b(*settings: str, peer: str | None = None, note: str = "") -> Case:
    return Case(
        model="llama-100.7b", gpus=2, blocks=2, peer=peer, settings=_told(peer, settings), note=note, limit=480.0
    )


CASES: dict[str, Case] = {
    # point 4: one GPU
    "7b-1gpu": _on_7b(1, *WHOLE, NONE),
    "7b-1gpu-documents": _on_7b(1, *WHOLE, NONE, DOCUMENTS, note=FLASH),
    "7b-1gpu-peft": _on_7b(1, "--ckpt=0", peer="peft_single", note="PEFT alone, in a plain loop"),
    "7b-1gpu-peft-liger-compile": _on_7b(
        1, "--ckpt=0", "--liger=1", "--compile=model", peer="peft_single", note="torch.compile as PEFT documents it"
    ),
    "7b-1gpu-peft-liger-compile-layers": _on_7b(
        1, "--ckpt=0", "--liger=1", "--compile=layers", peer="peft_single", note="torch.compile layer by layer"
    ),
    "8b-1gpu-documents": _on_8b(*WHOLE, NONE, DOCUMENTS, note="the loss a chunk of tokens at a time"),
    "8b-1gpu-all": _on_8b(*WHOLE, ALL, DOCUMENTS),
    "8b-1gpu-peft-all": _on_8b(DOCUMENTED, peer="peft_single", note="as documented"),
    "8b-1gpu-peft-liger-all": _on_8b(DOCUMENTED, "--liger=1", peer="peft_single"),
    "8b-1gpu-peft-liger": _on_8b("--ckpt=0", "--liger=1", peer="peft_single"),
    # point 5: LoRA and full fine-tuning, the same job
    "1b-1gpu-lora": _pair("llama-1b", NONE),
    "1b-1gpu-full": _pair("llama-1b", NONE, FULL),
    "1b-1gpu-lora-all": _pair("llama-1b", ALL),
    "1b-1gpu-full-all": _pair("llama-1b", ALL, FULL),
    "7b-1gpu-lora": _pair("llama-7.2b", NONE),
    "7b-1gpu-full": _pair("llama-7.2b", NONE, FULL),
    "7b-1gpu-lora-all": _pair("llama-7.2b", ALL),
    "7b-1gpu-full-all": _pair("llama-7.2b", ALL, FULL),
    "7b-2gpu-lora": _on_7b(2, *ZERO3, NONE),
    "7b-2gpu-full": _on_7b(2, *ZERO3, NONE, FULL),
    "7b-2gpu-lora-all": _on_7b(2, *ZERO3, ALL),
    "7b-2gpu-full-all": _on_7b(2, *ZERO3, ALL, FULL),
    "7b-2gpu-lora-best": _on_7b(2, *WHOLE, NONE, note="the best layout that fits: the base whole on each GPU"),
    "7b-2gpu-full-best": _on_7b(2, "parallel.zero_stage=2", NONE, FULL, note="the best layout that fits: ZeRO-2"),
    # points 2 and 3: what sharding costs, and the roof
    "22b-1gpu": _on_slice("slice-22.9b", 1, *WHOLE, NONE),
    "22b-1gpu-2": _on_slice("slice-22.9b", 1, *WHOLE, NONE, micro=2),
    "22b-1gpu-documents": _on_slice("slice-22.9b", 1, *WHOLE, NONE, DOCUMENTS, note=FLASH),
    "22b-1gpu-documents-2": _on_slice("slice-22.9b", 1, *WHOLE, NONE, DOCUMENTS, micro=2),
    "22b-1gpu-documents-4": _on_slice("slice-22.9b", 1, *WHOLE, NONE, DOCUMENTS, micro=4),
    "22b-1gpu-peft-liger": _on_slice("slice-22.9b", 1, "--ckpt=0", "--liger=1", peer="peft_single"),
    "22b-1gpu-peft-liger-2": _on_slice("slice-22.9b", 1, "--ckpt=0", "--liger=1", micro=2, peer="peft_single"),
    "22b-1gpu-all": _on_slice("slice-22.9b", 1, *WHOLE, ALL),
    "22b-2gpu-zero3": _on_slice("slice-22.9b", 2, *ZERO3, NONE),
    "22b-2gpu-zero3-documents": _on_slice("slice-22.9b", 2, *ZERO3, NONE, DOCUMENTS, note=FLASH),
    "22b-2gpu-zero3-all": _on_slice("slice-22.9b", 2, *ZERO3, ALL),
    "34b-zero3-all": _on_slice("slice-34.0b", 2, *ZERO3, ALL),
    "34b-zero3": _on_slice("slice-34.0b", 2, *ZERO3, NONE),
    "34b-zero3-documents": _on_slice("slice-34.0b", 2, *ZERO3, NONE, DOCUMENTS, note=FLASH),
    "34b-tp2": _on_slice("slice-34.0b", 2, *TP2, NONE),
    "34b-peft-zero3-liger-all": _on_slice("slice-34.0b", 2, "--ckpt=1", *LEAF, peer="peft_zero3"),
    "34b-peft-zero3-liger": _on_slice("slice-34.0b", 2, "--ckpt=0", *LEAF, peer="peft_zero3"),
    # point 1
    "100b-tp2-overlap": _on_100b(*TP2, AUTO, note="tokens are exchanged behind products"),
    "100b-tp2-documents": _on_100b(*TP2, AUTO, DOCUMENTS, note=FLASH),
    "100b-zero3-documents": _on_100b(*ZERO3, AUTO, DOCUMENTS, note=FLASH),
    "100b-zero3-offload": _on_100b(*ZERO3, AUTO, DOCUMENTS, OFFLOAD, note="activations wait in host memory"),
    "100b-tp2": _on_100b(*TP2, AUTO, "parallel.overlap=false", note="waits for collectives"),
    "100b-zero3": _on_100b(*ZERO3, AUTO),
    "100b-zero3-collective": _on_100b(*ZERO3, AUTO, "parallel.base_transport=collective", note="all-gathers"),
    "100b-zero3-deepspeed": _on_100b(*ZERO3, AUTO, DEEPSPEED, note="DeepSpeed's own gathers"),
    "100b-zero3-deepspeed-plain": _on_100b(*ZERO3, AUTO, DEEPSPEED, PLAIN, note="for the waterfall"),
    "100b-tp2-plain": _on_100b(*TP2, AUTO, PLAIN, "parallel.overlap=false", note="for the waterfall"),
    "100b-tp2-all-plain": _on_100b(*TP2, ALL, PLAIN, "parallel.overlap=false", note="for the waterfall"),
    "100b-peft-zero3": _on_100b(DOCUMENTED, peer="peft_zero3", note="as documented"),
    "100b-peft-zero3-liger": _on_100b("--ckpt=1", *LEAF, peer="peft_zero3", note="Liger, leaf modules"),
    "100b-fsdp2-liger": _on_100b("--ckpt=1", "--liger=1", peer="peft_fsdp2", note="Liger"),
    "100b-peft-zero3-liger-78": _on_100b("--ckpt=1", "--ckpt-layers=78", *LEAF, peer="peft_zero3", note=LEAST),
    "100b-fsdp2-liger-66": _on_100b("--ckpt=1", "--ckpt-layers=66", "--liger=1", peer="peft_fsdp2", note=LEAST),
    # losses beside those in fp32: scripts/fp32_losses.py
    "100b-tp2-still": _on_100b(*TP2, AUTO, STILL, note="learns nothing"),
    "100b-zero3-still": _on_100b(*ZERO3, AUTO, STILL, note="learns nothing"),
    "100b-peft-zero3-still": _on_100b(DOCUMENTED, STILL_PEER, peer="peft_zero3", note="learns nothing"),
    "100b-fsdp2-liger-still": _on_100b("--ckpt=1", "--liger=1", STILL_PEER, peer="peft_fsdp2", note="learns nothing"),
}


def _tiny(gpus: int, *settings: str, peer: str | None = None) -> Case:
    return Case(model="tiny", gpus=gpus, blocks=2, micro=1, seq_len=64, peer=peer, settings=settings)


TINY: dict[str, Case] = {
    "tiny-zero3": _tiny(2, ALL),
    "tiny-tp2": _tiny(2, *TP2, NONE),
    "tiny-full": _tiny(2, ALL, FULL),
    "tiny-peft-zero3": _tiny(2, DOCUMENTED, peer="peft_zero3"),
    "tiny-peft-fsdp2": _tiny(2, "--ckpt=1", peer="peft_fsdp2"),
    "tiny-peft": Case(model="tiny", gpus=1, blocks=2, micro=2, seq_len=64, peer="peft_single", settings=("--ckpt=0",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`figure` of the case `ours`, alone or divided by the best (the largest) of `peers`, beside a goal."""

    figure: str  # of a row of the record
    goal: float | None  # None: only told
    ours: str
    peers: tuple[str, ...] = ()
    at_least: bool = True  # False: at most


@dataclass(frozen=True, slots=True)
class Gate:
    """A claim of the issue. It is met where all conditions of one of the `ways` are."""

    point: int
    says: str
    ways: tuple[tuple[Condition, ...], ...]


def _ratio(point: int, says: str, goal: float | None, ours: str, *peers: str) -> Gate:
    return Gate(point, says, ((Condition(figure="tokens_per_second", goal=goal, ours=ours, peers=peers),),))


def _over(point: int, says: str, figure: str, goal: float, ours: str, at_least: bool = True) -> Gate:
    return Gate(point, says, ((Condition(figure=figure, goal=goal, ours=ours, at_least=at_least),),))


_LISTED = (  # each with the least recompute that fits
    "100b-peft-zero3",
    "100b-peft-zero3-liger",
    "100b-fsdp2-liger",
    "100b-peft-zero3-liger-78",
    "100b-fsdp2-liger-66",
)
_COMPILED = ("7b-1gpu-peft-liger-compile", "7b-1gpu-peft-liger-compile-layers")


def _cost_of_sharding(whole: str, sharded: str, how: str) -> Gate:
    slower = Condition(figure="step_seconds", goal=1.05, ours=sharded, peers=(whole,), at_least=False)
    return Gate(2, f"step time of two GPUs under ZeRO-3 over one GPU unsharded, slice-22.9b, {how}", ((slower,),))


def _speed_or_memory(speed: float, memory: float) -> tuple[Condition, ...]:
    ours = "7b-1gpu-documents"
    return (
        Condition(figure="tokens_per_second", goal=speed, ours=ours, peers=_COMPILED),
        Condition(figure="peak_gib", goal=memory, ours=ours, peers=_COMPILED, at_least=False),
    )


GATES: tuple[Gate, ...] = (
    *(
        gate
        for ours in (
            "100b-tp2-documents",
            "100b-tp2-overlap",
            "100b-zero3-offload",
            "100b-zero3-documents",
            "100b-zero3",
        )
        for gate in (
            _ratio(1, f"{ours} over PEFT+ZeRO-3 as documented", 1.8, ours, "100b-peft-zero3"),
            _ratio(1, f"{ours} over the best listed peer", 1.4, ours, *_LISTED),
            _over(1, f"{ours}: TFLOP/s a GPU", "tflops_4n", 530.0, ours),
            _over(8, f"{ours}: reserved over peak allocated", "reserved_over_peak", 1.05, ours, at_least=False),
        )
    ),
    _cost_of_sharding("22b-1gpu-documents", "22b-2gpu-zero3-documents", "no recompute"),
    _cost_of_sharding("22b-1gpu-all", "22b-2gpu-zero3-all", "full recompute"),
    _ratio(2, "slice-34.0b, full recompute, over PEFT+ZeRO-3+Liger", 1.20, "34b-zero3-all", "34b-peft-zero3-liger-all"),
    _ratio(2, "slice-34.0b, no recompute, over PEFT+ZeRO-3+Liger", 1.18, "34b-zero3-documents", "34b-peft-zero3-liger"),
    _over(
        3, "slice-22.9b, one GPU, no recompute, 4 blocks a pass: TFLOP/s", "tflops_4n", 620.0, "22b-1gpu-documents-4"
    ),
    _ratio(3, "1 block a pass, over PEFT+Liger", None, "22b-1gpu-documents", "22b-1gpu-peft-liger"),
    _ratio(4, "llama-7.2b, one GPU, no recompute, over PEFT alone", 1.15, "7b-1gpu-documents", "7b-1gpu-peft"),
    Gate(
        4,
        "the same over PEFT+Liger+torch.compile: speed at equal memory, or equal speed at less memory",
        (_speed_or_memory(1.05, 1.0), _speed_or_memory(1.0, 0.8)),
    ),
    _ratio(5, "LoRA over full fine-tuning, llama-7.2b, one GPU, no recompute", 1.40, "7b-1gpu-lora", "7b-1gpu-full"),
    _ratio(5, "the same, full recompute", 1.27, "7b-1gpu-lora-all", "7b-1gpu-full-all"),
    _ratio(5, "LoRA over full fine-tuning, llama-1b, one GPU, no recompute", None, "1b-1gpu-lora", "1b-1gpu-full"),
    _ratio(5, "the same, full recompute", None, "1b-1gpu-lora-all", "1b-1gpu-full-all"),
    _ratio(5, "LoRA over full fine-tuning, llama-7.2b, no recompute", 1.40, "7b-2gpu-lora", "7b-2gpu-full"),
    _ratio(5, "LoRA over full fine-tuning, llama-7.2b, full recompute", 1.27, "7b-2gpu-lora-all", "7b-2gpu-full-all"),
    _ratio(5, "the same, each in the best layout that fits", None, "7b-2gpu-lora-best", "7b-2gpu-full-best"),
)

WATERFALLS: dict[str, tuple[tuple[str, str], ...]] = {  # (what changed, case, at a commit), from the peer's to ours
    "zero3": (
        ("PEFT + DeepSpeed ZeRO-3, as documented", "100b-peft-zero3"),
        ("our ZeRO-3 through DeepSpeed, recompute: auto", "100b-zero3-deepspeed-plain"),
        ("kernels, and layers that keep less", "100b-zero3-deepspeed"),
        ("a flat base, read by copy engines", "100b-zero3"),
        ("FlashAttention-3", "100b-zero3-documents"),
        ("activations wait in host memory", "100b-zero3-offload"),
    ),
    "tp2": (
        ("PEFT + DeepSpeed ZeRO-3, as documented", "100b-peft-zero3"),
        ("tensor parallelism, full recompute", "100b-tp2-all-plain"),
        ("recompute: auto", "100b-tp2-plain"),
        ("kernels, and layers that keep less", "100b-tp2"),
        ("tokens exchanged behind products", "100b-tp2-overlap"),
        ("FlashAttention-3", "100b-tp2-documents@adecfcf"),
        ("steps begun early, sums and gradients in fewer kernels", "100b-tp2-documents"),
    ),
    "tiny": (("PEFT + DeepSpeed ZeRO-3", "tiny-peft-zero3"), ("ours", "tiny-zero3"), ("tp=2", "tiny-tp2")),
}


def chosen(tiny: bool, only: tuple[str, ...]) -> dict[str, Case]:
    """The cases by name in the order in which they are run: by model, so that each checkpoint is written once."""
    known = TINY if tiny else CASES
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"--only {unknown[0]}: there is no such case; choose {', '.join(known)}")
    order = list(MODELS)
    names = sorted(only or known, key=lambda name: (order.index(known[name].model), list(known).index(name)))
    return {name: known[name] for name in names}

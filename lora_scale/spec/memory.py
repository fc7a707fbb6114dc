"""Memory of one rank, by category and by moment of a step: what lies where when memory is fullest. No torch.

Model states are exact (`spec.states`), activations are counted (`spec.activations`), the rest are formulas with their
source, and three constants are calibrated: `LIBRARIES`, `GATHERED_LAYERS`, `WASTE`. The runs they come from are
`CALIBRATED_ON`; a comparison with those proves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, prod

from lora_scale.spec import activations, output
from lora_scale.spec.activations import Layer
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.cost import FP32, ITEMSIZE, Shape, checkpoint_bytes, numel
from lora_scale.spec.kept import offloaded_layers, recomputed_layers
from lora_scale.spec.layout import FLAT_BUFFERS
from lora_scale.spec.states import Grid, States, flat_pieces, frozen_units, keeps_base_flat, trained_shapes
from lora_scale.spec.states import states as states_of

CALIBRATED_ON = (
    "llama-7.2b with LoRA, 1 and 2 H200s, with and without recompute; what is reserved also on llama-1.1b, LoRA and "
    "full, and on llama-7.2b, full under ZeRO-2 (docs/benchmarks)"
)
MIB, GIB = 1 << 20, 1 << 30
LIBRARIES = 80 * MIB  # two cuBLAS workspaces of 32 MiB on Hopper, and small things: what was left of 1-GPU peaks
GATHERED_LAYERS = 4  # three live (stage3_max_live_parameters), and one more as the flat buffer it was gathered in
WASTE = (0.7, 0.02, 2.5)  # reserved and not allocated: GiB; of the peak; of what DeepSpeed's ZeRO-3 gathers and frees
CONTEXT = int(0.5 * GIB)  # CUDA context and loaded kernels; assumed, not measured by us
NCCL = int(0.4 * GIB)  # communicators' buffers, with more than one rank; assumed, not measured by us
ADAM_GROUP = 1_000_000_000  # elements ZeRO-3 steps at once (DeepSpeed's default sub_group_size)
HOST = int(2.4 * GIB)  # peak resident memory of a rank's process, measured on 1 and 2 GPUs: code, libraries and data
PINNED = 192 * MIB  # while loading: 12 threads with two buffers of 8 MiB each (parallel.load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the data decide, and a plan must assume where they are not at hand."""

    masked: bool  # several documents in some block: attention gets a mask
    target_share: float = 1.0  # of the positions of a pass, those that logits are computed for


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Bytes in torch's allocator at one moment of a step, by category. The states' names are those of `States`."""

    base: int
    trained: int
    master: int
    gradients: int
    adam: int
    bucket: int
    gathered: int = 0  # ZeRO-3: whole parameters of the layer at work and the next ones; tokens that are exchanged
    layer_inputs: int = 0  # of the layers that recompute
    layers_kept: int = 0  # activations of the layers that do not
    outside: int = 0  # the embedding's output and the last norm
    one_layer: int = 0  # activations of the layer that was just recomputed
    workspace: int = 0  # of one layer's backward pass, or of the optimizer's step
    logits: int = 0  # logits, loss and their gradients
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One rank's memory, by moments of a step in order; beside them what torch's allocator does not see.

    loss: backward begins at the loss. backward: of the last layer that kept its activations. recompute: of the last
    layer that did not. step: the optimizer's.
    """

    moments: dict[str, Moment]
    waste: int  # reserved by the allocator and not allocated
    context: int
    nccl: int
    host: int  # resident in host memory, the largest over the run
    pinned: int
    by_analogy: bool  # activations are not counted for this family

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def allocated(self) -> int:
        """Peak of torch's allocator."""
        return self.moments[self.peak_moment].total

    @property
    def outside(self) -> int:
        """On the GPU, but not in the allocator's books."""
        return self.context + self.nccl

    @property
    def needed(self) -> int:
        """Without this much there is no run: under pressure the allocator gives back what it has reserved in vain."""
        return self.allocated + self.outside

    @property
    def likely(self) -> int:
        """What the run takes where there is room."""
        return self.needed + self.waste


@dataclass(frozen=True, slots=True)
class Parts:
    """What a plan needs of a model, made once for the many plans of a search. Depends on method, adapter and tp."""

    layers: tuple[Layer, ...]
    frozen: tuple[tuple[Shape, ...], ...]  # of one rank's shards, by unit
    trained: tuple[Shape, ...]


def parts_of(model: Architecture, cfg: RunConfig, tp: int = 1) -> Parts:
    return Parts(
        tuple(activations.layers(model, cfg)),
        tuple(map(tuple, frozen_units(model, cfg, tp))),
        tuple(trained_shapes(model, cfg, tp)),
    )


def memory(model: Architecture, cfg: RunConfig, grid: Grid, work: Work, made: Parts | None = None) -> Memory:
    """Predicted memory of the rank that holds most. `made`: the model's parts, where they were made before."""
    made = made or parts_of(model, cfg, grid.tp)
    layers = made.layers
    states = states_of(made.frozen, made.trained, cfg, grid)
    recomputed = recomputed_layers(cfg, len(layers))
    kept, again = layers[recomputed:], layers[:recomputed]
    tokens = cfg.train.micro_batch_size * cfg.data.seq_len
    each = {i: tokens * activations.kept(model, i, cfg, masked=work.masked, tp=grid.tp) for i in set(layers)}
    spaces = {i: tokens * activations.workspace(model, i, cfg, grid.tp) for i in set(layers)}
    slots = exchanged(model, cfg)
    gather = gathered(cfg, layers, made.frozen, grid) + slots
    inputs = layer_inputs(model, cfg, recomputed)
    embedding, last_norm = embedding_output(model, cfg), last_norm_input(model, cfg)
    gone = offloaded(model, cfg, layers, each, grid.tp)
    all_kept = sum(each[layer] for layer in kept) - gone
    weights = weight_gradients(cfg, layers, grid)
    before = _moment(states, gathered=gather, layer_inputs=inputs, layers_kept=all_kept, outside=embedding)
    at_loss = {"outside": embedding + last_norm, "logits": logits(model, cfg, work, grid.tp)}
    moments = {"loss": _with(before, **at_loss)}
    if kept:
        moments["backward"] = _with(before, workspace=spaces[kept[-1]] + weights)
    if again:
        one = {"one_layer": each[again[-1]], "workspace": spaces[again[-1]] + weights}
        moments["recompute"] = _with(before, layers_kept=0, **one)
    standing = gather if keeps_base_flat(cfg) else slots  # buffers of a flat base and slots are never given back
    moments["step"] = _moment(states, gathered=standing, workspace=step_workspace(states, made.trained, cfg))
    return Memory(
        moments=moments,
        waste=waste(moments, gathered_and_freed(cfg, layers, grid), cfg.parallel.zero_stage),
        context=CONTEXT,
        nccl=NCCL if grid.ranks > 1 else 0,
        host=HOST + (checkpoint_bytes(numel(made.trained) * grid.tp) if cfg.method == "lora" else 0),
        pinned=PINNED + gone,
        by_analogy=activations.is_analogy(model),
    )


def _moment(states: States, **categories: int) -> Moment:
    return Moment(**{f.name: getattr(states, f.name) for f in fields(states)}, **categories)


def _with(moment: Moment, **categories: int) -> Moment:
    return Moment(**(asdict(moment) | categories))


def offloaded(model: Architecture, cfg: RunConfig, layers: Sequence[Layer], each: Mapping[Layer, int], tp: int) -> int:
    """Activations that wait in host memory (`parallel.offload`): all but small tensors of the chosen layers. At the
    loss nothing of it is back, and later it takes the place of what layers behind it have given up."""
    away = [layers[i] for i in offloaded_layers(cfg, len(layers))]
    return sum(each[layer] - _tokens(cfg) * activations.stays(model, layer, cfg, tp) for layer in away)


def layer_inputs(model: Architecture, cfg: RunConfig, recomputed: int) -> int:
    """tokens x hidden for each layer that recomputes; whole on every tensor-parallel rank, unless these share the
    tokens."""
    shared = cfg.parallel.tensor_parallel_size if shares_tokens(cfg) else 1
    return recomputed * _tokens(cfg) * model.hidden * ITEMSIZE[cfg.precision] // shared


def shares_tokens(cfg: RunConfig) -> bool:
    """Whether each tensor-parallel rank has its own tokens between blocks."""
    return cfg.parallel.sequence_parallel and cfg.parallel.tensor_parallel_size > 1


def embedding_output(model: Architecture, cfg: RunConfig) -> int:
    """A leaf of the graph, held to its end. Where the first layer recomputes it is that layer's input and counted
    there; where nothing copies it, it is what the first one keeps."""
    width, saved = ITEMSIZE[cfg.precision], activations.saved_by(model, cfg)
    is_copied = (saved.norm == "copied" and width < FP32) or cfg.activation_offloading not in ("none", 0)
    is_own = (cfg.recompute in ("none", 0) and is_copied) or shares_tokens(cfg)
    return _tokens(cfg) * width * model.hidden if is_own else 0


def last_norm_input(model: Architecture, cfg: RunConfig) -> int:
    """What the norm after the last layer keeps, until backward has passed it."""
    saved = activations.saved_by(model, cfg)
    nbytes = _tokens(cfg) * activations.norm(saved, model.hidden, ITEMSIZE[cfg.precision])
    return nbytes // cfg.parallel.tensor_parallel_size if shares_tokens(cfg) else nbytes


def logits(model: Architecture, cfg: RunConfig, work: Work, tp: int = 1) -> int:
    """In chunks (`spec.output`): the output layer's input and the gradient of it, and one chunk's logits and
    probabilities. Else 12 bytes for each position with a target and word: at the start of backward there are the
    log-softmax, the gradient of it and of the logits, all fp32 (torch's cross_entropy). Tensor parallelism splits the
    vocabulary."""
    counted, words, width = ceil(_tokens(cfg) * work.target_share), ceil(model.vocabulary / tp), ITEMSIZE[cfg.precision]
    if not output.in_chunks(model.model_type, model.tied, cfg):
        return counted * words * 3 * FP32
    read = counted if counted == _tokens(cfg) else counted + _tokens(cfg)  # positions that count are copied out
    chunk = output.chunk(counted, words, width) * words * output.bytes_of_a_word(width, tp > 1)
    return (read + counted) * model.hidden * width + chunk


def gathered(cfg: RunConfig, layers: Sequence[Layer], frozen: Sequence[Sequence[Shape]], grid: Grid) -> int:
    """Whole parameters; none with one rank to gather from. A flat base has two buffers, each as large as its largest
    unit. DeepSpeed's ZeRO-3 holds `GATHERED_LAYERS` of the largest layer, at most the model. Full fine-tuning without
    recompute keeps the weights of the layers' matrices: torch's linear pins what it computed with until its backward
    pass (docs/log.md)."""
    if cfg.parallel.zero_stage != 3 or (grid.base_over or grid.dp) == 1:
        return 0
    if keeps_base_flat(cfg):
        cut = [unit for unit in frozen if len(unit) > 1 or len(unit[0]) > 1]
        return FLAT_BUFFERS * (grid.base_over or grid.dp) * max(flat_pieces(cut, cfg, grid))
    width, whole = ITEMSIZE[cfg.precision], sum(layer.numel for layer in layers)
    live = GATHERED_LAYERS * max(layer.numel for layer in layers)
    if cfg.method == "full":
        live += sum(layer.numel for layer in layers[recomputed_layers(cfg, len(layers)) :])
    return width * min(live, whole) // grid.tp


def exchanged(model: Architecture, cfg: RunConfig) -> int:
    """Two slots for all tokens of a pass, which tensor-parallel ranks fetch from each other (`parallel.exchange`)."""
    if not (shares_tokens(cfg) and cfg.parallel.overlap and cfg.train.micro_batch_size == 1):
        return 0
    return 2 * _tokens(cfg) * model.hidden * ITEMSIZE[cfg.precision]


def weight_gradients(cfg: RunConfig, layers: Sequence[Layer], grid: Grid) -> int:
    """Full fine-tuning: the gradients of a layer's weights before they are reduced, in the working precision; stage 0
    to 2 keep theirs among the states."""
    if cfg.method != "full" or cfg.parallel.zero_stage != 3:
        return 0
    return ITEMSIZE[cfg.precision] * max(layer.numel for layer in layers) // grid.tp


def step_workspace(states: States, trained: Sequence[Shape], cfg: RunConfig) -> int:
    """AdamW over many tensors at once makes one fp32 temporary; ZeRO-3 copies the gradients of a group first."""
    elements = states.adam // 8
    if cfg.parallel.zero_stage == 3 and not keeps_base_flat(cfg):
        share = elements / max(1, numel(trained))  # of each tensor, that this rank steps
        return int(2 * FP32 * share * largest_group(trained, share))
    return FP32 * elements


def largest_group(trained: Sequence[Shape], share: float) -> int:
    """Elements of the tensors that DeepSpeed's ZeRO-3 steps at once: those of a decay, in order, until there are
    `ADAM_GROUP` of this rank's parts or more."""
    largest = here = 0
    for shape in (shape for shape in trained if len(shape) > 1):
        here += prod(shape)
        largest = max(largest, here)
        if here * share >= ADAM_GROUP:
            here = 0
    return largest


def gathered_and_freed(cfg: RunConfig, layers: Sequence[Layer], grid: Grid) -> int:
    """What DeepSpeed's ZeRO-3 gathers anew for each layer, into buffers of many sizes on two streams."""
    if keeps_base_flat(cfg) or cfg.parallel.zero_stage != 3 or (grid.base_over or grid.dp) == 1:
        return 0
    live = GATHERED_LAYERS * max(layer.numel for layer in layers)
    return ITEMSIZE[cfg.precision] * min(live, sum(layer.numel for layer in layers)) // grid.tp


def waste(moments: Mapping[str, Moment], gather: int, stage: int) -> int:
    """Reserved and never filled. What a pass has held cannot serve the optimizer's few large temporaries, nor these the
    pass: of the two the smaller is reserved beside the peak. DeepSpeed's ZeRO-2 lays the gradients end to end before
    its step, as large as the temporary again, and frees what they were only then."""
    step, peak = moments["step"].workspace, max(moment.total for moment in moments.values())
    stays = moments["step"].total - step
    held = max(moment.total for name, moment in moments.items() if name != "step") - stays
    large = 2 * step if stage == 2 else step
    return int(WASTE[0] * GIB + WASTE[1] * peak + WASTE[2] * gather) + min(large, held)


def _tokens(cfg: RunConfig) -> int:
    return cfg.train.micro_batch_size * cfg.data.seq_len

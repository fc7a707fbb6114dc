"""Peer baseline: PyTorch FSDP2 (fully_shard per decoder layer) + PEFT LoRA; prints one JSON line on rank 0.

Of what came, this was changed: weights are read from the checkpoint, each rank its rows, so that losses can be compared;
--rows, so that both sides train on the same tokens; --ckpt-layers; --lr; the loss of all ranks; the seconds of every step; CPU.
"""
import argparse, json, os, time
import torch
import torch.distributed as dist
from safetensors import safe_open


def load(model, folder, rank, world):
    """Each rank reads its rows of every tensor: FSDP2 cuts dim 0 as torch.chunk does. Factors as PEFT draws them."""
    index = os.path.join(folder, "model.safetensors.index.json")
    where = json.load(open(index))["weight_map"] if os.path.exists(index) else None
    files = {}
    with torch.no_grad():
        for n, q in model.named_parameters():
            t = q.to_local()
            if "lora_A" in n:
                torch.nn.init.kaiming_uniform_(t, a=5 ** 0.5)
            elif "lora_B" in n:
                t.zero_()
            else:
                name = n.replace("base_model.model.", "").replace(".base_layer", "")
                file = where[name] if where else "model.safetensors"
                if file not in files:
                    files[file] = safe_open(os.path.join(folder, file), "pt").__enter__()
                each = -(-q.shape[0] // world)
                t.copy_(files[file].get_slice(name)[rank * each : rank * each + t.shape[0]])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model"); p.add_argument("--method", default="lora", choices=["lora", "full"])
    p.add_argument("--seq", type=int, default=2048); p.add_argument("--mb", type=int, default=1)
    p.add_argument("--steps", type=int, default=6); p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rank", type=int, default=8); p.add_argument("--targets", default="q_proj,v_proj")
    p.add_argument("--ckpt", type=int, default=1); p.add_argument("--compile", type=int, default=0)
    p.add_argument("--tag", default=""); p.add_argument("--liger", type=int, default=0)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--rows", default="", help="JSONL of {input_ids}, taken in order; without: random ids")
    p.add_argument("--ckpt-layers", type=int, default=None, help="recompute only the first so many layers")
    a = p.parse_args()
    local = int(os.environ["LOCAL_RANK"]); dev = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if dev == "cuda" else lambda: None
    if dev == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if dev == "cuda" else "gloo"); rank, world = dist.get_rank(), dist.get_world_size()
    from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
    from transformers import AutoConfig, AutoModelForCausalLM
    cfg = AutoConfig.from_pretrained(a.model)
    if a.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16)
        model.config.use_cache = False
        if a.method == "lora":
            from peft import LoraConfig, get_peft_model
            model = get_peft_model(model, LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules=a.targets.split(","), task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    model = model.to(torch.bfloat16)
    base = model.get_base_model() if a.method == "lora" else model
    total = sum(q.numel() for q in model.parameters()); trainable = sum(q.numel() for q in model.parameters() if q.requires_grad)
    if a.ckpt:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in base.model.layers[a.ckpt_layers:] if a.ckpt_layers is not None else []:
            layer.gradient_checkpointing = False
    model.train()
    mesh = dist.device_mesh.init_device_mesh(dev, (world,))
    mp = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    t0 = time.time()
    for layer in base.model.layers:
        if a.compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=mp)
    fully_shard(model, mesh=mesh, mp_policy=mp)
    model.to_empty(device=dev)
    load(model, a.model, rank, world)
    base.model.rotary_emb = type(base.model.rotary_emb)(cfg).to(dev)  # a buffer: to_empty made it nothing
    init_s = time.time() - t0
    opt = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=a.lr)
    if dev == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = [json.loads(line)["input_ids"] for line in open(a.rows)] if a.rows else None
    g = torch.Generator().manual_seed(rank); times, losses = [], []
    for s in range(a.steps):
        ids = torch.randint(0, cfg.vocab_size, (a.mb, a.seq), generator=g).to(dev)
        if rows:
            first = (s * world + rank) * a.mb
            ids = torch.tensor(rows[first : first + a.mb]).to(dev)
        dist.barrier(); synchronize(); t = time.time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(); torch.nn.utils.clip_grad_norm_([q for q in model.parameters() if q.requires_grad], 1.0)
        opt.step(); opt.zero_grad()
        synchronize(); dist.barrier(); times.append(time.time() - t)
        loss = loss.detach().double(); dist.all_reduce(loss); losses.append(round(loss.item() / world, 6))
    body = sorted(times[a.warmup:]); med = body[len(body) // 2]; toks = a.mb * a.seq * world / med
    if rank == 0:
        print("RESULT " + json.dumps({"tag": a.tag, "peer": "peft+fsdp2" + ("+compile" if a.compile else "") + ("+liger" if a.liger else ""), "method": a.method, "world": world, "params_b": round(total / 1e9, 3),
              "trainable": trainable, "seq": a.seq, "mb": a.mb, "init_s": round(init_s, 1), "step_s": round(med, 4), "tok_s": round(toks, 1),
              "tflops_4n_per_gpu": round(4 * total * toks / world / 1e12, 1), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if dev == "cuda" else 0,
              "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if dev == "cuda" else 0, "loss": losses,
              "step_times": [round(x, 6) for x in times], "device": torch.cuda.get_device_name() if dev == "cuda" else "cpu"}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Peer baseline: HF transformers + PEFT on one GPU in a plain PyTorch loop; prints one JSON line.

As documented: the defaults (the model in bf16, SDPA attention, AdamW). Beyond: --liger (kernels), --compile. PEFT's
documentation compiles the whole model (--compile=model); layer by layer (--compile=layers) is the usual other way.
"""
import argparse, json, time
import torch


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model"); p.add_argument("--method", default="lora", choices=["lora", "full"])
    p.add_argument("--seq", type=int, default=2048); p.add_argument("--mb", type=int, default=1)
    p.add_argument("--steps", type=int, default=6); p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rank", type=int, default=8); p.add_argument("--targets", default="q_proj,v_proj")
    p.add_argument("--ckpt", type=int, default=1); p.add_argument("--ckpt-layers", type=int, default=None)
    p.add_argument("--compile", default="", choices=["", "model", "layers"])
    p.add_argument("--liger", type=int, default=0); p.add_argument("--liger-without", default="", help="kernels left out, as rms_norm,rope")
    p.add_argument("--rows", default="", help="JSONL of {input_ids}, taken in order; without: random ids")
    p.add_argument("--tag", default="")
    a = p.parse_args()
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if dev == "cuda" else lambda: None
    from transformers import AutoConfig, AutoModelForCausalLM
    cfg = AutoConfig.from_pretrained(a.model)
    if a.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama(**{name: False for name in a.liger_without.split(",") if name})
    t0 = time.time()
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16, device_map=dev)
    load_s = time.time() - t0
    model.config.use_cache = False
    if a.ckpt:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers[a.ckpt_layers:] if a.ckpt_layers is not None else []:
            layer.gradient_checkpointing = False
    layers = model.model.layers
    if a.method == "lora":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules=a.targets.split(","), task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    model.train()
    params = [q for q in model.parameters() if q.requires_grad]
    total, trainable = sum(q.numel() for q in model.parameters()), sum(q.numel() for q in params)
    opt = torch.optim.AdamW(params, lr=1e-4)
    if a.compile == "model":
        model = torch.compile(model)
    for layer in layers if a.compile == "layers" else []:
        layer.compile()
    init_s = time.time() - t0
    if dev == "cuda":
        torch.cuda.reset_peak_memory_stats()
    g = torch.Generator().manual_seed(0)
    rows = [json.loads(line)["input_ids"] for line in open(a.rows)] if a.rows else None
    times, losses = [], []
    for s in range(a.steps):
        ids = torch.randint(0, cfg.vocab_size, (a.mb, a.seq), generator=g).to(dev)
        if rows:
            ids = torch.tensor(rows[s * a.mb : (s + 1) * a.mb]).to(dev)
        synchronize(); t = time.time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(); torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(); opt.zero_grad()
        synchronize(); times.append(time.time() - t); losses.append(round(loss.item(), 6))
    body = sorted(times[a.warmup:]); med = body[len(body) // 2]; toks = a.mb * a.seq / med
    print("RESULT " + json.dumps({"tag": a.tag, "peer": "peft" + ("+liger" if a.liger else "") + (f"+compile ({a.compile})" if a.compile else ""), "method": a.method, "world": 1,
          "params_b": round(total / 1e9, 3), "trainable": trainable, "seq": a.seq, "mb": a.mb, "load_s": round(load_s, 1), "init_s": round(init_s, 1), "step_s": round(med, 4), "tok_s": round(toks, 1),
          "tflops_4n_per_gpu": round(4 * total * toks / 1e12, 1), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if dev == "cuda" else 0,
          "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if dev == "cuda" else 0, "save_s": None, "loss": losses,
          "step_times": [round(x, 6) for x in times], "device": torch.cuda.get_device_name() if dev == "cuda" else "cpu"}), flush=True)


if __name__ == "__main__":
    main()

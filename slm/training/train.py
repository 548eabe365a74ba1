"""Trains the model with JAX on the CPU: llama architecture, 4 layers of width 192, 1.8 million parameters.

    python train.py 700        # steps; reads ids.npy and mask.npy, writes weights.pkl, resumes from it
"""

import os
import pickle
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = 1024, 192, 4, 6, 3, 512
HEAD = WIDTH // HEADS
CONTEXT, BATCH = 320, 12
BOS = 1


def init(key):
    keys = iter(jax.random.split(key, 100))

    def normal(*shape, scale=0.02):
        return jax.random.normal(next(keys), shape) * scale

    narrow = 0.02 / (2 * LAYERS) ** 0.5
    return {
        "embedding": normal(VOCAB, WIDTH),
        "norm": jnp.ones(WIDTH),
        "layers": [{
            "attn_norm": jnp.ones(WIDTH), "ffn_norm": jnp.ones(WIDTH),
            "attn_q": normal(WIDTH, WIDTH), "attn_k": normal(KV_HEADS * HEAD, WIDTH), "attn_v": normal(KV_HEADS * HEAD, WIDTH),
            "attn_output": normal(WIDTH, WIDTH, scale=narrow),
            "ffn_gate": normal(HIDDEN, WIDTH), "ffn_up": normal(HIDDEN, WIDTH), "ffn_down": normal(WIDTH, HIDDEN, scale=narrow),
        } for _ in range(LAYERS)],
    }


ANGLES = np.outer(np.arange(CONTEXT), 1 / (10000 ** (np.arange(0, HEAD, 2) / HEAD)))
COS, SIN = jnp.array(np.cos(ANGLES)), jnp.array(np.sin(ANGLES))
CAUSAL = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))


def rms(x, w):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w


def rope(x):
    # Neighbours form a pair: this is the order in which a llama GGUF stores query and key rows.
    a, b, c, s = x[..., 0::2], x[..., 1::2], COS[:, None], SIN[:, None]
    return jnp.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)


def logits(p, ids):
    h = p["embedding"][ids]
    for l in p["layers"]:
        y = rms(h, l["attn_norm"])
        b, t, _ = y.shape
        q = rope((y @ l["attn_q"].T).reshape(b, t, HEADS, HEAD))
        k = rope((y @ l["attn_k"].T).reshape(b, t, KV_HEADS, HEAD))
        v = (y @ l["attn_v"].T).reshape(b, t, KV_HEADS, HEAD)
        k, v = jnp.repeat(k, HEADS // KV_HEADS, 2), jnp.repeat(v, HEADS // KV_HEADS, 2)
        a = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD ** 0.5
        a = jax.nn.softmax(jnp.where(CAUSAL, a, -1e9), -1)
        h = h + jnp.einsum("bhts,bshd->bthd", a, v).reshape(b, t, WIDTH) @ l["attn_output"].T
        y = rms(h, l["ffn_norm"])
        h = h + (jax.nn.silu(y @ l["ffn_gate"].T) * (y @ l["ffn_up"].T)) @ l["ffn_down"].T
    return rms(h, p["norm"]) @ p["embedding"].T


def loss(p, x, y, mask):
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y)
    weight = mask + 0.1
    return (entropy * weight).sum() / weight.sum()


def main():
    steps = int(sys.argv[1])
    ids, mask = np.load("ids.npy").astype(np.int32), np.load("mask.npy").astype(np.float32)
    starts = np.where(ids == BOS)[0]
    starts = starts[starts < len(ids) - CONTEXT - 1]
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 4e-3, 50, steps, 1e-4), weight_decay=0.05)

    @jax.jit
    def step(p, state, x, y, m):
        value, gradient = jax.value_and_grad(loss)(p, x, y, m)
        update, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, update), state, value

    if os.path.exists("weights.pkl"):
        with open("weights.pkl", "rb") as f:
            params, state, done = pickle.load(f)
    else:
        params = init(jax.random.PRNGKey(0))
        state, done = optimizer.init(params), 0
    print("parameters", sum(x.size for x in jax.tree.leaves(params)), flush=True)
    began = time.time()
    while done < steps:
        # Seeded by the step, so that a resumed run sees the batches an unbroken one would.
        at = np.random.default_rng(done).choice(starts, BATCH)
        x, y, m = (np.stack([a[i + d:i + d + CONTEXT] for i in at]) for a, d in ((ids, 0), (ids, 1), (mask, 1)))
        params, state, value = step(params, state, x, y, m)
        done += 1
        if done % 50 == 0 or done == steps:
            print(f"step {done} loss {float(value):.4f} after {time.time() - began:.0f} s", flush=True)
            with open("weights.pkl", "wb") as f:
                pickle.dump((jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, state), done), f)


if __name__ == "__main__":
    main()

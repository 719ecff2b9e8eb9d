"""The contract once more, written for the eye: Python loops over sequences and tokens, float64.

Nothing of the package is used, so that what the package shares among its routes is checked from
outside. Only the loss and the statistics are written down; autograd gives the gradient.
"""

import math
from collections import defaultdict

import torch


def log_p(z, temperature, words):
    """Of each word, -inf of those that are not kept; None keeps all."""
    x = z / temperature
    if words is None:
        return x - torch.logsumexp(x, 0)
    total = torch.logsumexp(torch.stack([x[k] for k in words]), 0)
    nothing = torch.tensor(-math.inf, dtype=x.dtype)
    return torch.stack([x[k] - total if k in words else nothing for k in range(len(x))])


def loss_and_stats(logits, labels, sequences, k):
    """`sequences`: lists of token indices. `k`: keywords, all per token as lists or plain values.

    Returns (loss or list of losses per token, {group: (Σw, Σw·d, Σw·d²)}).
    """
    n = len(labels)
    valid = [k["mask"][t] and labels[t] != -100 for t in range(n)]
    tokens = [[t for t in s if valid[t]] for s in sequences]
    alive = [s for s in tokens if s]
    clamp = k["log_ratio_clamp"]

    def clip(x):
        # A clamped log-ratio is a constant.
        return torch.clamp(x, -clamp, clamp)

    rows = {t: log_p(logits[t], k["temperature"][t], k["words"][t]) for s in alive for t in s}
    logp = {t: row[labels[t]] for t, row in rows.items()}
    old = {t: logp[t].detach() if k["old_logps"] is None else k["old_logps"][t] for t in rows}
    delta = {t: logp[t] - old[t] for t in rows}
    if k["ratio_level"] == "sequence":
        for s in alive:
            mean = sum(delta[t] for t in s) / len(s)
            delta |= dict.fromkeys(s, mean)
    ratio = {t: torch.exp(clip(delta[t])) for t in rows}

    a, denominator = {}, 1.0
    for s in alive:
        for t in s:
            a[t] = 1.0 / len(s) if k["reduction"] == "seq-mean-token-mean" else 1.0
    if k["reduction"] == "token-mean":
        denominator = len(rows)
    elif k["reduction"] != "none":
        denominator = len(alive)
    if k["reduction"] == "seq-mean-token-sum-norm":
        denominator *= len(sequences[0])
    if k["normalizer"] is not None:
        denominator = k["normalizer"]
    denominator = denominator or 1.0

    members = defaultdict(list)
    for t in rows:
        members[k["group"][t]].append(t)
    center = {}
    for g, ts in members.items():
        mean = sum(a[t] * ratio[t] for t in ts) / sum(a[t] for t in ts)
        for t in ts:
            center[t] = {"one": 1.0, "group": mean}.get(k["center"], k["means"][g])

    def policy(t):
        gain, r = k["importance_weights"][t] * k["advantages"][t], ratio[t]
        if k["policy_loss"] == "ratio":
            return -gain * r
        low, high = k["clip_range"]
        near = torch.clamp(r, 1 - low, 1 + high)
        if k["policy_loss"] == "cispo":
            return -gain * near.detach() * logp[t]
        worse = torch.maximum(-gain * r, -gain * near)
        if k["dual_clip"] is not None and gain < 0:
            worse = torch.minimum(worse, -gain * k["dual_clip"])
        return worse

    losses = [logits.sum() * 0 for _ in range(n)]
    for t in rows:
        q = 0.0
        kl = 0.0
        if k["ref_logps"] is not None:
            q = clip(k["ref_logps"][t] - logp[t])
            kl = {"k1": -q, "k2": q**2 / 2, "k3": torch.exp(q) - 1 - q}[k["kl_estimator"]]
            kl = kl * ratio[t] if k["kl_unbiased"] else kl
        entropy = -sum(v.exp() * v for v in rows[t] if v > -math.inf)
        losses[t] = (a[t] / denominator) * (
            policy(t)
            + k["variance_coef"][t] * (ratio[t] - center[t]) ** 2
            + k["kl_coef"] * kl
            - k["entropy_coef"] * entropy
        )
    stats = {
        g: tuple(sum((a[t] * (ratio[t].item() - 1) ** power) for t in ts) for power in (0, 1, 2))
        for g, ts in members.items()
    }
    return (losses if k["reduction"] == "none" else sum(losses)), stats

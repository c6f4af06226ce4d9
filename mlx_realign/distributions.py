# SPDX-License-Identifier: Apache-2.0
"""Next-token distributions: log-probs of logits, and how far one lies from another."""

import mlx.core as mx


def log_probs(logits: mx.array) -> mx.array:
    """float32 [..., V] of logits [..., V] of any dtype, nats."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, -1, keepdims=True)


def divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    """KL(p || q) in nats, float32 [...], of log-probs float32 [..., V] of p and q; tokens that both rule out add 0.

    Computed as the sum of p log(p / q) - p + q. Each of these terms is at least 0 and of second order in the
    difference, so a tiny KL is no rounding error of a sum of large terms that cancel.
    """
    p, q, d = mx.exp(log_p), mx.exp(log_q), log_p - log_q
    near = mx.abs(d) < 0.5
    little = mx.where(near, d, 0.0)
    terms = mx.where(near, p * (little + mx.expm1(-little)), p * d - (p - q))
    return mx.where(p > 0, terms, q).sum(-1)
